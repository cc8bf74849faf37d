"""The experiment on filter design, at a scale that only shows that it runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from convatlas.experiments import filter_design


def test_quick_test_runs(monkeypatch: pytest.MonkeyPatch):
    changes = {
        "SEEDS": (3,),
        "SPLITS": (3, 4),
        "LABELLED": (30,),
        "PATCHES": 200,
        "DEPTH": 3,
        "WIDTH": 4,
        "TRAINED_DEPTH": 2,
    }
    changes |= {"EPOCHS": 1, "IMAGES": 100}
    for name, value in changes.items():
        monkeypatch.setattr(filter_design, name, value)
    report = filter_design.run("quick")
    assert len(report.claims) == 6
    assert "zca_kmeans" in report.to_html()


def test_full_test_runs(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(filter_design, "PATCHES", 200)
    report = filter_design.full(pictures, tmp_path / "banks")
    assert report.claims[0].verdict == "cannot be told at this scale"
    assert len(list((tmp_path / "banks").iterdir())) == len(filter_design.BANKS)


def test_budgets_are_checked():
    with pytest.raises(ValueError, match="budget 'full' needs data and folder"):
        filter_design.run("full")
    with pytest.raises(ValueError, match="budget must be 'quick' or 'full', got 'slow'"):
        filter_design.run("slow")  # type: ignore[arg-type]
