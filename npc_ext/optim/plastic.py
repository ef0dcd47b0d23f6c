"""What optimizers have in common whose learning rates fall with the importance of neurons.

They find the neurons of a model, place taps that measure them, keep the moving average C of their importance (eq. 4),
and leave out gradients that are certain not to be needed. How a weight moves under its neuron's rate is a subclass's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.join import Joinable, JoinHook

from .. import ops, reference
from .._names import ByLayer, close_to
from .._torch import version_of
from .._warn import warn
from ..distributed.shards import first_row, is_sharded, local, processes_of
from ..distributed.shards import why_not as why_not_sharded
from ..distributed.sinks import SharedSinks, SinksJoinHook
from ..neurons.find import find_neurons, input_projections
from ..neurons.kinds import is_weighted
from ..neurons.layer import NO_BACKWARD_PASS, NeuronLayer
from ..neurons.protection import warn_if_little
from ..neurons.table import Neurons
from ..neurons.tap import ImportanceWarning
from ..skipping.bound import frozen_for
from ..skipping.certificate import Certificates
from ..skipping.install import install_skipping
from .base import Descent, uncompiled
from .moments import FirstMoments
from .nonfinite import SkippedSteps
from .options import LayerOptions, check_choice, check_plasticity_options
from .plan import PlasticPlan
from .plasticity import LayerPlasticity
from .succession import blocks_of, fitted

_LAYER_OPTIONS = (
    "alpha",
    "beta",
    "delta",
    "sigma",
    "normalize",
    "consolidate",
    "skip_frozen",
    "measure_at",
    "batch_dim",
)
_SKIPPING = (True, False, "layers")
_SUSPICIOUS = 10  # steps in a row without any gradient
_LEFT_OUT = (
    "; torch.distributed.checkpoint.state_dict leaves out parameters that require no gradient: build the optimizer "
    "with params=[those that do]"
)


class Plastic(Descent, Joinable):
    """An optimizer of a model, with a learning rate for every neuron.

    A subclass makes and launches plans; its groups have the options of eqs. 3, 4 and 7: alpha, beta, delta, sigma and
    normalize.
    """

    # What to do where little is protected.
    _ADVICE: ClassVar[str] = (
        "Parameters in no neuron can be kept as they are (others='freeze') or learn more slowly (groups of their own "
        "in params=[...]); only Linear, convolution, Conv1D and attention layers have neurons."
    )
    _KIND = "importance of neurons"

    neurons: Neurons
    _certificates: Certificates

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None,
        defaults: dict[str, Any],
        backend: str,
        *,
        layers: Mapping[str, Mapping[str, Any]] | None,
        others: str,
        skip_frozen: bool | str,
        process_group: Any,
    ) -> None:
        check_choice("others", others, ("train", "freeze"))
        self._layer_options = LayerOptions(layers, _LAYER_OPTIONS)
        self._others = others
        check_choice("skip_frozen", skip_frozen, _SKIPPING)
        self._skip_frozen = skip_frozen
        self._warned: set[tuple[str, str]] = set()
        self._empty_steps = 0
        self._ready = False
        self._just_found = False
        self._shared_sinks = SharedSinks(model, process_group)
        Joinable.__init__(self)
        super().__init__(model, params, defaults, backend)
        self._ready = True
        self._find_neurons()
        self._warn_if_little_is_protected()

    # -------------------------------------------------------------------------------------------- groups and layers

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters with options of their own, for example those of a head that the model has just been given.

        The model is searched again, so that neurons of new layers are measured; what is known of the others is kept.
        """
        super().add_param_group(param_group)
        try:
            self._check_rounding(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise
        if not self._ready:
            return
        try:
            self._find_neurons()
        except Exception:
            self.param_groups.pop()
            raise

    def _check_rounding(self, group: Mapping[str, Any]) -> None:
        dtypes = {parameter.dtype for parameter in group["params"]}
        check_choice("stochastic_rounding", group["stochastic_rounding"], (True, False))
        if group["stochastic_rounding"] and dtypes and torch.bfloat16 not in dtypes:
            raise ValueError(
                f"stochastic_rounding is on, but the parameters are {', '.join(sorted(map(str, dtypes)))}; it rounds "
                "torch.bfloat16 only: convert the model before (model.to(torch.bfloat16)), or leave it off (for one "
                "group: {'params': ..., 'stochastic_rounding': False})"
            )

    def _check_sharded(self, parameter: Any) -> None:
        name = self._name_of(parameter)
        if reason := why_not_sharded(parameter, self._model):
            raise ValueError(
                f"{name} is sharded in a way that {type(self).__name__} does not support: {reason}; use fully_shard "
                "alone"
            )
        self._shared_sinks.check_covers(processes_of(parameter), name)

    def _find_neurons(self) -> None:
        """Searches the model, moves the taps and gives every new layer its importance of zero."""
        trained = {id(parameter) for group in self.param_groups for parameter in group["params"]}
        found = find_neurons(self._model, **self._discovery_options())
        for own in (own for layer in found for own in layer.parameters):
            if own.groups > 1 and is_sharded(own.parameter):
                raise ValueError(
                    f"parameter {own.name!r} of a transposed convolution with {own.groups} groups is sharded, so that "
                    "processes hold parts of groups; expected groups=1, or leave it out: "
                    "fully_shard(..., ignored_params={...}), and average its gradients by hand"
                )
        old = {id(layer.parameters[0].parameter): layer for layer in self.neurons} if self._ready_neurons else {}
        present = set(map(id, self._model.parameters()))
        replaced = {layer.name: layer for own, layer in old.items() if own not in present}
        for layer in found:
            known = old.get(id(layer.parameters[0].parameter), replaced.get(layer.name))
            if known is not None and known.sink.shape == layer.sink.shape and known.sink.device == layer.sink.device:
                layer.sink = known.sink
        options = [self._layer_options.of(layer.name) for layer in found]
        self._layer_options.check((layer.name for layer in found), self._check_own_options)
        if self._ready_neurons:
            self.neurons.detach()
        self.neurons = found
        found.detach_with(self)
        self._consolidated = [
            layer
            for layer, own in zip(found, options, strict=True)
            if own.get("consolidate", True) and any(id(p.parameter) in trained for p in layer.parameters)
        ]
        self._left_alone = {
            layer.name: "consolidate=False, so it trains at plain learning rate"
            for layer, own in zip(found, options, strict=True)
            if not own.get("consolidate", True)
        }
        self._own_options = [self._layer_options.of(layer.name) for layer in self._consolidated]
        self._skipped = SkippedSteps(len(self._consolidated))
        self._index_parameters()
        for index, layer in enumerate(self._consolidated):
            if layer.trains():  # others have a state from the step on in which they do
                self._layer_state(index)
        if self._backend == "reference":
            measure, relu_backward = reference.importance, reference.relu_backward_importance
        else:
            measure, relu_backward = ops.importance_of_checked, ops.relu_backward_importance_of_checked
        self.neurons.attach(self._model, self._consolidated, measure, relu_backward)
        self._install_skipping(trained)

    def _install_skipping(self, trained: set[int]) -> None:
        before = self.__dict__.get("_certificates")
        layers = zip(self._consolidated, self._keys, self._own_options, strict=True)
        self._certificates = install_skipping(self._model, layers, self._skip_frozen, trained)
        self.neurons.hold(self._certificates)
        self._certificates.bind(self.state, self._group_of)
        if before is not None:
            self._certificates.take_over_from(before)

    def _warn_if_little_is_protected(self) -> None:
        known = {*self._place, *self._plain}
        unprotected = [parameter for parameter in self.neurons.trained() if id(parameter) not in known]
        warn_if_little(self.neurons.protection(), self._model, unprotected, "neurons", self._ADVICE)

    def _index_parameters(self) -> None:
        """Which group and which layer every parameter belongs to; rebuilt wherever parameters may be new objects."""
        self._forget_plans()
        plain = [own for layer in self.neurons if layer.name in self._left_alone for own in layer.parameters]
        self._plain = {id(own.parameter) for own in plain}
        self._group_of = {id(p): group for group in self.param_groups for p in group["params"]}
        self._place: dict[int, tuple[int, int, int]] = {}  # of a parameter: its layer, neuron dimension and groups
        self._first: dict[int, int] = {}  # of a parameter: the neuron of its first row, where that is not 0
        self._keys: list[Tensor] = []  # of a layer: the parameter under which its importance is saved
        for index, layer in enumerate(self._consolidated):
            own = [p for p in layer.parameters if id(p.parameter) in self._group_of]
            self._place.update((id(p.parameter), (index, p.dim, p.groups)) for p in own)
            self._first.update((id(p.parameter), p.first) for p in own if p.first)
            self._keys.append(own[0].parameter)
        moved = [p for group in self.param_groups for p in group["params"] if self._trains(p)]
        self.neurons.note_training(moved, self._left_alone)

    @property
    def _ready_neurons(self) -> bool:
        return "neurons" in self.__dict__

    def _discovery_options(self) -> dict[str, dict[str, Any]]:
        modules = self._model.named_modules()
        names = [name for name, module in modules if is_weighted(module) or self._layer_options.names(name)]
        names += input_projections(self._model)
        return {
            option: {
                name: own[option] for name in names if (own := self._layer_options.of(name)).get(option) is not None
            }
            for option in ("measure_at", "batch_dim")
        }

    def _check_own_options(self, own: Mapping[str, Any], where: str) -> None:
        check_choice(f"{where}skip_frozen", own.get("skip_frozen", True), _SKIPPING)
        self._check_options({**self.defaults, **own}, where)

    def _check_options(self, options: Mapping[str, Any], where: str = "") -> None:
        super()._check_options(options, where)
        check_plasticity_options(options, where)

    # ------------------------------------------------------------------------------------------------------ the step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step: moves every neuron's importance on, and every weight at its neuron's rate.

        Args:
            closure: evaluates the model again and returns the loss, as for any torch optimizer.

        Returns:
            What `closure` returned, or None.

        Raises:
            RuntimeError: gradients are there, but no importance was measured at all; or gradients were left out of
                neurons that, after a change of constants or state since the forward pass, may move in this step.
            ValueError: a gradient is sparse, or a gradient, state tensor or layer does not fit its parameter.

        Warns:
            ImportanceWarning: in the first step, that an earlier optimizer of the model held importance, and this one
                has none (`load_importance`).
            UserWarning: parameters were replaced in the model, so they are not trained.

        An exception leaves weights and importance as they were.
        """
        return super().step(closure)

    def _step(self) -> None:
        if self._shared_sinks.shared and self._groups_changed():
            self._compare_with_model()  # now, because processes that join in expect to meet once in a step
        unmeasured = set()
        for index, layer in enumerate(self._consolidated):
            if layer.sink.grad is None:
                unmeasured.add(index)
            elif layer.last_backward_pass == NO_BACKWARD_PASS:
                self._drop_compiled_leftovers(layer)
        shared = self._shared_sinks.shared
        if shared:
            self._shared_sinks.notify_join(self)
            self._shared_sinks.start(layer.sink for layer in self._consolidated)
        try:
            self._prepare()
            if unmeasured and not self._just_found:
                self._check_measured(unmeasured, shared)
            self._just_found = False
            self._count_empty_steps()
            self._certificates.before_step()
        finally:
            self._shared_sinks.finish()
        self._launch_all()
        self._certificates.after_step()
        self._drop_measured()
        if counts := self._skipped.news():
            self._report_skipped(counts)

    # For processes with different numbers of batches: `with torch.distributed.algorithms.Join([model, optimizer]):`.

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """What this process does within `torch.distributed.algorithms.Join` when it has no more batches."""
        return SinksJoinHook(self, self.join_process_group, self._add_nothing)

    @property
    def join_device(self) -> torch.device:
        """Where `torch.distributed.algorithms.Join` counts the processes that still train."""
        device: torch.device = self.param_groups[0]["params"][0].device
        return device

    @property
    def join_process_group(self) -> Any:
        """The processes that measure together."""
        return self._shared_sinks.group

    def _add_nothing(self) -> None:
        """Takes part in a step of other processes, without having measured anything."""
        self._drop_measured()
        if self._shared_sinks.shared:
            self._shared_sinks.start(layer.sink for layer in self._consolidated)
            self._shared_sinks.finish()
        self._drop_measured()

    def _forget_plans(self) -> None:
        super()._forget_plans()
        self._first_moments = FirstMoments()

    def _settle(self) -> None:
        for plan in self._plans:
            place = {id(owner): at for at, owner in enumerate(plan.owners)}
            for index in plan.layers:
                beta, importance = float(self._constants(index)["beta"]), self._layer_state(index)["importance"]
                for parameter in (own.parameter for own in self._consolidated[index].parameters):
                    at = place.get(id(parameter))
                    moment = None if at is None else self._first_moment(plan.states[at], plan.has_momentum[at])
                    frozen = partial(self._frozen_elements, parameter, importance, beta)
                    self._first_moments.settle(parameter, moment, importance, beta, frozen)

    def _first_moment(self, state: Mapping[str, Any], has_momentum: bool) -> Tensor | None:
        """The first moment that steps read and write in a parameter's state, as far as this process holds it."""
        return local(state["momentum_buffer"]) if has_momentum else None

    def _frozen_elements(self, parameter: Tensor, importance: Tensor, beta: float) -> Tensor:
        return self._spread(importance >= beta, parameter)

    def _spread(self, of_neurons: Tensor, parameter: Tensor) -> Tensor:
        """One value per neuron of a parameter's layer, so that it broadcasts against this process's part of it."""
        _, dim, groups = self._place[id(parameter)]
        part = local(parameter)
        rows = of_neurons.narrow(0, self._first_neuron(parameter), part.shape[dim] * groups)
        return reference.per_element(rows, part, dim, groups)

    def _count_empty_steps(self) -> None:
        """Warns where steps move nothing, because another model is trained than the optimizer's."""
        self._empty_steps = 0 if self._plans else self._empty_steps + 1
        if self._empty_steps == _SUSPICIOUS:
            warn(
                f"no parameter had a gradient in {_SUSPICIOUS} steps in a row, so nothing was learned: build the "
                "optimizer on the model that is trained (not on a copy), and call backward() between zero_grad() and "
                "step()",
                ImportanceWarning,
            )

    def _trains(self, parameter: Tensor) -> bool:
        return self._others == "train" or id(parameter) in self._place or id(parameter) in self._plain

    def _create_state(self, parameter: Any, group: dict[str, Any]) -> None:
        super()._create_state(parameter, group)
        state = self.state[parameter]  # an empty one counts for torch.distributed.checkpoint, where none is an error
        if self._counts_steps(parameter, group):
            state["step"] = torch.as_tensor(state.get("step", 0.0), dtype=torch.float32, device=parameter.device)

    def _read_by_steps(self, members: list[tuple[Any, dict[str, Any]]]) -> list[str]:
        counts = any(self._counts_steps(parameter, group) for parameter, group in members)
        return [*super()._read_by_steps(members), *(["step"] if counts else [])]

    def _check_fits(self, parameter: Any) -> None:
        super()._check_fits(parameter)
        if id(parameter) not in self._place:
            return
        index, dim, groups = self._place[id(parameter)]
        layer, average = self._consolidated[index], self._layer_state(index)["importance"]
        neurons = parameter.shape[dim] * groups if parameter.ndim > dim else 1
        ends = {layer.neurons, *(part.first for part in layer.parameters)}  # one parameter may hold a part of them
        if self._first.get(id(parameter), 0) + neurons not in ends:
            raise ValueError(
                f"layer {layer.name!r}: {self._name_of(parameter)} has {neurons} neurons now, but the layer had "
                f"{layer.neurons} when the optimizer was built; build a new one, {self._built_as()}"
                ".load_importance(optimizer), which keeps the importance of the first neurons"
            )
        if not isinstance(average, Tensor) or average.shape != (layer.neurons,):
            got = f"shape {tuple(average.shape)}" if isinstance(average, Tensor) else f"type {type(average).__name__}"
            raise ValueError(
                f"layer {layer.name!r} has {layer.neurons} neurons, but the importance in the optimizer's state has "
                f"{got}; expected shape ({layer.neurons},): put such a tensor there, or begin at zero: "
                f"del optimizer.state[parameter]['importance'], of {self._name_of(self._keys[index])}"
            )

    def _check_state_fits(self, parameter: Any) -> None:
        super()._check_state_fits(parameter)
        step = self.state.get(parameter, {}).get("step", 0.0)
        if isinstance(step, Tensor) and step.numel() != 1:
            raise ValueError(
                f"the 'step' of {self._name_of(parameter)} in the optimizer's state has shape {tuple(step.shape)}; "
                "expected one number"
            )

    def _lay_out_state(self, parameter: Any) -> None:
        super()._lay_out_state(parameter)
        if id(parameter) in self._place:
            index = self._place[id(parameter)][0]
            state, device = self._layer_state(index), self._keys[index].device
            state["importance"] = state["importance"].to(device, torch.float32).contiguous()

    def _neuron_options(self, parameters: Sequence[Tensor]) -> tuple[list[int], tuple[Any, ...], tuple[Any, ...]]:
        """What the operations must know of neurons: the layers that take part, and two parts of their options.

        The first part says of each parameter which of those layers it belongs to (-1: to none), which of its dimensions
        counts neurons, and in how many groups; the second one has the constants of eqs. 4, 7 and 3 of each layer.
        """
        places = [self._place.get(id(parameter), (-1, 0, 1)) for parameter in parameters]
        layers = sorted({layer for layer, _, _ in places if layer >= 0})
        position = {layer: at for at, layer in enumerate(layers)} | {-1: -1}
        constants = [self._constants(layer) for layer in layers]
        of_parameters = (
            [position[layer] for layer, _, _ in places],
            [dim for _, dim, _ in places],
            [count for _, _, count in places],
        )
        of_layers = (
            *([own[name] for own in constants] for name in ("alpha", "beta", "delta", "sigma")),
            [own["normalize"] == "active" for own in constants],
        )
        return layers, of_parameters, of_layers

    def _rounds_at_random(self, parameter: Tensor, group: Mapping[str, Any]) -> bool:
        return bool(group["stochastic_rounding"]) and parameter.dtype == torch.bfloat16

    def _counts_steps(self, parameter: Tensor, group: Mapping[str, Any]) -> bool:
        """Whether the kernels must know how many steps a parameter has taken."""
        return self._rounds_at_random(parameter, group)

    def _seeds(self, parameters: list[Tensor], groups: list[dict[str, Any]]) -> list[int]:
        """For each parameter -1, or what its random rounding begins from: its place in the optimizer and its shard."""
        at_random = list(map(self._rounds_at_random, parameters, groups))
        if not any(at_random):
            return []
        everything = [parameter for group in self.param_groups for parameter in group["params"]]
        place = {id(parameter): index for index, parameter in enumerate(everything)}
        firsts = (first_row(parameter) if is_sharded(parameter) else 0 for parameter in parameters)
        rows = zip(parameters, firsts, at_random, strict=True)
        return [place[id(one)] + len(everything) * first if own else -1 for one, first, own in rows]

    def _plastic_plan(
        self,
        common: dict[str, Any],
        layers: list[int],
        options: tuple[Any, ...],
        tables: Callable[..., Any],
    ) -> PlasticPlan:
        """A plan with its tables, which are made of parameters, numbers of neurons and options."""
        parameters = common["parameters"]
        partial = common["sharded"] or any(id(owner) in self._first for owner in common["owners"])
        first_neuron = list(map(self._first_neuron, common["owners"])) if partial else None
        layer_states = [self._layer_state(layer) for layer in layers]
        importances = [state["importance"] for state in layer_states]
        neurons = [average.numel() for average in importances]
        native = self._takes([*parameters, *importances])
        return PlasticPlan(
            **common,
            options=options,
            tables=tables(parameters, neurons, *options, first_neuron=first_neuron) if native else None,
            first_neuron=first_neuron,
            layers=layers,
            layer_states=layer_states,
            importances=importances,
            skipped=self._skipped.on(common["device"]),
            seeds=self._seeds(common["owners"], common["groups"]),
        )

    def _first_neuron(self, parameter: Tensor) -> int:
        """Which neuron of its layer the first row of a parameter belongs to, as far as this process holds it."""
        _, dim, _ = self._place.get(id(parameter), (-1, 0, 1))
        row = first_row(parameter) if dim == 0 and is_sharded(parameter) else 0
        return self._first.get(id(parameter), 0) + row

    def _layer_state(self, index: int) -> dict[str, Any]:
        """Where a layer's importance is kept; it is zero at first."""
        state, key = self.state[self._keys[index]], self._keys[index]
        if "importance" not in state:
            neurons = self._consolidated[index].neurons
            state["importance"] = torch.zeros(neurons, dtype=torch.float32, device=key.device)
        return state

    def _check_measured(self, unmeasured_layers: set[int], shared: bool) -> None:
        """Raises if no layer that received gradients was measured, and warns of each single one that was not."""
        planned = [index for plan in self._plans for index in plan.layers]
        unmeasured = [index for index in planned if index in unmeasured_layers]
        if not unmeasured:
            return
        if len(unmeasured) == len(planned):
            layer = self._consolidated[planned[0]]
            training = "" if self._model.training else " The model is in eval mode now: call model.train()."
            raise RuntimeError(
                f"no importance was measured since the last step, although gradients were (layer {layer.name!r} and "
                f"all others), so nothing would be protected.{training} Importance is measured in the backward pass of "
                "a forward pass in training mode, by hooks in the model that the optimizer was given: build it on the "
                "model that is trained (not on a copy), keep its hooks, and call backward(), not torch.autograd.grad, "
                "between zero_grad() and step(). A compiled model that was trained before the optimizer was built has "
                "to be compiled again: call torch.compiler.reset()."
            )
        for index in unmeasured:
            if shared and self._consolidated[index].checked:  # by other processes perhaps
                continue
            layer = self._consolidated[index]
            self._warn_once(
                layer.name,
                "unmeasured",
                "received gradients, but its importance was not measured, so it trains at the rates of its importance "
                f"so far. It is measured in training mode, at the {' and the '.join(map(str, layer.points))}. If the "
                "layer is in eval mode, call train(). If that place belongs to one of several heads, make the function "
                "before it a module, or, if no normalization follows the layer, write "
                f"layers={{{layer.name!r}: {{'measure_at': {layer.name!r}}}}}. If the model was compiled before the "
                "optimizer was built, call torch.compiler.reset()",
            )

    def _drop_compiled_leftovers(self, layer: NeuronLayer) -> None:
        """Drops importance that compiled code measured, if its gradients were cleared in between.

        Taps in compiled code notice nothing of that. Each backward pass but the first raises the version of the sink's
        gradient and of the weight's by one; a weight whose gradient has been cleared since begins at 0 again.
        """
        gradient, measured = layer.parameters[0].parameter.grad, layer.sink.grad
        if gradient is None or measured is None or version_of(gradient) >= version_of(measured) or layer.sharded:
            return
        layer.sink.grad = None
        self._warn_once(
            layer.name,
            "cleared",
            "is in code that torch.compile has compiled, and its gradients were cleared by other means than the "
            "optimizer's zero_grad(), so that importance of what was thrown away would have counted; its importance "
            "stays as it was in such steps: call optimizer.zero_grad() instead",
        )

    def _constants(self, index: int) -> Mapping[str, Any]:
        """alpha, beta, delta, sigma and normalize of a layer: its own, else those of its weight's group."""
        group, own = self._group_of[id(self._keys[index])], self._own_options[index]
        return {**group, **own} if own else group

    def _drop_measured(self) -> None:
        for layer in self.neurons:
            layer.sink.grad, layer.last_backward_pass = None, NO_BACKWARD_PASS

    def _report_skipped(self, counts: Sequence[int]) -> None:
        for layer, count in zip(self._consolidated, counts, strict=True):
            if count:
                self._warn_once(
                    layer.name,
                    "skipped",
                    "was measured with an importance that is not finite (inf or nan in activations or gradients); "
                    "such steps leave its importance as it was and are counted in plasticity()[...].skipped",
                )

    def _warn_once(self, layer: str, kind: str, text: str) -> None:
        if (layer, kind) not in self._warned:
            self._warned.add((layer, kind))
            warn(f"layer {layer!r} {text}", ImportanceWarning)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of all parameters, and the importance measured since the last step."""
        if torch.compiler.is_dynamo_compiling():
            uncompiled(Plastic.zero_grad, self, set_to_none)
            return
        super().zero_grad(set_to_none)
        if self._ready_neurons:
            self._drop_measured()
            self._certificates.gradients_dropped()

    # ------------------------------------------------------------------------------------------------------ looking in

    @torch.no_grad()
    def plasticity(self) -> dict[str, LayerPlasticity]:
        """Importance, learning rates and the share of frozen neurons of every consolidated layer, by its name."""
        result = ByLayer[LayerPlasticity]()
        counts = self._skipped.now()
        for index, layer in enumerate(self._consolidated):
            key, constants = self._keys[index], self._constants(index)
            known = self.state.get(key, {}).get("importance")
            average = (
                torch.zeros(layer.neurons, dtype=torch.float32, device=key.device) if known is None else known.clone()
            )
            lr = float(self._group_of[id(key)]["lr"])
            rate = reference.learning_rate(average, lr, constants["alpha"], constants["beta"], constants["sigma"])
            frozen = (average >= float(constants["beta"])).double().mean().item()
            certain = frozen_for(average, float(constants["beta"]), float(constants["delta"]))
            left_out = self._certificates.gradients_skipped(layer.name)
            result[layer.name] = LayerPlasticity(average, rate, frozen, counts[index], certain, left_out)
        return result

    # ------------------------------------------------------------------------------------- models that are changed

    def _inherit(self, old: Tensor, new: Tensor) -> None:
        importance = self.state[old].get("importance")
        super()._inherit(old, new)
        _, dim, _ = self._place.get(id(old), (0, 0, 1))
        if importance is not None and new.ndim == old.ndim and new.shape[dim] == old.shape[dim]:
            self.state[new]["importance"] = importance

    def _take_up_groups(self) -> None:
        self._shared_sinks.look_for_group(self._model)
        super()._take_up_groups()
        self._find_neurons()
        self._just_found = True

    def _held(self) -> dict[str, dict[str, Tensor]]:
        averages = ((key, self.state.get(key, {}).get("importance")) for key in self._keys)
        own = zip(self._consolidated, averages, strict=True)
        return {layer.name: {"importance": average} for layer, (_, average) in own if average is not None}

    def _held_in(self, states: Mapping[int, Mapping[str, Any]]) -> dict[str, dict[str, Tensor]]:
        own = ((layer.name, states[id(key)]) for layer, key in zip(self._consolidated, self._keys, strict=True))
        return {name: {"importance": state["importance"]} for name, state in own if "importance" in state}

    def _may_hold(self) -> list[str]:
        return [layer.name for layer in self._consolidated]

    def _take_importance(self, held: Mapping[str, Mapping[str, Tensor]]) -> None:
        averages = {}
        for layer, key in zip(self._consolidated, self._keys, strict=True):
            if layer.name in held:
                begin = torch.zeros(layer.neurons, dtype=torch.float32, device=key.device)
                blocks = blocks_of(self._model, layer.name)
                averages[key] = fitted(held[layer.name]["importance"], begin, f"layer {layer.name!r}", blocks)
        for key, average in averages.items():
            self.state[key]["importance"] = average

    def _leave_model(self) -> None:
        self.neurons.detach()
        self._drop_measured()

    def constants(self, layer: str) -> dict[str, Any]:
        """The constants in force for a layer: alpha, beta, delta, sigma and normalize."""
        names = [consolidated.name for consolidated in self._consolidated]
        if layer not in names:
            raise KeyError(f"no consolidated layer {layer!r}; {close_to(layer, names)}")
        constants = self._constants(names.index(layer))
        return {name: constants[name] for name in ("alpha", "beta", "delta", "sigma", "normalize")}

    # --------------------------------------------------------------------------------------------- saving and loading

    def state_dict(self) -> dict[str, Any]:
        """As that of any torch optimizer, with everything in it that steps keep, from the beginning on.

        So it can serve as what a checkpoint is loaded into (torch.distributed.checkpoint asks for what an optimizer has
        before its first step, and has none made where there is something, as importance is). Of sharded parameters it
        has this process's shards, as DTensors.
        """
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad and self._trains(parameter):
                    self._create_state(parameter, group)
        return super().state_dict()

    def _check_saved(self, saved: Mapping[int, dict[str, Any]]) -> None:
        if self._keys and not any("importance" in saved[id(key)] for key in self._keys):
            raise ValueError(
                f"the state dict has no importance; it was saved by another optimizer than {type(self).__name__}. To "
                "begin without importance, do not load it"
            )
        for layer, key in zip(self._consolidated, self._keys, strict=True):
            importance = saved[id(key)].get("importance")
            if importance is None and not layer.trains():
                continue
            got = "none" if importance is None else f"{tuple(importance.shape)}"
            if got != f"({layer.neurons},)":
                raise ValueError(
                    f"the state dict's importance for layer {layer.name!r} has shape {got}, expected "
                    f"({layer.neurons},); it was saved for another architecture or by another optimizer"
                    + ("" if key.requires_grad else _LEFT_OUT)
                )

    def _take_over(self, saved: Mapping[int, dict[str, Any]]) -> None:
        super()._take_over(saved)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for parameter in parameters:  # torch leaves their steps where they were saved
            if "step" in self.state.get(parameter, {}):
                step = self.state[parameter]["step"]
                count = torch.as_tensor(step, dtype=torch.float32, device=parameter.device)
                self.state[parameter]["step"] = count.clone()
        for key in self._keys:  # stays float32, and its own
            average = saved[id(key)].get("importance")
            if average is None:  # of a layer that is not trained
                continue
            self.state[key]["importance"] = average.detach().to(key.device, torch.float32, copy=True)
        self._drop_measured()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # of a copy, an unpickled optimizer, or from load_state_dict
        self.neurons.detach_with(self)
        self._index_parameters()
        self._certificates.bind(self.state, self._group_of)

    def _summary(self) -> str:
        neurons = sum(layer.neurons for layer in self._consolidated)
        return f"consolidated: {neurons} neurons in {len(self._consolidated)} layers\n{self.neurons.protection()}"

    def __repr__(self) -> str:
        rows = sum(self._certificates.gradients_skipped(layer.name) * layer.neurons for layer in self._consolidated)
        return (
            f"{super().__repr__()[:-2]}\n\n{self._summary()}\n"
            f"weight gradients skipped at the moment: those of {rows:.0f} neurons\n)"
        )
