"""Rows are read from damaged and growing files; tables and comparisons show what the rows contain."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import compare, rows, tables


def written(folder: Path, *changed: rows.Row, gpu: str = "H100") -> rows.Results:
    writer = rows.Writer(folder)
    writer.run("python -m bench", {"gpu": gpu, "commit": "abc"})
    for row in changed:
        writer.row(row)
    return rows.read(folder)


def row(case: str, ratio: tuple[float, float, float] | None = None, seconds: float = 1.0) -> rows.Row:
    made = rows.Row("update", case, {"npc_ext": seconds}, {"npc_ext": (0.9 * seconds, 1.1 * seconds)})
    if ratio:
        made.ratio = {"SGD fused": ratio}
    return made


def test_comparing_two_files_names_what_got_slower_beyond_its_spread(tmp_path: Path) -> None:
    before = written(
        tmp_path / "old", row("a", (1.0, 1.1, 1.2)), row("b", (1.0, 1.1, 1.2)), row("c", (1.0, 1.1, 1.2)), row("d")
    )
    # a: twice as slow, but so is its peer; b: slower; c: faster; d has no peer and takes twice as long.
    after = [row("a", (1.1, 1.2, 1.3), 2.0), row("b", (0.7, 0.8, 0.9)), row("c", (1.3, 1.4, 1.5)), row("d", None, 2.0)]
    text, slower = compare.compare(before, written(tmp_path / "new", *after))
    assert slower
    table = [line.split("|") for line in text.splitlines()[2:] if line]
    verdicts = {line[2].strip(): line[5].strip() for line in table if len(line) > 5}
    assert verdicts == {"b": "slower", "c": "faster", "d": "slower"}
    same, slower = compare.compare(before, before)
    assert (same, slower) == ("Nothing changed beyond its spread in 4 cases.", False)


def test_files_of_two_devices_or_without_a_common_case_are_not_compared(tmp_path: Path) -> None:
    old = written(tmp_path / "old", row("a"))
    with pytest.raises(rows.RowsError, match="'a' was measured on H100 and on H200"):
        compare.compare(old, written(tmp_path / "other", row("a"), gpu="H200"))
    with pytest.raises(rows.RowsError, match="no case in common"):
        compare.compare(old, written(tmp_path / "another", row("b")))


def test_a_part_of_two_devices_has_no_table(tmp_path: Path) -> None:
    written(tmp_path, row("a"))
    with pytest.raises(rows.RowsError, match="rows of update are of several devices: H100, H200"):
        tables.of_part(written(tmp_path, row("b"), gpu="H200"), "update")


def test_a_goal_is_not_decided_if_the_host_limited_the_peer() -> None:
    limited = rows.Row("p", "c", {"npc_ext": 1.0}, ratio={"peer": (0.7, 0.8, 0.9)}, goals={"peer": 1.0})
    limited.facts = {rows.LIMITED: ["peer"]}
    assert "not decided against peer: limited by the host" in tables.of_rows([limited])


def test_rows_survive_a_writer_that_was_killed_and_the_last_of_a_case_counts(tmp_path: Path) -> None:
    written(tmp_path, row("a", seconds=1.0), row("b"), row("a", seconds=3.0))
    with (tmp_path / rows.NAME).open("a") as file:
        file.write('{"kind": "row", "part": "upd')
    found = rows.read(tmp_path)
    assert [row.case for row in found.of_part("update")] == ["b", "a"]
    assert found.rows["update", "a"].seconds == {"npc_ext": 3.0}
    assert found.runs["update", "a"]["environment"]["gpu"] == "H100"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json\n{}\n", "line 1 is not JSON"),
        ("[1]\n{}\n", "line 1 is no object of JSON"),
        ('{"kind": "else"}\n', "line 1: its kind is 'else'; expected a line of kind run, row or part"),
        ('{"kind": "row", "part": "a", "case": "b", "more": 1}\n', "unexpected keyword argument 'more'"),
    ],
)
def test_a_damaged_file_of_rows_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / rows.NAME).write_text(text)
    with pytest.raises(rows.RowsError, match=message):
        rows.read(tmp_path)


def test_a_missing_file_of_rows_is_named(tmp_path: Path) -> None:
    with pytest.raises(rows.RowsError, match=r"nothing does not exist; expected a file of rows"):
        rows.read(tmp_path / "nothing")


def test_tables_show_quartiles_verdicts_and_what_is_not_measured() -> None:
    shown = tables.of_rows(
        [
            rows.Row("p", "good", {"npc_ext": 1e-3}, ratio={"peer": (1.0, 1.1, 1.2)}, goals={"peer": 1.0}, bytes=10**6),
            rows.Row("p", "noisy", {"npc_ext": 2.0}, ratio={"peer": (0.8, 0.9, 1.1)}, goals={"peer": 1.0}),
            rows.Row("p", "bad", {"npc_ext": 2e-6}, ratio={"peer": (0.7, 0.8, 0.9)}, goals={"peer": 1.0}),
            rows.Row("p", "counted", facts={"launches": None}),
        ]
    )
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown.splitlines()]
    assert lines[0] == ["case", "npc_ext", "GB/s", "peer, times as long", "launches", "goal"]
    assert lines[2] == ["good", "1.00 ms", "1", "1.10 (1.00 to 1.20)", "", "reached (at least 1.00 of peer)"]
    assert lines[3][-1] == "within the noise (at least 1.00 of peer)"
    assert lines[4][-1] == "missed (at least 1.00 of peer)"
    assert lines[5] == ["counted", "", "", "", "not measured", ""]


def test_mean_and_error_of_known_values() -> None:
    assert tables.mean_and_error([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1 / 3**0.5))
    assert tables.percent([0.5]) == "50.0"
    assert tables.percent([0.4, 0.6]) == "50.0 ± 10.0"
