"""Several processes that train one model stay alike, and get the same result as one process."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, multiprocessing, nn
from torch.nn import functional as F

from npc_ext import NPC
from npc_ext.distributed.sinks import unwrapped

from ..tolerances import TRAJECTORY
from . import processes
from .processes import (
    FEW,
    HALF,
    KINDS,
    OPTIONS,
    STEPS,
    WHOLE,
    Attending,
    Heads,
    batch,
    bottleneck,
    freeze,
    load,
    network,
    numbers,
    of_kind,
    transposed,
    uneven_steps,
)

SECONDS = 300


@pytest.fixture(
    scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)], ids=lambda count: f"{count} processes"
)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of each of 2 or 3 processes, by scenario."""
    folder = tmp_path_factory.mktemp("ranks")
    results = [Results(of_one) for of_one in run_in_processes(processes.run, request.param, folder)]
    for result in results:
        result["folder"] = folder
    return results


NO_SHARDS = f"torch {torch.__version__} runs fully_shard on GPUs only"


class Results(dict[str, Any]):
    """Results by scenario. Tests of scenarios that this torch cannot run are skipped."""

    def __missing__(self, scenario: str) -> Any:
        if scenario in vars(processes) and not processes.HAS_SHARDS_ON_CPU:
            pytest.skip(NO_SHARDS)
        raise KeyError(scenario)


def run_in_processes(function: Callable[[int, int, str], None], count: int, folder: Path) -> list[Any]:
    """Runs a function in several processes, and returns what each of them writes."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("torch.distributed has no gloo here")
    running = multiprocessing.spawn(function, (count, str(folder)), count, join=False)
    for _ in range(SECONDS):
        if running.join(1):
            break
    else:
        for process in running.processes:
            process.kill()
        pytest.fail(f"the processes hang: no end after {SECONDS} s")
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(count)]


def alone(
    train: Callable[[nn.Module, NPC, int], Tensor],
    model: nn.Module,
    prepare: Callable[[NPC], None] | None = None,
    *,
    steps: int = STEPS,
    **options: Any,
) -> dict[str, Tensor]:
    """The weights and importance after one process has trained on the whole batch."""
    optimizer = NPC(model, **options)
    if prepare:
        prepare(optimizer)
    for step in range(steps):
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


def test_an_output_takes_part_if_any_process_gave_it_a_gradient(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        result = rank["outputs_of_some_processes_only"]
        assert result["alike"]
        assert result["moved"] == [True, True, False]
        assert (result["importance"] > 0).tolist() == [True, True, False]


@pytest.mark.parametrize(
    "scenario",
    [
        *("data_parallel", "accumulated", "group_that_is_given"),
        *("sharded", "sharded_and_accumulated"),
    ],
)
def test_processes_stay_alike_and_come_to_what_one_process_comes_to(ranks: list[dict[str, Any]], scenario: str) -> None:
    want = alone(plain_loss, network(), **OPTIONS)
    for rank in ranks:
        assert rank[scenario]["alike"]
        assert_close(rank[scenario]["numbers"], want)


def test_processes_with_fewer_batches_go_along_in_join(ranks: list[dict[str, Any]]) -> None:
    """And come to what one process comes to that has the batches of those that still train."""

    def loss_of_those_that_train(model: nn.Module, optimizer: Any, step: int) -> Tensor:
        parts = zip(*(tensor.chunk(len(ranks)) for tensor in batch(step)), strict=True)
        training = [F.cross_entropy(model(x), y) for rank, (x, y) in enumerate(parts) if step < uneven_steps(rank)]
        return sum(training) / len(ranks)  # type: ignore[return-value]

    steps = uneven_steps(len(ranks) - 1)
    want = alone(loss_of_those_that_train, network(), steps=steps, **OPTIONS)
    for rank in ranks:
        assert_close(rank["uneven"]["npc"]["numbers"], want)
        for result in rank["uneven"].values():
            assert result["alike"]


def test_the_model_clears_what_was_measured_also_where_it_is_sharded(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        thrown_away, plain = rank["sharded_and_cleared"]
        assert thrown_away["alike"] and plain["alike"]
        for name, number in plain["numbers"].items():
            assert torch.equal(thrown_away["numbers"][name], number)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_accelerate_may_shard_the_model_before_the_optimizer_is_built_or_after(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    want = alone(plain_loss, network(), steps=FEW, **OPTIONS)
    for rank in run_in_processes(processes.accelerated, 2, tmp_path):
        for way in ("together", "sharded before"):
            assert rank[way]["alike"]
            assert_close(rank[way]["numbers"], want)


def test_a_join_that_does_not_know_the_optimizer_is_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        contexts = rank["uneven_and_refused"]
        assert len(contexts) == 4
        assert all(re.search(r"write `with Join\(\[model, optimizer\]\):`", message) for message in contexts)


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
        message, unchanged = rank["group_that_is_missing"]
        assert f"{len(ranks)} processes" in message and "process_group=None" in message and unchanged


def test_each_process_may_train_for_itself(ranks: list[dict[str, Any]]) -> None:
    assert not any(rank["each_for_itself"] for rank in ranks)


@pytest.mark.parametrize("kind", processes.OTHER_OPTIMIZERS)
@pytest.mark.parametrize("scenario", ["other_optimizers", "sharded_other_optimizers"])
def test_other_optimizers_measure_together_too(ranks: list[dict[str, Any]], kind: str, scenario: str) -> None:
    model = network()
    optimizer = of_kind(kind, model)
    for step in range(STEPS):
        optimizer.zero_grad()
        plain_loss(model, optimizer, step).backward()
        optimizer.step()
    for rank in ranks:
        result = rank[scenario][kind]
        assert result["alike"]
        assert_close(*map(without_rounding, (result["numbers"], numbers(optimizer))))


def without_rounding(numbers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the bias before the norm: its gradient is only rounding, which Adam amplifies."""
    return {name: tensor for name, tensor in numbers.items() if name != "weight 1"}


