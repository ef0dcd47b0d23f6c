"""What is measured on a GPU, part by part. Each part yields rows: dictionaries with a "case"."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from npc_ext import NPC, NPCAdamW, _native, ops, reference

from ..continual.networks import cnn
from ..micro.timing import Comparison
from . import frozen as frozen_part
from .device import Device, check
from .networks import resnet18

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]
LARGE = 64 * 2**20  # bytes from which on the share of copy bandwidth counts
NOT_MEASURED = "not measured"


def build(device: Device, quick: bool) -> Iterator[Row]:
    """The kernels are built for this GPU, just in time if need be."""
    os.environ.setdefault("NPC_EXT_CACHE", str(Path(tempfile.gettempdir()) / "npc_ext-bench-cache"))
    started = time.perf_counter()
    native = _native.status()
    if not device.dry and _native.why_no_cuda():
        raise RuntimeError(_native.why_no_cuda())
    yield {
        "case": "kernels",
        "origin": native.origin.split(":")[0],
        "seconds to load": time.perf_counter() - started,
        "GPU architectures": getattr(native.module, "cuda_archs", "none"),
        "reason": native.reason,
    }


def tests(device: Device, quick: bool) -> Iterator[Row]:
    """The tests that need a GPU; in a dry run they are only collected."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-x" if quick else "-ra"]
    result = _run([*command, *(["--collect-only"] if device.dry else [])], 240)
    counts = dict(re.findall(r"(\d+) (passed|failed|skipped|error)", result.stdout))
    yield {
        "case": "pytest -m gpu" + (" --collect-only" if device.dry else ""),
        "ok": result.returncode == 0,
        "counts": {word: int(number) for number, word in counts.items()},
        "tail": result.stdout[-1500:],
    }
    if result.returncode != 0:
        raise RuntimeError(f"the tests failed:\n{result.stdout[-1500:]}{result.stderr[-500:]}")


def sanitizer(device: Device, quick: bool) -> Iterator[Row]:
    """compute-sanitizer on every kernel; where there is none, the kernels run without it."""
    program = [sys.executable, "-m", "bench.gpu.exercise", device.name]
    tool = None if device.dry else shutil.which("compute-sanitizer")
    for check_ in ["memcheck", "racecheck"] if tool else [None]:
        command = [str(tool), "--tool", check_, "--error-exitcode", "9", *program] if check_ else program
        result = _run(command, 120)
        yield {
            "case": check_ or "without compute-sanitizer",
            "ok": result.returncode == 0,
            "tail": result.stdout[-800:],
        }
        if result.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed:\n{result.stdout[-1500:]}{result.stderr[-1500:]}")


def importance(device: Device, quick: bool) -> Iterator[Row]:
    """Eq. 2 against eager PyTorch and torch.compile, as a share of the machine's copy bandwidth."""

    def eager(n: Tensor, g: Tensor) -> Tensor:
        product = n * g
        return (product.flatten(2).sum(2) if product.ndim > 2 else product).float().abs().sum(0)

    torch._dynamo.config.cache_size_limit = 64
    compiled = torch.compile(eager, dynamic=False)
    shapes = [(256, 512), (4096, 4096), (256, 128, 16, 16), (256, 512, 7, 7), (256, 128, 32, 32), (64, 64, 224, 224)]
    if device.dry:
        shapes = [(16, 32), (4, 8, 4, 4)]
    for shape in shapes[:: 2 if quick else 1]:
        for dtype in (torch.float32, torch.bfloat16):
            for last in (False, True) if len(shape) > 2 else (False,):
                bytes_ = 2 * torch.Size(shape).numel() * dtype.itemsize
                inputs = [_pair(device, shape, dtype, last) for _ in range(device.sets_of(bytes_))]
                peers: dict[str, Callable[[Tensor, Tensor], Any]] = {"npc_ext": ops.importance, "eager": eager}
                if not device.dry:
                    peers["compile"] = compiled
                want = reference.importance(inputs[0][0].double(), inputs[0][1].double())
                for name, function in peers.items():
                    check(name, function(*inputs[0]), want, 2e-2 if dtype == torch.bfloat16 else 1e-3)
                result = device.compare({name: _on(function, inputs) for name, function in peers.items()}, len(inputs))
                label = f"{' x '.join(map(str, shape))}, {str(dtype)[6:]}{', channels last' if last else ''}"
                yield _bandwidth_row(device, label, result, bytes_, 0.9)


