"""Functions that run in processes of their own, one per rank, for test_distributed.py."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from npc_ext import NPC, PlasticityWrapper

STEPS = 50
BATCH = 12
OPTIONS: dict[str, Any] = {"lr": 0.05, "delta": 0.98, "momentum": 0.9, "weight_decay": 0.01}
SCENARIOS: dict[str, Callable[[], Any]] = {}


def scenario(function: Callable[[], Any]) -> Callable[[], Any]:
    """Has every process run the function; what it returns is what the tests look at."""
    SCENARIOS[function.__name__] = function
    return function


def run(rank: int, processes: int, folder: str) -> None:
    """One process of a group: runs all scenarios and writes their results to a file."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    results = {}
    for name, function in SCENARIOS.items():
        torch.manual_seed(0)
        results[name] = function()
        distributed.barrier()
    torch.save(results, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


def network() -> nn.Module:
    """A convolution with a norm of its own, a hidden layer and an output layer; 5, 9 and 3 neurons."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 5, 3), nn.InstanceNorm2d(5, affine=True), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(45, 9), nn.ReLU(), nn.Linear(9, 3),
    )  # fmt: skip


def batch(step: int) -> tuple[Tensor, Tensor]:
    """The whole batch of a step."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, 1, 8, 8, generator=generator), torch.randint(3, (BATCH,), generator=generator)


def own_part(tensor: Tensor) -> Tensor:
    """What this process sees of a batch."""
    return tensor.chunk(distributed.get_world_size())[distributed.get_rank()]


def numbers(optimizer: NPC | PlasticityWrapper) -> dict[str, Tensor]:
    """Weights and importance."""
    weights = {f"weight {index}": p.detach().clone() for index, p in enumerate(optimizer.param_groups[0]["params"])}
    return weights | {name: layer.importance for name, layer in optimizer.plasticity().items()}


def alike(optimizer: NPC | PlasticityWrapper) -> bool:
    """Whether all processes have the same weights and importance, to the last bit."""
    own = torch.cat([tensor.flatten() for tensor in numbers(optimizer).values()]).view(torch.int32).long()
    checksum = (own * torch.arange(1, len(own) + 1)).sum()
    everybodys = [torch.zeros_like(checksum) for _ in range(distributed.get_world_size())]
    distributed.all_gather(everybodys, checksum)
    return all(bool(one == checksum) for one in everybodys)


def train(model: nn.Module, optimizer: NPC | PlasticityWrapper, *, steps: int = STEPS, part: Any = own_part) -> bool:
    """Trains on this process's parts; returns whether all processes were alike after every step."""
    same = True
    for step in range(steps):
        x, y = map(part, batch(step))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        same &= part is not own_part or alike(optimizer)
    return same


@scenario
def data_parallel() -> Any:
    model = DistributedDataParallel(network())
    optimizer = NPC(model, **OPTIONS)
    names = [layer.name for layer in optimizer.neurons]
    return {"alike": train(model, optimizer), "numbers": numbers(optimizer), "names": names}


@scenario
def with_frozen_rows() -> Any:
    """Some rows and a whole layer are certified; what is left out is so in all processes alike."""
    model = DistributedDataParallel(network())
    optimizer = NPC(model, lr=0.05, delta=0.9999)
    freeze(optimizer)
    same = train(model, optimizer)
    skipped = {name: layer.gradients_skipped for name, layer in optimizer.plasticity().items()}
    return {"alike": same, "numbers": numbers(optimizer), "skipped": skipped}


def freeze(optimizer: NPC) -> None:
    """Makes the convolution important, and so certain not to move."""
    optimizer.state[optimizer.neurons["0"].parameters[0].parameter]["importance"].fill_(3.0)


@scenario
def accumulated() -> Any:
    """Two micro-batches a step, the first one without synchronization."""
    model = DistributedDataParallel(network())
    optimizer = NPC(model, **OPTIONS)
    same = True
    for step in range(STEPS):
        x, y = map(own_part, batch(step))
        halves = list(zip(x.chunk(2), y.chunk(2), strict=True))
        optimizer.zero_grad()
        with model.no_sync():
            (F.cross_entropy(model(halves[0][0]), halves[0][1]) / 2).backward()
        (F.cross_entropy(model(halves[1][0]), halves[1][1]) / 2).backward()
        optimizer.step()
        same &= alike(optimizer)
    return {"alike": same, "numbers": numbers(optimizer)}


class Heads(nn.Module):
    """A body and two heads, of which a forward pass uses one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 7), nn.ReLU())
        self.heads = nn.ModuleList([nn.Linear(7, 3), nn.Linear(7, 3)])

    def forward(self, x: Tensor, head: int) -> Tensor:
        """(B, 1, 8, 8) to (B, 3)."""
        output: Tensor = self.heads[head](self.body(x))
        return output


@scenario
def heads_of_some_processes_only() -> Any:
    """Each process uses the head of its rank's parity; what one measured reaches all."""
    model = DistributedDataParallel(Heads(), find_unused_parameters=True)
    optimizer = NPC(model, lr=0.05, delta=0.98)
    same = True
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        for step in range(STEPS):
            x, y = map(own_part, batch(step))
            optimizer.zero_grad()
            F.cross_entropy(model(x, distributed.get_rank() % 2), y).backward()
            optimizer.step()
            same &= alike(optimizer)
    return {"alike": same, "numbers": numbers(optimizer)}


@scenario
def wrapped_adamw() -> Any:
    model = DistributedDataParallel(network())
    optimizer = PlasticityWrapper(torch.optim.AdamW(model.parameters(), lr=1e-3), model, delta=0.9)
    return {"alike": train(model, optimizer), "numbers": numbers(optimizer)}


@scenario
def sharded() -> Any:
    model = network()
    fully_shard(model)
    try:
        NPC(model)
    except ValueError as error:
        return str(error)
    return ""


@scenario
def collectives() -> Any:
    """How often all_reduce is called in a step, and with how many numbers."""
    model = DistributedDataParallel(network())
    optimizer = NPC(model, **OPTIONS)
    train(model, optimizer, steps=2)
    sizes, usual = [], distributed.all_reduce

    @functools.wraps(usual)
    def counted(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        sizes.append(tensor.numel())
        return usual(tensor, *arguments, **options)

    distributed.all_reduce = counted
    try:
        train(model, optimizer, steps=1)
    finally:
        distributed.all_reduce = usual
    return sizes


@scenario
def group_that_nobody_named() -> Any:
    model = network()
    optimizer = NPC(model, lr=0.05)
    before = numbers(optimizer)
    try:
        train(model, optimizer, steps=1)
    except RuntimeError as error:
        after = numbers(optimizer)
        return str(error), all(torch.equal(before[name], after[name]) for name in before)
    return "", False


@scenario
def each_for_itself() -> Any:
    model = network()
    optimizer = NPC(model, lr=0.05, process_group=None)
    return train(model, optimizer, steps=3)


@scenario
def group_that_was_named() -> Any:
    """Gradients are averaged by hand, importance by the optimizer."""
    model = network()
    optimizer = NPC(model, process_group=distributed.group.WORLD, **OPTIONS)
    same = True
    for step in range(STEPS):
        x, y = map(own_part, batch(step))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for parameter in model.parameters():
            distributed.all_reduce(parameter.grad)
            parameter.grad /= distributed.get_world_size()  # type: ignore[operator]
        optimizer.step()
        same &= alike(optimizer)
    return {"alike": same, "numbers": numbers(optimizer)}
