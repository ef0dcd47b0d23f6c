"""The base class of all optimizers in this package: SGD's options and behavior, and steps that are planned once.

A step is planned for each device. A plan is kept until something that it depends on changes: the signature. A method
defines its update in its plans.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from .. import ops, reference
from .._names import listed
from .._warn import warn
from ..columns import AdamOptions, SGDOptions, columns_of
from ..distributed.shards import has_no_memory, is_sharded, like, local
from ..distributed.sinks import unwrapped
from ..kernels import launch, native
from .known_model import KnownModel, Lost, check_not_sharded
from .options import BACKENDS, SGD_OPTIONS, check_choice, check_number, with_one_decay
from .succession import ImportanceHolder, blocks_of, continues, fitted, warn_of_replaced
from .unknown_options import check_group

# Steps may alternate between heads of several tasks.
_MOST_EARLIER_PLANS = 3
# How often the parameters are compared with the model's, besides whenever plans are made.
_STEPS_BETWEEN_COMPARISONS = 50
# Schedules that end at 0 may give a tiny negative rate instead, as LinearLR(optimizer, end_factor=0) does.
_ROUNDED_ZERO = -1e-12
# For the signature: `map` calls these without running Python code.
_STRIDE: Callable[[Any], tuple[int, ...]] = Tensor.stride
_DTYPE, _LAYOUT = attrgetter("dtype"), attrgetter("layout")


class ModelOptimizer(ImportanceHolder):
    """An optimizer of a model, with the options and behavior of `torch.optim.SGD`.

    Subclasses list their group options in `_OPTIONS`, check them in `_check_options`, and make and launch plans.
    """

    _OPTIONS: ClassVar[tuple[str, ...]] = SGD_OPTIONS
    # Numbers that schedules change, besides lr. Plans take them over.
    _SCHEDULED: ClassVar[tuple[str, ...]] = ("momentum", "weight_decay")

    _plans: list[Any]
    _planned_for: list[Any] | None  # the signature of `_plans`
    _planned_numbers: list[tuple[Any, ...]] | None  # the `_scheduled` numbers of the groups in `_plans`
    _earlier_plans: list[tuple[list[Any], list[Any]]]  # signatures and plans, the latest first
    _unsettled: bool  # whether `_plans` were chosen, but not launched yet

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        # Takes the arguments of the subclass's constructor by name: model, params, backend, lr and `_OPTIONS`.
        model, params, backend = arguments["model"], arguments["params"], arguments["backend"]
        if not isinstance(model, nn.Module):
            name = type(self).__name__
            raise TypeError(
                f"{name} takes the model itself, got {type(model).__name__}; "
                f"write {name}(model, lr=...), not {name}(model.parameters(), lr=...); pass groups of parameters as "
                "params=[{'params': ..., ...}, ...]"
            )
        check_choice("backend", backend, BACKENDS)
        check_not_in_inference_mode("the optimizer is built")
        self._model = unwrapped(model)
        self._backend = backend
        self._options_of = itemgetter(*(name for name in self._OPTIONS if name not in self._SCHEDULED))
        self._sharded = False
        self._known_model: KnownModel | None = None
        self._known_parameters: list[Tensor] = []  # in the groups when the model was last examined
        self._lost_names: set[str] = set()  # names of replaced parameters that were warned of
        self._until_comparison = _STEPS_BETWEEN_COMPARISONS
        self._has_begun = False
        self._forget_plans()
        if backend == "native":
            require_native(self._model)
        elif backend == "auto":
            prepare_native(self._model)
        _check_not_module(params)
        defaults = {name: arguments[name] for name in ("lr", *self._OPTIONS)}
        super().__init__(model.parameters() if params is None else params, defaults)
        self._check_trains_model()
        self._learn_model()

    def _check_trains_model(self) -> None:
        """Raises ValueError if no parameter of the groups is the model's."""
        if {id(p) for p in self._model.parameters()}.isdisjoint(map(id, self._all_parameters())):
            raise ValueError(
                f"none of the parameters in params belongs to the model ({type(self._model).__name__}), so it would "
                "not be trained; pass parameters of this model (not of a copy), or leave params out to train all"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters with its options, for example a new head of the model.

        NPC, NPCAdamW and CPC search the model again for layers. Known layers keep their importance.

        Args:
            param_group: {"params": ...}, with the options in which the group differs from the others.

        Raises:
            ValueError: an option is unknown or out of range; or a parameter is uninitialized, complex, created under
                `torch.inference_mode()`, or sharded in a way that is not supported. Nothing is changed then.
            TypeError: the group is not a dictionary.

        Example:
            >>> optimizer.add_param_group({"params": model.heads[2].parameters(), "lr": 0.05})
        """
        self._add_group(param_group)

    def _add_group(self, param_group: dict[str, Any]) -> None:
        """What `add_param_group` does."""
        check_group(param_group, self._OPTIONS)
        param_group.update(with_one_decay(param_group))
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
                    "create and load the model outside of that mode"
                )
            if is_sharded(parameter):
                self._check_sharded(parameter)
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise
        if self._known_model is not None:
            self._learn_model()

    def _check_group(self, group: Mapping[str, Any]) -> None:
        """Raises ValueError if an option does not fit the parameters of its group."""

    def _check_sharded(self, parameter: Any) -> None:
        """Raises ValueError if a parameter is sharded over processes in a way that is not supported."""
        raise ValueError(
            f"{self._name_of(parameter)} is sharded over processes (FSDP or tensor parallelism), which "
            f"{type(self).__name__} does not support; use DistributedDataParallel, or one of the optimizers that "
            "support fully_shard: NPC, NPCAdamW or PlasticityWrapper"
        )

    def _check_options(self, options: Mapping[str, Any], where: str = "") -> None:
        """Raises ValueError if the options of a group, or of a layer (`where`), are out of range."""
        for name in ("lr", "momentum", "weight_decay"):
            check_number(name, options[name], where)
        for name in ("nesterov", "maximize"):
            check_choice(f"{where}{name}", options[name], (True, False))
        if options["nesterov"] and not options["momentum"]:
            raise ValueError(
                f"{where}nesterov is on, but momentum is {options['momentum']}; nesterov needs a momentum above 0"
            )

    # ------------------------------------------------------------------------------------------------------ the step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one step for all parameters that have a gradient. If it raises, weights and state are unchanged.

        Args:
            closure: reevaluates the model and returns the loss, as for any torch optimizer.

        Returns:
            The value that `closure` returned, or None.

        Raises:
            ValueError: a gradient is sparse; a gradient, a state tensor or a layer does not fit its parameter; or an
                option of a group is misspelled or out of range.
            RuntimeError: optimizers that measure neurons found no importance, although there are gradients; or
                gradients were skipped of neurons that may move in this step, because options or state were changed
                after the forward pass.

        Warns:
            ImportanceWarning: this is the first step, an earlier optimizer of the model held importance, and this one
                has none (`load_importance`).
            UserWarning: parameters of the model were replaced, so they are not trained.
        """
        if torch.compiler.is_dynamo_compiling():
            return uncompiled(ModelOptimizer.step, self, closure)
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
        signature, numbers = self._signature(), list(map(self._scheduled, self.param_groups))
        if numbers != self._planned_numbers:
            self._check_scheduled(numbers)
        if signature != self._planned_for or not self._is_current(self._plans):
            self._choose_plans(signature)
        elif numbers == self._planned_numbers:
            return
        for plan in self._plans:
            plan.take_options(self._step_options(plan.device, plan.groups))
        self._planned_numbers = numbers

    def _scheduled(self, group: Mapping[str, Any]) -> tuple[Any, ...]:
        """The numbers of a group that schedules change; lr is None where it is read on the device."""
        lr = group["lr"]  # it may be a tensor that is changed in place
        return None if self._read_on_device(lr) else float(lr), group["momentum"], group["weight_decay"]

    def _check_scheduled(self, numbers: Sequence[tuple[Any, ...]]) -> None:
        """Raises ValueError if one of the `_scheduled` numbers is out of range. Checks what has changed."""
        planned = self._planned_numbers or []
        if len(planned) != len(numbers):
            planned = [()] * len(numbers)
        for group, (lr, *others), before in zip(self.param_groups, numbers, planned, strict=True):
            if lr is not None and not _ROUNDED_ZERO <= lr < math.inf:
                check_number("lr", lr)
            if others != list(before[1:]):
                self._check_options({**self.defaults, **group, "lr": 0.0})

    def _choose_plans(self, signature: list[Any]) -> None:
        recent = self._earlier_plans
        if self._planned_for is not None:
            # Plans hold the states. If one was added or removed, others may be new objects, too.
            recent = [(self._planned_for, self._plans), *recent] if signature[0] == self._planned_for[0] else []
        known = next((plans for key, plans in recent if key == signature and self._is_current(plans)), None)
        if known is None and self._compare_with_model():
            raise _GroupsChangedError
        self._plans = self._make_plans() if known is None else known
        signature[0] = self._states()  # making plans creates missing states
        self._planned_for, self._unsettled = signature, True
        self._earlier_plans = [pair for pair in recent if pair[0] != signature][:_MOST_EARLIER_PLANS]

    @staticmethod
    def _is_current(plans: Sequence[Any]) -> bool:
        for plan in plans:
            if not plan.is_current():
                return False
        return True

    def _states(self) -> list[int]:
        """The identities of all states, which plans hold."""
        return list(map(id, self.state.values()))

    def _forget_plans(self) -> None:
        """Drops all plans. Call this wherever something changed that plans hold and the signature does not show."""
        self._plans, self._planned_for, self._planned_numbers, self._earlier_plans = [], None, None, []
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
        """Called before the first launch of newly chosen plans, when the step can no longer raise."""

    def _launch(self, plan: Any) -> None:
        raise NotImplementedError

    def _signature(self) -> list[Any]:
        """Everything that plans depend on: which parameters have gradients, their layout, and options.

        Numbers that schedules change are not in it; plans take them over.

        It is compared in every step, so it consists of values that are quick to read.
        """
        signature: list[Any] = [self._states()]
        for group in self.param_groups:
            lr, parameters = group["lr"], group["params"]
            gradients = [parameter.grad for parameter in parameters]
            without = [at for at, gradient in enumerate(gradients) if gradient is None]
            if without:
                parameters = [parameter for parameter in parameters if parameter.grad is not None]
                gradients = [gradient for gradient in gradients if gradient is not None]
            if self._sharded:
                parameters, gradients = list(map(local, parameters)), list(map(local, gradients))
            on_device = id(lr) if self._read_on_device(lr) else None
            has_momentum = group.get("momentum") != 0
            signature += [id(group), len(group), on_device, self._options_of(group), has_momentum, without]
            signature += [list(map(_LAYOUT, gradients)), list(map(_DTYPE, gradients))]
            # A parameter's device, dtype and memory format change only with its address. Strides and the number of
            # elements determine the shape.
            signature += [list(map(Tensor.numel, gradients)), list(map(Tensor.numel, parameters))]
            signature += [list(map(_STRIDE, gradients)), list(map(_STRIDE, parameters))]
            signature.append(list(map(Tensor.data_ptr, parameters)))
        return signature

    def _read_on_device(self, lr: float | Tensor) -> bool:
        """Whether the kernels read a learning rate from device memory, so that replays of a CUDA graph follow it."""
        if not isinstance(lr, Tensor) or not lr.is_cuda or self._backend == "reference":
            return False
        return lr.dtype == torch.float32 and lr.numel() == 1 and not native.why_not_on(lr.device.index)

    @torch.no_grad()
    def _make_plans(self) -> list[Any]:
        """What a step works on, device by device, until something in the signature changes."""
        check_not_in_inference_mode("step() is called")
        members: dict[torch.device, list[tuple[Tensor, dict[str, Any]]]] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and self._trains(parameter):
                    members.setdefault(parameter.device, []).append((parameter, group))
        # Options may have changed since the last step. Reading a rate in device memory would wait, so that is skipped.
        for group in self.param_groups:
            check_group(group, self._OPTIONS)
            self._check_options({**self.defaults, **group, "lr": 0.0})
        self._look_up_groups()
        for parameter, _ in chain(*members.values()):  # before anything is changed
            self._check_fits(parameter)
        for parameter, group in chain(*members.values()):
            self._create_state(parameter, group)
            self._lay_out_state(parameter)
        return [self._make_plan(self._common(device, on_device)) for device, on_device in members.items()]

    def _look_up_groups(self) -> None:
        """Called when plans are made: groups may have been replaced by other dictionaries."""

    def _trains(self, parameter: Tensor) -> bool:
        """Whether steps update a parameter that has a gradient."""
        return True

    def _check_fits(self, parameter: Any) -> None:
        """Raises ValueError if a parameter cannot be trained, or if its gradient or its state does not fit."""
        gradient = parameter.grad
        if not parameter.is_floating_point() or parameter.is_meta:
            kind = "on the meta device, without values" if parameter.is_meta else str(parameter.dtype)
            raise ValueError(
                f"{self._name_of(parameter)} is {kind} now; expected real floating-point numbers on a device: build "
                "the optimizer again when the model has its weights"
            )
        for prefix, tensor in (("", parameter), ("the gradient of ", gradient)):
            if has_no_memory(local(tensor)):
                raise ValueError(
                    f"{prefix}{self._name_of(parameter)} is of type {type(local(tensor)).__name__}, a tensor subclass "
                    "that stores its values in other tensors; expected a plain tensor: call requires_grad_(False) on "
                    "it, or leave it out of the optimizer (params=[...])"
                )
        is_sparse = local(gradient).layout is not torch.strided
        if is_sparse or gradient.dtype != parameter.dtype or gradient.device != parameter.device:
            got = "sparse" if is_sparse else f"{gradient.dtype} on {gradient.device}"
            raise ValueError(
                f"the gradient of {self._name_of(parameter)} is {got}; expected a dense one, {parameter.dtype} on "
                f"{parameter.device}" + (" (for embeddings: sparse=False)" if is_sparse else "")
            )
        if gradient.shape != parameter.shape:
            raise ValueError(
                f"the gradient of {self._name_of(parameter)} has shape {tuple(gradient.shape)}, but the parameter has "
                f"shape {tuple(parameter.shape)}: it was changed after the backward pass; call zero_grad() and "
                "backward() again"
            )
        self._check_state_fits(parameter)

    def _check_state_fits(self, parameter: Any) -> None:
        """Raises ValueError if tensors of a parameter's state do not have its shape."""
        for name, tensor in self.state.get(parameter, {}).items():
            if tensor is None or name not in ("momentum_buffer", *self._STATE_TENSORS):
                continue
            if not isinstance(tensor, Tensor) or tensor.shape != parameter.shape:
                got = f"shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else f"type {type(tensor).__name__}"
                raise ValueError(
                    f"{self._name_of(parameter)} has shape {tuple(parameter.shape)}, but its {name!r} in the "
                    f"optimizer's state has {got}; they must agree. If the parameter has grown, build a new "
                    "optimizer with the importance of this one (earlier): "
                    f"{self._built_as()}.load_importance(earlier). To start this state from zero: "
                    f"del optimizer.state[parameter][{name!r}]"
                )

    def _create_state(self, parameter: Any, group: dict[str, Any]) -> None:
        """Creates the missing tensors of a parameter's state."""
        if self._has_momentum(group) and self.state[parameter].get("momentum_buffer") is None:
            self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def _lay_out_state(self, parameter: Any) -> None:
        """Converts a parameter's state to its device, layout and shards, and to the dtype that steps use.

        They can differ after loading, or after the model was moved or cast.
        """
        state = self.state[parameter]
        for name in ("momentum_buffer", *self._STATE_TENSORS):
            if state.get(name) is not None:
                dtype = parameter.dtype if name == "momentum_buffer" else self._state_tensor_dtype(parameter)
                state[name] = like(parameter, state[name], dtype)

    def _has_momentum(self, group: Mapping[str, Any]) -> bool:
        """Whether the parameters of a group have SGD's momentum."""
        return "momentum" in self._OPTIONS and bool(group["momentum"] != 0)

    def _make_plan(self, common: dict[str, Any]) -> Any:
        """A plan of the method, from the fields that do not depend on it (`_common`)."""
        raise NotImplementedError

    def _common(self, device: torch.device, members: list[tuple[Any, dict[str, Any]]]) -> dict[str, Any]:
        """The fields of a plan that do not depend on the method."""
        owners, groups = [parameter for parameter, _ in members], [group for _, group in members]
        states = [self.state[owner] for owner in owners]
        return {
            "device": device,
            "parameters": list(map(local, owners)),
            "owners": owners,
            "sharded": any(map(is_sharded, owners)),
            "aligned": all(local(owner.grad).stride() == local(owner).stride() for owner in owners),
            "states": states,
            "checked": {name: [state.get(name) for state in states] for name in self._read_by_steps(members)},
            "has_momentum": list(map(self._has_momentum, groups)),
            "groups": groups,
            "options": self._step_options(device, groups),
        }

    def _read_by_steps(self, members: list[tuple[Any, dict[str, Any]]]) -> list[str]:
        """The names of the state's tensors that steps read."""
        has_momentum = any(self._has_momentum(group) for _, group in members)
        return [*(["momentum_buffer"] if has_momentum else []), *self._STATE_TENSORS]

    def _step_options(self, device: torch.device, groups: Sequence[Mapping[str, Any]]) -> SGDOptions | AdamOptions:
        """The options of parameters in these groups as the operation of the step takes them."""
        return columns_of(SGDOptions, groups, lr=self._rates(device, groups))

    def _rates(self, device: torch.device, groups: Sequence[Mapping[str, Any]]) -> list[Any]:
        """The learning rates of parameters in these groups: numbers, or tensors to read on the device."""
        rates: dict[int, Any] = {}
        for group in self.param_groups:
            lr = group["lr"]
            rates[id(group)] = lr if self._read_on_device(lr) and lr.device == device else float(lr)
        return [rates[id(group)] for group in groups]

    def _prepared(
        self,
        device: torch.device,
        parameters: Sequence[Tensor],
        columns: Sequence[NamedTuple],
        importances: Sequence[Tensor] = (),
        counted_at: Sequence[int] | None = None,
    ) -> launch.Prepared | None:
        """What the compiled kernels work on; None where these do not take the tensors.

        Args:
            device: where the parameters are.
            parameters: those that steps work on.
            columns: of these, and of layers.
            importances: of the neurons of each layer.
            counted_at: as in `launch.Prepared`.
        """
        if self._backend == "reference" or not ops.native_takes([*parameters, *importances]):
            return None
        neurons = [average.numel() for average in importances]
        return launch.Prepared(device, parameters, neurons, *columns, counted_at=counted_at)

    def _operations(self) -> Any:
        """The module whose operations do the work where the compiled kernels do not take the tensors."""
        return reference if self._backend == "reference" else ops

    # ------------------------------------------------------------------------------------------------ model changes

    def _learn_model(self) -> None:
        """Records the parameters' places in the model, and moves the state of replaced parameters to the new ones."""
        parameters, before = self._all_parameters(), self._known_model
        self._known_parameters = parameters
        self._known_model, replaced = KnownModel.of(self._model, set(map(id, parameters)), before)
        self._sharded = any(map(is_sharded, parameters))
        self._hand_over(replaced, all_at_once=before is not None and len(replaced) == len(before.parameters))

    def _hand_over(self, replaced: Sequence[tuple[str, Tensor, Tensor]], *, all_at_once: bool) -> None:
        """Moves the state of replaced parameters (name, parameter, replacement), unless a new layer has replaced them.

        If all are replaced at once, other values were loaded, as by load_state_dict(assign=True).
        """
        new_ones = []
        states: dict[int, dict[str, Any]] = {}
        done: set[int] = set()
        given: set[int] = set()
        for name, old, new in replaced:
            if id(old) not in states:
                states[id(old)] = self.state.pop(old, {})
            if id(new) in done:  # it has several names
                continue
            done.add(id(new))
            state = dict(states[id(old)])
            is_loaded = all_at_once and old.shape == new.shape
            if not is_loaded and not continues(new, old, blocks_of(self._model, name)):
                new_ones += [name] if state else []
            elif state:
                if id(old) in given:  # a parameter that was shared was replaced by several
                    state = {key: v.clone() if isinstance(v, Tensor) else v for key, v in state.items()}
                given.add(id(old))
                self._inherit(name, old, new, state)
        if new_ones:
            warn_of_replaced(new_ones)

    def _trained_by_name(self) -> dict[str, Tensor]:
        """The parameters in the groups, by their names when the model was last examined."""
        return {} if self._known_model is None else self._known_model.parameters

    def _inherit(self, name: str, old: Tensor, new: Tensor, state: dict[str, Any]) -> None:
        """Gives the state of a parameter to the one that has replaced it, and may have grown."""
        if old.shape != new.shape:
            blocks = blocks_of(self._model, name)
            for tensor, values in state.items():
                if isinstance(values, Tensor) and values.shape == old.shape:
                    kept = tensor in self._STATE_TENSORS
                    larger = self._new_state_tensor(new, tensor) if kept else torch.zeros_like(new, dtype=values.dtype)
                    state[tensor] = fitted(values, larger.requires_grad_(False), repr(name), blocks)
        self.state[new] = state

    def _knows(self, parameters: list[Tensor]) -> bool:
        """Whether plans, layers and taps were made for these parameters."""
        known = self._known_parameters
        return len(known) == len(parameters) and all(map(is_, known, parameters))

    def _compare_with_model(self) -> bool:
        """Warns of replaced parameters of the model; returns whether the groups' parameters changed."""
        self._until_comparison = _STEPS_BETWEEN_COMPARISONS
        changed = not self._knows(self._all_parameters())
        if changed:
            try:
                self._learn_model()
                self._take_up_groups()
            except Exception:
                self._known_parameters = []  # the next step tries again
                raise
        known = self._known_model
        if known is not None and not known.is_unchanged(self._model):
            lost = known.lost(self._model, set(map(id, self._known_parameters)))
            check_not_sharded(lost)
            known.look_again(self._model)
            self._warn_of_lost(lost)
        return changed

    def _warn_of_lost(self, lost: list[Lost]) -> None:
        """Warns once of each replaced parameter, unless its replacements require no gradient."""
        lost = [parameter for parameter in lost if parameter.name not in self._lost_names]
        self._lost_names.update(parameter.name for parameter in lost)
        lost = [p for p in lost if any(replacement.requires_grad for replacement in p.replacements.values())]
        if not lost:
            return
        warn(self._text_of_lost(lost, "not trained"), UserWarning)

    def _text_of_lost(self, lost: Sequence[Lost], fate: str) -> str:
        """Says which parameters were replaced, the fate of their replacements, and what to do."""
        replacements = dict.fromkeys(name for parameter in lost for name in parameter.replacements)
        return (
            "parameters of the model were replaced after the optimizer was built: "
            f"{listed(parameter.name for parameter in lost)}. Their replacements are {fate}: {listed(replacements)}. "
            "Build the optimizer after such changes (new modules, load_state_dict(assign=True), parametrizations); to "
            f"keep the {self._KIND} of this one (earlier): {self._built_as()}.load_importance(earlier). Or replace the "
            "old parameters in optimizer.param_groups with the new ones"
        )

    def _take_up_groups(self) -> None:
        """Continues with the parameters that are in the groups now."""
        for parameter in filter(is_sharded, self._known_parameters):
            self._check_sharded(parameter)
        self._forget_plans()

    # --------------------------------------------------------------------------------------------- saving and loading

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict, with importance, anchors and moments. If it does not fit, nothing is changed.

        Args:
            state_dict: what `state_dict()` returned for an optimizer of the same class, with the same groups.

        Raises:
            ValueError: it was saved by another kind of optimizer, or for another architecture or other groups. After a
                layer has grown, call `load_importance` instead.
            RuntimeError: it is called under `torch.inference_mode()`.
        """
        check_not_in_inference_mode("load_state_dict() is called")
        if not {"state", "param_groups"} <= state_dict.keys():
            raise ValueError(
                f"the state dict has {', '.join(map(str, [*state_dict][:4])) or 'nothing'}; expected state and "
                "param_groups, as in an optimizer's state_dict() (to load a model: model.load_state_dict)"
            )
        saved_groups = state_dict["param_groups"]
        counts, saved_counts = ([len(g["params"]) for g in groups] for groups in (self.param_groups, saved_groups))
        if counts != saved_counts:
            raise ValueError(
                f"the state dict has parameter groups of {saved_counts} parameters, this optimizer has {counts}; "
                "it was saved for another architecture or other groups. If the model has grown, take over the "
                "importance of the earlier optimizer by the names of layers: load_importance(earlier). In a new "
                "process, build model and optimizer as they were saved, load their states, and let the model grow then"
            )
        parameters, saved = self._all_parameters(), self._states_saved_in(state_dict)
        for parameter in parameters:
            self._check_saved_tensors(parameter, saved[id(parameter)])
        self._check_saved(saved)
        expected = ("lr", *self._OPTIONS)
        for group in saved_groups:
            if missing := [name for name in expected if name not in group]:
                raise ValueError(
                    f"the state dict's parameter groups have no {', '.join(missing)}; another optimizer than "
                    f"{type(self).__name__}, or another version, saved it. If that holds importance, take over the "
                    "importance alone: load_importance(state_dict)"
                )
        is_own = self._is_own_state(saved)
        super().load_state_dict(state_dict)
        self._take_over(saved)
        self._may_begin_without |= not is_own
        for parameter in filter(is_sharded, parameters):
            if parameter in self.state:
                self._lay_out_state(parameter)

    def _is_own_state(self, saved: Mapping[int, Mapping[str, Any]]) -> bool:
        """Whether saved states consist of this optimizer's own tensors, and not of those of a checkpoint.

        Accelerate loads the state of each optimizer that it prepares into the same optimizer. Shards are left out: they
        may be wrapped in new tensors.
        """
        own = {id(value) for state in self.state.values() for value in state.values()}
        loaded = (value for state in saved.values() for value in state.values() if isinstance(value, Tensor))
        return all(id(tensor) in own or is_sharded(tensor) for tensor in loaded)

    def _check_saved_tensors(self, parameter: Tensor, saved: Mapping[str, Any]) -> None:
        """Raises ValueError if saved tensors do not have the shape and the shards of their parameter."""
        for name in ("momentum_buffer", *self._STATE_TENSORS):
            tensor = saved.get(name)
            if tensor is not None and tensor.shape != parameter.shape:
                raise ValueError(
                    f"the state dict's {name.replace('_', ' ')} for {self._name_of(parameter)} has shape "
                    f"{tuple(tensor.shape)}, expected {tuple(parameter.shape)}; it was saved for another architecture"
                )
            if is_sharded(tensor) and not is_sharded(parameter):
                raise ValueError(
                    f"the state dict's {name.replace('_', ' ')} for {self._name_of(parameter)} is sharded over "
                    "processes, but the parameter is not; gather it before saving: "
                    "get_optimizer_state_dict(..., options=StateDictOptions(full_state_dict=True)) of "
                    "torch.distributed.checkpoint.state_dict"
                )

    def _check_saved(self, saved: Mapping[int, dict[str, Any]]) -> None:
        """Raises ValueError if saved states, by the id of their parameter, do not fit this optimizer."""

    def _take_over(self, saved: Mapping[int, dict[str, Any]]) -> None:
        """Copies the saved tensors that torch would cast to the parameter's dtype."""
        for parameter in self._all_parameters():
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
        # Without what holds memory addresses, which __setstate__ has made anew, and without the step that a scheduler
        # sets here: it is this optimizer's, so a copy would call it.
        left_out = ("_plans", "_planned_for", "_planned_numbers", "_earlier_plans", "step")
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # called by copy, pickle and load_state_dict
        self._forget_plans()


class _GroupsChangedError(Exception):
    """The groups' parameters changed while plans were chosen. Layers and taps are up to date now; plan again."""


@torch.compiler.disable
def uncompiled(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function outside of the compiler: steps use memory addresses, which compiled graphs cannot."""
    return function(*arguments)


def _parameters_of(param_group: dict[str, Any]) -> Sequence[Tensor]:
    parameters = param_group["params"]
    if isinstance(parameters, Tensor):
        return [parameters]
    _check_not_module(parameters)
    param_group["params"] = list(parameters)  # it may be a generator
    parameters = [p[1] if isinstance(p, tuple) else p for p in param_group["params"]]
    for parameter in parameters:
        if not isinstance(parameter, Tensor):
            raise TypeError(
                f"params has an element of type {type(parameter).__name__}; expected parameters, or a list of groups, "
                "as in [{'params': model.head.parameters(), 'lr': 0.01}]"
            )
    return parameters


def _check_not_module(params: Any) -> None:
    if isinstance(params, nn.Module):
        raise TypeError(f"params is a module, {type(params).__name__}; expected its parameters: module.parameters()")


def check_not_in_inference_mode(what: str) -> None:
    """Raises RuntimeError under torch.inference_mode(): tensors created there cannot be modified outside of it."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{what} under torch.inference_mode(); tensors created in that mode cannot be modified later: do it "
            "outside of that mode (torch.no_grad() is fine)"
        )


def prepare_native(model: nn.Module) -> None:
    """Loads or compiles the kernels for the model's devices now, rather than in the first backward pass."""
    for device in {parameter.device for parameter in model.parameters()}:
        if device.type == "cuda":
            native.why_not_on(device.index)
        elif device.type == "cpu":
            native.status()


def require_native(model: nn.Module) -> None:
    """Raises if the compiled kernels do not run on the model's devices."""
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