def relu(device: Device, quick: bool) -> Iterator[Row]:
    """ReLU's backward pass with importance against the same without."""
    shapes = [(4, 8, 4, 4)] if device.dry else [(256, 512), (256, 128, 16, 16), (256, 128, 32, 32)]
    for shape in shapes:
        bytes_ = 3 * 4 * torch.Size(shape).numel()
        inputs = [_pair(device, shape, torch.float32, False) for _ in range(device.sets_of(bytes_))]
        peers: dict[str, Callable[[Tensor, Tensor], object]] = {
            "npc_ext": ops.relu_backward_importance,
            "without importance": lambda y, g: torch.ops.aten.threshold_backward(g, y, 0),
        }
        result = device.compare({name: _on(function, inputs) for name, function in peers.items()}, len(inputs))
        yield _ratio_row(device, " x ".join(map(str, shape)), result, "without importance", 1.03)


def update(device: Device, quick: bool) -> Iterator[Row]:
    """optimizer.step() against torch.optim.SGD, with nothing frozen and with nine neurons in ten."""
    sizes = (
        [10**3] if device.dry else [10**4, 10**6, 10**8] if quick else [10**4, 10**5, 10**6, 10**7, 10**8, 5 * 10**8]
    )
    for size in sizes:
        for kind in ("SGD", "AdamW") if quick or size > 10**8 else _KINDS:
            for frozen in (0.0, 0.9):
                yield _update_row(device, size, kind, frozen)


# What is moved: ours, torch's, their options, and how many numbers they move for each weight.
_KINDS: dict[str, tuple[Any, Any, dict[str, Any], int]] = {
    "SGD": (NPC, torch.optim.SGD, {"lr": 1e-3}, 3),
    "SGD, momentum": (NPC, torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9}, 5),
    "AdamW": (NPCAdamW, torch.optim.AdamW, {"lr": 1e-3}, 7),
}


def _update_row(device: Device, size: int, kind: str, frozen: float) -> Row:
    width = max(int((size / 8) ** 0.5), 1)
    ours, theirs, options, numbers = _KINDS[kind]
    fused, foreach = f"{theirs.__name__} fused", f"{theirs.__name__} foreach"
    makers: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
        "npc_ext": lambda model: ours(model, **options),
        fused: lambda model: theirs(model.parameters(), **options, fused=True),
        foreach: lambda model: theirs(model.parameters(), **options, foreach=True),
    }
    if size <= 10**7:
        makers["eager NPC"] = lambda model: ours(model, **options, backend="reference")
    peers: dict[str, Callable[[int], object]] = {}
    held: dict[str, torch.optim.Optimizer] = {}
    for name, make in makers.items():
        model = nn.Sequential(*(nn.Linear(width, width) for _ in range(8))).to(device.name)
        optimizer = held[name] = make(model)
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1e-4)
        if not isinstance(optimizer, (NPC, NPCAdamW)):
            peers[name] = lambda _, optimizer=optimizer: optimizer.step()  # type: ignore[misc]
            continue
        for layer in optimizer.neurons:
            average = optimizer.state[layer.parameters[0].parameter]["importance"]
            average[: int(frozen * width)] = 1e9
        measured = torch.rand(width, device=device.name)

        def step(_: int, optimizer: Any = optimizer, measured: Tensor = measured) -> None:
            for layer in optimizer.neurons:
                layer.sink.grad = measured
            optimizer.step()

        peers[name] = step
    if not device.dry and size <= 10**8:
        model = nn.Sequential(*(nn.Linear(width, width) for _ in range(8))).to(device.name)
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1e-4)
        peers[f"{theirs.__name__} compiled"] = _compiled_step(theirs(model.parameters(), **options))
    label = f"{size:,} parameters, {kind}{', 90 % frozen' if frozen else ''}"
    row = _ratio_row(device, label, device.compare(peers), fused, 1.0 if not frozen else None)
    row["bytes"] = numbers * 4 * 8 * width * width
    row["host seconds"] = {name: device.host_seconds(lambda f=f: f(0)) for name, f in peers.items()}  # type: ignore[misc]
    return row


