"""The reference names everything public, and docstrings describe the arguments that there are."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch

import npc_ext
from npc_ext import columns, nn, ops, reference
from npc_ext.baselines import consolidation

from .pages import ROOT

FOLDER = ROOT / "docs" / "reference"
TEXT = {page.name: page.read_text() for page in sorted(FOLDER.glob("*.md"))}
# Identifiers of mkdocstrings, with the members that they show.
DIRECTIVE = re.compile(r"^::: (\S+)\n((?:    .*\n)*)", re.MULTILINE)
MEMBERS = re.compile(r"members: (?:&\w+ )?\[([^\]]*)\]")
SHOWN = {
    identifier: {name.strip() for names in MEMBERS.findall(options) for name in names.split(",")}
    for text in TEXT.values()
    for identifier, options in DIRECTIVE.findall(text)
}
# Methods that torch or other libraries call.
CALLED_BY_OTHERS = {
    *("join_hook", "join_device", "join_process_group"),  # torch.distributed.algorithms.Join
    *("before_train_dataset_adaptation", "before_training_exp", "before_training_iteration"),  # Avalanche
}
# What these have in common with another class is shown there.
_ANCHORED = "npc_ext.baselines.anchored.Anchored"
AS_IN = {
    "NPCAdamW": "npc_ext.NPC",
    "PlasticityWrapper": "npc_ext.NPC",
    **dict.fromkeys(("CPC", "EWC", "MAS", "SI", "SSL"), _ANCHORED),
}


def public(module: Any) -> list[str]:
    """The public functions and classes of a module."""
    return [
        f"{module.__name__}.{name}"
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and (value.__module__ == module.__name__ or (module is ops and hasattr(torch.ops.npc_ext, name)))
    ]


# For code in npc_ext.
INTERNAL = {f"npc_ext.ops.{name}" for name in ("native_takes", "importance_of_checked")}
INTERNAL.add("npc_ext.ops.relu_backward_importance_of_checked")
PUBLIC = [
    *(f"npc_ext.{name}" for name in npc_ext.__all__),
    *(f"npc_ext.nn.{name}" for name in nn.__all__),
    *(name for module in (ops, reference, columns) for name in public(module) if name not in INTERNAL),
    *(f"{consolidation.__name__}.{name}" for name in ("fisher", "output_sensitivity", "NonFiniteImportanceError")),
    "npc_ext.avalanche.PlasticityPlugin",
]


def found(identifier: str) -> Any:
    """What an identifier names."""
    module, _, name = identifier.rpartition(".")
    if module == "npc_ext.avalanche" and find_spec("avalanche") is None:
        pytest.skip("avalanche-lib is not installed")
    return getattr(import_module(module), name)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_in_the_reference(name: str) -> None:
    assert name in SHOWN


@pytest.mark.parametrize("identifier", SHOWN)
def test_what_the_reference_shows_is_there_and_described(identifier: str) -> None:
    shown = found(identifier)
    assert shown.__doc__
    for member in SHOWN[identifier]:
        annotated = any(member in vars(base).get("__annotations__", {}) for base in shown.__mro__)
        assert annotated or inspect.getdoc(getattr(shown, member))


def defined_here(kind: type) -> set[str]:
    """The public members of a class that npc_ext defines, not torch."""
    bases = [base for base in kind.__mro__ if base.__module__.startswith("npc_ext")]
    return {name for base in bases for name in vars(base) if not name.startswith("_")}


@pytest.mark.parametrize("identifier", [name for name in SHOWN if name.split(".")[-1] in AS_IN] + ["npc_ext.NPC"])
def test_the_methods_of_an_optimizer_are_in_the_reference(identifier: str) -> None:
    shown = SHOWN[identifier] | SHOWN.get(AS_IN.get(identifier.split(".")[-1], ""), set())
    assert defined_here(found(identifier)) - CALLED_BY_OTHERS <= shown


def described(docstring: str) -> list[str]:
    """The arguments in the section `Args:` of a docstring."""
    section = re.search(r"^Args:\n((?:    .*\n|\n)+)", inspect.cleandoc(docstring) + "\n", re.MULTILINE)
    if section is None:
        return []
    entries = re.findall(r"^    (\w[\w, ]*):\s", section[1], re.MULTILINE)
    return [name for entry in entries for name in re.split(r",\s+", entry)]


def documented() -> Iterator[Any]:
    for identifier, members in SHOWN.items():
        if not identifier.startswith(("npc_ext.avalanche.", "npc_ext.columns.")):
            yield pytest.param(found(identifier), id=identifier)
            for member in sorted(members):
                if callable(method := getattr(found(identifier), member, None)):
                    yield pytest.param(method, id=f"{identifier}.{member}")


@pytest.mark.parametrize("function", list(documented()))
def test_a_docstring_describes_the_arguments_that_there_are(function: Any) -> None:
    names = described(function.__doc__ or "")
    if names or "Raises:" in function.__doc__:
        known = [name for name in inspect.signature(function).parameters if name != "self"]
        assert sorted(names) == sorted(known)


def test_misspelled_and_missing_arguments_are_found() -> None:
    assert described(
        "Adds.\n\n    Args:\n        a, b: numbers,\n            of any size.\n        c: more.\n"
    ) == list("abc")


def test_every_environment_variable_is_described() -> None:
    sources = [*(ROOT / "npc_ext").rglob("*.py"), *(ROOT / "csrc").rglob("*.cpp")]
    reads = re.compile(r"""(?:environ\.get\(|environ\[|getenv\()["']((?:NPC_EXT|TORCH|CUDA)_\w+|CXX)["']""")
    read = {name for source in sources for name in reads.findall(source.read_text())}
    assert {"NPC_EXT_CACHE", "NPC_EXT_ISA"} < read
    described_there = set(re.findall(r"^\| `(\w+)` \|", TEXT["command-line.md"], re.MULTILINE))
    assert read <= described_there


def test_the_options_of_the_command_line_are_described() -> None:
    for option in re.findall(r'add_argument\("(--\w+)"', (ROOT / "npc_ext" / "__main__.py").read_text()):
        assert f"| `{option}` |" in TEXT["command-line.md"]
