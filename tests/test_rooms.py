"""A room of npc_ext uses only what stands below it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import npc_ext

FOLDER = Path(npc_ext.__file__).parent
# From the top floor down. What stands on the same floor does not use each other.
FLOORS = (
    ("__init__", "__main__"),
    ("baselines", "monitor", "avalanche", "nn"),
    ("optim",),
    ("skipping",),
    ("neurons",),
    ("distributed",),
    ("ops",),
    ("kernels",),
    ("reference", "_torch", "_warn", "_names"),
    ("columns",),
)
# Within a room, from the top down. Rooms that are not listed hold modules that do not use each other.
WITHIN = {
    "baselines": (("ssl",), ("ewc", "mas", "si"), ("anchored", "consolidation", "cpc"), ("samples",), ("batches",)),
    "optim": (
        ("wrapper",),
        ("npc", "npc_adamw"),
        ("plastic",),
        ("control",),
        ("base",),
        ("unknown_options",),
        ("plan", "options", "measured", "moments", "nonfinite", "plasticity", "succession", "known_model"),
    ),
    "skipping": (
        ("install",),
        ("certificate",),
        ("forward",),
        ("gradients",),
        ("rows", "bound", "constants", "record"),
    ),
    "neurons": (
        ("find",),
        ("graph", "table"),
        ("attention", "relu", "protection"),
        ("tap",),
        ("layer", "kinds", "stand_in"),
    ),
    "distributed": (("sinks",), ("shards",)),
    "kernels": (("checks",), ("launch",), ("native", "register"), ("just_in_time",), ("build",), ("compilers",)),
}
MODULES = sorted(path.relative_to(FOLDER).with_suffix("") for path in FOLDER.rglob("*.py"))


def imported(module: Path) -> Iterator[Path]:
    """The modules of npc_ext that a module imports, wherever in it that stands."""
    for node in ast.walk(ast.parse((FOLDER / module).with_suffix(".py").read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = (
                    [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                )
                assert not any(name.split(".")[0] == "npc_ext" for name in names), "imports within are relative"
            continue
        base = module.parent
        for _ in range(node.level - 1):
            base = base.parent
        for part in (node.module or "").split("."):
            base = base / part
        for alias in node.names:
            path = base / alias.name
            yield path if path in MODULES or (FOLDER / path).is_dir() else base


def floor(name: str, floors: tuple[tuple[str, ...], ...]) -> int:
    for height, names in enumerate(reversed(floors)):
        if name in names:
            return height
    raise AssertionError(f"{name} is not in the plan of the house")


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_module_imports_only_what_stands_below_it(module: Path) -> None:
    if module.name == "__init__":
        module = module.parent / "__init__"
    room = module.parts[0]
    for other in imported(module):
        if other == Path():
            continue  # names of the package itself, as its version
        if other.parts[0] != room:
            assert floor(other.parts[0], FLOORS) < floor(room, FLOORS), f"{module} imports {other}, which is not below"
        elif module.name != "__init__":
            within = WITHIN[room]
            assert floor(other.name, within) < floor(module.name, within), f"{module} imports {other}, its room's top"
