"""Logs, warnings and plots of plasticity."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from npc_ext import CPC, EWC, NPC, CapacityWarning, NPCAdamW, check_capacity, log_plasticity, plot_plasticity

from .methods import wrapped_adamw
from .training import set_importance

pytestmark = pytest.mark.filterwarnings("error::npc_ext.CapacityWarning")


def trained(importance: float = 0.3) -> tuple[nn.Module, NPC]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 4))
    optimizer = NPC(model)
    set_importance(optimizer, "0", importance)
    return model, optimizer


def test_tensorboard_gets_scalars_and_histograms_of_every_layer(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, optimizer = trained(0.45)
    set_importance(optimizer, "0", 2.0, neurons=slice(5))
    with tensorboard.SummaryWriter(tmp_path) as writer:
        log_plasticity(writer, optimizer, 7)
    events: Any = EventAccumulator(str(tmp_path)).Reload()
    scalars = {tag: events.Scalars(tag)[0] for tag in events.Tags()["scalars"]}
    kinds = "frozen", "gradients_skipped", "nonfinite_steps", "importance", "learning_rate"
    assert set(scalars) == {f"plasticity/{layer}/{kind}" for layer in "02" for kind in kinds}
    assert all(hasattr(optimizer.plasticity()["0"], kind) for kind in kinds)  # the same words
    layer = optimizer.plasticity()["0"]
    means = {"importance": layer.importance.mean().item(), "learning_rate": layer.learning_rate.mean().item()}
    assert scalars["plasticity/0/frozen"].step == 7
    for kind, expected in {"frozen": 0.25, "gradients_skipped": 0.0, "nonfinite_steps": 0, **means}.items():
        assert scalars[f"plasticity/0/{kind}"].value == pytest.approx(expected)
    histogram = events.Histograms("plasticity/0/importance of neurons")[0].histogram_value
    assert histogram.num == 20 and histogram.max == 2.0
    assert len(events.Tags()["histograms"]) == 4


class Names:
    """Keeps the names of what is written."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.names.add(name)

    def add_histogram(self, name: str, values: torch.Tensor, step: int) -> None:
        self.names.add(name)


def test_layers_that_are_not_trained_are_not_logged() -> None:
    model, optimizer = trained()
    for parameters, expected in ((None, {"0", "2"}), (model[0], {"2"}), (model[2], {"0", "2"})):
        if parameters is not None:
            parameters.requires_grad_(False)
        writer = Names()
        log_plasticity(writer, optimizer, 0)
        assert {name.split("/")[1] for name in writer.names} == expected


@pytest.mark.parametrize("frozen", [10, 12])
def test_a_layer_is_warned_of_while_there_is_room_left(frozen: int) -> None:
    _, optimizer = trained()
    set_importance(optimizer, "0", 1.0, neurons=slice(frozen))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert check_capacity(optimizer) == (["0"] if frozen == 12 else [])
        assert check_capacity(optimizer, full=0.95) == []
    assert [warning.category for warning in caught] == ([CapacityWarning] if frozen == 12 else [])
    message = "layer '0' has little room to learn another task: 60% of its neurons are frozen. Raise beta"
    assert all(str(warning.message).startswith(message) for warning in caught)


def test_one_warning_names_all_full_layers_the_fullest_first() -> None:
    sizes = [6, *[20] * 11, 4]
    model = nn.Sequential(*(nn.Linear(size, after) for size, after in pairwise(sizes)))
    optimizer = NPC(model, layers={"3": {"beta": 0.75}})
    for name, frozen in {"1": 11, "3": 15, "9": 12}.items():
        set_importance(optimizer, name, 1.0, neurons=slice(frozen))
    message = advice(optimizer)
    assert message.startswith(
        "3 layers have little room to learn another task; frozen neurons: '3' 75%, '9' 60%, '1' 55%. "
        "Raise beta (it is 0.5 to 0.75), "
    )
    assert check_quietly(optimizer) == ["1", "3", "9"]
    for index in range(11):
        set_importance(optimizer, str(index), 1.0)
    message = advice(optimizer)
    assert message.startswith("11 layers have") and "'6' 100%, '7' 100% and 3 more. Raise" in message


def check_quietly(optimizer: Any) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return check_capacity(optimizer)


def advice(optimizer: Any, **learning: list[int]) -> str:
    with pytest.warns(CapacityWarning) as caught:
        check_capacity(optimizer, learning=learning)
    assert len(caught) == 1
    return str(caught[0].message)


