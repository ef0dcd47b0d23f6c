"""EWC, elastic weight consolidation, as a `torch.optim.Optimizer`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .anchored import Anchored
from .consolidation import FisherOptions, fisher

if TYPE_CHECKING:
    from typing_extensions import Unpack


class EWC(Anchored):
    """SGD that pulls weights back to their values after old tasks, in proportion to these tasks' Fisher information.

    Adds strength * sum over old tasks k of F_k (theta - theta_k)^2 to the loss, where theta_k are the weights at the
    end of task k, and F_k is the diagonal of the Fisher information there. Two numbers a weight hold all old tasks
    exactly. Source: Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017,
    arXiv 1612.00796, eq. 3. Its lambda / 2 is `strength`; its Fisher information is a mean over samples, as here.

    Use it as `torch.optim.SGD`, and call `consolidate` at the end of each task.

    Args:
        model: the network.
        strength: the factor of the penalty. Default: 100.
        lr, momentum, nesterov, weight_decay, implicit, params, maximize, backend: as in
            `npc_ext.baselines.anchored.Anchored`.

    Raises:
        ValueError, TypeError: as in `Anchored`.

    Example:
        >>> optimizer = EWC(model, lr=0.1, strength=100)
        >>> for task in tasks:
        ...     train(model, optimizer, task)
        ...     optimizer.consolidate(task.loader)
    """

    _STRENGTH = 100.0

    def consolidate(self, batches: Iterable[Any], **options: Unpack[FisherOptions]) -> None:
        """Anchors the weights at their current values, with the Fisher information of the task that has ended.

        Args:
            batches: samples of the task, usually its training data, as in `npc_ext.baselines.consolidation.fisher`.
            options: outputs, labels, loss, forward, samples, chunk_size, generator, progress: as in `fisher`.
                `outputs=lambda y: y[:, classes]` picks the task's outputs. If the model takes more than a batch's
                inputs, pass `forward`, see the example.

        Raises:
            ValueError, TypeError: as in `fisher`. Nothing is changed then.

        Example:
            >>> optimizer.consolidate(loader, forward=lambda model, batch: model(batch[0], task))
            >>> optimizer.consolidate(loader, forward=lambda model, batch: model(**batch).logits)
        """
        self._anchor(fisher(self._model, batches, parameters=self._trained_parameters(), **options))
