"""Functions that test_distributed.py runs in several processes, one per rank."""

from __future__ import annotations

import copy
import os
import signal
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint
from torch.distributed.algorithms import Join
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from npc_ext import CPC, EWC, NPC, NPCAdamW, PlasticityWrapper
from npc_ext.distributed.shards import local

from ..models import ManyHeads, normalized_cnn
from ..training import images, same, set_importance

STEPS = range(50)
FEW = range(20)  # enough if another scenario takes all steps in the same way
OPTIONS: dict[str, Any] = {"lr": 0.05, "delta": 0.98, "momentum": 0.9, "weight_decay": 0.01}
OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "npc": lambda model: NPC(model, **OPTIONS),
    "without_momentum": lambda model: NPC(model, **{**OPTIONS, "momentum": 0.0}),
    "npc_adamw": lambda model: NPCAdamW(model, lr=1e-3, delta=0.9),
    "wrapped_adamw": lambda model: PlasticityWrapper(torch.optim.AdamW(model.parameters(), lr=1e-3), model, delta=0.9),
}
OTHER_OPTIMIZERS = ("npc_adamw", "wrapped_adamw")
SCENARIOS: dict[str, Callable[[], Any]] = {}


def scenario(function: Callable[[], Any]) -> Callable[[], Any]:
    """Runs the function in every process. The tests check what it returns."""
    SCENARIOS[function.__name__] = function
    return function


# torch 2.6 has fully_shard, but only for GPUs.
HAS_SHARDS_ON_CPU = torch.__version__ >= (2, 7)


def scenario_of_shards(function: Callable[[], Any]) -> Callable[[], Any]:
    """A scenario if torch runs fully_shard on the CPU."""
    return scenario(function) if HAS_SHARDS_ON_CPU else function


