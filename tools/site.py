"""Hooks of mkdocs.yml: pages link to files of the repository, the site needs no network, and no link in it is dead.

On GitHub, a page's link to `../../bench/results/demo/results.md` leads to that file. The site has a copy of it under
`repository/`, as plain text, and so does every other file outside docs/ to which a page links. Plain text has no
headings, so the link's anchor is left out.
"""

from __future__ import annotations

import logging
import os
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LOG = logging.getLogger("mkdocs.hooks.site")
ROOT = Path(__file__).resolve().parents[1]
# A link or a picture of Markdown whose target leaves the page's folder: `](../...)`.
_LEAVES = re.compile(r"\]\((\.\./[^)\s#]+)(#[^)\s]*)?\)")
# Pages whose weight in the search is raised: people paste messages into it.
_BOOST = {"reference/errors.md": 2}
_PICTURES = {".gif", ".jpg", ".png", ".svg"}
_LOADED = re.compile(r"""<(?:script|img|link|iframe)\b[^>]*\b(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)""")


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files, **_: Any) -> str:
    """Copies the linked files of the repository to the site, and leads the page's links to the copies.

    The weight in the search is set here, because GitHub shows a page's own metadata as a table.
    """
    if page.file.src_uri in _BOOST:
        page.meta["search"] = {"boost": _BOOST[page.file.src_uri]}
    docs = Path(config.docs_dir)
    here = (docs / page.file.src_uri).parent

    def copied(link: re.Match[str]) -> str:
        target = (here / link[1]).resolve()
        if target.is_relative_to(docs) or not target.is_relative_to(ROOT) or not target.is_file():
            return link[0]  # a page, or a link that MkDocs reports
        if target == ROOT / "README.md":
            return f"]({os.path.relpath(docs / 'index.md', here)})"
        uri = f"repository/{target.relative_to(ROOT)}" + ("" if target.suffix in _PICTURES else ".txt")
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, abs_src_path=str(target)))
        return f"]({os.path.relpath(docs / uri, here)})"

    return _LEAVES.sub(copied, markdown)


def on_post_page(output: str, *, page: Page, **_: Any) -> None:
    """Refuses a page that loads something from another server."""
    if loaded := _LOADED.findall(output):
        raise PluginError(f"{page.file.src_uri} loads {', '.join(loaded)}; the site has to work without a network")


class _Links(HTMLParser):
    """What a page loads or links to, and the anchors that it has."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.targets: dict[str, None] = {}
        self.anchors = {"", "__top"}
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called for every tag."""
        values = dict(attrs)
        self.targets |= {value: None for name in ("src", "href") if (value := values.get(name)) is not None}
        self.anchors |= {value for name in ("id", "name") if (value := values.get(name)) is not None}


def dead_links(site: Path) -> list[str]:
    """The local targets that are missing in a built site, HTML in the source of pages included."""

    @cache
    def read(page: Path) -> _Links:
        return _Links(page.read_text(encoding="utf-8"))

    dead = []
    # The page for errors is shown in any folder, so its links begin with the site's address.
    for page in sorted({*site.rglob("*.html")} - {site / "404.html"}):
        for link in read(page).targets:
            target = urlsplit(link)
            if target.scheme or target.netloc:
                continue
            file = Path(os.path.normpath(page.parent / unquote(target.path))) if target.path else page
            if file.is_dir():
                file /= "index.html"
            known = file.is_file() and (file.suffix != ".html" or unquote(target.fragment) in read(file).anchors)
            if not known:
                dead.append(f"{page.relative_to(site)} refers to '{link}', which is not in the site")
    return dead


def on_post_build(*, config: MkDocsConfig, **_: Any) -> None:
    """Refuses links and pictures that lead nowhere. MkDocs itself checks only those written in Markdown."""
    if dead := dead_links(Path(config.site_dir)):
        if config.strict:
            raise PluginError("\n".join(dead))
        LOG.warning("\n".join(dead))
