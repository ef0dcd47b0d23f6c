"""Loads the compiled module: the one built ahead of time, else one built just in time. A failure is remembered.

The module is loaded once per process: when an optimizer is built, or at the first use. A module that was compiled from
other sources or flags than those next to it (csrc/ was edited in a checkout) counts as missing. So a stale module never
runs.

At the first use of a GPU, the module is asked whether its CUDA kernels run there. If it has no code for that GPU, a
second module is built just in time for the GPUs present. The second module then runs on the GPU, and the first one
still runs on the CPU.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import threading
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from types import ModuleType

from . import build, compilers, just_in_time


class NativeUnavailableError(RuntimeError):
    """The compiled kernels cannot be used here; the message says why and how to fix it."""


@dataclass(frozen=True)
class Native:
    """The outcome of loading: a module and where it is from, or the reason why there is none."""

    module: ModuleType | None = None
    origin: str = "none"
    reason: str = ""
    why_not_prebuilt: str = ""  # why the module built ahead of time is not used
    not_built_yet: bool = False  # it could be built just in time, but this process only looks


@lru_cache(maxsize=1)
def status() -> Native:
    """Loads the module, unless that was tried before, and returns the outcome. Never raises."""
    why_not = ""
    try:
        prebuilt, why_not = _prebuilt()
        if prebuilt is not None:
            return Native(prebuilt, f"built ahead of time: {prebuilt.__file__}")
        module = _just_in_time(why_not)
        return Native(module, f"built just in time: {module.__file__}", why_not_prebuilt=why_not)
    except Exception as error:
        return Native(
            reason="; ".join(filter(None, [why_not, _sentence(error)])),
            why_not_prebuilt=why_not,
            not_built_yet=isinstance(error, just_in_time.NotBuiltError),
        )


def _sentence(error: Exception) -> str:
    expected = isinstance(error, (compilers.BuildError, ImportError))
    return str(error) if expected else f"{type(error).__name__}: {error}"


def _just_in_time(why: str = "") -> ModuleType:
    """Imports the module built just in time, and builds it if needed.

    A module that does not load is built once more.
    """
    path = just_in_time.build_cached(why)
    try:
        return import_from(path)
    except ImportError as error:
        compilers.say(f"the module {path} does not load ({error}); it is deleted and built again")
        just_in_time.discard(path)
    path = just_in_time.build_cached(why)
    try:
        return import_from(path)
    except ImportError as error:
        just_in_time.discard(path)
        raise compilers.BuildError(f"the module built just in time does not load, and was deleted: {error}") from error


def _prebuilt() -> tuple[ModuleType | None, str]:
    """The module built ahead of time, or why it cannot be used."""
    path = build.PACKAGE / build.MODULE_FILE
    if not path.exists():
        return None, f"no module built ahead of time is there ({path.name} is not in {path.parent})"
    # The file is read but not loaded: an extension that was loaded cannot be replaced in the same process.
    if differs := build.why_stale(path.read_bytes()):
        return None, (
            f"the module built ahead of time is older than the sources next to it ({differs}; to build it again: "
            f"{build.how_to_build()})"
        )
    try:
        return import_from(path), ""
    except ImportError as error:
        return None, f"the module built ahead of time does not load ({error})"


def import_from(path: Path, name: str = "npc_ext._C") -> ModuleType:
    """Imports an extension module from a file."""
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def available() -> bool:
    """Whether the compiled kernels can be used."""
    return status().module is not None


@lru_cache(maxsize=1)  # for every launch; status() remembers a failure
def module() -> ModuleType:
    """The compiled module. Raises NativeUnavailableError with the reason and the fix if there is none."""
    native = status()
    if native.module is None:
        raise NativeUnavailableError(
            f"npc_ext's compiled kernels are not available: {native.reason}\n"
            "Fix that, or pass backend='reference' for the slower kernels in plain PyTorch "
            "('python -m npc_ext' shows the state of this installation)."
        )
    return native.module


_first_use = threading.Lock()  # autograd's threads may use a GPU for the first time at the same time


@cache
def status_on(device: int) -> Native:
    """What runs on the GPU of that index. The first call checks it, and builds a module if needed. Never raises.

    This initializes CUDA on the GPU, so call it only for GPUs that are in use.
    """
    with _first_use:
        if reason := why_no_cuda():
            return Native(reason=reason)
        try:
            reason, needs_other_code = module().cuda.why_not_on(device)
            if not reason:
                return status()
            return _built_for_gpus(device, reason) if needs_other_code else Native(reason=reason)
        except Exception as error:
            return Native(reason=_sentence(error))


def _built_for_gpus(device: int, reason: str) -> Native:
    """A module built just in time for the GPUs present. `reason` says why the first one does not run there."""
    try:
        if why := compilers.why_no_nvcc():
            return Native(
                reason=f"{reason}, and it cannot be compiled for this GPU, because {why}; fix that, and the kernels "
                "are compiled at their next use"
            )
        path = just_in_time.build_cached()
        if path != Path(str(module().__file__)):
            built = _import_once(path)
            if not hasattr(built, "cuda"):
                return Native(reason=f"{reason}, and {_compiled_without_cuda(built)}")
            reason, _ = built.cuda.why_not_on(device)
            if not reason:
                return Native(built, f"built just in time: {path}")
        return Native(reason=f"{reason}; unset NPC_EXT_ARCHS, or add this GPU to it")
    except just_in_time.NotBuiltError:
        return Native(reason=reason, not_built_yet=True)
    except Exception as error:
        return Native(reason=f"{reason}, and compiling it for this GPU failed: {_sentence(error)}")


@cache
def _import_once(path: Path) -> ModuleType:
    return import_from(path)


def why_not_on(device: int) -> str:
    """Empty if the CUDA kernels run on the GPU of that index, else the reason why not and how to fix it."""
    return status_on(device).reason


def module_on(device: int) -> ModuleType:
    """The module whose CUDA kernels run on the GPU of that index. Raises NativeUnavailableError if there is none."""
    native = status_on(device)
    if native.module is None:
        raise NativeUnavailableError(f"npc_ext's CUDA kernels do not run on GPU {device}: {native.reason}")
    return native.module


@lru_cache(maxsize=1)
def why_no_cuda() -> str:
    """Empty if the module has CUDA kernels, else the reason why not and how to fix it."""
    compiled = status().module
    if compiled is None:
        return status().reason
    return "" if hasattr(compiled, "cuda") else _compiled_without_cuda(compiled)


def _compiled_without_cuda(compiled: ModuleType) -> str:
    said = f"the module was built without CUDA kernels, because {compiled.why_no_cuda}; fix that and "
    path = Path(str(compiled.__file__))
    if path.parent != build.PACKAGE:
        return f"{said}delete {path.parent}: the next use compiles it again"
    return f"{said}build it again: {build.how_to_build()}"
