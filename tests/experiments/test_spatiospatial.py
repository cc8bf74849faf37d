"""The experiment on volumes, at a scale that only shows that it runs."""

from __future__ import annotations

import json

import numpy as np
import pytest

from convatlas.experiments import spatiospatial
from convatlas.training.settings import Training


@pytest.mark.slow
def test_quick_test_runs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(spatiospatial, "SEEDS", (5, 6))
    monkeypatch.setattr(spatiospatial, "SIZE", (4, 16, 16))
    monkeypatch.setattr(spatiospatial, "TRAIN", 12)
    monkeypatch.setattr(spatiospatial, "TEST", 6)
    monkeypatch.setattr(spatiospatial, "WIDTHS", (2, 2, 3, 3))
    monkeypatch.setattr(spatiospatial, "TRAINING", Training(epochs=1, batch_size=6, warmup_epochs=0))
    report = spatiospatial.run("quick")
    assert [claim.verdict for claim in report.claims] == ["cannot be told at this scale"] * 2 + ["holds"]
    kinds = [part["kind"] for section in json.loads(report.to_json())["sections"] for part in section["parts"]]
    assert "images" in kinds
    assert len(report.to_html()) > 10_000


def test_synthetic_heads_differ_by_class():
    volumes, labels = spatiospatial.tumour_volumes(9, (6, 24, 24), np.random.default_rng(0))
    assert volumes.shape == (9, 6, 24, 24)
    assert labels.tolist() == [0, 1, 2] * 3
    brightest = [volumes[labels == label].max() for label in range(3)]
    assert brightest[2] > max(brightest[:2])


def test_budgets_are_checked():
    with pytest.raises(ValueError, match="budget 'full' needs data and folder"):
        spatiospatial.run("full")
    with pytest.raises(ValueError, match="budget must be 'quick' or 'full', got 'slow'"):
        spatiospatial.run("slow")  # type: ignore[arg-type]
