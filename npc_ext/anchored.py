"""SGD with anchors: what EWC, MAS, SI and SSL have in common.

Each old task k pulls every weight back to where the task left it, theta_k, as strongly as the weight mattered to it:

    loss + sum over k of strength * W_k (theta - theta_k)^2

A sum of parabolas is a parabola. So the sum W of all W_k and the mean of all theta_k weighted by them, the anchor,
hold all tasks exactly, but for a constant: two numbers a weight, however many tasks there were. The methods differ in
what W_k is. The pull is added where the weights are updated, in the same pass over memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import _launch, ops, reference
from .consolidation import NonFiniteImportanceError
from .descent import SGD_OPTIONS, Descent, Plan, check_number
from .succession import blocks_of, fitted


class Anchored(Descent):
    """The base class of EWC, MAS, SI and SSL.

    A parameter's state holds `stiffness`, the sum of W_k, and `anchor`, both of its shape, float32 (float64 for float64
    parameters), from the first `consolidate` on. Parameters added later have none until the next one.
    """

    _OPTIONS: ClassVar[tuple[str, ...]] = ("strength", *SGD_OPTIONS)
    _BESIDE: ClassVar[tuple[str, ...]] = ("stiffness", "anchor")
    _KIND = "anchors"

    def _check_options(self, options: Mapping[str, Any], where: str = "") -> None:
        super()._check_options(options, where)
        check_number("strength", options["strength"], where)

    @torch.no_grad()
    def penalty(self) -> Tensor:
        """The penalty on the weights as they are, sum of strength * W (theta - anchor)^2, for logging: one number.

        Its gradient is what steps add to the loss's. With several old tasks it is the sum of their penalties less a
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

    @contextmanager
    def _divergence_explained(self) -> Iterator[None]:
        """Has errors of an importance that is not finite say so if the anchors make training diverge."""
        try:
            yield
        except NonFiniteImportanceError as error:
            if reason := self._divergence():
                raise NonFiniteImportanceError(f"{error}. The likely cause: {reason}") from error
            raise

    def _divergence(self) -> str:
        """Why the pull to the anchors makes training diverge, as a sentence; empty if it does not.

        A step with momentum mu multiplies the distance to an anchor by a matrix whose eigenvalues are below 1 while
        lr * strength * W < 1 + mu, and with Nesterov's momentum < (1 + mu) / (1 + 2 mu).
        """
        for group in self.param_groups:
            lr = max(float(group["lr"]), float(group.get("initial_lr", 0.0)))  # schedules may have lowered it since
            momentum = group["momentum"]
            bound = (1 + momentum) / (1 + 2 * momentum if group["nesterov"] else 1)
            for parameter in group["params"]:
                stiffness = self.state.get(parameter, {}).get("stiffness")
                if stiffness is None or not stiffness.numel():
                    continue
                most = stiffness.max().item()
                if lr * group["strength"] * most > bound:
                    return (
                        f"strength is too large. lr * strength * W comes to {lr * group['strength'] * most:.3g} in "
                        f"{self._name_of(parameter)}, with W its importance to old tasks, and training diverges above "
                        f"{bound:.3g}: use a strength below {bound / (lr * most):.2g}, or a lower lr"
                    )
        return ""

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
            importance = _launch.in_memory_order_of(parameter, importance.to(dtype))
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
            name: {tensor: state[tensor] for tensor in self._BESIDE if tensor in state}
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
                dtype = self._dtype_beside(parameter)
                begin = {tensor: torch.zeros_like(parameter, dtype=dtype) for tensor in self._BESIDE}
                begin["anchor"] = parameter.detach().to(dtype, copy=True)
                blocks = blocks_of(self._model, name)
                taken[parameter] = {
                    what: fitted(own, begin[what], repr(name), blocks) for what, own in held[name].items()
                }
        for parameter, tensors in taken.items():
            self.state[parameter].update(tensors)

    def _make_plan(self, device: torch.device, members: list[tuple[Any, dict[str, Any]]]) -> Plan:
        parameters, groups = [p for p, _ in members], [group for _, group in members]
        count, common = len(parameters), self._common(device, members)
        sgd = (common["rates"], *([group[name] for group in groups] for name in SGD_OPTIONS))
        outside = ([-1] * count, [0] * count, [1] * count)  # of all layers
        tables = _launch.Tables(parameters, [], *outside, *sgd) if self._takes(parameters) else None
        options = ([float(group["strength"]) for group in groups], *sgd)
        return Plan(**common, options=options, tables=tables)

    def _launch(self, plan: Plan) -> None:
        stiffness, paths = plan.beside("stiffness"), plan.beside("path")
        # SI remembers where a task began before there is any stiffness.
        anchors = [
            anchor if stiff is not None else None
            for anchor, stiff in zip(plan.beside("anchor"), stiffness, strict=True)
        ]
        network = (plan.parameters, plan.gradients(), plan.momentum_buffers())
        if plan.tables is not None:
            strength = plan.options[0]
            tables = plan.tables
            _launch.anchored_update_(tables, *network, stiffness, anchors, paths, strength, None, None)
            return
        beside = (_or_empty(each, plan.device) for each in (stiffness, anchors, paths))
        update: Callable[..., None] = ops.anchored_update_
        if self._backend == "reference":
            update = reference.anchored_update_
        with torch.no_grad():
            update(*network, *beside, *plan.options)


def _or_empty(tensors: Sequence[Tensor | None], device: torch.device) -> list[Tensor]:
    nothing = torch.empty(0, dtype=torch.float32, device=device)
    return [nothing if tensor is None else tensor for tensor in tensors]
