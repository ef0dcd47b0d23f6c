"""SGD with anchors: what EWC, MAS, SI and SSL have in common.

Each old task k pulls every weight back to where the task left it, theta_k, as strongly as the weight mattered to it:

    loss + sum over k of strength * W_k (theta - theta_k)^2

A sum of parabolas is a parabola. So the sum W of all W_k and the mean of all theta_k weighted by them, the anchor,
hold all tasks exactly, but for a constant: two numbers a weight, however many tasks there were. The methods differ in
what W_k is. The pull is added where the weights are updated, in the same pass over memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import reference
from ..columns import AnchorOptions, Anchors, SGDOptions, columns_of
from ..kernels import launch
from ..optim.base import Descent
from ..optim.options import SGD_OPTIONS, check_choice, check_number
from ..optim.plan import Plan
from ..optim.succession import blocks_of, fitted


class Anchored(Descent):
    """The base class of EWC, MAS, SI and SSL.

    A parameter's state holds `stiffness`, the sum of W_k, and `anchor`, each with the parameter's shape, float32
    (float64 for float64 parameters), from the first `consolidate` on. Parameters added later have none until the next
    one.

    By default the pull is implicit, a proximal step (Moreau 1965; Parikh and Boyd, "Proximal Algorithms", 2014; with
    stochastic gradients: Toulis and Airoldi, arXiv 1408.2923). The explicit part of the step comes first. It is SGD's,
    along the loss's gradient g and the weight decay, and only these enter the momentum buffer v:

        d <- g + weight_decay * theta
        v <- momentum * v + d
        x  = theta - lr * v    (Nesterov: theta - lr * (d + momentum * v))

    The implicit part minimizes the penalty plus the squared distance from x:

        theta <- argmin over y of strength * W (y - anchor)^2 + (y - x)^2 / (2 eta)    with eta = lr / (1 - momentum)
               = (x + c * anchor) / (1 + c)                                            with c = 2 * eta * strength * W

    For every strength the result lies between x and the anchor, so the pull neither overshoots the anchor nor
    diverges. It is a gradient step whose gradient is taken where the step ends,
    y = x - eta * 2 * strength * W (y - anchor), and agrees with the explicit pull to first order in lr.

    Why eta and not lr: the buffer turns a constant gradient g into steps of lr * g / (1 - momentum). The pull does not
    go through the buffer, so it needs the same factor. Steps then come to rest at the minimum of the loss plus the
    penalty, as explicit ones do; with lr it would be the minimum for a strength of (1 - momentum) * strength. Where W
    is 0 the implicit part changes no bit. `maximize` changes the sign of g only.

    With `implicit=False` the penalty's gradient at theta is added to g and goes through the buffer, as in the papers.
    This diverges where lr * strength * W exceeds 1 for a weight (with momentum mu: 1 + mu; with Nesterov's:
    (1 + mu) / (1 + 2 mu)). Without momentum it overshoots the anchor from 1/2 on, with momentum earlier. The loss's
    curvature lowers these bounds.
    """

    _OPTIONS: ClassVar[tuple[str, ...]] = ("strength", "implicit", *SGD_OPTIONS)
    _STATE_TENSORS: ClassVar[tuple[str, ...]] = ("stiffness", "anchor")
    _KIND = "anchors"
    _ADDED_KEYS: ClassVar[Mapping[str, str]] = {
        "implicit": (
            "their anchors pulled explicitly. In each group, set group['implicit'] = False to go on like that, or True "
            "for the proximal step, which is stable for every strength"
        )
    }

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
        """The penalty on the weights as they are, sum of strength * W (theta - anchor)^2, for logging: one number.

        Steps minimize the loss plus this penalty. With several old tasks it is the sum of their penalties less a
        constant, so that it is 0 at the anchor.
        """
        total: Tensor | None = None
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state.get(parameter, {})
                if "stiffness" in state:
                    value = parameter.detach().to(state["anchor"].dtype)
                    own = reference.anchor_penalty(value, state["anchor"], state["stiffness"], group["strength"])
                    total = own if total is None else total + own.to(total.device)
        return torch.zeros((), dtype=torch.float32, device="cpu") if total is None else total

    def _trained_parameters(self) -> list[Tensor]:
        parameters = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        if not parameters:
            raise ValueError("no parameter requires a gradient, so there is nothing to consolidate")
        return parameters

    @torch.no_grad()
    def _anchor(self, importances: Mapping[Tensor, Tensor]) -> None:
        """Adds a task: the parameters where they are now, each with its importance W_k."""
        for parameter in importances:
            self._check_state_fits(parameter)
        for parameter, importance in importances.items():
            dtype = reference.compute_dtype(parameter.dtype)
            here = parameter.detach().to(dtype, copy=True)
            importance = launch.in_memory_order_of(parameter, importance.to(dtype))
            self._lay_out_state(parameter)
            state = self.state[parameter]
            if "stiffness" in state:
                state["stiffness"], state["anchor"] = reference.merged_anchors(
                    state["stiffness"], state["anchor"], importance, here
                )
            else:
                state["stiffness"], state["anchor"] = importance, here
        self._forget_plans()
        self._note_importance()

    def _held_in(self, states: Mapping[int, Mapping[str, Any]]) -> dict[str, dict[str, Tensor]]:
        own = ((name, states.get(id(parameter), {})) for name, parameter in self._trained_by_name().items())
        return {
            name: {tensor: state[tensor] for tensor in self._STATE_TENSORS if tensor in state}
            for name, state in own
            if "stiffness" in state
        }

    def _held(self) -> dict[str, dict[str, Tensor]]:
        return self._held_in({id(one): self.state.get(one, {}) for one in self._trained_by_name().values()})

    def _may_hold(self) -> dict[str, Tensor]:
        return self._trained_by_name()

    @torch.no_grad()
    def _take_importance(self, held: Mapping[str, Mapping[str, Tensor]]) -> None:
        taken: dict[Tensor, dict[str, Tensor]] = {}
        for name, parameter in self._trained_by_name().items():
            if name in held and parameter not in taken:  # it may have several names
                dtype = self._state_tensor_dtype(parameter)
                begin = {tensor: torch.zeros_like(parameter, dtype=dtype) for tensor in self._STATE_TENSORS}
                begin["anchor"] = parameter.detach().to(dtype, copy=True)
                blocks = blocks_of(self._model, name)
                taken[parameter] = {
                    what: fitted(own, begin[what], repr(name), blocks) for what, own in held[name].items()
                }
        for parameter, tensors in taken.items():
            self.state[parameter].update(tensors)

    def _make_plan(self, device: torch.device, members: list[tuple[Any, dict[str, Any]]]) -> _Plan:
        common = self._common(device, members)
        groups, kept = common["groups"], common["checked"]
        strength, implicit = (
            [float(group["strength"]) for group in groups],
            [bool(group["implicit"]) for group in groups],
        )
        columns = (columns_of(SGDOptions, groups, lr=common["rates"]), AnchorOptions(strength, implicit))
        # SI remembers where a task began before there is any stiffness.
        pairs = zip(kept["stiffness"], kept["anchor"], strict=True)
        anchors = [None if stiffness is None else anchor for stiffness, anchor in pairs]
        paths = kept.get("path", [None] * len(anchors))
        tables = self._tables(common["parameters"], columns)
        return _Plan(**common, columns=columns, tables=tables, anchors=Anchors(kept["stiffness"], anchors, paths))

    def _launch(self, plan: _Plan) -> None:
        if plan.tables is not None:
            launch.anchored_update_(plan.tables, plan.network(), plan.anchors)
            return
        with torch.no_grad():
            self._operations().anchored_update_(plan.network(), plan.anchors, *plan.columns)


@dataclass(frozen=True)
class _Plan(Plan):
    anchors: Anchors
