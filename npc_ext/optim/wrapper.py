"""Neuron-wise learning rates for any optimizer, by scaling its updates of the weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.join import Joinable, JoinHook

from .. import reference
from .._torch import direct_step_hooks
from ..distributed.shards import local
from ..distributed.sinks import SinksJoinHook
from ..neurons.table import Neurons
from .base import uncompiled
from .npc import NPC
from .options import CONSTANTS
from .plan import PlasticPlan
from .plastic import Plastic
from .plasticity import LayerPlasticity
from .unknown_options import explains_options

if TYPE_CHECKING:
    from typing_extensions import Self


BUCKET_BYTES = 64 * 2**20
# The state of schedule-free optimizers that holds their second weights; train() and eval() interpolate between these
# and the parameters.
SECOND_WEIGHTS = "z"
_FIRST_MOMENTS = ("momentum_buffer", "exp_avg")


class PlasticityWrapper(torch.optim.Optimizer, Joinable):
    """Wraps any optimizer, and lowers the learning rate of each neuron with the neuron's importance.

    In each step the optimizer moves the weights. Then each neuron takes back a part of its movement:

        w <- w_before + s_i (w_after - w_before)
        s_i = min(1, alpha sqrt(max(beta / C_i - 1, 0)))

    with s_i and C_i as in `NPC` (eqs. 2 to 4 and 7). Neurons with s_i = 0 stay bit-identical. The optimizer's state
    follows the gradients of all neurons; only when a neuron freezes, its part of `momentum_buffer` or `exp_avg` is set
    to 0, once. With normalize="active", a neuron that received no gradient keeps its weights, but the optimizer may
    change its state.

    Use the wrapper in place of the optimizer: step, zero_grad, schedulers, `GradScaler`, state_dict. Weights are copied
    in buckets, so that at most `bucket_bytes` are needed at a time. The optimizer's step is called once for each
    bucket, with only that bucket's parameters in the groups. Counters in its groups and attributes count one step.

    Schedule-free optimizers, which have `train()` and `eval()`, keep two sets of weights. The movement of both is
    scaled, and where s_i = 0 both are equal: such neurons are bit-identical in both modes.

    Args:
        optimizer: any optimizer that needs no closure. Its step hooks run once for each bucket.
        model: the network.
        alpha, beta, delta, half_life, sigma, normalize, layers, process_group, backend: as in `NPC`. The constants are
            not in the groups, which are the wrapped optimizer's; `set_constants` changes them. To train a sharded
            model, call `fully_shard` before you build the optimizer and the wrapper.
        bucket_bytes: the most bytes of weights to copy at a time, except for larger single parameters. Default:
            64 MiB.

    Raises:
        ValueError: an argument is out of range or does not fit the model; the message says what to change.
        TypeError: an argument has the wrong type, or there is no such option.

    Warns:
        ImportanceWarning: more than half of the elements that are trained belong to no neuron.

    Example:
        >>> optimizer = PlasticityWrapper(torch.optim.AdamW(model.parameters(), lr=1e-3), model)
    """

    @explains_options
    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        *,
        alpha: float = 0.5,
        beta: float = 0.5,
        delta: float | None = None,
        half_life: float | None = None,
        sigma: Literal["sigmoid", "tanh", "erf"] = "sigmoid",
        normalize: Literal["all", "active"] = "all",
        layers: Mapping[str, Mapping[str, Any]] | None = None,
        process_group: Any = "auto",
        backend: Literal["auto", "native", "reference"] = "auto",
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        _check_wrappable(optimizer, model)
        if bucket_bytes < 1:
            raise ValueError(f"bucket_bytes is {bucket_bytes}; expected at least 1")
        self.optimizer, self._bucket_bytes = optimizer, bucket_bytes
        self._tracker = _Tracker(locals())
        self._steps_inner = False  # whether a step of the wrapped optimizer is the wrapper's
        self.__setstate__({})

    # ------------------------------------------------------------------------------------------- the wrapped optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of the wrapped optimizer."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The state of the wrapped optimizer; for importance see `plasticity()`."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The defaults of the wrapped optimizer."""
        return self.optimizer.defaults

    @property
    def neurons(self) -> Neurons:
        """The model's neurons and the places where they are measured; print it to see a table."""
        return self._tracker.neurons

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters to the wrapped optimizer, and searches the model again.

        Args:
            param_group: {"params": ...}, with the options of the wrapped optimizer in which the group differs.

        Raises:
            ValueError: the group has one of the constants, which `set_constants` changes; or as
                `NPC.add_param_group`. Nothing is changed then.
        """
        self._tracker.check_wrapped_group(param_group)
        self.optimizer.add_param_group(param_group)
        added = self.optimizer.param_groups[-1]["params"]
        try:
            self._tracker.add_param_group({"params": list(added), **self._constants()})
        except Exception:
            self.optimizer.param_groups.pop()
            raise

    @property
    def train(self) -> Callable[[], Any]:
        """The `train` method of a schedule-free optimizer; raises AttributeError for others."""
        return self.optimizer.train  # type: ignore[attr-defined]

    @property
    def eval(self) -> Callable[[], Any]:
        """The `eval` method of a schedule-free optimizer; raises AttributeError for others."""
        return self.optimizer.eval  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of all parameters, and the importance measured since the last step."""
        if torch.compiler.is_dynamo_compiling():
            uncompiled(PlasticityWrapper.zero_grad, self, set_to_none)
            return
        self.optimizer.zero_grad(set_to_none)
        self._tracker._drop_measured()

    # ------------------------------------------------------------------------------------------------------ the step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one step of the wrapped optimizer, and scales the movement of each neuron.

        If the wrapped optimizer's step raises, importance is already updated, and some weights may have moved.

        Args:
            closure: reevaluates the model and returns the loss; it is called once.

        Returns:
            The value that `closure` returned, or None.

        Raises:
            RuntimeError: there are gradients, but no importance was measured; or a schedule-free optimizer is not in
                training mode.
            ValueError: as `NPC.step`; or a group has a constant, which only `set_constants` changes.
        """
        if torch.compiler.is_dynamo_compiling():
            return uncompiled(PlasticityWrapper._step, self, closure)
        return self._step(closure)

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._only_makes_state():
            self._step_inner()
            return loss
        if self._has_modes and not all(group.get("train_mode", True) for group in self.param_groups):
            raise RuntimeError(
                f"the {type(self.optimizer).__name__} is not in training mode; call optimizer.train() before "
                "training, and optimizer.eval() before evaluating or saving the model"
            )
        self._tracker.follow_groups()
        self._tracker.step()
        with torch.no_grad():
            self._take_steps()
        return loss

    def _only_makes_state(self) -> bool:
        """Whether nothing was measured and nothing can move: torch.distributed.checkpoint creates state this way."""
        unmeasured = all(layer.sink.grad is None for layer in self.neurons)
        return unmeasured and all("lr" in group and float(group["lr"]) == 0 for group in self.param_groups)

    @property
    def _has_modes(self) -> bool:
        """Whether the optimizer is schedule-free."""
        return hasattr(self, "train") and hasattr(self, "eval")

    def _take_steps(self) -> None:
        """Lets the optimizer move the parameters: first the unprotected ones, then the others in buckets."""
        trained = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        shares = {id(p): share for p in trained if (share := self._tracker.share(p)) is not None}
        places = [*self.param_groups, vars(self.optimizer)]
        counters = list(map(_numbers, places))

        def step_only(parameters: list[Tensor]) -> None:
            for place, numbers in zip(places, counters, strict=True):  # so that all calls count one step
                _restore(place, numbers)
            self._step_only(parameters)

        unprotected = [parameter for parameter in trained if id(parameter) not in shares]
        if unprotected or not shares:
            step_only(unprotected)
        has_modes = self._has_modes
        most_bytes = self._bucket_bytes // 2 if has_modes else self._bucket_bytes
        for bucket in _buckets([p for p in trained if id(p) in shares], most_bytes):
            before = [local(parameter).detach().clone() for parameter in bucket]
            seconds_before = list(map(self._copy_of_second, bucket, before)) if has_modes else []
            step_only(bucket)
            for parameter, was in zip(bucket, before, strict=True):
                _take_back_(local(parameter), was, shares[id(parameter)])
            for parameter, was in zip(bucket, seconds_before, strict=has_modes):
                self._take_back_second_(parameter, was, shares[id(parameter)])
        self._tracker.clear_first_moments_(self.optimizer.state)

    def _second_weights(self, parameter: Tensor) -> Tensor | None:
        """The second weights of a schedule-free optimizer; its first step initializes them to the parameter."""
        second: Tensor | None = local(self.optimizer.state.get(parameter, {}).get(SECOND_WEIGHTS))
        return second

    def _copy_of_second(self, parameter: Tensor, initial: Tensor) -> Tensor:
        second = self._second_weights(parameter)
        return initial if second is None else second.clone()

    def _take_back_second_(self, parameter: Tensor, before: Tensor, share: Tensor) -> None:
        second = self._second_weights(parameter)
        if second is None or second.shape != before.shape:
            raise RuntimeError(
                f"{type(self.optimizer).__name__} has train() and eval(), but not the second weights of schedule-free "
                f"optimizers (state[...][{SECOND_WEIGHTS!r}]), so frozen neurons could change between the modes; use "
                "it without the wrapper, or wrap another optimizer"
            )
        _take_back_(second, before, share)
        second.copy_(torch.where(share == 0, local(parameter), second))

    def _step_only(self, parameters: list[Tensor]) -> None:
        chosen = {id(parameter) for parameter in parameters}
        complete = [group["params"] for group in self.param_groups]
        try:
            for group in self.param_groups:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) in chosen]
            self._step_inner()
        finally:
            for group, members in zip(self.param_groups, complete, strict=True):
                group["params"] = members

    def _step_inner(self) -> None:
        self._steps_inner = True
        try:
            self.optimizer.step()
        finally:
            self._steps_inner = False

    def load_importance(self, earlier: Any) -> Self:
        """Takes over the importance of an earlier optimizer, as `NPC.load_importance`.

        Args:
            earlier: an `NPC`, `NPCAdamW` or `PlasticityWrapper`, its `state_dict()`, or None.

        Returns:
            This wrapper.
        """
        self._tracker.load_importance(earlier)
        return self

    # ------------------------------------------------------------------------------ different numbers of batches

    @property
    def _join_config(self) -> Any:
        return self._tracker._join_config

    @_join_config.setter
    def _join_config(self, config: Any) -> None:
        self._tracker._join_config = config

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """As `NPC.join_hook`."""
        return SinksJoinHook(self, self.join_process_group, self._tracker._add_nothing)

    @property
    def join_device(self) -> torch.device:
        """As `NPC.join_device`."""
        return self._tracker.join_device

    @property
    def join_process_group(self) -> Any:
        """As `NPC.join_process_group`."""
        return self._tracker.join_process_group

    # ------------------------------------------------------------------------------------------------------ plasticity

    def plasticity(self) -> dict[str, LayerPlasticity]:
        """Importance, shares and frozen neurons of every protected layer, as `NPC.plasticity`.

        Returns:
            Layer name -> `npc_ext.LayerPlasticity`. Its `learning_rate` is the share s_i of the wrapped optimizer's
            rate, from 0 to 1.
        """
        return self._tracker.plasticity()

    def constants(self, layer: str) -> dict[str, Any]:
        """The constants of a layer's neurons, as `NPC.constants`."""
        return self._tracker.constants(layer)

    def set_constants(self, **constants: Any) -> None:
        """Changes constants of all neurons from now on, except those of layers that have options in `layers`.

        This is the only way: the wrapper's groups are the wrapped optimizer's, and have no constants.

        Args:
            constants: alpha, beta, delta or half_life, sigma, normalize.

        Raises:
            TypeError: there is no such constant, or its type is wrong. Nothing is changed then.
            ValueError: a constant is out of range. Nothing is changed then.
        """
        self._tracker.set_constants(**constants)

    def _constants(self) -> dict[str, Any]:
        """The constants of layers without options in `layers`."""
        return {name: self._tracker.param_groups[0][name] for name in CONSTANTS}

    def __repr__(self) -> str:
        constants = ", ".join(f"{name}={value!r}" for name, value in self._constants().items() if value is not None)
        layers = f"layers: {self._tracker._layer_options}"
        return f"{type(self).__name__}({self.optimizer!r},\n{constants}\n\n{layers}\n{self._tracker._summary()}\n)"

    # --------------------------------------------------------------------------------------------- saving and loading

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state dict, with the tracker's under "plasticity": importance and its options.

        Importance is also in the states of the layers' weights, because torch.distributed.checkpoint only saves states.
        """
        wrapped, tracked = self.optimizer.state_dict(), self._tracker.state_dict()
        states = dict(wrapped["state"])
        for index, state in tracked["state"].items():
            if "importance" in state:
                states[index] = {**states.get(index, {}), "importance": state["importance"]}
        return {**wrapped, "state": states, "plasticity": tracked}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict, with importance. If it does not fit, nothing is changed.

        Args:
            state_dict: what `state_dict()` returned for a wrapper of the same kind of optimizer, with the same groups.

        Raises:
            ValueError: it was saved by another kind of optimizer, without a wrapper, or for another architecture. After
                a layer has grown, call `load_importance` instead.
        """
        self._check_groups(state_dict.get("param_groups", ()))
        before, states = self._tracker.state_dict(), state_dict.get("state", {})
        tracked = state_dict.get("plasticity")
        if tracked is None:  # torch.distributed.checkpoint did not save it; keep this wrapper's options
            tracked = {**before, "state": _importances_in(state_dict)}
        wrapped = {name: part for name, part in state_dict.items() if name != "plasticity"}
        wrapped["state"] = {at: {n: v for n, v in state.items() if n != "importance"} for at, state in states.items()}
        may_begin_without = self._tracker._may_begin_without
        self._tracker.load_state_dict(tracked)
        try:
            self.optimizer.load_state_dict(wrapped)
        except Exception:
            self._tracker.load_state_dict(before)
            self._tracker._may_begin_without = may_begin_without
            raise

    def _check_groups(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Raises ValueError if groups were saved by another kind of optimizer, which torch does not check."""
        for group, saved_group in zip(self.param_groups, saved, strict=False):
            missing, unknown = group.keys() - saved_group.keys(), saved_group.keys() - group.keys()
            if missing and unknown:
                raise ValueError(
                    f"the state dict's parameter groups have {', '.join(sorted(unknown))}, but not "
                    f"{', '.join(sorted(missing))}; they were saved by another optimizer than a wrapped "
                    f"{type(self.optimizer).__name__}. To take over its importance alone: "
                    "wrapper.load_importance(state_dict)"
                )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "step"}  # as ModelOptimizer does

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # also creates the hooks of torch.optim.Optimizer
        hooks = direct_step_hooks(self.optimizer)
        if hooks is None:
            return
        self.optimizer.register_load_state_dict_pre_hook(_refuse_state_of_wrapper)
        for key in [key for key, hook in hooks.items() if isinstance(hook, _StepCheck)]:
            del hooks[key]  # an earlier wrapper's, or that of the wrapper of which this one is a copy
        self.optimizer.register_step_pre_hook(_StepCheck(self))


def _refuse_state_of_wrapper(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
    if "plasticity" in state_dict:
        raise ValueError(
            f"a PlasticityWrapper saved the state dict, and {type(optimizer).__name__} alone would drop its "
            "importance; load it into the wrapper"
        )


class _StepCheck:
    """Raises if the wrapped optimizer takes a step of which the wrapper does not know. Holds the wrapper weakly.

    A copy or pickle checks nothing: a copy of the wrapper places its own.
    """

    def __init__(self, wrapper: PlasticityWrapper | None = None) -> None:
        self._wrapper = None if wrapper is None else weakref.ref(wrapper)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def __call__(self, optimizer: torch.optim.Optimizer, arguments: Any, options: Any) -> None:
        wrapper = None if self._wrapper is None else self._wrapper()
        if wrapper is not None and not wrapper._steps_inner and not wrapper._only_makes_state():
            raise RuntimeError(
                f"step() of the wrapped {type(optimizer).__name__} was called, which would move frozen neurons; call "
                "step() of the PlasticityWrapper, and pass the wrapper to schedulers, GradScaler and trainers"
            )


_WHY_NOT = {
    torch.optim.LBFGS: "evaluates a closure several times in a step, and its movement cannot be scaled in between",
    Plastic: "gives each neuron a learning rate already",
    PlasticityWrapper: "is wrapped already",
}


def _check_wrappable(optimizer: Any, model: Any) -> None:
    """Raises TypeError for arguments of the wrong kind, and for optimizers that cannot be wrapped."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer is of type {type(optimizer).__name__}; expected a torch.optim.Optimizer, as in "
            "PlasticityWrapper(torch.optim.AdamW(model.parameters(), lr=1e-3), model)"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is of type {type(model).__name__}; expected the model itself, as in "
            "PlasticityWrapper(optimizer, model)"
        )
    for kind, why_not in _WHY_NOT.items():
        if isinstance(optimizer, kind):
            raise TypeError(f"{type(optimizer).__name__} cannot be wrapped: it {why_not}")


