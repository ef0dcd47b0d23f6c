"""`help(npc_ext)` begins with a page that names everything public, and `dir(npc_ext)` shows nothing else."""

from __future__ import annotations

import inspect
import pydoc
import re

import pytest

import npc_ext

MODULES = {"baselines", "nn", "ops", "reference"}
ENTRY = re.compile(r"^    (\w+)  +\S", re.MULTILINE)


def test_the_page_has_a_line_for_each_public_name_and_for_no_other() -> None:
    named = ENTRY.findall(inspect.getdoc(npc_ext) or "")
    assert sorted(named) == sorted({*npc_ext.__all__, *MODULES})


def test_help_begins_with_the_page() -> None:
    text = pydoc.plain(pydoc.render_doc(npc_ext)).splitlines()
    page = (npc_ext.__doc__ or "").splitlines()
    assert page[0] in text[3]
    assert text.index(f"    {page[-1]}") < 60
    assert len(page) < 45


def test_dir_has_public_names_only() -> None:
    names = dir(npc_ext)
    assert len(names) == len(set(names))
    assert {name for name in names if not name.startswith("__")} == {*npc_ext.__all__, *MODULES}
    assert all(hasattr(npc_ext, name) for name in names)


@pytest.mark.parametrize("name", ["NPC", "NPCAdamW", "PlasticityWrapper", "CPC", "EWC", "MAS", "SI", "SSL"])
def test_a_constructor_does_not_show_the_docstring_of_a_base_class(name: str) -> None:
    assert inspect.getdoc(getattr(npc_ext, name).__init__) == object.__init__.__doc__
