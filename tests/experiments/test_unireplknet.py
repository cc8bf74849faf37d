"""The experiment on UniRepLKNet, at a scale that only shows that it runs."""

from __future__ import annotations

import pytest
import torch

from convatlas.experiments import unireplknet
from convatlas.experiments.small_training import recipe_settings
from convatlas.networks.registry import model_config
from convatlas.recognition.task import Recognition
from convatlas.training.settings import Training
from convatlas.training.task import split_settings


@pytest.mark.slow
def test_quick_test_runs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(unireplknet, "SEEDS", (5, 6))
    monkeypatch.setattr(unireplknet, "STEPS", 1)
    monkeypatch.setattr(unireplknet, "WINDOWS", 2)
    monkeypatch.setattr(unireplknet, "TIMES", 300)
    monkeypatch.setattr(unireplknet, "SIDE", 64)
    monkeypatch.setattr(unireplknet, "IMAGES", 1)
    monkeypatch.setattr(unireplknet, "TRAIN_FRACTION", 0.05)
    monkeypatch.setattr(unireplknet, "TRAINING", Training(epochs=1, batch_size=32, warmup_epochs=0))
    monkeypatch.setattr(unireplknet, "NETWORK", unireplknet.NETWORK.override(dims=(8, 8)))
    report = unireplknet.run("quick")
    assert len(report.claims) == 4
    assert report.claims[0].verdict == "holds"
    assert report.claims[3].verdict == "cannot be told at this scale"
    assert len(report.to_html()) > 10_000


def test_windows_follow_each_other():
    signals = torch.arange(100.0)[:, None].expand(-1, 8)
    known, time, ahead, target = unireplknet._windows(signals, torch.tensor([3, 7]))
    assert known[1, :, 0].tolist() == list(range(7, 31))
    assert target[1, :, 0].tolist() == list(range(31, 43))
    assert (time.shape, ahead.shape) == ((2, 24, 4), (2, 12, 4))


def test_recipe_for_videos():
    task, training = split_settings(Recognition, recipe_settings("unireplknet_video"))
    assert task.takes_volumes
    assert task.volume_size == model_config(task.model).preprocess.shape == (16, 224, 224)  # type: ignore[attr-defined]
    assert (training.lr, training.epochs, training.weight_decay) == (4e-3, 90, 0.05)


def test_budgets_are_checked():
    with pytest.raises(ValueError, match="budget 'full' needs data and folder"):
        unireplknet.run("full")
    with pytest.raises(ValueError, match="budget must be 'quick' or 'full', got 'slow'"):
        unireplknet.run("slow")  # type: ignore[arg-type]
