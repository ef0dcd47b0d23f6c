"""Notices when parameters of a model are replaced after the optimizer was built."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .._torch import own_children, own_parameters
from ..distributed.shards import is_sharded


@dataclass(frozen=True)
class Lost:
    """A trained parameter that is not in its place in the model any more, and those that are there instead."""

    name: str
    parameter: Tensor
    replacements: dict[str, Tensor]


class KnownModel:
    """The parameters of a model that an optimizer trains.

    Attributes:
        parameters: those trained, by name; one that several modules share by each of its names.
    """

    def __init__(self, parameters: dict[str, Tensor], names: Collection[str], model: nn.Module) -> None:
        self.parameters = parameters
        self._names = names  # of all parameters that the model had, trained or not
        self.look_again(model)

    @classmethod
    def of(
        cls, model: nn.Module, trained: Collection[int], before: KnownModel | None
    ) -> tuple[KnownModel, list[tuple[Tensor, Tensor]]]:
        """What to know of a model, and which trained parameters have been replaced by others that are trained.

        Args:
            model: the network.
            trained: the ids of the parameters that the optimizer trains.
            before: what was known.
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
                replaced.append((old, parameters[name]))
            elif id(old) in trained:
                parameters[name] = old
        return cls(parameters, before._names, model), replaced

    def look_again(self, model: nn.Module) -> None:
        """Makes the model as it is now the one that `is_unchanged` compares with."""
        self._places: list[tuple[Mapping[str, Any], str, Any]] = []
        for module in model.modules():
            for owned in (own_children(module), own_parameters(module)):
                self._places += [(owned, key, what) for key, what in owned.items()]

    def is_unchanged(self, model: nn.Module) -> bool:
        """Whether all modules and parameters are still where they were; quick."""
        if not self._places:  # of a copy
            self.look_again(model)
        for owned, key, what in self._places:
            if owned.get(key) is not what:
                return False
        return True

    def lost(self, model: nn.Module) -> list[Lost]:
        """The trained parameters that others have replaced in the model."""
        now: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        present = set(map(id, now.values()))
        found = []
        for name, parameter in self.parameters.items():
            if name in now:
                if now[name] is parameter:
                    continue
                if is_sharded(parameter) and not is_sharded(now[name]):
                    continue  # put together for the time being
                found.append(Lost(name, parameter, {name: now[name]}))
                continue
            if id(parameter) in present:  # under another name
                continue
            module = name.rpartition(".")[0]
            # A parametrization computes it from others. A module that is gone was removed on purpose.
            prefix = f"{module}." if module else "parametrizations."
            others = {other: own for other, own in now.items() if other not in self._names and other.startswith(prefix)}
            if others:
                found.append(Lost(name, parameter, others))
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_places": []}


def check_not_sharded(lost: Iterable[Lost]) -> None:
    """Raises RuntimeError if `fully_shard` has put others in the place of parameters."""
    for one in lost:
        if not is_sharded(one.parameter) and any(map(is_sharded, one.replacements.values())):
            raise RuntimeError(
                f"the optimizer has a parameter {one.name!r} in whose place fully_shard has put a sharded one since, "
                "so it would train nothing: build the optimizer after fully_shard (and not between a forward pass and "
                "its backward pass, when parameters are put together); with Accelerate prepare "
                "both in one call: model, optimizer = accelerator.prepare(model, optimizer)"
            )
