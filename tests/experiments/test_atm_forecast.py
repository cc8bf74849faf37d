"""The experiment on cash demand, at a scale that only shows that it runs."""

from __future__ import annotations

import pytest

from convatlas.experiments import atm_forecast


@pytest.mark.slow
def test_quick_test_runs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(atm_forecast, "MACHINES", 2)
    monkeypatch.setattr(atm_forecast, "DAYS", 160)
    monkeypatch.setattr(atm_forecast, "HELD_OUT", 30)
    few = {"rf": {"n_estimators": 5}, "grnn": {}, "cnn": {"epochs": 1}, "lstm": {"epochs": 1}}
    monkeypatch.setattr(atm_forecast, "MODELS", few)
    report = atm_forecast.run("quick")
    assert len(report.claims) == 4
    assert report.claims[2].verdict == "cannot be told at this scale"  # two machines are too few for a test
    assert len(report.to_html()) > 10_000


def test_budgets_are_checked():
    with pytest.raises(ValueError, match="budget 'full' needs data"):
        atm_forecast.run("full")
    with pytest.raises(ValueError, match="budget must be 'quick' or 'full', got 'slow'"):
        atm_forecast.run("slow")  # type: ignore[arg-type]
