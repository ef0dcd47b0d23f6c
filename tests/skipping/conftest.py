"""Fixtures of the tests of skipping: gradients are skipped more often than in training."""

from __future__ import annotations

import pytest

from npc_ext.skipping import certificate, forward


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are skipped whether or not that is faster."""
    monkeypatch.setattr(forward, "skipping_pays", lambda *arguments: True)


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Certificates are issued every second step, for four steps."""
    monkeypatch.setattr(certificate, "FEWEST_STEPS_BETWEEN_ISSUES", 2)
    monkeypatch.setattr(certificate, "MOST_STEPS_BETWEEN_ISSUES", 2)