def run_in_group(rank: int, processes: int, folder: str, function: Callable[[], Any]) -> None:
    """Runs a function in one process of a group, which meets in a new file, and writes its result to a file."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.chdir(folder)
    store = f"file://{folder}/store of {function.__name__}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=processes)
    torch.save(function(), f"{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def all_scenarios() -> dict[str, Any]:
    """Runs all scenarios, and returns their results by name."""
    results = {}
    for name, function in SCENARIOS.items():
        torch.manual_seed(0)
        results[name] = function()
        distributed.barrier()
    return results


def network() -> nn.Module:
    """A convolution with a norm, a hidden layer and an output layer; 5, 9 and 3 neurons."""
    return normalized_cnn(5, 9)


def batch(step: int, rank: int = 0, processes: int = 1) -> tuple[Tensor, Tensor]:
    """The batch of a step, or the part of it that one of several processes sees."""
    x, y = (tensor.chunk(processes)[rank] for tensor in images(step, size=12))
    return x, y


def parts(steps: Iterable[int]) -> list[tuple[Tensor, Tensor]]:
    """What this process sees of the batches of these steps."""
    return [batch(step, distributed.get_rank(), distributed.get_world_size()) for step in steps]


def backward(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """The backward pass of a step. Some scenarios use another one."""
    F.cross_entropy(model(x).float(), y).backward()


Backward = Callable[[Any, Tensor, Tensor], None]


def take_steps(
    model: nn.Module, optimizer: Any, batches: Iterable[tuple[Tensor, Tensor]], backward: Backward = backward
) -> None:
    """Takes one step for each batch."""
    for x, y in batches:
        optimizer.zero_grad()
        backward(model, x, y)
        optimizer.step()


def numbers(optimizer: Any, gather: bool = True) -> dict[str, Tensor]:
    """Weights and importance. Sharded weights are gathered, or left out."""
    weights = {f"weight {index}": weight for index, weight in enumerate(optimizer.param_groups[0]["params"])}
    whole = {
        name: weight.full_tensor() if isinstance(weight, DTensor) else weight
        for name, weight in weights.items()
        if gather or not isinstance(weight, DTensor)
    }
    importance = {name: layer.importance for name, layer in optimizer.plasticity().items()}
    return {name: tensor.detach().clone() for name, tensor in whole.items()} | importance


def alike(optimizer: Any, gather: bool = True) -> bool:
    """Whether all processes have the same bits of these numbers."""
    bits = torch.cat([tensor.flatten() for tensor in numbers(optimizer, gather).values()]).view(torch.int32).long()
    checksum = (bits * torch.arange(1, len(bits) + 1)).sum()
    checksums = [torch.zeros_like(checksum) for _ in range(distributed.get_world_size())]
    distributed.all_gather(checksums, checksum)
    return all(bool(other == checksum) for other in checksums)


def train(model: nn.Module, optimizer: Any, steps: Iterable[int] = STEPS, backward: Backward = backward) -> bool:
    """Trains on the parts of this process. Returns whether all processes were alike after every step."""
    stayed = True
    for step in steps:
        take_steps(model, optimizer, parts([step]), backward)
        stayed &= alike(optimizer, gather=False)
    return alike(optimizer) and stayed


def trained(
    model: nn.Module, optimizer: Any = None, steps: Iterable[int] = STEPS, backward: Backward = backward
) -> dict[str, Any]:
    """Trains, by default with NPC; returns whether all processes were alike, and the weights and importance."""
    optimizer = optimizer or NPC(model, **OPTIONS)
    return {"alike": train(model, optimizer, steps, backward), "numbers": numbers(optimizer)}


def refusal(attempt: Callable[..., Any], *arguments: Any) -> str:
    """The message of the error that an attempt raises; empty if it raises none."""
    try:
        attempt(*arguments)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


# ----------------------------------------------------------------------------------------------- DistributedDataParallel


@scenario
def data_parallel() -> Any:
    return trained(DistributedDataParallel(network()))


def trained_by_others(make: Callable[[], nn.Module]) -> dict[str, Any]:
    """The results of the other optimizers, by kind."""
    results = {}
    for kind in OTHER_OPTIMIZERS:
        model = make()
        results[kind] = trained(model, OPTIMIZERS[kind](model))
    return results


@scenario
def other_optimizers() -> Any:
    return trained_by_others(lambda: DistributedDataParallel(network()))


def accelerated() -> dict[str, Any]:
    """Accelerate (`fsdp_version=2`) shards the model after or before the optimizer is built."""
    rank, processes = str(distributed.get_rank()), str(distributed.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, ACCELERATE_USE_CPU="true")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType, fsdp2_prepare_model

    accelerator = Accelerator(cpu=True)

    def backward(model: nn.Module, x: Tensor, y: Tensor) -> None:
        accelerator.backward(F.cross_entropy(model(x), y))
        accelerator.clip_grad_norm_(model.parameters(), 1e9)

    results = {}
    for way in ("together", "sharded before"):
        model: Any = network()
        if way == "sharded before":
            fsdp2_prepare_model(accelerator, model)
        npc = NPC(model, **OPTIONS)
        # Accelerate knows FSDP on GPUs only, and sets this back.
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
        take_steps(*accelerator.prepare(model, npc), parts(FEW), backward)
        results[way] = {"alike": alike(npc), "numbers": numbers(npc)}
    return results


def by_the_trainer() -> list[dict[str, Any]]:
    """Hugging Face's Trainer trains a model on each process's part of the data: with copies, then with shards."""
    rank, processes = str(distributed.get_rank()), str(distributed.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, ACCELERATE_USE_CPU="true")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType
    from transformers import Trainer, TrainingArguments

    from examples import hugging_face

    results = []
    for in_shards in (False, True):
        model = hugging_face.tiny_llama()
        arguments = TrainingArguments(
            "trainer", max_steps=4, save_strategy="no", use_cpu=True, report_to=[], disable_tqdm=True
        )
        options = {"model": model, "lr": 0.1, "delta": 0.98}
        if not in_shards:
            options["process_group"] = distributed.group.WORLD
        data, how = hugging_face.samples(), (NPC, options)
        trainer = Trainer(model, arguments, train_dataset=data, optimizer_cls_and_kwargs=how)
        if in_shards:  # Accelerate knows FSDP on GPUs only
            trainer.accelerator.state.distributed_type = DistributedType.FSDP
            trainer.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
            trainer.is_fsdp_enabled = True
        trainer.train()
        optimizer = trainer.optimizer.optimizer
        assert any(isinstance(parameter, DTensor) for parameter in model.parameters()) is in_shards
        results.append({"alike": alike(optimizer), "numbers": numbers(optimizer)})
    return results


def uneven_steps(rank: int) -> int:
    """The number of batches of a process."""
    return 4 + 2 * rank


def train_unevenly(model: nn.Module, optimizer: Any, join: Callable[[nn.Module, Any], Any]) -> None:
    """Trains until this process has no more batches."""
    with join(model, optimizer):
        take_steps(model, optimizer, parts(range(uneven_steps(distributed.get_rank()))))


@scenario
def uneven() -> Any:
    """Processes run out of batches one by one, and then train together again."""
    results = {}
    for kind in ("npc", *OTHER_OPTIMIZERS):
        model = DistributedDataParallel(network())
        optimizer = OPTIMIZERS[kind](model)
        train_unevenly(model, optimizer, lambda *both: Join(list(both)))
        joined = {"alike": alike(optimizer), "numbers": numbers(optimizer)}
        results[kind] = joined | {"alike later": train(model, optimizer, range(100, 105))}
    return results


@scenario
def uneven_and_refused() -> Any:
    """The errors if the join context does not have the optimizer, or has it before the model."""
    messages = []
    for kind in ("npc", "wrapped_adamw"):
        for join in (lambda model, optimizer: model.join(), lambda model, optimizer: Join([optimizer, model])):
            model = DistributedDataParallel(network())
            optimizer = OPTIMIZERS[kind](model)
            before = numbers(optimizer)
            messages.append(refusal(train_unevenly, model, optimizer, join))
            assert same(before.values(), numbers(optimizer).values())
    return messages


@scenario
def with_frozen_rows() -> Any:
    """Some rows and a whole layer are certified. All processes skip the same gradients."""
    model = DistributedDataParallel(network())
    optimizer = NPC(model, lr=0.05, delta=0.9999)
    set_importance(optimizer, "0", 3.0)  # so important that it is certain not to move
    result = trained(model, optimizer)
    return result | {"skipped": {name: layer.gradients_skipped for name, layer in optimizer.plasticity().items()}}


@scenario
def accumulated() -> Any:
    """Two micro-batches a step, the first one without synchronization."""

    def backward(model: Any, x: Tensor, y: Tensor) -> None:
        for micro, (a, b) in enumerate(zip(x.chunk(2), y.chunk(2), strict=True)):
            with model.no_sync() if micro == 0 else nullcontext():
                (F.cross_entropy(model(a), b) / 2).backward()

    return trained(DistributedDataParallel(network()), backward=backward)


@scenario
def outputs_of_some_processes_only() -> Any:
    """Each process uses the output of its rank's parity. None uses the last output, so its row must not move."""
    model = DistributedDataParallel(network())
    optimizer = NPC(model, lr=0.05, delta=0.9, weight_decay=0.1, momentum=0.9, layers={"7": {"normalize": "active"}})
    before = model.module[7].weight.detach().clone()

    def backward(model: nn.Module, x: Tensor, y: Tensor) -> None:
        model(x)[:, distributed.get_rank() % 2].square().mean().backward()

    result = trained(model, optimizer, range(3), backward)
    return result | {"moved": (model.module[7].weight != before).any(1).tolist()}


