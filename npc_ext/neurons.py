"""Which parameters make up which neuron, and where in the model its activation is measured.

The model is traced symbolically (torch.fx), nothing is computed. From each weighted layer the walk goes downstream
through normalization, activation, pooling and dropout to the last point at which the tensor still holds this layer's
neurons and nothing else: up to a flatten, an addition, a second consumer or an unknown operation. Parts of a model that
cannot be traced (control flow that depends on data) are searched child by child.

Two facts decide between points (the tests prove both). Before a normalization the importance is zero but for rounding,
so the point is always behind it. Over operations that are positively homogeneous within each channel (ReLU, pooling,
dropout) it is the same before and after (Euler), so any of those points will do.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized

from . import attention, ops
from ._torch import (
    as_written,
    class_index_before_fully_shard,
    compiled_from,
    guard_hooks,
    own_parameters,
    version_of,
)
from .names import close_to
from .nn import ReLU
from .protection import Protection
from .shards import is_sharded
from .tap import TapHook

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_WEIGHTED = (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)
_TRACED_INTO = (
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
)
_TRAINABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# These take a matrix for one sequence without a dimension of samples.
_TAKES_ONE_SEQUENCE = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_PROJECTION = "input projection"

_NORMALIZATION = {
    *(f"{kind}Norm{d}d" for kind in ("Batch", "Instance") for d in (1, 2, 3)),
    *("SyncBatchNorm", "GroupNorm", "LayerNorm", "RMSNorm"),
    *("batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm"),
}
# f(s x) = s f(x) for s > 0, within each channel.
_HOMOGENEOUS = {
    *("ReLU", "LeakyReLU", "PReLU", "Identity", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d"),
    *("relu", "relu_", "leaky_relu", "leaky_relu_", "prelu", "dropout", "dropout1d", "dropout2d", "dropout3d"),
    *("contiguous",),
}
_POOLING = {
    *(f"{kind}Pool{d}d" for kind in ("Max", "Avg", "AdaptiveMax", "AdaptiveAvg", "LP") for d in (1, 2, 3)),
    *(f"{kind}_pool{d}d" for kind in ("max", "avg", "adaptive_max", "adaptive_avg", "lp") for d in (1, 2, 3)),
}
_OTHER_ACTIVATIONS = {
    *("ELU", "CELU", "SELU", "GELU", "SiLU", "Mish", "Sigmoid", "Tanh", "Softplus", "Softsign", "Hardtanh", "ReLU6"),
    *("Hardswish", "Hardsigmoid", "LogSigmoid", "Tanhshrink", "Softshrink", "Hardshrink", "Threshold", "AlphaDropout"),
    *("elu", "celu", "selu", "gelu", "silu", "mish", "sigmoid", "tanh", "softplus", "softsign", "hardtanh", "relu6"),
    *("hardswish", "hardsigmoid", "logsigmoid", "tanhshrink", "softshrink", "hardshrink", "threshold"),
    *("alpha_dropout", "sigmoid_", "tanh_", "elu_", "selu_", "celu_", "hardtanh_", "threshold_"),
}
_ASKS_FOR_SHAPE = {"size", "dim", "shape", "ndim", "dtype", "device", "getattr"}
_VIEWS = {
    *("view", "reshape", "flatten", "permute", "transpose", "squeeze", "unsqueeze", "getitem", "chunk", "split"),
    *("Flatten", "Unflatten", "Identity", "view_as", "expand", "movedim", "contiguous", "unbind", "narrow", "select"),
}


@dataclass(frozen=True)
class NeuronParameter:
    """A parameter whose dimension `dim` counts neurons; `groups` > 1 only for grouped transposed convolutions.

    Its first row belongs to neuron `first` of its layer.
    """

    name: str
    parameter: nn.Parameter
    dim: int = 0
    groups: int = 1
    first: int = 0


@dataclass(frozen=True)
class TapPoint:
    """A place in the model where a layer's activation passes: what a module returns, or what it takes.

    Or the input projection of attention, in the middle of a module (attention.py).

    `copy`: what follows works in place, or is unknown, so the tap hands on a copy. `in_backward`: the module is an
    `npc_ext.nn.ReLU` that needs no tap. A tensor of `unbatched_ndim` dimensions is a single sample.
    """

    module: str
    where: str  # "output", "input" or "input projection"
    channel_dim: int
    batch_dim: int
    unbatched_ndim: int
    copy: bool = False
    in_backward: bool = False

    @property
    def missing_dim(self) -> int:
        """Where a single sample lacks the dimension of samples."""
        return self.batch_dim if self.unbatched_ndim > 1 else 0

    def __str__(self) -> str:
        return f"{self.where} of {self.module or '(the model)'}"


NO_BACKWARD_PASS = -1


def _nothing() -> None:
    pass


@dataclass(eq=False)
class NeuronLayer:
    """The neurons of one weighted layer (or of several that share their weight).

    Attributes:
        name: the layer's name in the model.
        neurons: N.
        fan_in: weights per neuron.
        parameters: what belongs to the neurons, weight first: bias, and scales and biases of a following
            normalization.
        points: where their activation is measured.
        note: what a reader of the table should know.
        sink: (N,) float32 leaf whose gradient is the importance measured since it was last cleared; -0.0 where a neuron
            received no gradient.
        gradients_skipped: the share of neurons, from 0 to 1, whose weight gradients the last step did without.
        resting: whether the layer is measured, but its parameters are constants, in the call that is going on
            (resting.py).
    """

    name: str
    neurons: int
    fan_in: int
    parameters: tuple[NeuronParameter, ...]
    points: tuple[TapPoint, ...]
    note: str
    sink: Tensor
    measure: Callable[..., Tensor] = ops.importance_of_checked
    relu_backward: Callable[..., tuple[Tensor, Tensor]] = ops.relu_backward_importance_of_checked
    gradients_skipped: float = field(default=0.0, repr=False)
    resting: bool = field(default=False, repr=False)
    note_rest: Callable[[], None] | None = field(default=None, repr=False)  # to be called by what leaves gradients out
    checked: bool = field(default=False, repr=False)  # for a point before a normalization, see tap.py
    # Of tap.drop_what_was_cleared: the last backward pass since the last step, the version of the weight's gradient
    # after it, and whether it left gradients. `fully_shard` keeps those that are not synchronized yet where only it
    # finds them.
    last_backward_pass: int = field(default=NO_BACKWARD_PASS, repr=False)
    expected_version: int = field(default=0, repr=False)
    has_gradients: bool = field(default=True, repr=False)
    forget_left_out: Callable[[], None] = field(default=_nothing, repr=False)  # of certificates, see certificate.py

    @property
    def module(self) -> str:
        """The name of the module that has the weight."""
        return self.parameters[0].name.rpartition(".")[0]

    def add_note(self, text: str) -> None:
        """Adds to what a reader of the table should know."""
        self.note = f"{self.note}; {text}" if self.note else text

    def trains(self) -> bool:
        """Whether any of the neurons' parameters requires a gradient."""
        for own in self.parameters:  # no generator: this is called in every forward pass
            if own.parameter.requires_grad:
                return True
        return False

    @functools.cached_property
    def sharded(self) -> bool:
        """Whether the parameters are sharded over processes."""
        return any(is_sharded(own.parameter) for own in self.parameters)

    def note_gradients(self) -> None:
        """Notes whether there are gradients; called when a backward pass is over."""
        self.has_gradients = any(own.parameter.grad is not None for own in self.parameters)

    def wake_up(self) -> None:
        """Back to usual, in the next call."""
        self.resting, self.note_rest = False, None

    def trained(self) -> list[nn.Parameter]:
        """Those of the neurons' parameters that require a gradient."""
        return [own.parameter for own in self.parameters if own.parameter.requires_grad]

    def __getstate__(self) -> dict[str, Any]:
        # A copy starts without certificates.
        usual = {"resting": False, "note_rest": None, "forget_left_out": _nothing}
        return {**self.__dict__, **usual}


