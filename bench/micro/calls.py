"""How often a training step calls a kernel or communicates with other processes: counted, not timed.

The other processes are fake: in PyTorch's process group for tests every call returns at once. So any number of
processes fits one machine, and we count what this process would send to them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore

from npc_ext import NPC, NPCAdamW, PlasticityWrapper
from npc_ext.kernels import launch

from ..networks import paper_cnn
from ..rows import Row

PROCESSES = (1, 8, 1024)
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "NPC": NPC,
    "NPCAdamW": NPCAdamW,
    "PlasticityWrapper(AdamW)": lambda model, **options: PlasticityWrapper(
        torch.optim.AdamW(model.parameters(), lr=1e-3), model, **options
    ),
}


@contextmanager
def counted() -> Iterator[tuple[Counter[str], list[int]]]:
    """Counts calls of kernels by name, and collects the size in bytes of each all-reduced tensor."""
    launches, sizes = Counter[str](), list[int]()
    usual, all_reduce = launch._launch, distributed.all_reduce

    def counting_launch(kernel: str, *arguments: Any) -> None:
        launches[kernel] += 1
        usual(kernel, *arguments)

    def counting_all_reduce(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        sizes.append(tensor.nbytes)
        return all_reduce(tensor, *arguments, **options)

    with (
        mock.patch.object(launch, "_launch", counting_launch),
        mock.patch.object(distributed, "all_reduce", counting_all_reduce),
    ):
        yield launches, sizes


def calls(quick: bool) -> Iterator[Row]:
    """The calls of the paper's CNN in its third training step, by number of processes, without those for gradients."""
    for processes in PROCESSES:
        for name, make in OPTIMIZERS.items():
            distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
            try:
                model = paper_cnn()
                optimizer = make(model, process_group=distributed.group.WORLD)
                for _ in range(2):
                    _train(model, optimizer)
                with counted() as (launches, sizes):
                    _train(model, optimizer)
            finally:
                distributed.destroy_process_group()
            facts = {
                "neurons": sum(layer.neurons for layer in optimizer.neurons),
                "launches": dict(launches),
                "collective calls": len(sizes),
                "bytes in them": sum(sizes),
            }
            yield Row("calls", f"{name}, {processes:,} process{'es' if processes > 1 else ''}", facts=facts)
        if quick:
            return


def _train(model: nn.Module, optimizer: Any) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.tensor([0, 1, 2, 3])).backward()
    optimizer.step()
