"""Finds the neurons of a model: their parameters, and where in the model their activation is measured.

The model is traced symbolically (torch.fx); nothing is computed. From each weighted layer, a walk goes
downstream through normalization, activation, pooling and dropout. It ends at the last point at which
the tensor still holds the neurons of this layer only: before a flatten, an addition, a second consumer
or an unknown operation. Parts of a model that cannot be traced (control flow that depends on data) are
searched child by child.

Two facts decide between points, and tests prove both. Before a normalization the importance is zero
except for rounding, so the point is always behind it. Operations that are positively homogeneous within
each channel (ReLU, pooling, dropout) do not change the importance (Euler), so the points before and
after them are equivalent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized

from .._names import close_to
from .._torch import own_parameters
from . import attention
from .graph import Graphs, is_measuring_relu
from .kinds import CONVOLUTIONS, NORMALIZATION, TRANSPOSED, is_linear, is_transposed_linear, is_weighted, torch_class
from .layer import PROJECTION, NeuronLayer, NeuronParameter, OtherParameter, TapPoint
from .table import Neurons

_TRAINABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# For these, a matrix is one sequence without a dimension of samples.
_TAKES_ONE_SEQUENCE = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)


def find_neurons(
    model: nn.Module, *, measure_at: Mapping[str, str] | None = None, batch_dim: Mapping[str, int] | None = None
) -> Neurons:
    """Finds the neurons of a model and where to measure them. Computes nothing and changes nothing.

    Args:
        model: any module. Its Linear, Conv1d/2d/3d and ConvTranspose1d/2d/3d layers have neurons, and also layers like
            GPT-2's Conv1D. The input projection of MultiheadAttention has the neurons of queries, keys and values, in
            this order.
        measure_at: layer name -> name of the module whose output holds the layer's activation, instead of the place
            that is found.
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
    graphs = Graphs(model)
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
    """The layers with neurons, and those whose neurons cannot be used, with the reason."""
    weighted: dict[str, nn.Module] = {}
    unusable: dict[str, str] = {}
    for name, module in modules.items():
        for short, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{short}".lstrip(".")
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


