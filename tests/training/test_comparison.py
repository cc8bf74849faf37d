"""Several models side by side: right numbers, the front of their costs, for any task that gives its quality."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from convatlas.errors import Unsupported
from convatlas.report import Scatter, Table
from convatlas.training.comparison import comparison_report, cost_table, listed, pareto_front, side_by_side
from convatlas.training.measure import count_parameters
from convatlas.training.run import Run
from convatlas.training.settings import Training
from training.toy import Toy


class Pointed(Toy):
    """The toy with what a comparison needs of it."""

    smaller_is_better: ClassVar[tuple[str, ...]] = ("regret [units]",)

    def example_inputs(self, batch: int = 1) -> tuple[Tensor, ...]:
        return (torch.randn(batch, 4),)


class Measured(Pointed):
    def quality(self) -> dict[str, float]:
        return {"gain [units]": self.samples / 10, "regret [units]": 1 / self.samples}


def trained(folder: Path, kind: type[Toy] = Pointed) -> tuple[dict[str, Any], dict[str, Run]]:
    tasks = {f"with {samples}": kind(samples=samples) for samples in (20, 41)}
    runs = {name: Run(folder / name) for name in tasks}
    for name, task in tasks.items():
        task.fit(runs[name].folder, Training(epochs=2, batch_size=8))
    return tasks, runs


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")


@pytest.mark.parametrize(
    ("points", "better", "front"),
    [
        ({"a": (1, 1), "b": (2, 2), "c": (3, 3)}, "max", ("a", "b", "c")),
        ({"a": (1, 1), "b": (2, 2), "c": (3, 3)}, "min", ("a",)),
        ({"slow": (5, 2), "good": (2, 3), "fast": (1, 1), "poor": (3, 1)}, "max", ("fast", "good")),
        ({"one": (1, 2), "other": (1, 3), "equal": (1, 3)}, "max", ("other",)),
        ({"costly": (2, 0.1), "cheap": (1, 0.5), "worse": (3, 0.2)}, "min", ("cheap", "costly")),
        ({"only": (7, 7)}, "max", ("only",)),
    ],
)
def test_the_front_is_what_nothing_else_beats(points: dict[str, Any], better: Any, front: tuple[str, ...]):
    assert pareto_front(points, better) == front


def test_any_gradient_task_can_be_compared(tmp_path: Path):
    tasks, runs = trained(tmp_path)
    assert "compare" in Pointed.verbs
    report = Pointed.compare(tasks, runs, tmp_path)
    document = json.loads(report.to_json())
    assert [section["title"] for section in document["sections"]] == ["Side by side", "Training", "Files"]
    table = document["sections"][0]["parts"][0]
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
    losses = {name: task.quality()["loss"] for name, task in tasks.items()}
    assert [row["model"] for row in rows] == sorted(losses, key=losses.__getitem__)
    for row in rows:
        assert row["loss"] == pytest.approx(losses[row["model"]])
        assert row["parameters"] == count_parameters(tasks[row["model"]].network)
        assert row["MACs"] == 4 * 8 + 8 * 3
        assert row["latency [ms]"] > 0
        assert row["memory [MiB]"] * 2**20 >= 4 * row["parameters"]
        assert row["training time [s]"] == pytest.approx(sum(e["seconds"] for e in runs[row["model"]].read_metrics()))
    assert "MACs" in rows[0]["on the front of"]
    assert report.summary.startswith(f"{rows[0]['model']} is the best: loss ")
    titles = [part["title"] for part in document["sections"][1]["parts"]]
    assert titles == ["Training loss", "Validation loss"]
    report.save(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert 'href="with%2020/report.html"' in page


def test_a_task_tells_its_own_measures_and_which_way_they_are_better(tmp_path: Path):
    tasks, runs = trained(tmp_path, Measured)
    report = comparison_report(tasks, runs, tmp_path)
    table, pareto, _ = report.sections[0].parts
    assert isinstance(table, Table)
    assert isinstance(pareto, Scatter)
    assert [row[0] for row in table.rows] == ["with 41", "with 20"]
    assert (table.highlight["gain [units]"], table.highlight["regret [units]"]) == ("max", "min")
    assert (pareto.x_label, pareto.y_label) == ("latency [ms]", "gain [units]")
    assert "with 41" in pareto.front
    assert report.summary.startswith("with 41 is the best: gain 4.1 units on held-out data.")


def test_the_default_quality_is_the_metric_that_chooses_the_best_epoch(tmp_path: Path):
    tasks, runs = trained(tmp_path)
    for name, task in tasks.items():
        best = min(row["val_loss"] for row in runs[name].read_metrics())
        assert task.quality() == {"loss": pytest.approx(best, rel=1e-4)}
        assert task.better("loss") == "min"
        assert task.better("anything") == "max"


def test_cost_of_one_run_has_no_winner(tmp_path: Path):
    tasks, runs = trained(tmp_path)
    (name, *_) = tasks
    table = cost_table({name: tasks[name]}, {name: runs[name]})
    assert table.highlight == {}
    assert len(table.rows) == 1
    assert "in turn" not in table.caption
    ranked, parts = side_by_side(tasks, runs, {"with 20": {"score": 1.0}, "with 41": {"score": 2.0}})
    assert ranked == ["with 41", "with 20"]
    assert len(parts) == 3


def test_a_network_without_example_inputs_is_told(tmp_path: Path):
    task = Toy()
    task.prepare()
    with pytest.raises(Unsupported, match="Net tells no example input, and neither does toy"):
        task.example_inputs()


def test_names_in_a_row():
    assert [listed(list("abc")[:count]) for count in (1, 2, 3)] == ["a", "a and b", "a, b and c"]
