"""Where tensors become addresses: the only module that knows both torch and the compiled kernels, on CPU and CUDA.

Every tensor is held by its caller until the launch has returned, and every tensor that a launch writes gets its
version counter raised, so that autograd notices. Callers (npc_ext.ops) have checked shapes; what is checked here is
what the kernels themselves assume: device, dtype and memory layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torch import current_raw_stream
from ..columns import (
    NO_LAYERS,
    NO_SCALER,
    NO_STEPS,
    Activations,
    AdamNetwork,
    Anchors,
    Connections,
    Layers,
    Network,
    Placement,
    Scaler,
    Steps,
)
from ..reference import compute_dtype
from . import native

DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
_CUDA_DTYPES = {torch.float32, torch.float16, torch.bfloat16}


def supports(tensor: Tensor) -> bool:
    """Whether there is a compiled kernel for this tensor: on CPU or CUDA, dense, in a dtype that it takes there."""
    if tensor.is_sparse:
        return False
    return tensor.dtype in DTYPES if tensor.is_cpu else tensor.is_cuda and tensor.dtype in _CUDA_DTYPES


@lru_cache(maxsize=64)
def _threads(count: int) -> Any:
    return native.module().cpu.Threads(count)


@lru_cache(maxsize=1024)
def _on_stream(device: int, stream: int) -> tuple[Any, Any]:
    """The CUDA kernels for a GPU, and one of its streams as they take it."""
    cuda = native.module_on(device).cuda
    return cuda, cuda.Stream(device, stream)


def _module(device: torch.device) -> Any:
    """The module whose kernels run on a device."""
    return native.module() if device.type == "cpu" else native.module_on(device.index)


def _launch(kernel: str, device: torch.device, *arguments: Any) -> None:
    """Calls a kernel of the compiled module where `device` runs it."""
    if device.type == "cpu":
        getattr(native.module().cpu, kernel)(_threads(torch.get_num_threads()), *arguments)
        return
    # The current stream is asked for at every launch and never remembered.
    cuda, target = _on_stream(device.index, current_raw_stream(device.index))
    getattr(cuda, kernel)(target, *arguments)


def importance(activation: Tensor, gradient: Tensor, channel_dim: int = 1, batch_dim: int = 0) -> Tensor:
    """Launches eq. 2; see `npc_ext.ops.importance`."""
    return _importance(activation, gradient, channel_dim, batch_dim, 0)


def has_relu_backward(tensor: Tensor) -> bool:
    """Whether there is a kernel for `relu_backward_importance` where the tensor is."""
    return tensor.is_cuda


def relu_backward_importance(
    output: Tensor, gradient: Tensor, channel_dim: int = 1, batch_dim: int = 0
) -> tuple[Tensor, Tensor]:
    """Launches eq. 2 with the backward pass of ReLU, on CUDA; see `npc_ext.ops.relu_backward_importance`."""
    gradient_in = torch.empty_like(output)
    if gradient_in.stride() != output.stride():  # `empty_like` does not keep gaps or overlaps
        output = output.contiguous()
        gradient_in = torch.empty_like(output)
    return gradient_in, _importance(output, gradient, channel_dim, batch_dim, gradient_in.data_ptr())


def _importance(activation: Tensor, gradient: Tensor, channel_dim: int, batch_dim: int, gradient_in: int) -> Tensor:
    shape, device = activation.shape, activation.device
    out = torch.empty(shape[channel_dim], dtype=compute_dtype(activation.dtype), device=device)
    if activation.numel() == 0:
        return out.fill_(-0.0)
    _launch(
        "importance",
        device,
        activation.data_ptr(),
        gradient.data_ptr(),
        out.data_ptr(),
        gradient_in,
        DTYPES[activation.dtype],
        shape,
        activation.stride(),
        gradient.stride(),
        channel_dim % len(shape),
        batch_dim % len(shape),
    )
    return out


@lru_cache(maxsize=4096)
def geometry(shape: tuple[int, ...], stride: tuple[int, ...], neuron_dim: int, groups: int) -> tuple[int, int, int]:
    """How a parameter's memory falls into runs of one neuron each: (outer, middle, run), as csrc/api.h defines them.

    Raises ValueError for memory with gaps or overlaps, and for groups that are not outermost in memory.
    """
    if 0 in shape or not shape:
        return 1, 1, 1
    order = sorted((dim for dim in range(len(shape)) if shape[dim] != 1), key=lambda dim: -stride[dim])
    expected = 1
    for dim in reversed(order):
        if stride[dim] != expected:
            raise ValueError(
                f"a parameter of shape {tuple(shape)} has strides {tuple(stride)}, which leave gaps or overlap; "
                "it must fill its memory: replace its data by .contiguous()"
            )
        expected *= shape[dim]
    if groups > 1 and shape[0] > 1 and order[0] != 0:
        raise ValueError(
            f"a parameter of shape {tuple(shape)} with {groups} groups has strides {tuple(stride)}; its groups must be "
            "outermost in memory: replace its data by .contiguous()"
        )
    outer = run = 1
    before = True
    for dim in order:
        if dim == neuron_dim:
            before = False
        elif before:
            outer *= shape[dim]
        else:
            run *= shape[dim]
    if shape[neuron_dim] == 1:
        # Left out of the order above, where its place does not matter: one neuron (per group) owns all.
        outer, run = (groups, outer * run // groups) if groups > 1 else (1, outer * run)
    return outer // groups, shape[neuron_dim], run


def in_memory_order_of(parameter: Tensor, tensor: Tensor) -> Tensor:
    """`tensor` itself if its elements lie in memory like the parameter's, else a copy of it that does."""
    if tensor.stride() == parameter.stride():
        return tensor
    return torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False).copy_(tensor)


