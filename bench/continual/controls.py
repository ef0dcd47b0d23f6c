"""Controls: what is left of a method's lead if one of its ideas is taken away.

NPC lowers learning rates over time, and it lowers them for the neurons that matter. The first control only lowers them.
The second one lowers them for other neurons.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from npc_ext import NPC


def _without_fixed_points(count: int, generator: torch.Generator) -> Tensor:
    """A random order of `count` numbers in which none keeps its place: one cycle through all of them."""
    cycle = torch.randperm(count, generator=generator)
    order = torch.empty_like(cycle)
    order[cycle] = cycle.roll(1)
    return order


class FallingSGD(torch.optim.SGD):
    """SGD whose learning rate falls from task to task, except for that of the output layer."""

    def __init__(self, model: nn.Module, output: nn.Module, lr: float) -> None:
        head = list(output.parameters())
        body = [parameter for parameter in model.parameters() if not any(parameter is other for other in head)]
        super().__init__([{"params": body}, {"params": head}], lr=lr, fused=True)

    def next_task(self, factor: float) -> None:
        """Multiplies the learning rate of the body by `factor`."""
        self.param_groups[0]["lr"] *= factor


class ShuffledNPC(NPC):
    """NPC in which every neuron has the importance of another neuron of its layer.

    Each layer has one order for the whole run. The output layer keeps its own importance.

    Args:
        model: the model.
        output: the name of the output layer.
        seed: seed of the orders.
        options: NPC's options.
    """

    def __init__(self, model: nn.Module, output: str, seed: int, **options: object) -> None:
        super().__init__(model, **options)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(seed)
        self._orders = {
            layer.name: _without_fixed_points(layer.sink.numel(), generator)
            for layer in self.neurons
            if layer.name != output
        }
        self.register_step_pre_hook(lambda *_: self._shuffle())

    def _shuffle(self) -> None:
        for layer in self.neurons:
            if layer.name in self._orders and layer.sink.grad is not None:
                layer.sink.grad = layer.sink.grad[self._orders[layer.name]]
