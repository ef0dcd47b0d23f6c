"""Checks of what the operations in `npc_ext.ops` are given: a sentence for each thing that does not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..columns import (
    Activations,
    AdamNetwork,
    AdamOptions,
    AnchorOptions,
    Anchors,
    Connections,
    Layers,
    MaybeTensors,
    Network,
    Placement,
    SGDOptions,
    Steps,
)
from ..reference import compute_dtype
from . import launch

SIGMAS = ("sigmoid", "tanh", "erf")


def check_lengths(expected: int, **lists: Sequence[object]) -> None:
    for name, values in lists.items():
        if len(values) != expected:
            raise ValueError(f"{name} has {len(values)} entries, expected {expected}")


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"


def _check_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in launch.DTYPES:
        raise ValueError(f"{name} is {tensor.dtype}; expected float32, float64, float16 or bfloat16")


def check_pair(name: str, activation: Tensor, gradient: Tensor, channel_dim: int, batch_dim: int) -> None:
    if activation.shape != gradient.shape:
        raise ValueError(
            f"gradient has shape {tuple(gradient.shape)}, but {name} has {tuple(activation.shape)}; "
            "they must be the same"
        )
    if activation.dtype != gradient.dtype or activation.device != gradient.device:
        raise ValueError(
            f"gradient is {gradient.dtype} on {gradient.device}, but {name} is {activation.dtype} on "
            f"{activation.device}; they must agree"
        )
    _check_dtype(name, activation)
    _check_dims(activation, channel_dim, batch_dim, name)


def _check_dims(activation: Tensor, channel_dim: int, batch_dim: int, tensor: str = "activation") -> None:
    ndim = activation.ndim
    if ndim < 2:
        raise ValueError(f"{tensor} has shape {tuple(activation.shape)}; expected samples and neurons at least, (B, N)")
    for name, dim in (("channel_dim", channel_dim), ("batch_dim", batch_dim)):
        if not -ndim <= dim < ndim:
            raise ValueError(f"{name} is {dim}, but {tensor} has {ndim} dimensions")
    if channel_dim % ndim == batch_dim % ndim:
        raise ValueError(f"channel_dim and batch_dim are both dimension {batch_dim % ndim}; they must differ")


def _check_per_neuron(name: str, values: Tensor, importance: Tensor) -> None:
    fits = values.shape == importance.shape and values.dtype == torch.float32 and values.device == importance.device
    if not fits or not values.is_contiguous():
        raise ValueError(
            f"{name} is {_described(values)}; expected contiguous float32 of shape {tuple(importance.shape)} on "
            f"{importance.device}, one value for each neuron"
        )


def _check_activation(
    at: str, activation: Tensor, gradient: Tensor, channel_dim: int, batch_dim: int, importance: Tensor
) -> None:
    if activation.device != importance.device or gradient.device != importance.device:
        raise ValueError(
            f"activation{at} is on {activation.device} and activation_gradient{at} on {gradient.device}, but "
            f"importance is on {importance.device}; they must agree"
        )
    if activation.shape != gradient.shape or activation.dtype != gradient.dtype:
        raise ValueError(
            f"activation_gradient{at} is {gradient.dtype} of shape {tuple(gradient.shape)}, but activation{at} is "
            f"{activation.dtype} of shape {tuple(activation.shape)}; they must be the same"
        )
    _check_dtype(f"activation{at}", activation)
    _check_dims(activation, channel_dim, batch_dim)
    if activation.shape[channel_dim] != importance.numel():
        raise ValueError(
            f"activation{at} has {activation.shape[channel_dim]} channels in dimension {channel_dim}, but importance "
            f"has {importance.numel()} values; they must agree"
        )


def check_arguments(given: Mapping[str, Any]) -> None:
    """Raises ValueError if the arguments of an operation that works in place, by name, do not fit."""
    network, options = given["network"], given["options"]
    count = len(network.parameters)
    _check_columns(count, options)
    _check_columns(count, network, besides=("momentum_buffers",))
    layers: Any = given.get("layers") or given.get("connections")
    if layers is not None:
        constants = given["constants"]
        number = len(constants.alpha) if "connections" in given else len(layers.importances)
        _check_columns(number, constants)
        _check_sigma(constants.sigma)
        _check_nonfinite_steps(layers.nonfinite_steps, number)
    _check_devices(network, layers)
    _check_network(network, options)
    if "layers" in given:
        _check_averages(layers)
        _check_placement(network.parameters, layers, given["placement"])
    if "measured" in given:
        _check_measured(layers, given["measured"])
    if "activations" in given:
        _check_activations(layers, given["activations"])
    if "connections" in given:
        _check_connections(network.parameters, given["connections"], number)
    if "pull" in given:
        _check_anchors(network.parameters, given["anchors"], options, given["pull"])
    if "steps" in given:
        _check_steps(network, given["steps"])


def _check_columns(expected: int, group: Any, besides: Sequence[str] = ()) -> None:
    for name, values in group._asdict().items():
        if values is not None and name not in besides:
            check_lengths(expected, **{name: values})


def _check_sigma(sigma: Sequence[str]) -> None:
    for value in sigma:
        if value not in SIGMAS:
            raise ValueError(f"sigma is {value!r}; expected one of {', '.join(map(repr, SIGMAS))}")


def _check_nonfinite_steps(counts: Tensor, layers: int) -> None:
    if counts.dtype != torch.int64 or counts.numel() != layers:
        raise ValueError(
            f"nonfinite_steps is {counts.dtype} of shape {tuple(counts.shape)}; expected int64 of shape ({layers},)"
        )


def _check_devices(network: Network | AdamNetwork, layers: Layers | Connections | None) -> None:
    named: dict[str, Sequence[Tensor]] = {"parameters": network.parameters}
    if isinstance(layers, Layers):
        named["importances"] = layers.importances
    if layers is not None:
        named["nonfinite_steps"] = [layers.nonfinite_steps]
    device = next((tensor.device for tensors in named.values() for tensor in tensors), None)
    for name, tensors in named.items():
        for tensor in tensors:
            if tensor.device != device:
                raise ValueError(
                    f"{name} has a tensor on {tensor.device}, but others are on {device}; one call works on one device"
                )


def _check_network(network: Network | AdamNetwork, options: SGDOptions | AdamOptions) -> None:
    for index, (parameter, gradient) in enumerate(zip(network.parameters, network.gradients, strict=True)):
        _check_dtype(f"parameters[{index}]", parameter)
        _check_like(f"gradients[{index}]", gradient, parameter)
    if isinstance(network, AdamNetwork):
        for name in ("first_moments", "second_moments"):
            for index, moment in enumerate(getattr(network, name)):
                parameter = network.parameters[index]
                _check_values(f"{name}[{index}]", moment, parameter, compute_dtype(parameter.dtype))
    elif isinstance(options, SGDOptions) and any(options.momentum):
        check_lengths(len(network.parameters), momentum_buffers=network.momentum_buffers)
        for index, (buffer, momentum) in enumerate(zip(network.momentum_buffers, options.momentum, strict=True)):
            if momentum != 0:
                _check_like(f"momentum_buffers[{index}]", buffer, network.parameters[index])


def _check_averages(layers: Layers) -> None:
    for index, average in enumerate(layers.importances):
        if average.ndim != 1:
            raise ValueError(f"importances[{index}] has shape {tuple(average.shape)}; expected (neurons,)")
        _check_per_neuron(f"importances[{index}]", average, average)


def _check_measured(layers: Layers, measured: MaybeTensors) -> None:
    check_lengths(len(layers.importances), measured=measured)
    for index, sums in enumerate(measured):
        if sums is not None:
            _check_per_neuron(f"measured[{index}]", sums, layers.importances[index])


def _check_activations(layers: Layers, activations: Activations) -> None:
    _check_columns(len(layers.importances), activations)
    for index, arguments in enumerate(zip(*activations, layers.importances, strict=True)):
        _check_activation(f"[{index}]", *arguments)


def _check_placement(parameters: Sequence[Tensor], layers: Layers, placement: Placement) -> None:
    _check_columns(len(parameters), placement)
    _check_layer(placement.layer, len(layers.importances))
    for index, (parameter, layer) in enumerate(zip(parameters, placement.layer, strict=True)):
        if layer < 0:
            continue
        dim, groups = placement.neuron_dim[index], placement.groups[index]
        if not 0 <= dim < parameter.ndim:
            raise ValueError(f"neuron_dim[{index}] is {dim}, but parameters[{index}] has {parameter.ndim} dimensions")
        rows, neurons = parameter.shape[dim] * groups, layers.importances[layer].numel()
        if placement.first_neuron is not None:
            first = placement.first_neuron[index]
            if not 0 <= first <= neurons - rows or (groups > 1 and rows != neurons):
                raise ValueError(
                    f"parameters[{index}] has {rows} rows from neuron {first} on, but importance has {neurons} values; "
                    f"they must be among them, and all of them where there are groups (layer {layer})"
                )
        elif rows != neurons:
            raise ValueError(
                f"parameters[{index}] has {rows} rows, but importance has {neurons} values; they must agree "
                f"(layer {layer})"
            )


def _check_layer(layer: Sequence[int], layers: int) -> None:
    for index, number in enumerate(layer):
        if number >= layers:
            raise ValueError(f"layer[{index}] is {number}, but there are {layers} layers")


def _check_connections(parameters: Sequence[Tensor], connections: Connections, layers: int) -> None:
    _check_columns(len(parameters), connections, besides=("nonfinite_steps",))
    _check_layer(connections.layer, layers)
    for index, layer in enumerate(connections.layer):
        if layer >= 0:
            _check_values(f"importances[{index}]", connections.importances[index], parameters[index], torch.float32)


def _check_anchors(parameters: Sequence[Tensor], anchors: Anchors, options: SGDOptions, pull: AnchorOptions) -> None:
    _check_columns(len(parameters), anchors)
    _check_columns(len(parameters), pull)
    for name, tensors in anchors._asdict().items():
        _check_per_element(name, tensors, parameters)
    for index, (stiffness, anchor, _) in enumerate(zip(*anchors, strict=True)):
        if (stiffness is None) != (anchor is None):
            raise ValueError(f"stiffness[{index}] and anchors[{index}] go together, but one of them is None")
        if pull.implicit[index] and not options.momentum[index] < 1:
            raise ValueError(
                f"momentum[{index}] is {options.momentum[index]}; implicit anchors need a momentum below 1"
            )


def _check_steps(network: Network | AdamNetwork, steps: Steps) -> None:
    if steps.steps or steps.seeds or isinstance(network, AdamNetwork):
        check_lengths(len(network.parameters), steps=steps.steps)
    if steps.seeds:
        check_lengths(len(network.parameters), seeds=steps.seeds)
    for index, (parameter, count) in enumerate(zip(network.parameters, steps.steps, strict=False)):
        if count is None and isinstance(network, AdamNetwork):
            raise ValueError(f"steps[{index}] is None; Adam counts the steps of every parameter")
        if count is not None and (
            count.dtype != torch.float32 or count.numel() != 1 or count.device != parameter.device
        ):
            raise ValueError(
                f"steps[{index}] is {_described(count)}; expected one float32 on {parameter.device}, or None"
            )
        if steps.seeds and steps.seeds[index] >= 0 and (parameter.dtype != torch.bfloat16 or count is None):
            raise ValueError(
                f"seeds[{index}] is {steps.seeds[index]}, but parameters[{index}] is {parameter.dtype} with "
                f"{'uncounted' if count is None else 'counted'} steps; only bfloat16 parameters whose steps are "
                "counted are rounded stochastically (else: -1)"
            )


def _check_per_element(name: str, tensors: MaybeTensors, parameters: Sequence[Tensor]) -> None:
    for index, (tensor, parameter) in enumerate(zip(tensors, parameters, strict=True)):
        if tensor is not None:
            _check_values(f"{name}[{index}]", tensor, parameter, compute_dtype(parameter.dtype))


def _check_values(name: str, tensor: Tensor | None, parameter: Tensor, dtype: torch.dtype) -> None:
    """One value for each element of a parameter, in memory like it."""
    if tensor is None or tensor.shape != parameter.shape or tensor.dtype != dtype or tensor.device != parameter.device:
        got = "None" if tensor is None else _described(tensor)
        raise ValueError(
            f"{name} is {got}; expected {dtype} of shape {tuple(parameter.shape)} on {parameter.device}, one value for "
            "each element of its parameter"
        )
    if tensor.stride() != parameter.stride():
        raise ValueError(
            f"{name} has strides {tensor.stride()}, but its parameter has {parameter.stride()}; they must lie in "
            "memory alike"
        )


def _check_like(name: str, tensor: Tensor | None, parameter: Tensor) -> None:
    if tensor is None:
        raise ValueError(f"{name} is None; expected a tensor like its parameter")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} is sparse ({tensor.layout}); expected a dense tensor")
    if tensor.shape != parameter.shape or tensor.dtype != parameter.dtype or tensor.device != parameter.device:
        raise ValueError(
            f"{name} is {_described(tensor)}, but its parameter is {_described(parameter)}; they must agree"
        )
