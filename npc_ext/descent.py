"""What the optimizers of this package have in common: SGD's options and manners, and steps that are prepared once.

A step is prepared device by device as a plan, which stays until something it depends on changes (the signature). What a
method adds to SGD is in its plans.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, ClassVar, SupportsFloat

import torch
from torch import Tensor, nn

from . import _launch, _native, ops, reference
from .distributed import unwrapped
from .shards import check_not_replaced, is_sharded, like, local

BACKENDS = ("auto", "native", "reference")
# Steps may take turns: heads of several tasks, layers that are measured now and then.
_MOST_EARLIER_PLANS = 3
SGD_OPTIONS = ("momentum", "nesterov", "weight_decay", "maximize")


@dataclass(frozen=True)
class Plan:
    """What one device's part of a step works on, apart from the values."""

    device: torch.device
    parameters: list[Tensor]  # of sharded ones, this process's shards
    owners: list[Tensor]  # the parameters themselves, which have the gradients
    sharded: bool  # whether any of them is a DTensor
    aligned: bool  # all gradients lie in memory like their parameters
    states: list[dict[str, Any]]  # of the parameters
    has_momentum: list[bool]
    groups: list[dict[str, Any]]  # of each parameter
    rates: list[float | Tensor]  # the learning rate of each parameter, one of the options
    options: tuple[Any, ...]  # of the operation in ops, after its tensors
    tables: _launch.Tables | None  # for the compiled kernels; None where plain PyTorch does the work

    def gradients(self) -> list[Any]:
        """The gradients, in memory like their parameters."""
        gradients: list[Any] = [owner.grad for owner in self.owners]
        if self.sharded:
            gradients = list(map(local, gradients))
        return gradients if self.aligned else list(map(_launch.in_memory_order_of, self.parameters, gradients))

    def take_rates(self, rates: list[float | Tensor]) -> None:
        """Takes over other learning rates: all that a schedule changes from step to step."""
        self.rates[:] = rates
        if self.tables is not None:
            self.tables.take_rates(rates)

    def momentum_buffers(self) -> list[Tensor]:
        """The momentum buffers, and in place of missing ones anything."""
        own = zip(self.parameters, self.states, self.has_momentum, strict=True)
        buffers = [state["momentum_buffer"] if has else parameter for parameter, state, has in own]
        return list(map(local, buffers)) if self.sharded else buffers

    def beside(self, name: str) -> list[Tensor | None]:
        """One tensor of each parameter's state, or None where it has none of that name."""
        tensors = [state.get(name) for state in self.states]
        return list(map(local, tensors)) if self.sharded else tensors


