"""The device to measure: a GPU or, in a dry run, the CPU, with the same interface."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch

from npc_ext.kernels import native

from ..rows import LIMITED
from ..timing import Case, HostTimer, Timer
from .processes import of_gpu

_MOST_BYTES_OF_SETS = 8 * 2**30
_CYCLES_PER_SECOND = 2e9  # upper bound of a multiprocessor's clock


class DeviceTimer:
    """Times work on the GPU between two events, so that the host's time does not count.

    A sleep keeps the GPU busy while the host queues the calls of a turn. If the host takes longer than the sleep in at
    least a quarter of the turns, the row's fact "limited by the host" names the peer: its times are the host's.
    """

    # The queue holds about 1,024 kernels, and a step of torch's foreach optimizers launches about a dozen. If the queue
    # is full, the host waits until the sleep ends.
    most_calls = 50

    def __init__(self) -> None:
        self._host: dict[tuple[int, str], float] = {}
        self._timed, self._limited = Counter[str](), Counter[str]()

    def seconds(self, case: Case, name: str, first: int, calls: int) -> float:
        """See `Timer`."""
        function, key = case.peers[name], (id(case), name)
        if key not in self._host:
            self._host[key] = self._host_seconds(case, name)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        asleep = 2 * self._host[key] * calls + 5e-5
        torch.cuda._sleep(int(asleep * _CYCLES_PER_SECOND))
        start.record()
        for call in range(first, first + calls):
            if case.prepare is not None:
                case.prepare()
            function(call % case.sets)
        self._timed[name] += 1
        self._limited[name] += start.query()  # the sleep ended before all calls were queued
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    def finish(self) -> Mapping[str, Any]:
        """See `Timer`; the fact names the peers whose calls the host limited."""
        limited = [name for name, turns in self._timed.items() if 4 * self._limited[name] >= turns]
        for known in (self._timed, self._limited, self._host):
            known.clear()
        return {LIMITED: limited} if limited else {}

    @staticmethod
    def _host_seconds(case: Case, name: str) -> float:
        """Seconds that the host takes to queue a call, the slowest of three."""
        seconds = []
        for call in range(4):
            torch.cuda.synchronize()
            started = time.perf_counter()
            if case.prepare is not None:
                case.prepare()
            case.peers[name](call % case.sets)
            seconds.append(time.perf_counter() - started)
        return max(seconds[1:])


def captured(function: Callable[[], object]) -> Callable[[], None]:
    """Captures a function in a CUDA graph, after three calls on another stream, and returns its replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    replay: Callable[[], None] = graph.replay
    return replay


class Device:
    """Times and inspects work on a GPU or, in a dry run, on the CPU with tiny sizes.

    Attributes:
        dry: whether this is a dry run, which only shows that everything runs.
        name: the device's name in torch.
        timer: times work on the device.
        seconds_to_load: time to load the compiled module, or to build it just in time.
    """

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.name = "cpu" if dry else "cuda"
        self.timer: Timer = HostTimer() if dry else DeviceTimer()
        started = time.perf_counter()
        native.status()
        self.seconds_to_load = time.perf_counter() - started

    def describe(self) -> dict[str, Any]:
        """Facts about the GPU that `bench.environment` does not have."""
        if self.dry:
            return {"gpu": "none (dry run)"}
        properties = torch.cuda.get_device_properties(0)
        return {
            "gpu": properties.name,
            "driver": of_gpu("driver_version"),
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "L2 bytes": properties.L2_cache_size,
            "CUDA of torch": str(torch.version.cuda),
        }

    def synchronize(self) -> None:
        """Waits until the device has finished all work."""
        if not self.dry:
            torch.cuda.synchronize()

    def empty_cache(self) -> None:
        """Releases memory that torch caches."""
        if not self.dry:
            torch.cuda.empty_cache()

    def sets_of(self, bytes_per_set: int) -> int:
        """How many input sets to cycle through so that none stays in the L2 cache (at most 512)."""
        cache = 2**16 if self.dry else torch.cuda.get_device_properties(0).L2_cache_size
        room = max(1, _MOST_BYTES_OF_SETS // max(bytes_per_set, 1))
        return int(max(1, min(512, room, -(-3 * cache // max(bytes_per_set, 1)))))

    def capture(self, function: Callable[[], object]) -> Callable[[], object]:
        """The function as a CUDA graph; in a dry run the function itself."""
        return function if self.dry else captured(function)

    def launches(self, function: Callable[[], object]) -> dict[str, int] | None:
        """How often one call launches each kernel, from the profiler; None (not measured) in a dry run."""
        function()
        self.synchronize()
        if self.dry:
            return None
        from torch.profiler import ProfilerActivity, profile

        for _ in range(2):  # the first profile in a process may come back empty
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                function()
                torch.cuda.synchronize()
        of_device = [event.name for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        if not of_device:
            raise RuntimeError("the profiler saw no kernel")
        return dict(Counter(kernel[0] if (kernel := re.search(r"\w+_kernel", name)) else name for name in of_device))

    def peak_bytes(self, function: Callable[[], object]) -> int | None:
        """Peak memory that torch allocates during a call, above what was allocated before; None in a dry run."""
        function()
        if self.dry:
            return None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
