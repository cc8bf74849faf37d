"""The experiment of CvT: its verdicts follow from its numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from convatlas.experiments import cvt
from convatlas.experiments.small_training import Trained
from convatlas.report import Images, Report, Table
from convatlas.training.settings import Training

UNKNOWN = "cannot be told at this scale"


def _verdicts(report: Report) -> list[str]:
    return [claim.verdict for claim in report.claims]


def _table(report: Report, title: str) -> Table:
    return next(
        part for section in report.sections for part in section.parts if isinstance(part, Table) and part.title == title
    )


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Report]:
    """The quick report of given accuracies; ``noise`` is added to every other one of the convolutions alone."""

    def report(
        conv: float = 80.0, both: float = 80.0, bare: float = 60.0, positions: float = 70.0, noise: float = 0.0
    ) -> Report:
        def compare(networks: dict[str, Any], *_: object, seeds: tuple[int, ...], **__: object) -> dict[str, Any]:
            accuracies = dict(zip(networks, (conv, both, bare, positions), strict=True))
            return {
                name: [
                    Trained(100, accuracy + (noise * (-1) ** seed if name == "convolutions" else 0), [1.0])
                    for seed in seeds
                ]
                for name, accuracy in accuracies.items()
            }

        monkeypatch.setattr(cvt, "compare", compare)
        monkeypatch.setattr(cvt, "_cost_section", lambda: cvt.Section("Cost", []))
        return cvt.run("quick")

    return report


def test_quick_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    monkeypatch.setattr(cvt, "SEEDS", (0, 1))
    monkeypatch.setattr(cvt, "TRAIN_FRACTION", 0.05)
    monkeypatch.setattr(cvt, "COPIES", 1)
    monkeypatch.setattr(cvt, "TRAINING", Training(epochs=1, batch_size=32, lr=1e-3, warmup_epochs=0))
    report = cvt.run("quick")
    accuracy = _table(report, "Accuracy on the test images")
    parameters = [int(row[1] or 0) for row in accuracy.rows]
    table = cvt.NETWORK.dims[0] * (cvt.SIDE // 2) ** 2
    assert parameters[1] - parameters[0] == parameters[3] - parameters[2] == table
    assert all(0 < float(row[-1] or 0) < 60 for row in accuracy.rows)  # of 10 classes
    differences = [float(accuracy.rows[0][column] or 0) - float(accuracy.rows[1][column] or 0) for column in (2, 3)]
    assert report.claims[1].values == pytest.approx(differences)
    assert report.claims[3].verdict == "holds"
    assert report.claims[3].values == pytest.approx([4.566 / 6.643], abs=1e-4)
    pictures = next(part for section in report.sections for part in section.parts if isinstance(part, Images))
    assert all(pixels.shape == (cvt.SIDE, cvt.SIDE) for pixels, _ in pictures.images)
    assert "position embedding" in report.to_html()


def test_verdicts_follow_from_the_accuracies(measured: Callable[..., Report]) -> None:
    assert _verdicts(measured()) == ["holds"] * 3
    assert _verdicts(measured(positions=85.0))[0] == "does not hold"
    assert _verdicts(measured(both=84.0))[1] == "does not hold"
    assert _verdicts(measured(bare=75.0))[2] == "does not hold"
    assert _verdicts(measured(conv=40.0, both=40.0))[:2] == [UNKNOWN] * 2
    assert _verdicts(measured(positions=30.0, bare=20.0))[2] == UNKNOWN
    assert _verdicts(measured(positions=79.0, noise=3.0))[0] == UNKNOWN


def test_digits_are_shifted_as_a_whole() -> None:
    samples = cvt._shifted_digits(0)
    assert samples.images.shape[1:] == samples.test_images.shape[1:] == (1, cvt.SIDE, cvt.SIDE)
    assert len(samples.images) == len(samples.labels) == cvt.COPIES * round(1797 * cvt.TRAIN_FRACTION)
    half = len(samples.images) // cvt.COPIES
    first, second = samples.images[:half], samples.images[half:]
    assert (first.sum((1, 2, 3)) - second.sum((1, 2, 3))).abs().max() < 1e-2  # nothing is cut off
    assert not torch.equal(first, second)


def test_full_trains_by_recipe(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    report = cvt.full(
        pictures,
        tmp_path,
        epochs=1,
        warmup_epochs=0,
        cooldown_epochs=0,
        batch_size=8,
        accumulate=1,
        image_size=32,
        options={"depths": [1, 1, 1], "dims": [8, 8, 8], "num_heads": [1, 2, 2]},
        accelerator="cpu",
    )
    assert _verdicts(report) == [UNKNOWN] * 2
    assert [(row[0], row[3]) for row in _table(report, "Trained here").rows] == [("cvt_13", 81.6), ("cvt_21", 82.5)]
    assert [row[0] for row in _table(report, "Published weights").rows] == list(cvt.WEIGHTS)
    assert (tmp_path / "cvt_21" / "config.yaml").is_file()


def test_budget_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="budget must be 'quick' or 'full', got 'slow'"):
        cvt.run("slow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"needs data and folder, got .* and None"):
        cvt.run("full", data=tmp_path)