def trained_with_a_scaler(model: nn.Module) -> dict[str, Any]:
    """Five steps, and one in which the last process alone has infinite gradients."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = NPC(model, **OPTIONS)
    last = distributed.get_rank() == distributed.get_world_size() - 1
    for step, (x, y) in enumerate(parts(range(6))):
        before = numbers(optimizer)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y) * (float("inf") if step == 5 and last else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    result = {"alike": alike(optimizer), "numbers": numbers(optimizer), "scale": scaler.get_scale()}
    return result | {"unchanged": same(before.values(), result["numbers"].values())}


@scenario
def with_a_scaler() -> Any:
    return trained_with_a_scaler(DistributedDataParallel(network()))


def two_heads() -> nn.Module:
    torch.manual_seed(2)
    return ManyHeads()


def loss_of_head(model: nn.Module, x: Tensor, y: Tensor, head: int) -> Tensor:
    """The loss of one of these heads, which see six pixels."""
    return F.cross_entropy(model(x.flatten(1)[:, :6], head), y)


@scenario
def heads_of_some_processes_only() -> Any:
    """Each process uses the head of its rank's parity. All get what each one measured."""
    model = DistributedDataParallel(two_heads(), find_unused_parameters=True)

    def backward(model: nn.Module, x: Tensor, y: Tensor) -> None:
        loss_of_head(model, x, y, distributed.get_rank() % 2).backward()

    return trained(model, NPC(model, lr=0.05, delta=0.98), backward=backward)


