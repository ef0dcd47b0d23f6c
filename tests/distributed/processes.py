"""Functions that test_distributed.py runs in several processes, one per rank."""

from __future__ import annotations

import copy
import functools
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

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

STEPS = 50
FEW = 20  # enough if another scenario takes all steps in the same way
BATCH = 12
OPTIONS: dict[str, Any] = {"lr": 0.05, "delta": 0.98, "momentum": 0.9, "weight_decay": 0.01}
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


def run(rank: int, processes: int, folder: str) -> None:
    """Runs all scenarios in one process of a group, and writes their results to a file."""
    begin(rank, processes, folder)
    results = {}
    for name, function in SCENARIOS.items():
        torch.manual_seed(0)
        results[name] = function()
        distributed.barrier()
    end(rank, folder, results)


def begin(rank: int, processes: int, folder: str, store: str = "store") -> None:
    """Joins the group, which meets in a new file. Changes to the folder."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.chdir(folder)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/{store}", rank=rank, world_size=processes)


def end(rank: int, folder: str, results: Any) -> None:
    """Writes results to a file, and leaves the group together with the others."""
    torch.save(results, Path(folder) / f"{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def network() -> nn.Module:
    """A convolution with a norm, a hidden layer and an output layer; 5, 9 and 3 neurons."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 5, 3), nn.InstanceNorm2d(5, affine=True), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(45, 9), nn.ReLU(), nn.Linear(9, 3),
    )  # fmt: skip


