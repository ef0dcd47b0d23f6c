"""The ceiling of a kernel: how fast the GPU moves bytes with the same mix of reads and writes (stream.cu)."""

from __future__ import annotations

import ctypes
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import ROOT
from ..timing import Case
from .device import Device
from .prepare import build_stream, stream_library

MIXES = ((2, 0), (1, 1), (2, 1), (3, 2), (4, 3))  # (arrays read, arrays written)
_PACKS_PER_THREAD = (1, 2, 4)


@lru_cache(maxsize=1)
def _library() -> Any:
    prepared = stream_library(ROOT / "build" / "flight")
    if prepared.exists():
        try:
            return ctypes.CDLL(str(prepared))
        except OSError as error:
            print(f"{prepared} does not load ({error}); it is built again", flush=True)
    return ctypes.CDLL(str(build_stream(Path(tempfile.gettempdir()) / "npc_ext-flight")))


class Ceiling:
    """Reads and writes as many arrays as a kernel does, cycling through as many sets of buffers.

    Args:
        device: device of the arrays.
        reads, writes: number of arrays; one of `MIXES`.
        numbers: number of float32 in each array.
        sets: number of sets of arrays to cycle through.
        in_place: write to arrays that are read, as optimizers do. Otherwise write to others, which are the same in
            all sets, as torch's allocator gives a result the memory of the one before.
    """

    def __init__(
        self, device: Device, reads: int, writes: int, numbers: int, sets: int, *, in_place: bool = True
    ) -> None:
        self.name = f"ceiling ({reads} read, {writes} written{'' if in_place or not writes else ' elsewhere'})"
        self._device, self._reads, self._writes, self._packs = device, reads, writes, max(numbers // 4, 1)
        self._first_written = 0 if in_place else reads

        def arrays(count: int) -> list[Tensor]:
            return [torch.randn(4 * self._packs, device=device.name) for _ in range(count)]

        elsewhere = [] if in_place else arrays(writes)
        self._sets = [[*arrays(reads), *elsewhere] for _ in range(sets)]
        self._never = torch.zeros(1, device=device.name)
        self._per_thread = 1
        if not device.dry:
            self._per_thread = min(_PACKS_PER_THREAD, key=self._seconds)

    def __call__(self, index: int) -> None:
        """Reads and writes one set."""
        arrays = self._sets[index]
        if self._device.dry:
            mean = torch.stack(arrays[: self._reads]).mean(0)
            for array in self._written(index):
                array.copy_(mean)
            return
        pointers = (ctypes.c_void_p * len(arrays))(*(array.data_ptr() for array in arrays))
        failed = _library().npc_bench_stream(
            self._reads,
            self._writes,
            self._first_written,
            self._per_thread,
            pointers,
            ctypes.c_int64(self._packs),
            ctypes.c_void_p(self._never.data_ptr()),
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
        )
        if failed:
            raise RuntimeError(f"stream.cu reports error {failed}")

    def _written(self, index: int) -> list[Tensor]:
        return self._sets[index][self._first_written : self._first_written + self._writes]

    def check(self) -> None:
        """Raises AssertionError if the arrays are not written."""
        before = torch.stack(self._sets[0][: self._reads]).mean(0)
        self(0)
        for array in self._written(0):
            torch.testing.assert_close(array, before, rtol=1e-5, atol=1e-5)

    def _seconds(self, per_thread: int) -> float:
        self._per_thread = per_thread
        case = Case("", {"": self}, sets=len(self._sets))
        self._device.timer.seconds(case, "", 0, 3)
        seconds = min(self._device.timer.seconds(case, "", 0, 10) for _ in range(3))
        self._device.timer.finish()
        return seconds
