"""Builds the extension module. npc_ext/kernels/build.py says what is compiled and how; torch is not imported here."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent

_spec = importlib.util.spec_from_file_location("npc_ext_build", ROOT / "npc_ext" / "kernels" / "build.py")
assert _spec is not None
assert _spec.loader is not None
_build = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _build
_spec.loader.exec_module(_build)


class BuildModule(build_ext):
    """Hands the one extension to npc_ext/kernels/build.py."""

    def build_extension(self, ext: Extension) -> None:
        try:
            # A folder that stays, so that the next build compiles only what changed.
            _build.build(Path(self.get_ext_fullpath(ext.name)).resolve(), ROOT / "build" / _build.MODULE_FILE)
        except (_build.BuildError, OSError) as error:
            sys.exit(f"npc_ext: {error}")


class BuildPython(build_py):
    """Puts csrc/ into the package, so that an installed npc_ext can compile its kernels just in time."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copytree(ROOT / "csrc", Path(self.build_lib) / "npc_ext" / "csrc", dirs_exist_ok=True)


setup(
    ext_modules=[Extension("npc_ext._C", sources=[])],
    cmdclass={"build_ext": BuildModule, "build_py": BuildPython},
)