def _importances_in(state_dict: Mapping[str, Any]) -> dict[int, dict[str, Tensor]]:
    """The importance in the states of a state dict, by the number of the parameter through all groups."""
    states = state_dict.get("state", {})
    keys = (key for group in state_dict.get("param_groups", ()) for key in group["params"])  # they may be names
    numbered = ((at, states.get(key, {})) for at, key in enumerate(keys))
    importances = {at: {"importance": state["importance"]} for at, state in numbered if "importance" in state}
    if not importances:
        raise ValueError(
            "the state dict has no 'plasticity'; the optimizer saved it, not its PlasticityWrapper. To start "
            "without importance: wrapper.optimizer.load_state_dict(...)"
        )
    return importances


def _take_back_(parameter: Tensor, before: Tensor, share: Tensor) -> None:
    """Leaves a parameter, or this process's shard, a share of its movement from `before`; 0 restores it exactly."""
    dtype = reference.compute_dtype(parameter.dtype)
    if dtype == parameter.dtype:
        parameter.lerp_(before, (1 - share.to(dtype)).expand_as(parameter))
    else:
        parameter.copy_(torch.lerp(before.to(dtype), parameter.to(dtype), share.to(dtype).expand_as(parameter)))
    parameter.copy_(torch.where(share == 0, before, parameter))


