"""CPC, connection-level plasticity control, as a `torch.optim.Optimizer`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import reference
from ..columns import Connections, Placement
from ..kernels import launch
from ..neurons.find import connections
from ..neurons.protection import Protection
from ..optim.control import PlasticityControl
from ..optim.nonfinite import NonfiniteSteps
from ..optim.options import CONSTANTS, SGD_OPTIONS, plasticity_columns
from ..optim.plan import LayersPlan
from ..optim.plasticity import PlasticityByLayer, Printed
from ..optim.unknown_options import explains_options


@dataclass(frozen=True, repr=False)
class ConnectionPlasticity(Printed):
    """The plasticity of a layer's connections at this moment.

    Attributes:
        importance: parameter name -> float32 tensor of its shape, the moving average C of eq. 4. Its mean over the
            layer tends to 1.
        learning_rate: parameter name -> float32 tensor of its shape, eta of eq. 7.
        frozen: the share of the layer's connections, from 0 to 1, for which eq. 7 is 0, regardless of the group's
            learning rate.
        nonfinite_steps: in how many steps the measured importance was not finite and was left out.
    """

    UNITS = "connections"

    importance: dict[str, Tensor]
    learning_rate: dict[str, Tensor]
    frozen: float
    nonfinite_steps: int

    def _importance_and_rates(self) -> tuple[Tensor, Tensor]:
        return _joined(self.importance), _joined(self.learning_rate)


def _joined(by_name: Mapping[str, Tensor]) -> Tensor:
    """The values of all parameters of a layer. A layer may have none that are trained."""
    none = torch.empty(0, dtype=torch.float32, device="cpu")
    return torch.cat([values.flatten() for values in by_name.values()] or [none])


class CPC(PlasticityControl):
    """SGD with a learning rate for each connection, which falls with the connection's importance to what was learned.

    CPC is `NPC` for single connections. Importance is `|w * dL/dw|`, divided by its mean over all connections of the
    layer (weights and biases). Its moving average is C (eq. 4), and connection ij learns at the rate

        eta_ij = lr * min(1, alpha * sqrt(max(beta / C_ij - 1, 0)))    (eq. 7)

    It is the control experiment of the NPC paper. It keeps one float for each connection instead of one for each
    neuron. Source: Paik, Oh, Kwak, Kim, "Overcoming Catastrophic Forgetting by Neuron-Level Plasticity Control",
    AAAI 2020, arXiv 1907.13322.

    Use it as `torch.optim.SGD`; nothing else in the training loop changes. Layers are the model's Linear, Conv and
    ConvTranspose modules, and the input projections of attention; other parameters train at plain `lr`.

    Args:
        model: the network.
        lr: the largest learning rate, as in `NPC`.
        alpha, beta, delta, half_life, sigma: the constants of eqs. 4 and 7, as in `NPC`.
        momentum, nesterov, weight_decay, maximize: as in `torch.optim.SGD`, except that a frozen connection stays
            bit-identical under all of them, and that its momentum is cleared when it freezes.
        params: what to train, as for any torch optimizer. Default: all of the model's parameters.
        normalize: the mean of eq. 3 is over "all" connections of the layer, or over the "active" ones, with a gradient
            other than 0. The others then take no part in the step: their importance, weights and momentum do not
            change.
        layers: options of single layers, by name or pattern: alpha, beta, delta or half_life, sigma, normalize;
            protect=False (train at plain lr).
        other_parameters: "train" parameters outside layers at plain lr, or "freeze" them.
        backend: "native" (compiled kernels, or an error), "reference" (plain PyTorch) or "auto".

    Raises:
        ValueError: an argument is out of range or does not fit the model; the message says what to change.
        TypeError: an argument has the wrong type, or there is no such option.

    Warns:
        ImportanceWarning: more than half of the elements that are trained are not protected.

    Example:
        >>> optimizer = CPC(model, lr=0.1, half_life=steps_per_task)
    """

    _OPTIONS = (*CONSTANTS, *SGD_OPTIONS)
    _STATE_TENSORS = ("importance",)
    _KIND = "importance of connections"
    _UNITS = "connections"
    _NONFINITE_IN = "weights or gradients"
    _ADVICE = (
        "Other parameters can be kept as they are (other_parameters='freeze') or learn more slowly (in a separate "
        "group of params=[...]); only Linear, convolution, Conv1D and attention layers are protected."
    )

    @explains_options
    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 0.1,
        *,
        alpha: float = 0.5,
        beta: float = 0.5,
        delta: float | None = None,
        half_life: float | None = None,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        sigma: Literal["sigmoid", "tanh", "erf"] = "sigmoid",
        params: Iterable[Any] | None = None,
        maximize: bool = False,
        normalize: Literal["all", "active"] = "all",
        layers: Mapping[str, Mapping[str, Any]] | None = None,
        other_parameters: Literal["train", "freeze"] = "train",
        backend: Literal["auto", "native", "reference"] = "auto",
    ) -> None:
        super().__init__(locals())

    def _find_layers(self) -> None:
        layers = connections(self._model)
        self._layer_options.check(layers, self._check_layer_options)
        self._names = [name for name in layers if self._layer_options.of(name).get("protect", True)]
        self._nonfinite_steps = NonfiniteSteps(len(self._names))
        self._index_parameters()

    def _index_parameters(self) -> None:
        """Maps every parameter to its group and its layer. Call this when parameters may be new objects."""
        self._group_of = {id(p): group for group in self.param_groups for p in group["params"]}
        layers = connections(self._model)
        self._layer_of: dict[int, int] = {}
        self._parameters_of: list[list[nn.Parameter]] = []  # those that are trained
        for index, name in enumerate(self._names):
            parameters = [p for p in layers[name] if id(p) in self._group_of and id(p) not in self._layer_of]
            self._layer_of.update((id(parameter), index) for parameter in parameters)
            self._parameters_of.append(parameters)
        plain = layers.keys() - set(self._names)
        self._plain = {id(parameter) for name in plain for parameter in layers[name]} - self._layer_of.keys()

    def _layer_names(self) -> list[str]:
        return self._names

    def _in_layers(self, parameter: Tensor) -> bool:
        return id(parameter) in self._layer_of or id(parameter) in self._plain

    def _protection(self) -> Protection:
        return Protection.of(self._trained(), self._layer_of, self._plain)

    def _constants(self, layer: int) -> dict[str, Any]:
        """The constants of a layer: those set for the layer, else those of its first parameter's group."""
        group = next((self._group_of[id(p)] for p in self._parameters_of[layer]), self.defaults)
        return {**{name: group[name] for name in CONSTANTS}, **self._layer_options.of(self._names[layer])}

    def _step(self) -> None:
        super()._step()
        self._report_nonfinite_steps()

    def _create_state(self, parameter: Any, group: dict[str, Any]) -> None:
        super()._create_state(parameter, group)
        if id(parameter) in self._layer_of and self.state[parameter].get("importance") is None:
            self.state[parameter]["importance"] = self._new_state_tensor(parameter, "importance")

    def _state_tensor_dtype(self, parameter: Tensor) -> torch.dtype:
        return torch.float32

    def _may_hold(self) -> dict[str, Tensor]:
        trained = self._trained_by_name()
        return {name: parameter for name, parameter in trained.items() if id(parameter) in self._layer_of}

    def _settle(self) -> None:
        for plan in self._plans:
            for parameter, state, has_momentum in zip(plan.owners, plan.states, plan.has_momentum, strict=True):
                if (layer := self._layer_of.get(id(parameter))) is None:
                    continue
                beta, importance = float(self._constants(layer)["beta"]), state["importance"]
                moment = state["momentum_buffer"] if has_momentum else None
                self._first_moments.settle(parameter, moment, importance, beta, partial(torch.ge, importance, beta))

    def _make_plan(self, common: dict[str, Any]) -> _Plan:
        layer_of = [self._layer_of.get(id(parameter), -1) for parameter in common["owners"]]
        layers = sorted(set(layer_of) - {-1})
        position = {layer: at for at, layer in enumerate(layers)} | {-1: -1}
        layer = [position[index] for index in layer_of]
        columns = (common["options"], plasticity_columns([self._constants(index) for index in layers]))
        return _Plan(
            **common,
            columns=columns,
            prepared=self._prepared(
                common["device"], common["parameters"], (Placement.of_layers(layer), *columns), counted_at=layers
            ),
            layers=layers,
            nonfinite_steps=self._nonfinite_steps.on(common["device"]),
            layer=layer,
        )

    def _launch(self, plan: _Plan) -> None:
        network, importances = plan.network(), plan.state_tensors("importance")
        if plan.prepared is not None:
            connections = Connections(importances, plan.nonfinite_steps, plan.layer)
            launch.connection_update_(plan.prepared, network, connections)
            return
        with plan.counters() as counts:
            connections = Connections(importances, counts, plan.layer)
            self._operations().connection_update_(network, connections, *plan.columns)

    @torch.no_grad()
    def plasticity(self) -> dict[str, ConnectionPlasticity]:
        """Importance, learning rates and the share of frozen connections of every layer, at this moment.

        Returns:
            Layer name -> `npc_ext.ConnectionPlasticity`. It prints as a table.
        """
        # Replaced parameters have no name in the model any more. Of several names the first counts.
        names = {id(parameter): name for name, parameter in reversed(self._trained_by_name().items())}
        counts, result = self._nonfinite_steps.now(), PlasticityByLayer[ConnectionPlasticity]()
        for index, layer in enumerate(self._names):
            constants = self._constants(index)
            eq_7 = {option: constants[option] for option in ("alpha", "beta", "sigma")}
            average, rate = {}, {}
            for parameter in self._parameters_of[index]:
                name = names[id(parameter)].rpartition(".")[2]
                known = self.state.get(parameter, {}).get("importance")
                average[name] = self._new_state_tensor(parameter, "importance") if known is None else known.clone()
                rate[name] = reference.learning_rate(average[name], float(self._group_of[id(parameter)]["lr"]), **eq_7)
            values = [each.flatten() for each in average.values()]
            frozen = (torch.cat(values) >= constants["beta"]).double().mean().item() if values else 0.0
            result[layer] = ConnectionPlasticity(average, rate, frozen, counts[index])
        return result

    def __repr__(self) -> str:
        return (
            f"{super().__repr__()[:-2]}\n\nother_parameters: {self._other_parameters}, layers: {self._layer_options}\n"
            f"{self._protection()}\n)"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._has_layers:
            self._index_parameters()


@dataclass(frozen=True)
class _Plan(LayersPlan):
    layer: list[int]  # of each parameter, among those that take part; -1: none
