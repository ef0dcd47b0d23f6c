"""Every link and picture of the documentation leads to a file that is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .pages import PAGES, ROOT, name_of

CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files(page: Path) -> None:
    text = CODE.sub("", page.read_text())
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]
    assert not [link for link in links if not (page.parent / link).exists()]
    if page.name == "README.md" and page.parent == ROOT:
        assert links


def test_the_oldest_torch_that_is_promised_was_run() -> None:
    promised = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert promised
    records = ROOT / "bench" / "results" / "compatibility"
    (record,) = records.glob(f"torch-{promised[1]}-python-*.md")
    total = re.search(r"\| \*\*all\*\* \| \*\*(\d+)\*\* \| \*\*(\d+)\*\* \|", record.read_text())
    assert total and int(total[1]) > 1000 and int(total[2]) == 0
    assert f"torch {promised[1]} or newer" in (ROOT / "README.md").read_text()
