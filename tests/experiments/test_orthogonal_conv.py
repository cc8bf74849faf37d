"""The experiment on orthogonal convolutions, at a scale that only shows that it runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from convatlas.experiments import orthogonal_conv


def test_quick_test_runs(monkeypatch: pytest.MonkeyPatch):
    changes = {"SEEDS": (3,), "STEPS": 2, "OUTPUTS": (3, 4), "LAMBDAS": (0.0, 0.1), "EPOCHS": 1, "BATCH": 400}
    changes["SHAPES"] = ((3, 4, 3, 1), (2, 2, 3, 1), (28, 3, 3, 4))
    for name, value in changes.items():
        monkeypatch.setattr(orthogonal_conv, name, value)
    report = orthogonal_conv.run("quick")
    assert len(report.claims) == 5
    assert report.claims[2].verdict == "holds"
    assert "no row-orthogonal convolution exists" in report.to_html()


def test_full_test_runs(monkeypatch: pytest.MonkeyPatch, pictures: Path, tmp_path: Path):
    monkeypatch.setattr(orthogonal_conv, "FULL_LAMBDAS", (0.0, 0.1))
    changes = {
        "epochs": 1,
        "batch_size": 8,
        "options": {"depths": [1], "widths": [4], "stem_width": 4, "small_stem": True},
        "accelerator": "cpu",
    }
    report = orthogonal_conv.full(pictures, tmp_path / "runs", **changes)
    assert report.claims[0].verdict == "cannot be told at this scale"


def test_budgets_are_checked():
    with pytest.raises(ValueError, match="budget 'full' needs data and folder"):
        orthogonal_conv.run("full")
    with pytest.raises(ValueError, match="budget must be 'quick' or 'full', got 'slow'"):
        orthogonal_conv.run("slow")  # type: ignore[arg-type]
