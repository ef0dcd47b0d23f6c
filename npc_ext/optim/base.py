"""What the optimizers of this package have in common: SGD's options and manners, and steps that are prepared once.

A step is prepared device by device as a plan, which stays until something it depends on changes (the signature). What a
method adds to SGD is in its plans.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from .. import ops, reference
from .._warn import warn
from ..distributed.shards import has_no_memory, is_sharded, like, local
from ..distributed.sinks import unwrapped
from ..kernels import launch, native
from ..neurons.tap import ImportanceWarning
from .options import ALPHA_UNIT, BACKENDS, SGD_OPTIONS, check_choice, check_number
from .succession import KnownModel, check_not_sharded, holders_of_importance, listed, note_importance

if TYPE_CHECKING:
    from typing_extensions import Self

# Steps may take turns: heads of several tasks, layers that are measured now and then.
_MOST_EARLIER_PLANS = 3
# How often the parameters are compared with the model's, apart from whenever plans are made.
_STEPS_BETWEEN_COMPARISONS = 50
# What the signature is made of, quickly: nothing here is Python's while a list is filled.
_STRIDE: Callable[[Any], tuple[int, ...]] = Tensor.stride
_DTYPE, _LAYOUT = attrgetter("dtype"), attrgetter("layout")


class Descent(torch.optim.Optimizer):
    """`torch.optim.SGD`, as the methods of this package extend it.

    A subclass lists its group options in `_OPTIONS`, checks them in `_check_options`, and makes and launches plans.
    """

    _OPTIONS: ClassVar[tuple[str, ...]] = SGD_OPTIONS
    # Tensors of a parameter's state that have its shape, but not its dtype: torch would cast them to it.
    _STATE_TENSORS: ClassVar[tuple[str, ...]] = ()
    # Keys that groups did not always have: what groups without them mean, and how to convert them.
    _ADDED_KEYS: ClassVar[Mapping[str, str]] = {}
    # What importance is kept of, for optimizers that keep some: it can be handed over within a kind.
    _KIND: ClassVar[str] = ""

    _plans: list[Any]
    _planned_for: list[Any] | None  # the signature of `_plans`
    _planned_rates: list[float | None] | None  # those of the groups that `_plans` have
    _earlier_plans: list[tuple[list[Any], list[Any]]]  # signatures and plans, the latest first
    _unsettled: bool  # whether `_plans` have not been launched since they were chosen

    def __init__(self, model: nn.Module, params: Iterable[Any] | None, defaults: dict[str, Any], backend: str) -> None:
        if not isinstance(model, nn.Module):
            name = type(self).__name__
            raise TypeError(
                f"{name} takes the model itself, got {type(model).__name__}; "
                f"write {name}(model, lr=...), not {name}(model.parameters(), lr=...); groups of parameters go into "
                "params=[{'params': ..., ...}, ...]"
            )
        check_choice("backend", backend, BACKENDS)
        check_not_in_inference_mode("the optimizer is built")
        self._model = unwrapped(model)
        self._backend = backend
        self._options_of = itemgetter(*self._OPTIONS)
        self._sharded = False
        self._known_model: KnownModel | None = None
        self._known_ids: list[int] = []  # of all parameters in the groups
        self._lost: set[str] = set()  # names of replaced parameters that were warned of
        self._until_comparison = _STEPS_BETWEEN_COMPARISONS
        self._may_begin_without = False  # importance, where another optimizer of the model holds it
        self._has_begun = False
        self._forget_plans()
        if backend == "native":
            require_native(self._model)
        elif backend == "auto":
            prepare_native(self._model)
        unit = {ALPHA_UNIT: "lr"} if ALPHA_UNIT in self._ADDED_KEYS else {}
        super().__init__(model.parameters() if params is None else params, {**defaults, **unit})
        self._learn_model()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters with options of their own, for example those of a head that the model has just been given."""
        self._check_options({**self.defaults, **param_group})
        for parameter in _parameters_of(param_group):
            if isinstance(parameter, UninitializedParameter):
                raise ValueError(
                    f"{self._name_of(parameter)} is not initialized yet: pass one batch through the model first"
                )
            if parameter.is_complex():
                raise ValueError(
                    f"a parameter is complex ({parameter.dtype}, shape {tuple(parameter.shape)}); "
                    f"{type(self).__name__} trains real parameters only"
                )
            if parameter.requires_grad and parameter.is_inference():
                raise ValueError(
                    f"{self._name_of(parameter)} was created under torch.inference_mode(), so it can never be trained; "
                    "create and load the model outside of it"
                )
            if is_sharded(parameter):
                self._check_sharded(parameter)
        super().add_param_group(param_group)
        if self._known_model is not None:
            self._learn_model()

    def _check_sharded(self, parameter: Any) -> None:
        """Raises ValueError if a parameter is sharded over processes in a way that steps cannot deal with."""
        raise ValueError(
            f"{self._name_of(parameter)} is sharded over processes (FSDP or tensor parallelism), which "
            f"{type(self).__name__} does not support; use DistributedDataParallel, or one of the optimizers that "
            "support fully_shard: NPC, NPCAdamW or PlasticityWrapper"
        )

    def _check_options(self, options: Mapping[str, Any], where: str = "") -> None:
        """Raises ValueError if the options of a group, or of a layer (`where`), are out of range."""
        for name in ("lr", "momentum", "weight_decay"):
            check_number(name, options[name], where)
        if options["nesterov"] and not options["momentum"]:
            raise ValueError(
                f"{where}nesterov is on, but momentum is {options['momentum']}; nesterov needs a momentum above 0"
            )

    # ------------------------------------------------------------------------------------------------------ the step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all parameters that have a gradient.

        Args:
            closure: evaluates the model again and returns the loss, as for any torch optimizer.

        Returns:
            What `closure` returned, or None.

        Raises:
            ValueError: a gradient is sparse, or a gradient or a state tensor does not fit its parameter.

        Warns:
            ImportanceWarning: in the first step, that an earlier optimizer of the model held importance, and this one
                has none (`load_importance`).
            UserWarning: parameters were replaced in the model, so they are not trained.

        An exception leaves weights and state as they were.
        """
        if torch.compiler.is_dynamo_compiling():
            return uncompiled(Descent.step, self, closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._until_comparison -= 1
        if self._until_comparison <= 0 or not self._has_begun:
            self._compare_with_model()
        if not self._has_begun:
            self._warn_if_importance_is_lost()
        try:
            self._step()
        except _GroupsChangedError:
            self._step()
        if not self._has_begun:
            self._has_begun = True
            self._note_importance()
        return loss

    def _step(self) -> None:
        self._prepare()
        self._launch_all()

    def _prepare(self) -> None:
        signature = self._signature()
        # A tensor may be changed in place, so its value counts.
        rates = [None if self._read_on_device(lr := group["lr"]) else float(lr) for group in self.param_groups]
        if signature != self._planned_for or not self._is_current(self._plans):
            self._choose_plans(signature)
        elif rates == self._planned_rates:
            return
        for plan in self._plans:
            plan.take_rates(self._rates(plan.device, plan.groups))
        self._planned_rates = rates

    def _choose_plans(self, signature: list[Any]) -> None:
        recent = self._earlier_plans
        if self._planned_for is not None:
            # Plans hold the states: one that came or went means that others may be new objects, too.
            recent = [(self._planned_for, self._plans), *recent] if signature[0] == self._planned_for[0] else []
        known = next((plans for own, plans in recent if own == signature and self._is_current(plans)), None)
        if known is None and self._compare_with_model():
            raise _GroupsChangedError
        self._plans = self._make_plans() if known is None else known
        signature[0] = self._states()  # planning creates what is missing
        self._planned_for, self._unsettled = signature, True
        self._earlier_plans = [own for own in recent if own[0] != signature][:_MOST_EARLIER_PLANS]

    @staticmethod
    def _is_current(plans: Sequence[Any]) -> bool:
        for plan in plans:
            if not plan.is_current():
                return False
        return True

    def _states(self) -> list[int]:
        """Which states there are: plans hold them."""
        return list(map(id, self.state.values()))

    def _forget_plans(self) -> None:
        """To be called wherever plans hold what is no longer so."""
        self._plans, self._planned_for, self._planned_rates, self._earlier_plans = [], None, None, []
        self._unsettled = False

    def _launch_all(self) -> None:
        if self._unsettled:
            self._settle()
            self._unsettled = False
        for plan in self._plans:
            self._launch(plan)
            if plan.sharded:  # the launch raised the versions of the shards
                torch.autograd.graph.increment_version(plan.owners)

    def _settle(self) -> None:
        """Called before the first launch of other plans, when nothing can stop the step any more."""

    def _launch(self, plan: Any) -> None:
        raise NotImplementedError

    def _signature(self) -> list[Any]:
        """Everything that plans depend on: which parameters have gradients, their layout, and all options but rates.

        Compared on every step, so it is made of what is quick to read.
        """
        signature: list[Any] = [self._states()]
        for group in self.param_groups:
            lr, parameters = group["lr"], group["params"]
            gradients = [parameter.grad for parameter in parameters]
            without = [at for at, gradient in enumerate(gradients) if gradient is None]
            if without:
                parameters = [one for one, gradient in zip(parameters, gradients, strict=True) if gradient is not None]
                gradients = [gradient for gradient in gradients if gradient is not None]
            if self._sharded:
                parameters, gradients = list(map(local, parameters)), list(map(local, gradients))
            signature += [id(lr) if self._read_on_device(lr) else None, self._options_of(group), without]
            signature += [list(map(_LAYOUT, gradients)), list(map(_DTYPE, gradients))]
            # Another device, dtype or memory format of the parameter is another address. Strides and the number of
            # elements tell the shape.
            signature += [list(map(Tensor.numel, gradients)), list(map(Tensor.numel, parameters))]
            signature += [list(map(_STRIDE, gradients)), list(map(_STRIDE, parameters))]
            signature.append(list(map(Tensor.data_ptr, parameters)))
        return signature

    def _read_on_device(self, lr: float | Tensor) -> bool:
        """Whether the kernels read a learning rate in device memory, so that a CUDA graph's replays see it change."""
        if not isinstance(lr, Tensor) or not lr.is_cuda or self._backend == "reference":
            return False
        return lr.dtype == torch.float32 and lr.numel() == 1 and not native.why_not_on(lr.device.index)

    def _refuse_gradient(self, parameter: Tensor, gradient: Tensor) -> None:
        is_sparse = local(gradient).layout is not torch.strided
        got = "sparse" if is_sparse else f"{gradient.dtype} on {gradient.device}"
        raise ValueError(
            f"the gradient of {self._name_of(parameter)} is {got}; expected a dense one, {parameter.dtype} on "
            f"{parameter.device}" + (" (for embeddings: sparse=False)" if is_sparse else "")
        )

    @torch.no_grad()
    def _make_plans(self) -> list[Any]:
        """What a step works on, device by device, until something in the signature changes."""
        check_not_in_inference_mode("step() is called")
        members: dict[torch.device, list[tuple[Tensor, dict[str, Any]]]] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and self._trains(parameter):
                    members.setdefault(parameter.device, []).append((parameter, group))
        everything = [pair for own in members.values() for pair in own]
        # Options may have been changed since the last step. A rate in device memory is not looked at: that would wait.
        for group in self.param_groups:
            self._check_options({**self.defaults, **group, "lr": 0.0})
        for parameter, _ in everything:  # before anything is changed
            self._check_fits(parameter)
        for parameter, group in everything:
            self._create_state(parameter, group)
            self._lay_out_state(parameter)
        return [self._make_plan(device, own) for device, own in members.items()]

    def _trains(self, parameter: Tensor) -> bool:
        """Whether a parameter that has a gradient takes part in steps."""
        return True

    def _check_fits(self, parameter: Any) -> None:
        """Raises ValueError if a parameter cannot be trained, or its gradient or its state does not fit it."""
        gradient = parameter.grad
        if not parameter.is_floating_point() or parameter.is_meta:
            kind = "on the meta device, without values" if parameter.is_meta else str(parameter.dtype)
            raise ValueError(
                f"{self._name_of(parameter)} is {kind} now; expected real floating-point numbers on a device: build "
                "the optimizer again when the model has its weights"
            )
        for what, tensor in (("", parameter), ("the gradient of ", gradient)):
            if has_no_memory(local(tensor)):
                raise ValueError(
                    f"{what}{self._name_of(parameter)} is a {type(local(tensor)).__name__}, a tensor that keeps its "
                    "numbers in other tensors; expected a plain one: call requires_grad_(False) on it, or leave it out "
                    "of the optimizer (params=[...])"
                )
        is_strided = local(gradient).layout is torch.strided
        if not is_strided or gradient.dtype != parameter.dtype or gradient.device != parameter.device:
            self._refuse_gradient(parameter, gradient)
        if gradient.shape != parameter.shape:
            raise ValueError(
                f"the gradient of {self._name_of(parameter)} has shape {tuple(gradient.shape)}, but the parameter has "
                f"shape {tuple(parameter.shape)}: it was changed after the backward pass; call zero_grad() and "
                "backward() again"
            )
        self._check_state_fits(parameter)

    def _check_state_fits(self, parameter: Any) -> None:
        """Raises ValueError if tensors of a parameter's state have another shape than it."""
        for name, tensor in self.state.get(parameter, {}).items():
            if tensor is None or name not in ("momentum_buffer", *self._STATE_TENSORS):
                continue
            if not isinstance(tensor, Tensor) or tensor.shape != parameter.shape:
                got = f"shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else f"type {type(tensor).__name__}"
                raise ValueError(
                    f"{self._name_of(parameter)} has shape {tuple(parameter.shape)}, but its {name!r} in the "
                    f"optimizer's state has {got}; they must agree. If the parameter has grown, go on with a new "
                    f"optimizer, {self._built_as()}.load_importance(optimizer); or begin anew with "
                    f"del optimizer.state[parameter][{name!r}]"
                )

    def _create_state(self, parameter: Any, group: dict[str, Any]) -> None:
        """Creates what steps keep of a parameter, as far as it is not there yet."""
        if self._has_momentum(group) and self.state[parameter].get("momentum_buffer") is None:
            self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def _lay_out_state(self, parameter: Any) -> None:
        """Makes the state match its parameter: device, layout, shards, and the dtype that steps use.

        It may not match after loading, or after the model was moved or cast.
        """
        state = self.state[parameter]
        for name in ("momentum_buffer", *self._STATE_TENSORS):
            if state.get(name) is not None:
                dtype = parameter.dtype if name == "momentum_buffer" else self._state_tensor_dtype(parameter)
                state[name] = like(parameter, state[name], dtype)

    def _state_tensor_dtype(self, parameter: Tensor) -> torch.dtype:
        """The dtype of a parameter's `_STATE_TENSORS`."""
        return reference.compute_dtype(parameter.dtype)

    def _has_momentum(self, group: Mapping[str, Any]) -> bool:
        """Whether the parameters of a group have SGD's momentum."""
        return bool(group["momentum"] != 0)

    def _make_plan(self, device: torch.device, members: list[tuple[Any, dict[str, Any]]]) -> Any:
        raise NotImplementedError

    def _common(self, device: torch.device, members: list[tuple[Any, dict[str, Any]]]) -> dict[str, Any]:
        """The fields of a plan that do not depend on the method."""
        owners = [parameter for parameter, _ in members]
        parameters = list(map(local, owners))
        strides = [
            (local(owner.grad).stride(), parameter.stride())
            for owner, parameter in zip(owners, parameters, strict=True)
        ]
        return {
            "device": device,
            "parameters": parameters,
            "owners": owners,
            "sharded": any(map(is_sharded, owners)),
            "aligned": all(of_gradient == own for of_gradient, own in strides),
            "states": (states := [self.state[owner] for owner in owners]),
            "checked": {name: [state.get(name) for state in states] for name in self._read_by_steps(members)},
            "has_momentum": [self._has_momentum(group) for _, group in members],
            "groups": [group for _, group in members],
            "rates": self._rates(device, [group for _, group in members]),
        }

    def _read_by_steps(self, members: list[tuple[Any, dict[str, Any]]]) -> list[str]:
        """The names of the state's tensors that steps read."""
        has_momentum = any(self._has_momentum(group) for _, group in members)
        return [*(["momentum_buffer"] if has_momentum else []), *self._STATE_TENSORS]

    def _rates(self, device: torch.device, groups: Sequence[Mapping[str, Any]]) -> list[float | Tensor]:
        rates = (group["lr"] for group in groups)
        return [lr if self._read_on_device(lr) and lr.device == device else float(lr) for lr in rates]

    def _tables(
        self, parameters: Sequence[Tensor], columns: Sequence[NamedTuple], importances: Sequence[Tensor] = ()
    ) -> launch.Tables | None:
        """Tables for the compiled kernels; None where these do not take the tensors.

        Args:
            parameters: those that steps work on.
            columns: of these, and of layers.
            importances: of the neurons of each layer.
        """
        if self._backend == "reference" or not ops.native_takes([*parameters, *importances]):
            return None
        return launch.Tables(parameters, [average.numel() for average in importances], *columns)

    def _operations(self) -> Any:
        """The module whose operations do the work where the compiled kernels do not take the tensors."""
        return reference if self._backend == "reference" else ops

    # ------------------------------------------------------------------------------------- models that are changed

    def _called(self) -> str:
        """The class that users built."""
        return type(self).__name__

    def _built_as(self) -> str:
        """How users build such an optimizer, for messages."""
        return f"{self._called()}(model, ...)"

    def _learn_model(self) -> None:
        """Remembers where the parameters of the groups are in the model; state follows those that were replaced."""
        self._known_ids = self._ids()
        self._known_model, replaced = KnownModel.of(self._model, set(self._known_ids), self._known_model)
        for old, new in replaced:
            if old in self.state:
                self._inherit(old, new)
        self._sharded = any(is_sharded(one) for group in self.param_groups for one in group["params"])

    def _trained_by_name(self) -> dict[str, Tensor]:
        """The parameters in the groups, by their names when the model was last looked at."""
        return {} if self._known_model is None else self._known_model.parameters

    def _inherit(self, old: Tensor, new: Tensor) -> None:
        """Gives the state of a parameter to the one that has replaced it."""
        state = self.state.pop(old)
        if old.shape == new.shape:
            self.state[new] = state

    def _ids(self) -> list[int]:
        return [id(parameter) for group in self.param_groups for parameter in group["params"]]

    def _groups_changed(self) -> bool:
        """Whether the groups have other parameters than plans, layers and taps were made for."""
        return self._ids() != self._known_ids

    def _compare_with_model(self) -> bool:
        """Warns of parameters that were replaced in the model; returns whether the groups have others than before."""
        self._until_comparison = _STEPS_BETWEEN_COMPARISONS
        changed = self._groups_changed()
        if changed or self._known_model is None:
            self._learn_model()
            try:
                self._take_up_groups()
            except Exception:
                self._known_ids = []  # so that the next step does not go on without
                raise
        assert self._known_model is not None
        if self._known_model.is_unchanged(self._model):
            return changed
        lost = self._known_model.lost(self._model)
        trained = set(self._known_ids)
        lost = [one for one in lost if any(id(own) not in trained for own in one.replacements.values())]
        check_not_sharded(lost)
        self._known_model.look_again(self._model)
        news = [one for one in lost if one.name not in self._lost]
        self._lost.update(one.name for one in news)
        news = [one for one in news if any(own.requires_grad for own in one.replacements.values())]
        if news:
            instead = dict.fromkeys(name for one in news for name in one.replacements)
            warn(
                "parameters of the model were replaced after the optimizer was built: "
                f"{listed(one.name for one in news)}. Those in their place are not trained: {listed(instead)}. "
                "Build the optimizer after such changes (new modules, load_state_dict(assign=True), parametrizations); "
                f"to keep what this one knows: {self._built_as()}.load_importance(optimizer). Or put the new "
                "parameters into optimizer.param_groups, in the place of the old ones",
                UserWarning,
            )
        return changed

    def _take_up_groups(self) -> None:
        """Goes on with parameters that somebody has put into the groups."""
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            if is_sharded(parameter):
                self._check_sharded(parameter)
        self._forget_plans()

    # ----------------------------------------------------------------------------------- importance of an earlier one

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
            if isinstance(earlier, Descent) and earlier is not self and earlier._model is self._model:
                earlier._leave_model()
        self._may_begin_without = True
        return self

    def _of_this_kind(self, earlier: Any) -> Descent:
        inner = earlier
        while not isinstance(inner, Descent):
            inner = getattr(inner, "_tracker", None) or getattr(inner, "optimizer", None)
            if inner is None:
                break
        if not isinstance(inner, Descent) or not inner._KIND or inner._KIND != self._KIND:
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

    # --------------------------------------------------------------------------------------------- saving and loading

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a saved state. Raises ValueError, before any change, if it does not fit."""
        check_not_in_inference_mode("load_state_dict() is called")
        if not {"state", "param_groups"} <= state_dict.keys():
            raise ValueError(
                f"the state dict has {', '.join(map(str, [*state_dict][:4])) or 'nothing'}; expected state and "
                "param_groups, as the state_dict() of an optimizer has them (of the model: model.load_state_dict)"
            )
        groups, saved_groups = self.param_groups, state_dict["param_groups"]
        counts, saved_counts = ([len(g["params"]) for g in gs] for gs in (groups, saved_groups))
        if counts != saved_counts:
            raise ValueError(
                f"the state dict has parameter groups of {saved_counts} parameters, this optimizer has {counts}; "
                "it was saved for another architecture or other groups"
            )
        ids = [index for group in saved_groups for index in group["params"]]
        parameters = [parameter for group in groups for parameter in group["params"]]
        saved = {id(p): state_dict["state"].get(index, {}) for index, p in zip(ids, parameters, strict=True)}
        for parameter in parameters:
            for name in ("momentum_buffer", *self._STATE_TENSORS):
                tensor = saved[id(parameter)].get(name)
                if tensor is not None and tensor.shape != parameter.shape:
                    raise ValueError(
                        f"the state dict's {name.replace('_', ' ')} for {self._name_of(parameter)} has shape "
                        f"{tuple(tensor.shape)}, expected {tuple(parameter.shape)}; it was saved for another "
                        "architecture"
                    )
                if is_sharded(tensor) and not is_sharded(parameter):
                    raise ValueError(
                        f"the state dict's {name.replace('_', ' ')} for {self._name_of(parameter)} is sharded over "
                        "processes, but the parameter is not; gather it before it is saved: "
                        "get_optimizer_state_dict(..., options=StateDictOptions(full_state_dict=True)) of "
                        "torch.distributed.checkpoint.state_dict"
                    )
        self._check_saved(saved)
        for group in saved_groups:
            expected = (name for name in ("lr", *self._OPTIONS) if name not in self._ADDED_KEYS)
            if missing := [name for name in expected if name not in group]:
                raise ValueError(
                    f"the state dict's parameter groups have no {', '.join(missing)}; it was saved by another "
                    f"optimizer than {type(self).__name__}"
                )
        self._check_added_keys(saved_groups, "the state dict")
        super().load_state_dict(state_dict)
        self._take_over(saved)
        self._may_begin_without = True
        for parameter in filter(is_sharded, parameters):
            if parameter in self.state:
                self._lay_out_state(parameter)

    def _check_saved(self, saved: Mapping[int, dict[str, Any]]) -> None:
        """Raises ValueError if the saved states (by the id of their parameter) do not fit this optimizer."""

    def _check_added_keys(self, groups: Iterable[Mapping[str, Any]], what: str, more: str = "") -> None:
        """Raises ValueError if groups were saved without a key that says how to read them."""
        for group in groups:
            for key, meaning in self._ADDED_KEYS.items():
                if key not in group:
                    raise ValueError(
                        f"{what} was saved by an earlier version: its parameter groups have no {key!r}, and "
                        f"{meaning.format(**group)}{more}"
                    )

    def _take_over(self, saved: Mapping[int, dict[str, Any]]) -> None:
        """Takes from the saved states what torch would cast to the parameter's dtype."""
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            dtype = self._state_tensor_dtype(parameter)
            for name in self._STATE_TENSORS:
                if name in saved[id(parameter)]:
                    tensor = saved[id(parameter)][name].detach()
                    self.state[parameter][name] = tensor.to(parameter.device, dtype, copy=True)

    def _name_of(self, parameter: Tensor) -> str:
        for name, known in self._model.named_parameters():
            if known is parameter:
                return repr(name)
        return f"a parameter of shape {tuple(parameter.shape)}"

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in self.__dict__.items() if name != "_known_ids"}
        return {**kept, **super().__getstate__()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._check_added_keys(
            state["param_groups"],
            f"the pickled {type(self).__name__}",
            ". A pickle cannot be changed: let the version that wrote it save optimizer.state_dict(); convert that",
        )
        super().__setstate__(state)  # of a copy, an unpickled optimizer, or from load_state_dict
        self._forget_plans()
        if "_known_ids" not in self.__dict__:
            self._known_ids = self._ids()


class _GroupsChangedError(Exception):
    """The groups have other parameters than plans, layers and taps were made for; these are up to date now."""


@torch.compiler.disable
def uncompiled(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function as it is, from code that is being compiled: steps work by address, and graphs cannot."""
    return function(*arguments)


def _parameters_of(param_group: dict[str, Any]) -> Sequence[Tensor]:
    parameters = param_group["params"]
    if isinstance(parameters, Tensor):
        return [parameters]
    param_group["params"] = list(parameters)  # a generator can be read once only
    return [p[1] if isinstance(p, tuple) else p for p in param_group["params"]]


def check_not_in_inference_mode(what: str) -> None:
    """Raises RuntimeError where new tensors could never be written to outside of torch.inference_mode()."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{what} under torch.inference_mode(), whose tensors cannot be written to later; do it outside of that "
            "mode (torch.no_grad() is fine)"
        )


def prepare_native(model: nn.Module) -> None:
    """Loads the compiled kernels for where the model is, or compiles them: here rather than in a backward pass."""
    for device in {parameter.device for parameter in model.parameters()}:
        if device.type == "cuda":
            native.why_not_on(device.index)
        elif device.type == "cpu":
            native.status()


def require_native(model: nn.Module) -> None:
    """Raises if the compiled kernels cannot do the work where the model is."""
    native.module()
    for name, parameter in model.named_parameters():
        if parameter.is_cuda and (reason := native.why_not_on(parameter.device.index)):
            raise native.NativeUnavailableError(
                f"backend is 'native', but {name!r} is on {parameter.device} and {reason}; or use backend='auto' "
                "(plain PyTorch there)"
            )
        if not parameter.is_cpu and not parameter.is_cuda:
            raise ValueError(
                f"backend is 'native', but {name!r} is on {parameter.device}, for which there are no compiled kernels; "
                "use backend='auto' (plain PyTorch there) or move the model to the CPU or to a CUDA device"
            )