def batch(step: int) -> tuple[Tensor, Tensor]:
    """The whole batch of a step."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, 1, 8, 8, generator=generator), torch.randint(3, (BATCH,), generator=generator)


def part_of_this_process(tensor: Tensor) -> Tensor:
    """The part of a batch that this process sees."""
    return tensor.chunk(distributed.get_world_size())[distributed.get_rank()]


def numbers(optimizer: NPC | NPCAdamW | PlasticityWrapper) -> dict[str, Tensor]:
    """Weights, gathered if they are sharded, and importance."""
    parameters = [p.full_tensor() if isinstance(p, DTensor) else p for p in optimizer.param_groups[0]["params"]]
    weights = {f"weight {index}": parameter.detach().clone() for index, parameter in enumerate(parameters)}
    return weights | {name: layer.importance for name, layer in optimizer.plasticity().items()}


def alike(optimizer: NPC | NPCAdamW | PlasticityWrapper, shards: bool = False) -> bool:
    """Whether all processes have the same bits of weights (`shards`: also of sharded ones) and importance."""
    if shards or not isinstance(optimizer.param_groups[0]["params"][0], DTensor):
        compared = numbers(optimizer)
    else:
        compared = {name: layer.importance for name, layer in optimizer.plasticity().items()}
    bits = torch.cat([tensor.flatten() for tensor in compared.values()]).view(torch.int32).long()
    checksum = (bits * torch.arange(1, len(bits) + 1)).sum()
    checksums = [torch.zeros_like(checksum) for _ in range(distributed.get_world_size())]
    distributed.all_gather(checksums, checksum)
    return all(bool(other == checksum) for other in checksums)


def train(
    model: nn.Module,
    optimizer: NPC | NPCAdamW | PlasticityWrapper,
    *,
    first: int = 0,
    steps: int = STEPS,
    part: Any = part_of_this_process,
) -> bool:
    """Trains on the parts of this process. Returns whether all processes were alike after every step."""
    same = True
    for step in range(first, steps):
        x, y = map(part, batch(step))
        optimizer.zero_grad()
        F.cross_entropy(model(x).float(), y).backward()
        optimizer.step()
        same &= part is not part_of_this_process or alike(optimizer)
    return same and (part is not part_of_this_process or alike(optimizer, shards=True))


def trained(model: nn.Module, optimizer: NPC | NPCAdamW | PlasticityWrapper, **options: Any) -> dict[str, Any]:
    """Trains; returns whether all processes were alike, and the weights and importance."""
    return {"alike": train(model, optimizer, **options), "numbers": numbers(optimizer)}


@scenario
def data_parallel() -> Any:
    model = DistributedDataParallel(network())
    optimizer = NPC(model, **OPTIONS)
    return trained(model, optimizer) | {"names": [layer.name for layer in optimizer.neurons]}


OTHER_OPTIMIZERS = ("npc_adamw", "wrapped_adamw")


def trained_by_others(make: Callable[[], nn.Module]) -> dict[str, Any]:
    """The results of the other optimizers, by kind."""
    results = {}
    for kind in OTHER_OPTIMIZERS:
        model = make()
        results[kind] = trained(model, of_kind(kind, model))
    return results


@scenario
def other_optimizers() -> Any:
    return trained_by_others(lambda: DistributedDataParallel(network()))


def accelerated(rank: int, processes: int, folder: str) -> None:
    """Sharded by Accelerate (`fsdp_version=2`), in the two ways in which model and optimizer may come to it."""
    begin(rank, processes, folder)
    os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE=f"{processes}", ACCELERATE_USE_CPU="true")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType, fsdp2_prepare_model

    accelerator = Accelerator(cpu=True)

    def prepare(model: nn.Module, optimizer: NPC) -> Any:
        # Accelerate knows FSDP on GPUs only, and sets this back.
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
        return accelerator.prepare(model, optimizer)

    results = {}
    for way in ("together", "sharded before"):
        model: Any = network()
        if way == "sharded before":
            fsdp2_prepare_model(accelerator, model)
        npc = NPC(model, **OPTIONS)
        model, optimizer = prepare(model, npc)
        for step in range(FEW):
            x, y = map(part_of_this_process, batch(step))
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(model(x), y))
            accelerator.clip_grad_norm_(model.parameters(), 1e9)
            optimizer.step()
        results[way] = {"alike": alike(npc, shards=True), "numbers": numbers(npc)}
    end(rank, folder, results)


def uneven_steps(rank: int) -> int:
    """The number of batches of a process."""
    return 4 + 2 * rank


@scenario
def uneven() -> Any:
    """Processes run out of batches one by one, and then train together again."""
    results = {}
    for kind in ("npc", "npc_adamw", "wrapped_adamw"):
        model = DistributedDataParallel(network())
        optimizer = of_kind(kind, model)
        with Join([model, optimizer]):
            for step in range(uneven_steps(distributed.get_rank())):
                x, y = map(part_of_this_process, batch(step))
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
        joined, same = numbers(optimizer), alike(optimizer)
        same &= train(model, optimizer, first=100, steps=105)
        results[kind] = {"alike": same, "numbers": joined}
    return results


@scenario
def uneven_and_refused() -> Any:
    """The errors if the join context does not have the optimizer, or has it before the model."""
    messages = []
    for kind in ("npc", "wrapped_adamw"):
        for contexts in (lambda model, optimizer: model.join(), lambda model, optimizer: Join([optimizer, model])):
            model = DistributedDataParallel(network())
            optimizer = of_kind(kind, model)
            before = numbers(optimizer)
            try:
                with contexts(model, optimizer):
                    for step in range(uneven_steps(distributed.get_rank())):
                        x, y = map(part_of_this_process, batch(step))
                        F.cross_entropy(model(x), y).backward()
                        optimizer.step()
            except RuntimeError as error:
                messages.append(str(error))
            after = numbers(optimizer)
            assert all(torch.equal(before[name], after[name]) for name in before)
    return messages


@scenario
def with_frozen_rows() -> Any:
    """Some rows and a whole layer are certified. All processes leave out the same gradients."""
    model = DistributedDataParallel(network())
    optimizer = NPC(model, lr=0.05, delta=0.9999)
    freeze(optimizer)
    result = trained(model, optimizer)
    return result | {"skipped": {name: layer.gradients_skipped for name, layer in optimizer.plasticity().items()}}


def freeze(optimizer: NPC) -> None:
    """Makes the convolution so important that it is certain not to move."""
    optimizer.state[optimizer.neurons["0"].parameters[0].parameter]["importance"].fill_(3.0)


@scenario
def accumulated() -> Any:
    """Two micro-batches a step, the first one without synchronization."""
    model = DistributedDataParallel(network())
    optimizer = NPC(model, **OPTIONS)
    same = True
    for step in range(STEPS):
        x, y = map(part_of_this_process, batch(step))
        halves = list(zip(x.chunk(2), y.chunk(2), strict=True))
        optimizer.zero_grad()
        with model.no_sync():
            (F.cross_entropy(model(halves[0][0]), halves[0][1]) / 2).backward()
        (F.cross_entropy(model(halves[1][0]), halves[1][1]) / 2).backward()
        optimizer.step()
        same &= alike(optimizer)
    return {"alike": same, "numbers": numbers(optimizer)}


@scenario
def outputs_of_some_processes_only() -> Any:
    """Each process uses the output of its rank's parity. None uses the last output, so its row must not move."""
    model = DistributedDataParallel(network())
    optimizer = NPC(model, lr=0.05, delta=0.9, weight_decay=0.1, momentum=0.9, layers={"7": {"normalize": "active"}})
    before, output, same = model.module[7].weight.detach().clone(), distributed.get_rank() % 2, True
    for step in range(3):
        optimizer.zero_grad()
        model(part_of_this_process(batch(step)[0]))[:, output].square().mean().backward()
        optimizer.step()
        same &= alike(optimizer)
    moved = (model.module[7].weight != before).any(1).tolist()
    return {"alike": same, "moved": moved, "importance": optimizer.plasticity()["7"].importance}


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
    """Each process uses the head of its rank's parity. All get what each one measured."""
    model = DistributedDataParallel(Heads(), find_unused_parameters=True)
    optimizer = NPC(model, lr=0.05, delta=0.98)
    same = True
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        for step in range(STEPS):
            x, y = map(part_of_this_process, batch(step))
            optimizer.zero_grad()
            F.cross_entropy(model(x, distributed.get_rank() % 2), y).backward()
            optimizer.step()
            same &= alike(optimizer)
    return {"alike": same, "numbers": numbers(optimizer)}


