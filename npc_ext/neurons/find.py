"""Finds the neurons of a model: their parameters, and where in the model their activation is measured.

The model is traced symbolically (torch.fx); nothing is computed. From each weighted layer, a walk goes downstream
through normalization, activation, pooling and dropout. It ends at the last point where the tensor holds only the
neurons of this layer: before a flatten, an addition, a second consumer or an unknown operation. Parts of a model that
cannot be traced (control flow that depends on data) are searched child by child.

Two facts decide where to measure, and tests verify both. Before a normalization, activation times gradient adds up to
zero: before instance norm over the positions of each sample, so that the importance is zero except for rounding; before
batch norm over samples and positions; before layer and group norm over the channels that are normalized together. So
the point is always behind a normalization. Operations that are positively homogeneous within each channel (ReLU,
pooling, dropout) do not change the importance (Euler), so the points before and after them are equivalent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized

from .._names import close_to, listed
from .._torch import direct_parameters
from . import attention
from .graph import Graphs, NotMeasurableError, Place, is_measuring_relu
from .kinds import CONVOLUTIONS, NORMALIZATION, TRANSPOSED, is_linear, is_transposed_linear, is_weighted, torch_class
from .layer import PROJECTION, NeuronLayer, NeuronParameter, OtherParameter, TapPoint
from .table import Neurons

_TRAINABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# These treat a matrix as one sequence without a dimension of samples.
_TAKES_ONE_SEQUENCE = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_MOST_EXAMPLES = 3
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)


def find_neurons(
    model: nn.Module, *, measure_at: Mapping[str, str] | None = None, batch_dim: Mapping[str, int] | None = None
) -> Neurons:
    """Finds the neurons of a model and where to measure them. Computes nothing and changes nothing.

    Args:
        model: any module. Its Linear, Conv1d/2d/3d and ConvTranspose1d/2d/3d layers have neurons, and so have layers
            like GPT-2's Conv1D. The input projection of MultiheadAttention has the neurons of queries, keys and values,
            in this order.
        measure_at: layer name -> name of the module whose output holds the layer's activation. Default: the place that
            is found.
        batch_dim: layer name -> the dimension that counts samples (default 0; sequence-first transformers get 1).

    Returns:
        The layers with neurons, in the order of the model, and the other parameters.

    Raises:
        ValueError: there are no neurons; parameters are uninitialized or complex; a name in `measure_at` or
            `batch_dim` is not in the model; layers share a weight but count neurons along different dimensions.

    Example:
        >>> print(find_neurons(model))  # as `print(optimizer.neurons)`, without an optimizer
    """
    measure_at, batch_dim = dict(measure_at or {}), dict(batch_dim or {})
    modules: dict[str, Any] = dict(model.named_modules())
    usable, unusable = _layers(modules)
    projections = input_projections(model)
    weighted = {name: module for name, module in usable.items() if name not in projections}
    _check_options(measure_at, batch_dim, modules, weighted, projections)
    for owner in (name.rpartition(".")[0] for name in projections if name in usable):
        if reason := attention.why_not(modules[owner]):
            unusable[owner] = f"attention's input projection: {reason}"
            del usable[_join(owner, "in_proj")]
    search = _Search(modules, Graphs(model), {**_outputs_of_adapters(weighted, modules), **measure_at}, batch_dim)
    layers: list[NeuronLayer] = []
    for names in _by_weight(usable).values():
        try:
            layers.append(search.projection(names) if names[0] in projections else search.weighted_layer(names))
        except NotMeasurableError as reason:
            unusable[names[0]] = str(reason)
    position = {name: index for index, name in enumerate(modules)}
    layers.sort(key=lambda layer: position[layer.module])
    if not layers:
        raise ValueError(
            f"the model ({type(model).__name__}) has no neurons that can be measured: no Linear, Conv or ConvTranspose "
            f"layer{_listed(unusable)}"
        )
    in_neurons = {id(p.parameter) for layer in layers for p in layer.parameters}
    others = [
        OtherParameter(name, parameter, _why_other(name, modules, unusable))
        for name, parameter in model.named_parameters()
        if id(parameter) not in in_neurons
    ]
    return Neurons(layers, others)


def _check_options(
    measure_at: Mapping[str, str],
    batch_dim: Mapping[str, int],
    modules: Mapping[str, nn.Module],
    weighted: Mapping[str, nn.Module],
    projections: list[str],
) -> None:
    for name, target in measure_at.items():
        if name in projections:
            raise ValueError(
                f"measure_at names {name!r}, the input projection of attention, which is measured inside its module; "
                "expected another layer"
            )
        _check_name("measure_at", name, weighted)
        if not isinstance(target, str):
            raise TypeError(f"measure_at of {name!r} is {target!r}; expected the name of a module, as in 'norm1'")
        _check_name("measure_at", target, modules)
    for name, dim in batch_dim.items():
        _check_name("batch_dim", name, [*weighted, *projections])
        if dim not in (0, 1):
            raise ValueError(f"batch_dim of {name!r} is {dim!r}; expected 0 or 1")
    convolutions = [name for name, dim in batch_dim.items() if dim == 1 and name in weighted]
    convolutions = [name for name in convolutions if not is_linear(weighted[name])]
    if convolutions:
        entries = "".join(f"{name!r}: {{'batch_dim': 0}}, " for name in convolutions[:_MOST_EXAMPLES])
        raise ValueError(
            f"batch_dim is 1 for {listed(convolutions)}, but dimension 1 of a convolution's activation counts its "
            "neurons; expected 0. If a pattern in layers set it, add entries for the convolutions (or a pattern for "
            f"them, before the other one): layers={{{entries}...}}"
        )


def _check_name(option: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise ValueError(f"{option} names {name!r}, which is not in the model; {close_to(name, known)}")


def _listed(unusable: Mapping[str, str]) -> str:
    return "".join(f"; {name!r}: {reason}" for name, reason in unusable.items())


# ------------------------------------------------------------------------------------------------------------ weights


def _layers(modules: Mapping[str, nn.Module]) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The modules with neurons by their layers' names, and the reasons why the neurons of others cannot be used."""
    usable: dict[str, nn.Module] = {}
    unusable: dict[str, str] = {}
    for name, module in modules.items():
        for short, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, UninitializedParameter):
                raise ValueError(
                    f"parameter {_join(name, short)!r} is not initialized yet: pass one batch through the model first"
                )
            if parameter.is_complex():
                raise ValueError(
                    f"parameter {_join(name, short)!r} is complex ({parameter.dtype}); only real parameters can be "
                    "trained"
                )
        if not is_weighted(module) and not isinstance(module, nn.MultiheadAttention):
            continue
        if reason := _why_unusable(module):
            unusable[name] = reason
        else:
            usable[_layer_name(name, module)] = module
    return usable, unusable


