"""GitHub's workflows run what `make` runs here, and nothing else; its forms ask for what answers need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {"lint": "make lint CI=true", "test": "make test", "docs": "make docs"}
FORMS = [path for path in sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")) if path.stem != "config"]


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def test_there_is_a_workflow_for_each_command() -> None:
    assert {path.stem for path in (ROOT / ".github" / "workflows").iterdir()} == COMMANDS.keys()
    assert sorted((ROOT / ".ci" / "run").read_text().splitlines()[2:]) == sorted(COMMANDS.values())


@pytest.mark.parametrize("name", COMMANDS)
def test_a_workflow_checks_out_sets_python_up_and_runs_one_make_target(name: str) -> None:
    (job,) = read(ROOT / ".github" / "workflows" / f"{name}.yml")["jobs"].values()
    checkout, python, command = job["steps"]
    assert checkout.keys() == {"uses"} and checkout["uses"].startswith("actions/checkout@v")
    assert python["uses"].startswith("actions/setup-python@v") and python["with"].keys() == {"python-version"}
    assert command == {"run": COMMANDS[name]}


def test_the_tests_run_with_every_python_that_is_promised() -> None:
    (job,) = read(ROOT / ".github" / "workflows" / "test.yml")["jobs"].values()
    versions = job["strategy"]["matrix"]["python"]
    assert f'requires-python = ">={versions[0]}"' in (ROOT / "pyproject.toml").read_text()
    assert f"for Python {versions[0]} to {versions[-1]}" in (ROOT / "requirements.txt").read_text()


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_a_form_has_what_github_requires(path: Path) -> None:
    form = read(path)
    assert form["name"] and form["description"]
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)


def test_a_bug_report_asks_for_a_program_and_the_state_of_the_installation() -> None:
    required = [
        field["attributes"]["label"]
        for field in read(ROOT / ".github" / "ISSUE_TEMPLATE" / "bug_report.yml")["body"]
        if field.get("validations", {}).get("required")
    ]
    assert "A minimal program" in required
    assert "Output of `python -m npc_ext`" in required
