"""The experiment on weighted convolution, at a scale that only shows that it runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from convatlas.experiments import weighted_conv
from convatlas.training.settings import Training
from restoration.scenes import write_scenes


def test_quick_test_runs(monkeypatch: pytest.MonkeyPatch):
    training = Training(epochs=1, batch_size=64, warmup_epochs=0)
    changes = {"SEEDS": (3, 4), "STEPS": 1, "BATCH": 1, "PAIRS": 1, "TRAINING": training, "TRAIN_FRACTION": 0.05}
    changes["NETWORK"] = weighted_conv.NETWORK.override(depth=2, dim=2)
    changes["DIGITS"] = weighted_conv.DIGITS.override(widths=((2,), (4,)))
    for name, value in changes.items():
        monkeypatch.setattr(weighted_conv, name, value)
    report = weighted_conv.run("quick")
    assert len(report.claims) == 5
    assert "rescaled start" in report.to_html()


def test_full_test_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("convatlas.restoration.comparison._FRAME", (12, 16))
    data = write_scenes(tmp_path / "data", 4)
    changes = {"epochs": 1, "patch_size": 16, "options": {"depth": 2, "dim": 2}, "accelerator": "cpu"}
    report = weighted_conv.full(data, tmp_path / "runs", **changes)
    assert report.claims[0].verdict == "cannot be told at this scale"


def test_budgets_are_checked():
    with pytest.raises(ValueError, match="budget 'full' needs data and folder"):
        weighted_conv.run("full")
    with pytest.raises(ValueError, match="budget must be 'quick' or 'full', got 'slow'"):
        weighted_conv.run("slow")  # type: ignore[arg-type]