class Descent(torch.optim.Optimizer):
    """`torch.optim.SGD`, as the methods of this package extend it.

    A subclass lists its group options in `_OPTIONS`, checks them in `_check_options`, and makes and launches plans.
    """

    # GradScaler then calls step() also when gradients overflowed, with found_inf and grad_scale set: the step changes
    # nothing, but it can drop what was measured on the way.
    _step_supports_amp_scaling = True

    _OPTIONS: ClassVar[tuple[str, ...]] = SGD_OPTIONS
    # Tensors of a parameter's state that have its shape, but not its dtype: torch would cast them to it.
    _BESIDE: ClassVar[tuple[str, ...]] = ()

    _plans: list[Any]
    _planned_for: list[Any] | None  # the signature of `_plans`
    _planned_rates: list[float | None] | None  # those of the groups that `_plans` have
    _earlier_plans: list[tuple[list[Any], list[Any]]]  # signatures and plans, the latest first

    def __init__(self, model: nn.Module, params: Iterable[Any] | None, defaults: dict[str, Any], backend: str) -> None:
        if not isinstance(model, nn.Module):
            name = type(self).__name__
            raise TypeError(
                f"{name} takes the model itself, got {type(model).__name__}; "
                f"write {name}(model, lr=...), not {name}(model.parameters(), lr=...); groups of parameters go into "
                "params=[{'params': ..., ...}, ...]"
            )
        check_choice("backend", backend, BACKENDS)
        self._model = unwrapped(model)
        self._backend = backend
        self._options_of = itemgetter(*self._OPTIONS)
        self._sharded = False
        self._known: list[tuple[str, Tensor]] = []  # the model's parameters in the groups, by name
        self._forget_plans()
        if backend == "native":
            require_native(self._model)
        super().__init__(model.parameters() if params is None else params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters with options of their own, for example those of a head that the model has just been given."""
        self._check_options({**self.defaults, **param_group})
        for parameter in _parameters_of(param_group):
            if parameter.is_complex():
                raise ValueError(
                    f"a parameter is complex ({parameter.dtype}, shape {tuple(parameter.shape)}); "
                    f"{type(self).__name__} trains real parameters only"
                )
            if is_sharded(parameter):
                self._check_sharded(parameter)
        super().add_param_group(param_group)
        added = {id(parameter) for parameter in self.param_groups[-1]["params"]}
        self._sharded = self._sharded or any(map(is_sharded, self.param_groups[-1]["params"]))
        self._known += [(name, own) for name, own in self._model.named_parameters() if id(own) in added]

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
            ValueError: a gradient is sparse or has another dtype or device than its parameter.

        An exception leaves weights and state as they were.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._planned_for is None:  # the first step, among others
            check_not_replaced(self._model, self._known)
        self._step()
        return loss

    def _step(self) -> None:
        self._prepare()
        self._launch_all()

    def _prepare(self) -> None:
        signature = self._signature()
        # A tensor may be changed in place, so its value counts.
        rates = [None if self._read_on_device(lr := group["lr"]) else float(lr) for group in self.param_groups]
        if signature == self._planned_for and rates == self._planned_rates:
            return
        if signature != self._planned_for:
            self._choose_plans(signature)
        for plan in self._plans:
            plan.take_rates(self._rates(plan.device, plan.groups))
        self._planned_rates = rates

    def _choose_plans(self, signature: list[Any]) -> None:
        recent = self._earlier_plans
        if self._planned_for is not None:
            # Plans hold the states: one that came or went means that others may be new objects, too.
            recent = [(self._planned_for, self._plans), *recent] if signature[0] == self._planned_for[0] else []
        known = next((plans for own, plans in recent if own == signature), None)
        self._plans = self._make_plans() if known is None else known
        self._planned_for = signature
        self._earlier_plans = [own for own in recent if own[0] != signature][:_MOST_EARLIER_PLANS]

    def _forget_plans(self) -> None:
        """To be called wherever plans hold what is no longer so."""
        self._plans, self._planned_for, self._planned_rates, self._earlier_plans = [], None, None, []

    def _launch_all(self) -> None:
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        for plan in self._plans:
            self._launch(plan, grad_scale, found_inf)
            if plan.sharded:  # the launch raised the versions of the shards
                torch.autograd.graph.increment_version(plan.owners)

    def _launch(self, plan: Any, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        raise NotImplementedError

    def _signature(self) -> list[Any]:
        """Everything that plans depend on: which parameters have gradients, their layout, and all options but rates.

        Compared on every step, so it is made of what is quick to read. Raises ValueError for bad gradients.
        """
        signature: list[Any] = [len(self.state)]  # 0 if somebody has cleared it
        sharded = self._sharded
        for group in self.param_groups:
            lr = group["lr"]
            signature.append((id(lr) if self._read_on_device(lr) else None, self._options_of(group)))
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    signature.append(None)
                    continue
                if gradient.is_sparse:  # it has no strides
                    self._refuse_gradient(parameter, gradient)
                if sharded:
                    parameter, gradient = local(parameter), local(gradient)
                # Another device, dtype or memory format of the parameter is another address.
                signature += (gradient.dtype, gradient.stride(), parameter.stride(), parameter.data_ptr())
        return signature

    def _read_on_device(self, lr: float | Tensor) -> bool:
        """Whether the kernels read a learning rate in device memory, so that a CUDA graph's replays see it change."""
        if not isinstance(lr, Tensor) or not lr.is_cuda or self._backend == "reference":
            return False
        return lr.dtype == torch.float32 and lr.numel() == 1 and not _native.why_not_on(lr.device.index)

    def _refuse_gradient(self, parameter: Tensor, gradient: Tensor) -> None:
        got = "sparse" if gradient.is_sparse else f"{gradient.dtype} on {gradient.device}"
        raise ValueError(
            f"the gradient of {self._name_of(parameter)} is {got}; expected a dense one, {parameter.dtype} on "
            f"{parameter.device}" + (" (for embeddings: sparse=False)" if gradient.is_sparse else "")
        )

    @torch.no_grad()
    def _make_plans(self) -> list[Any]:
        """What a step works on, device by device, until something in the signature changes."""
        members: dict[torch.device, list[tuple[Tensor, dict[str, Any]]]] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and self._trains(parameter):
                    members.setdefault(parameter.device, []).append((parameter, group))
        for own in members.values():
            for parameter, group in own:
                self._prepare_state(parameter, group)
        return [self._make_plan(device, own) for device, own in members.items()]

    def _trains(self, parameter: Tensor) -> bool:
        """Whether a parameter that has a gradient takes part in steps."""
        return True

    def _prepare_state(self, parameter: Any, group: dict[str, Any]) -> None:
        """Makes sure that a parameter's state is there and lies in memory as the parameter does."""
        if parameter.grad.dtype != parameter.dtype or parameter.grad.device != parameter.device:
            self._refuse_gradient(parameter, parameter.grad)
        self._create_state(parameter, group)
        # What was loaded, or whose model changed its memory format, may lie in memory otherwise.
        self._lay_out_state(parameter)

    def _create_state(self, parameter: Any, group: dict[str, Any]) -> None:
        """Creates what steps keep of a parameter, as far as it is not there yet."""
        if self._has_momentum(group) and "momentum_buffer" not in self.state[parameter]:
            self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def _lay_out_state(self, parameter: Any) -> None:
        """Has the state lie in memory, and be sharded, as its parameter is."""
        state = self.state[parameter]
        for name in ("momentum_buffer", *self._BESIDE):
            if name in state:
                state[name] = like(parameter, state[name])

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
            "states": [self.state[owner] for owner in owners],
            "has_momentum": [self._has_momentum(group) for _, group in members],
            "groups": [group for _, group in members],
            "rates": self._rates(device, [group for _, group in members]),
        }

    def _rates(self, device: torch.device, groups: Sequence[Mapping[str, Any]]) -> list[float | Tensor]:
        rates = (group["lr"] for group in groups)
        return [lr if self._read_on_device(lr) and lr.device == device else float(lr) for lr in rates]

    def _takes(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the compiled kernels do the work on these tensors."""
        return self._backend != "reference" and ops.native_takes(tensors)

    # --------------------------------------------------------------------------------------------- saving and loading

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a saved state. Raises ValueError, before any change, if it does not fit."""
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
            for name in ("momentum_buffer", *self._BESIDE):
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
            if missing := [name for name in ("lr", *self._OPTIONS) if name not in group]:
                raise ValueError(
                    f"the state dict's parameter groups have no {', '.join(missing)}; it was saved by another "
                    f"optimizer than {type(self).__name__}"
                )
        super().load_state_dict(state_dict)
        self._take_over(saved)
        for parameter in filter(is_sharded, parameters):
            if parameter in self.state:
                self._lay_out_state(parameter)

    def _check_saved(self, saved: Mapping[int, dict[str, Any]]) -> None:
        """Raises ValueError if the saved states (by the id of their parameter) do not fit this optimizer."""

    def _take_over(self, saved: Mapping[int, dict[str, Any]]) -> None:
        """Takes from the saved states what torch would cast to the parameter's dtype."""
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            dtype = reference.compute_dtype(parameter.dtype)
            for name in self._BESIDE:
                if name in saved[id(parameter)]:
                    tensor = saved[id(parameter)][name].detach()
                    self.state[parameter][name] = tensor.to(parameter.device, dtype, copy=True)

    def _name_of(self, parameter: Tensor) -> str:
        names = (name for name, own in self._model.named_parameters() if own is parameter)
        return next((f"{name!r}" for name in names), f"a parameter of shape {tuple(parameter.shape)}")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, **super().__getstate__()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # of a copy, an unpickled optimizer, or from load_state_dict
        self._forget_plans()


class FirstMoments:
    """Clears the first moments of what is frozen where no kernel saw it freeze.

    The kernels clear them in the step that takes C to beta. They do not see that beta was changed or a state loaded,
    nor the moments of parameters that have no gradient or no momentum in that step.
    """

    def __init__(self) -> None:
        self._cleared_for: dict[int, float] = {}  # by parameter: under which beta its moments are known to be cleared

    @torch.no_grad()
    def settle(self, parameter: Tensor, moment: Tensor | None, beta: float, frozen: Callable[[], Tensor]) -> None:
        """To be called whenever other plans are chosen.

        Args:
            parameter: one that has a rate for each neuron or connection.
            moment: its first moment, as far as this process holds it; None if steps do not see it.
            beta: the constant of eq. 7.
            frozen: says which elements are frozen, broadcast against `moment`.
        """
        if moment is None:
            self._cleared_for.pop(id(parameter), None)
        elif self._cleared_for.get(id(parameter)) != beta:
            moment.masked_fill_(frozen(), 0)
            self._cleared_for[id(parameter)] = beta


def _parameters_of(param_group: dict[str, Any]) -> Sequence[Tensor]:
    parameters = param_group["params"]
    if isinstance(parameters, Tensor):
        return [parameters]
    param_group["params"] = list(parameters)  # a generator can be read once only
    return [p[1] if isinstance(p, tuple) else p for p in param_group["params"]]


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raises ValueError if an option is none of its choices."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, choices))}")


