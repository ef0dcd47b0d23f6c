"""python -m npc_ext: reports what is installed and built; for missing parts, the reason and the fix.

It also works if torch or the compiled module is broken. The exit status is 0 if everything works that can run here.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from . import __version__
from .kernels import compilers, native


def _torch() -> tuple[ModuleType | None, str]:
    try:
        import torch
    except Exception as error:  # a broken installation raises anything: ImportError, OSError, RuntimeError
        return None, f"does not load ({type(error).__name__}: {error}); fix: pip install --force-reinstall torch"
    return torch, f"{torch.__version__}, {torch.get_num_threads()} threads"


def _gpus(torch: ModuleType | None) -> list[tuple[str, str]]:
    """A row for each GPU: its name, and whether the kernels run on it."""
    if torch is None:
        return [("GPUs", "unknown, torch does not load")]
    rows = []
    for index in range(_gpu_count(torch)):
        try:
            name, (major, minor) = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        except Exception as error:
            rows.append((f"GPU {index}", f"NOT USED: torch cannot use it ({type(error).__name__}: {error})"))
            continue
        found = native.status_on(index)
        state = f"NOT USED: {found.reason}" if found.module is None else f"kernels {found.origin}"
        rows.append((f"GPU {index}", f"{name}, sm_{major}{minor}; {state}"))
    return rows or [("GPUs", "none that torch can use")]


def _gpu_count(torch: ModuleType) -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _cuda(compiled: ModuleType) -> str:
    """The architectures of the CUDA kernels, and the driver that they need and find."""
    if why := native.why_no_cuda():
        return f"missing: {why}"
    runtime, driver, needed, needed_name = compiled.cuda.versions()
    found = f"the driver supports CUDA {_dotted(driver)}" if driver else "there is no driver"
    oldest = f"CUDA {_dotted(needed)}" + (f" (driver {needed_name})" if needed_name else "")
    return f"for {compiled.cuda_archs}, runtime {_dotted(runtime)}; needs a driver for {oldest} or newer, {found}"


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _cuda_compiler() -> str:
    plan = compilers.cuda()
    if plan.nvcc is None:
        return f"not used, so the kernels are built for the CPU only: {plan.reason}"
    return "; ".join([f"{plan.nvcc} (CUDA {plan.release}), for {' '.join(plan.archs)}", *plan.notices])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return f"not installed; fix: pip install {package}"


def _or_error(report: Callable[[], str]) -> str:
    try:
        return report()
    except Exception as error:
        return str(error)


def main() -> int:
    """Prints the report; returns the exit status."""
    torch, torch_line = _torch()
    found = native.status()
    rows = [
        ("npc_ext", __version__),
        ("Python", f"{platform.python_version()} on {platform.machine()}, {platform.system()}"),
        ("torch", torch_line),
        ("numpy", _version("numpy")),
        ("compiler", _or_error(lambda: " ".join(compilers.compiler_command()))),
        ("nvcc", _or_error(_cuda_compiler)),
    ]
    if found.module is not None:
        isas = found.module.isas()
        rows += [
            ("kernels", f"{found.origin}, by {found.module.compiler}"),
            ("vectors", f"{found.module.isa_in_use()} in use; this processor runs {', '.join(isas)}"),
            ("CUDA", _cuda(found.module)),
        ]
        if found.why_not_prebuilt:
            rows.insert(-2, ("", f"built just in time because {found.why_not_prebuilt}"))
    else:
        rows += [("kernels", f"MISSING: {found.reason}"), ("", "plain PyTorch is used instead, which is slower")]
    rows += _gpus(torch)
    for name, text in rows:
        print(f"{name:9} {text}")
    works = torch is not None and found.module is not None and not any(map(native.why_not_on, range(_gpu_count(torch))))
    return 0 if works else 1


if __name__ == "__main__":
    sys.exit(main())