def _compiled_step(optimizer: torch.optim.Optimizer) -> Callable[[int], object]:
    compiled = torch.compile(lambda: optimizer.step())
    return lambda _: compiled()


def launches(device: Device, quick: bool) -> Iterator[Row]:
    """Kernels launched, and host time, of each operation; and whether a step ever waits for the GPU."""
    n, g = (
        _pair(device, (64, 128, 16, 16), torch.float32, False)
        if not device.dry
        else _pair(device, (2, 8), torch.float32, False)
    )
    weight = torch.randn(n.shape[1], 64, device=device.name)
    average, skipped = (
        torch.zeros(n.shape[1], device=device.name),
        torch.zeros(1, dtype=torch.int64, device=device.name),
    )
    gradient = weight * 2
    cases: dict[str, Callable[[], object]] = {
        "importance": lambda: ops.importance(n, g),
        "relu_backward_importance": lambda: ops.relu_backward_importance(n, g),
        "layer_step_": lambda: ops.layer_step_(n, g, [weight], [gradient], [], average, skipped, [0], [1]),
    }
    for name, function in cases.items():
        yield {
            "case": name,
            "launches": device.launches(function),
            "host seconds": {"npc_ext": device.host_seconds(function)},
        }
    model = _paper(device)
    optimizer = NPC(model, lr=1e-3)
    train = _step(device, model, optimizer, 2 if device.dry else 32)
    for _ in range(3):
        train()
    measured = [(layer, layer.sink.detach() + 1) for layer in optimizer.neurons]

    def step() -> None:
        for one, sums in measured:
            one.sink.grad = sums
        optimizer.step()

    yield {
        "case": "NPC.step(), paper's CNN",
        "launches": device.launches(step),
        "host seconds": {"npc_ext": device.host_seconds(step)},
    }
    yield {"case": "a whole step never waits for the GPU", "ok": device.without_synchronization(train)}


def step(device: Device, quick: bool) -> Iterator[Row]:
    """Whole training steps: SGD (fused) and NPC, eager, compiled and in a CUDA graph."""
    networks: dict[str, tuple[Callable[[], nn.Module], int]] = {
        "paper's CNN, batch 256": (lambda: _paper(device), 256),
        "paper's CNN, batch 64": (lambda: _paper(device), 64),
        "ResNet-18, batch 256": (lambda: resnet18(8 if device.dry else 64).to(device.name), 256),
    }
    for label, (make, batch) in list(networks.items())[: 1 if quick else None]:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        batch = 2 if device.dry else batch
        for autocast in (False, True):
            peers: dict[str, Callable[[int], object]] = {}
            peaks: dict[str, int | None] = {}
            for graph in (False, True):
                for name in ("NPC", "SGD fused"):
                    model = make()
                    optimizer = _optimizer(name, model)
                    train = _step(device, model, optimizer, batch, autocast)
                    train()
                    key = name + (" in a graph" if graph else "")
                    peaks[key] = device.peak_bytes(train)
                    run = device.capture(train) if graph else train
                    peers[key] = lambda _, run=run: run()  # type: ignore[misc]
            if not device.dry and not quick:
                for name in ("NPC", "SGD fused"):
                    model = make()
                    optimizer = _optimizer(name, model)
                    train = _step(device, torch.compile(model), optimizer, batch, autocast)  # type: ignore[arg-type]
                    peers[f"{name}, compiled"] = lambda _, train=train: train()  # type: ignore[misc]
            result = device.compare(peers)
            row = _ratio_row(device, f"{label}{', bf16' if autocast else ''}", result, "SGD fused", 1.03)
            pairs = {
                "in a graph": ("NPC in a graph", "SGD fused in a graph"),
                "compiled": ("NPC, compiled", "SGD fused, compiled"),
            }
            for kind, (ours, theirs) in pairs.items():
                if ours in result.seconds:
                    row[f"NPC / SGD {kind}"] = result.seconds[ours] / result.seconds[theirs]
            row["peak bytes"] = peaks
            yield row