class Prepared:
    """A network's parameters and layers as the kernels take them: sizes, layouts and options, read once.

    They stay valid while the parameters keep their memory, shape, dtype and order; the caller holds the parameters.
    Two launches at the same time, from several threads, need an object each.

    Args:
        device: where the network is.
        parameters: the network's.
        neurons: how many each layer has, as far as layers have importances of neurons.
        groups: groups of columns (`npc_ext.columns`). Parameters are outside of all layers if they do not say
            otherwise. Learning rates may be tensors in device memory.
        counted_at: for each layer the element of `nonfinite_steps` that counts for it; by default its own index.
    """

    def __init__(
        self,
        device: torch.device,
        parameters: Sequence[Tensor],
        neurons: Sequence[int],
        *groups: NamedTuple,
        counted_at: Sequence[int] | None = None,
    ) -> None:
        columns = _columns_of(parameters, neurons, groups)
        rates, momentum = columns["lr"], columns["momentum"]
        columns["lr"] = list(map(_rate_in_column, rates))
        self.neurons = columns["neurons"]
        # A rate in device memory is read there, so that a CUDA graph's replays see it change.
        self.lr_tensors = [rate for rate in rates if isinstance(rate, Tensor)]  # held while their addresses are
        module = _module(device)
        self.network = module.Network(
            [parameter.data_ptr() for parameter in parameters],
            [rate.data_ptr() if isinstance(rate, Tensor) else 0 for rate in rates] if self.lr_tensors else [],
            len(self.neurons),
            {name: columns[name] for name in module.COLUMNS if name in columns},
        )
        self.has_momentum = [value != 0 for value in momentum]
        self.any_momentum = any(self.has_momentum)
        self._checked: dict[str, list[int]] = {}  # the addresses of tensors that were checked, by what they are
        self._counted_at = counted_at
        self._counters_of, self._counters = 0, list[int]()  # the address of `nonfinite_steps`, and of each counter

    def take_options(self, columns: Mapping[str, Sequence[Any]]) -> None:
        """Takes over other options. Rates in device memory stay the same tensors; a momentum of 0 stays 0."""
        if "lr" in columns:
            columns = {**columns, "lr": list(map(_rate_in_column, columns["lr"]))}
        self.network.set_columns(columns)

    def addresses(
        self, name: str, tensors: Sequence[Tensor | None], check: Callable[..., None], *expected: Any
    ) -> list[int]:
        """The addresses of tensors; 0 where there is none.

        They are checked (by their name, index and what is expected) whenever their addresses are others than those that
        were checked before.
        """
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        if addresses != self._checked.get(name):
            for index, tensor in enumerate(tensors):
                if tensor is not None:
                    check(name, index, tensor, *expected)
            self._checked[name] = addresses
        return addresses

    def counters(self, nonfinite_steps: Tensor) -> list[int]:
        """The address of each layer's counter."""
        start = nonfinite_steps.data_ptr()
        if start != self._counters_of or not start:
            if nonfinite_steps.dtype is not torch.int64 or not nonfinite_steps.is_contiguous():
                raise ValueError(f"nonfinite_steps is {_described(nonfinite_steps)}; expected contiguous int64")
            places = range(nonfinite_steps.numel()) if self._counted_at is None else self._counted_at
            self._counters = [start + nonfinite_steps.element_size() * at for at in places]
            self._counters_of = start
        return self._counters


