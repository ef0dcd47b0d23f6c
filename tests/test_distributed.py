"""Several processes that train one model come to what one process comes to, and stay alike."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, multiprocessing, nn
from torch.nn import functional as F

from npc_ext import NPC, PlasticityWrapper
from npc_ext.distributed import unwrapped

from . import processes
from .processes import OPTIONS, STEPS, Heads, batch, freeze, network, numbers
from .tolerances import TRAJECTORY

SECONDS = 120


@pytest.fixture(scope="module", params=[2, 3], ids=lambda count: f"{count} processes")
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of 2 or of 3 processes came to, by scenario."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("torch.distributed has no gloo here")
    folder = tmp_path_factory.mktemp("ranks")
    running = multiprocessing.spawn(processes.run, (request.param, str(folder)), request.param, join=False)
    for _ in range(SECONDS):
        if running.join(1):
            break
    else:
        for process in running.processes:
            process.kill()
        pytest.fail(f"the processes hang: no end after {SECONDS} s")
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(request.param)]


def alone(
    train: Callable[[nn.Module, NPC, int], Tensor], model: nn.Module, prepare: Callable[[NPC], None] | None = None,
    **options: Any,
) -> dict[str, Tensor]:  # fmt: skip
    """The numbers of one process that trains on the whole batch."""
    optimizer = NPC(model, **options)
    if prepare:
        prepare(optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        train(model, optimizer, step).backward()
        optimizer.step()
    return numbers(optimizer)


def plain_loss(model: nn.Module, optimizer: Any, step: int) -> Tensor:
    x, y = batch(step)
    return F.cross_entropy(model(x), y)


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        error, size = (got[name] - want[name]).norm(), want[name].norm()
        assert error <= TRAJECTORY * size, f"{name} is off by {error:.2g} of {size:.2g}"


@pytest.mark.parametrize("scenario", ["data_parallel", "accumulated", "group_that_was_named"])
def test_processes_stay_alike_and_come_to_what_one_process_comes_to(ranks: list[dict[str, Any]], scenario: str) -> None:
    want = alone(plain_loss, network(), **OPTIONS)
    for rank in ranks:
        assert rank[scenario]["alike"]
        assert_close(rank[scenario]["numbers"], want)


def test_the_wrapping_is_not_in_the_names(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["data_parallel"]["names"] == ["0", "5", "7"]


def test_gradients_are_left_out_in_all_processes_alike(ranks: list[dict[str, Any]]) -> None:
    want = alone(plain_loss, network(), freeze, lr=0.05, delta=0.9999, skip_frozen=False)
    for rank in ranks:
        assert rank["with_frozen_rows"]["alike"]
        assert rank["with_frozen_rows"]["skipped"]["0"] == 1.0
        assert_close(rank["with_frozen_rows"]["numbers"], want)


def test_a_layer_that_some_processes_do_not_use_is_measured_by_the_others(ranks: list[dict[str, Any]]) -> None:
    def loss(model: nn.Module, optimizer: NPC, step: int) -> Tensor:
        x, y = batch(step)
        parts = zip(x.chunk(len(ranks)), y.chunk(len(ranks)), strict=True)
        losses = [F.cross_entropy(model(a, rank % 2), b) for rank, (a, b) in enumerate(parts)]
        return torch.stack(losses).mean()

    want = alone(loss, Heads(), lr=0.05, delta=0.98)
    for rank in ranks:
        assert rank["heads_of_some_processes_only"]["alike"]
        assert_close(rank["heads_of_some_processes_only"]["numbers"], want)


def test_a_step_has_one_collective_call_of_one_number_a_neuron(ranks: list[dict[str, Any]]) -> None:
    assert all(rank["collectives"] == [5 + 9 + 3] for rank in ranks)


def test_processes_that_nobody_grouped_are_refused_before_anything_changes(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        message, unchanged = rank["group_that_nobody_named"]
        assert f"{len(ranks)} processes" in message and "process_group=None" in message and unchanged


def test_each_process_may_train_for_itself(ranks: list[dict[str, Any]]) -> None:
    assert not any(rank["each_for_itself"] for rank in ranks)


def test_a_wrapped_optimizer_measures_together_too(ranks: list[dict[str, Any]]) -> None:
    model = network()
    optimizer = PlasticityWrapper(torch.optim.AdamW(model.parameters(), lr=1e-3), model, delta=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        plain_loss(model, optimizer, step).backward()
        optimizer.step()
    for rank in ranks:
        assert rank["wrapped_adamw"]["alike"]
        got, want = rank["wrapped_adamw"]["numbers"], numbers(optimizer)
        for one in (got, want):  # the bias before the norm: its gradient is rounding alone, which Adam blows up
            del one["weight 1"]
        assert_close(got, want)


def test_sharded_parameters_are_refused(ranks: list[dict[str, Any]]) -> None:
    assert all("is sharded over processes" in rank["sharded"] for rank in ranks)


def test_a_group_is_a_group() -> None:
    with pytest.raises(TypeError, match=r"process_group is 'all'; expected a torch\.distributed process group"):
        NPC(network(), process_group="all")


def test_data_parallel_of_one_process_is_refused() -> None:
    with pytest.raises(TypeError, match="DistributedDataParallel with one process for each GPU"):
        NPC(nn.DataParallel(network()))


def test_what_compile_returns_is_unwrapped() -> None:
    model = network()
    compiled: Any = torch.compile(model)
    assert unwrapped(compiled) is model and unwrapped(model) is model
    assert [layer.name for layer in NPC(compiled).neurons] == ["0", "5", "7"]


def test_optimizers_are_copied_without_their_group() -> None:
    optimizer = NPC(network(), process_group=None)
    for one in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert not one._shared_sinks.shared
