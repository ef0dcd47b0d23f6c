"""Code within sentences and tables of the documentation uses options that exist."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import npc_ext
from npc_ext.optim.plastic import Plastic

from .pages import PAGES, name_of

SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


def calls(text: str) -> Iterator[ast.Call]:
    """The calls in code spans; a span `layers={...}` counts as one of NPC."""
    for span in SPAN.findall(text):
        code = f"NPC(model, {span})" if span.startswith("layers=") else span
        try:
            tree = ast.parse(code)
        except SyntaxError:
            continue
        yield from (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def unknown_options(text: str) -> list[str]:
    unknown = []
    for call in calls(text):
        name = ast.unparse(call.func)
        if name not in npc_ext.__all__:
            continue
        known = inspect.signature(getattr(npc_ext, name)).parameters
        unknown += [ast.unparse(call) for keyword in call.keywords if keyword.arg not in known]
        for layers in (keyword.value for keyword in call.keywords if keyword.arg == "layers"):
            of_layers = [value for value in ast.walk(layers) if isinstance(value, ast.Dict) and value is not layers]
            keys = {ast.literal_eval(key) for options in of_layers for key in options.keys if key is not None}
            unknown += [ast.unparse(call)] * (not keys <= {*Plastic._LAYER_OPTIONS})
    return unknown


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_options_in_sentences_and_tables_exist(page: Path) -> None:
    assert not unknown_options(page.read_text())


def test_old_names_are_found() -> None:
    spans = ["`NPC(model, skip_frozen=True)`", '| `layers={"head*": {"consolidate": False}}` |', "`NPC(model, lr=0.1)`"]
    assert len(unknown_options("\n".join(spans))) == 2
