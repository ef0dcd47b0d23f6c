"""Monitoring plasticity while a network trains: logs for TensorBoard and the like, room to learn, and plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ._names import close_to
from ._warn import warn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .optim.plastic import Plastic
    from .optim.plasticity import LayerPlasticity
    from .optim.wrapper import PlasticityWrapper


# Above this share of frozen neurons a layer is warned of. In a run whose last task was learned badly 60 % were frozen.
FULL = 0.5
# The momentum that is advised where there is none: few plastic neurons then move up to ten times as far in a task.
_MOMENTUM = 0.9


class CapacityWarning(UserWarning):
    """There is little plasticity left where something is to be learned; the message names the layer."""


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
    """Warns of layers that have little room for more: `CapacityWarning`. Call it before a task.

    The warning says what would help under the options in force.

    Args:
        optimizer: the optimizer with the plasticity to look at.
        full: a layer is warned of if more than this share of its neurons is frozen.
        learning: output layer -> its neurons that the task at hand has to learn. Any of them that is frozen already is
            warned of: it would stay as it is. How many of the layer's other neurons are frozen, those of old tasks,
            then does not matter.

    Returns:
        The names of the layers that were warned of.

    Raises:
        TypeError: the optimizer has no `plasticity()`.
        KeyError: `learning` names a layer that is not consolidated.
        IndexError: or a neuron that the layer does not have.
    """
    if not hasattr(optimizer, "plasticity"):
        raise TypeError(
            f"the optimizer is of class {type(optimizer).__name__}, which has no plasticity(); expected NPC, NPCAdamW "
            "or PlasticityWrapper: other methods freeze no neurons"
        )
    layers, warned = optimizer.plasticity(), []
    for name, layer in layers.items():
        if layer.frozen > full and name not in (learning or {}):
            warned.append(name)
            _warn(
                f"layer {name!r}: {layer.frozen:.0%} of its neurons are frozen, so it has little room to learn. "
                f"To give it more: {_more_room(optimizer, name)}"
            )
    for name, neurons in (learning or {}).items():
        if name not in layers:
            raise KeyError(f"no consolidated layer {name!r}; {close_to(name, layers)}")
        importance, neurons = layers[name].importance, [int(neuron) for neuron in neurons]
        if outside := [neuron for neuron in neurons if not 0 <= neuron < len(importance)]:
            raise IndexError(
                f"layer {name!r} has {len(importance)} neurons, expected those to learn among them; got {outside}"
            )
        beta = _constants(optimizer, name).get("beta")
        still = layers[name].learning_rate == 0 if beta is None else importance >= beta
        if frozen := [neuron for neuron in neurons if still[neuron]]:
            warned.append(name)
            _warn(
                f"layer {name!r}: its neurons {', '.join(map(str, frozen))} are frozen before they were learned. "
                f"{_for_outputs(optimizer, name)}"
            )
    return list(dict.fromkeys(warned))


def _more_room(optimizer: Any, name: str) -> str:
    """What gives a layer more plasticity, and is not done already."""
    constants = _constants(optimizer, name)
    now = {key: f" (it is {constants[key]:g})" if key in constants else "" for key in ("beta", "delta")}
    advice = [
        f"raise beta{now['beta']}",
        f"lower delta{now['delta']}, so that importance to old tasks fades sooner",
        "give the layer more neurons",
    ]
    if _has_no_momentum(optimizer):
        advice.insert(1, f"train with momentum={_MOMENTUM}, so that plastic neurons move further")
    return f"{', '.join(advice[:-1])}, or {advice[-1]}"


def _for_outputs(optimizer: Any, name: str) -> str:
    """What keeps outputs plastic until they are learned, and is not done already."""
    if _constants(optimizer, name).get("normalize") == "active":
        return "They got gradients in earlier tasks: do not consolidate the layer, or give each task its own head"
    return (
        f"Normalize over active neurons (layers={{{name!r}: {{'normalize': 'active'}}}}), do not consolidate the "
        "layer, or give each task its own head"
    )


def _constants(optimizer: Any, name: str) -> dict[str, Any]:
    constants = getattr(optimizer, "constants", None)
    return {} if constants is None else constants(name)


def _has_no_momentum(optimizer: Any) -> bool:
    """Whether the optimizer could have momentum, and has none."""
    groups = getattr(optimizer, "param_groups", ())
    return bool(groups) and all(group.get("momentum") == 0 for group in groups)


def _warn(text: str) -> None:
    warn(text, CapacityWarning)


_IMPORTANCE, _RATE, _LIMIT = "#4c72b0", "#dd8452", "#555555"


def plot_plasticity(optimizer: Plastic | PlasticityWrapper) -> Figure:
    """Draws importance (eq. 4) above learning rates (eq. 7), a column per layer, the most important neurons first.

    The dashed line is beta: a neuron above it is frozen. Layers whose parameters require no gradient are left out.
    Returns a matplotlib figure to show or save.

    Raises:
        ImportError: matplotlib, which is optional, is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_plasticity draws with matplotlib: pip install 'npc_ext[plot]'") from error
    layers = optimizer.plasticity()
    trained = {name: layer for name, layer in layers.items() if optimizer.neurons[name].trains()}
    layers = trained or layers
    columns = len(layers)
    figure = Figure(figsize=(max(2.2 * columns, 4), 4.2), layout="constrained")
    axes: Any = figure.subplots(2, columns, squeeze=False)
    for column, (name, layer) in enumerate(layers.items()):
        order = layer.importance.argsort(descending=True).cpu()
        neurons = order.numel()
        for row, values, color in ((0, layer.importance, _IMPORTANCE), (1, layer.learning_rate, _RATE)):
            heights = values.cpu()[order].tolist()
            axes[row, column].stairs(heights, fill=True, color=color)
            axes[row, column].set_xlim(0, neurons)
            axes[row, column].set_xticks([0, neurons])
            axes[row, column].spines[["top", "right"]].set_visible(False)
            axes[row, column].set_ylim(bottom=0)
        axes[0, column].axhline(optimizer.constants(name)["beta"], color=_LIMIT, linestyle="--", linewidth=1)
        axes[0, column].set_title(f"{name or 'model'}\n{layer.frozen:.0%} frozen", fontsize=10)
        axes[1, column].set_xlabel("neurons", fontsize=9)
    for axis in axes[1]:
        axis.set_ylim(0, max(float(layer.learning_rate.max()) for layer in layers.values()) * 1.05 or 1)
    axes[0, 0].set_ylabel("importance $C_i$")
    axes[1, 0].set_ylabel(r"learning rate $\eta_i$")
    return figure
