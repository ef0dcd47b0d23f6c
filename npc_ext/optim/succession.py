"""Importance that is handed over from one optimizer of a model to the next, so that nothing is lost silently.

A weak registry records which optimizers held importance for a model (`note_importance`). A later optimizer can then
warn that it begins without.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from .._names import listed
from .._warn import warn
from ..neurons.tap import ImportanceWarning

if TYPE_CHECKING:
    from typing_extensions import Self

# Model -> kind of importance -> what it belongs to (layers or parameters, by name) -> the optimizer that held it.
_holders: weakref.WeakKeyDictionary[nn.Module, dict[str, dict[str, str]]] = weakref.WeakKeyDictionary()


def note_importance(model: nn.Module, kind: str, names: Iterable[str], optimizer: str) -> None:
    """Records that an optimizer holds the importance of some layers or parameters of a model."""
    _holders.setdefault(model, {}).setdefault(kind, {}).update(dict.fromkeys(names, optimizer))


def holders_of_importance(model: nn.Module, kind: str) -> dict[str, str]:
    """Which optimizers held importance for a model before: layer or parameter name -> class name."""
    return dict(_holders.get(model, {}).get(kind, {}))


def in_first_block(earlier: Tensor, later: Tensor) -> Tensor:
    """`later`, with an earlier, smaller tensor's values in the block where both have elements; changed in place."""
    later[tuple(slice(size) for size in earlier.shape)] = earlier.to(later.device, later.dtype)
    return later


def blocks_of(model: nn.Module, name: str) -> int:
    """How many equal blocks of rows a parameter has that grow each by itself, as those of queries, keys and values."""
    owner, _, own = name.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(module, nn.MultiheadAttention) and own.startswith("in_proj"):
        return 3
    if isinstance(module, (nn.LSTM, nn.LSTMCell)) and not own.startswith("weight_hr"):
        return 4  # gates
    return 3 if isinstance(module, (nn.GRU, nn.GRUCell)) else 1


def fitted(earlier: Tensor, later: Tensor, what: str, blocks: int = 1) -> Tensor:
    """`later` with an earlier tensor's values, which may have fewer rows (neurons, connections) and no more.

    Both consist of `blocks` of rows, of which each may have grown.

    Raises:
        ValueError: it does not fit.
    """
    if earlier.ndim != later.ndim or any(a > b for a, b in zip(earlier.shape, later.shape, strict=True)):
        raise ValueError(
            f"{what} had importance of shape {tuple(earlier.shape)} in the earlier optimizer, but here it has shape "
            f"{tuple(later.shape)}; expected the same, or a larger one, as of a layer that has grown. To begin without "
            "it, leave load_importance out, or pass None"
        )
    with torch.no_grad():
        if blocks > 1:
            in_first_block(earlier.detach().unflatten(0, (blocks, -1)), later.unflatten(0, (blocks, -1)))
            return later
        return in_first_block(earlier.detach(), later)


