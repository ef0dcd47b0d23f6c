"""The base class of optimizers that lower the learning rate of important neurons.

It finds the neurons of a model, places taps that measure them, keeps the moving average C of their importance (eq. 4),
and skips gradients that are certain not to be needed. Subclasses define the weight update.

A tap is an identity behind a layer that measures its neurons in the backward pass. The result is the gradient of the
layer's sink, a small leaf tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.distributed.algorithms.join import Joinable, JoinHook

from .. import reference
from .._names import ByLayer, listed
from .._warn import warn
from ..columns import NO_STEPS, Layers, Placement, Steps, delta_of
from ..distributed.shards import first_row, is_sharded, local, processes_of
from ..distributed.shards import why_not as why_not_sharded
from ..distributed.sinks import SharedSinks, SinksJoinHook
from ..neurons.find import find_neurons, input_projections
from ..neurons.kinds import is_weighted
from ..neurons.layer import NO_BACKWARD_PASS, NeuronLayer
from ..neurons.protection import Protection
from ..neurons.table import Neurons
from ..neurons.tap import ImportanceWarning
from ..skipping.bound import frozen_for
from ..skipping.certificate import Certificates
from ..skipping.install import install_skipping
from .base import uncompiled
from .control import PlasticityControl
from .measured import MeasurementChecks, Observed
from .nonfinite import NonfiniteSteps
from .options import CONSTANTS, check_choice, check_rounding, plasticity_columns
from .plan import PlasticPlan
from .plasticity import LayerPlasticity, PlasticityByLayer
from .succession import blocks_of, fitted

_SKIPPING = ("layers", "rows", "none")
_NOT_SAVED = (
    "; torch.distributed.checkpoint.state_dict does not save parameters that require no gradient: build the optimizer "
    "on the others, params=[...]"
)


class _Place(NamedTuple):
    """The neurons of a parameter.

    Attributes:
        layer: the index of their layer; -1: none.
        dim: the parameter's dimension that counts neurons.
        groups: more than 1 only for grouped transposed convolutions.
        first: the neuron of the layer to which the first row belongs.
    """

    layer: int = -1
    dim: int = 0
    groups: int = 1
    first: int = 0


_NO_LAYER = _Place()


class Plastic(PlasticityControl, Joinable):
    """An optimizer of a model with a learning rate for every neuron.

    Subclasses make and launch plans. Their groups have the options of eqs. 3, 4 and 7: alpha, beta, delta or half_life,
    sigma and normalize.
    """

    _LAYER_OPTIONS = (*PlasticityControl._LAYER_OPTIONS, "skip_gradients", "measure_at", "batch_dim")
    _UNITS = "neurons"
    _NONFINITE_IN = "activations or gradients"
    _ADVICE: ClassVar[str] = (
        "Parameters in no neuron can be kept as they are (other_parameters='freeze') or learn more slowly (in a "
        "separate group of params=[...]); only Linear, convolution, Conv1D and attention layers have neurons."
    )
    _KIND = "importance of neurons"

    neurons: Neurons
    """The model's neurons and the places where they are measured; print it to see a table."""
    _certificates: Certificates
    _is_superseded = False  # whether another optimizer of the model has taken the importance over

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        # Takes the arguments of the subclass's constructor by name, also skip_gradients and process_group.
        self._skip_gradients = arguments["skip_gradients"]
        check_choice("skip_gradients", self._skip_gradients, _SKIPPING)
        self._just_found = False
        self._of_smaller: dict[Tensor, Tensor] = {}  # the importance of layers that have grown, by their new parameter
        self._shared_sinks = SharedSinks(arguments["model"], arguments["process_group"])
        Joinable.__init__(self)
        super().__init__(arguments)
        self._checks = MeasurementChecks(self._layer_warnings)

    # -------------------------------------------------------------------------------------------- groups and layers

    def _check_group(self, group: Mapping[str, Any]) -> None:
        check_rounding(group)

    def _check_sharded(self, parameter: Any) -> None:
        name = self._name_of(parameter)
        if reason := why_not_sharded(parameter, self._model):
            raise ValueError(
                f"{name} is sharded in a way that {type(self).__name__} does not support: {reason}; use only "
                "fully_shard"
            )
        self._shared_sinks.check_covers(processes_of(parameter), name)

    def _find_layers(self) -> None:
        """Searches the model, moves the taps, and creates an importance of zero for new layers."""
        trained = set(map(id, self._all_parameters()))
        found = find_neurons(self._model, **self._discovery_options())
        _check_shards_are_whole_groups(found)
        self._layer_options.check((layer.name for layer in found), self._check_layer_options)
        if self._has_layers:
            self._warn_of_unfound(found)
            self._keep_sinks(found)
            self.neurons.detach()
        self.neurons = found
        found.detach_with(self)
        self._left_alone = {
            layer.name: "protect=False, so it trains at the plain learning rate"
            for layer in found
            if not self._layer_options.of(layer.name).get("protect", True)
        }
        self._protected = [
            layer
            for layer in found
            if layer.name not in self._left_alone and any(id(p.parameter) in trained for p in layer.parameters)
        ]
        self._options_of_layers = [self._layer_options.of(layer.name) for layer in self._protected]
        self._nonfinite_steps = NonfiniteSteps(len(self._protected))
        held_by = set(map(id, self._keys)) if self._has_layers else set()
        self._index_parameters()
        held_by.difference_update(map(id, self._keys))
        for index, layer in enumerate(self._protected):
            if (smaller := self._of_smaller.pop(self._keys[index], None)) is not None:
                self.state[self._keys[index]]["importance"] = self._grown(index, smaller)
            self._move_importance(layer, self._keys[index], held_by)
            if layer.trains():  # other layers get a state once they train
                self._layer_state(index)
            if self._backend == "reference":
                layer.measure, layer.relu_backward = reference.importance, reference.relu_backward_importance
        self.neurons.attach(self._model, self._protected)
        self._install_skipping(trained)

    def _move_importance(self, layer: NeuronLayer, key: Tensor, held_by: set[int]) -> None:
        """Moves importance to the key of a layer if another of its parameters was that before (`held_by`: ids)."""
        for parameter in (p.parameter for p in layer.parameters if id(p.parameter) in held_by):
            state = self.state.get(parameter, {})
            if "importance" in state and state["importance"].shape == (layer.neurons,):
                self.state[key].setdefault("importance", state.pop("importance"))

    def _warn_of_unfound(self, found: Neurons) -> None:
        """Warns of layers with importance that are still in the model, but cannot be measured any more."""
        names = {layer.name for layer in found} | {layer.module for layer in found}
        modules = dict(self._model.named_modules())
        unfound = [
            layer.name
            for layer, key in zip(self._protected, self._keys, strict=True)
            if layer.name not in names and layer.module in modules and "importance" in self.state.get(key, {})
        ]
        if unfound:
            warn(
                f"layers that had importance can no longer be measured, and are not protected: {listed(unfound)}; "
                "print(optimizer.neurons) says why, for each of their parameters",
                ImportanceWarning,
            )

    def _install_skipping(self, trained: set[int]) -> None:
        before = getattr(self, "_certificates", None)
        layers = zip(self._protected, self._keys, self._options_of_layers, strict=True)
        self._certificates = install_skipping(self._model, layers, self._skip_gradients, trained)
        self.neurons.hold(self._certificates)
        self._certificates.bind(self, self._group_of)
        if before is not None:
            self._certificates.take_over_from(before)

    def _keep_sinks(self, found: Neurons) -> None:
        """Gives layers that were known before their sink, with what was measured since the last step."""
        known = {id(layer.parameters[0].parameter): layer for layer in self.neurons}
        present = set(map(id, self._model.parameters()))
        replaced = {layer.name: layer for parameter, layer in known.items() if parameter not in present}
        for layer in found:
            old = known.get(id(layer.parameters[0].parameter), replaced.get(layer.name))
            if old is not None and old.sink.shape == layer.sink.shape and old.sink.device == layer.sink.device:
                layer.sink = old.sink

    def _look_up_groups(self) -> None:
        before = self._group_of
        super()._look_up_groups()
        if self._group_of is not before:
            self._certificates.bind(self, self._group_of)

    def _protection(self) -> Protection:
        return self.neurons.protection()

    def _index_parameters(self) -> None:
        """Records the group and the layer of each parameter. Call this wherever parameters may be new objects."""
        self._forget_plans()
        self._plain = {
            id(p.parameter) for layer in self.neurons if layer.name in self._left_alone for p in layer.parameters
        }
        self._group_of = {id(p): group for group in self.param_groups for p in group["params"]}
        self._place: dict[int, _Place] = {}  # of the parameters in layers, by id
        self._keys: list[Tensor] = []  # for each layer, the parameter whose state holds the importance
        for index, layer in enumerate(self._protected):
            trained = [p for p in layer.parameters if id(p.parameter) in self._group_of]
            self._place.update((id(p.parameter), _Place(index, p.dim, p.groups, p.first)) for p in trained)
            self._keys.append(trained[0].parameter)
        self.neurons.note_training(filter(self._trains, self._all_parameters()), self._left_alone)

    def _place_of(self, parameter: Tensor) -> _Place:
        return self._place.get(id(parameter), _NO_LAYER)

    def _discovery_options(self) -> dict[str, dict[str, Any]]:
        modules = self._model.named_modules()
        names = [name for name, module in modules if is_weighted(module) or self._layer_options.names(name)]
        names += input_projections(self._model)
        options = {name: self._layer_options.of(name) for name in names}
        return {
            option: {name: values[option] for name, values in options.items() if values.get(option) is not None}
            for option in ("measure_at", "batch_dim")
        }

    def _check_layer_options(self, options: Mapping[str, Any], where: str) -> None:
        check_choice(f"{where}skip_gradients", options.get("skip_gradients", "layers"), _SKIPPING)
        super()._check_layer_options(options, where)

    # ------------------------------------------------------------------------------------------------------ the step

    def _step(self) -> None:
        shared = self._shared_sinks.shared
        if shared and not self._knows(self._all_parameters()):
            self._compare_with_model()  # now: processes without batches (Join) expect one all-reduce in a step
        unmeasured: set[NeuronLayer] = set()
        compiled: list[NeuronLayer] = []
        last = NO_BACKWARD_PASS
        for layer in self._protected:
            if layer.sink.grad is None:
                unmeasured.add(layer)
            elif (last := layer.last_backward_pass) == NO_BACKWARD_PASS:
                compiled.append(layer)
        if compiled:
            self._checks.drop_compiled_leftovers(compiled)
        if shared:
            self._shared_sinks.notify_join(self)
            self._shared_sinks.start(layer.sink for layer in self._protected)
        try:
            self._prepare()
            if unmeasured and not self._just_found:
                trained = [self._protected[index] for plan in self._plans for index in plan.layers]
                self._checks.check(trained, unmeasured, self._observed)
            self._just_found = False
            self._checks.count_empty_steps(not self._plans)
            self._certificates.before_step()
        finally:
            self._shared_sinks.finish()
        self._launch_all()
        self._certificates.after_step()
        self._checks.note_step(last)
        self._drop_measured()
        self._report_nonfinite_steps()

    def _observed(self) -> Observed:
        return Observed(
            self._model,
            self.neurons,
            self._is_superseded,
            self._has_begun,
            self._shared_sinks.shared,
            f"{self._built_as()}.load_importance(earlier)",
        )

    # For processes with different numbers of batches: `with torch.distributed.algorithms.Join([model, optimizer]):`.

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """The hook that `torch.distributed.algorithms.Join` calls in a process that has no more batches."""
        return SinksJoinHook(self, self.join_process_group, self._add_nothing)

    @property
    def join_device(self) -> torch.device:
        """The device on which `torch.distributed.algorithms.Join` counts the processes that still train."""
        device: torch.device = self.param_groups[0]["params"][0].device
        return device

    @property
    def join_process_group(self) -> Any:
        """The processes that measure together."""
        return self._shared_sinks.group

    def _add_nothing(self) -> None:
        """Takes part in a step of other processes with an importance of zero."""
        self._drop_measured()
        if self._shared_sinks.shared:
            self._shared_sinks.start(layer.sink for layer in self._protected)
            self._shared_sinks.finish()
        self._drop_measured()

    def _settle(self) -> None:
        for plan in self._plans:
            place = {id(owner): at for at, owner in enumerate(plan.owners)}
            for index in plan.layers:
                beta, importance = float(self._constants(index)["beta"]), self._layer_state(index)["importance"]
                for parameter in (p.parameter for p in self._protected[index].parameters):
                    at = place.get(id(parameter))
                    moment = None if at is None else self._first_moment(plan.states[at], plan.has_momentum[at])
                    frozen = partial(self._frozen_elements, parameter, importance, beta)
                    self._first_moments.settle(parameter, moment, importance, beta, frozen)

    def _first_moment(self, state: Mapping[str, Any], has_momentum: bool) -> Tensor | None:
        """The first moment in a parameter's state, or this process's shard of it; None if steps do not use it."""
        return local(state["momentum_buffer"]) if has_momentum else None

    def _frozen_elements(self, parameter: Tensor, importance: Tensor, beta: float) -> Tensor:
        return self._spread(importance >= beta, parameter)

    def _spread(self, of_neurons: Tensor, parameter: Tensor) -> Tensor:
        """Reshapes one value per neuron of a layer to broadcast against a parameter, or this process's shard of it."""
        place, part = self._place_of(parameter), local(parameter)
        rows = of_neurons.narrow(0, self._first_neuron(parameter), part.shape[place.dim] * place.groups)
        return reference.per_element(rows, part, place.dim, place.groups)

    def _in_layers(self, parameter: Tensor) -> bool:
        return id(parameter) in self._place or id(parameter) in self._plain

    def _create_state(self, parameter: Any, group: dict[str, Any]) -> None:
        super()._create_state(parameter, group)
        state = self.state[parameter]  # creates it: torch.distributed.checkpoint expects one, even if it is empty
        if self._counts_steps(parameter, group):
            state["step"] = torch.as_tensor(state.get("step", 0.0), dtype=torch.float32, device=parameter.device)

    def _read_by_steps(self, members: list[tuple[Any, dict[str, Any]]]) -> list[str]:
        counts = any(self._counts_steps(parameter, group) for parameter, group in members)
        return [*super()._read_by_steps(members), *(["step"] if counts else [])]

    def _check_fits(self, parameter: Any) -> None:
        super()._check_fits(parameter)
        index, dim, groups, first = self._place_of(parameter)
        if index < 0:
            return
        layer, average = self._protected[index], self._layer_state(index)["importance"]
        neurons = parameter.shape[dim] * groups if parameter.ndim > dim else 1
        ends = {layer.neurons, *(part.first for part in layer.parameters)}  # a parameter may hold a part of the neurons
        if first + neurons not in ends:
            raise ValueError(
                f"layer {layer.name!r}: {self._name_of(parameter)} has {neurons} neurons now, but the layer had "
                f"{layer.neurons} when the optimizer was built; build a new optimizer, which keeps the "
                f"importance of the first neurons of this one (earlier): {self._built_as()}.load_importance(earlier)"
            )
        if not isinstance(average, Tensor) or average.shape != (layer.neurons,):
            got = f"shape {tuple(average.shape)}" if isinstance(average, Tensor) else f"type {type(average).__name__}"
            raise ValueError(
                f"layer {layer.name!r} has {layer.neurons} neurons, but the importance in the optimizer's state has "
                f"{got}; expected shape ({layer.neurons},): assign such a tensor, or start at zero: "
                f"del optimizer.state[parameter]['importance'] of the parameter {self._name_of(self._keys[index])}"
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
        if (index := self._place_of(parameter).layer) >= 0:
            state, device = self._layer_state(index), self._keys[index].device
            state["importance"] = state["importance"].to(device, torch.float32).contiguous()

    def _rounds_stochastically(self, parameter: Tensor, group: Mapping[str, Any]) -> bool:
        return bool(group["stochastic_rounding"]) and parameter.dtype == torch.bfloat16

    def _counts_steps(self, parameter: Tensor, group: Mapping[str, Any]) -> bool:
        """Whether the kernels need the number of steps that a parameter has taken."""
        return self._rounds_stochastically(parameter, group)

    def _seeds(self, parameters: list[Tensor], groups: list[dict[str, Any]]) -> list[int]:
        """The seed of each parameter's stochastic rounding, from its place in the groups and its shard, or -1."""
        rounds = list(map(self._rounds_stochastically, parameters, groups))
        if not any(rounds):
            return []
        place = {id(parameter): index for index, parameter in enumerate(self._all_parameters())}
        first_rows = (first_row(parameter) if is_sharded(parameter) else 0 for parameter in parameters)
        return [
            place[id(parameter)] + len(place) * first if needs_seed else -1
            for parameter, first, needs_seed in zip(parameters, first_rows, rounds, strict=True)
        ]

    def _make_plan(self, common: dict[str, Any], parameters: Sequence[Tensor] | None = None) -> PlasticPlan:
        """A plan of a step.

        Args:
            common: the fields that do not depend on the method.
            parameters: those whose layers take part; by default those that the step moves.
        """
        moved = common["owners"]
        layers = sorted({self._place_of(parameter).layer for parameter in parameters or moved} - {_NO_LAYER.layer})
        layer_states = [self._layer_state(layer) for layer in layers]
        importances = [state["importance"] for state in layer_states]
        counts = common["checked"].get("step")
        counters = self._nonfinite_steps.on(common["device"])
        placement = self._placement(moved, layers, common["sharded"])
        columns = (placement, common["options"], plasticity_columns([self._constants(layer) for layer in layers]))
        return PlasticPlan(
            **common,
            columns=columns,
            prepared=self._prepared(common["device"], common["parameters"], columns, importances, layers),
            layers=layers,
            layer_states=layer_states,
            kept=Layers(importances, counters),
            nonfinite_steps=counters,
            steps=NO_STEPS if counts is None else Steps(counts, self._seeds(moved, common["groups"])),
        )

    def _placement(self, parameters: Sequence[Tensor], layers: Sequence[int], sharded: bool) -> Placement:
        """Which of these layers parameters belong to, and which of their neurons."""
        places = list(map(self._place_of, parameters))
        position = {layer: at for at, layer in enumerate(layers)} | {-1: -1}
        in_parts = sharded or any(place.first for place in places)
        return Placement(
            layer=[position[place.layer] for place in places],
            neuron_dim=[place.dim for place in places],
            groups=[place.groups for place in places],
            first_neuron=list(map(self._first_neuron, parameters)) if in_parts else None,
        )

    def _measured(self, plan: PlasticPlan) -> list[Tensor | None]:
        return [self._protected[index].sink.grad for index in plan.layers]

    def _first_neuron(self, parameter: Tensor) -> int:
        """The neuron that the first row of a parameter, or of this process's shard, belongs to."""
        place = self._place_of(parameter)
        return place.first + (first_row(parameter) if place.dim == 0 and is_sharded(parameter) else 0)

    def _layer_state(self, index: int) -> dict[str, Any]:
        """The state that holds a layer's importance, which is zero at first."""
        state = self.state[self._keys[index]]
        if "importance" not in state:
            state["importance"] = self._no_importance(index)
        return state

    def _no_importance(self, index: int) -> Tensor:
        """The importance of a layer's neurons before the first step."""
        return torch.zeros(self._protected[index].neurons, dtype=torch.float32, device=self._keys[index].device)

    def _constants(self, index: int) -> Mapping[str, Any]:
        """The constants of a layer: the group's options, overridden by the layer's."""
        group, options = self._group_of[id(self._keys[index])], self._options_of_layers[index]
        return {**group, **options} if options else group

    def _drop_measured(self) -> None:
        for layer in self.neurons:
            layer.sink.grad, layer.last_backward_pass = None, NO_BACKWARD_PASS

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of all parameters, and the importance measured since the last step.

        Args:
            set_to_none: whether gradients become None, or else zero, as in `torch.optim.Optimizer`.
        """
        if torch.compiler.is_dynamo_compiling():
            uncompiled(Plastic.zero_grad, self, set_to_none)
            return
        super().zero_grad(set_to_none)
        if self._has_layers:
            self._drop_measured()
            self._certificates.gradients_dropped()

    # ------------------------------------------------------------------------------------------------------ plasticity

    @torch.no_grad()
    def plasticity(self) -> dict[str, LayerPlasticity]:
        """Importance, learning rates and the share of frozen neurons of every protected layer, at this moment.

        Waits for GPUs, so do not call it in every step.

        Returns:
            Layer name -> `npc_ext.LayerPlasticity`, in the order of the model. It prints as a table.

        Example:
            >>> optimizer.plasticity()["4"].frozen  # the share of its neurons, from 0 to 1
        """
        result = PlasticityByLayer[LayerPlasticity]()
        counts = self._nonfinite_steps.now()
        for index, layer in enumerate(self._protected):
            key, constants = self._keys[index], self._constants(index)
            known = self.state.get(key, {}).get("importance")
            average = self._no_importance(index) if known is None else known.clone()
            lr = float(self._group_of[id(key)]["lr"])
            rate = reference.learning_rate(average, lr, constants["alpha"], constants["beta"], constants["sigma"])
            frozen = (average >= float(constants["beta"])).double().mean().item()
            certain = frozen_for(average, float(constants["beta"]), delta_of(constants))
            skipped = self._certificates.gradients_skipped(layer.name)
            result[layer.name] = LayerPlasticity(average, rate, frozen, counts[index], certain, skipped)
        return result

    # ------------------------------------------------------------------------------- model changes, earlier importance

    def _inherit(self, name: str, old: Tensor, new: Tensor, state: dict[str, Any]) -> None:
        if old.shape != new.shape and "importance" in state:
            self._of_smaller[new] = state.pop("importance")  # until the layer is found
        super()._inherit(name, old, new, state)

    def _take_up_groups(self) -> None:
        self._shared_sinks.look_for_group(self._model)
        super()._take_up_groups()
        self._just_found = True

    def _held_in(self, states: Mapping[int, Mapping[str, Any]]) -> dict[str, dict[str, Tensor]]:
        layers = zip(self._layer_names(), self._keys, strict=True)
        averages = {name: states.get(id(key), {}).get("importance") for name, key in layers}
        return {name: {"importance": average} for name, average in averages.items() if average is not None}

    def _layer_names(self) -> list[str]:
        return [layer.name for layer in self._protected]

    def _holders(self) -> dict[str, Tensor]:
        # The same parameter of a layer in each optimizer, whichever of the layer's parameters it trains.
        return {layer.name: layer.parameters[0].parameter for layer in self._protected}

    def _may_hold(self) -> dict[str, NeuronLayer]:
        return {layer.name: layer for layer in self._protected}

    def _take_importance(self, held: Mapping[str, Mapping[str, Tensor]]) -> None:
        averages = {}
        for index, name in enumerate(self._layer_names()):
            if name in held:
                averages[self._keys[index]] = self._grown(index, held[name]["importance"])
        for key, average in averages.items():
            self.state[key]["importance"] = average

    def _grown(self, index: int, average: Tensor) -> Tensor:
        """The importance of a layer that had the importance `average` when it was smaller."""
        layer = self._protected[index]
        blocks = max(part.groups for part in layer.parameters)
        if blocks == 1:
            blocks = blocks_of(self._model, layer.name)
        return fitted(average, self._no_importance(index), f"layer {layer.name!r}", blocks)

    def _leave_model(self) -> None:
        self._is_superseded = True
        self.neurons.detach()
        self._drop_measured()

    def constants(self, layer: str) -> dict[str, Any]:
        """The constants of a layer's neurons: those in `layers`, or else those of the group of its weight.

        Args:
            layer: the layer's name, as in `plasticity()`.

        Returns:
            The values of alpha, beta, delta, half_life, sigma and normalize, by name. delta or half_life is None.

        Raises:
            KeyError: no protected layer has this name.
        """
        indices = ByLayer({name: index for index, name in enumerate(self._layer_names())})
        constants = self._constants(indices[layer])
        return {name: constants[name] for name in CONSTANTS}

    # --------------------------------------------------------------------------------------------- saving and loading

    def state_dict(self) -> dict[str, Any]:
        """Like the state dict of any torch optimizer, but complete before the first step.

        torch.distributed.checkpoint loads into the state dict of a new optimizer. It creates the missing state only for
        optimizers without any state, and importance is there from the beginning. Sharded parameters have this process's
        shards, as DTensors.
        """
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad and self._trains(parameter):
                    self._create_state(parameter, group)
        return super().state_dict()

    def _check_saved(self, saved: Mapping[int, dict[str, Any]]) -> None:
        if self._keys and not any("importance" in saved[id(key)] for key in self._keys):
            raise ValueError(
                f"the state dict has no importance; another optimizer than {type(self).__name__} saved it. Do not load "
                "it: a new optimizer starts with an importance of zero"
            )
        for layer, key in zip(self._protected, self._keys, strict=True):
            importance = saved[id(key)].get("importance")
            if importance is None and not layer.trains():
                continue
            got = "none" if importance is None else f"{tuple(importance.shape)}"
            if got != f"({layer.neurons},)":
                raise ValueError(
                    f"the state dict's importance for layer {layer.name!r} has shape {got}, expected "
                    f"({layer.neurons},); it was saved for another architecture. If the layer has grown since, take "
                    "over the importance of its first neurons: load_importance(state_dict)"
                    + ("" if key.requires_grad else _NOT_SAVED)
                )

    def _take_over(self, saved: Mapping[int, dict[str, Any]]) -> None:
        super()._take_over(saved)
        for parameter in self._all_parameters():  # torch leaves their steps on the device they were saved on
            state = self.state.get(parameter, {})
            if "step" in state:
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=parameter.device).clone()
        for key in self._keys:  # torch would cast importance to the parameter's dtype, and not copy it
            average = saved[id(key)].get("importance")
            if average is not None:  # layers that are not trained have none
                self.state[key]["importance"] = average.detach().to(key.device, torch.float32, copy=True)
        self._drop_measured()
        self._of_smaller.clear()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # called by copy, pickle and load_state_dict
        self.neurons.detach_with(self)
        self._index_parameters()
        self._certificates.bind(self, self._group_of)

    def _summary(self) -> str:
        trained = set(map(id, self.neurons.trained()))
        layers = [layer for layer in self._protected if any(id(p.parameter) in trained for p in layer.parameters)]
        neurons = f"{sum(layer.neurons for layer in layers):,} neurons"
        return f"{self.neurons.protection()}, in {neurons} of {len(layers)} layer{'s' if len(layers) != 1 else ''}"

    def __repr__(self) -> str:
        rows = sum(self._certificates.gradients_skipped(layer.name) * layer.neurons for layer in self._protected)
        return (
            f"{super().__repr__()[:-2]}\n\n"
            f"other_parameters: {self._other_parameters}, skip_gradients: {self._skip_gradients}, "
            f"layers: {self._layer_options}\n{self._summary()}\n"
            f"gradients skipped in the last step: those of {rows:.0f} neurons\n)"
        )


def _check_shards_are_whole_groups(neurons: Neurons) -> None:
    """Raises ValueError if a grouped transposed convolution, of which a shard holds parts of groups, is sharded."""
    for p in (p for layer in neurons for p in layer.parameters):
        if p.groups > 1 and is_sharded(p.parameter):
            raise ValueError(
                f"parameter {p.name!r} of a transposed convolution with {p.groups} groups is sharded, so processes "
                "hold parts of groups; expected groups=1, or leave it out: "
                "fully_shard(..., ignored_params={...}), and average its gradients yourself"
            )