def _columns_of(parameters: Sequence[Tensor], neurons: Sequence[int], groups: Iterable[NamedTuple]) -> dict[str, Any]:
    """The columns of numbers, by name, from the arguments of `Prepared`."""
    count = len(parameters)
    columns: dict[str, Any] = {**NO_LAYERS._asdict(), **Placement.of_layers([-1] * count)._asdict()}
    columns |= {"momentum": [0.0] * count, "nesterov": [False] * count}
    for group in groups:
        columns |= group._asdict()
    columns["neurons"] = neurons or [0] * len(columns["alpha"])
    columns["sigma"] = [sigma == "erf" for sigma in columns["sigma"]]
    columns["first_neuron"] = columns["first_neuron"] or [0] * count
    columns["dtype"] = [DTYPES[parameter.dtype] for parameter in parameters]
    columns["size"] = list(map(Tensor.numel, parameters))
    places = zip(parameters, columns["neuron_dim"], columns["groups"], strict=True)
    geometries = [geometry(p.shape, p.stride(), dim, groups) for p, dim, groups in places]
    return columns | {name: [sizes[at] for sizes in geometries] for at, name in enumerate(("outer", "middle", "run"))}


def _check_like_parameter(
    name: str,
    index: int,
    tensor: Tensor,
    parameters: Sequence[Tensor],
    dtype_of: Callable[[torch.dtype], torch.dtype],
) -> None:
    """Raises ValueError unless a tensor lies in memory like its parameter."""
    like, dtype, stride = parameters[index], dtype_of(parameters[index].dtype), parameters[index].stride()
    fits = tensor.dtype is dtype and tensor.device == like.device and tensor.numel() == like.numel()
    if not fits or tensor.stride() != stride:
        raise ValueError(
            f"{name}[{index}] is {_described(tensor)}; expected {dtype} of shape {tuple(like.shape)} with strides "
            f"{stride} on {like.device}"
        )


def _check_of_layer(name: str, index: int, tensor: Tensor, neurons: Sequence[int], device: torch.device) -> None:
    """Raises ValueError unless a tensor has a number for each neuron of its layer."""
    fits = tensor.dtype is torch.float32 and tensor.numel() == neurons[index] and tensor.device == device
    if not fits or not tensor.is_contiguous():
        raise ValueError(
            f"{name}[{index}] is {_described(tensor)}; expected contiguous float32 of shape ({neurons[index]},) on "
            f"{device}"
        )


