"""The experiment of DeepMAD: its verdicts follow from its numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from convatlas.experiments import deepmad
from convatlas.experiments.small_training import Trained
from convatlas.report import Report, Table
from convatlas.training.settings import Training

UNKNOWN = "cannot be told at this scale"
TRAINED = ("designed, rho_0 = 0.5", "designed, rho_0 = 1", "designed, rho_0 = 2", "random", "by hand")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    monkeypatch.setattr(deepmad, "PUBLISHED_CANDIDATES", 100)
    monkeypatch.setattr(deepmad, "PUBLISHED_STARTS", 1)
    monkeypatch.setattr(deepmad, "CANDIDATES", 200)
    monkeypatch.setattr(deepmad, "RANDOM_STEPS", 5)
    monkeypatch.setattr(deepmad, "RANDOM_SHARE", 0.4)
    monkeypatch.setattr(deepmad, "PAIRS", 1)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """The verdicts of given accuracies, in the order of ``TRAINED``."""
    monkeypatch.setattr(deepmad, "_relaxed", lambda advance: 60_000.0)

    def verdicts(*accuracies: float, noise: float = 0.1) -> list[str]:
        def compare(networks: dict[str, Any], *_: object, seeds: tuple[int, ...], **__: object) -> dict[str, Any]:
            assert tuple(networks) == TRAINED
            found = {}
            for name, accuracy in zip(networks, accuracies, strict=True):
                signs = {"random": 1, "by hand": -1}.get(name, 0)
                found[name] = [Trained(100, accuracy + noise * signs * (seed - 1), [1.0]) for seed in seeds]
            return found

        monkeypatch.setattr(deepmad, "compare", compare)
        return [claim.verdict for claim in deepmad.run("quick").claims]

    return verdicts


def test_verdicts_follow_from_the_accuracies(measured: Callable[..., list[str]]):
    assert measured(95, 90, 50, 94, 93)[1:] == ["holds"] * 5
    assert measured(95, 90, 97, 96, 97)[3:] == ["does not hold"] * 3
    assert measured(95, 90, 50, 94, 93, noise=5)[3:] == [UNKNOWN, UNKNOWN, "holds"]
    assert measured(70, 60, 50, 65, 60)[3:] == [UNKNOWN] * 3


def test_a_search_of_a_hundred_candidates_falls_short(measured: Callable[..., list[str]]):
    assert measured(95, 90, 50, 94, 93)[0] == "does not hold"


@pytest.mark.slow
def test_quick_runs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(deepmad, "SEEDS", (0, 1))
    monkeypatch.setattr(deepmad, "DEEPER", (0.6,))
    monkeypatch.setattr(deepmad, "TRAIN_FRACTION", 0.05)
    monkeypatch.setattr(deepmad, "TRAINING", Training(epochs=1, batch_size=32, lr=3e-3, warmup_epochs=0))
    report = deepmad.run("quick")
    assert len(report.claims) == 6
    assert report.claims[1].verdict == "holds"
    assert _table(report, "Accuracy on the test images").rows[0][0] == "designed, rho_0 = 0.5"
    sizes = [int(row[4] or 0) for row in _table(report, "What was found for the small networks").rows]
    assert all(1e4 < size <= deepmad.PARAMS for size in sizes)
    assert "Accuracy and effectiveness" in report.to_html()


def _table(report: Report, title: str) -> Table:
    return next(
        part for section in report.sections for part in section.parts if isinstance(part, Table) and part.title == title
    )


def test_random_networks_differ_and_are_within_the_budgets():
    first, second = deepmad._random(0), deepmad._random(1)
    assert first != second
    assert deepmad._random(0) == first
    program = deepmad._program(deepmad.RHO)
    for structure in (first, second, deepmad.BY_HAND):
        assert program.violation(structure) is None
    used = program.used(deepmad.BY_HAND)
    assert 0.93 < used["params"][0] / used["params"][1] < 0.95


@pytest.mark.slow
def test_full_trains_by_recipe(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(deepmad, "TOP1", {"deepmad_r18": 77.7, "deepmad": 70.0})  # both take a structure
    tiny = {"structure": [["ConvKXBNRELU", 3, 8, 3, 2], ["SuperResK1KXK1", 8, 8, 3, 2, 1, 8]]}
    report = deepmad.full(
        pictures, tmp_path, epochs=1, warmup_epochs=0, batch_size=8, image_size=32, options=tiny, accelerator="cpu"
    )
    assert [claim.verdict for claim in report.claims] == [UNKNOWN] * 2
    assert [(row[0], row[3]) for row in _table(report, "Trained here").rows] == [
        ("deepmad_r18", 77.7),
        ("deepmad", 70.0),
    ]
    assert len(_table(report, "Published weights").rows) == 7


def test_budget_is_checked(tmp_path: Path):
    with pytest.raises(ValueError, match="budget must be 'quick' or 'full', got 'slow'"):
        deepmad.run("slow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"needs data and folder, got .* and None"):
        deepmad.run("full", data=tmp_path)