def _weights(module: Any) -> dict[str, Any]:
    """The weights of a layer by their name in its module."""
    if not isinstance(module, nn.MultiheadAttention):
        return {"weight": direct_parameters(module).get("weight")}
    names = ["q_proj_weight", "k_proj_weight", "v_proj_weight"] if module.in_proj_weight is None else ["in_proj_weight"]
    return {name: getattr(module, name) for name in names}


def _why_unusable(module: nn.Module) -> str:
    """The reason why the weights of a layer cannot be trained; empty if they can."""
    weights = _weights(module).values()
    if is_parametrized(module) or not all(isinstance(weight, nn.Parameter) for weight in weights):
        return "its weight is computed from other parameters (a parametrization)"
    packed = next((weight.dtype for weight in weights if weight.dtype not in _TRAINABLE), None)
    return f"its weight is {packed}, packed or quantized" if packed else _why_other_shape(module)


def _why_other_shape(module: Any) -> str:
    """The reason why a weight does not have one element per connection, for example because it is packed.

    Empty if it has. The number of neurons may have changed since the module was built, because heads grow.
    """
    if isinstance(module, nn.MultiheadAttention):
        return ""
    shape = tuple(module.weight.shape)
    if isinstance(module, nn.Linear):
        is_expected = shape[1:] == (module.in_features,)
    elif isinstance(module, CONVOLUTIONS):
        is_expected = shape[1:] == (module.in_channels // module.groups, *module.kernel_size)
    elif isinstance(module, TRANSPOSED):
        is_expected = (*shape[:1], *shape[2:]) == (module.in_channels, *module.kernel_size)
    else:
        is_expected = True
    return "" if is_expected else f"its weight has the shape {shape}, which is not that of {module}"


def connections(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters of all layers with neurons, by the layer's name, including layers that cannot be measured.

    Layers are Linear, Conv, ConvTranspose and Conv1D whose weight is a parameter, and the input projections of
    attention.

    Raises:
        ValueError: there are no such layers; parameters are uninitialized or complex.
    """
    usable, unusable = _layers(dict(model.named_modules()))
    if not usable:
        raise ValueError(
            f"the model ({type(model).__name__}) has no Linear, Conv or ConvTranspose layer{_listed(unusable)}"
        )
    return {name: _parameters_of(module) for name, module in usable.items()}


def _parameters_of(module: nn.Module) -> list[nn.Parameter]:
    """The weights and biases of a layer; of attention, those of its input projection only."""
    if not isinstance(module, nn.MultiheadAttention):
        return list(module.parameters(recurse=False))
    return [p for p in (*_weights(module).values(), module.in_proj_bias) if p is not None]


def is_shared(weight: Tensor, model: nn.Module) -> bool:
    """Whether several modules of a model share a weight."""
    return sum(any(parameter is weight for parameter in direct_parameters(m).values()) for m in model.modules()) > 1


def _by_weight(usable: Mapping[str, nn.Module]) -> dict[tuple[bool, int], list[str]]:
    """The names of layers, grouped by the weight that they share."""
    groups: dict[tuple[bool, int], list[str]] = {}
    for name, module in usable.items():
        weight, *_ = _weights(module).values()
        groups.setdefault((isinstance(module, nn.MultiheadAttention), id(weight)), []).append(name)
    for names in groups.values():
        places = {name: _neuron_dim(usable[name]) for name in names}
        if len(set(places.values())) > 1:
            raise ValueError(
                f"layers {', '.join(map(repr, names))} share one weight but count their neurons along different "
                f"dimensions ({', '.join(str(dim) for dim, _ in places.values())}); a row of it cannot be a neuron "
                "of both: give them weights of their own"
            )
    return groups


def _neuron_dim(module: Any) -> tuple[int, int]:
    """The dimension of a weight that counts neurons, and the groups of a transposed convolution."""
    if isinstance(module, TRANSPOSED):
        return 1, module.groups
    return (1, 1) if is_transposed_linear(module) else (0, 1)


def input_projections(model: nn.Module) -> list[str]:
    """The names of the layers that are input projections of attention."""
    return [_layer_name(name, m) for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]


def _layer_name(name: str, module: nn.Module) -> str:
    return _join(name, "in_proj") if isinstance(module, nn.MultiheadAttention) else name


# ------------------------------------------------------------------------------------------------------------- layers


@dataclass
class _Search:
    """Makes the layers of a model.

    Attributes:
        modules: all modules of the model by name.
        graphs: the model's.
        measure_at: layer name -> name of the module at which to measure it, where that is given.
        batch_dim: layer name -> the dimension that counts samples, where that is given.
        claimed: ids of the parameters of weighted layers so far.
    """

    modules: Mapping[str, Any]
    graphs: Graphs
    measure_at: Mapping[str, str]
    batch_dim: Mapping[str, int]
    claimed: set[int] = field(default_factory=set)

    def weighted_layer(self, names: list[str]) -> NeuronLayer:
        """The layer whose weight the modules `names` share.

        Raises:
            NotMeasurableError: it cannot be measured.
        """
        found = {name: self._places(name) for name in names}
        weight = self.modules[names[0]].weight
        parameters = [NeuronParameter(_join(names[0], "weight"), weight, *_neuron_dim(self.modules[names[0]]))]
        self.claimed.add(id(weight))
        shape = (parameters[0].neurons,)
        for name, (_, scales) in found.items():
            others = [(_join(name, "bias"), getattr(self.modules[name], "bias", None))]
            for scale in scales:
                others += [(_join(scale, n), p) for n, p in self.modules[scale].named_parameters(recurse=False)]
            for full, parameter in others:
                if parameter is not None and id(parameter) not in self.claimed and parameter.shape == shape:
                    self.claimed.add(id(parameter))
                    parameters.append(NeuronParameter(full, parameter))
        points = [self._point(name, place) for name, (places, _) in found.items() for place in places]
        notes = [place.note for places, _ in found.values() for place in places if place.note]
        notes += _note_of_sharing(names)
        for name, module in self.modules.items():
            if isinstance(module, nn.Embedding) and module.weight is weight:
                notes.append(f"its weight is also the embedding {name}")
        return _layer(names[0], parameters, points, notes)

    def _places(self, name: str) -> tuple[list[Place], list[str]]:
        """Where to measure a module, and the modules whose scales belong to its neurons."""
        if name not in self.measure_at:
            return self.graphs.measuring_points(name)
        at = self.measure_at[name]
        if not self.graphs.leads_to(name, at):
            raise ValueError(
                f"measure_at of {name!r} is {at!r}, which comes before the layer or beside it; expected a module "
                "behind it, whose output holds the layer's activation"
            )
        # The scales of a normalization on the path belong to the neurons, wherever they are measured.
        scales: list[str] = []
        with contextlib.suppress(NotMeasurableError):
            _, scales = self.graphs.measuring_points(name)
        if torch_class(self.modules[at]) in NORMALIZATION:
            scales = [*scales, at]
        return [Place(at, "output", self.graphs.needs_copy(at))], scales

    def _point(self, name: str, place: Place) -> TapPoint:
        module = self.modules[name]
        channel_dim, batch_dim, unbatched_ndim = 1, 0, module.weight.ndim - 1
        if is_linear(module):
            channel_dim, batch_dim, unbatched_ndim = -1, self._samples_dim(name), 1
        if isinstance(self.modules[name.rpartition(".")[0]], _TAKES_ONE_SEQUENCE):
            unbatched_ndim = 2
        in_backward = place.where == "output" and not place.copy and is_measuring_relu(self.modules[place.module])
        return TapPoint(place.module, place.where, channel_dim, batch_dim, unbatched_ndim, place.copy, in_backward)

    def projection(self, names: list[str]) -> NeuronLayer:
        """The input projection whose weight the layers `names` share."""
        parameters: list[NeuronParameter] = []
        owners = [name.rpartition(".")[0] for name in names]
        for owner in owners:
            module, first = self.modules[owner], 0
            for short, parameter in {**_weights(module), "in_proj_bias": module.in_proj_bias}.items():
                if parameter is not None and all(parameter is not known.parameter for known in parameters):
                    rows = 0 if short == "in_proj_bias" else first
                    parameters.append(NeuronParameter(_join(owner, short), parameter, first=rows))
                    first += len(parameter)
        points = [
            TapPoint(owner, PROJECTION, -1, self._samples_dim(name), 2)
            for owner, name in zip(owners, names, strict=True)
        ]
        return _layer(names[0], parameters, points, _note_of_sharing(owners))

    def _samples_dim(self, name: str) -> int:
        """The dimension that counts samples: attention and transformer layers define it by `batch_first`."""
        if name in self.batch_dim:
            return self.batch_dim[name]
        parts = name.split(".")
        for end in range(len(parts), -1, -1):
            module = self.modules.get(".".join(parts[:end]))
            attention = getattr(module, "self_attn", module)
            if isinstance(attention, nn.MultiheadAttention):
                return 0 if attention.batch_first else 1
        return 0


def _layer(name: str, parameters: list[NeuronParameter], points: list[TapPoint], notes: list[str]) -> NeuronLayer:
    weights = [p for p in parameters if p.parameter.ndim > 1]
    neurons = sum(p.neurons for p in weights)
    fan_in = sum(p.parameter.numel() for p in weights) // max(neurons, 1)
    # The values of the sink are never read, so they are one number in memory.
    sink = torch.zeros((), dtype=torch.float32, device=weights[0].parameter.device).expand(neurons).requires_grad_()
    unique_points, note = tuple(dict.fromkeys(points)), "; ".join(dict.fromkeys(notes))
    return NeuronLayer(name, neurons, fan_in, tuple(parameters), unique_points, note, sink)


def _note_of_sharing(names: list[str]) -> list[str]:
    others = ", ".join(names[1:])
    return [f"its weight is shared with {others}; importance adds up over all of them"] if others else []


def _outputs_of_adapters(weighted: Mapping[str, nn.Module], modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Layer -> module for the second factors of low-rank adapters (PEFT's LoRA), y = W x + B A x.

    The rows of B are the output neurons. Their activation is y, not the output of B, which is zero at first.
    """
    found = {}
    for name in weighted:
        owner, _, rest = name.rpartition(".lora_B.")
        if owner and "." not in rest and all(hasattr(modules[owner], part) for part in ("base_layer", "lora_A")):
            found[name] = owner
    return found


def _why_other(name: str, modules: Mapping[str, nn.Module], unusable: Mapping[str, str]) -> str:
    owner, _, short = name.rpartition(".")
    for layer, reason in unusable.items():
        if owner == layer or owner.startswith(_join(layer, "parametrizations")):
            return reason
    module = modules[owner]
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding"
    if isinstance(module, _RECURRENT):
        return "recurrent layer: its activations within the sequence cannot be measured"
    if isinstance(module, nn.MultiheadAttention):
        return "a key and a value that attention adds to every sequence"
    if torch_class(module) in NORMALIZATION:
        return "normalization that follows no single layer's neurons"
    return f"{short} of a {type(module).__name__}, which is not a Linear, Conv or ConvTranspose layer"


def _join(owner: str, name: str) -> str:
    return f"{owner}.{name}" if owner else name
