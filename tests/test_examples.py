"""The examples that need no other library do what their pages say, and print what these show."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from .docs.pages import ROOT

pytest.importorskip("sklearn", reason="scikit-learn is not installed")

PAGES = {path.stem: path.read_text() for path in (ROOT / "docs" / "examples").glob("*.md") if path.stem != "index"}
SHOWN = {
    command: (page, printed)
    for page, text in PAGES.items()
    for command, printed in re.findall(
        r"```sh\npython -m (examples\.[^\n]*)\n```\n\n```text\n(.*?)```", text, re.DOTALL
    )
}
PERCENT, DECIMAL = r"(\d+\.\d+)%", r"(\d+\.\d+)"


@functools.cache
def printed_by(command: str) -> str:
    """Runs `examples.name --option ...` in this process; returns what it prints."""
    name, *arguments = shlex.split(command)
    printed = io.StringIO()
    with mock.patch.object(sys, "argv", [name, *arguments]), contextlib.redirect_stdout(printed):
        runpy.run_module(name, run_name="__main__")
    return printed.getvalue()


def assert_alike(printed: str, shown: str) -> None:
    """The same lines. What is measured may differ somewhat, as on another processor; settings and counts may not."""
    for ours, theirs in zip(printed.splitlines(), shown.splitlines(), strict=True):
        measured = DECIMAL if theirs.startswith("importance in process") else PERCENT
        assert re.sub(f" *{measured}", " #", ours) == re.sub(f" *{measured}", " #", theirs)
        close = {"abs": 10} if measured == PERCENT else {"rel": 0.25, "abs": 0.01}
        assert [*map(float, re.findall(measured, ours))] == pytest.approx(
            [*map(float, re.findall(measured, theirs))], **close
        )


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("accuracy: 88.4%", "accuracy: 68.4%"),
        ("SGD, lr=0.003  88.4%", "SGD, lr=0.03  88.4%"),
        ("learning rate in the end: 0.0003", "learning rate in the end: 0.0004"),
        ("importance in process 0: 0.0597 0.9071", "importance in process 0: 0.0597 0.5071"),
        ("importance in process 0: 0.0597 0.9071", "importance in process 1: 0.0597 0.9071"),
        ("all 110 neurons", "all 111 neurons"),
        ("a\n", "a\nb\n"),
    ],
)
def test_what_is_not_alike_is_found(shown: str, printed: str) -> None:
    with pytest.raises((AssertionError, ValueError)):
        assert_alike(printed, shown)


def test_another_processor_prints_what_is_alike() -> None:
    assert_alike(
        "npc  100.0%  97.1%\nimportance in process 0: 0.06 0.9",
        "npc  98.0%   99.9%\nimportance in process 0: 0.05 0.91",
    )


@pytest.mark.parametrize("name", PAGES)
def test_a_page_shows_the_program_and_what_it_prints(name: str) -> None:
    program, text = f"examples/{name.replace('-', '_')}.py", PAGES[name]
    assert (ROOT / program).exists()
    assert f'```python\n--8<-- "{program}"\n```' in text and f"](../../{program})" in text
    assert text.count("```text") == sum(page == name for page, _ in SHOWN.values()) > 0


def test_five_tasks_take_sixty_lines() -> None:
    assert len((ROOT / "examples" / "five_tasks.py").read_text().splitlines()) <= 60


IN_THIS_PROCESS = [command for command in SHOWN if "two_processes" not in command and "tensorboard" not in command]


@pytest.mark.slow
@pytest.mark.parametrize("command", IN_THIS_PROCESS)
def test_a_program_prints_what_its_page_shows(command: str) -> None:
    quick = " --seeds 1" if "fine_tuning" in command else ""
    assert_alike(printed_by(command + quick), SHOWN[command][1])


def last_percents(command: str) -> list[float]:
    return [float(percent) for percent in re.findall(PERCENT, printed_by(command).splitlines()[-1])]


@pytest.mark.slow
def test_npc_forgets_less_of_five_tasks_than_sgd() -> None:
    (npc,), (sgd,) = (last_percents(f"examples.five_tasks{option}") for option in ("", " --optimizer sgd"))
    assert npc > sgd + 1


@pytest.mark.slow
def test_a_growing_head_forgets_less_with_npc_than_with_sgd_but_much_without_the_task() -> None:
    npc, sgd = (last_percents(f"examples.growing_head{option}") for option in ("", " --optimizer sgd"))
    assert npc[0] > sgd[0] + 2 and npc[1] > sgd[1] + 10
    assert npc[1] < npc[0] - 20


def test_the_page_of_fine_tuning_says_what_its_numbers_show() -> None:
    rows = [re.findall(PERCENT, line) for line in SHOWN["examples.fine_tuning"][1].splitlines()[1:]]
    before, npc, sgd, slower_sgd, slowest_sgd, head = [[float(percent) for percent in row] for row in rows]
    assert npc[0] > before[0] - 1 and npc[0] > sgd[0] + 5  # it keeps the old task, and SGD does not
    assert npc[1] > max(head[1], slowest_sgd[1]) + 2  # the other ways to keep it learn less
    assert before[0] - 4 < slower_sgd[0] < npc[0] and slower_sgd[1] > npc[1]  # this loses a little, and learns more
    assert 0 <= sum(slower_sgd) - sum(npc) < 4


@pytest.mark.slow
def test_two_processes_have_the_same_importance(tmp_path: Path) -> None:
    if not torch.distributed.is_gloo_available():
        pytest.skip("torch.distributed has no gloo here")
    (command,) = (command for command in SHOWN if "two_processes" in command)
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    run = [sys.executable, "-m", *shlex.split(command)]
    printed = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert_alike(printed, SHOWN[command][1])
    values = re.findall(r"importance in process \d: (.*)", printed)
    assert len(values) == 2 and values[0] == values[1]
    assert printed.endswith("neurons is equal to the last bit: True\n")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_steps_of_a_graph_follow_the_schedule(device: str) -> None:
    from examples.cuda_graph import learn

    optimizer, accuracy = learn(device)
    (group,) = optimizer.param_groups
    assert group["lr"].item() == pytest.approx(0.1 / 300)
    assert accuracy > 0.8 and all(layer.importance.any() for layer in optimizer.plasticity().values())


@pytest.mark.slow
def test_tensorboard_gets_scalars_and_histograms(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    printed = printed_by(f"examples.tensorboard --folder {tmp_path}")
    assert printed.replace(str(tmp_path), "runs/npc") == SHOWN["examples.tensorboard"][1]
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = events.Tags()
    assert {f"accuracy/digits {first} and {first + 1}" for first in range(0, 10, 2)} <= set(tags["scalars"])
    for layer in ("first", "second", "output"):
        assert f"plasticity/{layer}/frozen" in tags["scalars"]
        assert f"plasticity/{layer}/learning rate of neurons" in tags["histograms"]
    frozen = events.Scalars("plasticity/first/frozen")
    assert [event.step for event in frozen] == [*range(0, 1500, 50)]
    assert frozen[0].value == 0 and frozen[-1].value > 0.5
