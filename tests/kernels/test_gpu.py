"""Tests that need a GPU: streams, graphs, threads, several devices, and sizes over 2**31."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import npc_ext
from bench.gpu.device import captured
from npc_ext import NPC, NPCAdamW, ops, reference
from npc_ext.kernels import native

from .arguments import activations, call, network, one_layer, sgd, wide_layers
from .checks import check, check_is_refused, check_network_step

pytestmark = pytest.mark.gpu


def model(device: str = "cuda") -> nn.Module:
    torch.manual_seed(1)
    convolution = (nn.Conv2d(3, 16, 3), npc_ext.nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(*convolution, nn.Flatten(), nn.Linear(144, 33), nn.ReLU(), nn.Linear(33, 10)).to(device)


def batch(device: str = "cuda") -> tuple[Tensor, Tensor]:
    return torch.randn(8, 3, 8, 8, device=device), torch.randint(10, (8,), device=device)


def trainer(network: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Callable[[], None]:
    def train() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()

    return train


def scratch() -> int:
    """The bytes of all workspaces on the first GPU."""
    kept: int = native.module_on(0).cuda.workspace_bytes(0)
    return kept


def test_the_kernels_are_there() -> None:
    assert not native.why_no_cuda()
    assert not native.why_not_on(0)


def test_kernels_run_on_the_current_stream() -> None:
    stream = torch.cuda.Stream()
    n = torch.zeros(64, 512, device="cuda")
    for _ in range(3):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            n.fill_(2.0)  # runs long after the host has continued
            got = ops.importance(n, n)
        stream.synchronize()
        assert torch.equal(got, torch.full((512,), 256.0, device="cuda"))
        n.zero_()
        torch.cuda.synchronize()


def test_two_streams_at_once_do_not_disturb_each_other() -> None:
    tensors = [torch.randn(256, 700, device="cuda") for _ in range(2)]
    want = [ops.importance(t, t) for t in tensors]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for _ in range(50):
        got = []
        for stream, tensor in zip(streams, tensors, strict=True):
            with torch.cuda.stream(stream):
                got.append(ops.importance(tensor, tensor))
        torch.cuda.synchronize()
        assert all(map(torch.equal, got, want))


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "NPC": lambda model, lr=0.05, **options: NPC(model, lr=lr, momentum=0.9, **options),
    "NPCAdamW": lambda model, lr=0.001, **options: NPCAdamW(model, lr=lr, **options),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


@every_optimizer
def test_training_on_a_gpu_follows_the_reference(name: str) -> None:
    ours, exact = model(), model()
    x, y = batch()
    steps = [trainer(ours, OPTIMIZERS[name](ours), x, y)]
    steps.append(trainer(exact, OPTIMIZERS[name](exact, backend="reference"), x, y))
    for _ in range(20):
        for step in steps:
            step()
    for got, want in zip(ours.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@every_optimizer
def test_a_captured_step_replays_with_new_data_and_a_new_learning_rate_bit_for_bit(name: str) -> None:
    ours = model()
    lr = torch.tensor(0.05, device="cuda")
    optimizer = OPTIMIZERS[name](ours, lr=lr)
    x, y = batch()
    train = trainer(ours, optimizer, x, y)
    replay = captured(train)
    state = [*ours.parameters(), *_state(optimizer)]
    saved = [tensor.detach().clone() for tensor in state]

    def run() -> list[Tensor]:
        with torch.no_grad():
            for tensor, old in zip(state, saved, strict=True):
                tensor.copy_(old)
        for step in range(5):
            generator = torch.Generator("cuda").manual_seed(step)
            x.normal_(generator=generator)
            lr.fill_(0.05 / (step + 1))
            replay()
        return [tensor.detach().clone() for tensor in state]

    first = run()
    assert all(map(torch.equal, first, run()))
    lr_counts = run()
    with torch.no_grad():
        for tensor, old in zip(state, saved, strict=True):
            tensor.copy_(old)
    lr.zero_()
    replay()
    assert torch.equal(next(ours.parameters()), saved[0]), (
        "a learning rate of zero, set after the capture, moves nothing"
    )
    assert not torch.equal(lr_counts[0], saved[0])


def test_a_graph_may_be_captured_on_a_stream_that_no_kernel_has_run_on() -> None:
    """The workspace is allocated within the capture, and replays use it on any stream."""
    n, g = torch.randn(512, 7, device="cuda"), torch.randn(512, 7, device="cuda")
    captured, twin = (network("update_", momentum=0.9, device="cuda") for _ in range(2))
    written = ("parameters", "momentum_buffers", "importances")
    for name in written:
        for tensor, other in zip(captured[name], twin[name], strict=True):
            other.copy_(tensor)
    for name in ("gradients", "measured"):
        twin[name] = captured[name]
    ops.importance(n[:3], g[:3])  # loads the module
    torch.cuda.synchronize()
    before, graph = scratch(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        got = ops.importance(n, g)
        call(ops.update_, captured)
    assert scratch() - before == 2**20, "of the graph"
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()):
        torch.cuda.synchronize()
        n.normal_()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            graph.replay()
        stream.synchronize()
        call(ops.update_, twin)
        assert torch.equal(got, ops.importance(n, g))
        for name in written:
            assert all(map(torch.equal, captured[name], twin[name]))


def test_replays_and_launches_reallocate_no_workspace() -> None:
    n, stream = torch.randn(512, 7, device="cuda"), torch.cuda.Stream()
    want = ops.importance(n, n)
    torch.cuda.synchronize()
    before = scratch()
    with torch.cuda.stream(stream):
        ops.importance(n, n)
    assert scratch() - before in (0, 4 * 2**20), "of the stream, unless another test has used it"
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    results = []
    for graph in graphs:
        with torch.cuda.graph(graph, stream=stream):
            results.append(ops.importance(n, n))
    kept, allocated = scratch(), torch.cuda.memory_allocated()
    for _ in range(20):
        for graph, result in zip(graphs, results, strict=True):
            graph.replay()
            assert torch.equal(result, want)
        assert torch.equal(ops.importance(n, n), want)
    assert scratch() == kept
    assert torch.cuda.memory_allocated() <= allocated + want.untyped_storage().nbytes() + 512


def _state(optimizer: Any) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


@pytest.mark.parametrize("skip_gradients", ["rows", "layers", "none"])
def test_a_step_reads_nothing_from_the_gpu_at_once(skip_gradients: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's debug mode does not see waits for events and devices, so they are counted: if gradients may be skipped, 7 for an event.

    This is one for each copy of importance, 8 steps after it was started.
    """
    ours = model()
    x, y = batch()
    train = trainer(ours, NPC(ours, skip_gradients=skip_gradients), x, y)
    for _ in range(3):
        train()
    waits = list[str]()
    wait = torch.cuda.Event.synchronize
    monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda event: (waits.append("event"), wait(event))[1])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: waits.append("device"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(250):  # several times through everything that happens in some steps only
            train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert waits == (["event"] * 7 if skip_gradients != "none" else [])


def test_memory_does_not_grow() -> None:
    ours = model()
    x, y = batch()
    # Without skipping, because certificates store the rows that are still computed: memory that comes and goes.
    train = trainer(ours, NPC(ours, momentum=0.9, skip_gradients="none"), x, y)
    for _ in range(5):
        train()
    before = torch.cuda.memory_allocated()
    for _ in range(1000):
        train()
    assert torch.cuda.memory_allocated() == before


def test_nonfinite_importance_is_reported_without_waiting() -> None:
    ours = model()
    x, y = batch()
    optimizer = NPC(ours, lr=0.0)
    layer = optimizer.neurons["0"]
    F.cross_entropy(ours(x), y).backward()
    layer.sink.grad[0] = torch.nan
    optimizer.step()
    assert optimizer.plasticity()["0"].nonfinite_steps == 1
    train = trainer(ours, optimizer, x, y)

    def train_on() -> None:
        for _ in range(150):
            train()
            torch.cuda.synchronize()

    with pytest.warns(npc_ext.ImportanceWarning, match="not finite"):
        train_on()


def test_backward_in_several_threads() -> None:
    networks = [model() for _ in range(4)]
    optimizers = [NPC(network) for network in networks]
    x, y = batch()
    steps = [trainer(*pair, x, y) for pair in zip(networks, optimizers, strict=True)]

    def work(step: Callable[[], None]) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                step()

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(step,)) for step in steps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    for other in networks[1:]:
        for got, want in zip(other.parameters(), networks[0].parameters(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_the_second_gpu() -> None:
    ours, twin = model("cuda:1"), model("cuda:0")
    x, y = batch()
    steps = [trainer(ours, NPC(ours), x.to("cuda:1"), y.to("cuda:1")), trainer(twin, NPC(twin), x, y)]
    for _ in range(5):
        for step in steps:
            step()
    for got, want in zip(ours.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got.cpu(), want.cpu(), rtol=1e-3, atol=1e-4)


def test_a_head_of_128_thousand_neurons() -> None:
    options: dict[str, Any] = {**wide_layers(128_000, inputs=64), "momentum": 0.9, "device": "cuda"}
    check("update_", network("update_", **options))
    arguments = network("update_", **options)
    inputs = activations([(4, len(tensor)) for tensor in arguments["importances"]], [1, 1, 1], device="cuda")
    check_network_step(inputs, arguments)


def test_importance_of_more_than_two_to_the_31_elements() -> None:
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free GPU memory")
    n = torch.ones(2**15 + 1, 2**16, dtype=torch.float16, device="cuda")
    n[-1] = 2
    assert torch.equal(ops.importance(n, n), torch.full((2**16,), 2.0**15 + 4, device="cuda"))
    last = n.view(1, 2, -1)
    got = ops.importance(last, last)
    want = torch.tensor([2.0**30 * (1 + 2**-15), 2.0**30], device="cuda")
    assert (got / want - 1).abs().max() < 0.01


def test_update_of_more_than_two_to_the_31_elements() -> None:
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free GPU memory")
    weight = torch.zeros(2**15 + 1, 2**16, dtype=torch.float16, device="cuda")
    gradient = torch.ones_like(weight)
    average = torch.zeros(2**15 + 1, device="cuda")
    average[5] = 1
    arguments = one_layer(average, [weight], [gradient]) | {"alpha": [0.1], "delta": [0.9]}
    call(ops.update_, {**arguments, **sgd(1, 0.5)})
    assert bool((weight[5] == 0).all())
    assert bool((weight[:5] == -0.5).all())
    assert bool((weight[6:] == -0.5).all())


def test_operations_refuse_tensors_on_several_devices() -> None:
    arguments = network("update_", device="cuda")
    arguments["nonfinite_steps"] = arguments["nonfinite_steps"].cpu()
    message = "nonfinite_steps has a tensor on cpu, but others are on cuda:0"
    check_is_refused("update_", arguments, message)


def test_float64_is_left_to_pytorch() -> None:
    n = torch.randn(4, 8, dtype=torch.float64, device="cuda")
    assert torch.equal(ops.importance(n, n), reference.importance(n, n))
