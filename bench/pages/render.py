"""Renders templates: what they can call, and how numbers are written."""

from __future__ import annotations

from pathlib import Path

import jinja2

from .. import ROOT
from ..continual.demo import FALL
from ..tables import duration, percent, with_error
from . import gpu, learning, micro, scaling

FOLDER = ROOT / "docs" / "results"
TEMPLATES = Path(__file__).parent
PAGES = tuple(sorted(path.name for path in TEMPLATES.glob("*.md")))
_NOTE = (
    "<!-- `python -m bench.pages` writes this page from bench/pages/{page} and the files under bench/results. -->\n\n"
)


def render(page: str) -> str:
    """The text of a page.

    Args:
        page: its name, one of `PAGES`.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown
    )
    environment.globals |= {"learning": learning, "micro": micro, "gpu": gpu, "scaling": scaling, "FALL": FALL}
    environment.filters |= {
        "percent": percent,
        "mean": learning.mean,
        "with_error": with_error,
        "duration": duration,
        "time": micro.time,
        "ratio": micro.ratio,
        "spread": micro.spread,
    }
    return _NOTE.format(page=page) + environment.get_template(page).render()
