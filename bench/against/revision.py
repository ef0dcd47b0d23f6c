"""Other revisions of this repository, each in a folder below build/against. Nothing here imports torch."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from .. import ROOT

_SOURCES = ("npc_ext", "csrc")
# A package npc_ext.kernels for revisions that have _build.py, _launch.py and _native.py in npc_ext instead.
_KERNELS = """import importlib


def __getattr__(name):
    return importlib.import_module(f"npc_ext._{name}")
"""


class RevisionError(ValueError):
    """A revision is unknown, or its kernels cannot be used."""


def checkout(revision: str) -> Path:
    """Returns a folder with the package of a revision and the benchmarks of this checkout.

    If `revision` is a folder with npc_ext in it, returns that folder.

    Raises:
        RevisionError: git does not know the revision.
    """
    folder = Path(revision)
    if (folder / "npc_ext").is_dir():
        return folder.resolve()
    try:
        named = _git("rev-parse", "--short", f"{revision}^{{commit}}").decode().strip()
    except RevisionError as error:
        raise RevisionError(
            f"{revision!r} is neither a revision of this repository nor a folder with npc_ext in it ({error})"
        ) from None
    folder = ROOT / "build" / "against" / named
    shutil.rmtree(folder / "bench", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["tar", "-x", "-C", str(folder)], input=_git("archive", named, *_SOURCES), check=True)
    kernels = folder / "npc_ext" / "kernels" / "__init__.py"
    if not kernels.exists():
        kernels.parent.mkdir()
        kernels.write_text(_KERNELS)
    shutil.copytree(ROOT / "bench", folder / "bench", ignore=shutil.ignore_patterns("results", "__pycache__"))
    return folder


def _git(*command: str) -> bytes:
    try:
        result = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, check=False)
    except OSError as error:
        raise RevisionError(f"git does not run ({error}); name a folder in which the revision is checked out") from None
    if result.returncode != 0:
        raise RevisionError(f"git {' '.join(command)} failed: {result.stderr.decode().strip()}")
    return result.stdout
