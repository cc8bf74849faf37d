"""The experiment on linear interpreters: its verdicts follow from its numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from convatlas.experiments import linear_interpreter
from convatlas.networks.registry import create_model
from convatlas.report import Images, Report, Table
from convatlas.training.settings import Training

UNKNOWN = "cannot be told at this scale"


def _parts(report: Report, kind: type) -> list:
    return [part for section in report.sections for part in section.parts if isinstance(part, kind)]


def test_quick_runs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    monkeypatch.setattr(linear_interpreter, "SEEDS", (5, 6))
    monkeypatch.setattr(linear_interpreter, "TRAINING", Training(epochs=2, batch_size=32, lr=3e-3, warmup_epochs=0))
    monkeypatch.setattr(linear_interpreter, "TRAIN_FRACTION", 0.2)
    monkeypatch.setattr(linear_interpreter, "WIDTHS", (4, 6))
    monkeypatch.setattr(linear_interpreter, "LOOKED_AT", 40)
    monkeypatch.setattr(linear_interpreter, "STEPS", 3)
    monkeypatch.setattr(linear_interpreter, "SR_WIDTHS", (4, 3))
    monkeypatch.setattr(linear_interpreter, "PHOTO_SIDE", 12)
    report = linear_interpreter.run("quick")
    exact, *others = report.claims
    assert exact.verdict == "holds"
    assert 0 < max(exact.values) < 1e-13
    assert [claim.verdict for claim in others] == [UNKNOWN] * 4  # nothing learned
    parts = next(table for table in _parts(report, Table) if table.title.startswith("Accuracy of the parts"))
    for row, lost, told in zip(parts.rows, others[0].values, others[1].values, strict=True):
        assert lost == pytest.approx(row[1] - row[2])
        assert told == pytest.approx(row[3] - 10)
    assert [len(images.images) for images in _parts(report, Images)] == [10, 8, 8]
    assert "A x0 alone" in report.to_html()


@pytest.mark.parametrize(("linear", "bias", "verdicts"), [(85, 40, ["holds"] * 2), (95, 25, ["does not hold"] * 2)])
def test_verdicts(linear: float, bias: float, verdicts: list[str]):
    halves = linear_interpreter._Halves(97.0, linear, bias, 1e-15, 0.4)
    claims = linear_interpreter._classifier_claims([halves], seeds=1, chance=10.0, scale_ok=True)
    assert [claim.verdict for claim in claims] == ["holds", *verdicts]
    claims = linear_interpreter._classifier_claims([halves], seeds=1, chance=10.0, scale_ok=False)
    assert [claim.verdict for claim in claims] == ["holds", UNKNOWN, UNKNOWN]
    wrong = linear_interpreter._classifier_claims([halves._replace(error=1e-9)], seeds=1, chance=10.0, scale_ok=True)
    assert wrong[0].verdict == "does not hold"


def test_wavelets_are_told_from_waves_and_noise():
    x = torch.arange(32.0)
    wave = torch.cos(2 * torch.pi * 0.25 * x)[None] * torch.ones(32, 1)
    wavelet = wave * torch.exp(-((x - 16) ** 2) / 32)[None] * torch.exp(-((x - 16) ** 2) / 32)[:, None]
    noise = torch.randn(50, 32, 32, generator=torch.Generator().manual_seed(0))
    outside, covered = linear_interpreter.wavelet_likeness(wavelet[None])
    assert outside < 0.1
    assert covered < 0.1
    outside, covered = linear_interpreter.wavelet_likeness(wave[None])
    assert outside == pytest.approx(0, abs=1e-6)
    assert covered > 0.4
    outside, covered = linear_interpreter.wavelet_likeness(noise)
    assert 0.8 < outside < 0.95
    assert 0.4 < covered < 0.5


def test_full_interprets_networks_by_name(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    monkeypatch.setattr(linear_interpreter, "FULL_LOOKED_AT", 4)
    monkeypatch.setattr(linear_interpreter, "FULL_SHOWN", 1)
    small = {"depths": (1, 1), "widths": (4, 6), "stem_width": 4, "num_classes": 2}
    network = create_model("resnet18", **small)
    report = linear_interpreter.full(pictures, tmp_path, models={"small": network})
    assert [claim.verdict for claim in report.claims] == ["holds", UNKNOWN, UNKNOWN]
    assert _parts(report, Table)[0].rows[0][0] == 4
    assert "left" in (tmp_path / "small-0" / "report.html").read_text()
    assert np.load(tmp_path / "small-0" / "linear_system.npz")["rows"].shape == (2, 1, 3, 224, 224)


def test_budget_is_checked(tmp_path: Path):
    with pytest.raises(ValueError, match="budget must be 'quick' or 'full', got 'slow'"):
        linear_interpreter.run("slow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"needs data and folder, got .* and None"):
        linear_interpreter.run("full", data=tmp_path)