@dataclass(frozen=True)
class OtherParameter:
    """A parameter that belongs to no neuron, and why."""

    name: str
    parameter: nn.Parameter
    reason: str


class Neurons:
    """All neurons of a model, layer by layer, and the parameters that belong to none. Printing it shows a table."""

    def __init__(self, layers: list[NeuronLayer], others: list[OtherParameter]) -> None:
        self.layers, self.others = tuple(layers), tuple(others)
        self._trained: tuple[Tensor, ...] | None = None  # by the optimizer; None: nobody has said
        self._left_alone: dict[str, str] = {}  # layers that are not measured, and why
        self._handles: list[Any] = []
        self._finalizer: weakref.finalize[..., Any] | None = None

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[NeuronLayer]:
        return iter(self.layers)

    def __getitem__(self, name: str) -> NeuronLayer:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"no layer {name!r}; {close_to(name, (layer.name for layer in self.layers))}")

    def attach(
        self,
        model: nn.Module,
        layers: list[NeuronLayer] | None = None,
        measure: Callable[..., Tensor] = ops.importance_of_checked,
        relu_backward: Callable[..., tuple[Tensor, Tensor]] = ops.relu_backward_importance_of_checked,
    ) -> None:
        """Places the taps of `layers` (default: all) in the model; they measure by the operations given."""
        guard_hooks()
        for layer in self.layers if layers is None else layers:
            layer.measure, layer.relu_backward = measure, relu_backward
            weighted = model.get_submodule(layer.module)
            for point in layer.points:
                module, hook = model.get_submodule(point.module), TapHook(layer, point, weighted)
                if point.in_backward and isinstance(module, ReLU):
                    self._handles.append(module.attach(hook))
                elif point.where == "output":
                    self._handles.append(module.register_forward_hook(hook))
                elif point.where == _PROJECTION:
                    self._handles.append(attention.tap_projection(module, hook))
                else:
                    self._handles.append(module.register_forward_pre_hook(hook))

    def hold(self, handle: Any) -> None:
        """Has `detach` call `remove()` of something else that was placed in the model."""
        self._handles.append(handle)

    def detach(self) -> None:
        """Takes everything that was placed in the model out of it."""
        _remove_all(self._handles)

    def detach_with(self, owner: object) -> None:
        """Has everything taken out of the model when `owner` is no more; may be called again."""
        if self._finalizer is None:
            self._finalizer = weakref.finalize(owner, _remove_all, self._handles)
            self._finalizer.atexit = False

    def note_training(self, trained: Iterable[Tensor], left_alone: Mapping[str, str]) -> None:
        """Notes what an optimizer does, for the table.

        Args:
            trained: the parameters that it moves where they require a gradient.
            left_alone: the names of layers that it trains but does not measure, and why.
        """
        self._trained, self._left_alone = tuple(trained), dict(left_alone)

    def protection(self) -> Protection:
        """How much of what is trained is protected, at this moment."""
        chosen = {id(p.parameter) for layer in self.layers if layer.name in self._left_alone for p in layer.parameters}
        protected = {id(p.parameter) for layer in self.layers for p in layer.parameters} - chosen
        return Protection.of(self.trained(), protected, chosen)

    def trained(self) -> list[Tensor]:
        """What the optimizer moves at this moment; without one, whatever requires a gradient."""
        everything: Iterable[Tensor] | None = self._trained
        if everything is None:
            in_neurons = (own.parameter for layer in self.layers for own in layer.parameters)
            everything = [*in_neurons, *(other.parameter for other in self.others)]
        return [parameter for parameter in everything if parameter.requires_grad]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_finalizer": None}

    def __str__(self) -> str:
        trained = set(map(id, self.trained()))
        rows = [("layer", "neurons", "fan-in", "skipped", "measured at", "parameters of its neurons")]
        for layer in self.layers:
            measured = " and ".join(f"{p}, in its backward pass" if p.in_backward else str(p) for p in layer.points)
            if any(point.copy for point in layer.points):
                measured += " (copied)"
            trains = [id(own.parameter) in trained for own in layer.parameters]
            if not layer.trains():
                measured = "nowhere: none of its parameters requires a gradient"
            elif not any(trains):
                measured = "nowhere: this optimizer trains none of its parameters"
            elif reason := self._left_alone.get(layer.name):
                measured = f"nowhere: {reason}"
            names = ", ".join(
                _relative(own.name, layer.module) + ("" if its or not any(trains) else " (not trained)")
                for own, its in zip(layer.parameters, trains, strict=True)
            )
            counts = f"{layer.neurons:,}", f"{layer.fan_in:,}", f"{layer.gradients_skipped:.0%}"
            rows.append((layer.name or "(the model)", *counts, measured, names))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        lines += [f"note: {layer.name}: {layer.note}" for layer in self.layers if layer.note]
        if self.others:
            lines += ["", "in no neuron, trained at plain learning rate unless others='freeze':"]
            width = max(len(other.name) for other in self.others)
            for other in self.others:
                frozen = "" if other.parameter.requires_grad else "; requires no gradient, and is not trained"
                if not frozen and id(other.parameter) not in trained:
                    frozen = "; not trained by this optimizer"
                lines.append(f"  {other.name.ljust(width)}  {other.reason}{frozen}")
        of_model = {id(own.parameter) for layer in self.layers for own in layer.parameters}
        of_model.update(id(other.parameter) for other in self.others)
        if outside := [parameter.numel() for parameter in self.trained() if id(parameter) not in of_model]:
            size = f"{len(outside)} parameters, {sum(outside):,} elements"
            lines += ["", f"not in the model, trained at plain learning rate: {size}"]
        return "\n".join([*lines, "", str(self.protection())])

    __repr__ = __str__


