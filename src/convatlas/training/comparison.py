"""Several trained models side by side: quality, cost on this machine, and which of them are worth their cost."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch

from convatlas.cost import cost
from convatlas.report import Cell, Files, Lines, Part, Report, Scatter, Section, Table
from convatlas.training.measure import count_parameters, latency, peak_bytes, provenance
from convatlas.training.run import Run

if TYPE_CHECKING:
    from convatlas.training.task import GradientTask

__all__ = ["comparison_report", "cost_table", "files_section", "listed", "pareto_front", "side_by_side"]

Tasks: TypeAlias = "Mapping[str, GradientTask]"

#: Columns of the cost that a front is drawn for, the first ones as figures.
_COSTS = ("latency [ms]", "MACs", "parameters", "memory [MiB]")
_FIGURES = 2


def cost_table(tasks: Tasks, runs: Mapping[str, Run]) -> Table:
    """Parameters, multiply-adds, latency and memory of one sample, size of the file, time of the training."""
    names, rows = _costs(tasks, runs)
    highlight: dict[str, Any] = dict.fromkeys(names, "min") if len(tasks) > 1 else {}
    cells = [[name, *row.values()] for name, row in rows.items()]
    return Table("Cost on this machine", ["model", *names], cells, _explained(len(tasks)), highlight)


def _costs(tasks: Tasks, runs: Mapping[str, Run]) -> tuple[list[str], dict[str, dict[str, Cell]]]:
    inputs = {name: task.example_inputs() for name, task in tasks.items()}
    # In turn, so that whatever else the machine does meets all models alike.
    rounds = [{name: latency(task.network, *inputs[name], repeats=5) for name, task in tasks.items()} for _ in range(5)]
    rows: dict[str, dict[str, Cell]] = {}
    for name, task in tasks.items():
        rows[name] = {
            "parameters": count_parameters(task.network),
            "MACs": cost(task.network, *inputs[name]).total.macs,
            "latency [ms]": statistics.median(each[name] for each in rounds),
            "memory [MiB]": _memory(task, inputs[name]) / 2**20,
            "file [MiB]": best.stat().st_size / 2**20 if (best := runs[name].best).is_file() else None,
            "training time [s]": sum(row["seconds"] for row in runs[name].read_metrics()),
        }
    return list(next(iter(rows.values()))), rows


@torch.inference_mode()
def _memory(task: GradientTask, inputs: tuple[Any, ...]) -> int:
    """Bytes of the weights and of one forward pass in evaluation mode."""
    network = task.network.eval()
    held = [*network.parameters(), *network.buffers()]
    device = next((tensor.device for tensor in held), torch.device("cpu"))
    return sum(tensor.nbytes for tensor in held) + peak_bytes(lambda: network(*inputs), device)


def _explained(models: int) -> str:
    in_turn = ", the models in turn" if models > 1 else ""
    return (
        "One sample a pass. MACs: multiply-adds of convolutions and matrix products. Latency: median of repeated passes"
        f"{in_turn}. Memory: weights and peak of a forward pass."
    )


def pareto_front(points: Mapping[str, tuple[float, float]], better: Literal["max", "min"]) -> tuple[str, ...]:
    """Names of the points (cost, quality) for which no other is as good at less cost, or better at the same; by cost.

    Args:
        points: cost, of which less is better, and quality.
        better: whether more or less of the quality is better.
    """
    sign = -1 if better == "max" else 1
    order = sorted(points, key=lambda name: (points[name][0], sign * points[name][1]))
    front: list[str] = []
    for name in order:
        if not front or sign * points[name][1] < sign * points[front[-1]][1]:
            front.append(name)
    return tuple(front)


def side_by_side(
    tasks: Tasks, runs: Mapping[str, Run], measured: Mapping[str, Mapping[str, float]]
) -> tuple[list[str], list[Part]]:
    """The models from the best to the worst, and a table of their quality and cost with figures of one over the other.

    Args:
        tasks: trained tasks by label.
        runs: their runs.
        measured: for each label what `GradientTask.quality` gave, or the like; the first measure ranks.
    """
    task = next(iter(tasks.values()))
    measures = list(next(iter(measured.values())))
    first, better = measures[0], task.better(measures[0])
    ranked = sorted(tasks, key=lambda name: measured[name][first], reverse=better == "max")
    names, costs = _costs(tasks, runs)
    points = {
        column: {name: (float(costs[name][column] or 0), measured[name][first]) for name in tasks} for column in _COSTS
    }
    fronts = {column: pareto_front(points[column], better) for column in _COSTS}
    cells: list[list[Cell]] = []
    for name in ranked:
        on = ", ".join(_bare(column) for column in _COSTS if name in fronts[column])
        cells.append([name, *measured[name].values(), *costs[name].values(), on or None])
    highlight: dict[str, Any] = {name: task.better(name) for name in measures} | dict.fromkeys(names, "min")
    columns = ["model", *measures, *names, "on the front of"]
    caption = (
        f"From the best {_bare(first)} down, on the same held-out data. {_explained(len(tasks))} A model is on the "
        "front of a cost if no other is as good at less of it."
    )
    parts: list[Part] = [Table("Quality and cost", columns, cells, caption, highlight)]
    for column in _COSTS[:_FIGURES]:
        title = f"{_bare(first)} against {_bare(column)}"
        upwards = "Up" if better == "max" else "Down"
        caption = f"{upwards} and to the left is better. Joined: those that no other beats."
        spread = max(x for x, _ in points[column].values()) > 10 * min(x for x, _ in points[column].values())
        figure = Scatter(title[0].upper() + title[1:], column, first, points[column], spread, caption, fronts[column])
        parts.append(figure)
    return ranked, parts


def comparison_report(tasks: Tasks, runs: Mapping[str, Run], folder: Path) -> Report:
    """Tasks of one kind that were trained on the same data under the same budget, by their `quality`."""
    measured = {name: task.quality() for name, task in tasks.items()}
    ranked, parts = side_by_side(tasks, runs, measured)
    winner, first = ranked[0], next(iter(measured[ranked[0]]))
    curves = _curves({name: run.read_metrics() for name, run in runs.items()})
    sections = [Section("Side by side", parts), Section("Training", curves), files_section(runs, folder)]
    summary = (
        f"{winner} is the best: {_bare(first)} {measured[winner][first]:.4g}{_unit(first)} on held-out data. All were "
        "trained on the same data with the same budget."
    )
    task = next(iter(tasks.values()))
    return Report(f"{listed(tasks)}: {task.name}", summary, sections, provenance())


def listed(names: Iterable[str]) -> str:
    """Names in a row: "a", "a and b", "a, b and c"."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def files_section(runs: Mapping[str, Run], folder: Path) -> Section:
    """Links to the reports of the runs, which lie below ``folder``."""
    links = {f"report of {name}": str((run.folder / "report.html").relative_to(folder)) for name, run in runs.items()}
    return Section("Files", [Files("The runs", links)])


def _curves(rows: Mapping[str, Sequence[Mapping[str, float]]]) -> list[Part]:
    """Every number that the runs keep an epoch of: the training loss and the validation metrics."""
    columns = dict.fromkeys(
        key for table in rows.values() for row in table for key in row if key.startswith(("train_", "val_"))
    )
    curves: list[Part] = []
    for column in columns:
        series = {
            name: ([row["epoch"] for row in table], [row.get(column, float("nan")) for row in table])
            for name, table in rows.items()
        }
        label = column.replace("train_", "training ").replace("val_", "validation ").replace("_", " ")
        curves.append(Lines(label.capitalize(), "epoch", label, series))
    return curves


def _bare(column: str) -> str:
    return column.partition(" [")[0]


def _unit(column: str) -> str:
    unit = column.partition(" [")[2].rstrip("]")
    return f" {unit}" if unit else ""
