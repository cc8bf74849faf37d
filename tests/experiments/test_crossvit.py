"""The experiment of CrossViT: its verdicts follow from its numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from convatlas.data.images import ImageSet, read_images
from convatlas.experiments import crossvit
from convatlas.experiments.small_training import Trained
from convatlas.report import Images, Report, Section, Table
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
    """The quick report of given accuracies; ``noise`` is added to every other one of the exchange."""

    def report(crossing: float = 90.0, apart: float = 80.0, alone: float = 70.0, noise: float = 0.0) -> Report:
        def compare(networks: dict[str, Any], *_: object, seeds: tuple[int, ...], **__: object) -> dict[str, Any]:
            accuracies = zip(networks, (crossing, apart, alone), (noise, 0, 0), strict=True)
            return {
                name: [Trained(100, accuracy + spread * (-1) ** seed, [1.0]) for seed in seeds]
                for name, accuracy, spread in accuracies
            }

        monkeypatch.setattr(crossvit, "TRAIN_IMAGES", 1)
        monkeypatch.setattr(crossvit, "TEST_IMAGES", 8)
        monkeypatch.setattr(crossvit, "compare", compare)
        monkeypatch.setattr(crossvit, "_cost_section", lambda: Section("Cost", []))
        return crossvit.run("quick")

    return report


def test_quick_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    monkeypatch.setattr(crossvit, "SEEDS", (0, 1))
    monkeypatch.setattr(crossvit, "TRAIN_IMAGES", 64)
    monkeypatch.setattr(crossvit, "TEST_IMAGES", 100)
    monkeypatch.setattr(crossvit, "TRAINING", Training(epochs=1, batch_size=32, lr=1e-3, warmup_epochs=0))
    report = crossvit.run("quick")
    accuracy = _table(report, "Accuracy on the test images")
    crossing, apart, alone = (int(row[1] or 0) for row in accuracy.rows)
    assert apart < crossing
    assert alone == pytest.approx(crossing, rel=0.05)
    assert all(0 < float(row[-1] or 0) < 60 for row in accuracy.rows)  # of 10 classes
    differences = [float(accuracy.rows[0][column] or 0) - float(accuracy.rows[1][column] or 0) for column in (2, 3)]
    assert report.claims[0].values == pytest.approx(differences)
    assert report.claims[2].verdict == "holds"
    (by_class, merged, by_all) = _table(report, "One exchange of crossvit_15_224").rows
    assert float(merged[1] or 0) < 0.05 * float(by_class[1] or 0)
    # Queries and what is projected are one token each; of the others there are keys, values and two products.
    exact = sum(2 * width * ((1 + patches) * (width + 1)) for width, patches in ((192, 400), (384, 196)))
    exact += sum(2 * width**2 + 2 * 192 * 384 for width in (192, 384))
    assert by_class[1] == pytest.approx(exact / 1e6)
    every = 401 + 197
    assert by_all[1] == pytest.approx((2 * 401 * 192 * 384 + 4 * every * 384**2 + 2 * every**2 * 384) / 1e6)
    pictures = next(part for section in report.sections for part in section.parts if isinstance(part, Images))
    assert all(pixels.shape == (32, 32) and pixels.std() > 20 for pixels, _ in pictures.images)
    assert "class token" in report.to_html()


def test_verdicts_follow_from_the_accuracies(measured: Callable[..., Report]) -> None:
    assert _verdicts(measured()) == ["holds"] * 2
    assert _verdicts(measured(apart=95.0)) == ["does not hold", "holds"]
    assert _verdicts(measured(alone=85.0)) == ["holds", "does not hold"]
    assert _verdicts(measured(crossing=30.0, apart=20.0)) == [UNKNOWN] * 2
    assert _verdicts(measured(crossing=81.0, noise=5.0))[0] == UNKNOWN


def test_crowds_are_made_of_digits_of_one_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crossvit, "TRAIN_IMAGES", 20)
    monkeypatch.setattr(crossvit, "TEST_IMAGES", 20)
    samples = crossvit._crowds(0)
    assert samples.images.shape == samples.test_images.shape == (20, 1, 32, 32)

    def tiles(images: Tensor) -> set[bytes]:
        return {tile.numpy().tobytes() for tile in images.unfold(2, 8, 8).unfold(3, 8, 8).reshape(-1, 64)}

    digits = read_images("digits")["all"]
    known = {tile.numpy().tobytes(): int(label) for tile, label in zip(_flat(digits), digits.labels, strict=True)}
    assert tiles(samples.images) | tiles(samples.test_images) <= known.keys()
    assert not tiles(samples.images) & tiles(samples.test_images)
    for image, label in zip(samples.images, samples.labels.tolist(), strict=True):
        cut = image[0].unfold(0, 8, 8).unfold(1, 8, 8).reshape(-1, 64)
        assert [known[tile.numpy().tobytes()] for tile in cut].count(label) == crossvit.SAME


def _flat(digits: ImageSet) -> Tensor:
    pixels = torch.stack([torch.tensor(digits.image(index)[..., 0]) for index in range(len(digits))])
    return (pixels.flatten(1).float() / 255 - 0.5) / 0.25


def test_full_trains_by_recipe(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    report = crossvit.full(
        pictures,
        tmp_path,
        epochs=1,
        warmup_epochs=0,
        batch_size=8,
        accumulate=1,
        image_size=32,
        options={"depths": [[1, 1, 0]], "dims": [8, 8], "num_heads": [1, 2]},
        accelerator="cpu",
    )
    assert _verdicts(report) == [UNKNOWN]
    assert [(row[0], row[3]) for row in _table(report, "Trained here").rows] == [("crossvit_9_dagger_224", 77.1)]
    assert len(_table(report, "Published weights").rows) == 11
    assert (tmp_path / "crossvit_9_dagger_224" / "config.yaml").is_file()


def test_budget_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="budget must be 'quick' or 'full', got 'slow'"):
        crossvit.run("slow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"needs data and folder, got .* and None"):
        crossvit.run("full", data=tmp_path)
