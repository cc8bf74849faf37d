"""The experiment on HorNet, at a scale that only shows that it runs."""

from __future__ import annotations

import pytest
import torch

from convatlas.experiments import hornet
from convatlas.training.settings import Training


@pytest.mark.slow
def test_quick_test_runs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hornet, "SEEDS", (5, 6))
    monkeypatch.setattr(hornet, "STEPS", 20)
    monkeypatch.setattr(hornet, "SIDE", 8)
    monkeypatch.setattr(hornet, "TRAIN_FRACTION", 0.05)
    monkeypatch.setattr(hornet, "TRAINING", Training(epochs=1, batch_size=32, warmup_epochs=0))
    monkeypatch.setattr(hornet, "NETWORK", hornet.NETWORK.override(base_dim=8))
    report = hornet.run("quick")
    assert len(report.claims) == 2
    assert report.claims[1].verdict == "cannot be told at this scale"
    assert len(report.to_html()) > 10_000


def test_targets_are_products_of_three_neighbours():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert hornet._products(x)[0, 0, 1, 1] == x[0, 0, 1, 1] * x[0, 0, 1, 3] * x[0, 0, 3, 1]
    assert hornet._products(x)[0, 0, 2:].abs().sum() == 0


def test_budgets_are_checked():
    with pytest.raises(ValueError, match="budget 'full' needs data and folder"):
        hornet.run("full")
    with pytest.raises(ValueError, match="budget must be 'quick' or 'full', got 'slow'"):
        hornet.run("slow")  # type: ignore[arg-type]
