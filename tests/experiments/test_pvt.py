"""The experiment of PVT: its verdicts follow from its numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convatlas.experiments import pvt
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
    """The quick report of given mean IoUs, shares at the edges and times; ``spread`` makes the times unsteady."""
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    totals = {"pyramid": (446_101, 11_772_928), "column": (434_469, 7_047_680)}
    monkeypatch.setattr(pvt, "_totals", lambda: totals)
    monkeypatch.setattr(pvt, "TRAIN_IMAGES", 1)
    monkeypatch.setattr(pvt, "TEST_IMAGES", 1)

    def report(
        pyramid: float = 40.0, column: float = 30.0, edges: float = 60.0, faster: float = 10.0, spread: float = 0.0
    ) -> Report:
        def train(network: object, *_: object) -> pvt._Segmented:
            mine = isinstance(network, pvt._PyramidSegmenter)
            pictures = np.zeros((1, pvt.SIDE, pvt.SIDE), np.int64)
            return pvt._Segmented(pyramid if mine else column, edges if mine else 50.0, [1.0, 0.5], pictures)

        times = [0.1 * faster * (1 + spread * (index % 2)) for index in range(pvt.PAIRS)]
        monkeypatch.setattr(pvt, "_train", train)
        monkeypatch.setattr(pvt, "_time_attention", lambda _: pvt._AttentionTimes(times, [0.1] * pvt.PAIRS))
        return pvt.run("quick")

    return report


def test_quick_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    for name, value in {
        "SEEDS": (0, 1),
        "STEPS": 3,
        "BATCH": 4,
        "TRAIN_IMAGES": 8,
        "TEST_IMAGES": 5,
        "PAIRS": 3,
    }.items():
        monkeypatch.setattr(pvt, name, value)
    monkeypatch.setattr(pvt, "TRAINING", Training(epochs=3, batch_size=4, lr=1e-3, warmup_epochs=1))
    monkeypatch.setattr(pvt, "ATTENTION", (8, 8, 8))
    report = pvt.run("quick")
    table = _table(report, "Segmentation")
    parameters = [int(row[1] or 0) for row in table.rows]
    assert parameters == [446_101, 434_469]
    assert all(0 <= float(row[-2] or 0) <= 100 for row in table.rows)
    assert report.claims[0].values == pytest.approx(
        [float(table.rows[0][column] or 0) - float(table.rows[1][column] or 0) for column in (4, 5)]
    )
    pictures = next(part for section in report.sections for part in section.parts if isinstance(part, Images))
    assert [caption for _, caption in pictures.images[:4]] == ["image", "truth", "pyramid", "column"]
    assert "Semantic FPN" in report.to_html()


def test_verdicts_follow_from_the_numbers(measured: Callable[..., Report]) -> None:
    assert _verdicts(measured()) == ["holds"] * 5
    assert _verdicts(measured(column=36.0))[0] == "does not hold"
    assert _verdicts(measured(edges=53.0))[1] == "does not hold"
    assert _verdicts(measured(pyramid=20.0))[:2] == [UNKNOWN] * 2
    assert _verdicts(measured(faster=7.0))[4] == "does not hold"
    assert _verdicts(measured(spread=1.0))[4] == UNKNOWN


def test_products_are_counted(measured: Callable[..., Report]) -> None:
    report = measured()
    assert report.claims[3].values == (64,)
    positions = 56 * 56
    assert [row[2] for row in _table(report, "Attention of the first stage").rows] == [
        2 * positions**2 * 64,
        2 * positions * positions // 64 * 64,
    ]
    macs = [float(row[2] or 0) for row in _table(report, "Segmentation").rows]
    assert report.claims[2].values == pytest.approx([macs[1] / 4**2 / (macs[0] / 16**2)])


def test_shapes_are_drawn_where_the_labels_say() -> None:
    images, labels = pvt._shapes(50, torch.Generator().manual_seed(0))
    again, _ = pvt._shapes(50, torch.Generator().manual_seed(0))
    assert torch.equal(images, again)
    assert set(labels.unique().tolist()) == set(range(len(pvt.CLASSES)))
    strength = images[:, 0].abs()
    assert strength[labels > 0].mean() > 2 * strength[labels == 0].mean()


def test_mean_iou_and_edges() -> None:
    labels = torch.zeros(1, 4, 4, dtype=torch.long)
    labels[:, :, 2:] = 1
    predicted = labels.clone()
    predicted[0, 0] = 0
    expected = (8 / 10 + 6 / 8) / len(pvt.CLASSES)  # classes that occur nowhere count as missed
    assert pvt._mean_iou(predicted, labels) == pytest.approx(expected)
    assert torch.equal(pvt._edges(labels)[0].nonzero()[:, 1].unique(), torch.tensor([1, 2]))


def test_full_trains_by_recipe(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    changes: dict[str, Any] = {
        "epochs": 1,
        "warmup_epochs": 0,
        "cooldown_epochs": 0,
        "batch_size": 8,
        "accumulate": 1,
        "image_size": 32,
        "options": {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8], "num_heads": [1, 1, 2, 2]},
        "accelerator": "cpu",
    }
    report = pvt.full(pictures, tmp_path, models=("pvt_tiny", "pvt_v2_b0"), **changes)
    assert _verdicts(report) == [UNKNOWN] * 2
    trained = _table(report, "Trained here")
    assert [(row[0], row[3]) for row in trained.rows] == [("pvt_tiny", 75.1), ("pvt_v2_b0", 70.5)]
    weights = _table(report, "Published weights")
    assert [row[0] for row in weights.rows] == list(pvt.WEIGHTS)
    assert all(row[3] == "the images have 2 classes, the weights 1000" for row in weights.rows)
    assert (tmp_path / "pvt_tiny" / "report.html").stat().st_size > 1000


def test_budget_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="budget must be 'quick' or 'full', got 'slow'"):
        pvt.run("slow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"needs data and folder, got .* and None"):
        pvt.run("full", data=tmp_path)
