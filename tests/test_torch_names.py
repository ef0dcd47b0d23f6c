"""All private names of PyTorch are in npc_ext/_torch.py, where support for another torch is added."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import npc_ext

FOLDER = Path(npc_ext.__file__).parent
FILES = {path.relative_to(FOLDER).as_posix(): ast.parse(path.read_text()) for path in sorted(FOLDER.rglob("*.py"))}
# Names that torch looks for on our objects, so our classes must define them.
LOOKED_FOR = {"_step_supports_amp_scaling"}
# The documented names of named tuples, which begin with an underscore so that no field has the same name.
OF_NAMED_TUPLES = {"_asdict", "_fields", "_replace"}


def is_private(name: str) -> bool:
    return re.fullmatch(r"_[A-Za-z]\w*", name) is not None and not name.endswith("__")


def names_of_torch() -> set[str]:
    """Private attributes of the objects of torch that this package handles."""
    module, convolution = nn.Linear(1, 1), nn.Conv2d(1, 1, 1)
    optimizer = torch.optim.SGD(module.parameters(), fused=True)
    stateful = [module, convolution, optimizer, torch.zeros(()), torch.Generator()]
    classes = [Tensor, nn.Parameter, torch.autograd.Function, torch.autograd.graph.Node, torch.fx.Tracer, torch.fx.Node]
    return {name for thing in [*stateful, *classes] for name in dir(thing) if is_private(name)}


def defined_in(tree: ast.AST) -> Iterator[str]:
    """The names that a file defines: functions, classes, variables, attributes, fields."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            yield node.attr


def is_self(node: ast.AST) -> bool:
    is_super = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"
    return is_super or (isinstance(node, ast.Name) and node.id in ("self", "cls", "copy"))


def root_of(node: ast.AST) -> str:
    while isinstance(node, (ast.Attribute, ast.Call, ast.Subscript)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def private_names(tree: ast.AST, ours: set[str], torchs: set[str]) -> list[str]:
    """The private names in a file that are not ours."""
    found, from_torch = [], {"torch"}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            of = node.module or "" if isinstance(node, ast.ImportFrom) and node.level == 0 else ""
            for alias in node.names:
                path = f"{of}.{alias.name}".strip(".")
                if path.split(".")[0] == "torch" and not (isinstance(node, ast.ImportFrom) and node.level):
                    from_torch.add((alias.asname or alias.name).split(".")[0])
                    if any(map(is_private, path.split("."))):
                        found.append(f"{node.lineno}: import of {path}")
    keys = {id(key) for node in ast.walk(tree) if isinstance(node, ast.Dict) for key in node.keys}  # of __getstate__
    for node in ast.walk(tree):
        if id(node) in keys:
            continue
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            mine = node.attr in ours and (node.attr not in torchs or is_self(node.value))
            if not mine or root_of(node) in from_torch:
                found.append(f"{node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in torchs:
            found.append(f"{node.lineno}: {node.value!r}")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            name = node.args[1] if node.func.id in ("getattr", "hasattr", "setattr") else None
            if isinstance(name, ast.Constant) and is_private(str(name.value)) and name.value not in ours | torchs:
                found.append(f"{node.lineno}: {name.value!r}")
        elif isinstance(node, ast.ClassDef):
            assigned = [part for part in node.body if isinstance(part, (ast.Assign, ast.AnnAssign))]
            inside = {getattr(part, "name", "") for part in node.body} | {
                n for part in assigned for n in defined_in(part)
            }
            found += [f"{node.lineno}: {node.name}.{name}" for name in inside & torchs - LOOKED_FOR if node.bases]
    return found


def test_private_names_of_torch_are_in_one_file() -> None:
    torchs = names_of_torch()
    ours = {name for tree in FILES.values() for name in defined_in(tree) if is_private(name)} | OF_NAMED_TUPLES
    found = [
        f"npc_ext/{name}:{place}"
        for name, tree in FILES.items()
        if name != "_torch.py"
        for place in private_names(tree, ours, torchs)
    ]
    assert not found, "these belong in npc_ext/_torch.py:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "torch._C._current_graph_task_id()",
        "from torch.utils import _pytree",
        "from torch.utils import _pytree as pytree",
        "from torch._dynamo import disable",
        "import torch._dynamo",
        "from torch.nn.modules import module as hooks\nhooks._has_any_global_hook()",
        "from torch import nn\nnn.Linear(1, 1)._call_impl()",
        "layer.weight._version",
        "module._forward_hooks.clear()",
        "module.__dict__['_forward_hooks']",
        "getattr(model, '_orig_mod', None)",
        "model._fsdp_wrapped_module",
        "getattr(model, '_fsdp_wrapped_module')",
    ],
)
def test_a_private_name_is_found(line: str) -> None:
    assert private_names(ast.parse(line), {"_version", "_step"}, names_of_torch())


@pytest.mark.parametrize(
    "line", ["self._step()", "super()._step()", "layer._step", "from . import _torch", "x.__dict__", "{'_step': 1}"]
)
def test_our_names_are_no_private_names_of_torch(line: str) -> None:
    assert not private_names(ast.parse(line), {"_step"}, names_of_torch())
