"""The experiment of Decamouflage: it runs in small, and its verdicts follow from its numbers."""

from __future__ import annotations

import pytest

from convatlas.experiments import decamouflage


def test_it_runs_in_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    small = {"SIDE": 96, "SMALL": 24, "CALIBRATION": 6, "ATTACKS": 3, "SEEDS": (0,), "ALGORITHMS": ("linear",)}
    for name, value in {**small, "RATIOS": (4,)}.items():
        monkeypatch.setattr(decamouflage, name, value)
    report = decamouflage.run("quick")
    accuracy, _, distance = report.claims
    assert accuracy.verdict == ("holds" if accuracy.values[0] >= 0.95 else "does not hold")
    assert distance.verdict == "holds"
    monkeypatch.setattr(decamouflage, "DISTANCE", 0.0)
    assert decamouflage.run("quick").claims[2].verdict == "does not hold"


def test_bad_budgets_are_named() -> None:
    with pytest.raises(ValueError, match="budget must be 'quick' or 'full', got 'tiny'"):
        decamouflage.run("tiny")
    with pytest.raises(ValueError, match="budget 'full' needs data"):
        decamouflage.run("full")
