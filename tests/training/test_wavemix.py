"""How WaveMix is trained: losses and score by hand, phases that follow each other and go on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from convatlas.ops.image_quality import ssim
from convatlas.recognition.task import Recognition
from convatlas.training.settings import Training
from convatlas.training.wavemix import PHASES, fit_phases, focal_cross_entropy, legacy_wavemix_score, ssim_loss


def test_focal_loss_is_focal_in_the_mean():
    scores, labels = torch.randn(2, 4, 3, 5, dtype=torch.float64), torch.randint(4, (2, 3, 5))
    labels[0, 0] = 0
    mean = F.cross_entropy(scores, labels, ignore_index=0)
    expected = (1 - torch.exp(-mean)) ** 2 * mean
    torch.testing.assert_close(focal_cross_entropy(scores, labels, ignore_index=0), expected)
    torch.testing.assert_close(focal_cross_entropy(scores, labels, gamma=0), F.cross_entropy(scores, labels))


def test_ssim_loss_keeps_the_published_range():
    x = torch.rand(2, 3, 16, 16).requires_grad_()
    y = torch.rand(2, 3, 16, 16)
    loss = ssim_loss(x, y)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(1 - ssim(x, y, data_range=255).mean().item(), rel=1e-4)
    assert loss < 0.05 < ssim_loss(x, y, data_range=1.0)
    loss.backward()
    assert x.grad.isfinite().all()
    assert ssim_loss(y, y).item() == pytest.approx(0, abs=1e-6)


def test_score_counts_common_bits():
    labels = torch.tensor([[[7, 8], [0, 3]], [[0, 0], [0, 0]]])
    prediction = torch.tensor([[[7, 7], [0, 1]], [[0, 0], [0, 0]]])
    # Of the first image 7 + 0 + 0 + 1 over 7 + 15 + 0 + 3 is below one half; the second agrees.
    assert legacy_wavemix_score(prediction, labels).item() == pytest.approx(0.5)
    near = torch.tensor([[[7, 8], [0, 1]]])  # 16 / 18
    assert legacy_wavemix_score(near, labels[:1]).item() == pytest.approx(0.8)


def test_phases_are_those_of_the_authors():
    first, second = PHASES
    assert (first.optimizer, first.lr, first.weight_decay, first.decay_all) == ("adamw", 1e-3, 0.01, True)
    assert (second.optimizer, second.lr, second.momentum, second.weight_decay) == ("sgd", 1e-3, 0.9, 0.0)
    assert {phase.patience for phase in PHASES} == {20}
    assert {phase.schedule for phase in PHASES} == {"constant"}


def test_phases_start_from_the_best_weights_and_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    task = Recognition(model="wavemix_144_7_l1_cifar10", options={"depth": 1, "dim": 8}, image_size=16)
    short = Training(epochs=1, batch_size=256, warmup_epochs=0, accelerator="cpu")
    phases = [short, dataclasses.replace(short, optimizer="sgd", lr=1e-6, weight_decay=0.0)]
    runs = fit_phases(task, tmp_path, phases)
    assert [run.folder.name for run in runs] == ["phase1", "phase2"]
    assert runs[1].settings()["weights"] == str(runs[0].best)
    before, after = (Recognition.load(run.folder).network.stem[0].weight for run in runs)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-3)
    written = runs[0].best.stat().st_mtime_ns
    assert [run.folder for run in fit_phases(task, tmp_path, phases)] == [run.folder for run in runs]
    assert runs[0].best.stat().st_mtime_ns == written


def test_impossible_phases_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="phases must name at least one training"):
        fit_phases(Recognition(), tmp_path, [])
