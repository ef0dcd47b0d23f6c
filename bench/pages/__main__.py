"""Writes the pages."""

from __future__ import annotations

import argparse
import sys

from .. import ROOT
from .render import FOLDER, PAGES, render


def main() -> int:
    """Writes all pages, and says which of them changed."""
    argparse.ArgumentParser(prog="python -m bench.pages", description=main.__doc__).parse_args()
    for page in PAGES:
        path, text = FOLDER / page, render(page)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
