"""Messages in the manual are those of the package, and every warning and every RuntimeError is on the page of errors."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from .pages import ROOT

PAGE = (ROOT / "docs" / "reference" / "errors.md").read_text()
QUOTES = re.findall(r"\*\*`([^`]+)`\*\*", PAGE)
# Messages in the first column of the guides' tables "What goes wrong"; those of other libraries say from whom they are.
WENT_WRONG = re.compile(r"^## What goes wrong\n\n\| (?:message|what you see) .*\n\|[-|]*\n((?:\|.*\n)+)", re.MULTILINE)
IN_GUIDES = {
    guide.stem: re.findall(r"^\|(?: warning)? `([^`]+)` \|", table, re.MULTILINE)
    for guide in sorted((ROOT / "docs" / "guides").glob("*.md"))
    for table in WENT_WRONG.findall(guide.read_text())
}
SOURCES = sorted((ROOT / "npc_ext").rglob("*.py"))
# In texts, what is inserted.
FIELD = "..."


def text(node: ast.expr) -> str:
    """The text of an expression, with a mark for what is not constant."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text, node.values))
    if isinstance(node, ast.BinOp):
        return text(node.left) + text(node.right)
    return FIELD


class Site(NamedTuple):
    """A place in the source that gives a message."""

    where: str
    kind: str  # the class of the exception, or the function that warns
    message: str


def sites() -> Iterator[Site]:
    for source in SOURCES:
        tree = ast.parse(source.read_text())
        for node in ast.walk(tree):
            call = node.exc if isinstance(node, ast.Raise) else node
            if isinstance(call, ast.Call) and call.args:
                kind = ast.unparse(call.func).rpartition(".")[2]
                if isinstance(node, ast.Raise) or kind in ("warn", "warn_once"):
                    message = call.args[2] if kind == "warn_once" else call.args[0]
                    yield Site(f"{source.relative_to(ROOT)}:{node.lineno}", kind, text(message))


def texts() -> Iterator[str]:
    """All texts in the source, except for docstrings."""
    for source in SOURCES:
        nodes = [*ast.walk(ast.parse(source.read_text()))]
        docstrings = {node.value for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp) and node not in docstrings:
                yield text(node)


SITES = list(sites())
TEXTS = [*dict.fromkeys(texts())]
# Where a warning has no text of its own. Quotes are compared with all texts of the source.
WITHOUT_TEXT = {
    *("npc_ext/_warn.py", "npc_ext/avalanche.py", "npc_ext/monitor.py"),
    *("npc_ext/optim/base.py", "npc_ext/optim/measured.py"),
}


def of_message(quote: str) -> re.Pattern[str]:
    """A pattern for a quote. What a quote leaves out is a field of the message, or anything between two of its parts."""
    return re.compile(".*".join(map(re.escape, quote.split(FIELD))), re.DOTALL)


@pytest.mark.parametrize("quote", [*QUOTES, *(quote for quotes in IN_GUIDES.values() for quote in quotes)])
def test_a_quoted_message_is_one_of_the_package(quote: str) -> None:
    assert any(of_message(quote).search(known) for known in TEXTS)


def test_the_tables_of_guides_are_found() -> None:
    assert {"ddp", "fsdp2", "hugging-face", "avalanche", "lora"} <= {*IN_GUIDES} and all(IN_GUIDES.values())


def is_on_page(message: str) -> bool:
    return any(of_message(quote).search(message) for quote in QUOTES)


WARNINGS = [site for site in SITES if site.kind in ("warn", "warn_once")]
# Too many to list are those of arguments of the wrong type or range, of `npc_ext.ops`, and of builds.
LISTED = [site for site in SITES if site.kind in ("RuntimeError", "NonFiniteImportanceError", "NativeUnavailableError")]


@pytest.mark.parametrize("site", [*WARNINGS, *LISTED], ids=lambda site: f"{site.kind}-{site.where}")
def test_a_message_is_on_the_page(site: Site) -> None:
    if not re.sub(r"[\W_]", "", site.message):  # nothing but fields
        assert site.where.partition(":")[0] in WITHOUT_TEXT
    else:
        assert is_on_page(site.message)


def test_all_kinds_of_warnings_are_found() -> None:
    assert len(WARNINGS) > 12
    assert all(
        f"· {kind}" in PAGE for kind in ("ImportanceWarning", "CapacityWarning", "UserWarning", "RuntimeWarning")
    )


def test_a_message_that_is_not_on_the_page_is_found() -> None:
    assert not is_on_page("the moon is in the wrong phase")


def test_every_group_is_in_the_list_at_the_top() -> None:
    groups = re.findall(r"^## (.*)$", PAGE, re.MULTILINE)
    linked = re.findall(r"\]\(#([\w-]+)\)", PAGE)
    assert [re.sub(r"[^\w ]", "", group).lower().replace(" ", "-") for group in groups] == linked
