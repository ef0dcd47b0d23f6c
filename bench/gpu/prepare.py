"""Builds ahead of time what a GPU machine would have to build: `PYTHON -m bench.gpu.prepare [--against REV]`.

Run it with the Python version of that machine. It needs pybind11 and ninja, but not torch. NPC_EXT_ARCHS names the
GPU's architecture (default: 90). It prints the files and folders to copy to that machine.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
from pathlib import Path

from .. import ROOT
from ..against.revision import RevisionError, checkout

# A flight's kernels are built for Hopper only, with line numbers for compute-sanitizer and Nsight Compute.
ENVIRONMENT = {"NPC_EXT_ARCHS": "90", "NVCC_APPEND_FLAGS": "-lineinfo"}
_STREAM = Path(__file__).with_name("stream.cu")


def main() -> int:
    """Builds the module of this checkout, the one of another revision on request, and the ceiling's kernels."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.prepare", description=__doc__)
    parser.add_argument("--against", metavar="REV", help="another revision, to be compared with this one")
    arguments = parser.parse_args()
    from npc_ext.kernels.compilers import BuildError

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        other = checkout(arguments.against) if arguments.against else None  # before minutes of compiling
        made = [build_stream(ROOT / "build" / "flight"), _build_module(ROOT)]
        if other is not None:
            _build_module(other)
            made.append(other)
    except (BuildError, RevisionError) as error:
        print(f"bench.gpu.prepare: {error}", file=sys.stderr)
        return 1
    for path in made:
        print(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
    return 0


def _build_module(folder: Path) -> Path:
    """Compiles the module of a checkout into its package, with the checkout's build file."""
    from npc_ext.kernels import build, compilers  # not above: bench.gpu.parts also measures older revisions

    target = folder / "npc_ext" / build.MODULE_FILE
    objects = ROOT / "build" / "flight" / folder.name
    script = (
        "import sys; from pathlib import Path\n"
        "try: from npc_ext.kernels import build\n"
        "except ImportError: from npc_ext import _build as build  # older revisions\n"
        "build.build(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", script, str(target), str(objects)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise compilers.BuildError(f"building {folder} failed:\n{result.stderr}")
    return target


def stream_library(folder: Path) -> Path:
    """The path of the compiled stream.cu in a folder. Its name depends on the source."""
    return folder / f"libstream-{hashlib.sha256(_STREAM.read_bytes()).hexdigest()[:8]}.so"


def build_stream(folder: Path) -> Path:
    """Compiles stream.cu for the architectures of the kernels unless it is compiled; returns the library.

    Raises:
        BuildError: there is no nvcc, or it fails.
    """
    target = stream_library(folder)
    if target.exists():
        return target
    from npc_ext.kernels import build, compilers

    compiler = compilers.nvcc()
    if compiler is None:
        raise compilers.BuildError(f"{_STREAM.name} needs nvcc, and none was found; set NPC_EXT_NVCC or CUDA_HOME")
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".{target.name}.{os.getpid()}")
    flags = build.nvcc_flags(compilers.architectures()[0])
    command = [str(compiler), "-O3", *flags, "-shared", str(_STREAM), "-o", str(staged)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise compilers.BuildError(f"{' '.join(command)} failed:\n{result.stdout}{result.stderr}")
    os.replace(staged, target)
    return target


if __name__ == "__main__":
    sys.exit(main())
