"""Several processes that train one model stay equal, and get the same result as a single process."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, multiprocessing, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from npc_ext import NPC
from npc_ext.distributed.sinks import unwrapped

from ..methods import wrapped_adamw
from ..tolerances import TRAJECTORY
from ..training import same, set_importance
from . import processes
from .processes import (
    FEW,
    HALF,
    OPTIMIZERS,
    OPTIONS,
    OTHER_OPTIMIZERS,
    STEPS,
    WHOLE,
    Attending,
    Backward,
    backward,
    batch,
    bottleneck,
    load,
    loss_of_head,
    network,
    numbers,
    take_steps,
    transposed,
    two_heads,
    uneven_steps,
)

SECONDS = 300
NO_SHARDS = f"torch {torch.__version__} runs fully_shard on GPUs only"


class Results(dict[str, list[Any]]):
    """By scenario, the results of each process. Tests of scenarios that this torch cannot run are skipped."""

    def __init__(self, ranks: list[dict[str, Any]], folder: Path) -> None:
        super().__init__({scenario: [rank[scenario] for rank in ranks] for scenario in ranks[0]})
        self.processes, self.folder = len(ranks), folder

    def __missing__(self, scenario: str) -> Any:
        if scenario in vars(processes) and not processes.HAS_SHARDS_ON_CPU:
            pytest.skip(NO_SHARDS)
        raise KeyError(scenario)


@pytest.fixture(
    scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)], ids=lambda count: f"{count} processes"
)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The results of all scenarios in 2 or 3 processes."""
    folder = tmp_path_factory.mktemp("ranks")
    return Results(run_in_processes(processes.all_scenarios, request.param, folder), folder)


def run_in_processes(function: Callable[[], Any], count: int, folder: Path) -> list[Any]:
    """Runs a function in several processes, and returns what it returns in each of them."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("torch.distributed has no gloo here")
    running = multiprocessing.spawn(processes.run_in_group, (count, str(folder), function), count, join=False)
    for _ in range(SECONDS):
        if running.join(1):
            break
    else:
        for process in running.processes:
            process.kill()
        pytest.fail(f"the processes hang: no end after {SECONDS} s")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def alone(
    model: nn.Module, optimizer: Any = None, steps: Iterable[int] = STEPS, backward: Backward = backward
) -> dict[str, Tensor]:
    """The weights and importance after one process has trained on whole batches, by default with NPC."""
    optimizer = optimizer or NPC(model, **OPTIONS)
    take_steps(model, optimizer, map(batch, steps), backward)
    return numbers(optimizer)


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Names of layers must be equal, so they must not contain a wrapper of the model."""
    assert got.keys() == want.keys()
    for name in want:
        error, size = (got[name] - want[name]).norm(), want[name].norm()
        assert error <= TRAJECTORY * size, f"{name} is off by {error:.2g} of {size:.2g}"


def assert_alike_and_close(results: Iterable[dict[str, Any]], want: dict[str, Tensor]) -> None:
    for result in results:
        assert result["alike"]
        assert_close(result["numbers"], want)


