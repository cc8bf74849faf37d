"""The experiment of a priori compression: its verdicts follow from its numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from convatlas.experiments import apriori_compression as experiment
from convatlas.report import Report, Table

UNKNOWN = "cannot be told at this scale"


def _verdicts(report: Report) -> list[str]:
    return [claim.verdict for claim in report.claims]


def _table(report: Report, title: str) -> Any:
    parts = (part for section in report.sections for part in section.parts)
    return next(part for part in parts if isinstance(part, Table) and part.title == title)


def test_quick_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    for name, value in {
        "SEEDS": (0,),
        "TRAIN": 3,
        "TEST": 2,
        "SIZE": 10,
        "FRAMES": 9,
        "ROLLOUT": 3,
        "STEPS": 3,
    }.items():
        monkeypatch.setattr(experiment, name, value)
    monkeypatch.setattr(experiment, "NETWORK", experiment.NETWORK.override(widths=(4, 8)))
    monkeypatch.setattr(experiment, "resolved", lambda differences: True)
    report = experiment.run("quick")
    rows = _table(report, "Relative L2 error, mean of the seeds").rows
    assert [row[0] for row in rows[:3]] == list(experiment.KERNELS)
    assert rows[0][1] > rows[2][1] > rows[1][1]
    assert all(0 < value < 100 for row in rows[:3] for value in row[2:])
    assert _verdicts(report)[:5] == [UNKNOWN] * 5  # three steps are too few to learn
    assert _verdicts(report)[5] == "holds"
    counted = _table(report, "Parameters").rows[0]
    assert counted[1:3] == (196_423, 1_700_225)
    assert "one-way" in report.to_html()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Report]:
    """The quick report of given errors of a step, of a rollout and on training scenes, and bytes."""
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    monkeypatch.setattr(experiment, "wave_dataset", lambda *_, **__: None)

    def report(
        dense: tuple[float, float, float] = (0.1, 0.3, 0.05),
        one: tuple[float, float, float] = (0.11, 0.33, 0.08),
        two: tuple[float, float, float] = (0.1, 0.3, 0.06),
        memory: int = 100,
        noise: float = 0.0,
    ) -> Report:
        given = dict(zip((("dense", 1), ("oneway", 1), ("oneway", 2)), (dense, one, two), strict=True))

        def train(network: Any, scenes: object, seed: int) -> Any:
            config = network.config
            step, rollout, own = given[config.kernel, config.rank]
            held = 1000 if config.kernel == "dense" else memory
            own += (noise * (-1) ** seed if config.kernel == "oneway" else 0) + 1e-4 * seed
            return experiment._Trained(step, rollout, own, [0.1] * experiment.ROLLOUT, held, 10, 0.5)

        monkeypatch.setattr(experiment, "_train", train)
        return experiment.quick()

    return report


def test_verdicts(measured: Callable[..., Report]) -> None:
    assert _verdicts(measured()) == ["holds"] * 7
    worse = _verdicts(measured(one=(0.13, 0.33, 0.04), two=(0.1, 0.4, 0.06), memory=300))
    assert worse == ["does not hold", "holds", "holds", "does not hold", "does not hold", "holds", "does not hold"]
    assert _verdicts(measured(dense=(0.2, 0.3, 0.1)))[:5] == [UNKNOWN] * 5  # not learned
    assert _verdicts(measured(noise=0.2))[4] == UNKNOWN  # not resolved


def test_full_trains_by_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    monkeypatch.setattr(Report, "to_html", lambda report: report.title)  # the figures take long
    scenes = {"scenes": 5, "size": 8, "frames": 9}
    options = {"widths": [4, 4], "depth": 1}
    report = experiment.full(
        "simulated", tmp_path, epochs=1, batch_size=4, simulation=scenes, options=options, horizon=3
    )
    assert _verdicts(report) == [UNKNOWN] * 4
    rows = _table(report, "Trained here").rows
    assert rows[0][1] > rows[2][1] > rows[1][1]
    assert (tmp_path / "wave_surrogate_oneway" / "report.html").is_file()


def test_budget_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="budget must be 'quick' or 'full', got 'slow'"):
        experiment.run("slow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"needs data and folder, got .* and None"):
        experiment.run("full", data=tmp_path)
