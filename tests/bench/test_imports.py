"""The programs of the benchmarks import nothing of each other. Where one needs another, it runs its command.

`pages` is the exception: it writes about the results of all.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import ROOT

PROGRAMS = {"micro", "gpu", "continual", "machine_code", "pages"}
MODULES = sorted(path.relative_to(ROOT) for path in (ROOT / "bench").rglob("*.py"))
READERS = {"pages"}


def imported(module: Path) -> Iterator[tuple[str, ...]]:
    """The full names that a module imports, wherever in it that stands, split at their dots."""
    package = module.parent.parts
    for node in ast.walk(ast.parse((ROOT / module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (tuple(name.name.split(".")) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            yield from ((*base, name.name) for name in node.names)


@pytest.mark.parametrize("module", [module for module in MODULES if module.parts[1] not in READERS], ids=str)
def test_a_program_imports_nothing_of_another(module: Path) -> None:
    for name in imported(module):
        if name[0] == "bench":
            others = PROGRAMS - {module.parts[1]}
            assert name[1] not in others, f"{module} imports {'.'.join(name)}"


def test_imports_within_functions_and_absolute_ones_are_seen() -> None:
    seen = set(imported(Path("bench/continual/__main__.py")))
    assert ("bench", "continual", "report") in seen, "imported within a function"
    assert ("bench", "command_line") in seen, "imported from the package itself"
    assert ("torch",) in seen
