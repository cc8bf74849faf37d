"""The experiment of WaveMix: it runs, its verdicts follow from its numbers, and its full form joins two phases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from convatlas.experiments import wavemix
from convatlas.networks.wavemix import WaveMixConfig, WaveMixSRConfig
from convatlas.report import Images, Report, Table
from convatlas.training.settings import Training


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    monkeypatch.setattr(wavemix, "SEEDS", (0, 1))
    monkeypatch.setattr(
        wavemix,
        "NETWORK",
        WaveMixConfig(depth=1, dim=8, level=1, patch_size=4, dropout=0.0, num_classes=10, in_channels=1),
    )
    monkeypatch.setattr(wavemix, "CONV_WIDTH", 8)
    monkeypatch.setattr(wavemix, "TRAINING", Training(epochs=2, batch_size=16, lr=1e-2, warmup_epochs=0))
    monkeypatch.setattr(wavemix, "TRAIN_FRACTION", 0.1)
    monkeypatch.setattr(wavemix, "SR_NETWORK", WaveMixSRConfig(depth=1, dim=8, dropout=0.0))
    monkeypatch.setattr(wavemix, "SR_STEPS", 4)
    monkeypatch.setattr(wavemix, "SR_TEST_CROPS", 2)
    monkeypatch.setattr(wavemix, "SR_REPORTED", 2)


def parts(report: Report, kind: type[Any]) -> list[Any]:
    return [part for section in report.sections for part in section.parts if isinstance(part, kind)]


def test_quick_runs(small: None, monkeypatch: pytest.MonkeyPatch):
    report = wavemix.run("quick")
    learned, _, memory, enlarged = report.claims
    assert len(learned.values) == 2
    assert memory.values[0] > 0.2
    assert enlarged.verdict == "does not hold"  # after four steps
    table = next(table for table in parts(report, Table) if table.title == "PSNR on test crops")
    gains = [float(row[3] or 0) for row in table.rows]
    assert enlarged.values == pytest.approx(gains)
    assert all(float(row[2] or 0) > 20 for row in table.rows)
    (images,) = parts(report, Images)
    assert [pixels.shape for pixels, _ in images.images] == [(64, 64, 3), (32, 32, 3), (64, 64, 3), (64, 64, 3)]
    assert all(pixels.std() > 1 for pixels, _ in images.images)
    assert "WaveMix" in report.to_html()


def test_full_joins_two_phases(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    changes = {"epochs": 1, "batch_size": 8, "image_size": 32, "precision": "32", "accelerator": "cpu"}
    report = wavemix.full(pictures, tmp_path, **changes, options={"depth": 1, "dim": 8})
    assert report.claims[0].verdict == "cannot be told at this scale"
    assert {path.name for path in tmp_path.iterdir()} == {"wavemix_192_16_l3", "wavemix_192_16_l3_adamw"}


def test_missing_data_and_unknown_budgets_are_named():
    with pytest.raises(ValueError, match="budget 'full' needs data and folder, got None and None"):
        wavemix.run("full")
    with pytest.raises(ValueError, match="budget must be 'quick' or 'full', got 'huge'"):
        wavemix.run("huge")
