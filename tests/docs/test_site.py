"""What mkdocs.yml adds to MkDocs: the hooks in tools/site.py, and the extension in tools/docstrings.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from .pages import ROOT

PluginError = pytest.importorskip("mkdocs.exceptions", reason="mkdocs is not installed").PluginError
griffe = pytest.importorskip("griffe", reason="griffe is not installed")


def tool(name: str) -> ModuleType:
    """A module of tools/, which is no package: MkDocs loads its files."""
    spec = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / "tools" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


docstrings, site = tool("docstrings"), tool("site")


@pytest.fixture(scope="module")
def package() -> Any:
    """npc_ext as griffe reads it with the extension."""
    extensions = griffe.load_extensions(docstrings.Docstrings)
    return griffe.load("npc_ext", search_paths=[ROOT], extensions=extensions)


def test_an_operation_has_the_signature_and_docstring_of_its_reference(package: Any) -> None:
    update, reference = package["ops.update_"], package["reference.update_"]
    assert update.is_function and update.path == "npc_ext.ops.update_"
    assert [parameter.name for parameter in update.parameters] == [p.name for p in reference.parameters]
    assert update.docstring.value.split("\n")[0] == reference.docstring.value.split("\n")[0]


def test_a_named_tuple_has_a_constructor(package: Any) -> None:
    from npc_ext import columns

    group = next(value for value in vars(columns).values() if hasattr(value, "_fields"))
    constructor = package[f"columns.{group.__name__}.__init__"]
    assert [parameter.name for parameter in constructor.parameters] == ["self", *group._fields]


def linked(text: str) -> str:
    """A docstring of a package with a class `A`, with links."""
    pkg: Any = griffe.Module("pkg", docstring=griffe.Docstring(text))
    pkg.set_member("A", griffe.Class("A"))
    docstrings._link(pkg, pkg)
    return str(pkg.docstring.value)


def test_names_in_docstrings_are_linked() -> None:
    assert linked("An `A`, no `B`.") == ('An <autoref optional identifier="pkg.A"><code>A</code></autoref>, no `B`.')


def test_pages_and_headings_in_docstrings_are_linked() -> None:
    heading = 'docs/limits.md,\n"Skipped gradients"'
    assert linked(f"See {heading}.") == f'See <a href="../limits.html#skipped-gradients">{heading}</a>.'
    page = "docs/development/machine-code.md"
    assert linked(f"See {page}.") == f'See <a href="../development/machine-code.html">{page}</a>.'


def test_a_docstring_that_names_a_missing_heading_or_page_is_an_error() -> None:
    with pytest.raises(PluginError, match=r'docs/limits\.md, "No such heading", but the page has no such heading'):
        linked('See docs/limits.md, "No such heading".')
    with pytest.raises(PluginError, match=r"names docs/no\.md, which does not exist"):
        linked("See docs/no.md.")


def test_anchors_of_headings_are_those_of_mkdocs() -> None:
    text = "# One\n## `beta=0.5`, and so_on\n### A `b`\n"
    assert docstrings._anchors(text) == {"One": "one", "beta=0.5, and so_on": "beta05-and-so_on", "A b": "a-b"}


@pytest.fixture
def page() -> Any:
    """The arguments of hooks for docs/guides/install.md."""
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import File, Files
    from mkdocs.structure.pages import Page

    config = MkDocsConfig()
    config.load_dict({"site_name": "site", "docs_dir": str(ROOT / "docs"), "use_directory_urls": False})
    config.validate()
    config.plugins._current_plugin = "tools/site.py"
    file = File("guides/install.md", config.docs_dir, config.site_dir, use_directory_urls=False)
    return {"page": Page("Install", file, config), "config": config, "files": Files([file])}


def test_a_linked_file_outside_of_docs_is_copied(page: Any) -> None:
    text = "[a](../../bench/README.md#on-a-gpu) ![b](../../bench/results/demo/average.svg) [c](../../README.md) [d](../limits.md#x)"
    assert site.on_page_markdown(text, **page) == (
        "[a](../repository/bench/README.md.txt) ![b](../repository/bench/results/demo/average.svg)"
        " [c](../index.md) [d](../limits.md#x)"
    )
    copied = {file.src_uri: file.abs_src_path for file in page["files"]}
    assert copied["repository/bench/README.md.txt"] == str(ROOT / "bench" / "README.md")
    assert "repository/bench/results/demo/average.svg" in copied


def test_the_search_prefers_pages_that_explain_messages() -> None:
    assert all((ROOT / "docs" / page).is_file() for page in site._BOOST)


@pytest.mark.parametrize("tag", ['<script src="https://x.org/y.js">', "<img alt='a' src=//x.org/y.png>"])
def test_a_page_that_loads_from_another_server_is_refused(page: Any, tag: str) -> None:
    site.on_post_page('<a href="https://x.org">links may</a><script src="own.js">', page=page["page"])
    with pytest.raises(PluginError, match=r"guides/install.md loads \S*//x.org/y"):
        site.on_post_page(tag, page=page["page"])


def test_dead_links_of_a_built_site_are_found(tmp_path: Path) -> None:
    (tmp_path / "guides").mkdir()
    (tmp_path / "a b.png").touch()
    (tmp_path / "index.html").write_text('<h1 id="top"><a href="#top"></a></h1><a href="guides/x.html#in"></a>')
    (tmp_path / "guides" / "x.html").write_text(
        '<p id="in"><img src="../a%20b.png"><a href="..#top"></a><a href="https://x.org/y.html"></a>'
    )
    assert site.dead_links(tmp_path) == []
    with (tmp_path / "index.html").open("a") as file:
        file.write('<img src="nope.png"><a href="guides/nope.html"></a><a href="guides/x.html#nope"></a>')
    assert site.dead_links(tmp_path) == [
        f"index.html refers to '{target}', which is not in the site"
        for target in ("nope.png", "guides/nope.html", "guides/x.html#nope")
    ]


def test_dead_links_end_a_strict_build_and_warn_otherwise(page: Any, tmp_path: Path, caplog: Any) -> None:
    config = page["config"]
    config.site_dir = str(tmp_path)
    (tmp_path / "index.html").write_text('<img src="nope.png">')
    config.strict = True
    with pytest.raises(PluginError, match=r"index\.html refers to 'nope\.png'"):
        site.on_post_build(config=config)
    config.strict = False
    site.on_post_build(config=config)
    assert "refers to 'nope.png'" in caplog.text
