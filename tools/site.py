"""Hooks of mkdocs.yml: pages link to files of the repository, and the site needs no network.

On GitHub, a page's link to `../../bench/results/demo/results.md` leads to that file. The site has a copy of it under
`repository/`, as plain text, and so does every other file outside docs/ to which a page links.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
# A link or a picture of Markdown whose target leaves the page's folder: `](../...)`.
_LEAVES = re.compile(r"\]\((\.\./[^)\s#]+)(#[^)\s]*)?\)")
_PICTURES = {".gif", ".jpg", ".png", ".svg"}
_LOADED = re.compile(r"""<(?:script|img|link|iframe)\b[^>]*\b(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)""")


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files, **_: Any) -> str:
    """Copies the linked files of the repository to the site, and leads the page's links to the copies."""
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
