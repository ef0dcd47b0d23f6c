"""Makes the layers of a model skip weight gradients that the next step does not need."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..distributed.shards import is_sharded
from ..neurons.find import is_shared
from ..neurons.layer import NeuronLayer
from .certificate import Certificates, CertifiedLayer
from .constants import Calls, install_resting
from .forward import PartialForward, why_not


def install_skipping(
    model: nn.Module,
    layers: Iterable[tuple[NeuronLayer, Tensor, Mapping[str, Any]]],
    skip_gradients: str,
    trained: Collection[int],
) -> Certificates:
    """Places in the model what skipping needs. Layers whose gradients cannot be skipped get a note that says why.

    Args:
        model: the network.
        layers: layers of neurons, each with the parameter whose state holds its importance, and with its options.
        skip_gradients: "layers", "rows" or "none", for layers without this option.
        trained: the ids of the parameters that the optimizer trains.

    Returns:
        What issues the layers' certificates. Bind it to the optimizer's state. Its `remove()` undoes everything.
    """
    calls = Calls(model)
    certified: dict[str, CertifiedLayer] = {}
    handles: list[Any] = []
    for layer, key, options in layers:
        skip = options.get("skip_gradients", skip_gradients)
        if skip == "none":
            continue
        if reason := _why_all_gradients(model, layer, trained):
            layer.add_note(f"its weight gradients are always computed for all neurons: {reason}")
            continue
        module: Any = model.get_submodule(layer.module)
        forward = PartialForward.of_module(module)
        if forward.whole_only and skip == "rows":
            layer.add_note("its weight gradients are computed for all neurons or none: it is a grouped convolution")
        whole_only = forward.whole_only or skip == "layers"
        member = CertifiedLayer(layer, key, options, forward, module.bias, calls, whole_only=whole_only)
        certified[layer.name] = member
        calls.layers.append(layer)
        handles.append(forward.join(member))
    if certified:
        handles += [*install_resting(model, calls.layers, trained), *calls.attach()]
    return Certificates(certified, calls, handles)


def _why_all_gradients(model: nn.Module, layer: NeuronLayer, trained: Collection[int]) -> str:
    if any(is_sharded(part.parameter) for part in layer.parameters):
        return "its parameters are sharded"
    if is_shared(layer.parameters[0].parameter, model):
        return "its weight is shared"
    return why_not(model.get_submodule(layer.module), trained)