# ---------------------------------------------------------------------------------------------------- fully_shard, FSDP2


def test_each_process_keeps_its_shards_only(ranks: list[dict[str, Any]]) -> None:
    for index, rank in enumerate(ranks):
        rows = [[chunk.shape[0] for chunk in torch.empty(of).chunk(len(ranks))] for of in (5, 5, 5, 5, 9, 9, 3, 3)]
        assert rank["sharded"]["rows"] == [chunks[index] for chunks in rows]
        assert rank["sharded"]["buffers"].count("Shard(dim=0)") == len(rows)


def test_an_optimizer_that_was_built_before_goes_on_with_shards_put_into_its_groups(
    ranks: list[dict[str, Any]],
) -> None:
    for rank in ranks:
        assert rank["sharded_with_an_optimizer_that_gets_the_shards"]["alike"]
        got, want = (rank[name]["numbers"] for name in ("sharded_with_an_optimizer_that_gets_the_shards", "sharded"))
        assert all(torch.equal(got[name], value) for name, value in want.items())


def test_the_table_says_that_shards_skip_nothing(ranks: list[dict[str, Any]]) -> None:
    note = "note: 5: its weight gradients are always computed for all neurons: its parameters are sharded"
    assert note in ranks[0]["sharded"]["table"]


@pytest.mark.parametrize(
    ("scenario", "make"),
    [
        ("sharded_with_empty_shards", bottleneck),
        ("sharded_and_replicated", network),
        ("sharded_transposed", transposed),
        ("sharded_attention", Attending),
        ("sharded_and_recomputed", network),
    ],
)
def test_shards_of_many_kinds_come_to_what_one_process_comes_to(
    ranks: list[dict[str, Any]], scenario: str, make: Callable[[], nn.Module]
) -> None:
    want = alone(plain_loss, make(), steps=FEW, **OPTIONS)
    for rank in ranks:
        results = rank[scenario]
        for result in results if isinstance(results, list) else [results]:
            assert result["alike"]
            assert_close(result["numbers"], want)


def test_shards_may_be_empty(ranks: list[dict[str, Any]]) -> None:
    assert [rank["sharded_with_empty_shards"]["rows"] for rank in ranks] == [1, 1, 0][: len(ranks)]