@scenario
def collectives() -> Any:
    """The sizes of all calls of all_reduce in a step."""
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
def group_that_is_missing() -> Any:
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


@scenario_of_shards
def group_that_is_given() -> Any:
    """Gradients are averaged by hand, importance by the optimizer."""
    model = network()
    optimizer = NPC(model, process_group=distributed.group.WORLD, **OPTIONS)
    same = True
    for step in range(STEPS):
        x, y = map(part_of_this_process, batch(step))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for parameter in model.parameters():
            distributed.all_reduce(parameter.grad)
            parameter.grad /= distributed.get_world_size()  # type: ignore[operator]
        optimizer.step()
        same &= alike(optimizer)
    return {"alike": same, "numbers": numbers(optimizer)}


# ---------------------------------------------------------------------------------------------------- fully_shard, FSDP2


def in_shards(model: nn.Module, **options: Any) -> nn.Module:
    """Each weighted layer by itself, and then the rest, as users do it."""
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
    model: Any = network()
    fully_shard(model, reshard_after_forward=True)
    optimizer = NPC(model, **OPTIONS)
    same = True
    for step in range(STEPS):
        x, y = map(part_of_this_process, batch(step))
        optimizer.zero_grad()
        for micro, (a, b) in enumerate(zip(x.chunk(2), y.chunk(2), strict=True)):
            model.set_requires_gradient_sync(micro == 1)
            (F.cross_entropy(model(a), b) / 2).backward()
        optimizer.step()
        same &= alike(optimizer)
    return {"alike": same and alike(optimizer, shards=True), "numbers": numbers(optimizer)}


@scenario_of_shards
def sharded_and_cleared() -> Any:
    """The model clears the gradients of a loss that is thrown away, and with them what was measured."""
    results = []
    for thrown_away in (True, False):
        model: Any = in_shards(network())
        optimizer = NPC(model, **OPTIONS)
        for step in range(FEW):
            x, y = map(part_of_this_process, batch(step))
            if thrown_away:
                model(x).square().sum().backward()
                model.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            model.zero_grad()
        results.append({"alike": alike(optimizer, shards=True), "numbers": numbers(optimizer)})
    return results


