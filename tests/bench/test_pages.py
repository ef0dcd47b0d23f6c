"""The pages under docs/results, and the README's table, have the numbers of the files under bench/results."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from bench import ROOT
from bench.continual.demo import FALL
from bench.pages import PAGES, gpu, learning, micro, render, scaling
from bench.pages.render import FOLDER, TEMPLATES
from bench.rows import OURS, Row, Writer
from bench.tables import mean_and_error

WRITE = "run `python -m bench.pages`, and commit what it writes"
# What a template may write with a decimal point: what is filled in, and code.
NOT_TYPED = re.compile(r"\{\{.*?\}\}|\{%.*?%\}|`[^`]*`", re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_what_its_template_gives(page: str) -> None:
    assert (FOLDER / page).read_text() == render(page), f"docs/results/{page} is out of date: {WRITE}"


@pytest.mark.parametrize("page", PAGES)
def test_a_template_types_no_measured_number(page: str) -> None:
    text = NOT_TYPED.sub("", (TEMPLATES / page).read_text())
    assert not re.findall(r"\d+\.\d+", text), "take the number from a file under bench/results"


def test_the_readme_has_the_table_of_the_demonstration() -> None:
    readme = (ROOT / "README.md").read_text()
    for row in learning.demo_table().splitlines():
        assert row in readme, "python -c 'from bench.pages import learning; print(learning.demo_table())'"


def test_the_readmes_sentences_about_the_demonstration_have_its_numbers() -> None:
    table = learning.demo_table()
    first = table.splitlines()[0]
    sections = re.split(r"^#+ .*$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    (section,) = (section for section in sections if first in section)
    cells = re.findall(r"(\d+\.\d)( ± \d+\.\d)", table)
    known = {mean + more for mean, error in cells for more in ("", error)}
    known |= {mean.removesuffix(".0") for mean, _ in cells} | {"50"}  # 50: chance
    sentences = section.replace(table, "")
    assert not set(re.findall(r"(\d+(?:\.\d+)?(?: ± \d+\.\d)?) ?%", sentences)) - known


def test_whole_numbers_of_a_measurement_that_are_typed_are_true() -> None:
    text = {page: (TEMPLATES / page).read_text() for page in PAGES}
    rows = [row for row in micro.results().of_part("methods") if row.case != "NPC"]
    size = {row.case.split(",")[0]: row.facts["state, bytes an element"] for row in rows}
    assert "keep 4 to 12 bytes for each **weight**" in text["memory.md"]
    assert (min(size.values()), max(size.values())) == (4, 12)
    assert "the paper's CNN needs a third less at the peak" in text["memory.md"]
    peak = micro.frozen_at(1).facts["peak memory, bytes"]
    assert peak[OURS] / peak[micro.SGD] == pytest.approx(2 / 3, abs=0.03)
    assert "`NPCAdamW.step()` is as fast as fused AdamW's or faster up to 10 million parameters" in text["speed.md"]
    for row in micro.results().of_part("adam"):  # at least within the noise
        assert (row.ratio[micro.ADAMW][2] >= 1) == (row.case != "64,000,000 parameters")
    # Both read weights and gradients and write weights. SI also reads its state, and writes a third of it: the path.
    assert "it moves 28 bytes for each weight and SGD 12" in text["speed.md"]
    assert 12 + size["SI"] + size["SI"] / 3 == 28
    assert "all methods but SGD are within two points of NPC" in text["accuracy.md"]
    averages = {method: sum(learning.of("imnist", method).average) / 3 for method in learning.METHODS}
    assert all(averages["npc"] - average < 0.02 for method, average in averages.items() if method != "sgd")
    assert averages["npc"] - averages["sgd"] > 0.02
    assert "A Llama with two layers of width 64" in text["language-model.md"]
    llama = (ROOT / "bench" / "continual" / "language_model.py").read_text()
    assert "num_hidden_layers=2," in llama and "hidden_size=64," in llama


def test_the_readmes_sentence_about_time_has_the_numbers_of_the_benchmark() -> None:
    readme = (ROOT / "README.md").read_text()
    (ratio,) = re.findall(r"a tiny network's takes (\d+\.\d+) times as long", readme)
    assert ratio == f"{float(micro.relative(micro.row('step', 'digits CNN, batch 16'))):.1f}"
    assert "a step of the paper's CNN takes as long as with plain SGD" in readme
    paper = [row for row in micro.results().of_part("step") if row.case.startswith("paper's CNN")]
    assert paper and all(row.ratio[micro.SGD][1] == pytest.approx(1, abs=0.03) for row in paper)


def test_the_factor_of_falling_rates_is_the_demonstrations() -> None:
    assert f"is multiplied by {FALL} after each task" in (ROOT / "README.md").read_text()
    guide = (ROOT / "docs" / "guides" / "constants.md").read_text()
    assert f'["lr"] *= {FALL}  # before the next task' in guide


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


def test_what_is_said_of_the_controls_follows_from_the_records() -> None:
    def is_above(values: list[float], others: list[float]) -> bool:
        """By more than two standard errors of the difference."""
        (mean, error), (other, other_error) = mean_and_error(values), mean_and_error(others)
        return mean - other > 2 * math.hypot(error, other_error)

    for lr in learning.demos():
        npc, sgd, falling, shuffled = (
            learning.demo(lr, method) for method in ("NPC", "SGD", "SGD, falling rate", "NPC, shuffled")
        )
        assert is_above(falling.forgetting, npc.forgetting)
        assert is_above(shuffled.forgetting, npc.forgetting) is (lr == min(learning.demos(), key=float))
        assert is_above(sgd.forgetting, npc.forgetting) is (lr != "0.03")
        for control in (falling, shuffled):
            assert not is_above(npc.average, control.average)


def test_without_a_flight_no_goal_on_a_gpu_is_measured(tmp_path: Path) -> None:
    rows = gpu.goals_table(tmp_path).splitlines()[2:]
    assert len(rows) == len(gpu.GOALS) + 1
    assert all(row.endswith("| not measured |") for row in rows)
    assert gpu.flights_list(tmp_path) == "No run on a GPU is recorded yet."


def test_the_rows_of_a_flight_fill_the_goals_on_a_gpu(tmp_path: Path) -> None:
    flight = tmp_path / "NVIDIA H100" / "kernels"
    writer = Writer(flight)
    writer.run("python -m bench.gpu", {"gpu": "NVIDIA H100", "commit": "abc"})
    for case, ratio in (("a", 1.1), ("b", 0.9)):
        times = {OURS: 1.0, "SGD fused": ratio}
        spread = {"SGD fused": (ratio, ratio, ratio)}
        writer.row(Row("update", case, seconds=times, ratio=spread, goals={"SGD fused": 1.0}))
    (flight / "update.md").write_text("a table\n")
    table = gpu.goals_table(tmp_path)
    assert "reached in 1 of 2 rows, missed in 1 of 2 rows" in table
    assert table.count("not measured") == len(gpu.GOALS)
    assert gpu.flights_list(tmp_path).startswith("* NVIDIA H100, kernels: [update](")


def test_sizes_in_theory() -> None:
    assert scaling.sent(1000, 1) == 0
    assert scaling.sent(1000, 8) == 7000
    assert [scaling.size(amount) for amount in (0, 5e5, 5.88e6, 11.7e6, 7e8, 8.05e10)] == [
        "0",
        "0.5 MB",
        "5.9 MB",
        "12 MB",
        "0.7 GB",
        "80 GB",
    ]
