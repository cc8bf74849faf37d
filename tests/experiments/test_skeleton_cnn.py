"""The experiment of Ensem-NN: its verdicts follow from its numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convatlas.data.stick_figures import stick_figures
from convatlas.experiments import skeleton_cnn as experiment
from convatlas.report import Report, Table
from convatlas.training.settings import Training

UNKNOWN = "cannot be told at this scale"


def _verdicts(report: Report) -> list[str]:
    return [claim.verdict for claim in report.claims]


def _table(report: Report, title: str) -> Any:
    parts = (part for section in report.sections for part in section.parts)
    return next(part for part in parts if isinstance(part, Table) and part.title == title)


def test_quick_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    for name, value in {"SEEDS": (0,), "TRAIN": 24, "TEST": 12, "FRAMES": 10}.items():
        monkeypatch.setattr(experiment, name, value)
    network = experiment.NETWORK.override(frames=10, widths=(6, 8), depths=(1, 1), reduction=2)
    monkeypatch.setattr(experiment, "NETWORK", network)
    monkeypatch.setattr(experiment, "TRAINING", Training(epochs=1, batch_size=8, warmup_epochs=0))
    report = experiment.run("quick")
    rows = _table(report, "Accuracy on the test clips").rows
    assert [row[0] for row in rows[:4]] == ["two_stream", "body_part", "attention", "difference"]
    assert all(0 <= row[-1] <= 100 for row in rows)
    assert _verdicts(report)[0] == UNKNOWN  # three steps are too few to learn
    assert "Left and right" in [section.title for section in report.sections]
    assert "<html" in report.to_html()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Report]:
    """The quick report of networks that are wrong on given clips of 10, surely or just so."""
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    labels = torch.arange(10) % 6
    clips = experiment._Clips([], labels, torch.empty(0), labels)
    monkeypatch.setattr(experiment, "_figures", lambda seed: clips)

    def report(*wrong: tuple[int, ...], sure: float = 0.6) -> Report:
        places = iter(wrong * len(experiment.SEEDS))

        def train(network: Any, clips: Any, seed: int, advance: Any) -> Any:
            scores = torch.full((10, 6), 0.01)
            scores[torch.arange(10), labels] = 0.95
            for row in next(places):
                scores[row] = torch.tensor([(1 - sure) / 5] * 6)
                scores[row, (labels[row] + 1) % 6] = sure
            return experiment._Trained(scores, [1.0] * experiment.TRAINING.epochs)

        monkeypatch.setattr(experiment, "_train", train)
        return experiment.quick()

    return report


def test_verdicts(measured: Callable[..., Report]) -> None:
    report = measured((0,), (1,), (2,), (3, 4))
    assert _verdicts(report) == ["holds", "holds"]
    assert report.claims[0].values == (10.0,) * 3  # each alone is outvoted
    assert _verdicts(measured((0, 1), (0, 1), (0, 1), (2,), sure=0.99))[0] == "does not hold"
    assert _verdicts(measured((0,), (0,), (0,), (0,))) == ["holds", "does not hold"]  # all are wrong together
    assert _verdicts(measured((), (0,), (), ()))[0] == UNKNOWN  # nothing is left to gain
    everything = tuple(range(8))
    assert _verdicts(measured(everything, everything, everything, everything)) == [UNKNOWN] * 2  # not learned


def test_full_measures_what_the_recipe_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    clips, labels = stick_figures(30, frames=(10, 10))
    np.savez(tmp_path / "figures.npz", clips=np.stack(clips), labels=labels)

    def fit(task: Any, place: Path, training: Training, *, resume: bool) -> None:
        assert (place, training.epochs, resume) == (tmp_path / "runs" / "ensem_nn", 100, False)
        task._read_splits()
        task.network = task._build()

    monkeypatch.setattr(experiment.Skeletons, "fit", fit)
    options = {"widths": [6], "depths": [1], "reduction": 2}
    changes = {"protocol": "random", "frames": 8, "options": options}
    report = experiment.full(tmp_path / "figures.npz", tmp_path / "runs", **changes)
    assert _verdicts(report) == [UNKNOWN]
    assert [row[0] for row in _table(report, "Accuracy on the test clips").rows][-1] == "ensemble, mean"
    assert report.claims[0].values[0] <= 100


def test_budget_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="budget must be 'quick' or 'full', got 'slow'"):
        experiment.run("slow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"needs data and folder, got .* and None"):
        experiment.run("full", data=tmp_path)
