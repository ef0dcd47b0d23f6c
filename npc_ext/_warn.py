"""Warnings that point at the user's line."""

from __future__ import annotations

import inspect
import os
import warnings

import torch

# Code between a user's line and a warning: ours, torch's (the wrapper around `step`, schedulers, autograd), generated.
_BETWEEN = (os.path.dirname(__file__) + os.sep, os.path.dirname(torch.__file__) + os.sep, "<eval_with_key>")


def warn(text: str, category: type[Warning] = UserWarning) -> None:
    """As `warnings.warn`, at the nearest line outside of this package and torch.

    Python shows a warning once for each line, so a line inside torch would also hide the next warning of this kind.
    """
    frame = inspect.currentframe()
    level = 1
    while frame is not None and frame.f_code.co_filename.startswith(_BETWEEN):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, category, stacklevel=2 if frame is None else level)  # none: a thread of autograd
