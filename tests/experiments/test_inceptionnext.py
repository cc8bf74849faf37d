"""The experiment of InceptionNeXt: its verdicts follow from its numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from convatlas.experiments import inceptionnext, small_training
from convatlas.experiments.small_training import Trained
from convatlas.report import Report, Table
from convatlas.training.settings import Training

TINY = {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]}
UNKNOWN = "cannot be told at this scale"


def _verdicts(report: Report) -> list[str]:
    return [claim.verdict for claim in report.claims]


def _table(report: Report, title: str) -> Table:
    return next(
        part for section in report.sections for part in section.parts if isinstance(part, Table) and part.title == title
    )


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Report]:
    """The quick report of given accuracies, time ratio, its spread and the largest error."""

    def report(
        square: float = 97.0,
        inception: float = 97.0,
        none: float = 85.0,
        ratio: float = 1.5,
        spread: float = 0.1,
        error: float = 1e-6,
    ) -> Report:
        def compare(networks: dict[str, Any], *_: object, seeds: tuple[int, ...], **__: object) -> dict[str, Any]:
            accuracies = zip(networks, (square, inception, none), strict=True)
            return {name: [Trained(1, accuracy, [1.0])] * len(seeds) for name, accuracy in accuracies}

        def timing(*_: object) -> inceptionnext._OperatorTiming:
            return inceptionnext._OperatorTiming(
                inceptionnext._Timing(ratio, 1.0, ("NCHW", "NHWC"), ratio, spread), error
            )

        monkeypatch.setattr(inceptionnext, "compare", compare)
        monkeypatch.setattr(inceptionnext, "_operator_timing", timing)
        return inceptionnext.run("quick")

    return report


def test_quick_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    monkeypatch.setattr(inceptionnext, "SEEDS", (0, 1))
    monkeypatch.setattr(inceptionnext, "NETWORK", inceptionnext.NETWORK.override(dims=(16, 24)))
    monkeypatch.setattr(inceptionnext, "TRAINING", Training(epochs=6, batch_size=16, lr=3e-3, warmup_epochs=1))
    monkeypatch.setattr(inceptionnext, "TRAIN_FRACTION", 0.1)
    monkeypatch.setattr(inceptionnext, "OPERATOR_SIZES", ((16, 7),))
    monkeypatch.setattr(inceptionnext, "PAIRS", 3)
    threads = torch.get_num_threads()
    report = inceptionnext.run("quick")
    assert torch.get_num_threads() == threads
    assert len(report.claims) == 4
    accuracy = _table(report, "Accuracy on the test images")
    assert [row[0] for row in accuracy.rows] == ["7 x 7 depthwise", "Inception depthwise", "none (identity)"]
    for _, parameters, first, second, mean in accuracy.rows:
        assert isinstance(parameters, int)
        assert 30 < float(mean or 0) < 100  # of 10 classes
        assert mean == pytest.approx((float(first or 0) + float(second or 0)) / 2)
    assert report.claims[0].values == pytest.approx(
        [float(accuracy.rows[1][column] or 0) - float(accuracy.rows[0][column] or 0) for column in (2, 3)]
    )
    times = _table(report, "Time of the operator")
    assert len(times.rows) == 2
    for row in times.rows:
        assert float(row[2] or 0) > 0 < float(row[3] or 0)
        assert 0 < float(row[7] or 0) < inceptionnext.EXACT
    assert json.loads(report.to_json())["claims"]
    assert "Inception depthwise" in report.to_html()


def test_verdicts_follow_from_the_accuracies(measured: Callable[..., Report]) -> None:
    assert _verdicts(measured())[:2] == ["holds", "holds"]
    assert _verdicts(measured(inception=96.1))[0] == "holds"
    assert _verdicts(measured(inception=95.9))[0] == "does not hold"
    assert _verdicts(measured(none=94.1))[1] == "does not hold"
    assert _verdicts(measured(square=80, inception=80))[:2] == [UNKNOWN, UNKNOWN]
    claim = measured(inception=95.5).claims[0]
    assert claim.values == (-1.5,) * 3
    assert claim.threshold == "at least -1 points"


def test_verdicts_follow_from_the_times(measured: Callable[..., Report]) -> None:
    assert _verdicts(measured())[3:] == ["holds", "holds"]
    assert _verdicts(measured(ratio=0.9))[3:] == ["does not hold"] * 2
    assert _verdicts(measured(spread=1.0))[3:] == [UNKNOWN] * 2
    assert _verdicts(measured(error=0.1))[3:] == [UNKNOWN] * 2


def test_weights_are_counted(measured: Callable[..., Report], monkeypatch: pytest.MonkeyPatch) -> None:
    report = measured()
    assert report.claims[2].verdict == "holds"
    assert report.claims[2].values == pytest.approx([49 / 3.875])
    assert [row[:3] for row in _table(report, "Weights of a token mixer, without biases").rows] == [
        (96, 49 * 96, 372),
        (192, 49 * 192, 744),
        (384, 49 * 384, 1488),
        (768, 49 * 768, 2976),
    ]
    assert _table(report, "Parameters of the whole networks").rows == (
        ("convnext_tiny", 28_589_128),
        ("inceptionnext_tiny", 28_055_680),
    )
    monkeypatch.setattr(inceptionnext, "WEIGHT_RATIO", 13)
    assert measured().claims[2].verdict == "does not hold"
    assert measured().summary == "Verdicts on 5 claims: 4 x holds, 1 x does not hold."


def test_alternate_takes_the_fastest_form() -> None:
    def work(size: int) -> Callable[[], object]:
        x = torch.ones(size, size)
        return lambda: x @ x

    timing = inceptionnext._alternate({"slow": work(600), "fast": work(200)}, {"only": work(2)}, pairs=5)
    assert timing.formats == ("fast", "only")
    assert timing.ratio > 1
    assert timing.first > timing.second > 0


def test_full_trains_by_recipe(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    monkeypatch.setattr(inceptionnext, "STEP_BATCH", 2)
    monkeypatch.setattr(inceptionnext, "STEP_PAIRS", 2)
    changes: dict[str, Any] = {
        "epochs": 1,
        "warmup_epochs": 0,
        "cooldown_epochs": 0,
        "batch_size": 8,
        "accumulate": 1,
        "image_size": 32,
        "options": TINY,
        "accelerator": "cpu",
    }
    report = inceptionnext.full(pictures, tmp_path, **changes)
    assert _verdicts(report) == [UNKNOWN] * 3
    trained = _table(report, "Trained here")
    assert [row[0] for row in trained.rows] == ["inceptionnext_tiny", "convnext_tiny"]
    assert [row[3] for row in trained.rows] == [82.3, 82.1]
    assert all(0 <= float(row[2] or 0) <= 100 for row in trained.rows)
    weights = _table(report, "Published weights")
    assert [row[1] for row in weights.rows] == [75.3, 82.3, 83.5, 84.0, 85.2]
    assert all(row[3] == "the images have 2 classes, the weights 1000" for row in weights.rows)
    assert all(float(row[1] or 0) > 0 for row in _table(report, "Training step").rows)
    for model in inceptionnext.RECIPES:
        assert (tmp_path / model / "report.html").stat().st_size > 1000
    assert "convnext_tiny/report.html" in report.to_html()
    # The same folder goes on with what is there; here nothing is left to do.
    before = (tmp_path / "convnext_tiny" / "metrics.csv").read_bytes()
    run = small_training.train_by_recipe(
        "convnext_study", tmp_path / "convnext_tiny", **{"data": str(pictures), "model": "convnext_tiny", **changes}
    )
    assert run.run.metrics.read_bytes() == before
    with pytest.raises(ValueError, match=r"lr was 0\.004, now it is 1\.0"):
        small_training.train_by_recipe(
            "convnext_study", tmp_path / "convnext_tiny", data=str(pictures), model="convnext_tiny", **changes, lr=1.0
        )


def test_budget_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="budget must be 'quick' or 'full', got 'slow'"):
        inceptionnext.run("slow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs data and folder, got None and"):
        inceptionnext.run("full", folder=tmp_path)


def test_thresholds_are_those_of_the_paper() -> None:
    assert inceptionnext.WEIGHT_RATIO == pytest.approx(49 / 3.9, abs=0.1)
    assert inceptionnext.NOT_SLOWER == 1
    assert len(inceptionnext.SEEDS) >= 3
