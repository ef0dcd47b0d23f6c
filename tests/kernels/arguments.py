"""Arguments of operations by the names of their columns, for single parameters and for a small network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from npc_ext import reference

Arguments = dict[str, Any]
# The arguments that an update may change.
WRITTEN = (
    *("parameters", "momentum_buffers", "first_moments", "second_moments", "steps", "paths"),
    *("importances", "nonfinite_steps"),
)
LIKE_PARAMETERS = (
    *("parameters", "gradients", "momentum_buffers", "first_moments", "second_moments"),
    *("stiffness", "anchors", "paths"),
)


def call(operation: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Calls an operation with its arguments in groups. Fields that are not given have their defaults."""
    rest, groups = dict(arguments), {}
    for name, hint in get_type_hints(operation).items():
        if fields := [field for field in getattr(hint, "_fields", ()) if field in rest]:
            groups[name] = hint(**{field: rest.pop(field) for field in fields})
        elif name in rest:
            groups[name] = rest.pop(name)
    assert not rest, f"{', '.join(rest)} are no arguments"
    return operation(**groups)


def names_of(operation: str) -> list[str]:
    """The names of the arguments of `torch.ops.npc_ext.<operation>`."""
    return [argument.name for argument in getattr(torch.ops.npc_ext, operation).default._schema.arguments]


