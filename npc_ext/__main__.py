"""python -m npc_ext: what is installed and built here, and for what is missing the reason and what mends it.

Works when torch or the compiled module is broken; the exit status is 0 if everything that runs here is in order.
"""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from . import __version__, _build, _native


def _torch() -> tuple[ModuleType | None, str]:
    try:
        import torch
    except Exception as error:  # a broken installation raises anything: ImportError, OSError, RuntimeError
        return None, f"does not load ({type(error).__name__}: {error}); mend: pip install --force-reinstall torch"
    return torch, f"{torch.__version__}, {torch.get_num_threads()} threads"


def _gpus(torch: ModuleType | None) -> str:
    if torch is None:
        return "unknown, torch does not load"
    if not torch.cuda.is_available():
        return "none that torch can use"
    return ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))


def _cuda_compiler() -> str:
    try:
        found = _build.nvcc()
    except _build.BuildError as error:
        return str(error)
    return "none found; the kernels are built for the CPU only" if found is None else str(found)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return f"not installed; mend: pip install {package}"


def _compiler() -> str:
    try:
        return " ".join(_build.compiler_command())
    except _build.BuildError as error:
        return str(error)


def main() -> int:
    """Prints the report; returns the exit status."""
    torch, torch_line = _torch()
    native = _native.status()
    rows = [
        ("npc_ext", __version__),
        ("Python", f"{platform.python_version()} on {platform.machine()}, {platform.system()}"),
        ("torch", torch_line),
        ("numpy", _version("numpy")),
        ("GPUs", _gpus(torch)),
        ("compiler", _compiler()),
        ("nvcc", _cuda_compiler()),
    ]
    if native.module is not None:
        isas = native.module.isas()
        rows += [
            ("kernels", f"{native.origin}, by {native.module.compiler}"),
            ("vectors", f"{native.module.isa_in_use()} in use; this processor runs {', '.join(isas)}"),
            ("CUDA", f"missing: {why}" if (why := _native.why_no_cuda()) else f"for {native.module.cuda_archs}"),
        ]
    else:
        rows += [("kernels", f"MISSING: {native.reason}"), ("", "plain PyTorch is used instead, which is slower")]
    for name, text in rows:
        print(f"{name:9} {text}")
    if torch is None or native.module is None:
        return 1
    return 1 if torch.cuda.is_available() and _native.why_no_cuda() else 0


if __name__ == "__main__":
    sys.exit(main())
