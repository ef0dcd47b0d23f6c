"""Scratch memory of the CUDA kernels: one workspace per stream and one per captured graph, which are never freed.

This runs on the CPU with a simulated CUDA (cuda_on_cpu.h), in which a capture refuses what a graph cannot contain.
"""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from .. import cuda_on_cpu

COUNTERS = 256 * 1024
_streams = iter(range(1 << 20, 1 << 30))


@pytest.fixture
def stream() -> int:
    """A stream that no launch has used yet."""
    return next(_streams)


def kept() -> int:
    bytes_kept: int = cuda_on_cpu.module().cuda.workspace_bytes(0)
    return bytes_kept


def importance(stream: int, samples: int = 600, neurons: int = 3) -> Tensor:
    """Eq. 2 for so few neurons that several blocks share them, which needs scratch memory."""
    n = torch.ones(samples, neurons)
    out = torch.empty(neurons)
    strides = n.stride()
    arguments = (n.data_ptr(), n.data_ptr(), out.data_ptr(), 0, 0, tuple(n.shape), strides, strides, 1, 0)
    cuda_on_cpu.launch("importance", torch.device("cpu"), *arguments, stream=stream)
    assert torch.equal(out, torch.full((neurons,), float(samples)))
    return out


def test_a_stream_gets_one_workspace_and_keeps_it(stream: int) -> None:
    before = kept()
    importance(stream)
    first = kept() - before
    assert first > COUNTERS
    for _ in range(3):
        importance(stream)
    assert kept() == before + first
    importance(next(_streams))
    assert kept() == before + 2 * first


def test_a_workspace_that_is_too_small_is_replaced_by_one_twice_as_large(stream: int) -> None:
    importance(stream)
    before = kept()
    importance(stream, neurons=40)
    larger = kept() - before
    assert larger >= 2 * COUNTERS
    importance(stream)
    importance(stream, neurons=40)
    assert kept() == before + larger


def test_each_capture_gets_its_workspace(stream: int) -> None:
    importance(stream)
    before = kept()
    for capture in (7, 8):
        with cuda_on_cpu.state(capture=capture):
            importance(stream)
            once = kept()
            importance(stream)  # the same graph
            assert kept() == once
            importance(stream + 1)  # another branch of the same graph
            assert kept() > once
    assert kept() - before >= 4 * COUNTERS
    after = kept()
    importance(stream)
    assert kept() == after, "outside of captures the stream still has the first"


def test_a_capture_may_be_the_first_launch_on_its_stream(stream: int) -> None:
    with cuda_on_cpu.state(capture=9):  # which refuses a memset on its stream, and allocations unless relaxed
        importance(stream)
    importance(stream)


def test_memory_that_cannot_be_allocated_is_an_error_that_says_how_to_fix_it(stream: int) -> None:
    before = kept()
    with (
        cuda_on_cpu.state(free_bytes=1000),
        pytest.raises(
            RuntimeError,
            match=r"npc_ext: cannot allocate 2\d{5} bytes of scratch on GPU 0 \(cudaErrorMemoryAllocation, out of "
            r"memory\); free memory there, for example with torch\.cuda\.empty_cache\(\)",
        ),
    ):
        importance(stream)
    assert kept() == before
    importance(stream)


@pytest.mark.parametrize("count", [4, 1])
def test_threads_launch_at_the_same_time_on_different_streams_and_on_the_same_one(count: int) -> None:
    streams = [next(_streams) for _ in range(count)]
    before, failures = kept(), list[BaseException]()

    def work(stream: int) -> None:
        try:
            for repeat in range(10):
                importance(stream, 600 + 300 * (repeat % 2))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(streams[index % count],)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert kept() - before >= count * COUNTERS
