"""Work that is timed on both CPUs and GPUs: eq. 2 and optimizer steps, next to PyTorch's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from npc_ext import NPC, NPCAdamW, reference

from .rows import OURS
from .timing import Call, Case, check

# A beta so large that every neuron learns at full rate: the most work that NPC can have.
PLASTIC = 1e9
FROZEN = 10.0  # an importance far above beta
SLOW = 1 - 1e-6  # a delta: nothing freezes or thaws within a benchmark
Maker = Callable[[nn.Module], Any]


def eager_importance(n: Tensor, g: Tensor) -> Tensor:
    """Eq. 2 in plain PyTorch."""
    product = n * g
    return (product.flatten(2).sum(2) if product.ndim > 2 else product).float().abs().sum(0)


def importance_case(
    name: str,
    functions: Mapping[str, Callable[[Tensor, Tensor], Tensor]],
    inputs: list[tuple[Tensor, Tensor]],
    tolerance: float = 1e-4,
    **more: Any,
) -> Case:
    """The case of eq. 2, computed by several functions, each of which is checked against the reference.

    `more` sets further fields of the case.
    """
    n, g = inputs[0]
    want = reference.importance(n.double(), g.double())

    def agrees(peer: str) -> None:
        if peer in functions:
            check(peer, functions[peer](n, g), want, tolerance)

    peers = {peer: on_sets(function, inputs) for peer, function in functions.items()}
    return Case(name, peers, sets=len(inputs), check=agrees, bytes=n.nbytes + g.nbytes, **more)


def on_sets(function: Callable[[Tensor, Tensor], object], inputs: list[tuple[Tensor, Tensor]]) -> Call:
    """Turns a function of two tensors into a function of the index of an input set."""
    return lambda index: function(*inputs[index])


def _kind(
    ours: Callable[..., Any], theirs: Any, mix: tuple[int, int], **options: Any
) -> tuple[Callable[..., Any], dict[str, Maker], tuple[int, int]]:
    """Our optimizer, PyTorch's by name, and how many numbers a step reads and writes for each weight."""

    def peer(way: str) -> Maker:
        return lambda model: theirs(model.parameters(), **{way: True}, **options)

    peers = {f"{theirs.__name__} {way}": peer(way) for way in ("fused", "foreach")}
    return partial(ours, beta=PLASTIC, **options), peers, mix


OPTIMIZERS = {
    "SGD": _kind(NPC, torch.optim.SGD, (2, 1), lr=1e-3),
    "SGD, momentum": _kind(NPC, torch.optim.SGD, (3, 2), lr=1e-3, momentum=0.9),
    "AdamW": _kind(NPCAdamW, torch.optim.AdamW, (4, 3), lr=1e-3),
}


