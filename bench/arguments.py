"""Types of command-line arguments: folders that are checked before anything is computed."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def existing_folder(text: str) -> Path:
    """A folder to read from."""
    path = Path(text).expanduser()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} {'is not a folder' if path.exists() else 'does not exist'}")
    return path


def output_folder(text: str) -> Path:
    """A folder to write to. It is made with the first file in it, so a command that is refused leaves nothing."""
    path = Path(text).expanduser()
    there = next(folder for folder in (path, *path.absolute().parents) if os.path.lexists(folder))
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{there} is not a folder; name a folder for the results")
    if not os.access(there, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{there} cannot be written; name another folder for the results")
    return path
