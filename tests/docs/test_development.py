"""The pages about development agree with the code that they describe."""

from __future__ import annotations

import re
from pathlib import Path

import npc_ext

from ..test_rooms import FLOORS
from .pages import ROOT

PAGES = ROOT / "docs" / "development"


def picture(page: str, beginning: str) -> list[str]:
    """The lines of the fenced block that begins so."""
    found = re.search(rf"^```\n({re.escape(beginning)}.*?)^```$", (PAGES / page).read_text(), re.MULTILINE | re.DOTALL)
    assert found
    return found[1].splitlines()


def test_the_picture_of_the_floors_is_that_of_the_test() -> None:
    lines = picture("architecture.md", "__init__")
    assert [tuple(line.split("  ")[0].split(", ")) for line in lines] == list(FLOORS)


def test_every_folder_of_tests_is_described() -> None:
    described = set(re.findall(r"^\| `tests/(\w+)/`", (PAGES / "testing.md").read_text(), re.MULTILINE))
    assert described == {path.name for path in (ROOT / "tests").iterdir() if (path / "__init__.py").exists()}


def test_files_that_the_pages_name_exist() -> None:
    for page in sorted(PAGES.glob("*.md")):
        for name in re.findall(r"`((?:npc_ext|csrc|tests|bench|tools|examples)/[\w./]+)`", page.read_text()):
            assert (ROOT / name).exists() or name.endswith("/l2.py"), f"{page.name} names {name}"


def test_every_folder_of_the_checkout_is_described() -> None:
    described = re.findall(r"^\| `(\w+)/`", (PAGES / "architecture.md").read_text(), re.MULTILINE)
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages - {"tests"} <= {*described}
    assert all(Path(ROOT, name).is_dir() for name in described)


def test_the_version_is_the_same_wherever_it_stands() -> None:
    assert f'version = "{npc_ext.__version__}"' in (ROOT / "pyproject.toml").read_text().splitlines()
    assert f"\n## {npc_ext.__version__} (" in (ROOT / "CHANGELOG.md").read_text()
