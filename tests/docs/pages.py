"""The pages of the documentation."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "bench" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def anchors_on_github(text: str) -> Iterator[str]:
    """The anchors of the headings of a page on GitHub."""
    seen: dict[str, int] = {}
    for heading in re.findall(r"^#+ +(.*?)[ #]*$", CODE.sub("", text), re.MULTILINE):
        shown = re.sub(r"\]\([^)]*\)", "", heading).lower()
        anchor = re.sub(r"[^\w -]", "", shown).replace(" ", "-")
        times = seen[anchor] = seen.get(anchor, -1) + 1
        yield f"{anchor}-{times}" if times else anchor