def bottleneck() -> nn.Module:
    """5, 2 and 3 neurons. Some of the shards are empty."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, 2), nn.Tanh(), nn.Linear(2, 3))


@scenario_of_shards
def sharded_with_empty_shards() -> Any:
    model = in_shards(bottleneck())
    optimizer = NPC(model, **OPTIONS)
    return trained(model, optimizer, steps=FEW) | {"rows": local(model[3].weight).shape[0]}


@scenario_of_shards
def sharded_and_replicated() -> Any:
    """A mesh with two dimensions: copies in the first, shards in the second."""
    processes, results = distributed.get_world_size(), []
    for shape, options in (((processes, 1), {"backend": "reference"}), ((1, processes), {})):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        model = in_shards(network(), mesh=mesh)
        optimizer = NPC(model, **OPTIONS, **options)
        results.append(trained(model, optimizer, steps=FEW))
    return results


@scenario_of_shards
def sharded_transposed() -> Any:
    """A transposed convolution counts neurons in dimension 1, so every process has a part of each neuron."""
    model = in_shards(transposed())
    optimizer = NPC(model, **OPTIONS)
    return trained(model, optimizer, steps=FEW)


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
    optimizer = NPC(model, **OPTIONS)
    return trained(model, optimizer, steps=FEW)


@scenario_of_shards
def sharded_and_recomputed() -> Any:
    """The backward pass recomputes the activations of the first five modules."""
    layers = list(network())
    model = nn.Sequential(checkpoint_wrapper(nn.Sequential(*layers[:5])), *layers[5:])
    optimizer = NPC(in_shards(model), **OPTIONS)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
        same = train(model, optimizer, steps=FEW)
    found = numbers(optimizer)
    first = next(name for name in found if name.endswith("_checkpoint_wrapped_module.0"))
    names = {first: "0", "1": "5", "3": "7"}
    return {"alike": same, "numbers": {names.get(name, name): tensor for name, tensor in found.items()}}


@scenario_of_shards
def sharded_in_bfloat16() -> Any:
    model = in_shards(network(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    optimizer = NPC(model, **OPTIONS)
    before = numbers(optimizer)
    same, after = train(model, optimizer, steps=5), numbers(optimizer)
    moved = all(not torch.equal(before[name], after[name]) for name in before)
    return {"alike": same, "moved": moved, "dtypes": {tensor.dtype for tensor in after.values()}}


@scenario_of_shards
def sharded_and_rounded_at_random() -> Any:
    """Whole weights in bfloat16; returns from which seeds each process rounds its shards."""
    model = in_shards(network().to(torch.bfloat16))
    optimizer = NPC(model, stochastic_rounding=True, **OPTIONS)
    for step in range(3):
        x, y = map(part_of_this_process, batch(step))
        optimizer.zero_grad()
        F.cross_entropy(model(x.to(torch.bfloat16)).float(), y).backward()
        optimizer.step()
    counted = [float(optimizer.state[parameter]["step"]) for parameter in model.parameters()]
    return {"alike": alike(optimizer), "seeds": optimizer._plans[0].steps.seeds, "steps": counted}


@scenario_of_shards
def sharded_with_a_scaler() -> Any:
    """Five steps, and one in which the last process alone has infinite gradients."""
    model, scaler = in_shards(network()), torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = NPC(model, **OPTIONS)
    before: dict[str, Tensor] = {}
    last = distributed.get_rank() == distributed.get_world_size() - 1
    for step in range(6):
        before = numbers(optimizer)
        x, y = map(part_of_this_process, batch(step))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y) * (float("inf") if step == 5 and last else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    after = numbers(optimizer)
    unchanged = all(torch.equal(before[name], after[name]) for name in before)
    return {"unchanged": unchanged, "numbers": after, "scale": scaler.get_scale()}


@scenario_of_shards
def refusals() -> Any:
    """The errors for models that are sharded in ways that are not supported."""
    processes = distributed.get_world_size()
    mesh = init_device_mesh("cpu", (1, processes), mesh_dim_names=("data", "tensor"))
    plan = {"5": ColwiseParallel(), "7": RowwiseParallel()}

    def tensor_parallel() -> Any:
        return NPC(parallelize_module(network(), mesh["tensor"], plan))

    def both() -> Any:
        return NPC(in_shards(parallelize_module(network(), mesh["tensor"], plan), mesh=mesh["data"]))

    def columns() -> Any:
        layer = nn.Sequential(nn.Linear(processes * 2, processes * 2))
        fully_shard(layer, shard_placement_fn=lambda weight: Shard(weight.ndim - 1))
        return NPC(layer)

    def each_for_itself() -> Any:
        return NPC(in_shards(network()), process_group=None)

    def grouped() -> Any:
        return NPC(in_shards(transposed(groups=2)))

    def optimizer_first() -> Any:
        model = network()
        optimizer = NPC(model, **OPTIONS)
        train(in_shards(model), optimizer, steps=1)

    def wrapper_first() -> Any:
        model = network()
        optimizer = PlasticityWrapper(torch.optim.AdamW(model.parameters()), model)
        train(in_shards(model), optimizer, steps=1)

    def connections() -> Any:
        return CPC(in_shards(network()))

    def anchors() -> Any:
        return EWC(in_shards(network()))

    messages = {}
    for attempt in (
        *(tensor_parallel, both, columns, each_for_itself, grouped, optimizer_first, wrapper_first, connections),
        anchors,
    ):
        try:
            attempt()
        except (ValueError, RuntimeError) as error:
            messages[attempt.__name__] = str(error)
    return messages


# ------------------------------------------------------------------------------------------------------- checkpoints

HALF, WHOLE = 10, 20
KINDS = ("npc", "without_momentum", "npc_adamw", "wrapped_adamw")


def of_kind(kind: str, model: nn.Module) -> Any:
    """An optimizer to be saved."""
    if kind == "wrapped_adamw":
        return PlasticityWrapper(torch.optim.AdamW(model.parameters(), lr=1e-3), model, delta=0.9)
    if kind == "npc_adamw":
        return NPCAdamW(model, lr=1e-3, delta=0.9)
    return NPC(model, **{**OPTIONS, "momentum": 0.9 if kind == "npc" else 0.0})


def save(model: nn.Module, optimizer: Any, folder: str, **options: Any) -> None:
    """A checkpoint as torch.distributed has it."""
    of_model, of_optimizer = get_state_dict(model, optimizer)
    checkpoint.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder, **options)


def load(model: nn.Module, optimizer: Any, folder: str) -> None:
    """Loads a checkpoint that any number of processes saved."""
    of_model, of_optimizer = get_state_dict(model, optimizer)
    checkpoint.load({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=of_model, optim_state_dict=of_optimizer)


@scenario_of_shards
def checkpoints() -> Any:
    """Two of the processes train and save; all of them resume. The two also go on, uninterrupted."""
    two = DeviceMesh("cpu", [0, 1])
    results: dict[str, Any] = {}
    for kind in KINDS:
        results[kind] = {}
        rank = distributed.get_rank()
        if rank < 2:
            model = in_shards(network(), mesh=two)
            optimizer = of_kind(kind, model)

            def part(tensor: Tensor, rank: int = rank) -> Tensor:
                return tensor.chunk(2)[rank]

            train(model, optimizer, steps=HALF, part=part)
            save(model, optimizer, kind, process_group=two.get_group())
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            results[kind]["full"] = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
            train(model, optimizer, first=HALF, steps=WHOLE, part=part)
            results[kind]["uninterrupted"] = numbers(optimizer)
        distributed.barrier()
        model = in_shards(network())
        optimizer = of_kind(kind, model)
        load(model, optimizer, kind)
        results[kind]["alike"] = train(model, optimizer, first=HALF, steps=WHOLE)
        results[kind]["resumed"] = numbers(optimizer)
    return results


@scenario_of_shards
def plain_states() -> Any:
    """The state dict of one process's optimizer in one that is sharded, and the other way."""
    plain = network()
    alone, optimizer = NPC(plain, process_group=None, **OPTIONS), NPC(in_shards(network()), **OPTIONS)
    train(plain, alone, steps=2, part=lambda whole: whole)
    optimizer.load_state_dict(alone.state_dict())
    pairs = zip(optimizer.state.values(), alone.state.values(), strict=True)
    divided = all(torch.equal(a["momentum_buffer"].full_tensor(), b["momentum_buffer"]) for a, b in pairs)
    try:
        alone.load_state_dict(optimizer.state_dict())
    except ValueError as error:
        return {"divided": divided, "error": str(error)}
    return {"divided": divided, "error": ""}


