"""The experiment on two exposures: it runs in small, and its verdicts follow from its numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from convatlas.data.exposure_pairs import ExposurePair, write_scene
from convatlas.data.linear_images import LinearImage
from convatlas.data.simulators.exposures import illuminant_exposures
from convatlas.experiments import dual_exposure
from convatlas.restoration.illuminant_estimation import IlluminantEstimation


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")


def test_it_runs_in_small(monkeypatch: pytest.MonkeyPatch) -> None:
    epochs = {"emlp": 2, "ccc": 1, "eccc": 1}
    for name, value in {"SEEDS": (0,), "TRAIN": 12, "TEST": 8, "EPOCHS": epochs}.items():
        monkeypatch.setattr(dual_exposure, name, value)
    report = dual_exposure.run("quick")
    assert len(report.claims) == 6
    assert report.claims[0].verdict == "holds"
    for claim in report.claims[1:]:
        bound = float(claim.threshold.split()[2])
        assert claim.verdict == ("holds" if claim.values[0] >= bound else "does not hold")
    monkeypatch.setattr(dual_exposure, "EMLP_GAIN", 90.0)
    assert dual_exposure.run("quick").claims[2].verdict == "does not hold"


def test_the_full_run_cross_validates_a_users_scenes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for seed in range(6):
        made = illuminant_exposures(seed, (8, 8))
        frames = LinearImage(made.long), LinearImage(made.short)
        write_scene(tmp_path / "data" / str(seed), ExposurePair(str(seed), *frames, made.illuminant, made.ratio))
    monkeypatch.setattr(dual_exposure, "FULL_MODELS", ("emlp", "ccc", "eccc"))
    monkeypatch.setattr(dual_exposure, "FULL_FOLDS", 2)
    monkeypatch.setattr(dual_exposure, "FULL_EPOCHS", 1)
    report = dual_exposure.run("full", data=tmp_path / "data", folder=tmp_path / "runs")
    assert [claim.statement.split()[0] for claim in report.claims] == ["emlp", "eccc", "Mixing"]
    assert IlluminantEstimation.load(tmp_path / "runs" / "eccc").folds == 2


def test_bad_budgets_are_named() -> None:
    with pytest.raises(ValueError, match="budget must be 'quick' or 'full', got 'tiny'"):
        dual_exposure.run("tiny")
    with pytest.raises(ValueError, match="budget 'full' needs data and folder"):
        dual_exposure.run("full")
