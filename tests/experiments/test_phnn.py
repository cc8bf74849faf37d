"""The experiment of PHNN: its verdicts follow from its numbers."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from convatlas.experiments import phnn
from convatlas.experiments.small_training import Trained
from convatlas.ops.hypercomplex import hypercomplex_algebra
from convatlas.report import Images, Report, Table
from convatlas.training.settings import Training

UNKNOWN = "cannot be told at this scale"


def _verdicts(report: Report) -> list[str]:
    return [claim.verdict for claim in report.claims]


def _part(report: Report, kind: type[Any], title: str) -> Any:
    parts = (part for section in report.sections for part in section.parts)
    return next(part for part in parts if isinstance(part, kind) and part.title == title)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Report]:
    """The quick report of given accuracies; ``noise`` is added to every other accuracy of n = 3."""
    monkeypatch.setattr(phnn, "RULE_STEPS", 2)
    monkeypatch.setattr(phnn, "COUNTED", {"phresnet20": (2, 4)})

    def report(
        real: float = 95.0, three: float = 96.0, four: float = 96.0, quaternion: float = 95.0, noise: float = 0.0
    ) -> Report:
        def compare(networks: dict[str, Any], *_: object, seeds: tuple[int, ...], **__: object) -> dict[str, Any]:
            accuracies = dict(zip(networks, (real, three, four, quaternion), strict=True))
            return {
                name: [Trained(100, value + (noise * (-1) ** seed if value is three else 0), [1.0]) for seed in seeds]
                for name, value in accuracies.items()
            }

        monkeypatch.setattr(phnn, "compare", compare)
        return phnn.run("quick")

    return report


def test_quick_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    monkeypatch.setattr(phnn, "SEEDS", (0, 1))
    monkeypatch.setattr(phnn, "RULE_STEPS", 120)
    monkeypatch.setattr(phnn, "COUNTED", {"phresnet20": (2, 4)})
    monkeypatch.setattr(phnn, "NETWORK", phnn.NETWORK.override(depths=(1, 1), widths=(12, 12)))
    monkeypatch.setattr(phnn, "TRAINING", Training(epochs=1, batch_size=16, warmup_epochs=0))
    monkeypatch.setattr(phnn, "TRAIN_FRACTION", 0.1)
    report = phnn.run("quick")
    accuracy = _part(report, Table, "Accuracy on the test images")
    assert [row[0] for row in accuracy.rows] == ["real", "learned, n = 3", "learned, n = 4", "quaternion"]
    real, three, four, quaternion = (int(row[1]) for row in accuracy.rows)
    assert real > three > four > quaternion
    assert four - quaternion == 6 * 4**3
    assert 5 < statistics.mean(row[-1] for row in accuracy.rows) < 100  # of 10 classes, after 12 steps
    assert report.claims[0].values[0] < 0.1
    picture = _part(report, Images, "The four matrices of A").images[1][0]
    assert picture.shape == (4, 19, 3)
    assert picture[0, 0].tolist() == [255, 0, 0]
    assert picture[0, 6].tolist() == [0, 0, 255]
    assert "Hamilton" in report.to_html()


def test_rules_are_learned() -> None:
    rule = phnn._learn_rule(5, lambda _: None)
    assert rule.error < 1e-8 < rule.errors[0]
    torch.testing.assert_close(rule.algebra, hypercomplex_algebra("quaternion"), rtol=0, atol=1e-4)


def test_verdicts_on_rules(measured: Callable[..., Report], monkeypatch: pytest.MonkeyPatch) -> None:
    assert _verdicts(measured())[:2] == ["does not hold"] * 2  # two steps are too few
    monkeypatch.setattr(phnn, "RULE_STEPS", 300)
    assert _verdicts(measured())[:2] == ["holds"] * 2


def test_verdicts_on_accuracy(measured: Callable[..., Report]) -> None:
    assert _verdicts(measured())[2:6] == ["holds"] * 4
    assert _verdicts(measured(three=94.0))[2:6] == ["does not hold", "holds", "does not hold", "holds"]
    assert _verdicts(measured(three=92.9))[3] == "does not hold"
    assert _verdicts(measured(four=94.9))[5] == "does not hold"
    assert _verdicts(measured(noise=3.0))[2:5] == [UNKNOWN, "holds", UNKNOWN]
    assert _verdicts(measured(real=89.0))[2:6] == [UNKNOWN] * 4  # not learned


def test_parameters_are_counted(measured: Callable[..., Report], monkeypatch: pytest.MonkeyPatch) -> None:
    report = measured()
    assert _verdicts(report)[6] == "does not hold"  # the algebras of a small network weigh more
    two, four = _part(report, Table, "Parameters").rows
    assert two[3] == four[3] == 272_474  # the plain ResNet20 with shortcuts of option B
    assert report.claims[6].values == pytest.approx([4 * four[2] / 272_474])
    monkeypatch.setattr(phnn, "COUNTED", {"phresnet18": (2, 4)})
    report = measured()
    assert _verdicts(report)[6] == "holds"
    assert [row[2] for row in _part(report, Table, "Parameters").rows] == [5_599_594, 2_810_762]


def test_colours_are_random_but_repeat() -> None:
    grey = torch.rand(5, 1, 8, 8)
    coloured = phnn._coloured(grey, 3)
    assert coloured.shape == (5, 3, 4, 4)
    assert torch.equal(coloured, phnn._coloured(grey, 3))
    assert not torch.equal(coloured, phnn._coloured(grey, 4))
    share = coloured / coloured[:, :1]
    torch.testing.assert_close(share, share[:, :, :1, :1].expand_as(share))


def test_full_trains_by_recipe(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    report = phnn.full(
        pictures,
        tmp_path,
        epochs=1,
        batch_size=3,
        options={"depths": [1, 1], "widths": [12, 12]},
        accelerator="cpu",
    )
    assert _verdicts(report) == [UNKNOWN] * 3
    rows = _part(report, Table, "Trained here").rows
    assert [row[0] for row in rows] == list(phnn.ALGEBRAS)
    assert int(rows[0][1]) > int(rows[1][1]) > int(rows[2][1]) > int(rows[3][1])
    for name in ("real", "learned_3", "learned_4", "quaternion"):
        assert (tmp_path / name / "config.yaml").is_file()


def test_budget_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="budget must be 'quick' or 'full', got 'slow'"):
        phnn.run("slow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"needs data and folder, got .* and None"):
        phnn.run("full", data=tmp_path)
