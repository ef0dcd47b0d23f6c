"""Takes importance over from an earlier optimizer of a model, so that none is lost silently.

A weak registry records which optimizers held importance for a model. A later optimizer that starts without importance
can then warn.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from .._names import listed
from .._warn import warn
from ..distributed.shards import is_sharded
from ..neurons.tap import ImportanceWarning
from ..reference import compute_dtype

if TYPE_CHECKING:
    from typing_extensions import Self

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Model -> kind of importance -> name of a layer or parameter -> class name of the optimizer that held its importance.
_holders: weakref.WeakKeyDictionary[nn.Module, dict[str, dict[str, str]]] = weakref.WeakKeyDictionary()


def first_block(tensor: Tensor, shape: Iterable[int]) -> Tensor:
    """Views the elements of a tensor at the beginning of each dimension."""
    return tensor[tuple(map(slice, shape))]


def blocks_of(model: nn.Module, name: str) -> int:
    """The number of equal blocks of rows in a parameter that grow separately, such as queries, keys and values."""
    module_name, _, parameter = name.rpartition(".")
    module = model.get_submodule(module_name)
    if isinstance(module, nn.MultiheadAttention) and parameter.startswith("in_proj"):
        return 3
    if isinstance(module, (nn.LSTM, nn.LSTMCell)) and not parameter.startswith("weight_hr"):
        return 4  # gates
    if isinstance(module, _TRANSPOSED) and parameter == "bias":
        return module.groups
    return 3 if isinstance(module, (nn.GRU, nn.GRUCell)) else 1


def _in_blocks(earlier: Tensor, later: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Splits the rows of both into blocks, unless one has another number of blocks."""
    if blocks == 1 or earlier.shape[0] % blocks or later.shape[0] % blocks:
        return earlier, later
    return earlier.unflatten(0, (blocks, -1)), later.unflatten(0, (blocks, -1))


def fitted(earlier: Tensor, later: Tensor, what: str, blocks: int = 1) -> Tensor:
    """Copies an earlier tensor, which may have fewer rows (neurons, connections), to the first rows of `later`.

    Both consist of `blocks` of rows, which may each have grown.

    Args:
        earlier: the tensor to copy.
        later: the tensor to write to; it is returned.
        what: the name of the layer or parameter, for messages.
        blocks: see `blocks_of`.

    Raises:
        ValueError: `earlier` does not fit.
    """
    if earlier.ndim != later.ndim or any(a > b for a, b in zip(earlier.shape, later.shape, strict=True)):
        raise ValueError(
            f"{what} had importance of shape {tuple(earlier.shape)} in the earlier optimizer, but here it has shape "
            f"{tuple(later.shape)}; expected the same or a larger shape, as in a layer that has grown. To start "
            "without importance, call load_importance(None)"
        )
    with torch.no_grad():
        source, target = _in_blocks(earlier, later, blocks)
        first_block(target, source.shape).copy_(source)
    return later


def continues(later: Tensor, earlier: Tensor, blocks: int = 1) -> bool:
    """Whether a parameter has the values of an earlier one, or has grown from it: each block begins with them.

    A new layer of the same name does not. Values of sharded parameters are not compared.
    """
    if later is earlier or is_sharded(later) or is_sharded(earlier):
        return True
    if later.ndim != earlier.ndim or any(a > b for a, b in zip(earlier.shape, later.shape, strict=True)):
        return False
    source, target = _in_blocks(earlier.detach(), later.detach(), blocks)
    values = source.to(target.device, target.dtype)
    return torch.equal(first_block(target, values.shape), values)


def warn_of_replaced(names: Iterable[str]) -> None:
    warn(
        f"replaced by new parameters, which do not begin with the old values: {listed(names)}. So these start without "
        "the state of the old ones: importance, anchors, moments. To keep importance or anchors, call "
        "load_importance(state_dict) with the state_dict() from before",
        ImportanceWarning,
    )


