"""A picture of what an optimizer protects: every layer's importance and learning rates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .plastic import Plastic
    from .wrapper import PlasticityWrapper

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
