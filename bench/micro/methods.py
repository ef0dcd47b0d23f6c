"""Steps of the other methods, next to plain SGD and to the same methods in PyTorch's foreach operations."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from npc_ext import CPC, EWC, MAS, NPC, SI, SSL

from ..certified import LR
from ..rows import OURS

if TYPE_CHECKING:  # other revisions have it elsewhere
    from npc_ext.baselines.anchored import Anchored

OLD_TASKS = (1, 5, 9)


def with_gradients(model: nn.Module) -> nn.Module:
    """Gives every parameter a gradient, the same for copies of a model; returns the model."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return model


def after_tasks(optimizer: Anchored, tasks: int) -> Anchored:
    """Gives an optimizer old tasks with random importance; returns the optimizer."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(tasks):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        optimizer._anchor({p: torch.rand(p.shape, generator=generator) for p in parameters})
    return optimizer


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Size in bytes of an optimizer's state."""
    tensors = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _pull(parameters: list[Tensor], stiffness: list[Tensor], anchors: list[Tensor]) -> None:
    """Pulls parameters to one anchor, implicitly, with strength 1."""
    share = torch._foreach_div(stiffness, torch._foreach_add(stiffness, 1 / (2 * LR)))
    torch._foreach_lerp_(parameters, anchors, share)


class ForeachAnchors:
    """EWC, MAS and SSL in foreach operations, with an anchor for every entry of `tasks`.

    `npc_ext` has one entry for all tasks together; other libraries have one for every task.
    """

    def __init__(self, parameters: Sequence[Tensor], tasks: Sequence[tuple[list[Tensor], list[Tensor]]]) -> None:
        self.parameters, self.tasks = list(parameters), tasks

    @torch.no_grad()
    def step(self) -> None:
        """SGD's step, then w <- (w + sum of c * anchor) / (1 + sum of c) with c = 2 LR * stiffness, strength 1."""
        torch._foreach_add_(self.parameters, _gradients(self.parameters), alpha=-LR)
        if len(self.tasks) == 1:
            _pull(self.parameters, *self.tasks[0])
            return
        total: list[Tensor] | None = None
        for stiffness, anchors in self.tasks:
            torch._foreach_addcmul_(self.parameters, stiffness, anchors, value=2 * LR)
            if total is None:
                total = list(torch._foreach_mul(stiffness, 2 * LR))
            else:
                torch._foreach_add_(total, stiffness, alpha=2 * LR)
        if total is not None:
            torch._foreach_add_(total, 1)
            torch._foreach_div_(self.parameters, total)


class ForeachSI:
    """SI in foreach operations."""

    def __init__(
        self, parameters: Sequence[Tensor], stiffness: list[Tensor], anchors: list[Tensor], paths: list[Tensor]
    ) -> None:
        self.parameters, self.stiffness, self.anchors, self.paths = list(parameters), stiffness, anchors, paths

    @torch.no_grad()
    def step(self) -> None:
        """The step with the anchor's pull, and the path integral; strength 1."""
        gradients = _gradients(self.parameters)
        before = torch._foreach_add(self.parameters, 0)
        torch._foreach_add_(self.parameters, gradients, alpha=-LR)
        _pull(self.parameters, self.stiffness, self.anchors)
        moved = torch._foreach_sub(self.parameters, before)
        torch._foreach_addcmul_(self.paths, gradients, moved, value=-1)


class ForeachCPC:
    """CPC in foreach operations, with the paper's alpha, beta and delta. Layers are [weight, bias]."""

    def __init__(self, layers: Sequence[list[Tensor]], averages: Sequence[list[Tensor]]) -> None:
        self.layers, self.averages = layers, averages

    @torch.no_grad()
    def step(self) -> None:
        """Eqs. 3, 4 and 7 for every connection, and the weight update."""
        delta = 1 - 2e-4
        for layer, averages in zip(self.layers, self.averages, strict=True):
            gradients = _gradients(layer)
            importance = torch._foreach_mul(layer, gradients)
            torch._foreach_abs_(importance)
            mean = torch.stack([tensor.sum() for tensor in importance]).sum() / sum(
                tensor.numel() for tensor in importance
            )
            torch._foreach_mul_(averages, delta)
            torch._foreach_add_(averages, torch._foreach_mul(importance, (1 - delta) / mean))
            rates = torch._foreach_reciprocal(averages)
            torch._foreach_mul_(rates, 0.5)
            torch._foreach_sub_(rates, 1)
            torch._foreach_clamp_min_(rates, 0)
            torch._foreach_sqrt_(rates)
            torch._foreach_mul_(rates, 0.5 * LR)
            torch._foreach_clamp_max_(rates, LR)
            torch._foreach_addcmul_(layer, gradients, rates, value=-1)


