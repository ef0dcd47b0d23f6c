"""Monitors plasticity during training: logs for TensorBoard, warnings about full layers, and plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ._warn import warn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .optim.plastic import Plastic
    from .optim.plasticity import LayerPlasticity
    from .optim.wrapper import PlasticityWrapper

# A layer is full above this share of frozen neurons. In a run that learned its last task badly, 60 % were frozen.
FULL = 0.5
# The momentum to advise where there is none: plastic neurons then move up to ten times as far in a task.
_MOMENTUM = 0.9

_IMPORTANCE_COLOR, _RATE_COLOR, _LIMIT_COLOR = "#4c72b0", "#dd8452", "#555555"


class CapacityWarning(UserWarning):
    """A layer has little plasticity left; the message names it."""


class HasPlasticity(Protocol):
    """`NPC`, `NPCAdamW`, `PlasticityWrapper`, or a wrapper that forwards their attributes."""

    def plasticity(self) -> dict[str, LayerPlasticity]:
        """The plasticity of every protected layer, by name."""
        ...


def log_plasticity(writer: Any, optimizer: HasPlasticity, step: int, prefix: str = "plasticity") -> None:
    """Writes the plasticity of every layer: scalars, and histograms of importance and learning rates.

    The scalars of a layer are `<prefix>/<layer>/frozen` (the share of frozen neurons, from 0 to 1), `/skipped` (the
    share of neurons without weight gradients), `/importance` (the mean, which tends to 1) and `/learning_rate` (the
    mean). Waits for GPUs, so do not call it in every step.

    Args:
        writer: an object with `add_scalar` and `add_histogram`, such as `torch.utils.tensorboard.SummaryWriter`.
        optimizer: the optimizer with the plasticity to write.
        step: the position on the horizontal axis.
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
    """Warns of layers with little room for another task: `CapacityWarning`. Call it before a task.

    The warning says what would help with the current options.

    Args:
        optimizer: the optimizer with the plasticity to check.
        full: warn of a layer if more than this share of its neurons is frozen.
        learning: output layer -> the neurons that the next task has to learn. Warns if any of them is frozen already.
            The layer's other neurons, those of earlier tasks, may all be frozen.

    Returns:
        The names of the layers with a warning.

    Raises:
        TypeError: the optimizer does not freeze neurons.
        KeyError: `learning` names a layer that is not consolidated.
        IndexError: `learning` has a neuron that the layer does not have.
    """
    if not hasattr(optimizer, "plasticity") or not hasattr(optimizer, "constants"):
        raise TypeError(
            f"the optimizer is of type {type(optimizer).__name__}, which freezes no neurons; expected NPC, NPCAdamW or "
            "PlasticityWrapper"
        )
    layers, learning = optimizer.plasticity(), learning or {}
    warned = [name for name, layer in layers.items() if layer.frozen > full and name not in learning]
    for name in warned:
        warn(
            f"layer {name!r}: {layers[name].frozen:.0%} of its neurons are frozen, so it has little room to learn. "
            f"To give it more: {_more_room(optimizer, name)}",
            CapacityWarning,
        )
    for name, neurons in learning.items():
        importance, neurons = layers[name].importance, [int(neuron) for neuron in neurons]
        if outside := [neuron for neuron in neurons if not 0 <= neuron < len(importance)]:
            raise IndexError(
                f"layer {name!r} has {len(importance)} neurons, so `learning` may name 0 to {len(importance) - 1}; "
                f"got {outside}"
            )
        is_frozen = importance >= optimizer.constants(name)["beta"]
        if frozen := [neuron for neuron in neurons if is_frozen[neuron]]:
            warned.append(name)
            warn(
                f"layer {name!r}: its neurons {', '.join(map(str, frozen))} are frozen before they were learned. "
                f"{_advice_for_outputs(optimizer, name)}",
                CapacityWarning,
            )
    return warned


def _more_room(optimizer: Any, name: str) -> str:
    """Ways to give a layer more plasticity, apart from those already in use."""
    constants = optimizer.constants(name)
    advice = [
        f"raise beta (it is {constants['beta']:g})",
        f"lower delta (it is {constants['delta']:g}), so that importance to old tasks fades sooner",
        "give the layer more neurons",
    ]
    if all(group.get("momentum") == 0 for group in optimizer.param_groups):
        advice.insert(1, f"train with momentum={_MOMENTUM}, so that plastic neurons move further")
    return f"{', '.join(advice[:-1])}, or {advice[-1]}"


def _advice_for_outputs(optimizer: Any, name: str) -> str:
    """Ways to keep outputs plastic until they are learned, apart from those already in use."""
    if optimizer.constants(name)["normalize"] == "active":
        return "They got gradients in earlier tasks: do not consolidate the layer, or give each task a separate head"
    return (
        f"Normalize over active neurons (layers={{{name!r}: {{'normalize': 'active'}}}}), do not consolidate the "
        "layer, or give each task a separate head"
    )


def plot_plasticity(optimizer: Plastic | PlasticityWrapper) -> Figure:
    """Plots importance (eq. 4) above learning rates (eq. 7), with a column for each layer.

    Neurons are sorted by importance, the most important first. Neurons above the dashed line, beta, are frozen. Layers
    without a parameter that requires a gradient are left out.

    Returns:
        A matplotlib figure to show or save.

    Raises:
        ImportError: matplotlib, which is optional, is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plot_plasticity draws with matplotlib, which is not installed: pip install matplotlib"
        ) from error
    layers = optimizer.plasticity()
    layers = {name: layer for name, layer in layers.items() if optimizer.neurons[name].trains()} or layers
    columns = len(layers)
    figure = Figure(figsize=(max(2.2 * columns, 4), 4.2), layout="constrained")
    axes: Any = figure.subplots(2, columns, squeeze=False)
    for (name, layer), (above, below) in zip(layers.items(), axes.T, strict=True):
        order = layer.importance.argsort(descending=True).cpu()
        for axis, values, color in (
            (above, layer.importance, _IMPORTANCE_COLOR),
            (below, layer.learning_rate, _RATE_COLOR),
        ):
            axis.stairs(values.cpu()[order].tolist(), fill=True, color=color)
            axis.set_xlim(0, len(order))
            axis.set_xticks([0, len(order)])
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_ylim(bottom=0)
        above.axhline(optimizer.constants(name)["beta"], color=_LIMIT_COLOR, linestyle="--", linewidth=1)
        above.set_title(f"{name or 'model'}\n{layer.frozen:.0%} frozen", fontsize=10)
        below.set_xlabel("neurons", fontsize=9)
    for axis in axes[1]:
        axis.set_ylim(0, max(float(layer.learning_rate.max()) for layer in layers.values()) * 1.05 or 1)
    axes[0, 0].set_ylabel("importance $C_i$")
    axes[1, 0].set_ylabel(r"learning rate $\eta_i$")
    return figure