def check_number(name: str, value: Any, where: str = "", *, positive: bool = False) -> None:
    """Raises unless an option is a number, or a tensor of one, that is finite and at least 0, or above 0."""
    expected = f"a finite number {'above 0' if positive else 'of at least 0'}"
    number = _number(name, value, expected, where)
    if not (number > 0 if positive else number >= 0) or not number < math.inf:
        raise ValueError(f"{where}{name} is {value}; expected {expected}")


def _number(name: str, value: Any, expected: str, where: str) -> float:
    if not (value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, SupportsFloat)):
        raise TypeError(f"{where}{name} is {value!r}; expected {expected}")
    return float(value)


def check_plasticity_options(options: Mapping[str, Any], where: str = "") -> None:
    """Raises ValueError if the constants of eqs. 3, 4 and 7 are out of range."""
    for name in ("alpha", "beta"):
        check_number(name, options[name], where, positive=True)
    if not 0 <= _number("delta", options["delta"], "a number in [0, 1)", where) < 1:
        raise ValueError(f"{where}delta is {options['delta']}; expected a number in [0, 1)")
    check_choice(f"{where}sigma", options["sigma"], ops.SIGMAS)
    check_choice(f"{where}normalize", options["normalize"], ("all", "active"))


def require_native(model: nn.Module) -> None:
    """Raises if the compiled kernels cannot do the work where the model is."""
    _native.module()
    for name, parameter in model.named_parameters():
        if parameter.is_cuda and (reason := _native.why_not_on(parameter.device.index)):
            raise _native.NativeUnavailableError(
                f"backend is 'native', but {name!r} is on {parameter.device} and {reason}; or use backend='auto' "
                "(plain PyTorch there)"
            )
        if not parameter.is_cpu and not parameter.is_cuda:
            raise ValueError(
                f"backend is 'native', but {name!r} is on {parameter.device}, for which there are no compiled kernels; "
                "use backend='auto' (plain PyTorch there) or move the model to the CPU or to a CUDA device"
            )
