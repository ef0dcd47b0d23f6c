"""Checks of what the operations in `npc_ext.ops` are given: a sentence for each thing that does not fit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import launch

SIGMAS = ("sigmoid", "tanh", "erf")


# ------------------------------------------------------------------------------------------------------------ checks


def check_lengths(expected: int, **lists: Sequence[object]) -> None:
    for name, values in lists.items():
        if len(values) != expected:
            raise ValueError(f"{name} has {len(values)} entries, expected {expected}")


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
            f"{name} is {values.dtype} of shape {tuple(values.shape)} on {values.device}; expected contiguous float32 "
            f"of shape {tuple(importance.shape)} on {importance.device}, one value for each neuron"
        )


def check_activation(
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


def check_sigma(sigma: Sequence[str]) -> Sequence[str]:
    for value in sigma:
        if value not in SIGMAS:
            raise ValueError(f"sigma is {value!r}; expected one of {', '.join(map(repr, SIGMAS))}")
    return sigma


def check_network(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    importances: Sequence[Tensor],
    skipped: Tensor,
    layer: Sequence[int],
    neuron_dim: Sequence[int],
    groups: Sequence[int],
    momentum: Sequence[float],
    first_neuron: Sequence[int] | None = None,
) -> None:
    check_lengths(len(parameters), gradients=gradients, layer=layer, neuron_dim=neuron_dim, groups=groups)
    if first_neuron is not None:
        check_lengths(len(parameters), first_neuron=first_neuron)
    check_skipped(skipped, len(importances))
    check_parameters(parameters, gradients, momentum_buffers, momentum, importances=importances, skipped=[skipped])
    for index, average in enumerate(importances):
        if average.ndim != 1:
            raise ValueError(f"importances[{index}] has shape {tuple(average.shape)}; expected (neurons,)")
        _check_per_neuron(f"importances[{index}]", average, average)
    for index, parameter in enumerate(parameters):
        if layer[index] < 0:
            continue
        if layer[index] >= len(importances):
            raise ValueError(f"layer[{index}] is {layer[index]}, but there are {len(importances)} layers")
        dim = neuron_dim[index]
        if not 0 <= dim < parameter.ndim:
            raise ValueError(f"neuron_dim[{index}] is {dim}, but parameters[{index}] has {parameter.ndim} dimensions")
        rows, neurons = parameter.shape[dim] * groups[index], importances[layer[index]].numel()
        if first_neuron is not None:
            first = first_neuron[index]
            if not 0 <= first <= neurons - rows or (groups[index] > 1 and rows != neurons):
                raise ValueError(
                    f"parameters[{index}] has {rows} rows from neuron {first} on, but importance has {neurons} values; "
                    f"they must be among them, and all of them where there are groups (layer {layer[index]})"
                )
        elif rows != neurons:
            raise ValueError(
                f"parameters[{index}] has {rows} rows, but importance has {neurons} values; they must agree "
                f"(layer {layer[index]})"
            )


def check_layers(importances: Sequence[Tensor], measured: Sequence[Tensor], **constants: Sequence[object]) -> None:
    check_lengths(len(importances), measured=measured, **constants)
    for index, sums in enumerate(measured):
        if sums.numel():
            _check_per_neuron(f"measured[{index}]", sums, importances[index])


def check_rounding(parameters: Sequence[Tensor], steps: Sequence[Tensor], seeds: Sequence[int]) -> None:
    if steps or seeds:
        check_lengths(len(parameters), steps=steps)
    if seeds:
        check_lengths(len(parameters), seeds=seeds)
    for index, (parameter, count) in enumerate(zip(parameters, steps, strict=False)):
        if count.numel() and (count.dtype != torch.float32 or count.numel() != 1 or count.device != parameter.device):
            raise ValueError(
                f"steps[{index}] is {count.dtype} of shape {tuple(count.shape)} on {count.device}; expected one "
                f"float32 on {parameter.device}, or nothing"
            )
        if seeds and seeds[index] >= 0 and (parameter.dtype != torch.bfloat16 or not count.numel()):
            raise ValueError(
                f"seeds[{index}] is {seeds[index]}, but parameters[{index}] is {parameter.dtype} with "
                f"{count.numel()} steps; only bfloat16 whose steps are counted is rounded at random (else: -1)"
            )


def check_skipped(skipped: Tensor, layers: int) -> None:
    if skipped.dtype != torch.int64 or skipped.numel() != layers:
        raise ValueError(
            f"skipped is {skipped.dtype} of shape {tuple(skipped.shape)}; expected int64 of shape ({layers},)"
        )


def check_parameters(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    momentum: Sequence[float],
    **others: Sequence[Tensor],
) -> None:
    """What every update needs: gradients and momentum that fit, all on one device, and so `others`, by name."""
    if any(momentum):
        check_lengths(len(parameters), momentum_buffers=momentum_buffers)
    named = {"parameters": parameters, **others}
    device = next((tensor.device for tensors in named.values() for tensor in tensors), None)
    for name, tensors in named.items():
        for tensor in tensors:
            if tensor.device != device:
                raise ValueError(
                    f"{name} has a tensor on {tensor.device}, but others are on {device}; one call works on one device"
                )
    for index, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
        _check_dtype(f"parameters[{index}]", parameter)
        _check_like(f"gradients[{index}]", gradient, parameter)
        if momentum[index] != 0:
            _check_like(f"momentum_buffers[{index}]", momentum_buffers[index], parameter)


def check_beside(name: str, tensor: Tensor, parameter: Tensor, dtype: torch.dtype) -> None:
    """One value for each element of a parameter, in memory like it."""
    if tensor.shape != parameter.shape or tensor.dtype != dtype or tensor.device != parameter.device:
        raise ValueError(
            f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}; expected {dtype} of shape "
            f"{tuple(parameter.shape)} on {parameter.device}, one value for each element of its parameter"
        )
    if tensor.stride() != parameter.stride():
        raise ValueError(
            f"{name} has strides {tensor.stride()}, but its parameter has {parameter.stride()}; they must lie in "
            "memory alike"
        )


def _check_like(name: str, tensor: Tensor, parameter: Tensor) -> None:
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} is sparse ({tensor.layout}); expected a dense tensor")
    if tensor.shape != parameter.shape or tensor.dtype != parameter.dtype or tensor.device != parameter.device:
        raise ValueError(
            f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}, but its parameter is "
            f"{parameter.dtype} of shape {tuple(parameter.shape)} on {parameter.device}; they must agree"
        )
