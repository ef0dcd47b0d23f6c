"""An extension of griffe, which reads the docstrings of the reference: see `plugins` in mkdocs.yml.

Operations of `npc_ext.ops` that a decorator makes from functions of `npc_ext.reference` get these functions' signatures
and docstrings. Named tuples of `npc_ext.columns` get constructors. What a docstring names becomes a link: code spans
with names of the package, pages, as in `docs/limits.md`, and headings of pages, as in
`docs/limits.md, "Skipped gradients"`. A page or heading that does not exist is an error.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import griffe
import markdown
from mkdocs.exceptions import PluginError

ROOT = Path(__file__).resolve().parents[1]

# A span is followed by one character that is no backtick, or by the end.
_SPAN = re.compile(r"(?<!`)`((?:\w+\.)*\w+)(\(\))?`(?!`)")
# A page, and where one is named, a heading.
_PAGE = re.compile(r"(docs/[\w/-]+\.md)(?:,\s+\"([^\"]+)\")?")
# Griffe knows the section by its plural.
_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
_MADE_BY = {"_in_place", "in_place"}


class Docstrings(griffe.Extension):
    """Completes what griffe reads from the source."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Called when the whole package was read."""
        _make_operations(pkg["ops"], pkg["reference"])
        _make_constructors(pkg["columns"])
        _link(pkg, pkg)


def _make_operations(ops: griffe.Module, reference: griffe.Module) -> None:
    """Puts functions in the place of `name = _in_place(reference.name)`."""
    for name, attribute in [*ops.members.items()]:
        value = attribute.value if isinstance(attribute, griffe.Attribute) else None
        if isinstance(value, griffe.ExprCall) and str(value.function) in _MADE_BY:
            function = copy.copy(reference[str(value.arguments[0]).removeprefix("reference.")])
            docstring = function.docstring
            function.parent = ops
            function.docstring = griffe.Docstring(docstring.value, lineno=docstring.lineno, parent=function)
            ops.members[name] = function


def _make_constructors(columns: griffe.Module) -> None:
    """Named tuples get the constructor that Python makes of their fields."""
    for group in columns.classes.values():
        if "NamedTuple" not in map(str, group.bases):
            continue
        fields = [field for field in group.attributes.values() if field.annotation is not None]
        kind = griffe.ParameterKind("positional or keyword")
        parameters = [griffe.Parameter("self", kind=kind)]
        for field in fields:
            parameters.append(griffe.Parameter(field.name, annotation=field.annotation, kind=kind, default=field.value))
        constructor = griffe.Function("__init__", parameters=griffe.Parameters(*parameters), parent=group)
        group.members["__init__"] = constructor


def _link(pkg: griffe.Module, owner: griffe.Object | griffe.Alias) -> None:
    """Links the code spans in the docstrings of a module or class, and of what is in it."""
    if owner.docstring is not None:
        text = _EXAMPLE.sub("Examples:", owner.docstring.value)
        text = _PAGE.sub(_linked_page, text)
        owner.docstring.value = _SPAN.sub(lambda span: _linked(span, pkg, owner), text)
    for member in owner.members.values():
        if not member.is_alias:
            _link(pkg, member)


def _linked_page(named: re.Match[str]) -> str:
    """A link to a page or its heading. It is relative to docs/reference, whose pages show the docstrings."""
    page, heading = ROOT / named[1], named[2] and " ".join(named[2].split())
    if not page.is_file():
        raise PluginError(f"a docstring names {named[1]}, which does not exist")
    target = f"../{page.relative_to(ROOT / 'docs').with_suffix('.html')}"
    if heading is not None:
        anchors = _anchors(page.read_text(encoding="utf-8"))
        if heading not in anchors:
            raise PluginError(f'a docstring names {named[1]}, "{heading}", but the page has no such heading')
        target += f"#{anchors[heading]}"
    return f'<a href="{target}">{named[0]}</a>'


def _anchors(text: str) -> dict[str, str]:
    """The anchors of a page's headings, as MkDocs makes them."""
    reader: Any = markdown.Markdown(extensions=["attr_list", "fenced_code", "md_in_html", "toc"])
    reader.convert(text)
    anchors, tokens = {}, [*reader.toc_tokens]
    while tokens:
        token = tokens.pop()
        anchors[token["name"]] = token["id"]
        tokens += token["children"]
    return anchors


def _linked(span: re.Match[str], pkg: griffe.Module, owner: griffe.Object | griffe.Alias) -> str:
    """A link to what a span names: in the package, in the class or module that the docstring is in, or nowhere."""
    name, call = span[1], span[2] or ""
    place = _place(name.removeprefix(f"{pkg.name}."), pkg)
    scope: Any = owner
    while place is None and scope is not None:
        place, scope = _place(name, scope) if scope.is_class or scope.is_module else None, scope.parent
    if place is None or place == owner.path:
        return span[0]
    return f'<autoref optional identifier="{place}"><code>{name}{call}</code></autoref>'


def _place(name: str, scope: griffe.Object | griffe.Alias) -> str | None:
    """The path of a name in a scope; that of a class's inherited member in the class."""
    first, _, rest = name.partition(".")
    members = scope.all_members if scope.is_class else scope.members
    if first not in members or first.startswith("_"):
        return None
    if not rest:
        return f"{scope.path}.{first}"
    try:
        inner = _place(rest, members[first])
    except griffe.AliasResolutionError:  # something of another package
        return None
    return None if inner is None else f"{scope.path}.{name}"