def _why_packed(module: Any) -> str:
    """The reason why a weight does not have one element per connection, for example because it is packed.

    Empty if it has. The number of neurons may have changed since the module was built, because heads grow.
    """
    weight = module.weight
    if weight.dtype not in _TRAINABLE:
        return f"its weight is {weight.dtype}, packed or quantized"
    expected: tuple[int, ...]
    if isinstance(module, nn.Linear):
        expected, got = (module.in_features,), tuple(weight.shape[1:])
    elif isinstance(module, CONVOLUTIONS):
        expected, got = (module.in_channels // module.groups, *module.kernel_size), tuple(weight.shape[1:])
    elif isinstance(module, TRANSPOSED):
        expected, got = (module.in_channels, *module.kernel_size), (*weight.shape[:1], *weight.shape[2:])
    else:
        return ""
    return "" if got == expected else f"its weight has the shape {tuple(weight.shape)}, which is not that of {module}"


def connections(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters of all layers with neurons, by the layer's name, whether or not they can be measured.

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
            parameters = (getattr(module, short) for short in (*_projection_weights(module), "in_proj_bias"))
            found[_join(name, "in_proj")] = [parameter for parameter in parameters if parameter is not None]
    if not found:
        reasons = "".join(f"; {name!r}: {reason}" for name, reason in unusable.items())
        raise ValueError(f"the model ({type(model).__name__}) has no Linear, Conv or ConvTranspose layer{reasons}")
    return found


def is_shared(weight: Tensor, model: nn.Module) -> bool:
    """Whether several modules of a model share a weight."""
    return sum(any(parameter is weight for parameter in own_parameters(m).values()) for m in model.modules()) > 1


def _by_weight(weighted: Mapping[str, nn.Module]) -> dict[int, list[str]]:
    """The names of layers, grouped by the weight that they share."""
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
    if isinstance(module, TRANSPOSED):
        return module.out_channels, 1, module.groups
    if is_transposed_linear(module):
        return module.weight.shape[1], 1, 1
    return module.weight.shape[0], 0, 1


def _layer(
    names: list[str],
    modules: Mapping[str, nn.Module],
    graphs: Graphs,
    measure_at: Mapping[str, str],
    batch_dim: Mapping[str, int],
    claimed: Mapping[int, str],
) -> NeuronLayer | str:
    """The layer whose weight the modules `names` share, or the reason why it cannot be measured."""
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
            # A normalization on the path belongs to the neurons, wherever they are measured.
            _, scales, _ = graphs.measuring_points(name)
            if torch_class(modules[measure_at[name]]) in NORMALIZATION:
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
            in_backward = where == "output" and not copy and is_measuring_relu(modules[at])
            points.append(TapPoint(at, where, channel_dim, samples, unbatched, copy, in_backward))
        others = [(_join(name, "bias"), getattr(module, "bias", None))]
        others += [(_join(scale, n), p) for scale in scales for n, p in modules[scale].named_parameters(recurse=False)]
        for full, parameter in others:
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
    """A leaf (N,). Its values are never read, so they are one number in memory."""
    return torch.zeros((), dtype=torch.float32, device=device).expand(neurons).requires_grad_()


def input_projections(model: nn.Module) -> list[str]:
    """The names of the layers that are input projections of attention."""
    return [_join(name, "in_proj") for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]


def _by_projection(
    projections: list[str], modules: Mapping[str, nn.Module], unusable: dict[str, str]
) -> dict[int, list[str]]:
    """The names of attention modules, grouped by the weight of their input projection. Adds to `unusable`."""
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
    """The reason why the weights of an input projection cannot be trained; empty if they can."""
    weights = [getattr(module, name) for name in _projection_weights(module)]
    if is_parametrized(module) or not all(isinstance(weight, nn.Parameter) for weight in weights):
        return "its weight is computed from other parameters (a parametrization)"
    packed = next((weight for weight in weights if weight.dtype not in _TRAINABLE), None)
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
        points.append(TapPoint(name, PROJECTION, -1, samples, 2))
        first = 0
        for short in (*_projection_weights(module), "in_proj_bias"):
            parameter = getattr(module, short)
            if parameter is not None and all(parameter is not known.parameter for known in parameters):
                rows = 0 if short == "in_proj_bias" else first
                parameters.append(NeuronParameter(_join(name, short), parameter, first=rows))
                first += len(parameter)
    weights = [p for p in parameters if p.parameter.ndim == 2]
    neurons = sum(len(p.parameter) for p in weights)
    fan_in = sum(p.parameter.numel() for p in weights) // max(neurons, 1)
    sink = _sink(neurons, weights[0].parameter.device)
    note = f"its weight is shared with {', '.join(names[1:])}; importance adds up over all of them" if names[1:] else ""
    return NeuronLayer(_join(names[0], "in_proj"), neurons, fan_in, tuple(parameters), tuple(points), note, sink)


def _outputs_of_adapters(weighted: Mapping[str, nn.Module], modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Layer -> module for the second factors of low-rank adapters (LoRA as in PEFT), y = W x + B A x.

    The rows of B are the output neurons. Their activation is y, not the output of B, which is zero at first.
    """
    found = {}
    for name in weighted:
        owner, _, rest = name.rpartition(".lora_B.")
        if owner and "." not in rest and all(hasattr(modules[owner], part) for part in ("base_layer", "lora_A")):
            found[name] = owner
    return found


def _samples_dim(name: str, modules: Mapping[str, nn.Module]) -> int:
    """The dimension that counts samples: attention and transformer layers define it by `batch_first`."""
    parts = name.split(".")
    for end in range(len(parts), -1, -1):
        module = modules.get(".".join(parts[:end]))
        attention = getattr(module, "self_attn", module)
        if isinstance(attention, nn.MultiheadAttention):
            return 0 if attention.batch_first else 1
    return 0


def _why_other(name: str, modules: Mapping[str, nn.Module], unusable: Mapping[str, str]) -> str:
    owner, _, short = name.rpartition(".")
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
    if torch_class(module) in NORMALIZATION:
        return "normalization that follows no single layer's neurons"
    return f"{short} of a {type(module).__name__}, which is no Linear, Conv or ConvTranspose"


def _check_name(option: str, name: str, known: list[str]) -> None:
    if name in known:
        return
    raise ValueError(f"{option} names {name!r}, which is not in the model; {close_to(name, known)}")


def _join(owner: str, name: str) -> str:
    return f"{owner}.{name}" if owner else name
