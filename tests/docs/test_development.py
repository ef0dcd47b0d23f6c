"""The pages about development agree with the code that they describe."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import npc_ext

from ..test_rooms import FLOORS
from .pages import PAGES, ROOT, name_of

DEVELOPMENT = ROOT / "docs" / "development"


def picture(page: str, beginning: str) -> list[str]:
    """The lines of the fenced block that begins so."""
    found = re.search(
        rf"^```\n({re.escape(beginning)}.*?)^```$", (DEVELOPMENT / page).read_text(), re.MULTILINE | re.DOTALL
    )
    assert found
    return found[1].splitlines()


def test_the_picture_of_the_floors_is_that_of_the_test() -> None:
    lines = picture("architecture.md", "__init__")
    assert [tuple(line.split("  ")[0].split(", ")) for line in lines] == list(FLOORS)


def test_every_folder_of_tests_is_described() -> None:
    described = set(re.findall(r"^\| `tests/(\w+)/`", (DEVELOPMENT / "testing.md").read_text(), re.MULTILINE))
    assert described == {path.name for path in (ROOT / "tests").iterdir() if (path / "__init__.py").exists()}


# The page shows how to add it.
NOT_YET = "npc_ext/baselines/l2.py"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(r"`((?:npc_ext|csrc|tests|bench|tools|examples|docs)/[\w./-]+)`", page.read_text())
    assert not [name for name in named if not (ROOT / name).exists() and name != NOT_YET]


def test_every_folder_of_the_checkout_is_described() -> None:
    described = re.findall(r"^\| `(\w+)/`", (DEVELOPMENT / "architecture.md").read_text(), re.MULTILINE)
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages - {"tests"} <= {*described}
    assert all(Path(ROOT, name).is_dir() for name in described)


def test_the_version_is_the_same_wherever_it_stands() -> None:
    assert f'version = "{npc_ext.__version__}"' in (ROOT / "pyproject.toml").read_text().splitlines()
    assert f"\n## {npc_ext.__version__} (" in (ROOT / "CHANGELOG.md").read_text()