class _Tracker(NPC):
    """Measures and averages importance like NPC, but moves nothing."""

    _ADVICE = (
        "Leave other parameters out of the optimizer, or give them a lower learning rate in a separate group; only "
        "Linear, convolution, Conv1D and attention layers have neurons."
    )
    wrapped: torch.optim.Optimizer

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        """Takes the arguments of the wrapper by name."""
        self.wrapped = arguments["optimizer"]
        options = {name: arguments[name] for name in (*CONSTANTS, "layers", "process_group", "backend")}
        super().__init__(
            arguments["model"], lr=1.0, params=self._wrapped_parameters(), skip_gradients="none", **options
        )

    def _called(self) -> str:
        return PlasticityWrapper.__name__

    def _built_as(self) -> str:
        return f"{self._called()}(new_optimizer, model)"

    def follow_groups(self) -> None:
        """Continues with the parameters that are in the wrapped optimizer's groups now."""
        trained = self._wrapped_parameters()
        if not self._knows(trained):
            self.param_groups[0]["params"] = trained
            del self.param_groups[1:]
            self._compare_with_model()

    def _prepare(self) -> None:
        for group in self.wrapped.param_groups:  # here, where an error lets the all-reduce of other processes finish
            self.check_wrapped_group(group)
        super()._prepare()

    def check_wrapped_group(self, group: Mapping[str, Any]) -> None:
        """Raises ValueError if constants are set in one of the wrapped optimizer's groups, where nothing reads them."""
        own = self.wrapped.defaults or self.wrapped.param_groups[0]  # some optimizers have no defaults
        for name in CONSTANTS:
            if name in group and name not in own:
                raise ValueError(
                    f"a parameter group has the key {name!r}, but the groups are those of the wrapped "
                    f"{type(self.wrapped).__name__}, which does not read it; call "
                    f"wrapper.set_constants({name}=...) instead, and remove it from the group"
                )

    def _wrapped_parameters(self) -> list[Tensor]:
        return [parameter for group in self.wrapped.param_groups for parameter in group["params"]]

    def _forget_plans(self) -> None:
        super()._forget_plans()
        # For each layer: the neurons that are frozen, that froze in the last step, and that took no part in it.
        self._frozen: dict[int, Tensor] = {}
        self._froze: dict[int, Tensor] = {}
        self._inactive: dict[int, Tensor] = {}

    def _launch_all(self) -> None:
        self._froze, self._inactive = {}, {}
        super()._launch_all()

    @torch.no_grad()
    def _launch(self, plan: PlasticPlan) -> None:
        states = dict(zip(plan.layers, plan.layer_states, strict=True))
        for index in states.keys() - self._frozen.keys():
            self._frozen[index] = states[index]["importance"] >= float(self._constants(index)["beta"])
        super()._launch(plan)
        for index, state in states.items():
            constants, measured = self._constants(index), self._protected[index].sink.grad
            frozen = state["importance"] >= float(constants["beta"])
            self._froze[index], self._frozen[index] = frozen & ~self._frozen[index], frozen
            if constants["normalize"] == "active" and measured is not None:
                self._inactive[index] = reference.received_no_gradient(measured)

    def clear_first_moments_(self, states: Mapping[Any, Mapping[str, Any]]) -> None:
        """Clears the first moments of the neurons that froze in the last step, in the wrapped optimizer's states."""
        for index, froze in self._froze.items():
            if not froze.is_cuda and not bool(froze.any()):  # do not wait for a GPU
                continue
            for parameter in (p.parameter for p in self._protected[index].parameters):
                state = states.get(parameter, {}) if id(parameter) in self._place else {}
                for moment in (local(state[name]) for name in _FIRST_MOMENTS if isinstance(state.get(name), Tensor)):
                    if type(moment) is Tensor and moment.shape == local(parameter).shape:
                        moment.masked_fill_(self._spread(froze, parameter), 0)

    def _check_trains_model(self) -> None:
        pass  # _check_protection says it with the name of the wrapped optimizer

    def _make_plan(self, common: dict[str, Any], parameters: Sequence[Tensor] | None = None) -> PlasticPlan:
        moves_nothing = self._common(common["device"], [])
        return super()._make_plan(moves_nothing, common["owners"])

    def _check_protection(self) -> None:
        if not self._protected:
            self.neurons.detach()
            raise ValueError(
                f"none of the {type(self.wrapped).__name__}'s parameters belongs to a neuron of the model, so nothing "
                "would be protected; build the optimizer on the parameters of the model that is passed here and "
                "trained (not on those of a copy, and after fully_shard)"
            )
        super()._check_protection()

    def share(self, parameter: Tensor) -> Tensor | None:
        """The shares s_i of a parameter's neurons, to broadcast; None if all are 1, or if it belongs to no neuron."""
        if (index := self._place_of(parameter).layer) < 0:
            return None
        constants, average = self._constants(index), self._layer_state(index)["importance"]
        shares = reference.plasticity(average, constants["alpha"], constants["beta"], constants["sigma"])
        if index in self._inactive:
            shares = shares.masked_fill(self._inactive[index], 0)
        if not shares.is_cuda and bool((shares == 1).all()):  # do not wait for a GPU
            return None
        return self._spread(shares, parameter)


def _buckets(parameters: list[Tensor], most_bytes: int) -> Iterator[list[Tensor]]:
    """Splits parameters into lists of at most `most_bytes`, except for larger single parameters."""
    bucket: list[Tensor] = []
    bucket_bytes = 0
    for parameter in parameters:
        parameter_bytes = local(parameter).numel() * parameter.element_size()
        if bucket and bucket_bytes + parameter_bytes > most_bytes:
            yield bucket
            bucket, bucket_bytes = [], 0
        bucket.append(parameter)
        bucket_bytes += parameter_bytes
    if bucket:
        yield bucket


def _numbers(place: Mapping[str, Any]) -> dict[str, Any]:
    """Values that may count steps: numbers, and tensors with one element."""
    kept: dict[str, Any] = {}
    for name, value in place.items():
        if isinstance(value, (int, float)):
            kept[name] = value
        elif isinstance(value, Tensor) and value.numel() == 1:
            kept[name] = (value, value.detach().clone())
    return kept


def _restore(place: dict[str, Any], kept: Mapping[str, Any]) -> None:
    for name, value in kept.items():
        if isinstance(value, tuple):
            value[0].copy_(value[1])
            value = value[0]
        place[name] = value
