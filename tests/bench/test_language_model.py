"""The language model's experiment learns both domains, and writes what it found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

from bench.continual import language_model


@pytest.mark.slow
def test_what_protects_neurons_forgets_less_and_learns_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [
        language_model.Setting("AdamW", 1e-3),
        language_model.Setting("NPCAdamW", 1e-3, beta=1),
        language_model.Setting("NPCAdamW", 1e-3, beta=1e-9),
    ]
    monkeypatch.setattr(language_model, "SETTINGS", settings)
    options = "--seeds 2 --jobs 1 --first-steps 30 --second-steps 10 --windows 16 --out"
    language_model.main([*options.split(), str(tmp_path)])
    assert all(setting.name in (tmp_path / "results.md").read_text() for setting in settings)
    assert {path.name for path in tmp_path.iterdir()} >= {"trade-off.svg", "results.json"}
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert len(runs) == 6
    plain, protected, frozen = (runs[at]["curve"] for at in (0, 2, 4))
    assert plain[0][0] < 40 and len(plain) == language_model.POINTS + 1  # of 256
    assert plain[0] == pytest.approx(protected[0], rel=0.01)  # neurons were only measured
    assert plain[-1][1] < protected[-1][1] < plain[0][1]
    assert frozen[-1] == frozen[0]
