"""What a user wants to see of a learned operator: errors on every grid, pictures of truth and forecast, cost; files."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from convatlas.data.fields import FieldPairs
from convatlas.files import atomic_path
from convatlas.physics.field_pictures import field_row
from convatlas.physics.operator_evaluation import Measured
from convatlas.report import Cell, Files, Images, Lines, Note, Part, Report, Section, Table
from convatlas.training.comparison import cost_table
from convatlas.training.measure import provenance
from convatlas.training.run import Run

if TYPE_CHECKING:
    from convatlas.physics.operator_learning import OperatorLearning

__all__ = ["evaluation_report", "prediction_report", "training_report", "write_errors", "write_outputs"]

Array = npt.NDArray[Any]
Done = tuple[str, FieldPairs, Array]

#: Samples that a report shows of each grid.
_PICTURES = 4


def evaluation_report(task: OperatorLearning, measured: Sequence[Measured], others: Sequence[Measured]) -> Report:
    """Errors on held-out fields, and of the same functions on other grids."""
    sections = [Section("Error", _errors(measured, others)), Section("Pictures", _pictures(measured))]
    return Report(f"Evaluation of {task.model}", _summary(task, measured), sections, provenance(data=task.data))


def training_report(task: OperatorLearning, run: Run) -> Report:
    """Curves of the training, errors of the test fields, pictures and cost."""
    measured, others = task.measure(task.splits["test"]), task.measure(task.other_resolutions())
    write_errors(run.folder / "errors.csv", measured)
    rows = run.read_metrics()
    best = min(rows, key=lambda row: (row["val_relative_l2"], row["epoch"]))
    chosen = f" Best epoch {best['epoch']:.0f} of {len(rows)}, chosen by the validation fields."
    counts: list[list[Cell]] = [
        [name, len(pairs), _size(pairs.grid)] for name in ("train", "val", "test") for pairs in task.splits[name]
    ]
    epochs = [row["epoch"] for row in rows]
    series = {
        "training loss": (epochs, [row.get("train_loss", float("nan")) for row in rows]),
        "validation": (epochs, [row["val_relative_l2"] for row in rows]),
    }
    files = {
        "settings": "config.yaml",
        "weights of the best epoch": "checkpoints/best.safetensors",
        "one row an epoch": "metrics.csv",
        "error of each test field": "errors.csv",
    }
    caption = ""
    if task.splits["test"] is task.splits["val"]:
        caption = "The data have no test part: the quality is measured on the fields that chose the best epoch."
    origin = [Note(f"Started from {task.started_from}")] if task.started_from else []
    sections = [
        Section("Error on test fields", _errors(measured, others)),
        Section("Pictures", _pictures(measured)),
        Section(
            "Training",
            [
                Lines("Relative L2 error", "epoch", "relative L2", series, log_y=True),
                Table("Fields", ["part", "pairs", "grid"], counts, caption),
                *origin,
            ],
        ),
        Section("Cost", [cost_table({task.model: task}, {task.model: run})]),
        Section("Files", [Files("In the folder of the run", files)]),
    ]
    title = f"Operator learning with {task.model}"
    return Report(title, _summary(task, measured) + chosen, sections, provenance(data=task.data))


def prediction_report(task: OperatorLearning, done: Sequence[Done], written: Sequence[str]) -> Report:
    """What was forecast, with pictures."""
    rows: list[list[Cell]] = []
    pictures: list[Part] = []
    for (label, pairs, outputs), name in zip(done, written, strict=True):
        error = None
        if pairs.y is not None:
            flat = (outputs - pairs.y).reshape(len(outputs), -1), pairs.y.reshape(len(outputs), -1)
            error = float(np.mean(np.linalg.norm(flat[0], axis=1) / np.linalg.norm(flat[1], axis=1)))
        rows.append([label, len(outputs), _size(pairs.grid), name, error])
        shown = [
            field_row(pairs.x[row], outputs[row], None if pairs.y is None else pairs.y[row], f"{label}, sample {row}")
            for row in range(min(_PICTURES, len(outputs)))
        ]
        pictures += _grouped("Input and forecast" if pairs.y is None else "Input, truth, forecast and error", shown)
    table = Table("Files", ["file", "fields", "grid", "written", "relative L2"], rows)
    links = Files("In this folder", {name: name for name in written})
    count = sum(len(outputs) for _, _, outputs in done)
    fields = "1 field" if count == 1 else f"{count} fields"
    return Report(
        f"Predictions of {task.model}",
        f"{task.model} forecast {fields}.",
        [Section("Forecasts", [table, *pictures, links])],
        provenance(),
    )


def write_errors(path: Path, measured: Sequence[Measured]) -> None:
    """Write the error of each sample as CSV: grid, sample, relative L2."""
    with atomic_path(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["grid", "sample", "relative L2"])
        for each in measured:
            for row, error in enumerate(each.errors):
                writer.writerow([_size(each.pairs.grid), row, f"{error:.6g}"])


def write_outputs(folder: Path, done: Sequence[Done]) -> list[str]:
    """Write the forecasts as ``.npz`` files with ``y``; the names that they got."""
    names: list[str] = []
    for label, _, outputs in done:
        name = f"{label}_output.npz"
        if name in names:
            name = f"{label}_{len(names)}_output.npz"
        with atomic_path(folder / name) as part, part.open("wb") as file:
            np.savez(file, y=outputs)
        names.append(name)
    return names


def _summary(task: OperatorLearning, measured: Sequence[Measured]) -> str:
    errors = np.concatenate([each.errors for each in measured])
    fields = "1 field" if len(errors) == 1 else f"{len(errors)} fields"
    return f"{task.model}: mean relative L2 error {errors.mean():.3%} of {fields} held out."


def _errors(measured: Sequence[Measured], others: Sequence[Measured]) -> list[Part]:
    grids = [*((each, "of the training") for each in measured), *((each, "another") for each in others)]
    rows: list[list[Cell]] = [
        [
            _size(each.pairs.grid),
            which,
            len(each.errors),
            *(float(value) for value in (each.errors.mean(), np.median(each.errors), each.errors.max())),
        ]
        for each, which in grids
    ]
    table = Table("Relative L2 error", ["grid", "which", "fields", "mean", "median", "largest"], rows)
    if not others:
        return [table]
    order = sorted((each for each, _ in grids), key=lambda each: each.pairs.grid)
    points = ([each.pairs.grid[-1] for each in order], [float(each.errors.mean()) for each in order])
    caption = "The same functions on other grids. A neural operator keeps its error where a plain network does not."
    figure = Lines(
        "Error against resolution", "points of an axis", "relative L2", {"mean": points}, True, caption, log_x=True
    )
    return [table, figure]


def _pictures(measured: Sequence[Measured]) -> list[Part]:
    parts: list[Part] = []
    for each in measured:
        order = np.argsort(each.errors)[::-1]
        places = sorted({0, len(order) // 2, len(order) - 1})
        shown = []
        for place in places:
            row = int(order[place])
            which = {0: "worst", len(order) - 1: "best"}.get(place, "median")
            caption = f"{which}, relative L2 {each.errors[row]:.3%}"
            shown.append(field_row(each.pairs.x[row], each.outputs[row], np.asarray(each.pairs.y)[row], caption))
        parts += _grouped(f"Input, truth, forecast and error on {_size(each.pairs.grid)}", shown)
    return parts


def _grouped(title: str, shown: Sequence[tuple[Array, str] | Lines]) -> list[Part]:
    """Pictures as one part, curves as one part each."""
    pictures = [each for each in shown if not isinstance(each, Lines)]
    curves: list[Part] = [each for each in shown if isinstance(each, Lines)]
    return [*([Images(title, pictures)] if pictures else []), *curves]


def _size(grid: Sequence[int]) -> str:
    return " x ".join(map(str, grid))
