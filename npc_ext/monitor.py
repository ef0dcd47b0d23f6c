"""Monitors plasticity during training: logs for TensorBoard, warnings about full layers, and plots."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ._warn import warn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .optim.plastic import Plastic
    from .optim.plasticity import LayerPlasticity
    from .optim.wrapper import PlasticityWrapper

# A layer is full above this share of frozen neurons. The warning has to come before tasks are learned badly, so it also
# comes before tasks that are still learned well.
FULL = 0.5
# The momentum to advise where there is none: plastic neurons then move up to ten times as far in a task.
_MOMENTUM = 0.9
_MOST_NAMES = 8

_IMPORTANCE_COLOR, _RATE_COLOR, _LIMIT_COLOR = "#4c72b0", "#dd8452", "#555555"


class CapacityWarning(UserWarning):
    """Layers have little plasticity left; the message names them. Given by `check_capacity`."""


class HasPlasticity(Protocol):
    """`NPC`, `NPCAdamW`, `PlasticityWrapper`, or a wrapper that forwards their attributes."""

    def plasticity(self) -> dict[str, LayerPlasticity]:
        """The plasticity of every protected layer, by name."""
        ...


def _check_freezes_neurons(optimizer: Any) -> None:
    """Raises TypeError if an optimizer has no plasticity of neurons to show."""
    if _freezes_neurons(optimizer):
        return
    expected = "expected NPC, NPCAdamW or PlasticityWrapper"
    if _freezes_neurons(inner := getattr(optimizer, "optimizer", None)):
        raise TypeError(
            f"the optimizer is of type {type(optimizer).__name__}, which wraps {type(inner).__name__}, but does not "
            f"have its methods; {expected}; pass optimizer.optimizer"
        )
    raise TypeError(f"the optimizer is of type {type(optimizer).__name__}, which freezes no neurons; {expected}")


def _freezes_neurons(optimizer: object) -> bool:
    return hasattr(optimizer, "plasticity") and hasattr(optimizer, "constants")


def log_plasticity(writer: Any, optimizer: HasPlasticity, step: int, prefix: str = "plasticity") -> None:
    """Writes the plasticity of every layer: scalars, and histograms of importance and learning rates.

    The scalars of a layer, `<prefix>/<layer>/<name>`, have the names of `plasticity()`: `frozen`, `gradients_skipped`,
    `nonfinite_steps`, `importance` (the mean over neurons) and `learning_rate` (the mean). Layers without a
    parameter that requires a gradient are left out. Waits for GPUs, so do not call it in every step.

    Args:
        writer: an object with `add_scalar` and `add_histogram`, such as `torch.utils.tensorboard.SummaryWriter`.
        optimizer: the optimizer with the plasticity to write.
        step: the position on the horizontal axis.
        prefix: the first part of all names.

    Raises:
        TypeError: the optimizer does not freeze neurons.

    Example:
        >>> log_plasticity(SummaryWriter("runs/npc"), optimizer, step)
    """
    _check_freezes_neurons(optimizer)
    for name, layer in _of_trained_layers(optimizer).items():
        scalars = {
            "frozen": layer.frozen,
            "gradients_skipped": layer.gradients_skipped,
            "nonfinite_steps": layer.nonfinite_steps,
            "importance": layer.importance.mean().item(),
            "learning_rate": layer.learning_rate.mean().item(),
        }
        for kind, value in scalars.items():
            writer.add_scalar(f"{prefix}/{name}/{kind}", value, step)
        writer.add_histogram(f"{prefix}/{name}/importance of neurons", layer.importance, step)
        writer.add_histogram(f"{prefix}/{name}/learning rate of neurons", layer.learning_rate, step)


def _of_trained_layers(optimizer: Any) -> dict[str, LayerPlasticity]:
    """The plasticity of layers with a parameter that requires a gradient; of all layers if there are none."""
    layers: dict[str, LayerPlasticity] = optimizer.plasticity()
    return {name: layer for name, layer in layers.items() if optimizer.neurons[name].trains()} or layers


def check_capacity(
    optimizer: HasPlasticity, *, full: float = FULL, learning: Mapping[str, Sequence[int]] | None = None
) -> list[str]:
    """Warns of layers with little room for another task: `CapacityWarning`. Call it before a task.

    One warning names all full layers, and says what would help with the current options.

    Args:
        optimizer: the optimizer with the plasticity to check.
        full: warn of a layer if more than this share of its neurons is frozen, from 0 to 1. Default: 0.5.
        learning: output layer -> the neurons that the next task has to learn. Warns if any of them is frozen already.
            The layer's other neurons, those of earlier tasks, may all be frozen.

    Returns:
        The names of the layers with a warning.

    Raises:
        TypeError: the optimizer does not freeze neurons; or `learning` is of another type.
        KeyError: `learning` names a layer that the model does not have.
        IndexError: `learning` has a neuron that the layer does not have.

    Warns:
        CapacityWarning: more than the share `full` of a layer is frozen, or a neuron of `learning` is.

    Example:
        >>> check_capacity(optimizer, learning={"output": [8, 9]})  # before the task of outputs 8 and 9
    """
    _check_freezes_neurons(optimizer)
    layers, learning = optimizer.plasticity(), _checked_learning(learning, optimizer)
    full_layers = {name: layer.frozen for name, layer in layers.items() if layer.frozen > full and name not in learning}
    frozen_outputs: dict[str, list[int]] = {}
    for name, neurons in learning.items():
        importance, neurons = layers[name].importance, [int(neuron) for neuron in neurons]
        if outside := [neuron for neuron in neurons if not 0 <= neuron < len(importance)]:
            raise IndexError(
                f"layer {name!r} has {len(importance)} neurons, so `learning` may name 0 to {len(importance) - 1}; "
                f"got {outside}"
            )
        is_frozen = importance >= _beta(optimizer, name)
        if frozen := [neuron for neuron in neurons if is_frozen[neuron]]:
            frozen_outputs[name] = frozen
    if full_layers:
        warn(f"{_little_room(full_layers)} {_more_room(optimizer, full_layers)}", CapacityWarning)
    for name, frozen in frozen_outputs.items():
        warn(
            f"layer {name!r} has neurons that are frozen before they were learned: {', '.join(map(str, frozen))}. "
            f"{_advice_for_outputs(optimizer, name)}.",
            CapacityWarning,
        )
    return [*full_layers, *frozen_outputs]


def _checked_learning(learning: Any, optimizer: Any) -> dict[str, Sequence[int]]:
    """The outputs to learn, except for those of layers that are not protected, which can learn."""
    if learning is None:
        return {}
    if not isinstance(learning, Mapping) or not all(isinstance(neurons, Iterable) for neurons in learning.values()):
        raise TypeError(f"learning is {learning!r}; expected the neurons to learn by layer, as in {{'output': [2, 3]}}")
    protected, known = optimizer.plasticity(), {layer.name for layer in optimizer.neurons}
    return {name: neurons for name, neurons in learning.items() if name in protected or name not in known}


def _little_room(frozen: Mapping[str, float]) -> str:
    """Names full layers with their shares of frozen neurons, the fullest first."""
    if len(frozen) == 1:
        ((name, share),) = frozen.items()
        return f"layer {name!r} has little room to learn another task: {share:.0%} of its neurons are frozen."
    fullest = sorted(frozen, key=lambda name: -frozen[name])
    shares = ", ".join(f"{name!r} {frozen[name]:.0%}" for name in fullest[:_MOST_NAMES])
    more = f" and {len(fullest) - _MOST_NAMES} more" if len(fullest) > _MOST_NAMES else ""
    return f"{len(frozen)} layers have little room to learn another task; frozen neurons: {shares}{more}."


def _beta(optimizer: Any, layer: str) -> float:
    return float(optimizer.constants(layer)["beta"])


def _more_room(optimizer: Any, names: Iterable[str]) -> str:
    """Ways to give layers more plasticity, apart from those already in use."""
    betas = sorted({_beta(optimizer, name) for name in names})
    beta = " to ".join(f"{value:g}" for value in dict.fromkeys((betas[0], betas[-1])))
    advice = [
        f"Raise beta (it is {beta}), by set_constants or in `layers`: the network then learns more, and keeps less of "
        "earlier tasks."
    ]
    if all(group.get("momentum") == 0 for group in optimizer.param_groups):
        advice.append(f"Train with momentum={_MOMENTUM} and a smaller learning rate if a task has few steps.")
    return " ".join([*advice, "Or use more neurons."])


def _advice_for_outputs(optimizer: Any, name: str) -> str:
    """Ways to keep outputs plastic until they are learned, apart from those already in use."""
    otherwise = (
        f"leave the layer unprotected, layers={{{name!r}: {{'protect': False}}}}, in a new optimizer that calls "
        "load_importance(optimizer); or give each task a separate head"
    )
    if optimizer.constants(name)["normalize"] == "active":
        return f"They got gradients in earlier tasks: {otherwise}"
    return (
        f"From the first task on, normalize over active neurons, layers={{{name!r}: {{'normalize': 'active'}}}}; "
        f"{otherwise}"
    )


def plot_plasticity(optimizer: Plastic | PlasticityWrapper) -> Figure:
    """Plots importance (eq. 4) above learning rates (eq. 7), with a column for each layer.

    Neurons are sorted by importance, the most important first. Neurons above the dashed line, beta, are frozen. Layers
    without a parameter that requires a gradient are left out.

    Args:
        optimizer: the optimizer with the plasticity to draw.

    Returns:
        A matplotlib figure to show or save.

    Raises:
        TypeError: the optimizer does not freeze neurons.
        ImportError: matplotlib, which is optional, is not installed.

    Example:
        >>> plot_plasticity(optimizer).savefig("plasticity.png")
    """
    _check_freezes_neurons(optimizer)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plot_plasticity draws with matplotlib, which is not installed: pip install matplotlib"
        ) from error
    layers = _of_trained_layers(optimizer)
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