class DyingPlanner(checkpoint.DefaultSavePlanner):
    """Kills the second process of a group by SIGKILL when it has written one tensor and is asked for the next."""

    asked = 0

    def resolve_data(self, write_item: Any) -> Any:
        self.asked += 1
        if distributed.get_rank() == 1 and self.asked > 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().resolve_data(write_item)


def die_while_saving(rank: int, processes: int, folder: str) -> None:
    """Saves a checkpoint, and is killed while saving the next."""
    begin(rank, processes, folder)
    model = in_shards(network())
    optimizer = of_kind("npc", model)
    train(model, optimizer, steps=HALF)
    save(model, optimizer, f"step-{HALF}")
    train(model, optimizer, first=HALF, steps=HALF + 4)
    save(model, optimizer, f"step-{HALF + 4}", planner=DyingPlanner())
    sys.exit("the save came to an end")


def resume(rank: int, processes: int, folder: str) -> None:
    """Goes on from the last whole checkpoint, and from the beginning without any."""
    latest = max(int(path.parent.name.removeprefix("step-")) for path in Path(folder).glob("step-*/.metadata"))
    begin(rank, processes, folder, "store of the second run")
    results: dict[str, Any] = {"latest": latest}
    for name, first in (("resumed", latest), ("uninterrupted", 0)):
        model = in_shards(network())
        optimizer = of_kind("npc", model)
        if first:
            load(model, optimizer, f"step-{first}")
        train(model, optimizer, first=first, steps=WHOLE)
        results[name] = numbers(optimizer)
    end(rank, folder, results)
