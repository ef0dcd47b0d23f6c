"""EWC, elastic weight consolidation, as a `torch.optim.Optimizer`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .anchored import Anchored
from .consolidation import fisher


class EWC(Anchored):
    """SGD that pulls weights back to where old tasks left them, by the Fisher information of the tasks.

    Adds strength * sum over old tasks k of F_k (theta - theta_k)^2 to the loss, where F_k is the diagonal of the
    Fisher information at the end of task k. All old tasks together take two numbers a weight, exactly. Source:
    Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017, arXiv 1612.00796, eq. 3,
    whose lambda / 2 is `strength`, and whose Fisher information is a mean over samples as here.

    Use it as `torch.optim.SGD`, and call `consolidate` at the end of each task.

    Args:
        model: the network.
        lr: learning rate.
        strength: the factor of the penalty.
        momentum, nesterov, weight_decay, maximize: as in `torch.optim.SGD`.
        implicit: whether the pull to the anchors is a proximal step, stable for every strength. False: the penalty's
            gradient is added to the loss's, as in the paper; training diverges where lr * strength * F is too
            large for any weight (`Anchored` says where).
        params: what to train, as for any torch optimizer. Default: all of the model's parameters.
        backend: "native" (compiled kernels, or an error), "reference" (plain PyTorch) or "auto".

    Raises:
        ValueError, TypeError: an argument is out of range; the message says what to change.

    Example:
        >>> optimizer = EWC(model, lr=0.1, strength=100)
        >>> for task in tasks:
        ...     train(model, optimizer, task)
        ...     optimizer.consolidate(task.loader)
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.1,
        strength: float = 100.0,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        *,
        implicit: bool = True,
        params: Iterable[Any] | None = None,
        maximize: bool = False,
        backend: Literal["auto", "native", "reference"] = "auto",
    ) -> None:
        options = {
            "lr": lr,
            "strength": strength,
            "implicit": implicit,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(model, params, options, backend)

    def consolidate(
        self,
        batches: Iterable[Any],
        *,
        outputs: Callable[[Any], Tensor] | None = None,
        labels: Literal["sampled", "data", "exact"] = "sampled",
        loss: Callable[[Tensor, Any], Tensor] | None = None,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        samples: int | None = None,
        chunk_size: int | None = None,
        generator: torch.Generator | None = None,
        progress: bool = True,
    ) -> None:
        """Anchors the weights where they are, by the Fisher information of the task that is over.

        Args:
            batches, outputs, labels, loss, forward, samples, chunk_size, generator, progress: as in
                `npc_ext.baselines.consolidation.fisher`, which says how it is measured. The task's training data are
                the usual choice; `outputs=lambda y: y[:, classes]` picks the task's outputs. For a model that is not
                called with a batch's inputs alone, pass forward, see below.

        Raises:
            ValueError, TypeError: as in `fisher`. Nothing is changed then.

        Example:
            >>> optimizer.consolidate(loader, forward=lambda model, batch: model(batch[0], task))
            >>> optimizer.consolidate(loader, forward=lambda model, batch: model(**batch).logits)
        """
        importance = fisher(
            self._model,
            batches,
            parameters=self._trained_parameters(),
            outputs=outputs,
            labels=labels,
            loss=loss,
            forward=forward,
            samples=samples,
            chunk_size=chunk_size,
            generator=generator,
            progress=progress,
        )
        self._anchor(importance)
