"""How much a hidden layer's activations on task 1 change while task 2 is learned (Figure 4 of the paper).

The paper gives no formula. Here the change of neuron i over samples s is 2 sum_s |a'_si - a_si| / sum_s (|a_si| +
|a'_si|), with a before and a' after task 2. For small changes this is the relative change, but it is at most 2, so that
neurons that were almost silent before do not dominate the mean. A neuron that is never active has no change.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .tasks import Task
from .training import Machine, standard

SAMPLES = 256


class ActivationChange:
    """Compares activations of the layer before the output on samples of the first task, before and after the second.

    Attributes:
        before: activations and the neurons' importance after the first task. A resumed run restores them.
    """

    def __init__(self, task: Task, machine: Machine) -> None:
        self._images = standard(task.test_images[:SAMPLES], task, machine)
        self.before: dict[str, Tensor] = {}

    def after_task(self, number: int, model: nn.Module, optimizer: Any) -> dict[str, Any]:
        """Records activations after the first task. After the second, returns the neurons' importance and change."""
        if number == 0:
            importance = optimizer.plasticity()["hidden"].importance
            self.before = {"activations": self._activations(model), "importance": importance}
        if number != 1:
            return {}
        before, after = self.before["activations"].to(self._images.device), self._activations(model)
        size = (before.abs() + after.abs()).sum(0) / 2
        change = torch.where(size > 0, (after - before).abs().sum(0) / size, torch.nan)
        return {
            "importance": [round(value, 5) for value in self.before["importance"].tolist()],
            "change": [None if value != value else round(value, 5) for value in change.tolist()],
        }

    @torch.no_grad()
    def _activations(self, model: nn.Module) -> Tensor:
        """(SAMPLES, neurons) after the hidden layer's ReLU."""
        seen: list[Tensor] = []
        training = model.training
        handle = model.get_submodule("relu").register_forward_hook(lambda module, inputs, output: seen.append(output))
        try:
            model.eval()
            model(self._images)
        finally:
            handle.remove()
            model.train(training)
        return seen[0].float().clone()
