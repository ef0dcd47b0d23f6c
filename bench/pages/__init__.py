"""The pages under docs/results: `python -m bench.pages` writes them from the files under bench/results.

A page is a template beside this file (Jinja2). It gets every measured number, in tables and in sentences, from the
functions of `learning`, `micro`, `gpu` and `scaling`, so that no number is typed twice.
"""

from __future__ import annotations

from .render import PAGES, render

__all__ = ["PAGES", "render"]
