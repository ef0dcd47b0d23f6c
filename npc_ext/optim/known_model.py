"""Notices when parameters of a model are replaced after the optimizer was built."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .._torch import direct_children, direct_parameters
from ..distributed.shards import is_sharded


@dataclass(frozen=True)
class Lost:
    """A trained parameter that is no longer in the model, and the parameters that replaced it, by name."""

    name: str
    parameter: Tensor
    replacements: dict[str, Tensor]


class KnownModel:
    """The parameters of a model that an optimizer trains.

    Attributes:
        parameters: the trained parameters by name; a shared parameter by each of its names.
    """

    def __init__(self, parameters: dict[str, Tensor], names: Collection[str], model: nn.Module) -> None:
        self.parameters = parameters
        self._names = names  # of all parameters that the model had, trained or not
        self.look_again(model)

    @classmethod
    def of(
        cls, model: nn.Module, trained: Collection[int], before: KnownModel | None
    ) -> tuple[KnownModel, list[tuple[str, Tensor, Tensor]]]:
        """Records a model; also returns the trained parameters that were replaced: name, parameter and replacement.

        Args:
            model: the network.
            trained: the ids of the parameters that the optimizer trains.
            before: the model as it was recorded before.
        """
        now: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        parameters = {name: parameter for name, parameter in now.items() if id(parameter) in trained}
        if before is None:
            return cls(parameters, set(now), model), []
        present, replaced = set(map(id, now.values())), []
        for name, old in before.parameters.items():
            if id(old) in present:
                continue
            if name in parameters:
                replaced.append((name, old, parameters[name]))
            elif id(old) in trained:
                parameters[name] = old
        return cls(parameters, before._names, model), replaced

    def look_again(self, model: nn.Module) -> None:
        """Records the model as it is now for `is_unchanged`."""
        self._places: list[tuple[Mapping[str, Any], str, Any]] = []
        for module in model.modules():
            for members in (direct_children(module), direct_parameters(module)):
                self._places += [(members, name, member) for name, member in members.items()]

    def is_unchanged(self, model: nn.Module) -> bool:
        """Whether all modules and parameters are still in their places. This is fast."""
        if not self._places:  # in a copy
            self.look_again(model)
        for members, name, member in self._places:
            if members.get(name) is not member:
                return False
        return True

    def lost(self, model: nn.Module, trained: Collection[int]) -> list[Lost]:
        """The parameters that were replaced in the model by others, of which not all are `trained` (ids)."""
        now: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        present = set(map(id, now.values()))
        found = []
        for name, parameter in self.parameters.items():
            if name in now:
                is_gathered = is_sharded(parameter) and not is_sharded(now[name])  # for the moment
                replacements = {} if now[name] is parameter or is_gathered else {name: now[name]}
            elif id(parameter) in present:  # it has another name
                replacements = {}
            else:
                # A parametrization computes the parameter from new ones. A missing module was removed on purpose.
                module = name.rpartition(".")[0]
                prefix = f"{module}." if module else "parametrizations."
                replacements = {
                    other: p for other, p in now.items() if other not in self._names and other.startswith(prefix)
                }
            if any(id(replacement) not in trained for replacement in replacements.values()):
                found.append(Lost(name, parameter, replacements))
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_places": []}


def check_not_sharded(lost: Iterable[Lost]) -> None:
    """Raises RuntimeError if `fully_shard` has replaced parameters."""
    for old in lost:
        if not is_sharded(old.parameter) and any(map(is_sharded, old.replacements.values())):
            raise RuntimeError(
                f"fully_shard has replaced the optimizer's parameter {old.name!r} with a sharded one, so the optimizer "
                "would train nothing: build the optimizer after fully_shard (and not between a forward pass and its "
                "backward pass, while parameters are gathered); with Accelerate, prepare both in one call: "
                "model, optimizer = accelerator.prepare(model, optimizer)"
            )