def _check_count(name: str, index: int, tensor: Tensor, device: torch.device) -> None:
    if tensor.dtype is not torch.float32 or tensor.numel() != 1 or tensor.device != device:
        raise ValueError(f"{name}[{index}] is {_described(tensor)}; expected one float32 on {device}")


def _rate_in_column(lr: float | Tensor) -> float:
    return 0.0 if isinstance(lr, Tensor) else lr


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"


def _of_gradients(
    prepared: Prepared,
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor | None],
    flags: Sequence[Tensor | None],
) -> tuple[Any, ...]:
    """The arguments that updates begin with."""
    momentum: list[int] = []
    if prepared.any_momentum:
        buffers = [buffer if has else None for buffer, has in zip(momentum_buffers, prepared.has_momentum, strict=True)]
        momentum = prepared.addresses("momentum_buffers", buffers, _check_like_parameter, parameters, _same)
    return prepared.network, [gradient.data_ptr() for gradient in gradients], momentum, *map(_address, flags)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _same(dtype: torch.dtype) -> torch.dtype:
    return dtype


def _float32(dtype: torch.dtype) -> torch.dtype:
    return torch.float32


def _of_layers(prepared: Prepared, layers: Layers) -> tuple[list[int], list[int]]:
    """The arguments about layers of updates that have a rate for every neuron."""
    averages, counts = layers.importances, layers.nonfinite_steps
    addresses = prepared.addresses("importances", averages, _check_of_layer, prepared.neurons, counts.device)
    return addresses, prepared.counters(counts)


def _of_measured(prepared: Prepared, measured: Sequence[Tensor | None], device: torch.device) -> list[int]:
    # Autograd accepts gradients of a sink only in its dtype and shape, and on its device.
    for index, sums in enumerate(measured):
        if sums is not None and not sums.is_contiguous():
            _check_of_layer("measured", index, sums, prepared.neurons, device)
    return [0 if sums is None else sums.data_ptr() for sums in measured]


_NO_FLAGS: list[Tensor | None] = [None, None]


def _flags(scaler: Scaler, device: torch.device) -> list[Tensor | None]:
    """The scale and the flag, in any dtype and on any device, as the kernels read them: float32 on `device`."""
    if scaler.grad_scale is None and scaler.found_inf is None:
        return _NO_FLAGS
    for flag in scaler:
        if flag is not None and flag.numel() != 1:
            raise ValueError(f"grad_scale or found_inf has shape {tuple(flag.shape)}; expected one number")
    return [None if flag is None else flag.to(device, torch.float32) for flag in scaler]


def _raise_versions(
    prepared: Prepared, parameters: Sequence[Tensor], momentum_buffers: Sequence[Tensor | None], *others: Tensor
) -> None:
    written = [*parameters, *others]
    if prepared.any_momentum:
        pairs = zip(momentum_buffers, prepared.has_momentum, strict=True)
        written += [buffer for buffer, has in pairs if has and buffer is not None]
    torch.autograd.graph.increment_version(written)


def _there(tensors: Sequence[Tensor | None]) -> Sequence[Tensor]:
    return [tensor for tensor in tensors if tensor is not None] if tensors else ()


def update_(
    prepared: Prepared,
    network: Network,
    layers: Layers,
    measured: Sequence[Tensor | None],
    steps: Steps = NO_STEPS,
    scaler: Scaler = NO_SCALER,
) -> None:
    """Launches eqs. 3, 4, 7 and the weight update; see `npc_ext.reference.update_`.

    Gradients lie in memory like their parameters (`in_memory_order_of`).
    """
    device = layers.nonfinite_steps.device
    flags = _flags(scaler, device)
    _launch(
        "update",
        device,
        *_of_gradients(prepared, *network, flags),
        *_of_layers(prepared, layers),
        _of_measured(prepared, measured, device),
        prepared.addresses("steps", steps.steps, _check_count, device),
        steps.seeds,
    )
    _raise_versions(
        prepared,
        network.parameters,
        network.momentum_buffers,
        *layers.importances,
        layers.nonfinite_steps,
        *_there(steps.steps),
    )