class Steps:
    """Copies of the same layers, one for each optimizer and input set. Gradients stay, so steps can be repeated.

    Args:
        size: approximate number of parameters in all layers.
        makers: functions that build the optimizers, by name; ours comes first.
        layers: number of square layers.
        device: device of the layers.
        sets: number of copies for each optimizer.

    Attributes:
        parameters: number of parameters.
        optimizers: by name, one for each set.
        moved: by name, how far the first weight moved in the first step.
    """

    def __init__(
        self, size: int, makers: Mapping[str, Maker], layers: int = 4, device: str = "cpu", sets: int = 1
    ) -> None:
        width = max(int((size / layers) ** 0.5), 1)
        self.parameters = layers * width * (width + 1)
        with torch.device(device):
            model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
        before = next(model.parameters()).detach().clone()
        self._measured = torch.rand(width, device=device)
        self._models: dict[str, list[nn.Module]] = {}
        self.optimizers: dict[str, list[Any]] = {}
        for name, make in makers.items():
            models = self._models[name] = [copy.deepcopy(model) for _ in range(sets)]
            self.optimizers[name] = [make(network) for network in models]
            for network in models:
                for parameter in network.parameters():
                    parameter.grad = torch.ones_like(parameter)
        self.moved = {}
        for name, step in self.measured_peers().items():
            step(0)
            self.moved[name] = next(self._models[name][0].parameters()).detach() - before

    def _measuring(self) -> Iterator[Any]:
        for optimizers in self.optimizers.values():
            yield from (optimizer for optimizer in optimizers if hasattr(optimizer, "neurons"))

    def _measure(self, optimizer: Any) -> None:
        for layer in optimizer.neurons:
            layer.sink.grad = self._measured

    def prepare(self) -> None:
        """Gives every layer a measured importance. A step consumes it."""
        for optimizer in self._measuring():
            self._measure(optimizer)

    def peers(self) -> dict[str, Call]:
        """The step of each set's optimizer. Call `prepare` before each step."""
        return {name: partial(self._step, name) for name in self.optimizers}

    def measured_peers(self) -> dict[str, Call]:
        """The same steps, each of which prepares its own optimizer."""

        def step(name: str, index: int) -> None:
            self._measure(self.optimizers[name][index])
            self._step(name, index)

        return {
            name: partial(step if hasattr(optimizers[0], "neurons") else self._step, name)
            for name, optimizers in self.optimizers.items()
        }

    def _step(self, name: str, index: int) -> None:
        self.optimizers[name][index].step()

    def freeze(self, share: float) -> None:
        """Freezes a random share of each layer's neurons."""
        for optimizer in self._measuring():
            for group in optimizer.param_groups:
                group.update(beta=0.5, delta=SLOW)
            freeze(optimizer, share)


def freeze(optimizer: Any, share: float) -> None:
    """Freezes a random share of each layer's neurons by their importance; all others get an importance of zero.

    With `delta=SLOW` the share stays constant, whatever is measured.
    """
    generator = torch.Generator().manual_seed(1)
    for layer in optimizer.neurons:
        importance = optimizer.state[layer.parameters[0].parameter]["importance"]
        chosen = torch.randperm(layer.neurons, generator=generator)[: round(share * layer.neurons)]
        importance.zero_()[chosen.to(importance.device)] = FROZEN


def certify(optimizer: Any) -> None:
    """Takes steps in which nothing moves, until the optimizer has issued certificates for its importance.

    It issues certificates every 8 to 32 steps, but none right after other code has changed importance; those of a GPU
    arrive a quarter of that interval later.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    for _ in range(2 * 32 + 8):
        for layer in optimizer.neurons:
            layer.sink.grad = torch.zeros_like(layer.sink)
        optimizer.step()
    optimizer.zero_grad()


def share_skipped(optimizer: Any) -> float:
    """The share of all neurons whose weight gradients the last step skipped."""
    layers = optimizer.plasticity().values()
    skipped = sum(float(layer.gradients_skipped) * len(layer.importance) for layer in layers)
    return skipped / sum(len(layer.importance) for layer in layers)


def training(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, autocast: bool = False
) -> Callable[[], None]:
    """One whole training step, on the same batch each time."""

    def train() -> None:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()

    return train


@contextmanager
def tf32(enabled: bool = True) -> Iterator[None]:
    """Multiplies float32 matrices in TF32 within the block, as is usual in training, or else in full precision."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if enabled else "highest")
    torch.backends.cudnn.allow_tf32 = enabled
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def trainers(
    make: Callable[[], nn.Module], x: Tensor, y: Tensor, autocast: bool = False
) -> dict[str, Callable[[], None]]:
    """The training steps of NPC and of fused SGD, on copies of one network."""
    model = make().to(x.device)
    twin = copy.deepcopy(model)
    ours, theirs = NPC(model, lr=1e-3), torch.optim.SGD(twin.parameters(), lr=1e-3, fused=True)
    return {OURS: training(model, ours, x, y, autocast), "SGD fused": training(twin, theirs, x, y, autocast)}