@scenario
def collectives() -> Any:
    """The sizes of all calls of all_reduce in a step."""
    model = DistributedDataParallel(network())
    optimizer = NPC(model, **OPTIONS)
    train(model, optimizer, range(2))
    with mock.patch.object(distributed, "all_reduce", wraps=distributed.all_reduce) as counted:
        train(model, optimizer, range(2, 3))
    return [call.args[0].numel() for call in counted.call_args_list]


@scenario
def group_that_is_missing() -> Any:
    model = network()
    optimizer = NPC(model, lr=0.05)
    before = numbers(optimizer)
    return refusal(train, model, optimizer), same(before.values(), numbers(optimizer).values())


@scenario
def each_for_itself() -> Any:
    model = network()
    return train(model, NPC(model, lr=0.05, process_group=None), range(3))


@scenario_of_shards
def group_that_is_given() -> Any:
    """Gradients are averaged by hand, importance by the optimizer."""

    def backward_and_average(model: nn.Module, x: Tensor, y: Tensor) -> None:
        backward(model, x, y)
        for parameter in model.parameters():
            distributed.all_reduce(parameter.grad)
            parameter.grad /= distributed.get_world_size()  # type: ignore[operator]

    model = network()
    optimizer = NPC(model, process_group=distributed.group.WORLD, **OPTIONS)
    return trained(model, optimizer, backward=backward_and_average)


# ---------------------------------------------------------------------------------------------------- fully_shard, FSDP2


def in_shards(model: nn.Module, **options: Any) -> nn.Module:
    """Shards each weighted layer by itself, and then the rest, as users do."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            fully_shard(module, **options)
    fully_shard(model, **options)
    return model


@scenario_of_shards
def sharded() -> Any:
    model = in_shards(network())
    optimizer = NPC(model, **OPTIONS)
    result = trained(model, optimizer)
    rows = [local(parameter).shape[0] for parameter in model.parameters()]
    buffers = [optimizer.state[parameter]["momentum_buffer"].placements for parameter in model.parameters()]
    return result | {"rows": rows, "buffers": str(buffers), "table": str(optimizer.neurons)}


@scenario_of_shards
def sharded_other_optimizers() -> Any:
    return trained_by_others(lambda: in_shards(network()))


@scenario_of_shards
def sharded_with_an_optimizer_that_gets_the_shards() -> Any:
    model = network()
    optimizer = NPC(model, **OPTIONS)
    in_shards(model)
    optimizer.param_groups[0]["params"] = list(model.parameters())  # as Accelerate does
    return trained(model, optimizer)


@scenario_of_shards
def sharded_and_accumulated() -> Any:
    """All in one group of parameters; two micro-batches a step, the first one without synchronization."""

    def backward(model: Any, x: Tensor, y: Tensor) -> None:
        for micro, (a, b) in enumerate(zip(x.chunk(2), y.chunk(2), strict=True)):
            model.set_requires_gradient_sync(micro == 1)
            (F.cross_entropy(model(a), b) / 2).backward()

    model = network()
    fully_shard(model, reshard_after_forward=True)
    return trained(model, backward=backward)


@scenario_of_shards
def sharded_and_cleared() -> Any:
    """The model clears the gradients of a discarded loss, and with them the measurements."""

    def backward_after_a_discarded_loss(model: nn.Module, x: Tensor, y: Tensor) -> None:
        model(x).square().sum().backward()
        model.zero_grad()
        backward(model, x, y)

    return [
        trained(in_shards(network()), steps=FEW, backward=each) for each in (backward_after_a_discarded_loss, backward)
    ]


def bottleneck() -> nn.Module:
    """5, 2 and 3 neurons. Some of the shards are empty."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, 2), nn.Tanh(), nn.Linear(2, 3))


@scenario_of_shards
def sharded_with_empty_shards() -> Any:
    model = in_shards(bottleneck())
    return trained(model, steps=FEW) | {"rows": local(model[3].weight).shape[0]}


