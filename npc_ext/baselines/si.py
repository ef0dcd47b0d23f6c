"""SI, synaptic intelligence, as a `torch.optim.Optimizer`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .. import reference
from ..optim.options import check_number
from ..optim.unknown_options import explains_options
from .anchored import Anchored
from .consolidation import NonFiniteImportanceError


class SI(Anchored):
    """SGD that pulls weights back to their values after the last task, in proportion to their part in lowering losses.

    During a task, every step adds to a path integral omega, with g the gradient of the task's loss without the penalty:

        omega <- omega - g * (movement of theta)

    At the end of the task

        W <- W + max(omega, 0) / (distance moved in this task ^ 2 + damping)
        anchor <- theta
        omega <- 0

    and later tasks add `strength * sum of W (theta - anchor)^2` to their loss. No data are needed at the end of a
    task. SI keeps three numbers a weight. Source: Zenke, Poole, Ganguli, "Continual Learning Through Synaptic
    Intelligence", ICML 2017, arXiv 1703.04200, eqs. 3 to 5. Its c is `strength`, its xi `damping`.

    Use it as `torch.optim.SGD`, and call `consolidate` at the end of each task. A parameter's first task begins with
    the first step that has a gradient for it.

    Args:
        model: the network.
        lr: the learning rate.
        strength: the factor of the penalty, at least 0: the paper's c.
        momentum, nesterov, weight_decay, maximize: as in `torch.optim.SGD`.
        damping: bounds the importance of weights that hardly moved, above 0: the paper's xi, a squared distance.
        implicit: if True, the pull is a proximal step, which is stable for every strength. If False, the penalty's
            gradient is added to the loss's, as in the paper; training then diverges if `lr * strength * W` is too large
            for any weight, see `npc_ext.baselines.anchored.Anchored`.
        params: what to train, as for any torch optimizer: parameters, or groups of them with their options. Default:
            all of the model's parameters.
        backend: "native" (compiled kernels, or an error), "reference" (plain PyTorch) or "auto" (compiled kernels
            where they are available).

    Raises:
        ValueError: an argument is out of range or does not fit the model; the message says what to change.
        TypeError: an argument has the wrong type, or there is no such option.

    Example:
        >>> optimizer = SI(model, lr=0.1, strength=0.1)
        >>> for task in tasks:
        ...     train(model, optimizer, task)
        ...     optimizer.consolidate()
    """

    _OPTIONS: ClassVar[tuple[str, ...]] = ("damping", *Anchored._OPTIONS)
    _STATE_TENSORS: ClassVar[tuple[str, ...]] = ("stiffness", "anchor", "path")
    _KIND = "anchors and paths"

    @explains_options
    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 0.1,
        *,
        strength: float = 0.1,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        damping: float = 1e-3,
        implicit: bool = True,
        params: Iterable[Any] | None = None,
        maximize: bool = False,
        backend: Literal["auto", "native", "reference"] = "auto",
    ) -> None:
        super().__init__(locals())

    def _check_options(self, options: Mapping[str, Any], where: str = "") -> None:
        super()._check_options(options, where)
        check_number("damping", options["damping"], where, positive=True)

    def _create_state(self, parameter: Any, group: dict[str, Any]) -> None:
        super()._create_state(parameter, group)
        state = self.state[parameter]
        if "path" not in state:
            for name in ("path", "anchor"):
                state[name] = self._new_state_tensor(parameter, name)

    @torch.inference_mode(False)  # state made in that mode could never change
    @torch.no_grad()
    def consolidate(self) -> None:
        """Turns the path integral of the task that has ended into importance, and anchors the weights at their values.

        Each call adds a task. An error changes nothing.

        Raises:
            RuntimeError: no step was taken since the last call, so there is no path to consolidate.
            ValueError: parameters of the model were replaced, or an option of a group is out of range.
            NonFiniteImportanceError: an importance is not finite. It is a ValueError.
        """
        self._check_before_consolidating()
        moved = [
            (parameter, group)
            for group in self.param_groups
            for parameter in group["params"]
            if "path" in self.state.get(parameter, {})
        ]
        if not any(bool(self.state[parameter]["path"].any()) for parameter, _ in moved):
            raise RuntimeError(
                "no step has moved a weight since the last consolidate(), so there is nothing to consolidate; call it "
                "once, after the task's training"
            )
        for parameter, _ in moved:
            self._check_state_fits(parameter)
        updated = [
            (parameter, self._stiffness_now(parameter, group["damping"]), self._new_state_tensor(parameter, "anchor"))
            for parameter, group in moved
        ]
        for parameter, stiffness, anchor in updated:
            self.state[parameter].update(stiffness=stiffness, anchor=anchor)
            self.state[parameter]["path"].zero_()
        self._forget_plans()
        self._note_importance()

    def _stiffness_now(self, parameter: Tensor, damping: float) -> Tensor:
        """W of a parameter, with the share of the task that has ended."""
        self._lay_out_state(parameter)
        state = self.state[parameter]
        distance = parameter.detach().to(state["anchor"].dtype) - state["anchor"]
        of_task = reference.path_stiffness(state["path"], distance, damping)
        if not bool(of_task.isfinite().all()):
            raise NonFiniteImportanceError(
                f"the importance of {self._name_of(parameter)} is not finite: gradients were huge, infinite or NaN "
                "during the task; clip them, or lower the learning rate (with implicit=False also strength: "
                "weights diverge if lr * strength is too large)"
            )
        return state["stiffness"] + of_task if "stiffness" in state else of_task
