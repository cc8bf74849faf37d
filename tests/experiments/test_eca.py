"""The experiment of ECA-Net: its verdicts follow from its numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from convatlas.experiments import eca
from convatlas.experiments.small_training import Trained
from convatlas.report import Report, Table
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
    """The quick report of given accuracies and parameters; ``noise`` is added to every other accuracy of ECA."""

    def report(
        plain: float = 95.0, se: float = 96.0, attended: float = 96.0, noise: float = 0.0, se_parameters: int = 5756
    ) -> Report:
        def compare(networks: dict[str, Any], *_: object, seeds: tuple[int, ...], **__: object) -> dict[str, Any]:
            none, excited, with_eca = networks
            return {
                none: [Trained(100, plain, [1.0]) for _ in seeds],
                excited: [Trained(se_parameters, se, [1.0]) for _ in seeds],
                with_eca: [Trained(118, attended + noise * (-1) ** seed, [1.0]) for seed in seeds],
            }

        monkeypatch.setattr(eca, "compare", compare)
        return eca.run("quick")

    return report


def test_quick_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    monkeypatch.setattr(eca, "SEEDS", (0, 1))
    monkeypatch.setattr(eca, "NETWORK", eca.NETWORK.override(depths=(1, 1), widths=(8, 16), stem_width=8))
    monkeypatch.setattr(eca, "TRAINING", Training(epochs=4, batch_size=16, lr=3e-3, warmup_epochs=1))
    monkeypatch.setattr(eca, "TRAIN_FRACTION", 0.1)
    report = eca.run("quick")
    accuracy = _table(report, "Accuracy on the test images")
    plain, se, attended = (int(row[1] or 0) for row in accuracy.rows)
    assert se - plain == (2 * 8 * 2 + 2 + 8) + (2 * 16 * 4 + 4 + 16)
    assert attended - plain == 2 * 3
    assert all(30 < float(row[-1] or 0) < 100 for row in accuracy.rows)  # of 10 classes
    gains = [float(accuracy.rows[2][column] or 0) - float(accuracy.rows[0][column] or 0) for column in (2, 3)]
    assert report.claims[0].values == pytest.approx(gains)
    assert "no attention" in report.to_html()


def test_gain_is_judged_only_where_it_can_be_told(measured: Callable[..., Report]) -> None:
    assert _verdicts(measured())[0] == "holds"
    assert _verdicts(measured(attended=94.0))[0] == "does not hold"
    assert _verdicts(measured(plain=98.0, attended=99.0))[0] == UNKNOWN  # the paper's gain does not fit in
    assert _verdicts(measured(noise=3.0))[0] == UNKNOWN  # within the noise
    assert _verdicts(measured(plain=70.0, se=71.0, attended=71.0))[:3] == [UNKNOWN] * 3  # not learned


def test_other_accuracies(measured: Callable[..., Report]) -> None:
    assert _verdicts(measured())[1:3] == ["holds", "holds"]
    assert _verdicts(measured(attended=93.9))[1] == "does not hold"
    assert _verdicts(measured(attended=95.1))[1:3] == ["holds", "holds"]
    assert _verdicts(measured(attended=94.9))[1:3] == ["holds", "does not hold"]


def test_parameters_are_counted(measured: Callable[..., Report], monkeypatch: pytest.MonkeyPatch) -> None:
    report = measured()
    assert _verdicts(report)[3:] == ["holds", "holds"]
    assert report.claims[3].values == pytest.approx([5656 / 18])
    large = _table(report, "Parameters")
    assert [row[3:] for row in large.rows] == [
        (25_557_032, 0),
        (25_557_032 + 2_530_992, 2_530_992),
        (25_557_112, 80),
    ]
    assert _verdicts(measured(se_parameters=1000))[3] == "does not hold"
    monkeypatch.setattr(eca, "ADDED_TO_RESNET50", 79)
    assert _verdicts(measured())[4] == "does not hold"


def test_full_trains_by_recipe(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    report = eca.full(
        pictures,
        tmp_path,
        epochs=1,
        batch_size=8,
        image_size=32,
        options={"depths": [1, 1, 1, 1], "widths": [4, 4, 4, 4], "stem_width": 4},
        accelerator="cpu",
    )
    assert _verdicts(report) == [UNKNOWN] * 2
    trained = _table(report, "Trained here")
    assert [(row[0], row[3]) for row in trained.rows] == [("eca_resnet50", 77.42), ("resnet50", 75.20)]
    assert int(trained.rows[0][1] or 0) - int(trained.rows[1][1] or 0) == 3 + 5 + 5 + 7
    for model in eca.TOP1:
        assert (tmp_path / model / "config.yaml").is_file()


def test_budget_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="budget must be 'quick' or 'full', got 'slow'"):
        eca.run("slow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"needs data and folder, got .* and None"):
        eca.run("full", data=tmp_path)