def _remove_all(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


def find_neurons(
    model: nn.Module, *, measure_at: Mapping[str, str] | None = None, batch_dim: Mapping[str, int] | None = None
) -> Neurons:
    """Finds the neurons of a model and where to measure them; computes nothing and changes nothing.

    Args:
        model: any module. Its Linear, Conv1d/2d/3d and ConvTranspose1d/2d/3d layers have neurons, and those of the form
            of GPT-2's Conv1D. So has the input projection of MultiheadAttention: those of queries, keys and values, one
            after the other.
        measure_at: layer name -> name of the module whose output holds the layer's activation, instead of the place
            found.
        batch_dim: layer name -> the dimension that counts samples (default 0; sequence-first transformers get 1).

    Raises:
        ValueError: there are no neurons; parameters are uninitialized or complex; a name in `measure_at` or
            `batch_dim` is not in the model; layers share a weight but count neurons along different dimensions.
    """
    modules = dict(model.named_modules())
    weighted, unusable = _weighted_layers(modules)
    projections = input_projections(model)
    for name in measure_at or {}:
        if name in projections:
            raise ValueError(
                f"measure_at names {name!r}, the input projection of attention, which is measured inside its module; "
                "expected another layer"
            )
        _check_name("measure_at", name, [*weighted])
    for name in (measure_at or {}).values():
        _check_name("measure_at", name, list(modules))
    for name, dim in (batch_dim or {}).items():
        _check_name("batch_dim", name, [*weighted, *projections])
        if dim not in (0, 1):
            raise ValueError(f"batch_dim of {name!r} is {dim!r}; expected 0 or 1")
        if dim == 1 and name in weighted and not is_linear(weighted[name]):
            raise ValueError(
                f"batch_dim of {name!r} is 1, but dimension 1 counts the neurons of a convolution; expected 0 (a "
                "pattern in layers may name the linear layers alone)"
            )
    measure_at = {**_outputs_of_adapters(weighted, modules), **(measure_at or {})}
    graphs = _Graphs(model)
    layers, claimed = [], dict[int, str]()
    for names in _by_weight(weighted).values():
        found = _layer(names, modules, graphs, measure_at, batch_dim or {}, claimed)
        if isinstance(found, str):
            unusable[names[0]] = found
            continue
        layers.append(found)
        claimed.update((id(p.parameter), found.name) for p in found.parameters)
    for names in _by_projection(projections, modules, unusable).values():
        layers.append(_projection_layer(names, modules, batch_dim or {}))
        claimed.update((id(p.parameter), layers[-1].name) for p in layers[-1].parameters)
    position = {name: index for index, name in enumerate(modules)}
    layers.sort(key=lambda layer: position[layer.module])
    if not layers:
        raise ValueError(
            f"the model ({type(model).__name__}) has no neurons that can be measured: no Linear, Conv or ConvTranspose "
            "layer" + "".join(f"; {name!r}: {reason}" for name, reason in unusable.items())
        )
    others = [
        OtherParameter(name, parameter, _why_other(name, modules, unusable))
        for name, parameter in model.named_parameters()
        if id(parameter) not in claimed
    ]
    return Neurons(layers, others)


# ------------------------------------------------------------------------------------------------- layers and weights


def _weighted_layers(modules: Mapping[str, nn.Module]) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Layers with neurons, and those that would have some but for a reason."""
    weighted: dict[str, nn.Module] = {}
    unusable: dict[str, str] = {}
    for name, module in modules.items():
        for own, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{own}".lstrip(".")
            if isinstance(parameter, UninitializedParameter):
                raise ValueError(f"parameter {full!r} is not initialized yet: pass one batch through the model first")
            if parameter.is_complex():
                raise ValueError(
                    f"parameter {full!r} is complex ({parameter.dtype}); only real parameters can be trained"
                )
        if not is_weighted(module):
            continue
        if is_parametrized(module) or not isinstance(own_parameters(module).get("weight"), nn.Parameter):
            unusable[name] = "its weight is computed from other parameters (a parametrization)"
        elif reason := _why_packed(module):
            unusable[name] = reason
        else:
            weighted[name] = module
    return weighted, unusable


def is_transposed_linear(module: Any) -> bool:
    """Whether a module computes x @ weight + bias with a weight (in, out), as the Conv1D of GPT-2 does."""
    weight = own_parameters(module).get("weight")
    is_conv1d = any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)
    return is_conv1d and weight is not None and weight.ndim == 2 and getattr(module, "nf", None) == weight.shape[1]


def is_linear(module: nn.Module) -> bool:
    """Whether a module is fully connected, with neurons in the last dimension of its output."""
    return isinstance(module, nn.Linear) or is_transposed_linear(module)


def is_weighted(module: nn.Module) -> bool:
    """Whether a module is of a kind that has neurons."""
    return isinstance(module, _WEIGHTED) or is_transposed_linear(module)


def _why_packed(module: Any) -> str:
    """Why the elements of a weight are not one for each connection, as where several share a byte; empty if they are.

    The number of neurons may have changed since the module was built: heads grow.
    """
    weight = module.weight
    if weight.dtype not in _TRAINABLE:
        return f"its weight is {weight.dtype}, packed or quantized"
    expected: tuple[int, ...]
    if isinstance(module, nn.Linear):
        expected, got = (module.in_features,), tuple(weight.shape[1:])
    elif isinstance(module, _CONVOLUTIONS):
        expected, got = (module.in_channels // module.groups, *module.kernel_size), tuple(weight.shape[1:])
    elif isinstance(module, _TRANSPOSED):
        expected, got = (module.in_channels, *module.kernel_size), (*weight.shape[:1], *weight.shape[2:])
    else:
        return ""
    return "" if got == expected else f"its weight has the shape {tuple(weight.shape)}, which is not that of {module}"


def connections(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters of the layers that have neurons, by the layer's name, whether or not they can be measured.

    Layers are Linear, Conv, ConvTranspose and Conv1D with a weight of their own, and the input projections of
    attention.

    Raises:
        ValueError: there is none; parameters are uninitialized or complex.
    """
    modules = dict(model.named_modules())
    weighted, unusable = _weighted_layers(modules)
    found: dict[str, list[nn.Parameter]] = {}
    for name, module in modules.items():
        if name in weighted:
            found[name] = list(module.parameters(recurse=False))
        elif isinstance(module, nn.MultiheadAttention) and not _why_no_projection(module):
            own = (getattr(module, each) for each in (*_projection_weights(module), "in_proj_bias"))
            found[_join(name, "in_proj")] = [parameter for parameter in own if parameter is not None]
    if not found:
        reasons = "".join(f"; {name!r}: {reason}" for name, reason in unusable.items())
        raise ValueError(f"the model ({type(model).__name__}) has no Linear, Conv or ConvTranspose layer{reasons}")
    return found


def is_shared(weight: Tensor, model: nn.Module) -> bool:
    """Whether several modules of a model have a weight in common."""
    return sum(any(own is weight for own in own_parameters(m).values()) for m in model.modules()) > 1


def _by_weight(weighted: Mapping[str, nn.Module]) -> dict[int, list[str]]:
    """Names of layers grouped by the weight that they share."""
    groups: dict[int, list[str]] = {}
    for name, module in weighted.items():
        groups.setdefault(id(module.weight), []).append(name)
    for names in groups.values():
        places = {name: _neuron_place(weighted[name]) for name in names}
        if len(set(places.values())) > 1:
            raise ValueError(
                f"layers {', '.join(map(repr, names))} share one weight but count their neurons along different "
                f"dimensions ({', '.join(str(place[1]) for place in places.values())}); a row of it cannot be a neuron "
                "of both: give them weights of their own"
            )
    return groups


def _neuron_place(module: Any) -> tuple[int, int, int]:
    """Number of neurons of a weighted module, the weight's dimension that counts them, and its groups."""
    if isinstance(module, _TRANSPOSED):
        return module.out_channels, 1, module.groups
    if is_transposed_linear(module):
        return module.weight.shape[1], 1, 1
    return module.weight.shape[0], 0, 1


def _layer(
    names: list[str],
    modules: Mapping[str, nn.Module],
    graphs: _Graphs,
    measure_at: Mapping[str, str],
    batch_dim: Mapping[str, int],
    claimed: Mapping[int, str],
) -> NeuronLayer | str:
    """The layer whose weight the modules `names` share, or why it cannot be measured."""
    first: Any = modules[names[0]]
    weight: nn.Parameter = first.weight
    neurons, dim, groups = _neuron_place(first)
    parameters = [NeuronParameter(_join(names[0], "weight"), weight, dim, groups)]
    points: list[TapPoint] = []
    notes: list[str] = []
    taken = {*claimed, id(weight)}
    for name in names:
        module: Any = modules[name]
        scales: list[str] = []
        if name in measure_at:
            if not graphs.leads_to(name, measure_at[name]):
                raise ValueError(
                    f"measure_at of {name!r} is {measure_at[name]!r}, which comes before the layer or beside it; "
                    "expected a module behind it, whose output holds the layer's activation"
                )
            found: list[tuple[str, str, bool]] | str = [
                (measure_at[name], "output", graphs.needs_copy(measure_at[name]))
            ]
            # A normalization on the way is the neurons' own, wherever they are measured.
            _, scales, _ = graphs.measuring_points(name)
            if _torch_class(modules[measure_at[name]]) in _NORMALIZATION:
                scales = [*scales, measure_at[name]]
        else:
            found, scales, note = graphs.measuring_points(name)
            notes += [note] if note else []
        if isinstance(found, str):
            return found
        channel_dim, unbatched = (-1, 1) if is_linear(module) else (1, module.weight.ndim - 1)
        if isinstance(modules[name.rpartition(".")[0]], _TAKES_ONE_SEQUENCE):
            unbatched = 2
        samples = batch_dim.get(name, _samples_dim(name, modules)) if is_linear(module) else 0
        for at, where, copy in found:
            in_backward = where == "output" and not copy and _is_measuring_relu(modules[at])
            points.append(TapPoint(at, where, channel_dim, samples, unbatched, copy, in_backward))
        own = [(_join(name, "bias"), getattr(module, "bias", None))]
        own += [(_join(scale, n), p) for scale in scales for n, p in modules[scale].named_parameters(recurse=False)]
        for full, parameter in own:
            if parameter is None or id(parameter) in taken or tuple(parameter.shape) != (neurons,):
                continue
            taken.add(id(parameter))
            parameters.append(NeuronParameter(full, parameter))
    if len(names) > 1:
        notes.append(f"its weight is shared with {', '.join(names[1:])}; importance adds up over all of them")
    for name, module in modules.items():
        if isinstance(module, nn.Embedding) and module.weight is weight:
            notes.append(f"its weight is also the embedding {name}")
    sink, fan_in = _sink(neurons, weight.device), weight.numel() // max(neurons, 1)
    return NeuronLayer(
        names[0], neurons, fan_in, tuple(parameters), tuple(dict.fromkeys(points)), "; ".join(notes), sink
    )


def _sink(neurons: int, device: torch.device) -> Tensor:
    """A leaf (N,), whose values nobody reads, so that they are one number in memory."""
    return torch.zeros((), dtype=torch.float32, device=device).expand(neurons).requires_grad_()


def input_projections(model: nn.Module) -> list[str]:
    """The names under which the input projections of attention are layers."""
    return [_join(name, "in_proj") for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]


def _by_projection(
    projections: list[str], modules: Mapping[str, nn.Module], unusable: dict[str, str]
) -> dict[int, list[str]]:
    """Names of attention modules grouped by the weight of their input projection; adds to those that are unusable."""
    groups: dict[int, list[str]] = {}
    for owner in (name.rpartition(".")[0] for name in projections):
        module: Any = modules[owner]
        if reason := _why_no_projection(module):
            unusable[owner] = reason
        elif reason := attention.why_not(module):
            unusable[owner] = f"attention's input projection: {reason}"
        else:
            groups.setdefault(id(getattr(module, _projection_weights(module)[0])), []).append(owner)
    return groups


def _why_no_projection(module: nn.MultiheadAttention) -> str:
    """Why the weights of an input projection are no parameters that can be trained; empty if they are."""
    own = [getattr(module, name) for name in _projection_weights(module)]
    if is_parametrized(module) or not all(isinstance(weight, nn.Parameter) for weight in own):
        return "its weight is computed from other parameters (a parametrization)"
    packed = next((weight for weight in own if weight.dtype not in _TRAINABLE), None)
    return "" if packed is None else f"its weight is {packed.dtype}, packed or quantized"


def _projection_weights(module: nn.MultiheadAttention) -> list[str]:
    if module.in_proj_weight is not None:
        return ["in_proj_weight"]
    return ["q_proj_weight", "k_proj_weight", "v_proj_weight"]


def _projection_layer(names: list[str], modules: Mapping[str, nn.Module], batch_dim: Mapping[str, int]) -> NeuronLayer:
    """The input projection whose weight the attention modules `names` share."""
    parameters: list[NeuronParameter] = []
    points: list[TapPoint] = []
    for name in names:
        module: Any = modules[name]
        samples = batch_dim.get(_join(name, "in_proj"), _samples_dim(name, modules))
        points.append(TapPoint(name, _PROJECTION, -1, samples, 2))
        first = 0
        for own in (*_projection_weights(module), "in_proj_bias"):
            parameter = getattr(module, own)
            if parameter is not None and all(parameter is not known.parameter for known in parameters):
                rows = 0 if own == "in_proj_bias" else first
                parameters.append(NeuronParameter(_join(name, own), parameter, first=rows))
                first += len(parameter)
    weights = [own for own in parameters if own.parameter.ndim == 2]
    neurons = sum(len(own.parameter) for own in weights)
    fan_in = sum(own.parameter.numel() for own in weights) // max(neurons, 1)
    sink = _sink(neurons, weights[0].parameter.device)
    note = f"its weight is shared with {', '.join(names[1:])}; importance adds up over all of them" if names[1:] else ""
    return NeuronLayer(_join(names[0], "in_proj"), neurons, fan_in, tuple(parameters), tuple(points), note, sink)


def _outputs_of_adapters(weighted: Mapping[str, nn.Module], modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Layer -> module for the second factors of low-rank adapters (LoRA, as PEFT has it), y = W x + B A x.

    The rows of B are the output neurons, whose activation is y, not B's own output, which is zero at first.
    """
    found = {}
    for name in weighted:
        owner, _, rest = name.rpartition(".lora_B.")
        if owner and "." not in rest and all(hasattr(modules[owner], part) for part in ("base_layer", "lora_A")):
            found[name] = owner
    return found


def _samples_dim(name: str, modules: Mapping[str, nn.Module]) -> int:
    """Transformer layers say themselves whether samples or positions come first."""
    parts = name.split(".")
    for end in range(len(parts), -1, -1):
        module = modules.get(".".join(parts[:end]))
        attention = getattr(module, "self_attn", module)
        if isinstance(attention, nn.MultiheadAttention):
            return 0 if attention.batch_first else 1
    return 0


def _why_other(name: str, modules: Mapping[str, nn.Module], unusable: Mapping[str, str]) -> str:
    owner, _, own = name.rpartition(".")
    for layer, reason in unusable.items():
        if owner == layer or owner.startswith(_join(layer, "parametrizations")):
            return reason
    module = modules[owner]
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding"
    if isinstance(module, _RECURRENT):
        return "recurrent layer: its activations inside the sequence cannot be seen"
    if isinstance(module, nn.MultiheadAttention):
        return "a key and a value that attention adds to every sequence"
    if _torch_class(module) in _NORMALIZATION:
        return "normalization that follows no single layer's neurons"
    return f"{own} of a {type(module).__name__}, which is no Linear, Conv or ConvTranspose"


def _torch_class(module: nn.Module) -> str:
    """The name of the torch.nn class that a module is, or that its class is derived from."""
    return next(c.__name__ for c in type(module).__mro__ if c.__module__.startswith("torch.nn"))


def _is_measuring_relu(module: nn.Module) -> bool:
    """Whether a module is an `npc_ext.nn.ReLU`; a class derived from it may do something else, or something more."""
    return type(module) is ReLU


def _is_managed(module: nn.Module) -> bool:
    """Whether `fully_shard` was applied to a module itself, and has derived a class of its own from the module's."""
    return hasattr(module, "unshard") and hasattr(module, "set_requires_gradient_sync")


def _own_class(module: nn.Module) -> type:
    """The class of a module as the user made it."""
    kinds = type(module).__mro__
    return kinds[class_index_before_fully_shard(module)] if _is_managed(module) else kinds[0]


def _check_name(option: str, name: str, known: list[str]) -> None:
    if name in known:
        return
    raise ValueError(f"{option} names {name!r}, which is not in the model; {close_to(name, known)}")


def _join(owner: str, own: str) -> str:
    return f"{owner}.{own}" if owner else own


def _relative(name: str, layer: str) -> str:
    return name[len(layer) + 1 :] if layer and name.startswith(f"{layer}.") else name


# --------------------------------------------------------------------------------------------------------- the graphs


_IN_PLACE_OPERATORS = {
    getattr(operator, name)
    for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "setitem")
}


class _Value(fx.Proxy):
    """A stand-in that keeps `x += y` apart from `x + y`, and allows `x[i] = y`."""


for _operator in _IN_PLACE_OPERATORS:

    def _record(self: _Value, *arguments: Any, _operator: Any = _operator) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", _operator, (self, *arguments), {})

    setattr(_Value, f"__{_operator.__name__}__", _record)


class _Tracer(fx.Tracer):
    """Goes into containers and users' modules, not into layers, nor into what torch.nn computes in one piece.

    A module whose forward cannot be traced is one node of its caller's graph, and is listed in `opaque`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.opaque: list[nn.Module] = []

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        before = len(self.graph.nodes)
        if _is_managed(m) and not self.is_leaf_module(m, ""):
            forward = m.forward  # without fully_shard's hooks, which would gather the parameters
        if isinstance(inner := compiled_from(m), nn.Module):
            forward = inner
        try:
            return super().call_module(m, forward, args, kwargs)
        # The user's forward runs on stand-ins for tensors; whatever it raises means the same: not this way.
        except Exception:
            for node in reversed(list(self.graph.nodes)[before:]):
                self.graph.erase_node(node)
            if m not in self.opaque:
                self.opaque.append(m)
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, torch.jit.ScriptModule) or is_weighted(m) or _is_measuring_relu(m):
            return True
        return _own_class(m).__module__.startswith("torch.nn") and not isinstance(m, _TRACED_INTO)


class _Graphs:
    """The traced parts of a model: where each module is called, and what becomes of what it returns."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.calls: dict[str, list[fx.Node]] = {}
        self._name = {module: name for name, module in self.modules.items()}
        self._target: dict[fx.Node, str] = {}
        self._opaque: set[str] = set()
        self._traced: set[nn.Module] = set()
        self._trace(model)
        # Branches that the forward pass did not take, as another task's head, are graphs of their own.
        for name, module in self.modules.items():
            if name and not any(call == name or call.startswith(f"{name}.") for call in self.calls):
                self._trace(module)

    def _trace(self, module: nn.Module) -> None:
        if is_weighted(module) or module in self._traced:
            return
        self._traced.add(module)
        graph, opaque = _symbolic_trace(module)
        for node in graph.nodes:
            if node.op == "call_module":
                called = module.get_submodule(str(node.target))
                self._target[node] = self._name[called]  # a module may have several names; this is its first
                self.calls.setdefault(self._name[called], []).append(node)
        for part in opaque:
            self._opaque.add(self._name[part])
            for child in part.children():
                self._trace(child)

    def target(self, node: fx.Node) -> str:
        """The full name of the module that a node calls."""
        return self._target[node]

    def operation(self, node: fx.Node) -> str:
        """What a node does, by the name of its module's class in torch.nn, its function or its method."""
        if node.op == "call_module":
            return _torch_class(self.modules[self.target(node)])
        if node.op == "call_function":
            return getattr(node.target, "__name__", "").removeprefix("boolean_dispatch.")
        return str(node.target) if node.op == "call_method" else node.op

    def kind(self, node: fx.Node, convolution: bool) -> str | None:
        """Either "normalization", "homogeneous" or "activation"; None for everything that ends a walk."""
        name = _POOLING_FUNCTIONS.get(node.target, "") if node.op == "call_function" else ""
        name = name or self.operation(node)
        if name in _NORMALIZATION:
            return "normalization"
        if name in _HOMOGENEOUS:
            return "homogeneous"
        if name in _POOLING:
            indices = node.op == "call_module" and getattr(self.modules[self.target(node)], "return_indices", False)
            return "homogeneous" if convolution and not indices and not node.kwargs.get("return_indices") else None
        return "activation" if name in _OTHER_ACTIVATIONS else None

    def consumers(self, node: fx.Node) -> list[fx.Node]:
        """Who uses a value, apart from those who only ask for its shape."""
        return [user for user in node.users if self.operation(user) not in _ASKS_FOR_SHAPE]

    def works_in_place(self, node: fx.Node, value: fx.Node) -> bool:
        """Whether a consumer overwrites the value, directly or through a view of it."""
        name = self.operation(node)
        if node.op == "call_module" and (
            self.target(node) in self._opaque or getattr(self.modules[self.target(node)], "inplace", False)
        ):
            return True
        if node.kwargs.get("inplace") or (len(name) > 1 and name.endswith("_") and not name.endswith("__")):
            return True
        if node.op == "call_function" and node.target in _IN_PLACE_OPERATORS:
            return bool(node.args) and node.args[0] is value
        if name in _VIEWS:
            return any(self.works_in_place(user, node) for user in node.users) or "output" in {
                user.op for user in node.users
            }
        return False

    def is_overwritten(self, value: fx.Node) -> bool:
        """Whether what follows a value works in place, or is out of sight."""
        users = self.consumers(value)
        return not users or any(user.op == "output" or self.works_in_place(user, value) for user in users)

    def leads_to(self, name: str, target: str) -> bool:
        """Whether what a module returns reaches another one; True also where their way was not traced."""
        starts, ends = self.calls.get(name, []), self.calls.get(target, [])
        if not {node.graph for node in ends} <= {node.graph for node in starts}:
            return True
        reached = dict.fromkeys(starts)
        waiting = list(reached)
        while waiting:
            users = [user for user in waiting.pop().users if user not in reached]
            reached.update(dict.fromkeys(users))
            waiting += users
        return not ends or any(node in reached for node in ends)

    def needs_copy(self, name: str) -> bool:
        """Whether the output of a module is overwritten in any of its calls, or may be."""
        return any(map(self.is_overwritten, self.calls.get(name, []))) or name not in self.calls

    def measuring_points(self, name: str) -> tuple[list[tuple[str, str, bool]] | str, list[str], str]:
        """Where to measure a layer: (module, "output" or "input", copy) for each of its calls, or why nowhere.

        Also returns the modules on the way whose per-channel parameters belong to the neurons, and a note.
        """
        starts, at = self.calls.get(name, []), name
        if not starts and name.endswith("out_proj"):  # attention never calls it as a module
            owner = name.rpartition(".")[0]
            if isinstance(self.modules[owner], nn.MultiheadAttention):
                starts, at = self.calls.get(owner, []), owner
        if not starts:
            return [(at, "output", True)], [], ""
        convolution = not is_linear(self.modules[name])
        walks = [_Walk(self, start, convolution) for start in starts]
        own = {node for walk in walks for node in walk.values}
        choices = [walk.choose(own) for walk in walks]
        scales = [
            self.target(node)
            for node in walks[0].values[1:]
            if node.op == "call_module"
            and all(call in own for call in self.calls[self.target(node)])
            # Behind a convolution their scales count positions.
            and not (convolution and self.operation(node) in ("LayerNorm", "RMSNorm"))
        ]
        if any(isinstance(choice, str) for choice in choices):
            return next(choice for choice in choices if isinstance(choice, str)), [], ""
        points = {choice[:2]: choice for choice in choices if not isinstance(choice, str)}
        if any(
            where == "output" and self._walks_through(module, walks) > sum(c[:2] == (module, where) for c in choices)
            for module, where in points
        ):
            # A tap sees every call of its module, so a call that chose another point would count twice.
            if any("normalization" in walk.kinds for walk in walks):
                return (
                    "it is called several times, and not all calls can be measured at the same place behind their "
                    "normalization",
                    [],
                    "",
                )
            points = {(at, "output"): (at, "output", any(map(self.is_overwritten, starts)), "")}
        copies = {key: any(c[2] for c in choices if c[:2] == key) for key in points}
        note = next((choice[3] for choice in points.values() if choice[3]), "")
        return [(*key, copies.get(key, True) or points[key][2]) for key in points], scales, note

    def _walks_through(self, module: str, walks: list[_Walk]) -> int:
        return sum(any(call in walk.values for call in self.calls[module]) for walk in walks)


class _Walk:
    """The way of one call's result downstream: `values[i]` becomes `values[i + 1]` by an operation of `kinds[i]`."""

    def __init__(self, graphs: _Graphs, start: fx.Node, convolution: bool) -> None:
        self.graphs = graphs
        self.values, self.kinds = [start], list[str]()
        while len(users := graphs.consumers(self.values[-1])) == 1 or self._is_attention():
            if self._is_attention():  # a tuple of the output and the attention weights
                users = [u for u in users if u.target is operator.getitem and u.args[1] == 0]
                if len(users) != 1:
                    return
                self.kinds.append("homogeneous")
                self.values.append(users[0])
                continue
            kind = graphs.kind(users[0], convolution)
            if kind is None or users[0].args[:1] != (self.values[-1],):
                return
            self.kinds.append(kind)
            self.values.append(users[0])

    def _is_attention(self) -> bool:
        return len(self.values) == 1 and self.graphs.operation(self.values[0]) == "MultiheadAttention"

    def choose(self, own: set[fx.Node]) -> tuple[str, str, bool, str] | str:
        """The last point that a hook can reach, or one that is equal to it; a note, or why there is none.

        `own` are all values of this layer: a module that is called for another layer too is out of the question.
        """
        last = len(self.values) - 1
        equal = last  # from here on every operation is homogeneous, so importance is the same
        while equal > 0 and self.kinds[equal - 1] == "homogeneous":
            equal -= 1
        for at in range(last, equal - 1, -1):
            if (point := self._output(at, own)) and not point[2] and _is_measuring_relu(self.graphs.modules[point[0]]):
                return (*point, "")
        # A convolution's input is kept for its own backward pass: measuring there costs no memory. Another consumer's
        # input comes second, because which head consumes it may change from task to task.
        for at in range(last, equal - 1, -1):
            if point := self._output(at, own) or self._input(at, own, _CONVOLUTIONS):
                return (*point, "")
        for at in range(last, equal - 1, -1):
            if point := self._input(at, own, nn.Module):
                return (*point, "")
        for at in range(equal - 1, -1, -1):
            if self.kinds[at] == "normalization":
                return (
                    "a normalization follows that no module's output or input comes behind: make that normalization or "
                    "what follows it a module that is used once, or name a place with measure_at"
                )
            if point := self._output(at, own) or self._input(at, own, nn.Module):
                name = self.graphs.operation(self.values[at + 1])
                return (*point, f"measured before {name}, which is not a module that is used once")
        return "no module's output or input shows its activation: name a place with measure_at"

    def _output(self, at: int, own: set[fx.Node]) -> tuple[str, str, bool] | None:
        node = self.values[at]
        if at == 1 and self._is_attention():  # its tuple's first element, which a hook can reach
            node = self.values[0]
        if node.op != "call_module" or not self._is_only_ours(node, own):
            return None
        return self.graphs.target(node), "output", self.graphs.is_overwritten(self.values[at])

    def _input(self, at: int, own: set[fx.Node], consumer: Any) -> tuple[str, str, bool] | None:
        users = self.graphs.consumers(self.values[at])
        if len(users) != 1 or users[0].op != "call_module" or users[0].args[:1] != (self.values[at],):
            return None
        target = self.graphs.target(users[0])
        if not isinstance(self.graphs.modules[target], consumer) or len(self.graphs.calls[target]) > 1:
            return None
        return target, "input", self.graphs.works_in_place(users[0], self.values[at])

    def _is_only_ours(self, node: fx.Node, own: set[fx.Node]) -> bool:
        calls = self.graphs.calls[self.graphs.target(node)]
        return all(call in own for call in calls) and sum(call in self.values for call in calls) == 1


# torch.nn.functional wraps pooling in dispatchers that do not carry the function's name.
_POOLING_FUNCTIONS: dict[Any, str] = {
    function: name for name in _POOLING if (function := getattr(nn.functional, name, None)) is not None
}


def _symbolic_trace(module: nn.Module) -> tuple[fx.Graph, list[nn.Module]]:
    """The module's graph, empty if it cannot be traced, and the modules in it that cannot. Leaves no trace in them."""
    defaults: dict[str, Any] = {}
    with contextlib.suppress(TypeError, ValueError):
        defaults = {
            name: parameter.default
            for name, parameter in inspect.signature(module.forward).parameters.items()
            if parameter.default is not inspect.Parameter.empty
        }
    for concrete in [defaults, None] if defaults else [None]:
        tracer = _Tracer()
        # As in `_Tracer.call_module`, whatever it raises means: not this way.
        with contextlib.suppress(Exception), _unchanged(module), _no_fast_path(), as_written():
            return tracer.trace(module, concrete_args=concrete), tracer.opaque
    return fx.Graph(), [module]


@contextlib.contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Undoes what a forward pass on stand-ins leaves in modules' attributes and buffers, and in the random state."""
    saved = [(m, dict(m.__dict__)) for m in module.modules()]
    containers = [(c, c.copy()) for _, own in saved for c in own.values() if isinstance(c, (dict, list, set))]
    buffers = [(b, version_of(b), b.detach().clone()) for b in module.buffers()]
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            for m, attributes in saved:
                m.__dict__.clear()
                m.__dict__.update(attributes)
            for container, entries in containers:
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(entries)
            for buffer, version, value in buffers:
                if version_of(buffer) != version:
                    with torch.no_grad():
                        buffer.copy_(value)


@contextlib.contextmanager
def _no_fast_path() -> Iterator[None]:
    """Transformer layers choose an inference path by the shapes of their input, which stand-ins do not have."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