def assert_close_under_adam(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Except for the bias before the norm: its gradient is only rounding, which Adam amplifies."""
    without = [{name: tensor for name, tensor in each.items() if name != "weight 1"} for each in (got, want)]
    assert_close(*without)


def test_an_output_takes_part_if_any_process_gave_it_a_gradient(results: Results) -> None:
    for result in results["outputs_of_some_processes_only"]:
        assert result["alike"]
        assert result["moved"] == [True, True, False]
        assert (result["numbers"]["7"] > 0).tolist() == [True, True, False]


# By scenario: the model that a single process trains for comparison, and its steps.
MODELS_AND_STEPS: dict[str, tuple[Callable[[], nn.Module], range]] = {
    "data_parallel": (network, STEPS),
    "accumulated": (network, STEPS),
    "with_a_scaler": (network, range(5)),
    "group_that_is_given": (network, STEPS),
    "sharded": (network, STEPS),
    "sharded_and_accumulated": (network, STEPS),
    "sharded_with_empty_shards": (bottleneck, FEW),
    "copies_in_a_mesh": (network, FEW),
    "shards_in_a_mesh": (network, FEW),
    "sharded_transposed": (transposed, FEW),
    "sharded_attention": (Attending, FEW),
    "sharded_and_recomputed": (network, FEW),
    "sharded_with_a_scaler": (network, range(5)),
}


@pytest.mark.parametrize("scenario", MODELS_AND_STEPS)
def test_processes_stay_alike_and_match_a_single_process(results: Results, scenario: str) -> None:
    make, steps = MODELS_AND_STEPS[scenario]
    assert_alike_and_close(results[scenario], alone(make(), steps=steps))


def test_processes_with_fewer_batches_take_part_in_join(results: Results) -> None:
    """The result is that of one process that gets the batches of all processes that still train."""

    def batch_of_those_that_train(step: int) -> tuple[Tensor, ...]:
        training = [rank for rank in range(results.processes) if step < uneven_steps(rank)]
        return tuple(map(torch.cat, zip(*(batch(step, rank, results.processes) for rank in training), strict=True)))

    def backward(model: nn.Module, x: Tensor, y: Tensor) -> None:
        (F.cross_entropy(model(x), y, reduction="sum") / len(batch(0)[1])).backward()

    model = network()
    optimizer = NPC(model, **OPTIONS)
    take_steps(model, optimizer, map(batch_of_those_that_train, range(uneven_steps(results.processes - 1))), backward)
    for result in results["uneven"]:
        assert_close(result["npc"]["numbers"], numbers(optimizer))
        assert all(of_kind["alike"] and of_kind["alike later"] for of_kind in result.values())


def test_a_sharded_model_clears_measurements_with_its_gradients(results: Results) -> None:
    for discarded, plain in results["sharded_and_cleared"]:
        assert discarded["alike"] and plain["alike"]
        assert same(discarded["numbers"].values(), plain["numbers"].values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_accelerate_may_shard_the_model_before_or_after_the_optimizer_is_built(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    want = alone(network(), steps=FEW)
    for result in run_in_processes(processes.accelerated, 2, tmp_path):
        assert_alike_and_close([result["together"], result["sharded before"]], want)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_the_trainer_shards_a_model_and_gets_what_copies_get(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    for copies, shards in run_in_processes(processes.by_the_trainer, 2, tmp_path):
        assert copies["alike"] and shards["alike"]
        assert_close(shards["numbers"], copies["numbers"])


def test_a_join_without_the_optimizer_raises_an_error(results: Results) -> None:
    for messages in results["uneven_and_refused"]:
        assert len(messages) == 4
        assert all("write `with Join([model, optimizer]):`" in message for message in messages)


def test_all_processes_skip_the_same_gradients(results: Results) -> None:
    model = network()
    optimizer = NPC(model, lr=0.05, delta=0.9999, skip_gradients="none")
    set_importance(optimizer, "0", 3.0)
    assert_alike_and_close(results["with_frozen_rows"], alone(model, optimizer))
    assert all(result["skipped"]["0"] == 1.0 for result in results["with_frozen_rows"])


def test_a_layer_that_some_processes_do_not_use_is_measured_by_the_others(results: Results) -> None:
    def backward(model: nn.Module, x: Tensor, y: Tensor) -> None:
        parts = zip(x.chunk(results.processes), y.chunk(results.processes), strict=True)
        losses = [loss_of_head(model, *part, rank % 2) for rank, part in enumerate(parts)]
        torch.stack(losses).mean().backward()

    model = two_heads()
    want = alone(model, NPC(model, lr=0.05, delta=0.98), backward=backward)
    assert_alike_and_close(results["heads_of_some_processes_only"], want)


def test_a_step_has_one_collective_call_of_one_number_a_neuron(results: Results) -> None:
    assert all(sizes == [5 + 9 + 3] for sizes in results["collectives"])


def test_training_without_a_process_group_raises_an_error_and_changes_nothing(results: Results) -> None:
    for message, unchanged in results["group_that_is_missing"]:
        assert f"{results.processes} processes" in message and "process_group=None" in message and unchanged


def test_each_process_may_train_by_itself(results: Results) -> None:
    assert not any(results["each_for_itself"])


@pytest.mark.parametrize("kind", OTHER_OPTIMIZERS)
@pytest.mark.parametrize("scenario", ["other_optimizers", "sharded_other_optimizers"])
def test_other_optimizers_share_their_measurements_too(results: Results, kind: str, scenario: str) -> None:
    model = network()
    want = alone(model, OPTIMIZERS[kind](model))
    for result in results[scenario]:
        assert result[kind]["alike"]
        assert_close_under_adam(result[kind]["numbers"], want)


# ---------------------------------------------------------------------------------------------------- fully_shard, FSDP2


def test_each_process_keeps_its_shards_only(results: Results) -> None:
    rows = [torch.empty(of).chunk(results.processes) for of in (5, 5, 5, 5, 9, 9, 3, 3)]
    for rank, result in enumerate(results["sharded"]):
        assert result["rows"] == [len(chunks[rank]) for chunks in rows]
        assert result["buffers"].count("Shard(dim=0)") == len(rows)


def test_an_optimizer_built_before_sharding_trains_the_shards_put_into_its_groups(results: Results) -> None:
    for result, want in zip(results["sharded_with_an_optimizer_that_gets_the_shards"], results["sharded"], strict=True):
        assert result["alike"]
        assert same(result["numbers"].values(), want["numbers"].values())


def test_the_table_says_that_shards_skip_nothing(results: Results) -> None:
    note = "note: 5: its weight gradients are always computed for all neurons: its parameters are sharded"
    assert note in results["sharded"][0]["table"]


def test_shards_may_be_empty(results: Results) -> None:
    rows = [result["rows"] for result in results["sharded_with_empty_shards"]]
    assert rows == [1, 1, 0][: results.processes]


def test_shards_in_mixed_precision(results: Results) -> None:
    for result in results["sharded_in_bfloat16"]:
        assert result["alike"]
        for name, tensor in result["numbers"].items():
            assert tensor.dtype == torch.float32 and not torch.equal(tensor, result["before"][name])


def test_each_process_rounds_its_shards_with_different_bits(results: Results) -> None:
    ranks = results["sharded_and_rounded_at_random"]
    assert all(result["alike"] and result["steps"] == [3.0] * 8 for result in ranks)
    for seeds in zip(*(result["seeds"] for result in ranks), strict=True):
        assert len(set(seeds)) == len(ranks) and min(seeds) >= 0


@pytest.mark.parametrize("scenario", ["with_a_scaler", "sharded_with_a_scaler"])
def test_an_overflow_in_one_process_skips_the_step_of_all(results: Results, scenario: str) -> None:
    for result in results[scenario]:
        assert result["unchanged"] and result["scale"] == 512


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
def test_unsupported_sharding_raises_an_error_that_explains(results: Results, attempt: str, message: str) -> None:
    assert all(re.search(message, messages[attempt]) for messages in results["refusals"])


# ------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_checkpoints_of_two_processes_resume_in_any_number(results: Results, kind: str) -> None:
    ranks = [result[kind] for result in results["checkpoints"]]
    for resumed in ranks:
        assert resumed["alike"]
        if results.processes == 2:
            assert same(resumed["numbers"].values(), ranks[0]["uninterrupted"].values())
        assert_close_under_adam(resumed["numbers"], ranks[0]["uninterrupted"])


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("way", ["checkpoint", "full state"])
def test_checkpoints_of_shards_resume_in_one_process_without_shards(results: Results, kind: str, way: str) -> None:
    saved = results["checkpoints"][0][kind]
    model = network()
    optimizer = OPTIMIZERS[kind](model)
    load(model, optimizer, str(results.folder / kind))
    if way == "full state":
        optimizer = OPTIMIZERS[kind](model)
        optimizer.load_state_dict(saved["full"])
    assert_close_under_adam(alone(model, optimizer, range(HALF, WHOLE)), saved["uninterrupted"])


def test_the_state_of_one_process_is_divided_among_several_but_not_gathered(results: Results) -> None:
    for result in results["plain_states"]:
        assert result["divided"] and "is sharded over processes, but the parameter is not; gather it" in result["error"]


@pytest.mark.slow
@pytest.mark.skipif(not processes.HAS_SHARDS_ON_CPU, reason=NO_SHARDS)
def test_a_process_killed_while_saving_loses_only_that_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(multiprocessing.ProcessExitedException, match="signal SIGKILL"):
        run_in_processes(processes.die_while_saving, 2, tmp_path)
    half_saved = tmp_path / f"step-{HALF + 4}"
    assert any(half_saved.iterdir()) and not (half_saved / ".metadata").exists()
    for result in run_in_processes(processes.resume, 2, tmp_path):
        assert result["latest"] == HALF
        assert same(result["resumed"].values(), result["uninterrupted"].values())


# ------------------------------------------------------------------------------------------------------- one process


class FullyShardedDataParallel(nn.Sequential):
    """Stands in for the real one, which needs a GPU."""


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: NPC(network(), process_group="all"),
            r"process_group is 'all'; expected a torch\.distributed process group",
        ),
        (lambda: NPC(nn.DataParallel(network())), "DistributedDataParallel with one process for each GPU"),
        (lambda: NPC(nn.Sequential(FullyShardedDataParallel(network()))), "fully_shard"),
    ],
    ids=["no group", "DataParallel", "the first FSDP"],
)
def test_unsupported_groups_and_wrappers_raise_an_error_that_explains(build: Callable[[], NPC], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        build()


@pytest.fixture
def two_processes() -> Iterator[Callable[[], None]]:
    """Starts torch.distributed with an imaginary second process."""
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")

    def start() -> None:
        torch.distributed.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=2)

    yield start
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("make", [NPC, wrapped_adamw])
def test_a_group_that_was_read_before_there_was_one_is_not_taken_for_none(
    two_processes: Callable[[], None], make: Callable[..., Any]
) -> None:
    model = network()
    take_steps(model, make(model, process_group=None), [batch(0)])  # in a single process
    early = make(model, process_group=torch.distributed.group.WORLD)
    optimizers = [early, copy.deepcopy(early), pickle.loads(pickle.dumps(early))]
    two_processes()
    for optimizer in optimizers:
        optimizer.load_importance(None)
        before = numbers(optimizer)
        with pytest.raises(RuntimeError, match=r"2 processes, .*after init_process_group: before it, WORLD is None"):
            take_steps(model, optimizer, [batch(0)])
        assert same(before.values(), numbers(optimizer).values())
    take_steps(model, make(model, process_group=None).load_importance(None), [batch(0)])
    take_steps(model, make(model, process_group=torch.distributed.group.WORLD).load_importance(None), [batch(0)])


def test_processes_that_average_gradients_do_not_measure_each_for_itself(two_processes: Callable[[], None]) -> None:
    two_processes()
    alone = torch.distributed.new_group([0])
    with pytest.raises(ValueError, match=r"process_group is None .*, but 2 processes train the model together"):
        NPC(DistributedDataParallel(network()), process_group=None)
    NPC(DistributedDataParallel(network(), process_group=alone), process_group=None)


def test_compiled_models_are_unwrapped() -> None:
    model = network()
    compiled: Any = torch.compile(model)
    assert unwrapped(compiled) is model and unwrapped(model) is model
    assert [layer.name for layer in NPC(compiled).neurons] == ["0", "5", "7"]


def test_optimizers_are_copied_without_their_group() -> None:
    optimizer = NPC(network(), process_group=None)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert not twin._shared_sinks.shared