def flat(operation: str, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """The arguments of `torch.ops.npc_ext.<operation>`."""
    values = {"first_neuron": None, "steps": [], "seeds": [], "grad_scale": None, "found_inf": None, **arguments}
    of_lists = {
        name: [torch.empty(0) if tensor is None else tensor for tensor in value]
        for name, value in values.items()
        if isinstance(value, list)
    }
    return tuple({**values, **of_lists}[name] for name in names_of(operation))


def copied(arguments: Arguments, double: bool = False) -> Arguments:
    def copy(value: Any) -> Any:
        if isinstance(value, list):
            return [copy(tensor) for tensor in value]
        if not isinstance(value, Tensor):
            return value
        return value.to(torch.float64, copy=True) if double and value.is_floating_point() else value.clone()

    return {name: copy(value) for name, value in arguments.items()}


def exact(arguments: Arguments) -> Arguments:
    """The same in float64."""
    return copied(arguments, double=True)


def tensors(
    shapes: Iterable[tuple[int, ...]], dtype: torch.dtype = torch.float32, device: str = "cpu", last: bool = False
) -> list[Tensor]:
    """Random tensors. On request, those of four dimensions have channels last."""
    made = [torch.randn(shape).to(device, dtype) for shape in shapes]
    return [t.contiguous(memory_format=torch.channels_last) if last and t.ndim == 4 else t for t in made]


def at_offset(tensor: Tensor, offset: int) -> Tensor:
    """A copy that begins `offset` elements after the start of its memory."""
    gap = torch.zeros(offset, dtype=tensor.dtype, device=tensor.device)
    return torch.cat([gap, tensor.flatten()])[offset:].view(tensor.shape)


def columns(count: int, **values: Any) -> Arguments:
    """Columns with the same value for `count` parameters or layers."""
    return {name: [value] * count for name, value in values.items()}


def sgd(count: int, lr: float = 0.1, **options: Any) -> Arguments:
    """SGD's options, the same for `count` parameters."""
    defaults = {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0, "maximize": False}
    return columns(count, lr=lr, **{**defaults, **options})


def adam(count: int, lr: float = 0.01, weight_decay: float = 0.01) -> Arguments:
    """Adam's options, the same for `count` parameters."""
    decays = {"first_decay": 0.9, "second_decay": 0.999, "weight_decay": weight_decay}
    return columns(count, lr=lr, **decays, epsilon=1e-8, maximize=False)


def plasticity(layers: int, **constants: Any) -> Arguments:
    """Constants, the same for all layers."""
    defaults = {"alpha": 0.5, "beta": 0.5, "delta": 0.99, "sigma": "sigmoid", "active_only": False}
    return columns(layers, **{**defaults, **constants})


def no_nonfinite_steps(layers: int, device: str = "cpu") -> Tensor:
    return torch.zeros(layers, dtype=torch.int64, device=device)


def placement(count: int, layer: int = 0) -> Arguments:
    """Parameters that belong to one layer, with neurons in their first dimension, or (-1) to none."""
    return columns(count, layer=layer, neuron_dim=0, groups=1)


def no_layers(count: int, device: str = "cpu") -> Arguments:
    """Arguments that say that `count` parameters are in no layer."""
    nothing = {"importances": [], "measured": [], "nonfinite_steps": no_nonfinite_steps(0, device)}
    return {**nothing, **placement(count, -1), **plasticity(0)}


def one_layer(
    importance: Tensor, parameters: list[Tensor], gradients: list[Tensor], measured: Tensor | None = None
) -> Arguments:
    """A layer, its parameters and the paper's constants; options are missing."""
    return {
        "parameters": parameters,
        "gradients": gradients,
        "importances": [importance],
        "measured": [measured],
        "nonfinite_steps": no_nonfinite_steps(1, str(importance.device)),
        **placement(len(parameters)),
        **plasticity(1),
    }


class Placed(NamedTuple):
    """A parameter of a network. Updates that know no neurons ignore its place."""

    shape: tuple[int, ...]
    layer: int = -1
    neuron_dim: int = 0
    groups: int = 1


LAYERS = (10, 64, 12, 33, 1)  # neurons
PARAMETERS = [
    Placed((10, 7), 0),
    Placed((10,), 0),
    Placed((64, 3, 3, 3), 1),
    Placed((64,), 1),
    Placed((6, 4, 3, 3), 2, neuron_dim=1, groups=3),
    Placed((12,), 2),
    Placed((5, 33, 3), 3, neuron_dim=1),
    Placed((33, 400), 3),
    Placed((1, 70), 4),
    Placed((100,)),
    Placed((7, 9)),
    Placed((10, 0), 0),
    Placed(()),
]
DIVISIBLE = PARAMETERS[:-1]  # all that have rows


def several_layers(layers: int, each: int) -> Arguments:
    """A network of layers of 4 neurons with `each` parameters each, and 3 parameters of no layer."""
    placed = [Placed((4, 5), index) for index in range(layers) for _ in range(each)]
    return {"layers": [4] * layers, "parameters": [*placed, *[Placed((4, 5))] * 3]}


# On CUDA, layers above 4,096 neurons have their importance summed once, before the update (csrc/cuda/wide.h).
MANY_NEURONS = (4096, 4097, 6000)


def wide_layers(neurons: int, inputs: int = 1) -> Arguments:
    """A network of a layer of many neurons, one of few, and one of many that has no parameters."""
    placed = [Placed((neurons, inputs), 0), Placed((3, 5), 1), Placed((neurons,), 0), Placed((7,))]
    return {"layers": [neurons, 3, neurons + 1], "parameters": placed}


def network(
    operation: str,
    dtype: torch.dtype = torch.float32,
    *,
    layers: Sequence[int] = LAYERS,
    parameters: Sequence[Placed] = PARAMETERS,
    sigma: str = "sigmoid",
    active_only: bool = False,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    maximize: bool = False,
    steps: int = 3,
    stochastic_rounding: bool = False,
    anchors: bool = True,
    paths: bool = True,
    implicit: bool = True,
    grad_scale: float | None = None,
    channels_last: bool = False,
    device: str = "cpu",
) -> Arguments:
    """Arguments of an update for a small network with every kind of parameter; many neurons are frozen.

    The second parameter has neither an anchor nor a path. Steps are counted for Adam and for stochastic rounding.
    """
    count, shapes = len(parameters), [parameter.shape for parameter in parameters]
    make = partial(tensors, shapes, device=device, last=channels_last)
    real = reference.compute_dtype(dtype)
    measured = [torch.rand(neurons).to(device) * 100 for neurons in layers]
    for sums in measured:
        sums[1::3] = -0.0  # received no gradient
        sums[4::9] = 0  # received gradients, which sum to zero
    importances: list[Tensor | None] = [torch.rand(neurons).to(device) * 0.75 for neurons in layers]

    def repeated(*values: float) -> list[float]:
        return [values[layer % len(values)] for layer in range(len(layers))]

    def only(wanted: bool) -> list[Tensor | None]:
        return [values if wanted and at != 1 else None for at, values in enumerate(make(real))]

    arguments = {
        "parameters": make(dtype),
        "gradients": make(dtype),
        "momentum_buffers": make(dtype),
        "first_moments": make(real),
        "second_moments": [moment.square() for moment in make(real)],
        "steps": [torch.tensor(float(steps), device=device) for _ in parameters],
        "seeds": list(range(count)) if stochastic_rounding else [],
        "stiffness": [None if stiff is None else stiff.abs() for stiff in only(anchors)],
        "anchors": only(anchors),
        "paths": only(paths),
        "strength": [0.1 + 0.05 * index for index in range(count)],
        "implicit": [implicit] * count,
        "importances": importances,
        "measured": measured,
        "nonfinite_steps": no_nonfinite_steps(len(layers), device),
        "layer": [parameter.layer for parameter in parameters],
        "neuron_dim": [parameter.neuron_dim for parameter in parameters],
        "groups": [parameter.groups for parameter in parameters],
        **sgd(count, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, maximize=maximize),
        "lr": [0.1 + 0.01 * index for index in range(count)],
        "first_decay": [*[0.9] * (count - 1), 0.0],
        "second_decay": [*[0.999] * (count - 1), 0.5],
        "epsilon": [*[1e-8] * (count - 1), 1e-3],
        **plasticity(len(layers), sigma=sigma, active_only=active_only),
        "alpha": repeated(0.5, 0.4, 0.6, 0.5, 0.5),
        "beta": repeated(0.5, 0.6, 0.5, 0.4, 0.5),
        "delta": repeated(0.5, 0.9, 0.0, 0.98, 0.99),
        "grad_scale": None if grad_scale is None else torch.tensor(grad_scale, device=device),
        "found_inf": None,
    }
    if operation == "adam_update_":
        arguments["lr"] = [0.01 + 0.001 * index for index in range(count)]
    elif not stochastic_rounding:
        del arguments["steps"], arguments["seeds"]
    if operation == "connection_update_":
        arguments["gradients"][0].view(-1)[:20] = 0
        averages = zip(make(), parameters, strict=True)
        arguments["importances"] = [average.abs() if placed.layer >= 0 else None for average, placed in averages]
    names = names_of(operation)
    return {name: value for name, value in arguments.items() if name in names}


def activations(
    shapes: Sequence[tuple[int, ...]] = ((4, 10), (4, 64, 5, 5), (4, 12, 3, 3), (4, 7, 33), (4, 1)),
    channel_dim: Sequence[int] = (1, 1, 1, -1, 1),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Arguments:
    """What `network_step_` takes instead of measured sums, by default for the layers in `LAYERS`."""
    return {
        "activations": tensors(shapes, dtype, device),
        "activation_gradients": tensors(shapes, dtype, device),
        "channel_dim": list(channel_dim),
        "batch_dim": [0] * len(shapes),
    }


def shard_of(arguments: Arguments, rank: int, processes: int) -> Arguments:
    """What one of several processes holds of the network of `DIVISIBLE` parameters.

    Views of blocks of their rows, some of them empty, and copies of everything else.
    """
    split = {name: list(arguments[name]) for name in LIKE_PARAMETERS if name in arguments}
    shard = {**copied({name: value for name, value in arguments.items() if name not in split}), **split}
    shard["first_neuron"] = [0] * len(DIVISIBLE)
    for index, (shape, layer, neuron_dim, groups) in enumerate(DIVISIBLE):
        rows = -(-shape[0] // processes)
        first = min(rank * rows, shape[0])
        if groups > 1:  # cannot be divided: one process has it all
            first, rows = (0, shape[0]) if rank == 0 else (shape[0], 0)
            shard["layer"][index] = -1 if rank else layer
        for name in split:
            shard[name][index] = shard[name][index][first : first + rows]
        shard["first_neuron"][index] = first if neuron_dim == 0 and groups == 1 else 0
    return shard
