"""SGD with anchors: what EWC, MAS, SI and SSL share.

For each old task k, a penalty pulls every weight towards theta_k, its value at the end of that task. The factor W_k
says how much the weight mattered to the task:

    loss + sum over k of strength * W_k (theta - theta_k)^2

A sum of parabolas is a parabola. So two numbers a weight hold all old tasks exactly, up to a constant: W, the sum of
all W_k, and the anchor, the mean of all theta_k weighted by W_k. The methods differ in how they compute W_k. The kernel
that updates the weights also adds the pull, in the same pass over memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import reference
from ..columns import AnchorOptions, Anchors, columns_of
from ..kernels import launch
from ..optim.base import ModelOptimizer
from ..optim.options import SGD_OPTIONS, check_choice, check_number
from ..optim.plan import Plan


class Anchored(ModelOptimizer):
    """The base class of EWC, MAS, SI and SSL: SGD with a quadratic penalty on the distance to an anchor.

    A parameter's state holds `stiffness`, the sum of W_k, and `anchor`. Both have the parameter's shape and are float32
    (float64 for float64 parameters). The first `consolidate` creates them; a parameter that is added later gets them
    from the next one.

    By default the pull is implicit, a proximal step (Moreau 1965; Parikh and Boyd, "Proximal Algorithms", 2014; with
    stochastic gradients: Toulis and Airoldi, arXiv 1408.2923). The explicit part of the step comes first. It is SGD's,
    along the loss's gradient g and the weight decay, and only these enter the momentum buffer v:

        d <- g + weight_decay * theta
        v <- momentum * v + d
        x  = theta - lr * v    (Nesterov: theta - lr * (d + momentum * v))

    The implicit part minimizes the penalty plus the squared distance from x:

        theta <- argmin over y of strength * W (y - anchor)^2 + (y - x)^2 / (2 eta)
               = (x + c * anchor) / (1 + c)
        with eta = lr / (1 - momentum) and c = 2 * eta * strength * W

    For every strength the result lies between x and the anchor, so the pull neither overshoots the anchor nor
    diverges. It is a gradient step with the gradient taken at the end of the step,
    y = x - eta * 2 * strength * W (y - anchor), and agrees with the explicit pull to first order in lr.

    Why eta and not lr: the buffer turns a constant gradient g into steps of lr * g / (1 - momentum). The pull does not
    go through the buffer, so it needs the same factor. Steps then come to rest at the minimum of the loss plus the
    penalty, as explicit ones do; with lr it would be the minimum for a strength of (1 - momentum) * strength. Where W
    is 0 the implicit part changes no bit. `maximize` changes the sign of g only.

    With `implicit=False` the penalty's gradient at theta is added to g and goes through the buffer, as in the papers.
    This diverges where lr * strength * W exceeds 1 for a weight (with momentum mu: 1 + mu; with Nesterov's:
    (1 + mu) / (1 + 2 mu)). Without momentum it overshoots the anchor from 1/2 on, with momentum earlier. The loss's
    curvature lowers these bounds.

    Subclasses define W in `consolidate`, and a constructor whose default `strength` fits the size of their W.
    """

    _OPTIONS: ClassVar[tuple[str, ...]] = ("strength", "implicit", *SGD_OPTIONS)
    _STATE_TENSORS: ClassVar[tuple[str, ...]] = ("stiffness", "anchor")
    _KIND = "anchors"

    def _check_options(self, options: Mapping[str, Any], where: str = "") -> None:
        super()._check_options(options, where)
        check_number("strength", options["strength"], where)
        check_choice(f"{where}implicit", options["implicit"], (True, False))
        if options["implicit"] and not options["momentum"] < 1:
            raise ValueError(
                f"{where}momentum is {options['momentum']}; implicit anchors need a momentum below 1; lower it, or "
                "pass implicit=False"
            )

    @torch.no_grad()
    def penalty(self) -> Tensor:
        """The penalty at the current weights, sum of strength * W (theta - anchor)^2, as a scalar tensor for logging.

        Steps minimize the loss plus this penalty. It is the sum of the old tasks' penalties less a constant: at the
        anchor it is 0.

        Raises:
            ValueError: an anchor does not have the shape of its parameter.
        """
        total: Tensor | None = None
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state.get(parameter, {})
                if "stiffness" in state:
                    self._check_state_fits(parameter)
                    value = parameter.detach().to(state["anchor"].dtype)
                    term = reference.anchor_penalty(value, state["anchor"], state["stiffness"], group["strength"])
                    total = term if total is None else total + term.to(total.device)
        return torch.zeros((), dtype=torch.float32, device="cpu") if total is None else total

    def _parameters_to_anchor(self) -> list[Tensor]:
        """The trained parameters that are in the model; the outputs do not depend on others.

        Raises:
            ValueError: there are none, or as `_check_before_consolidating`.
        """
        self._check_before_consolidating()
        in_model = set(map(id, self._model.parameters()))
        parameters = [p for p in self._all_parameters() if p.requires_grad and id(p) in in_model]
        if not parameters:
            raise ValueError("no trained parameter requires a gradient, so there is nothing to consolidate")
        return parameters

    def _check_before_consolidating(self) -> None:
        """Raises ValueError if options are out of range, or if parameters of the model were replaced."""
        for group in self.param_groups:
            self._check_options({**self.defaults, **group, "lr": 0.0})  # steps check the rate
        if not self._knows(self._all_parameters()):
            self._compare_with_model()  # moves the state of replaced parameters to those that are in the groups now
        if self._known_model is None:
            return
        lost = self._known_model.lost(self._model, set(map(id, self._all_parameters())))
        lost = [old for old in lost if any(new.requires_grad for new in old.replacements.values())]
        if lost:
            raise ValueError(self._text_of_lost(lost, "neither trained nor anchored"))

    @torch.inference_mode(False)  # consolidate may be called there, but state made there could never change
    @torch.no_grad()
    def _anchor(self, importances: Mapping[Tensor, Tensor]) -> None:
        """Adds a task: anchors each parameter at its current values, with its importance W_k."""
        for parameter in importances:
            self._check_state_fits(parameter)
        merged: dict[Tensor, tuple[Tensor, Tensor]] = {}
        for parameter, importance in importances.items():
            value = self._new_state_tensor(parameter, "anchor")
            importance = launch.in_memory_order_of(parameter, importance.to(value.dtype))
            self._lay_out_state(parameter)
            state = self.state[parameter]
            if "stiffness" in state:
                importance, value = reference.merged_anchors(state["stiffness"], state["anchor"], importance, value)
            merged[parameter] = importance, value
        for parameter, (importance, value) in merged.items():
            self.state[parameter].update(stiffness=importance, anchor=value)
        self._forget_plans()
        self._note_importance()

    def _summary(self) -> str:
        """How much of what is trained has an anchor, for `repr`."""
        parameters = [p for p in self._all_parameters() if p.requires_grad]
        anchored = sum(p.numel() for p in parameters if "stiffness" in self.state.get(p, {}))
        text = f"anchored: {anchored:,} of {sum(p.numel() for p in parameters):,} trained elements"
        return text if anchored else f"{text} (consolidate() at the end of a task anchors them)"

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-2]}\n\n{self._summary()}\n)"

    def _may_hold(self) -> dict[str, Tensor]:
        return self._trained_by_name()

    def _new_state_tensor(self, parameter: Tensor, name: str) -> Tensor:
        if name == "anchor":
            return parameter.detach().to(self._state_tensor_dtype(parameter), copy=True)
        return super()._new_state_tensor(parameter, name)

    def _make_plan(self, common: dict[str, Any]) -> _Plan:
        groups, kept = common["groups"], common["checked"]
        columns = (common["options"], columns_of(AnchorOptions, groups))
        # SI remembers where a task began before there is any stiffness.
        pairs = zip(kept["stiffness"], kept["anchor"], strict=True)
        anchors = [None if stiffness is None else anchor for stiffness, anchor in pairs]
        paths = kept.get("path", [None] * len(anchors))
        prepared = self._prepared(common["device"], common["parameters"], columns)
        return _Plan(**common, columns=columns, prepared=prepared, anchors=Anchors(kept["stiffness"], anchors, paths))

    def _launch(self, plan: _Plan) -> None:
        if plan.prepared is not None:
            launch.anchored_update_(plan.prepared, plan.network(), plan.anchors)
            return
        with torch.no_grad():
            self._operations().anchored_update_(plan.network(), plan.anchors, *plan.columns)


@dataclass(frozen=True)
class _Plan(Plan):
    anchors: Anchors
