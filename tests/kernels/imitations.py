"""Programs that imitate compilers and take no time, for the tests of the build."""

from __future__ import annotations

from pathlib import Path

import pytest

from npc_ext.kernels import compilers, native

needs_nvcc = pytest.mark.skipif(
    compilers.nvcc() is None, reason="there is no nvcc (CUDA 12.1 or newer) on this machine"
)


# A user whom the system does not know, as in a container: no HOME, and no entry in the list of users.
NOBODY = "import pwd\ndef unknown(uid): raise KeyError(uid)\npwd.getpwuid = unknown; os.environ.pop('HOME', None)"


# A C++ compiler that compiles nothing: it links the module that is already here. It logs its calls.
COMPILER = """#!/bin/sh
echo "$0 $*" >> "{log}"
while [ $# -gt 0 ]; do case "$1" in
  -o) out=$2; shift;; -MF) rules=$2; shift;; -shared) module="{module}";; -c) source=$2;;
esac; shift; done
{extra}
if [ -n "$module" ]; then cp "$module" "$out"; else echo > "$out"; fi
if [ -n "$rules" ]; then echo "$out:" > "$rules"; fi
"""
NVCC = """#!/bin/sh
case "$1" in
  --version) echo 'Cuda compilation tools, release {release}, V{release}.0'; exit;;
  --dryrun) echo '#$ TOP={top}' >&2; exit;;
  --list-gpu-arch) echo compute_75; echo compute_80; echo compute_90; exit;;
esac
"""


def script(path: Path, text: str) -> Path:
    """Writes a program and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def imitated_compiler(path: Path, extra: str = "", module: Path | str | None = None) -> Path:
    """Makes a compiler that takes no time, and returns its path. `path`.log has one line per call."""
    module = module or str(native.module().__file__)
    return script(path, COMPILER.format(log=f"{path}.log", module=module, extra=extra))


def imitated_nvcc(folder: Path, release: str = "13.0", extra: str = "exit 0", library: bool = True) -> Path:
    """Makes a CUDA toolkit whose nvcc knows three architectures, and returns the path of nvcc."""
    if library:
        script(folder / "lib64" / "libcudart_static.a", "")
    more = COMPILER.format(log=f"{folder}.log", module="", extra=extra)
    return script(folder / "bin" / "nvcc", NVCC.format(release=release, top=folder) + more)


def calls(compiler: Path) -> list[str]:
    """How an imitated compiler was called, one line per call."""
    log = Path(f"{compiler}.log")
    return log.read_text().splitlines() if log.exists() else []
