"""SI, synaptic intelligence, as a `torch.optim.Optimizer`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from .. import reference
from ..optim.options import check_number
from .anchored import Anchored
from .consolidation import NonFiniteImportanceError


class SI(Anchored):
    """SGD that pulls weights back to where the last task left them, by how much their way lowered the loss.

    While a task is learned, every step takes its share of the path integral, omega <- omega - g * (movement of theta),
    with g the gradient of the task's own loss; at the task's end

        W <- W + max(omega, 0) / (distance moved in this task ^ 2 + damping),    anchor <- theta,    omega <- 0

    and later tasks add strength * sum of W (theta - anchor)^2 to their loss. No data are needed at the end of a
    task. Three numbers a weight. Source: Zenke, Poole, Ganguli, "Continual Learning Through Synaptic Intelligence",
    ICML 2017, arXiv 1703.04200, eqs. 3 to 5, whose c is `strength` and xi `damping`.

    Use it as `torch.optim.SGD`, and call `consolidate` at the end of each task. A parameter's first task begins with
    the first step that has a gradient for it.

    Args:
        model: the network.
        lr: learning rate.
        strength: the factor of the penalty.
        momentum, nesterov, weight_decay, maximize: as in `torch.optim.SGD`.
        damping: keeps weights that hardly moved from an importance without bounds; above 0.
        implicit: whether the pull to the anchors is a proximal step, stable for every strength. False: the penalty's
            gradient is added to the loss's, as in the paper; training diverges where lr * strength * W is too
            large for any weight (`Anchored` says where).
        params: what to train, as for any torch optimizer. Default: all of the model's parameters.
        backend: "native" (compiled kernels, or an error), "reference" (plain PyTorch) or "auto".

    Raises:
        ValueError, TypeError: an argument is out of range; the message says what to change.

    Example:
        >>> optimizer = SI(model, lr=0.1, strength=0.1)
        >>> for task in tasks:
        ...     train(model, optimizer, task)
        ...     optimizer.consolidate()
    """

    _OPTIONS: ClassVar[tuple[str, ...]] = ("damping", *Anchored._OPTIONS)
    _STATE_TENSORS: ClassVar[tuple[str, ...]] = ("stiffness", "anchor", "path")
    _KIND = "anchors and paths"

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.1,
        strength: float = 0.1,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        damping: float = 1e-3,
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
            "damping": damping,
        }
        super().__init__(model, params, options, backend)

    def _check_options(self, options: Mapping[str, Any], where: str = "") -> None:
        super()._check_options(options, where)
        check_number("damping", options["damping"], where, positive=True)

    def _create_state(self, parameter: Any, group: dict[str, Any]) -> None:
        super()._create_state(parameter, group)
        state = self.state[parameter]
        if "path" not in state:
            dtype = reference.compute_dtype(parameter.dtype)
            state["path"] = torch.zeros_like(parameter, dtype=dtype)
            state["anchor"] = parameter.detach().to(dtype, copy=True)

    @torch.no_grad()
    def consolidate(self) -> None:
        """Turns the path integral of the task that is over into importance, and anchors the weights where they are.

        Raises:
            RuntimeError: no step was taken since the last time, so there is no path to consolidate.
            NonFiniteImportanceError: an importance is not finite; a ValueError, too.

        Nothing is changed by an error.
        """
        walked = [
            (parameter, group, self.state[parameter])
            for group in self.param_groups
            for parameter in group["params"]
            if "path" in self.state.get(parameter, {})
        ]
        if not any(bool(state["path"].any()) for _, _, state in walked):
            raise RuntimeError(
                "no step has moved a weight since the last consolidate(), so there is nothing to consolidate; call it "
                "once, after the task's training"
            )
        for parameter, _, _ in walked:
            self._check_state_fits(parameter)
        stiffness = []
        for parameter, group, state in walked:
            self._lay_out_state(parameter)
            moved = parameter.detach().to(state["anchor"].dtype) - state["anchor"]
            own = reference.path_stiffness(state["path"], moved, group["damping"])
            if not bool(own.isfinite().all()):
                raise NonFiniteImportanceError(
                    f"the importance of {self._name_of(parameter)} is not finite: gradients were huge, infinite or NaN "
                    "during the task; clip them, or lower the learning rate (with implicit=False also strength: "
                    "weights diverge if lr * strength is too large)"
                )
            stiffness.append(state["stiffness"] + own if "stiffness" in state else own)
        for (parameter, _, state), total in zip(walked, stiffness, strict=True):
            state["stiffness"] = total
            state["anchor"] = parameter.detach().to(state["anchor"].dtype, copy=True)
            state["path"].zero_()
        self._forget_plans()
        self._note_importance()
