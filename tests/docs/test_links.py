"""Every link and picture of the documentation leads to a file that is there, and every anchor to a heading."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from .pages import CODE, PAGES, ROOT, anchors_on_github, name_of

try:
    import markdown
except ImportError:  # with Python 3.10
    markdown = None

LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")
ELSEWHERE = re.compile(r"[a-z]+:")  # https:, mailto:
# What mkdocstrings puts into a page. MkDocs checks links to it.
OF_THE_PACKAGE = "npc_ext."


def links(text: str) -> list[tuple[str, str]]:
    """The local links of a page: file and anchor, each of which may be empty."""
    return [link for link in LINK.findall(CODE.sub("", text)) if not ELSEWHERE.match(link[0])]


def anchors_on_the_site(text: str) -> set[str]:
    """The anchors of the headings of a page that MkDocs builds."""
    html = markdown.markdown(text, extensions=["attr_list", "md_in_html", "tables", "toc", "fenced_code"])
    return {*re.findall(r'<h\d id="([^"]+)"', html)}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files(page: Path) -> None:
    found = links(page.read_text())
    assert not [file for file, _ in found if not (page.parent / file).exists()]
    if page == ROOT / "README.md":
        assert found


def dead_anchors(page: Path, text: str) -> Iterator[str]:
    """The links to a Markdown page that do not lead to a heading: on GitHub, or, within docs/, on the site."""
    for file, anchor in links(text):
        target = (page.parent / file).resolve() if file else page
        if not anchor or anchor.startswith(OF_THE_PACKAGE) or target.suffix != ".md":
            continue
        aimed = text if target == page else target.read_text()
        if anchor not in anchors_on_github(aimed):
            yield f"{file}#{anchor} on GitHub"
        if target.is_relative_to(ROOT / "docs") and markdown is not None and anchor not in anchors_on_the_site(aimed):
            yield f"{file}#{anchor} on the site"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_anchors_lead_to_headings(page: Path) -> None:
    assert not [*dead_anchors(page, page.read_text())]


def test_dead_links_are_found() -> None:
    page = ROOT / "docs" / "index.md"
    text = "# One\n\n[a](#one) [b](limits.md#skipped-gradients) [c](#two) [d](limits.md#no-such) [e](../README.md#no)"
    where = ["on GitHub"] if markdown is None else ["on GitHub", "on the site"]
    dead = [f"{link} {place}" for link in ("#two", "limits.md#no-such") for place in where]
    assert [*dead_anchors(page, text)] == [*dead, "../README.md#no on GitHub"]
    assert links("[a](https://x.org/#y) [b](c.md#d)\n```sh\n[e](f.md)\n```\n") == [("c.md", "d")]


def test_equal_headings_get_numbers() -> None:
    text = "# A `b_c`, [d=1.5](e.md)\n## Same\n## Same\n"
    assert [*anchors_on_github(text)] == ["a-b_c-d15", "same", "same-1"]
    if markdown is not None:
        assert anchors_on_the_site(text) == {"a-b_c-d15", "same", "same_1"}


def test_the_oldest_torch_that_is_promised_was_run() -> None:
    promised = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert promised
    records = ROOT / "bench" / "results" / "compatibility"
    (record,) = records.glob(f"torch-{promised[1]}-python-*.md")
    total = re.search(r"\| \*\*all\*\* +\| \*\*(\d+)\*\* +\| \*\*(\d+)\*\* +\|", record.read_text())
    assert total and int(total[1]) > 1000 and int(total[2]) == 0
    assert f"torch {promised[1]} or newer" in (ROOT / "README.md").read_text()
