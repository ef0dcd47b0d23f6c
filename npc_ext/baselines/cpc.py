"""CPC, connection-level plasticity control, as a `torch.optim.Optimizer`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .. import reference
from .._names import ByLayer
from .._warn import warn
from ..columns import Connections, Placement, SGDOptions, columns_of
from ..kernels import launch
from ..neurons.find import connections
from ..neurons.protection import Protection, warn_if_little
from ..neurons.tap import ImportanceWarning
from ..optim.base import Descent
from ..optim.moments import FirstMoments
from ..optim.nonfinite import NonfiniteSteps
from ..optim.options import (
    ALPHA_IN_UNITS_OF_LR,
    SGD_OPTIONS,
    LayerOptions,
    check_choice,
    check_plasticity_options,
    plasticity_columns,
)
from ..optim.plan import LayersPlan
from ..optim.plasticity import spread
from ..optim.succession import fitted

_LAYER_OPTIONS = ("alpha", "beta", "delta", "sigma", "normalize", "consolidate")
_CONSTANTS = ("alpha", "beta", "delta", "sigma", "normalize")


@dataclass(frozen=True)
class ConnectionPlasticity:
    """How plastic the connections of one layer are at this moment.

    Attributes:
        importance: parameter name -> float32 tensor of its shape, the moving average C of eq. 4; its mean over the
            layer tends to 1.
        learning_rate: parameter name -> float32 tensor of its shape, eta of eq. 7.
        frozen: the share of the layer's connections, from 0 to 1, for which eq. 7 is 0, whatever the learning rate.
        nonfinite_steps: in how many steps the measured importance was not finite and was left out.
    """

    importance: dict[str, Tensor]
    learning_rate: dict[str, Tensor]
    frozen: float
    nonfinite_steps: int

    def __repr__(self) -> str:
        importance, rate = (
            torch.cat([t.flatten() for t in one.values()]) for one in (self.importance, self.learning_rate)
        )
        return (
            f"{type(self).__name__}({importance.numel()} connections, {self.frozen:.0%} frozen, importance "
            f"{spread(importance)}, learning rate {spread(rate)})"
        )


class CPC(Descent):
    """SGD whose learning rate falls, connection by connection, with the connection's importance to what was learned.

    As `NPC`, but for single connections: importance is |w * dL/dw|, divided by its mean over all connections of the
    layer (weights and biases), averaged over time into C (eq. 4), and connection ij learns at the rate

        eta_ij = lr * min(1, alpha * sqrt(max(beta / C_ij - 1, 0)))                                       (eq. 7)

    It is the NPC paper's own control experiment: one float for each connection instead of one for each neuron, and what
    was learned is kept worse. Source: Paik, Oh, Kwak, Kim, "Overcoming Catastrophic Forgetting by Neuron-Level
    Plasticity Control", AAAI 2020, arXiv 1907.13322.

    Use it as `torch.optim.SGD`; nothing else in the training loop changes. Layers are the model's Linear, Conv and
    ConvTranspose modules, and the input projections of attention; other parameters train at plain `lr`.

    Args:
        model: the network.
        lr: the largest learning rate, as in `NPC`.
        alpha, beta, delta, sigma: the constants of eqs. 4 and 7, as in `NPC`.
        momentum, nesterov, weight_decay, maximize: as in `torch.optim.SGD`, except that a frozen connection stays
            bit-identical under all of them, and that its momentum is cleared when it freezes.
        params: what to train, as for any torch optimizer. Default: all of the model's parameters.
        normalize: eq. 3's mean is over "all" connections of the layer, or over the "active" ones, whose gradient is not
            0. Then the others take no part in the step: their importance, weights and momentum stay as they are.
        layers: options of single layers, by name or pattern: alpha, beta, delta, sigma, normalize; consolidate=False
            (train at plain lr).
        others: "train" parameters outside layers at plain lr, or "freeze" them.
        backend: "native" (compiled kernels, or an error), "reference" (plain PyTorch) or "auto".

    Raises:
        ValueError, TypeError: an argument is out of range or does not fit the model; the message says what to change.

    Warns:
        ImportanceWarning: more than half of the elements that are trained are not protected.
    """

    _ADDED_KEYS: ClassVar[Mapping[str, str]] = ALPHA_IN_UNITS_OF_LR
    _OPTIONS: ClassVar[tuple[str, ...]] = (*_CONSTANTS, *SGD_OPTIONS)
    _STATE_TENSORS: ClassVar[tuple[str, ...]] = ("importance",)
    _KIND = "importance of connections"

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.1,
        alpha: float = 0.5,
        beta: float = 0.5,
        delta: float = 1 - 2e-4,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        sigma: Literal["sigmoid", "tanh", "erf"] = "sigmoid",
        *,
        params: Iterable[Any] | None = None,
        maximize: bool = False,
        normalize: Literal["all", "active"] = "all",
        layers: Mapping[str, Mapping[str, Any]] | None = None,
        others: Literal["train", "freeze"] = "train",
        backend: Literal["auto", "native", "reference"] = "auto",
    ) -> None:
        check_choice("others", others, ("train", "freeze"))
        self._layer_options = LayerOptions(layers, _LAYER_OPTIONS)
        self._others = others
        self._warned: set[str] = set()
        self._ready = False
        options = {
            "lr": lr,
            "alpha": alpha,
            "beta": beta,
            "delta": delta,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "sigma": sigma,
            "maximize": maximize,
            "normalize": normalize,
        }
        super().__init__(model, params, options, backend)
        self._ready = True
        self._find_layers()
        known = {*self._layer_of, *self._plain}
        unprotected = [parameter for parameter in self._moved() if id(parameter) not in known]
        advice = (
            "Other parameters can be kept as they are (others='freeze') or learn more slowly (groups of their own in "
            "params=[...]); only Linear, convolution, Conv1D and attention layers are protected."
        )
        warn_if_little(self._protection(), self._model, unprotected, "connections", advice)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters with options of their own, for example those of a head that the model has just been given."""
        super().add_param_group(param_group)
        if not self._ready:
            return
        try:
            self._find_layers()
        except Exception:
            self.param_groups.pop()
            raise

    def _find_layers(self) -> None:
        layers = connections(self._model)
        self._layer_options.check(layers, self._check_own_options)
        self._names = [name for name in layers if self._layer_options.of(name).get("consolidate", True)]
        self._nonfinite_steps = NonfiniteSteps(len(self._names))
        self._index_parameters()

    def _index_parameters(self) -> None:
        """Which group and which layer every parameter belongs to; rebuilt wherever parameters may be new objects."""
        self._group_of = {id(p): group for group in self.param_groups for p in group["params"]}
        layers = connections(self._model)
        self._layer_of: dict[int, int] = {}
        self._parameters_of: list[list[nn.Parameter]] = []
        for index, name in enumerate(self._names):
            own = [parameter for parameter in layers[name] if id(parameter) not in self._layer_of]
            self._layer_of.update((id(parameter), index) for parameter in own)
            self._parameters_of.append(own)
        self._plain = {id(own) for name in layers.keys() - set(self._names) for own in layers[name]}
        self._plain -= self._layer_of.keys()

    def _moved(self) -> list[Tensor]:
        trained = (parameter for group in self.param_groups for parameter in group["params"])
        return [parameter for parameter in trained if parameter.requires_grad and self._trains(parameter)]

    def _protection(self) -> Protection:
        return Protection.of(self._moved(), self._layer_of, self._plain)

    def _check_own_options(self, own: Mapping[str, Any], where: str) -> None:
        self._check_options({**self.defaults, **own}, where)

    def _check_options(self, options: Mapping[str, Any], where: str = "") -> None:
        super()._check_options(options, where)
        check_plasticity_options(options, where)

    def _constants(self, layer: int) -> dict[str, Any]:
        """The constants of a layer: its own, else those of its first parameter's group."""
        groups = (self._group_of[id(p)] for p in self._parameters_of[layer] if id(p) in self._group_of)
        group = next(groups, self.defaults)
        return {**{name: group[name] for name in _CONSTANTS}, **self._layer_options.of(self._names[layer])}

    def _step(self) -> None:
        super()._step()
        for name, count in zip(self._names, self._nonfinite_steps.news() or (), strict=False):
            if count and name not in self._warned:
                self._warned.add(name)
                warn(
                    f"layer {name!r} had an importance that is not finite (inf or nan in weights or gradients); such "
                    "steps leave its importance as it was and are counted in plasticity()[...].nonfinite_steps",
                    ImportanceWarning,
                )

    def _trains(self, parameter: Tensor) -> bool:
        return self._others == "train" or id(parameter) in self._layer_of or id(parameter) in self._plain

    def _create_state(self, parameter: Any, group: dict[str, Any]) -> None:
        super()._create_state(parameter, group)
        if id(parameter) in self._layer_of and self.state[parameter].get("importance") is None:
            self.state[parameter]["importance"] = torch.zeros_like(parameter, dtype=torch.float32)

    def _state_tensor_dtype(self, parameter: Tensor) -> torch.dtype:
        return torch.float32

    def _take_up_groups(self) -> None:
        super()._take_up_groups()
        self._find_layers()

    def _held_in(self, states: Mapping[int, Mapping[str, Any]]) -> dict[str, dict[str, Tensor]]:
        own = ((name, states.get(id(parameter), {})) for name, parameter in self._connections().items())
        return {name: {"importance": state["importance"]} for name, state in own if "importance" in state}

    def _held(self) -> dict[str, dict[str, Tensor]]:
        return self._held_in({id(one): self.state.get(one, {}) for one in self._connections().values()})

    def _may_hold(self) -> dict[str, Tensor]:
        return self._connections()

    def _connections(self) -> dict[str, Tensor]:
        """The parameters that have importance, by name."""
        return {name: one for name, one in self._trained_by_name().items() if id(one) in self._layer_of}

    def _take_importance(self, held: Mapping[str, Mapping[str, Tensor]]) -> None:
        averages: dict[Tensor, Tensor] = {}
        for name, parameter in self._connections().items():
            if name in held and parameter not in averages:  # it may have several names
                begin = torch.zeros_like(parameter, dtype=torch.float32)
                averages[parameter] = fitted(held[name]["importance"], begin, repr(name))
        for parameter, average in averages.items():
            self.state[parameter]["importance"] = average

    def _forget_plans(self) -> None:
        super()._forget_plans()
        self._first_moments = FirstMoments()

    def _settle(self) -> None:
        for plan in self._plans:
            for parameter, state, has_momentum in zip(plan.owners, plan.states, plan.has_momentum, strict=True):
                if (layer := self._layer_of.get(id(parameter))) is None:
                    continue
                beta, importance = float(self._constants(layer)["beta"]), state["importance"]
                moment = state["momentum_buffer"] if has_momentum else None
                self._first_moments.settle(parameter, moment, importance, beta, partial(torch.ge, importance, beta))

    def _make_plan(self, device: torch.device, members: list[tuple[Any, dict[str, Any]]]) -> _Plan:
        common = self._common(device, members)
        own = [self._layer_of.get(id(parameter), -1) for parameter in common["owners"]]
        layers = sorted(set(own) - {-1})
        position = {layer: at for at, layer in enumerate(layers)} | {-1: -1}
        layer = [position[one] for one in own]
        options = columns_of(SGDOptions, common["groups"], lr=common["rates"])
        columns = (options, plasticity_columns([self._constants(one) for one in layers]))
        return _Plan(
            **common,
            columns=columns,
            tables=self._tables(common["parameters"], (Placement.of_layers(layer), *columns)),
            layers=layers,
            nonfinite_steps=self._nonfinite_steps.on(device),
            layer=layer,
        )

    def _launch(self, plan: _Plan) -> None:
        network, importances = plan.network(), plan.state_tensors("importance")
        if plan.tables is not None:
            connections = Connections(importances, plan.nonfinite_steps, plan.layer)
            launch.connection_update_(plan.tables, network, connections, counted_at=plan.layers)
            return
        with plan.counters() as counts:
            connections = Connections(importances, counts, plan.layer)
            self._operations().connection_update_(network, connections, *plan.columns)

    @torch.no_grad()
    def plasticity(self) -> dict[str, ConnectionPlasticity]:
        """Importance, learning rates and the share of frozen connections of every layer, by its name."""
        # Replaced parameters have no name in the model any more; of several names the first one counts.
        names = {id(parameter): name for name, parameter in reversed(self._trained_by_name().items())}
        counts, result = self._nonfinite_steps.now(), ByLayer[ConnectionPlasticity]()
        for index, layer in enumerate(self._names):
            own = self._constants(index)
            average, rate = {}, {}
            for parameter in self._parameters_of[index]:
                if id(parameter) not in self._group_of:
                    continue
                name = names[id(parameter)].rpartition(".")[2]
                known = self.state.get(parameter, {}).get("importance")
                average[name] = torch.zeros_like(parameter, dtype=torch.float32) if known is None else known.clone()
                lr = float(self._group_of[id(parameter)]["lr"])
                rate[name] = reference.learning_rate(average[name], lr, own["alpha"], own["beta"], own["sigma"])
            of_all = [one.flatten() for one in average.values()]
            frozen = (torch.cat(of_all) >= own["beta"]).double().mean().item() if of_all else 0.0
            result[layer] = ConnectionPlasticity(average, rate, frozen, counts[index])
        return result

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-2]}\n\n{self._protection()}\n)"

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_names" in self.__dict__:
            self._index_parameters()


@dataclass(frozen=True)
class _Plan(LayersPlan):
    layer: list[int]  # of each parameter, among those that take part; -1: none