def in_a_mesh(copies: int, shards: int, **options: Any) -> Any:
    """A mesh with two dimensions: copies in the first, shards in the second."""
    mesh = init_device_mesh("cpu", (copies, shards), mesh_dim_names=("replicate", "shard"))
    model = in_shards(network(), mesh=mesh)
    return trained(model, NPC(model, **OPTIONS, **options), FEW)


@scenario_of_shards
def copies_in_a_mesh() -> Any:
    return in_a_mesh(distributed.get_world_size(), 1, backend="reference")


@scenario_of_shards
def shards_in_a_mesh() -> Any:
    return in_a_mesh(1, distributed.get_world_size())


@scenario_of_shards
def sharded_transposed() -> Any:
    """A transposed convolution counts neurons in dimension 1, so every process has a part of each neuron."""
    return trained(in_shards(transposed()), steps=FEW)


def transposed(groups: int = 1) -> nn.Module:
    """A transposed convolution of 4 neurons."""
    torch.manual_seed(4)
    upsampling = nn.ConvTranspose2d(4, 4, 3, stride=2, groups=groups)
    return nn.Sequential(nn.Conv2d(1, 4, 5), nn.Tanh(), upsampling, nn.Tanh(), nn.Flatten(), nn.Linear(324, 3))


class Attending(nn.Module):
    """Attention over the rows of an image. Three weights hold its 24 neurons of queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.attention, self.head = nn.MultiheadAttention(8, 2, kdim=6, vdim=5, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.squeeze(1)
        return self.head(self.attention(x, x[..., :6], x[..., 3:], need_weights=False)[0].mean(1))


@scenario_of_shards
def sharded_attention() -> Any:
    model = Attending()
    fully_shard(model)
    return trained(model, steps=FEW)


@scenario_of_shards
def sharded_and_recomputed() -> Any:
    """The backward pass recomputes the activations of the first five modules."""
    layers = list(network())
    model = nn.Sequential(checkpoint_wrapper(nn.Sequential(*layers[:5])), *layers[5:])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
        result = trained(in_shards(model), steps=FEW)
    first = next(name for name in result["numbers"] if name.endswith("_checkpoint_wrapped_module.0"))
    names = {first: "0", "1": "5", "3": "7"}
    return result | {"numbers": {names.get(name, name): tensor for name, tensor in result["numbers"].items()}}


@scenario_of_shards
def sharded_in_bfloat16() -> Any:
    model = in_shards(network(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    optimizer = NPC(model, **OPTIONS)
    return {"before": numbers(optimizer)} | trained(model, optimizer, range(5))


@scenario_of_shards
def sharded_and_rounded_at_random() -> Any:
    """All weights are bfloat16. Returns the seeds with which each process rounds its shards."""
    model = in_shards(network().to(torch.bfloat16))
    optimizer = NPC(model, stochastic_rounding=True, **OPTIONS)
    result = trained(model, optimizer, range(3), lambda model, x, y: backward(model, x.to(torch.bfloat16), y))
    counted = [float(optimizer.state[parameter]["step"]) for parameter in model.parameters()]
    return result | {"seeds": optimizer._plans[0].steps.seeds, "steps": counted}


@scenario_of_shards
def sharded_with_a_scaler() -> Any:
    return trained_with_a_scaler(in_shards(network()))


@scenario_of_shards
def refusals() -> Any:
    """The errors for models that are sharded in ways that are not supported."""
    processes = distributed.get_world_size()
    mesh = init_device_mesh("cpu", (1, processes), mesh_dim_names=("data", "tensor"))

    def tensor_parallel() -> nn.Module:
        return parallelize_module(network(), mesh["tensor"], {"5": ColwiseParallel(), "7": RowwiseParallel()})

    def columns() -> nn.Module:
        layer = nn.Sequential(nn.Linear(processes * 2, processes * 2))
        fully_shard(layer, shard_placement_fn=lambda weight: Shard(weight.ndim - 1))
        return layer

    def train_in_shards_after_building(kind: str) -> None:
        model = network()
        optimizer = OPTIMIZERS[kind](model)
        train(in_shards(model), optimizer)

    attempts = {
        "tensor_parallel": lambda: NPC(tensor_parallel()),
        "both": lambda: NPC(in_shards(tensor_parallel(), mesh=mesh["data"])),
        "columns": lambda: NPC(columns()),
        "each_for_itself": lambda: NPC(in_shards(network()), process_group=None),
        "grouped": lambda: NPC(in_shards(transposed(groups=2))),
        "optimizer_first": lambda: train_in_shards_after_building("npc"),
        "wrapper_first": lambda: train_in_shards_after_building("wrapped_adamw"),
        "connections": lambda: CPC(in_shards(network())),
        "anchors": lambda: EWC(in_shards(network())),
    }
    return {name: refusal(attempt) for name, attempt in attempts.items()}


# ------------------------------------------------------------------------------------------------------- checkpoints

HALF, WHOLE = 10, 20


def save(model: nn.Module, optimizer: Any, folder: str, **options: Any) -> None:
    """Saves a checkpoint with torch.distributed."""
    of_model, of_optimizer = get_state_dict(model, optimizer)
    checkpoint.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder, **options)


def load(model: nn.Module, optimizer: Any, folder: str) -> None:
    """Loads a checkpoint that any number of processes saved."""
    of_model, of_optimizer = get_state_dict(model, optimizer)
    checkpoint.load({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=of_model, optim_state_dict=of_optimizer)


@scenario_of_shards
def checkpoints() -> Any:
    """Two of the processes train and save; all of them resume. The two also continue without interruption."""
    two, rank = DeviceMesh("cpu", [0, 1]), distributed.get_rank()
    results: dict[str, Any] = {}
    for kind, build in OPTIMIZERS.items():
        results[kind] = {}
        if rank < 2:
            model = in_shards(network(), mesh=two)
            optimizer = build(model)
            take_steps(model, optimizer, [batch(step, rank, 2) for step in range(HALF)])
            save(model, optimizer, kind, process_group=two.get_group())
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            results[kind]["full"] = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
            take_steps(model, optimizer, [batch(step, rank, 2) for step in range(HALF, WHOLE)])
            results[kind]["uninterrupted"] = numbers(optimizer)
        distributed.barrier()
        model = in_shards(network())
        optimizer = build(model)
        load(model, optimizer, kind)
        results[kind] |= trained(model, optimizer, range(HALF, WHOLE))
    return results


@scenario_of_shards
def plain_states() -> Any:
    """Loads the state dict of a plain optimizer into a sharded one, and tries the reverse."""
    plain = network()
    alone, optimizer = NPC(plain, process_group=None, **OPTIONS), NPC(in_shards(network()), **OPTIONS)
    take_steps(plain, alone, [batch(0), batch(1)])
    optimizer.load_state_dict(alone.state_dict())
    pairs = zip(optimizer.state.values(), alone.state.values(), strict=True)
    divided = all(torch.equal(a["momentum_buffer"].full_tensor(), b["momentum_buffer"]) for a, b in pairs)
    return {"divided": divided, "error": refusal(alone.load_state_dict, optimizer.state_dict())}


class DyingPlanner(checkpoint.DefaultSavePlanner):
    """Kills the second process of a group with SIGKILL after it has written one tensor."""

    asked = 0

    def resolve_data(self, write_item: Any) -> Any:
        self.asked += 1
        if distributed.get_rank() == 1 and self.asked > 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().resolve_data(write_item)


def die_while_saving() -> None:
    """Saves a checkpoint, and is killed while it saves the next one."""
    model = in_shards(network())
    optimizer = NPC(model, **OPTIONS)
    train(model, optimizer, range(HALF))
    save(model, optimizer, f"step-{HALF}")
    train(model, optimizer, range(HALF, HALF + 4))
    save(model, optimizer, f"step-{HALF + 4}", planner=DyingPlanner())


def resume() -> dict[str, Any]:
    """Resumes from the last complete checkpoint; also trains from the beginning without one."""
    latest = max(int(path.parent.name.removeprefix("step-")) for path in Path().glob("step-*/.metadata"))
    results: dict[str, Any] = {"latest": latest}
    for name, first in (("resumed", latest), ("uninterrupted", 0)):
        model = in_shards(network())
        optimizer = NPC(model, **OPTIONS)
        if first:
            load(model, optimizer, f"step-{first}")
        train(model, optimizer, range(first, WHOLE))
        results[name] = numbers(optimizer)
    return results