class Method:
    """A method that has consolidated some old tasks, and its peers.

    Attributes:
        peers: the step of each peer; ours comes first.
        models: the models that they train, in the same order.
        state_bytes: size in bytes of our optimizer's state.
        prepare: called before each step.
    """

    def __init__(self, name: str, make: Callable[[], nn.Module], old_tasks: int) -> None:
        models = [with_gradients(make())]
        models += [with_gradients(copy.deepcopy(models[0])) for _ in range(3)]
        parameters = [list(model.parameters()) for model in models]
        sgd = torch.optim.SGD(parameters[1], lr=LR, fused=True)
        self.models = models
        self.prepare: Callable[[], None] = lambda: None
        ours: torch.optim.Optimizer
        foreach: dict[str, Any] = {}
        if name == "NPC":
            ours = npc = NPC(models[0], lr=LR)

            def measured() -> None:
                for layer in npc.neurons:
                    layer.sink.grad = torch.ones(layer.neurons)

            measured()
            ours.step()
            self.prepare = measured
        elif name == "CPC":
            ours = CPC(models[0], lr=LR)
            ours.step()
            averages = [ours.state[parameter]["importance"].clone() for parameter in parameters[0]]
            firsts = range(0, len(averages), 2)
            layers: list[list[Tensor]] = [list(parameters[2][at : at + 2]) for at in firsts]
            foreach = {"foreach": ForeachCPC(layers, [averages[at : at + 2] for at in firsts])}
            with torch.no_grad():
                for model in models[1:]:
                    model.load_state_dict(models[0].state_dict())
        else:
            ours, foreach = _anchored(name, models[0], parameters, old_tasks)
        optimizers: dict[str, Any] = {OURS: ours, "SGD fused": sgd, **foreach}
        self.peers: dict[str, Callable[[], object]] = {peer: optimizer.step for peer, optimizer in optimizers.items()}
        self.state_bytes = state_bytes(ours)

    def by_peer(self) -> dict[str, nn.Module]:
        """The model of each peer."""
        return dict(zip(self.peers, self.models, strict=False))


def _anchored(
    name: str, model: nn.Module, parameters: list[list[nn.Parameter]], old_tasks: int
) -> tuple[Anchored, dict[str, Any]]:
    method = {"EWC": EWC, "MAS": MAS, "SI": SI, "SSL": SSL}[name]
    ours: Anchored = method(model, lr=LR, strength=1.0)
    after_tasks(ours, old_tasks)
    # Move the weights away from the anchors, where the pull is zero.
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for copies in zip(*parameters, strict=True):
            move = 0.1 * torch.randn(copies[0].shape, generator=generator)
            for parameter in copies:
                parameter += move

    def state_tensors(kind: str) -> list[Tensor]:
        return [ours.state[parameter][kind].clone() for parameter in parameters[0]]

    merged = (state_tensors("stiffness"), state_tensors("anchor"))
    if name == "SI":
        paths = [torch.zeros_like(parameter) for parameter in parameters[2]]
        for parameter, path in zip(parameters[0], paths, strict=True):
            ours.state[parameter]["path"] = path.clone()
        return ours, {"foreach": ForeachSI(parameters[2], *merged, paths)}
    each = [([s / old_tasks for s in merged[0]], [a.clone() for a in merged[1]]) for _ in range(old_tasks)]
    return ours, {
        "foreach": ForeachAnchors(parameters[2], [merged]),
        "foreach, an anchor per task": ForeachAnchors(parameters[3], each),
    }
