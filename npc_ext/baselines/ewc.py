"""EWC, elastic weight consolidation, as a `torch.optim.Optimizer`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from ..optim.unknown_options import explains_options
from .anchored import Anchored
from .consolidation import FisherOptions, check_known, fisher

if TYPE_CHECKING:
    from typing_extensions import Unpack


class EWC(Anchored):
    """SGD that pulls weights back to their values after old tasks, in proportion to these tasks' Fisher information.

    Adds to the loss

        strength * sum over old tasks k of F_k (theta - theta_k)^2

    where theta_k are the weights at the end of task k, and F_k is the diagonal of the Fisher information there. Two
    numbers a weight hold all old tasks exactly. Source: Kirkpatrick et al., "Overcoming catastrophic forgetting in
    neural networks", PNAS 2017, arXiv 1612.00796, eq. 3. Its lambda / 2 is `strength`; its Fisher information is a mean
    over samples, as here.

    Use it as `torch.optim.SGD`, and call `consolidate` at the end of each task.

    Args:
        model: the network.
        lr: the learning rate.
        strength: the factor of the penalty, at least 0: half of the paper's lambda.
        momentum, nesterov, weight_decay, maximize: as in `torch.optim.SGD`.
        implicit: if True, the pull is a proximal step, which is stable for every strength. If False, the penalty's
            gradient is added to the loss's, as in the paper; training then diverges if `lr * strength * F` is too large
            for any weight, see `npc_ext.baselines.anchored.Anchored`.
        params: what to train, as for any torch optimizer: parameters, or groups of them with their options. Default:
            all of the model's parameters.
        backend: "native" (compiled kernels, or an error), "reference" (plain PyTorch) or "auto" (compiled kernels
            where they are available).

    Raises:
        ValueError: an argument is out of range or does not fit the model; the message says what to change.
        TypeError: an argument has the wrong type, or there is no such option.

    Example:
        >>> optimizer = EWC(model, lr=0.1, strength=100)
        >>> for task in tasks:
        ...     train(model, optimizer, task)
        ...     optimizer.consolidate(task.loader)
    """

    @explains_options
    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 0.1,
        *,
        strength: float = 100.0,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        implicit: bool = True,
        params: Iterable[Any] | None = None,
        maximize: bool = False,
        backend: Literal["auto", "native", "reference"] = "auto",
    ) -> None:
        super().__init__(locals())

    def consolidate(self, batches: Iterable[Any], **options: Unpack[FisherOptions]) -> None:
        """Anchors the weights at their current values, with the Fisher information of the task that has ended.

        Each call adds a task. It measures in evaluation mode, and leaves gradients, buffers and modes as they were.
        Trained parameters that are not in the model get no anchor.

        Args:
            batches: samples of the task, usually its training data, as in `npc_ext.baselines.consolidation.fisher`.
            options: passed on to `fisher`:

                * `outputs` picks the task's outputs, as in `outputs=lambda y: y[:, classes]`. Default: all.
                * `labels`: "sampled" (the default), "exact" or "data".
                * `loss`: for "data", the negative log-likelihood of one sample. Default: cross-entropy.
                * `forward` calls the model with a batch of one sample: `forward(model, batch)`. It is needed if the
                  model takes more than a batch's inputs, see the example.
                * `samples`: how many samples to use at most. Default: all.
                * `chunk_size`: how many samples' gradients are held at once. Default: as many as fit into 512 MiB.
                * `generator` draws the labels. Default: a copy of torch's generator of the CPU.
                * `progress`: show a bar. Default: True.

        Raises:
            ValueError: as in `fisher`; or parameters of the model were replaced after the optimizer was built. Nothing
                is changed then.
            TypeError: as in `fisher`. Nothing is changed then.

        Example:
            >>> optimizer.consolidate(loader, forward=lambda model, batch: model(batch[0], task))
            >>> optimizer.consolidate(loader, forward=lambda model, batch: model(**batch).logits)
        """
        check_known(options, FisherOptions.__annotations__)
        self._anchor(fisher(self._model, batches, parameters=self._parameters_to_anchor(), **options))
