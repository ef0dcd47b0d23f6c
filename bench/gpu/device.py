"""The device that is measured: a GPU, or in a dry run the CPU, behind the same few functions."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..micro.timing import Comparison

_MOST_BYTES_OF_SETS = 8 * 2**30


class Device:
    """Times and inspects work on a GPU; `dry`: on the CPU, with tiny sizes, to see that everything runs."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.name = "cpu" if dry else "cuda"
        self.turns = 3 if dry else 15

    def describe(self) -> dict[str, Any]:
        """What `bench.environment` cannot know without a GPU."""
        if self.dry:
            return {"gpu": "none (dry run)"}
        own = torch.cuda.get_device_properties(0)
        return {
            "gpu": own.name,
            "memory": own.total_memory,
            "multiprocessors": own.multi_processor_count,
            "L2 bytes": own.L2_cache_size,
            "CUDA of torch": str(torch.version.cuda),
        }

    def synchronize(self) -> None:
        """Waits until the device has done everything."""
        if not self.dry:
            torch.cuda.synchronize()

    def sets_of(self, bytes_per_set: int) -> int:
        """How many sets of inputs to go through in turn so that none is in the L2 cache any more."""
        cache = 2**16 if self.dry else torch.cuda.get_device_properties(0).L2_cache_size
        room = max(1, _MOST_BYTES_OF_SETS // max(bytes_per_set, 1))
        return int(max(1, min(64, room, -(-3 * cache // max(bytes_per_set, 1)))))

    def seconds(self, function: Callable[[int], object], calls: int, first: int = 0) -> float:
        """Mean seconds of one call on the device: between two events, so that the host's own time does not count."""
        if self.dry:
            started = time.perf_counter()
            for call in range(calls):
                function(first + call)
            return (time.perf_counter() - started) / calls
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The host gets ahead, so that launches wait for the device and not the other way round.
        torch.cuda._sleep(2_000_000)
        start.record()
        for call in range(calls):
            function(first + call)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    def host_seconds(self, function: Callable[[], object], calls: int = 50) -> float:
        """Median seconds until a call returns, whatever the device still does."""
        times = []
        for _ in range(3 if self.dry else calls):
            self.synchronize()
            started = time.perf_counter()
            function()
            times.append(time.perf_counter() - started)
        return float(np.median(times))

    def compare(self, peers: Mapping[str, Callable[[int], object]], sets: int = 1, seconds: float = 0.02) -> Comparison:
        """Device time of functions of the number of an input set, in turns; the first is ours."""
        calls = {}
        for name, function in peers.items():
            for index in range(3):
                function(index % sets)
            self.synchronize()
            once = self.seconds(lambda call, f=function: f(call % sets), 3)  # type: ignore[misc]
            calls[name] = 1 if self.dry else int(max(1, min(50, seconds / max(once, 1e-7))))
        samples: dict[str, list[float]] = {name: [] for name in peers}
        order = list(peers)
        for turn in range(self.turns):
            for name in order if turn % 2 else reversed(order):
                function = peers[name]
                samples[name].append(
                    self.seconds(lambda call, f=function: f(call % sets), calls[name], turn * calls[name])  # type: ignore[misc]
                )
        ours, *others = order
        ratio = {
            name: tuple(float(q) for q in np.quantile(np.array(samples[name]) / samples[ours], (0.25, 0.5, 0.75)))
            for name in others
        }
        return Comparison({name: float(np.median(times)) for name, times in samples.items()}, ratio)  # type: ignore[arg-type]

    def capture(self, function: Callable[[], object]) -> Callable[[], object]:
        """The function as a CUDA graph, after warming up on a stream of its own; in a dry run the function itself."""
        if self.dry:
            return function
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return graph.replay

    def launches(self, function: Callable[[], object]) -> int | None:
        """How many kernels one call launches, by the profiler; None (not measured) in a dry run."""
        function()
        self.synchronize()
        if self.dry:
            return None
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            function()
            torch.cuda.synchronize()
        events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        return sum("memset" not in event.name.lower() and "memcpy" not in event.name.lower() for event in events)

    def peak_bytes(self, function: Callable[[], object]) -> int | None:
        """Most memory allocated during a call; None (not measured) in a dry run."""
        if self.dry:
            function()
            return None
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    def without_synchronization(self, function: Callable[[], object]) -> bool | None:
        """Whether a call never makes the host wait for the device; None (not measured) in a dry run."""
        if self.dry:
            function()
            return None
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            function()
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            return False
        finally:
            torch.cuda.set_sync_debug_mode(before)
        return True

    def copy_bandwidth(self, size: int) -> float:
        """Bytes read and written in a second by copying `size` bytes from one buffer to another."""
        source = torch.empty(size, dtype=torch.uint8, device=self.name).random_()
        target = torch.empty_like(source)
        times = [self.seconds(lambda _: target.copy_(source), 10) for _ in range(self.turns)]
        return 2 * size / float(np.median(times))


def check(name: str, got: Tensor, want: Tensor, tolerance: float = 1e-3) -> None:
    """A peer that computes something else is no peer."""
    error = (got.double() - want.double()).norm() / want.double().norm()
    if not error < tolerance:
        raise AssertionError(f"{name} is off by {error:.2g} of what it should compute")