def memory(device: Device, quick: bool) -> Iterator[Row]:
    """Allocated memory does not grow over many steps."""
    steps = 5 if device.dry else 1000
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10)).to(device.name)
    optimizer = NPC(model)
    x, y = torch.randn(8, 3, 8, 8, device=device.name), torch.randint(10, (8,), device=device.name)

    def train() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    for _ in range(5):
        train()
    before = None if device.dry else torch.cuda.memory_allocated()
    for _ in range(steps):
        train()
    growth = None if before is None else torch.cuda.memory_allocated() - before
    yield {
        "case": f"bytes allocated more after {steps:,} steps",
        "bytes": growth,
        "ok": None if growth is None else growth == 0,
    }


def _run(command: list[str], seconds: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=seconds)


def _pair(device: Device, shape: tuple[int, ...], dtype: torch.dtype, last: bool) -> tuple[Tensor, Tensor]:
    def one() -> Tensor:
        made = torch.randn(shape, device=device.name).to(dtype)
        return made.contiguous(memory_format=torch.channels_last) if last else made

    return one(), one()


def _on(function: Callable[[Tensor, Tensor], object], inputs: list[tuple[Tensor, Tensor]]) -> Callable[[int], object]:
    return lambda index: function(*inputs[index])


def _paper(device: Device) -> nn.Module:
    network = cnn(3, 32, (8, 8, 8), 16, 10) if device.dry else cnn(3, 32, (128, 512, 256), 512, 100)
    return network.to(device.name)


def _optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    return NPC(model, lr=1e-3) if name == "NPC" else torch.optim.SGD(model.parameters(), lr=1e-3, fused=True)


def _step(
    device: Device, model: nn.Module, optimizer: torch.optim.Optimizer, batch: int, autocast: bool = False
) -> Callable[[], None]:
    images = torch.randn(batch, 3, 32, 32, device=device.name)
    labels = torch.randint(10, (batch,), device=device.name)

    def train() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.name, torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    return train


def _bandwidth_row(device: Device, case: str, result: Comparison, bytes_: int, goal: float) -> Row:
    speed, copy_ = bytes_ / result.seconds["npc_ext"], device.copy_bandwidth(max(bytes_ // 2, 2**12))
    return {
        "case": case,
        "seconds": result.seconds,
        "peer / npc_ext (quartiles)": result.ratio,
        "bytes": bytes_,
        "GB/s": speed / 1e9,
        "copy, GB/s": copy_ / 1e9,
        "share of copy bandwidth": speed / copy_,
        "goal": goal if bytes_ >= LARGE else "",
        "reached": "" if bytes_ < LARGE else None if device.dry else speed / copy_ >= goal,
    }


def _ratio_row(device: Device, case: str, result: Comparison, against: str, most: float | None) -> Row:
    ours = next(iter(result.seconds))
    low, median, high = (1 / ratio for ratio in reversed(result.ratio[against]))
    return {
        "case": case,
        "seconds": result.seconds,
        "peer / npc_ext (quartiles)": result.ratio,
        f"{ours} / {against} (quartiles)": (low, median, high),
        "goal": "" if most is None else most,
        "reached": "" if most is None else None if device.dry else median <= most,
    }


PARTS: dict[str, Callable[[Device, bool], Iterator[Row]]] = {
    part.__name__: part
    for part in (build, tests, sanitizer, importance, relu, update, launches, step, frozen_part.frozen, memory)
}