def test_shards_in_mixed_precision(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        result = rank["sharded_in_bfloat16"]
        assert result["alike"] and result["moved"] and result["dtypes"] == {torch.float32}


def test_shards_are_rounded_by_bits_of_their_own(ranks: list[dict[str, Any]]) -> None:
    results = [rank["sharded_and_rounded_at_random"] for rank in ranks]
    assert all(result["alike"] and result["steps"] == [3.0] * 8 for result in results)
    for seeds in zip(*(result["seeds"] for result in results), strict=True):
        assert len(set(seeds)) == len(ranks) and min(seeds) >= 0


def test_an_overflow_in_one_process_skips_the_step_of_all_shards(ranks: list[dict[str, Any]]) -> None:
    want = alone(plain_loss, network(), steps=5, **OPTIONS)
    for rank in ranks:
        result = rank["sharded_with_a_scaler"]
        assert result["unchanged"] and result["scale"] == 512
        assert_close(result["numbers"], want)


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        ("tensor_parallel", "'5.weight' is sharded in a way that NPC does not support: .* tensor parallelism"),
        ("both", r"_StridedShard.* expected Shard\(dim=0\) in one dimension of the mesh"),
        ("columns", r"Shard\(dim=1\).* expected Shard\(dim=0\)"),
        ("each_for_itself", "sharded over processes 0, 1.* but importance is added up over none"),
        ("grouped", "'2.weight' of a transposed convolution with 2 groups is sharded"),
        ("optimizer_first", "build the optimizer after fully_shard"),
        ("wrapper_first", "build the optimizer after fully_shard"),
        ("connections", "which CPC does not support; use DistributedDataParallel"),
        ("anchors", "which EWC does not support; use DistributedDataParallel"),
    ],
)
def test_what_cannot_be_done_with_shards_is_refused(ranks: list[dict[str, Any]], attempt: str, message: str) -> None:
    assert all(re.search(message, rank["refusals"][attempt]) for rank in ranks)


# ------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_of_two_processes_resume_in_any_number(ranks: list[dict[str, Any]], kind: str) -> None:
    want = ranks[0]["checkpoints"][kind]["uninterrupted"]
    for rank in ranks:
        got = rank["checkpoints"][kind]
        assert got["alike"]
        if len(ranks) == 2:
            assert all(torch.equal(got["resumed"][name], want[name]) for name in want)
        assert_close(*map(without_rounding, (got["resumed"], want)))


@pytest.mark.skipif(not processes.HAS_SHARDS_ON_CPU, reason=NO_SHARDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["checkpoint", "full state"])
def test_checkpoints_of_shards_resume_in_one_process_without_any(
    ranks: list[dict[str, Any]], kind: str, way: str
) -> None:
    model = network()
    optimizer = of_kind(kind, model)
    load(model, optimizer, str(ranks[0]["folder"] / kind))
    if way == "full state":
        optimizer = of_kind(kind, model)
        optimizer.load_state_dict(ranks[0]["checkpoints"][kind]["full"])
    for step in range(HALF, WHOLE):
        optimizer.zero_grad()
        plain_loss(model, optimizer, step).backward()
        optimizer.step()
    assert_close(*map(without_rounding, (numbers(optimizer), ranks[0]["checkpoints"][kind]["uninterrupted"])))


def test_a_state_without_processes_is_divided_among_them_and_not_the_other_way(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        result = rank["plain_states"]
        assert result["divided"] and "is sharded over processes, but the parameter is not; gather it" in result["error"]


@pytest.mark.slow
@pytest.mark.skipif(not processes.HAS_SHARDS_ON_CPU, reason=NO_SHARDS)
def test_a_process_that_is_killed_while_saving_costs_that_checkpoint_only(tmp_path: Path) -> None:
    with pytest.raises(multiprocessing.ProcessExitedException, match="signal SIGKILL"):
        run_in_processes(processes.die_while_saving, 2, tmp_path)
    half_saved = tmp_path / f"step-{HALF + 4}"
    assert any(half_saved.iterdir()) and not (half_saved / ".metadata").exists()
    for rank in run_in_processes(processes.resume, 2, tmp_path):
        assert rank["latest"] == HALF
        assert all(torch.equal(rank["resumed"][name], rank["uninterrupted"][name]) for name in rank["resumed"])


def test_a_group_is_a_group() -> None:
    with pytest.raises(TypeError, match=r"process_group is 'all'; expected a torch\.distributed process group"):
        NPC(network(), process_group="all")


def test_data_parallel_of_one_process_is_refused() -> None:
    with pytest.raises(TypeError, match="DistributedDataParallel with one process for each GPU"):
        NPC(nn.DataParallel(network()))


def test_the_first_fsdp_is_refused() -> None:
    class FullyShardedDataParallel(nn.Sequential):  # the real one needs a GPU
        pass

    with pytest.raises(TypeError, match="fully_shard"):
        NPC(nn.Sequential(FullyShardedDataParallel(network())))


def test_what_compile_returns_is_unwrapped() -> None:
    model = network()
    compiled: Any = torch.compile(model)
    assert unwrapped(compiled) is model and unwrapped(model) is model
    assert [layer.name for layer in NPC(compiled).neurons] == ["0", "5", "7"]


def test_optimizers_are_copied_without_their_group() -> None:
    optimizer = NPC(network(), process_group=None)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert not twin._shared_sinks.shared