class ImportanceHolder(torch.optim.Optimizer):
    """An optimizer of a model that may hold importance, and can take it over from an earlier optimizer."""

    _KIND: ClassVar[str]  # of importance. Only optimizers of one kind take over from each other.
    # Tensors of a parameter's state that have its shape, but not its dtype: torch would cast them to it.
    _STATE_TENSORS: ClassVar[tuple[str, ...]] = ()

    _model: nn.Module
    _may_begin_without = False  # whether to start without importance although another optimizer of the model held some

    def _all_parameters(self) -> list[Tensor]:
        """The parameters of all groups."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _called(self) -> str:
        """The name of the class that users build."""
        return type(self).__name__

    def _built_as(self) -> str:
        """The call that builds such an optimizer, for messages."""
        return f"{self._called()}(model, ...)"

    def _forget_plans(self) -> None:
        """Called when tensors of the state were replaced."""

    def _held(self) -> dict[str, dict[str, Tensor]]:
        """The importance held: layer or parameter name -> tensors by name."""
        return self._held_in({id(parameter): state for parameter, state in self.state.items()})

    # By default, importance is kept for each element of a parameter, in its state under _STATE_TENSORS.

    def _may_hold(self) -> Mapping[str, Any]:
        """The layers or parameters that can have importance here, by name."""
        raise NotImplementedError

    def _holders(self) -> Mapping[str, Tensor]:
        """The parameters that show whether a layer or parameter was replaced, by its name."""
        return self._may_hold()

    def _held_in(self, states: Mapping[int, Mapping[str, Any]]) -> dict[str, dict[str, Tensor]]:
        """The importance in saved states, which are given by the id of this optimizer's parameter."""
        named = ((name, states.get(id(parameter), {})) for name, parameter in self._may_hold().items())
        return {
            name: {tensor: state[tensor] for tensor in self._STATE_TENSORS if tensor in state}
            for name, state in named
            if self._STATE_TENSORS[0] in state
        }

    @torch.no_grad()
    def _take_importance(self, held: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Takes importance over. If it does not fit, raises ValueError and changes nothing."""
        taken: dict[Tensor, dict[str, Tensor]] = {}
        for name, parameter in self._may_hold().items():
            if name in held and parameter not in taken:  # it may have several names
                blocks = blocks_of(self._model, name)
                taken[parameter] = {
                    tensor: fitted(values, self._new_state_tensor(parameter, tensor), repr(name), blocks)
                    for tensor, values in held[name].items()
                }
        for parameter, tensors in taken.items():
            self.state[parameter].update(tensors)

    def _new_state_tensor(self, parameter: Tensor, name: str) -> Tensor:
        """One of the `_STATE_TENSORS` of a parameter before its first step."""
        return torch.zeros_like(parameter, dtype=self._state_tensor_dtype(parameter))

    def _state_tensor_dtype(self, parameter: Tensor) -> torch.dtype:
        """The dtype of a parameter's `_STATE_TENSORS`."""
        return compute_dtype(parameter.dtype)

    def _note_importance(self) -> None:
        """Records that this optimizer holds importance, for later optimizers of the model."""
        if held := self._held():
            holders = _holders.setdefault(self._model, {}).setdefault(self._KIND, {})
            holders.update(dict.fromkeys(held, self._called()))

    def _warn_if_importance_is_lost(self) -> None:
        earlier = {} if self._may_begin_without else _holders.get(self._model, {}).get(self._KIND, {})
        if not earlier or any(bool(held.any()) for tensors in self._held().values() for held in tensors.values()):
            return
        here = self._may_hold()
        names = [name for name in earlier if name in here]
        if not names:
            return
        warn(
            f"an earlier {earlier[names[0]]} of this model held the importance of {listed(names)}, but this "
            f"{self._called()} starts without importance, so earlier tasks are not protected. Use one optimizer for "
            f"all tasks, or take the importance over: {self._built_as()}.load_importance(earlier), with the earlier "
            "optimizer or its state_dict(); load_importance(None) starts at zero without this warning",
            ImportanceWarning,
        )

    def load_importance(self, earlier: Any) -> Self:
        """Takes over the importance of an earlier optimizer, by the names of layers or parameters.

        Use this if you build a new optimizer for every task: `NPC(model, lr=0.1).load_importance(earlier)`. Layers may
        have grown: the first neurons keep their importance, and the new ones start at zero. Momentum is not taken over.
        Without this call, the first step warns that the importance of an earlier optimizer of the model is lost. The
        constructor does not warn, so that there is time to load a checkpoint.

        Args:
            earlier: an optimizer of the same kind: NPC, NPCAdamW and PlasticityWrapper take over from each other, and
                so do EWC, MAS and SSL. If it measures neurons and was built on the same model, its taps are removed,
                and it can take no more steps. Or its `state_dict()`, with as many parameters in the same order. None
                starts at zero without the warning.

        Returns:
            This optimizer.

        Raises:
            ValueError: a layer has fewer neurons than before, no layer has the same name, or a state dict has no
                importance. Nothing is changed then.
            TypeError: `earlier` holds no importance, or importance of another kind.
        """
        if isinstance(earlier, Mapping):
            self._take(self._held_in_state_dict(earlier))
        elif earlier is not None:
            earlier = self._of_this_kind(earlier)
            self._take(self._without_replaced(earlier))
            if earlier is not self and earlier._model is self._model:
                earlier._leave_model()
        self._may_begin_without = True
        return self

    def _without_replaced(self, earlier: ImportanceHolder) -> dict[str, dict[str, Tensor]]:
        """The importance of an earlier optimizer, without that of layers that were replaced by new ones since."""
        held = earlier._held()
        if earlier._model is not self._model:
            return held
        before, now = earlier._holders(), self._holders()
        common = [name for name in held if name in now and name in before]
        if all(now[n] is not before[n] and now[n].shape == before[n].shape for n in common):
            return held  # other values were loaded, as by load_state_dict(assign=True)
        replaced = [n for n in common if not continues(now[n], before[n], blocks_of(self._model, n))]
        if replaced:
            warn_of_replaced(replaced)
        return {name: tensors for name, tensors in held.items() if name not in replaced}

    def _take(self, held: Mapping[str, Mapping[str, Tensor]]) -> None:
        here = self._may_hold()
        if held and not any(name in here for name in held):
            raise ValueError(
                f"the earlier optimizer held the importance of {listed(held)}, but here are {listed(here)}; "
                "expected some of the same names: build both on the same model"
            )
        self._take_importance({name: tensors for name, tensors in held.items() if name in here})
        self._forget_plans()

    def _held_in_state_dict(self, state_dict: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
        saved = state_dict.get("plasticity", state_dict)
        held = self._held_in(self._states_saved_in(saved))
        # Some optimizers hold none before a task has ended; their groups have the same options.
        same_options = all(self.defaults.keys() <= group.keys() for group in saved["param_groups"])
        if not held and (self._held() or not same_options):
            raise ValueError(
                f"earlier is a state dict without {self._KIND}, so another optimizer saved it; expected that of an "
                f"optimizer with {self._KIND}, like {self._called()}, or None"
            )
        return held

    def _of_this_kind(self, earlier: Any) -> ImportanceHolder:
        inner = earlier
        while inner is not None and not isinstance(inner, ImportanceHolder):
            inner = getattr(inner, "_tracker", None) or getattr(inner, "optimizer", None)
        if inner is None or inner._KIND != self._KIND:
            raise TypeError(
                f"earlier is of type {type(earlier).__name__}; expected an optimizer with {self._KIND}, like "
                f"{self._called()}, its state_dict(), or None"
            )
        return inner

    def _states_saved_in(self, state_dict: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
        """The states of a state dict, by the id of the parameter at the same position here."""
        if not {"state", "param_groups"} <= state_dict.keys():
            raise TypeError("earlier is a mapping without state and param_groups; expected an optimizer's state_dict()")
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = self._all_parameters()
        if len(saved) != len(parameters):
            raise ValueError(
                f"the state dict has {len(saved)} parameters, this optimizer {len(parameters)}; expected as many, in "
                "the same order. To match layers by name, pass the optimizer itself: in a new process, build model and "
                "optimizer as they were saved, load their states, and let the model grow then"
            )
        return {id(p): state_dict["state"].get(index, {}) for index, p in zip(saved, parameters, strict=True)}

    def _leave_model(self) -> None:
        """Removes the taps from the model: another optimizer takes over."""