class ImportanceHolder(torch.optim.Optimizer):
    """An optimizer that may keep importance, and can take it over from an earlier one."""

    # What importance is kept of, for optimizers that keep some: it can be handed over within a kind.
    _KIND: ClassVar[str] = ""

    _model: nn.Module
    _may_begin_without: bool  # importance, where another optimizer of the model holds it

    def _called(self) -> str:
        """The class that users built."""
        return type(self).__name__

    def _built_as(self) -> str:
        """How users build such an optimizer, for messages."""
        return f"{self._called()}(model, ...)"

    def _forget_plans(self) -> None:
        """Called wherever the state is replaced."""

    def _held(self) -> dict[str, dict[str, Tensor]]:
        """The importance that was gathered: by the layer or parameter that it belongs to, tensors by their names."""
        return {}

    def _held_in(self, states: Mapping[int, Mapping[str, Any]]) -> dict[str, dict[str, Tensor]]:
        """The same in saved states, by the id of the parameter here."""
        return {}

    def _take_importance(self, held: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Takes importance over. Raises ValueError, before any change, where it does not fit."""

    def _note_importance(self) -> None:
        """Records that this optimizer holds importance, for later optimizers of the model."""
        if names := list(self._held()):
            note_importance(self._model, self._KIND, names, self._called())

    def _warn_if_importance_is_lost(self) -> None:
        earlier = {} if self._may_begin_without else holders_of_importance(self._model, self._KIND)
        if not earlier or any(bool(own.any()) for tensors in self._held().values() for own in tensors.values()):
            return
        here = self._may_hold()
        names = [name for name in earlier if name in here]
        if not names:
            return
        warn(
            f"an earlier {earlier[names[0]]} of this model held the importance of {listed(names)}, and this "
            f"{self._called()} begins without, so that what was learned is not protected. Use one optimizer for all "
            f"tasks, or hand importance over: {self._built_as()}.load_importance(earlier), where `earlier` "
            "is the optimizer or its state_dict(); load_importance(None) begins at zero on purpose",
            ImportanceWarning,
        )

    def _may_hold(self) -> Collection[str]:
        """Names of the layers or parameters whose importance this optimizer keeps."""
        return ()

    def load_importance(self, earlier: Any) -> Self:
        """Takes over the importance that an earlier optimizer of the package gathered, by the names of layers.

        For code that builds a new optimizer for every task: `NPC(model, lr=0.1).load_importance(earlier)`. Layers may
        have grown since: the first neurons keep their importance, the others begin at zero. Momentum is not taken over.
        Without this, the first step warns that the importance of an earlier optimizer of the model is lost. It is the
        first step and not the constructor, so that there is time to load a checkpoint.

        Args:
            earlier: the optimizer, of the same kind: NPC, NPCAdamW and PlasticityWrapper take over from each other, as
                do EWC, MAS and SSL. If it was built on the same model, its taps are removed, and it takes no more
                steps. Or its `state_dict()`, with as many parameters in the same order. None begins at zero on purpose,
                without the warning.

        Returns:
            This optimizer.

        Raises:
            ValueError: a layer has fewer neurons than before, no layer has the same name, or a state dict has no
                importance. Nothing is changed then.
            TypeError: `earlier` keeps no importance, or that of another kind.
        """
        if earlier is not None:
            if isinstance(earlier, Mapping):
                held = self._held_in(self._states_saved_in(earlier.get("plasticity", earlier)))
                if not held and self._held():  # where there is some from the beginning on
                    raise ValueError(
                        f"earlier is a state dict without {self._KIND}, so another optimizer saved it; expected that "
                        f"of an optimizer that keeps it as {self._called()} does, or None"
                    )
            else:
                earlier = self._of_this_kind(earlier)
                held = earlier._held()
            here = self._may_hold()
            if held and not any(name in here for name in held):
                raise ValueError(
                    f"the earlier optimizer held the importance of {listed(held)}, but here are {listed(here)}; "
                    "expected some of the same names: build both on the same model"
                )
            self._take_importance({name: own for name, own in held.items() if name in here})
            self._forget_plans()
            if isinstance(earlier, ImportanceHolder) and earlier is not self and earlier._model is self._model:
                earlier._leave_model()
        self._may_begin_without = True
        return self

    def _of_this_kind(self, earlier: Any) -> ImportanceHolder:
        inner = earlier
        while not isinstance(inner, ImportanceHolder):
            inner = getattr(inner, "_tracker", None) or getattr(inner, "optimizer", None)
            if inner is None:
                break
        if not isinstance(inner, ImportanceHolder) or not inner._KIND or inner._KIND != self._KIND:
            raise TypeError(
                f"earlier is a {type(earlier).__name__}; expected an optimizer that keeps {self._KIND} as "
                f"{self._called()} does, its state_dict(), or None"
            )
        return inner

    def _states_saved_in(self, state_dict: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
        """The states of a state dict, by the id of the parameter in the same place here."""
        if not {"state", "param_groups"} <= state_dict.keys():
            raise TypeError("earlier is a mapping without state and param_groups; expected an optimizer's state_dict()")
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        if len(saved) != len(own):
            raise ValueError(
                f"the state dict has {len(saved)} parameters, this optimizer {len(own)}; expected as many, in the same "
                "order: load_importance of the optimizer itself goes by the names of layers"
            )
        return {id(one): state_dict["state"].get(index, {}) for index, one in zip(saved, own, strict=True)}

    def _leave_model(self) -> None:
        """Takes out of the model what measures: another optimizer goes on."""
