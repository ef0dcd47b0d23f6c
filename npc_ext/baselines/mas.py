"""MAS, memory aware synapses, as a `torch.optim.Optimizer`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .anchored import Anchored
from .consolidation import SensitivityOptions, output_sensitivity

if TYPE_CHECKING:
    from typing_extensions import Unpack


class MAS(Anchored):
    """SGD that pulls weights back to their values after old tasks, in proportion to their effect on the outputs.

    Adds strength * sum over old tasks k of W_k (theta - theta_k)^2 to the loss, where theta_k are the weights at the
    end of task k, and W_k is the mean over its samples of |d ||f(x)||^2 / d theta|. No labels are needed. Two numbers a
    weight hold all old tasks exactly. Source: Aljundi, Babiloni, Elhoseiny, Rohrbach, Tuytelaars, "Memory Aware
    Synapses: Learning what (not) to forget", ECCV 2018, arXiv 1711.09601, eqs. 2 to 4. There the weights after the
    latest task are the only anchor; here every task has an anchor.

    Use it as `torch.optim.SGD`, and call `consolidate` at the end of each task.

    Args:
        model: the network.
        strength: the factor of the penalty, lambda of eq. 4. Default: 1.
        lr, momentum, nesterov, weight_decay, implicit, params, maximize, backend: as in
            `npc_ext.baselines.anchored.Anchored`.

    Raises:
        ValueError, TypeError: as in `Anchored`.

    Example:
        >>> optimizer = MAS(model, lr=0.1, strength=1)
        >>> for task in tasks:
        ...     train(model, optimizer, task)
        ...     optimizer.consolidate(task.loader)
    """

    _STRENGTH = 1.0

    def consolidate(self, batches: Iterable[Any], **options: Unpack[SensitivityOptions]) -> None:
        """Anchors the weights at their current values, with their effect on the outputs for the task that has ended.

        Args:
            batches: samples of the task, as in `npc_ext.baselines.consolidation.output_sensitivity`.
            options: outputs, forward, samples, chunk_size, progress: as in `output_sensitivity`.
                `outputs=lambda y: y[:, classes]` picks the task's outputs. If the model takes more than a batch's
                inputs, pass `forward`, see the example.

        Raises:
            ValueError, TypeError: as in `output_sensitivity`. Nothing is changed then.

        Example:
            >>> optimizer.consolidate(loader, forward=lambda model, batch: model(batch[0], task))
            >>> optimizer.consolidate(loader, forward=lambda model, batch: model(**batch).logits)
        """
        self._anchor(output_sensitivity(self._model, batches, parameters=self._trained_parameters(), **options))
