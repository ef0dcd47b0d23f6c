"""Operations of torch, made of Python functions by their annotations.

Arguments of the functions are tensors, numbers, lists of them, and named tuples of these (`npc_ext.columns`). A schema
knows no named tuples and no lists in which tensors may be missing. So it has the fields of named tuples in their place,
and an empty tensor where a list has None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from inspect import Parameter, signature
from itertools import islice
from string import ascii_lowercase
from typing import Annotated, Any, NamedTuple, ParamSpec, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from ..columns import WRITTEN, MaybeTensors

P = ParamSpec("P")
_LIBRARY = torch.library.Library("npc_ext", "DEF")
_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Sequence[Tensor]: "Tensor[]",
    MaybeTensors: "Tensor[]",
    int: "int",
    float: "float",
    bool: "bool",
    str: "str",
    Sequence[int]: "int[]",
    Sequence[int] | None: "int[]?",
    Sequence[float]: "float[]",
    Sequence[bool]: "bool[]",
    Sequence[str]: "str[]",
    tuple[Tensor, Tensor]: "(Tensor, Tensor)",
    type(None): "()",
}
_NO_DEFAULT = Parameter.empty


class _Field(NamedTuple):
    """An argument in a schema."""

    name: str
    type: str
    written: bool
    has_none: bool  # it is a list in which tensors may be missing
    default: Any

    @classmethod
    def of(cls, name: str, hint: Any, default: Any) -> _Field:
        marks: Sequence[Any] = ()
        if get_origin(hint) is Annotated:
            hint, *marks = get_args(hint)
        return cls(name, _TYPES[hint], WRITTEN in marks, hint == MaybeTensors, default)


class Operation:
    """Defines `torch.ops.npc_ext.<name>` of a function's name and arguments.

    Args:
        function: its annotations define the schema. The operation changes tensors that are annotated as `Written`.
        kernel: does the work; takes the arguments of the function by name.
        fake: makes results without values; takes the same arguments.
    """

    def __init__(self, function: Callable[..., Any], kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
        hints, parameters = get_type_hints(function, include_extras=True), signature(function).parameters
        self._defaults = {name: parameter.default for name, parameter in parameters.items()}
        self._groups: dict[str, Any] = {}  # of each argument its named tuple, or None
        self._fields: list[_Field] = []
        for name, default in self._defaults.items():
            group = hints[name] if hasattr(hints[name], "_fields") else None
            self._groups[name] = group
            if group is None:
                self._fields.append(_Field.of(name, hints[name], default))
                continue
            defaults = {} if default is _NO_DEFAULT else default._asdict()
            for field, hint in get_type_hints(group, include_extras=True).items():
                self._fields.append(_Field.of(field, hint, defaults.get(field, _NO_DEFAULT)))
        self._name = name = function.__name__
        _LIBRARY.define(f"{name}{self._schema(_TYPES[hints['return']])}")
        _LIBRARY.impl(name, lambda *flat: kernel(**self._grouped(flat)), "CompositeExplicitAutograd")
        torch.library.register_fake(f"npc_ext::{name}", lambda *flat: fake(**self._grouped(flat)), lib=_LIBRARY)
        self._overload = getattr(torch.ops.npc_ext, name).default

    def _schema(self, returns: str) -> str:
        """Arguments at the end have their defaults, as far as schemas can state them."""
        arguments: list[str] = []
        aliases, has_default = iter(ascii_lowercase), True
        for field in reversed(self._fields):
            type_ = field.type
            if field.written:
                type_ = type_.replace("Tensor", f"Tensor({next(aliases)}!)")
            has_default &= field.default is not _NO_DEFAULT and not type_.endswith("[]")
            default = f'"{field.default}"' if isinstance(field.default, str) else field.default
            arguments.append(f"{type_} {field.name}" + (f"={default}" if has_default else ""))
        return f"({', '.join(reversed(arguments))}) -> {returns}"

    def by_name(self, arguments: Sequence[Any], options: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call, by name. Raises TypeError as a call of the function would."""
        given = dict(zip(self._defaults, arguments, strict=False))
        if len(arguments) > len(given):
            raise TypeError(f"{self._name}() takes {len(self._defaults)} arguments, but {len(arguments)} were given")
        for name in options:
            if name in given or name not in self._defaults:
                what = "several values for the" if name in given else "an unexpected"
                raise TypeError(f"{self._name}() got {what} argument {name!r}")
        given = {**self._defaults, **given, **options}
        if missing := [name for name, value in given.items() if value is _NO_DEFAULT]:
            raise TypeError(f"{self._name}() is missing the arguments {', '.join(missing)}")
        for name, group in self._groups.items():
            if group is not None and not isinstance(given[name], group):
                raise TypeError(
                    f"{self._name}(): {name} is {type(given[name]).__name__}; expected npc_ext.columns.{group.__name__}"
                )
        return given

    def call(self, given: dict[str, Any]) -> Any:
        """Calls the operation with the function's arguments, by name."""
        values: list[Any] = []
        for name, group in self._groups.items():
            if group is None:
                values.append(given[name])
            else:
                values.extend(given[name])
        for at, field in enumerate(self._fields):
            if field.has_none:
                values[at] = _without_none(values[at])
        return self._overload(*values)

    def _grouped(self, flat: Sequence[Any]) -> dict[str, Any]:
        """The function's arguments from the schema's. PyTorch leaves out values at the end that are defaults."""
        values = [*flat, *(field.default for field in self._fields[len(flat) :])]
        for at, field in enumerate(self._fields):
            if field.has_none:
                values[at] = [tensor if tensor.numel() else None for tensor in values[at]]
        rest = iter(values)
        return {
            name: next(rest) if group is None else group(*islice(rest, len(group._fields)))
            for name, group in self._groups.items()
        }


def _without_none(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    device = next((tensor.device for tensor in tensors if tensor is not None), torch.device("cpu"))
    # A new tensor for each: the operation may write them, and inputs must not alias.
    return [torch.empty(0, dtype=torch.float32, device=device) if tensor is None else tensor for tensor in tensors]


def in_place(
    function: Callable[P, None], check: Callable[[dict[str, Any]], None], kernel: Callable[..., None]
) -> Callable[P, None]:
    """An operation that does in place what a function does, and checks its arguments first.

    Args:
        function: the specification; `Operation` defines the operation from it.
        check: raises ValueError if its arguments, by name, do not fit.
        kernel: as in `Operation`.
    """
    operation = Operation(function, kernel, lambda **given: None)

    @wraps(function)
    @torch.no_grad()
    def checked(*arguments: P.args, **options: P.kwargs) -> None:
        given = operation.by_name(arguments, options)
        check(given)
        operation.call(given)

    return checked
