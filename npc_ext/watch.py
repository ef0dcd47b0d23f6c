"""Watching plasticity while a network trains: logs for TensorBoard and the like, and whether there is room to learn."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from .names import close_to

if TYPE_CHECKING:
    from .plastic import LayerPlasticity

FULL = 0.95


class CapacityWarning(UserWarning):
    """There is next to no plasticity left where something is to be learned; the message names the layer."""


class HasPlasticity(Protocol):
    """`NPC`, `NPCAdamW`, `PlasticityWrapper`, or what wraps one and hands on its attributes."""

    def plasticity(self) -> dict[str, LayerPlasticity]:
        """The plasticity of every consolidated layer, by its name."""
        ...


def log_plasticity(writer: Any, optimizer: HasPlasticity, step: int, prefix: str = "plasticity") -> None:
    """Writes the plasticity of every layer: scalars, and histograms of importance and learning rates.

    Scalars are `<prefix>/<layer>/frozen` and `/skipped` (shares of neurons, from 0 to 1: without a learning rate, and
    without weight gradients), `/importance` (its mean, which tends to 1) and `/learning_rate` (its mean). Waits for
    GPUs, so call it now and then, not in every step.

    Args:
        writer: has `add_scalar` and `add_histogram`, as `torch.utils.tensorboard.SummaryWriter` has.
        optimizer: whose plasticity to write.
        step: where on the horizontal axis.
        prefix: the first part of all names.
    """
    for name, layer in optimizer.plasticity().items():
        scalars = {
            "frozen": layer.frozen,
            "skipped": layer.gradients_skipped,
            "importance": layer.importance.mean().item(),
            "learning_rate": layer.learning_rate.mean().item(),
        }
        for kind, value in scalars.items():
            writer.add_scalar(f"{prefix}/{name}/{kind}", value, step)
        writer.add_histogram(f"{prefix}/{name}/importance of neurons", layer.importance, step)
        writer.add_histogram(f"{prefix}/{name}/learning rate of neurons", layer.learning_rate, step)


def check_capacity(
    optimizer: HasPlasticity, *, full: float = FULL, learning: Mapping[str, Sequence[int]] | None = None
) -> list[str]:
    """Warns of layers that have next to no room for more: `CapacityWarning`.

    Args:
        optimizer: whose plasticity to look at.
        full: a layer is full if more than this share of its neurons is frozen.
        learning: output layer -> its neurons that the task at hand has to learn; call it before that task, and any of
            them that is frozen already is warned of, too: it would stay as it is.

    Returns:
        The names of the layers that were warned of.

    Raises:
        KeyError: `learning` names a layer that is not consolidated.
        IndexError: or a neuron that the layer does not have.
    """
    layers, warned = optimizer.plasticity(), []
    for name, layer in layers.items():
        if layer.frozen > full:
            warned.append(name)
            _warn(
                f"layer {name!r}: more than {full:.0%} of its neurons are frozen, so it has next to no room to learn; "
                "raise beta, lower delta so that old importance fades sooner, or give it more neurons"
            )
    for name, neurons in (learning or {}).items():
        if name not in layers:
            raise KeyError(f"no consolidated layer {name!r}; {close_to(name, layers)}")
        rates = layers[name].learning_rate
        if outside := [neuron for neuron in neurons if not 0 <= neuron < len(rates)]:
            raise IndexError(
                f"layer {name!r} has {len(rates)} neurons, expected those to learn among them; got {outside}"
            )
        if frozen := [neuron for neuron in neurons if rates[neuron] == 0]:
            warned.append(name)
            _warn(
                f"layer {name!r}: its neurons {', '.join(map(str, frozen))} are frozen before they were learned; "
                f"normalize over active neurons (layers={{{name!r}: {{'normalize': 'active'}}}}), do not consolidate "
                "the layer, or give each task a head of its own"
            )
    return list(dict.fromkeys(warned))


def _warn(text: str) -> None:
    warnings.warn(text, CapacityWarning, stacklevel=3)
