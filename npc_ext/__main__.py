"""Reports what is installed and built: `python -m npc_ext`. For missing parts it says why, and how to fix it.

The report compiles nothing; `--build` first builds the kernels if they are not built yet, as the first optimizer does.
It also works if torch or the compiled module is broken. The exit status is 0 if the kernels are built, and run on this
processor and on each GPU that torch can use; else it is 1.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from . import __version__
from .kernels import compilers, just_in_time, native


def _torch() -> tuple[ModuleType | None, str]:
    try:
        import torch
    except Exception as error:  # a broken installation raises anything: ImportError, OSError, RuntimeError
        return None, f"does not load ({type(error).__name__}: {error}); fix: pip install --force-reinstall torch"
    cuda = f"with CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return torch, f"{torch.__version__}, {cuda}, {torch.get_num_threads()} threads"


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
        state = f"kernels {found.origin}"
        if found.module is None:
            state = f"NOT USED: {found.reason}"
        if found.not_built_yet:
            state = f"{_not_built_yet('compiles the kernels for it')}; {found.reason}"
        rows.append((f"GPU {index}", f"{name}, sm_{major}{minor}; {state}"))
    return rows or [("GPUs", _no_gpu(torch))]


def _no_gpu(torch: ModuleType) -> str:
    here = ", ".join(f"sm_{arch}" for arch in compilers.gpus_here())
    if torch.version.cuda is None and here:
        return f"NOT USED: there is one here ({here}), but this torch was built without CUDA; fix: install one with it"
    if here:
        return f"NOT USED: there is one here ({here}), but torch cannot use it; torch.cuda.init() says why"
    return "none: there is no GPU here" + ("" if torch.version.cuda else ", and this torch was built without CUDA")


def _not_built_yet(what: str) -> str:
    return f"not built yet: the first optimizer {what}, or now: python -m npc_ext --build"


def _gpu_count(torch: ModuleType) -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _cuda(found: native.Native) -> str:
    """The architectures of the CUDA kernels and the driver that they need and find, or why there are none."""
    if found.module is None:
        plan = compilers.cuda(just_in_time=True)
        return f"kernels for {' '.join(plan.archs)} will be built, too" if plan.nvcc else f"no kernels: {plan.reason}"
    if why := native.why_no_cuda():
        return f"no kernels: {why}"
    runtime, driver, needed, needed_name = found.module.cuda.versions()
    driver_here = f"the driver supports CUDA {_dotted(driver)}" if driver else "there is no driver"
    oldest = f"CUDA {_dotted(needed)}" + (f" (driver {needed_name})" if needed_name else "")
    return (
        f"kernels for {found.module.cuda_archs}, runtime {_dotted(runtime)}; needs a driver for {oldest} or newer, "
        f"{driver_here}"
    )


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _cuda_compiler() -> str:
    """nvcc, and what a build from source compiles with it."""
    if os.environ.get("NPC_EXT_NVCC") == "":
        return "not looked for: NPC_EXT_NVCC='' switches CUDA off"
    toolkit, _ = compilers.find_toolkit()
    if toolkit is None:
        return f"none: {compilers.why_no_nvcc()}"
    plan = compilers.cuda()
    builds = f"'pip install .' builds for {' '.join(plan.archs)}" if plan.nvcc else f"not used: {plan.reason}"
    return "; ".join([f"{toolkit.nvcc} (CUDA {toolkit.release}), {builds}", *plan.notices])


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the report; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m npc_ext", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--build", action="store_true", help="build the kernels first if they are not built yet")
    if not parser.parse_args(arguments).build:
        just_in_time.compile_nothing()
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
        rows.append(("kernels", f"{found.origin}, by {_compiler_of(found.module)}"))
        if found.why_not_prebuilt:
            rows.append(("", f"built just in time because {found.why_not_prebuilt}"))
        isas = found.module.isas()
        rows.append(("vectors", f"{found.module.isa_in_use()} in use; this processor runs {', '.join(isas)}"))
    elif found.not_built_yet:
        rows.append(("kernels", _not_built_yet("compiles them (about 25 s for the CPU, longer for GPUs)")))
        rows.append(("", f"because {found.why_not_prebuilt}"))
    else:
        rows.append(("kernels", f"MISSING: {found.reason}"))
        rows.append(("", "plain PyTorch is used instead, which is slower"))
    rows.append(("CUDA", _or_error(lambda: _cuda(found))))
    rows += _gpus(torch)
    for name, text in rows:
        print(f"{name:9} {text}")
    works = torch is not None and found.module is not None and not any(map(native.why_not_on, range(_gpu_count(torch))))
    return 0 if works else 1


def _compiler_of(module: ModuleType) -> str:
    """The compiler's name and version. GCC gives its version alone."""
    return f"GCC {module.compiler}" if module.compiler[0].isdigit() else str(module.compiler)


if __name__ == "__main__":
    sys.exit(main())
