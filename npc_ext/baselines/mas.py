"""MAS, memory aware synapses, as a `torch.optim.Optimizer`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

from torch import Tensor, nn

from .anchored import Anchored
from .consolidation import output_sensitivity


class MAS(Anchored):
    """SGD that pulls weights back to where old tasks left them, by how much they moved the network's outputs.

    Adds strength * sum over old tasks k of W_k (theta - theta_k)^2 to the loss, where W_k is the mean over task k's
    samples of |d ||f(x)||^2 / d theta|. No labels are needed. All old tasks together take two numbers a weight,
    exactly. Source: Aljundi, Babiloni, Elhoseiny, Rohrbach, Tuytelaars, "Memory Aware Synapses: Learning what (not) to
    forget", ECCV 2018, arXiv 1711.09601, eqs. 2 to 4; there the weights after the latest task are the only anchor,
    here every task keeps its own.

    Use it as `torch.optim.SGD`, and call `consolidate` at the end of each task.

    Args:
        model: the network.
        lr: learning rate.
        strength: the factor of the penalty, lambda of eq. 4.
        momentum, nesterov, weight_decay, maximize: as in `torch.optim.SGD`.
        implicit: whether the pull to the anchors is a proximal step, stable for every strength. False: the penalty's
            gradient is added to the loss's, as in the paper; training diverges where lr * strength * W is too
            large for any weight (`Anchored` says where).
        params: what to train, as for any torch optimizer. Default: all of the model's parameters.
        backend: "native" (compiled kernels, or an error), "reference" (plain PyTorch) or "auto".

    Raises:
        ValueError, TypeError: an argument is out of range; the message says what to change.

    Example:
        >>> optimizer = MAS(model, lr=0.1, strength=1)
        >>> for task in tasks:
        ...     train(model, optimizer, task)
        ...     optimizer.consolidate(task.loader)
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.1,
        strength: float = 1.0,
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
        forward: Callable[[nn.Module, Any], Any] | None = None,
        samples: int | None = None,
        chunk_size: int | None = None,
        progress: bool = True,
    ) -> None:
        """Anchors the weights where they are, by the sensitivity of the outputs for the task that is over.

        Args:
            batches, outputs, forward, samples, chunk_size, progress: as in
                `npc_ext.baselines.consolidation.output_sensitivity`, which says how it is measured.
                `outputs=lambda y: y[:, classes]` picks the task's outputs. For a model that is not called with a
                batch's inputs alone, pass forward, see below.

        Raises:
            ValueError, TypeError: as in `output_sensitivity`. Nothing is changed then.

        Example:
            >>> optimizer.consolidate(loader, forward=lambda model, batch: model(batch[0], task))
            >>> optimizer.consolidate(loader, forward=lambda model, batch: model(**batch).logits)
        """
        importance = output_sensitivity(
            self._model,
            batches,
            parameters=self._trained_parameters(),
            outputs=outputs,
            forward=forward,
            samples=samples,
            chunk_size=chunk_size,
            progress=progress,
        )
        self._anchor(importance)
