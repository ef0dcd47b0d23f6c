"""Warnings that point at the line of the user's code."""

from __future__ import annotations

import inspect
import os
import warnings

import torch

# Code between a user's line and a warning: this package, torch (which wraps `step`), and generated code.
_BETWEEN = (os.path.dirname(__file__) + os.sep, os.path.dirname(torch.__file__) + os.sep, "<eval_with_key>")


def warn(text: str, category: type[Warning] = UserWarning) -> None:
    """Like `warnings.warn`, but for the nearest line outside of this package and torch.

    Python shows a warning once for each line, so for a line inside torch it would hide the next warning of this kind.
    """
    frame = inspect.currentframe()
    level = 1
    while frame is not None and frame.f_code.co_filename.startswith(_BETWEEN):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, category, stacklevel=2 if frame is None else level)  # None in a thread of autograd
