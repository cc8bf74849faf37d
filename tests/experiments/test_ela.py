"""The experiment of ELA: its verdicts follow from its numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from convatlas.experiments import ela
from convatlas.report import Images, Table
from convatlas.training.settings import Training

UNKNOWN = "cannot be told at this scale"


def test_quick_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    monkeypatch.setattr(ela, "SEEDS", (0, 1))
    monkeypatch.setattr(ela, "NETWORK", ela.NETWORK.override(depths=(1,), widths=(16,), stem_width=8))
    monkeypatch.setattr(ela, "TRAINING", Training(epochs=1, batch_size=32, lr=3e-3))
    monkeypatch.setattr(ela, "TRAIN_FRACTION", 0.05)
    monkeypatch.setattr(ela, "SHAPE_IMAGES", (40, 30))
    monkeypatch.setattr(ela, "COUNTED", ("resnet50", "ela_b_resnet50"))
    report = ela.run("quick")
    titles = [section.title for section in report.sections]
    assert titles == ["Shapes", "Where the attention looks", "Shifted digits", "Cost"]
    assert len(report.claims) == 3 + 1 + 3 + 1
    assert report.claims[0].verdict == UNKNOWN  # nothing is learned in an epoch
    assert report.claims[-1].verdict == "holds"
    [table] = [part for part in report.sections[3].parts if isinstance(part, Table)]
    added = {str(row[0]): row[2] for row in table.rows}
    assert added == {"resnet50": 0, "ela_b_resnet50": 9 * 15104}
    [images] = [part for part in report.sections[1].parts if isinstance(part, Images)]
    assert len(images.images) == 8
    assert all(pixels.max() == 255 for pixels, _ in images.images)
    assert "ELA-B" in report.to_html()


def test_shapes_stand_where_it_is_said() -> None:
    pictures, labels, places = ela._shapes(50, 0)
    assert set(labels.tolist()) <= set(range(6))
    assert places.sum((1, 2)).tolist() == [ela.OBJECT**2] * 50
    inside = pictures[:, 0][places].mean()
    assert inside > pictures[:, 0][~places].mean() + 0.3
    assert torch.equal(pictures, ela._shapes(50, 0)[0])


def test_contrast_is_that_of_the_place() -> None:
    places = torch.zeros(2, 4, 4, dtype=torch.bool)
    places[0, :2, :2] = places[1, 2:, 2:] = True
    gates = torch.full((2, 3, 4, 4), 0.25)
    gates[:, 0] += 0.5 * places  # one of three channels marks the object
    assert ela._contrast(gates, places) == pytest.approx(0.5 / 3 / float(gates.mean()))
    # The square of the other picture lies where nothing is marked, and a third of the rest is.
    assert ela._contrast(gates, places.roll(1, 0)) == pytest.approx(0.5 / 3 / 3 / float(gates.mean()))


def test_digits_are_shifted() -> None:
    moved = ela._shifted(torch.ones(20, 1, 32, 32), 0)
    assert moved.sum((1, 2, 3)).tolist() == [256.0] * 20
    assert len({tuple(picture[0].nonzero()[0].tolist()) for picture in moved}) > 10


def test_full_trains_by_recipe(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    options = {"depths": [1, 1, 1, 1], "widths": [8, 8, 8, 8], "stem_width": 4}
    report = ela.full(pictures, tmp_path, epochs=1, batch_size=8, image_size=32, options=options, accelerator="cpu")
    assert [claim.verdict for claim in report.claims] == [UNKNOWN] * 2
    [table] = [part for part in report.sections[0].parts if isinstance(part, Table) and part.title == "Trained here"]
    assert [(row[0], row[3]) for row in table.rows] == [
        ("ela_b_resnet50", None),
        ("eca_resnet50", 77.42),
        ("resnet50", 75.20),
    ]
    assert (tmp_path / "ela_b_resnet50" / "config.yaml").is_file()


def test_budget_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="budget must be 'quick' or 'full', got 'slow'"):
        ela.run("slow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"needs data and folder, got .* and None"):
        ela.run("full", data=tmp_path)
