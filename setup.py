"""Builds the extension module. npc_ext/kernels/build.py says what is compiled and how; it does not import torch."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # for the package in this folder, before an installed one

from npc_ext.kernels import build, compilers  # noqa: E402


class BuildModule(build_ext):
    """Builds the one extension with npc_ext/kernels/build.py."""

    def build_extension(self, ext: Extension) -> None:
        try:
            # This folder is kept, so that the next build compiles only what changed.
            build.build(Path(self.get_ext_fullpath(ext.name)).resolve(), ROOT / "build" / build.MODULE_FILE)
        except (compilers.BuildError, OSError) as error:
            sys.exit(f"npc_ext: {error}")


class BuildPython(build_py):
    """Copies csrc/ into the package, so that an installed npc_ext can compile its kernels just in time."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copytree(ROOT / "csrc", Path(self.build_lib) / "npc_ext" / "csrc", dirs_exist_ok=True)


setup(
    ext_modules=[Extension("npc_ext._C", sources=[])],
    cmdclass={"build_ext": BuildModule, "build_py": BuildPython},
)
