"""Arguments of operations by the names of their columns, and what the tests of all updates have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_type_hints

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from npc_ext import ops, reference
from npc_ext.kernels.checks import SIGMAS

from ..tolerances import DTYPES, assert_average

Arguments = dict[str, Any]
SGD = ("momentum", "nesterov", "weight_decay", "maximize")


def call(operation: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Calls an operation with its arguments in groups. Fields that are not given have their defaults."""
    rest, groups = dict(arguments), {}
    for name, hint in get_type_hints(operation).items():
        if fields := [field for field in getattr(hint, "_fields", ()) if field in rest]:
            groups[name] = hint(**{field: rest.pop(field) for field in fields})
        elif name in rest:
            groups[name] = rest.pop(name)
    assert not rest, f"{', '.join(rest)} are no arguments"
    return operation(**groups)


def flat(operation: str, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """The arguments of `torch.ops.npc_ext.<operation>`."""
    schema = getattr(torch.ops.npc_ext, operation).default._schema
    values = {"first_neuron": None, "steps": [], "seeds": [], "grad_scale": None, "found_inf": None, **arguments}
    of_lists = {
        name: [torch.empty(0) if one is None else one for one in value]
        for name, value in values.items()
        if isinstance(value, list)
    }
    return tuple({**values, **of_lists}[argument.name] for argument in schema.arguments)


def copied(arguments: Arguments, double: bool = False) -> Arguments:
    def copy(value: Any) -> Any:
        if isinstance(value, list):
            return [copy(one) for one in value]
        if not isinstance(value, Tensor):
            return value
        return value.to(torch.float64, copy=True) if double and value.is_floating_point() else value.clone()

    return {name: copy(value) for name, value in arguments.items()}


def tensors(
    shapes: Iterable[tuple[int, ...]], dtype: torch.dtype = torch.float32, device: str = "cpu", last: bool = False
) -> list[Tensor]:
    """Random ones; those of four dimensions with channels last on request."""
    made = [torch.randn(shape).to(device, dtype) for shape in shapes]
    return [t.contiguous(memory_format=torch.channels_last) if last and t.ndim == 4 else t for t in made]


def sgd(
    count: int,
    lr: float | list[float] = 0.1,
    *,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> Arguments:
    """SGD's options, the same for so many parameters."""
    return {
        "lr": lr if isinstance(lr, list) else [lr] * count,
        "momentum": [momentum] * count,
        "nesterov": [nesterov] * count,
        "weight_decay": [weight_decay] * count,
        "maximize": [maximize] * count,
    }


def adam(count: int, lr: float = 0.01, weight_decay: float = 0.01, second_decay: float = 0.999) -> Arguments:
    """Adam's options, the same for so many parameters."""
    return {
        "lr": [lr] * count,
        "first_decay": [0.9] * count,
        "second_decay": [second_decay] * count,
        "epsilon": [1e-8] * count,
        "weight_decay": [weight_decay] * count,
        "maximize": [False] * count,
    }


def plasticity(
    layers: int,
    alpha: float = 0.5,
    beta: float = 0.5,
    delta: float = 0.99,
    sigma: str = "sigmoid",
    active: bool = False,
) -> Arguments:
    """Constants, the same for so many layers."""
    return {
        "alpha": [alpha] * layers,
        "beta": [beta] * layers,
        "delta": [delta] * layers,
        "sigma": [sigma] * layers,
        "active_only": [active] * layers,
    }


def no_nonfinite_steps(layers: int, device: str = "cpu") -> Tensor:
    return torch.zeros(layers, dtype=torch.int64, device=device)


def placement(count: int, layer: int = 0) -> Arguments:
    """Parameters that belong to one layer, with neurons in their first dimension, or (-1) to none."""
    return {"layer": [layer] * count, "neuron_dim": [0] * count, "groups": [1] * count}


def no_layers(count: int, device: str = "cpu") -> Arguments:
    """What says of so many parameters that they are in no layer."""
    nothing = {"importances": [], "measured": [], "nonfinite_steps": no_nonfinite_steps(0, device)}
    return {**nothing, **placement(count, -1), **plasticity(0)}


def one_layer(
    importance: Tensor, parameters: list[Tensor], gradients: list[Tensor], measured: Tensor | None = None
) -> Arguments:
    """A layer, its parameters and the paper's constants; options are missing."""
    return {
        "parameters": parameters,
        "gradients": gradients,
        "importances": [importance],
        "measured": [measured],
        "nonfinite_steps": no_nonfinite_steps(1, str(importance.device)),
        **placement(len(parameters)),
        **plasticity(1),
    }


def exact(arguments: Arguments) -> Arguments:
    """The same in float64."""
    return copied(arguments, double=True)


def at_offset(tensor: Tensor, offset: int) -> Tensor:
    """A copy that begins so many elements after the start of its memory."""
    gap = torch.zeros(offset, dtype=tensor.dtype, device=tensor.device)
    return torch.cat([gap, tensor.flatten()])[offset:].view(tensor.shape)


def any_options(draw: Any) -> Arguments:
    """Options that all tests of updates with momentum draw."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    momentum = draw(st.sampled_from([0.0, 0.9]))
    return {
        "dtype": draw(st.sampled_from(DTYPES)),
        "momentum": momentum,
        "nesterov": momentum > 0 and draw(st.booleans()),
        "weight_decay": draw(st.sampled_from([0.0, 0.1])),
        "maximize": draw(st.booleans()),
        "grad_scale": draw(st.sampled_from([None, 2.0**16, 0.3])),
    }


def any_plasticity(draw: Any) -> Arguments:
    return {"sigma": draw(st.sampled_from(SIGMAS)), "active_only": draw(st.booleans())}


def check_changes_nothing(operation: Callable[..., Any], arguments: Arguments, written: Iterable[str]) -> None:
    """That a call changes none of these arguments."""
    before = copied(arguments)
    call(operation, arguments)
    assert_equal(arguments, before, written)


def check_is_refused(operation: Callable[..., Any], arguments: Arguments, message: str, written: Iterable[str]) -> None:
    """That a call raises ValueError and changes none of these arguments."""
    before = copied(arguments)
    with pytest.raises(ValueError, match=message):
        call(operation, arguments)
    assert_equal(arguments, before, written)


def assert_equal(got: Arguments, want: Arguments, names: Iterable[str]) -> None:
    for name in names:
        for one, other in zip(got[name], want[name], strict=True):
            assert one is other is None or torch.equal(one, other), name


def with_threads(count: int, function: Callable[[], Any]) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return function()
    finally:
        torch.set_num_threads(before)


def check_averages_and_start_again(
    operation: str, arguments: Arguments, first_moments: str
) -> tuple[Arguments, Arguments]:
    """Takes a step, checks importance against float64, and takes the step in float64 from the importance it came to.

    Weights and moments are compared from there, since eq. 7 is not continuous where neurons freeze. Those without a
    gradient among the active take no part, which the second step does not know of.

    Returns:
        The arguments as they were, and those in float64 after the second step.
    """
    before, want = copied(arguments), exact(arguments)
    call(getattr(ops, operation), arguments)
    call(getattr(reference, operation), want)
    for got, average in zip(arguments["importances"], want["importances"], strict=True):
        assert_average(got, average, got.numel())
    again = exact(before)
    again["importances"] = [average.double() for average in arguments["importances"]]
    again["measured"] = [None] * len(again["importances"])
    exceptions = expected_exceptions(before, arguments["importances"])
    for index, (cleared, _) in exceptions.items():
        again[first_moments][index][cleared] = 0
    call(getattr(reference, operation), again)
    for index, (_, inactive) in exceptions.items():
        for name in ("parameters", "momentum_buffers", "first_moments", "second_moments"):
            if before.get(name):
                assert torch.equal(arguments[name][index][inactive], before[name][index][inactive])
                again[name][index][inactive] = before[name][index][inactive].double()
    return before, again


def expected_exceptions(before: Arguments, averages: list[Tensor]) -> dict[int, tuple[Tensor, Tensor]]:
    """By parameter, which elements lose their first moment in a step to these averages, and which take no part in it."""
    exceptions = {}
    for index, layer in enumerate(before["layer"]):
        if layer < 0:
            continue
        constants = [before[name][layer] for name in ("alpha", "beta", "sigma")]
        free_before, free = (
            reference.plasticity(average, *constants) != 0
            for average in (before["importances"][layer], averages[layer])
        )
        inactive = torch.zeros_like(free)
        if before["active_only"][layer] and before["measured"][layer] is not None:
            inactive = reference.received_no_gradient(before["measured"][layer])
        parameter, dim, groups = (before[name][index] for name in ("parameters", "neuron_dim", "groups"))
        first = (before.get("first_neuron") or [0] * (index + 1))[index]
        rows = slice(first, first + parameter.shape[dim] * groups)
        exceptions[index] = tuple(
            reference.per_element(one[rows], parameter, dim, groups).expand_as(parameter)
            for one in (free_before & ~free & ~inactive, inactive)
        )
    return exceptions  # type: ignore[return-value]