def test_what_is_advised_is_not_done_already() -> None:
    model, optimizer = trained()
    set_importance(optimizer, "0", 1.0, neurons=slice(12))
    assert "Raise beta (it is 0.5), " in advice(optimizer) and "Train with momentum=0.9" in advice(optimizer)
    for group in optimizer.param_groups:
        group["momentum"], group["beta"] = 0.5, 0.25
    assert "Raise beta (it is 0.25), " in advice(optimizer) and "momentum" not in advice(optimizer)
    adam = NPCAdamW(model)
    set_importance(adam, "0", 1.0, neurons=slice(12))
    assert "momentum" not in advice(adam)
    active = NPC(model, layers={"2": {"normalize": "active"}})
    set_importance(active, "2", 2.0, neurons=slice(1, 2))
    message = advice(active, **{"2": [1]})
    assert "normalize" not in message.lower() and "give each task a separate head" in message


def test_outputs_of_old_tasks_may_be_frozen() -> None:
    _, optimizer = trained()
    set_importance(optimizer, "2", torch.tensor([2.0, 2.0, 2.0, 0.0]))
    assert check_capacity(optimizer, learning={"2": [3]}) == []
    assert "layer '2' has little room to learn another task: 75% of its" in advice(optimizer)


def test_outputs_that_are_frozen_before_they_are_learned_are_warned_of() -> None:
    model, _ = trained()
    wrapped = wrapped_adamw(model)
    set_importance(wrapped, "2", torch.tensor([2.0, 2.0, 0.0, 2.0]))
    assert check_capacity(wrapped, learning={"2": [2]}) == []
    message = (
        r"layer '2' has neurons that are frozen before they were learned: 1, 3\. From the first task on, normalize"
    )
    with pytest.warns(CapacityWarning, match=message):
        assert check_capacity(wrapped, learning={"2": range(1, 4)}) == ["2"]
    with pytest.warns(CapacityWarning, match="before they were learned: 1, 3"):
        check_capacity(wrapped, learning={"2": torch.tensor([1, 2, 3])})


def test_a_learning_rate_of_zero_is_no_lack_of_capacity() -> None:
    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 4))
    assert [layer.frozen for layer in CPC(model, lr=0.0).plasticity().values()] == [0.0, 0.0]
    for optimizer in (NPC(model, lr=0.0), NPCAdamW(model, lr=0.0)):  # as at the start of a warm-up
        assert [layer.frozen for layer in optimizer.plasticity().values()] == [0.0, 0.0]
        assert check_capacity(optimizer, learning={"2": [0, 1]}) == []


def test_layers_and_neurons_that_are_not_there() -> None:
    _, optimizer = trained()
    with pytest.raises(KeyError, match="no protected layer 'head'; there are '0', '2'"):
        check_capacity(optimizer, learning={"head": [0]})
    with pytest.raises(IndexError, match=r"layer '2' has 4 neurons, so .* 0 to 3; got \[4\]"):
        check_capacity(optimizer, learning={"2": [3, 4]})


class Writer:
    """Refuses to write."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(name)


WATCHING: list[Callable[[Any], Any]] = [
    check_capacity,
    plot_plasticity,
    lambda optimizer: log_plasticity(Writer(), optimizer, 0),
]


@pytest.mark.parametrize("watch", WATCHING, ids=["check", "plot", "log"])
def test_what_freezes_no_neurons_is_refused(watch: Callable[[Any], Any]) -> None:
    model = nn.Linear(3, 2)
    for optimizer in (torch.optim.SGD(model.parameters()), CPC(model), EWC(model, strength=1.0)):
        name = type(optimizer).__name__
        with pytest.raises(TypeError, match=f"the optimizer is of type {name}, which freezes no neurons; expected NPC"):
            watch(optimizer)


@pytest.mark.parametrize("watch", WATCHING, ids=["check", "plot", "log"])
def test_a_wrapper_that_hides_plasticity_is_named_with_what_it_wraps(watch: Callable[[Any], Any]) -> None:
    hides = SimpleNamespace(optimizer=NPC(nn.Linear(3, 2)))  # as Accelerate's does
    with pytest.raises(TypeError, match=r"SimpleNamespace, which wraps NPC, .*; pass optimizer\.optimizer"):
        watch(hides)


def test_a_plot_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"which is not installed: pip install matplotlib$"):
        plot_plasticity(NPC(nn.Linear(3, 2)))
