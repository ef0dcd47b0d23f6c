"""Imitated machines, for the tests of the build."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from npc_ext.kernels import compilers

from .imitations import script


@pytest.fixture
def imitate_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Sets up the machine that the search for compilers finds. It may be called several times.

    Args of the function:
        home: the only CUDA toolkit of the machine, by CUDA_HOME.
        gpus: the compute capabilities of its GPUs, as nvidia-smi prints them.
        torch_cuda: the line in torch's version.py that says whether torch has CUDA.
        variables: further environment variables.
    """

    def imitate(
        home: Path | None = None,
        gpus: tuple[str, ...] = (),
        torch_cuda: str = "cuda: Optional[str] = '12.8'",
        **variables: str,
    ) -> None:
        for name in ("NPC_EXT_ARCHS", "TORCH_CUDA_ARCH_LIST", "NPC_EXT_NVCC", "CUDA_HOME"):
            monkeypatch.delenv(name, raising=False)
        nvidia_smi = script(tmp_path / "driver" / "nvidia-smi", f"#!/bin/sh\nprintf '%s\\n' {' '.join(gpus)}\n")
        monkeypatch.setenv("PATH", f"{nvidia_smi.parent}:/usr/bin:/bin")
        if home is not None:
            monkeypatch.setenv("CUDA_HOME", str(home))
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        script(tmp_path / "torch" / "version.py", f"__version__ = '2.9.0'\n{torch_cuda}\nhip = None\n")
        compilers.find_toolkit.cache_clear()

    which = shutil.which

    def without_usr_local_cuda(name: str, **options: str) -> str | None:
        return None if str(name).startswith("/usr/local/cuda") else which(name, **options)

    monkeypatch.setattr(shutil, "which", without_usr_local_cuda)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    broken = script(tmp_path / "torch" / "__init__.py", "raise OSError('broken')")
    monkeypatch.setattr(torch.__spec__, "origin", str(broken))
    yield imitate
    compilers.find_toolkit.cache_clear()
