"""The experiment of TVConv: its verdicts follow from its numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from convatlas.experiments import tvconv
from convatlas.experiments.small_training import Trained
from convatlas.report import Images
from convatlas.training.settings import Training

UNKNOWN = "cannot be told at this scale"


def test_quick_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    monkeypatch.setattr(tvconv, "SEEDS", (0, 1))
    monkeypatch.setattr(tvconv, "TRAINING", Training(epochs=1, batch_size=32, lr=3e-3))
    monkeypatch.setattr(tvconv, "TRAIN_FRACTION", 0.05)
    monkeypatch.setattr(tvconv, "WIDTH", 8)
    report = tvconv.run("quick")
    assert [claim.verdict for claim in report.claims] == [UNKNOWN, UNKNOWN, "holds"]
    [images] = [part for part in report.sections[1].parts if isinstance(part, Images)]
    assert len(images.images) == 8
    assert all(pixels.max() == 255 for pixels, _ in images.images)
    assert "TVConv" in report.to_html()


@pytest.mark.parametrize(
    ("fixed", "shifted", "verdicts"),
    [
        ((80.0, 95.0), (80.0, 82.0), ["holds", "holds"]),
        ((80.0, 75.0), (80.0, 82.0), ["does not hold", "does not hold"]),
        ((20.0, 95.0), (80.0, 82.0), [UNKNOWN, UNKNOWN]),
    ],
)
def test_verdicts_follow_the_accuracies(
    fixed: tuple[float, float], shifted: tuple[float, float], verdicts: list[str]
) -> None:
    def results(accuracies: tuple[float, float]) -> dict[str, Any]:
        return {
            kind: [Trained(100, accuracy + 0.1 * seed, [1.0]) for seed in tvconv.SEEDS]
            for kind, accuracy in zip((tvconv.PLAIN, tvconv.VARIANT), accuracies, strict=True)
        }

    section = tvconv._accuracy_section(results(fixed), results(shifted))
    assert [part.verdict for part in section.parts[:2]] == verdicts  # type: ignore[union-attr]


def test_digits_stand_in_the_middle_or_anywhere() -> None:
    pictures = torch.ones(30, 1, 32, 32)
    middle, anywhere = tvconv._placed(pictures, None), tvconv._placed(pictures, 0)
    assert middle[:, :, 2:10, 2:10].min() == 1
    assert middle.sum((1, 2, 3)).tolist() == anywhere.sum((1, 2, 3)).tolist() == [64.0] * 30
    assert len({tuple(picture[0].nonzero()[0].tolist()) for picture in anywhere}) > 10


def test_only_quick_is_possible() -> None:
    with pytest.raises(ValueError, match=r"budget must be 'quick', got 'full'.*the recipe tvconv_face"):
        tvconv.run("full")
