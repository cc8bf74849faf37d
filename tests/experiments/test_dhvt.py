"""The experiment of DHVT: its verdicts follow from its numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from convatlas.experiments import dhvt
from convatlas.experiments.small_training import Samples, Trained
from convatlas.report import Images, Report, Table
from convatlas.training.settings import Training

UNKNOWN = "cannot be told at this scale"


def _verdicts(report: Report) -> list[str]:
    return [claim.verdict for claim in report.claims]


def _tables(report: Report, title: str) -> list[Table]:
    parts = (part for section in report.sections for part in section.parts)
    return [part for part in parts if isinstance(part, Table) and part.title == title]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Report]:
    """The quick report of given accuracies: the four networks with few images, then two with more."""

    def report(*accuracies: float, noise: float = 0.0, loss: float = 0.1) -> Report:
        left = list(accuracies)

        def compare(networks: dict[str, Any], *_: object, seeds: tuple[int, ...], **__: object) -> dict[str, Any]:
            return {
                name: [
                    Trained(100, accuracy + (noise * (-1) ** seed if name == "DHVT" else 0), [loss]) for seed in seeds
                ]
                for name, accuracy in ((name, left.pop(0)) for name in networks)
            }

        monkeypatch.setattr(dhvt, "compare", compare)
        return dhvt.run("quick")

    return report


def test_quick_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    monkeypatch.setattr(dhvt, "SEEDS", (0, 1))
    monkeypatch.setattr(dhvt, "FEW", 40)
    monkeypatch.setattr(dhvt, "MANY", 80)
    monkeypatch.setattr(dhvt, "COPIES", {40: 2, 80: 1})
    all_digits = dhvt._digits
    monkeypatch.setattr(dhvt, "_digits", lambda count, seed: Samples(*(x[:200] for x in all_digits(count, seed))))
    monkeypatch.setattr(dhvt, "TRAINING", Training(epochs=1, batch_size=40, lr=1e-3, warmup_epochs=0))
    report = dhvt.run("quick")
    few, many = _tables(report, "Accuracy on the test images")
    parameters = [int(row[1] or 0) for row in few.rows]
    assert parameters == pytest.approx([parameters[0]] * 4, rel=0.08)
    assert [row[:2] for row in many.rows] == [row[:2] for row in few.rows[:2]]
    assert all(0 < float(row[-1] or 0) < 60 for row in (*few.rows, *many.rows))  # of 10 classes
    differences = [float(few.rows[0][column] or 0) - float(few.rows[1][column] or 0) for column in (2, 3)]
    assert report.claims[0].values == pytest.approx(differences)
    pictures = next(part for section in report.sections for part in section.parts if isinstance(part, Images))
    assert all(pixels.shape == (dhvt.SIDE, dhvt.SIDE) and pixels.std() > 20 for pixels, _ in pictures.images)
    assert "head tokens" in report.to_html()


def test_verdicts_follow_from_the_accuracies(measured: Callable[..., Report]) -> None:
    assert _verdicts(measured(90, 80, 85, 85, 95, 92)) == ["holds"] * 4
    assert _verdicts(measured(90, 88, 85, 85, 95, 92)) == ["does not hold", "holds", "holds", "does not hold"]
    assert _verdicts(measured(90, 80, 95, 85, 95, 92))[2] == "does not hold"
    assert _verdicts(measured(90, 80, 85, 95, 95, 92))[1] == "does not hold"
    assert _verdicts(measured(90, 80, 85, 85, 95, 92, loss=1.0)) == ["holds"] * 3 + [UNKNOWN]
    assert _verdicts(measured(30, 20, 15, 15, 95, 92)) == [UNKNOWN] * 4
    assert _verdicts(measured(90, 80, 89, 89, 95, 85.5, noise=4))[1:3] == [UNKNOWN] * 2


def test_steps_do_not_depend_on_the_number_of_images() -> None:
    few, many = (dhvt._digits(count, 0) for count in (dhvt.FEW, dhvt.MANY))
    assert len(few.images) == len(many.images) == dhvt.MANY
    assert len(few.test_images) == 1797 - dhvt.FEW
    assert not few.images[: dhvt.FEW].equal(few.images[dhvt.FEW : 2 * dhvt.FEW])  # shifted otherwise
    assert few.labels[: dhvt.FEW].equal(few.labels[dhvt.FEW : 2 * dhvt.FEW])


def test_full_trains_by_recipe(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    monkeypatch.setattr(dhvt, "TOP1", {"dhvt_tiny_cifar_patch4": 80.93})
    report = dhvt.full(
        pictures,
        tmp_path,
        epochs=1,
        warmup_epochs=0,
        batch_size=8,
        accumulate=1,
        options={"depth": 1, "dim": 16, "num_heads": 2},
        accelerator="cpu",
    )
    assert _verdicts(report) == [UNKNOWN]
    assert [(row[0], row[3]) for row in _tables(report, "Trained here")[0].rows] == [("dhvt_tiny_cifar_patch4", 80.93)]
    assert (tmp_path / "dhvt_tiny_cifar_patch4" / "config.yaml").is_file()


def test_budget_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="budget must be 'quick' or 'full', got 'slow'"):
        dhvt.run("slow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"needs data and folder, got .* and None"):
        dhvt.run("full", data=tmp_path)