def adam_update_(
    prepared: Prepared,
    network: AdamNetwork,
    layers: Layers,
    measured: Sequence[Tensor | None],
    steps: Steps,
    scaler: Scaler = NO_SCALER,
) -> None:
    """Launches eqs. 3, 4, 7 and Adam's step; see `npc_ext.reference.adam_update_`, and `update_` for what is as there.

    Moments lie in memory like their parameters.
    """
    device, like = layers.nonfinite_steps.device, (_check_like_parameter, network.parameters, compute_dtype)
    flags = _flags(scaler, device)
    _launch(
        "adam_update",
        device,
        *_of_gradients(prepared, network.parameters, network.gradients, (), flags),
        *_of_layers(prepared, layers),
        _of_measured(prepared, measured, device),
        prepared.addresses("steps", steps.steps, _check_count, device),
        steps.seeds,
        prepared.addresses("first_moments", network.first_moments, *like),
        prepared.addresses("second_moments", network.second_moments, *like),
    )
    written = [*network.first_moments, *network.second_moments, *layers.importances, layers.nonfinite_steps]
    _raise_versions(prepared, network.parameters, (), *written, *_there(steps.steps))


def anchored_update_(prepared: Prepared, network: Network, anchors: Anchors, scaler: Scaler = NO_SCALER) -> None:
    """Launches the weight update with anchors and path integrals; see `npc_ext.reference.anchored_update_`.

    Gradients, stiffness, anchors and paths lie in memory like their parameters.
    """
    if not network.parameters:
        return
    device, like = network.parameters[0].device, (_check_like_parameter, network.parameters, compute_dtype)
    flags = _flags(scaler, device)
    _launch(
        "anchored_update",
        device,
        *_of_gradients(prepared, *network, flags),
        prepared.addresses("stiffness", anchors.stiffness, *like),
        prepared.addresses("anchors", anchors.anchors, *like),
        prepared.addresses("paths", anchors.paths, *like),
    )
    _raise_versions(prepared, network.parameters, network.momentum_buffers, *_there(anchors.paths))


def connection_update_(
    prepared: Prepared,
    network: Network,
    connections: Connections,
    scaler: Scaler = NO_SCALER,
) -> None:
    """Launches CPC's update, with an importance of every connection; see `npc_ext.reference.connection_update_`.

    Gradients and importances lie in memory like their parameters.
    """
    device = connections.nonfinite_steps.device
    flags = _flags(scaler, device)
    _launch(
        "connection_update",
        device,
        *_of_gradients(prepared, *network, flags),
        prepared.addresses("importances", connections.importances, _check_like_parameter, network.parameters, _float32),
        prepared.counters(connections.nonfinite_steps),
    )
    _raise_versions(
        prepared,
        network.parameters,
        network.momentum_buffers,
        *_there(connections.importances),
        connections.nonfinite_steps,
    )


def network_step_(
    prepared: Prepared, activations: Activations, network: Network, layers: Layers, scaler: Scaler = NO_SCALER
) -> None:
    """Launches eqs. 2, 3, 4 and 7 and the weight update at once; see `npc_ext.reference.network_step_`."""
    device = layers.nonfinite_steps.device
    flags = _flags(scaler, device)
    inputs = [
        (
            n.data_ptr(),
            g.data_ptr(),
            DTYPES[n.dtype],
            n.shape,
            n.stride(),
            g.stride(),
            channel % n.ndim,
            batch % n.ndim,
        )
        for n, g, channel, batch in zip(*activations, strict=True)
    ]
    _launch(
        "network_step",
        device,
        *_of_gradients(prepared, *network, flags),
        *_of_layers(prepared, layers),
        inputs,
    )
    _raise_versions(prepared, network.parameters, network.momentum_buffers, *layers.importances, layers.nonfinite_steps)
