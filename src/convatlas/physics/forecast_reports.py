"""What a user wants to see of forecasts: errors at every step, pictures of truth and forecast, cost; files."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from convatlas.files import atomic_path
from convatlas.ops.forecast_errors import mean_absolute_error, normalised_mse, symmetric_percentage_error
from convatlas.ops.image_quality import psnr
from convatlas.ops.relative_error import relative_l2
from convatlas.physics.field_pictures import field_row
from convatlas.report import Cell, Files, Images, Lines, Note, Part, Report, Section, Table
from convatlas.training.comparison import cost_table
from convatlas.training.measure import provenance
from convatlas.training.run import Run

if TYPE_CHECKING:
    from convatlas.physics.field_forecasting import FieldForecasting, Forecasts

__all__ = ["evaluation_report", "prediction_report", "training_report", "write_errors", "write_forecasts"]

Array = npt.NDArray[Any]


def evaluation_report(task: FieldForecasting, measured: Forecasts) -> Report:
    """Errors at every step of held-out windows."""
    sections = [Section("Error", _errors(measured)), Section("Pictures", _pictures(measured))]
    return Report(f"Evaluation of {task.model}", _summary(task, measured), sections, provenance(data=task.data))


def training_report(task: FieldForecasting, run: Run) -> Report:
    """Curves of the training, errors at every step on the test frames, pictures and cost."""
    measured = task.measure(task.splits["test"])
    write_errors(run.folder / "errors.csv", measured)
    rows = run.read_metrics()
    epochs = [row["epoch"] for row in rows]
    series = {
        "training, over its steps": (epochs, [row.get("train_loss", float("nan")) for row in rows]),
        "validation": (epochs, [row["val_relative_l2"] for row in rows]),
    }
    files = {
        "settings": "config.yaml",
        "weights of the best epoch": "checkpoints/best.safetensors",
        "one row an epoch": "metrics.csv",
        "errors of each step": "errors.csv",
    }
    counts: list[list[Cell]] = [[name, len(parts), sum(map(len, parts))] for name, parts in task.splits.items()]
    origin: list[Part] = [Note(f"Started from {task.started_from}")] if task.started_from else []
    sections = [
        Section("Error on test frames", _errors(measured)),
        Section("Pictures", _pictures(measured)),
        Section(
            "Training",
            [
                Lines("Relative L2 error", "epoch", "relative L2", series, log_y=True),
                Table("Sequences", ["part", "sequences", "frames"], counts),
                *origin,
            ],
        ),
        Section("Cost", [cost_table({task.model: task}, {task.model: run})]),
        Section("Files", [Files("In the folder of the run", files)]),
    ]
    title = f"Forecasting with {task.model}"
    return Report(title, _summary(task, measured), sections, provenance(data=task.data))


def prediction_report(
    task: FieldForecasting, done: Sequence[tuple[str, Array, Array]], written: Sequence[str]
) -> Report:
    """What was forecast, with pictures of the first and the last frame."""
    rows: list[list[Cell]] = []
    shown: list[tuple[Array, str] | Lines] = []
    for (label, start, outputs), name in zip(done, written, strict=True):
        rows.append([label, len(outputs), " x ".join(map(str, outputs.shape[2:])), name])
        steps = sorted({0, len(outputs) - 1})
        shown += [field_row(start, outputs[step], None, f"{label}, step {step + 1}") for step in steps]
    table = Table("Files", ["sequence", "frames", "grid", "written"], rows)
    links = Files("In this folder", {name: name for name in written})
    parts = [table, *_grouped("Last frame and forecast", shown), links]
    summary = f"{task.model} forecast {task.test_steps} frames of each of {len(done)} sequences."
    return Report(f"Forecasts of {task.model}", summary, [Section("Forecasts", parts)], provenance())


def write_errors(path: Path, measured: Forecasts) -> None:
    """Write the errors of each step as CSV, means over the windows."""
    table = _by_step(measured)
    with atomic_path(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *table])
        for step, values in enumerate(zip(*table.values(), strict=True), 1):
            writer.writerow([step, *(f"{value:.6g}" for value in values)])


def write_forecasts(folder: Path, done: Sequence[tuple[str, Array, Array]]) -> list[str]:
    """Write the frames as ``.npz`` files with ``y``; the names that they got."""
    names: list[str] = []
    for label, _, outputs in done:
        name = f"{label}_forecast.npz"
        if name in names:
            name = f"{label}_{len(names)}_forecast.npz"
        with atomic_path(folder / name) as part, part.open("wb") as file:
            np.savez(file, y=outputs)
        names.append(name)
    return names


def _by_step(measured: Forecasts) -> dict[str, list[float]]:
    """Each error, its mean over the windows at every step."""
    forecast, truth = (torch.from_numpy(np.asarray(each, dtype=np.float64)) for each in measured[1:])
    errors = {
        "relative L2": relative_l2,
        "sMAPE": symmetric_percentage_error,
        "MAE": mean_absolute_error,
        "N-MSE": normalised_mse,
    }
    found = {
        name: [float(error(forecast[:, step], truth[:, step]).mean()) for step in range(truth.shape[1])]
        for name, error in errors.items()
    }
    if truth.dim() == 5:
        spread = max(float(truth.max() - truth.min()), 1e-12)
        found["PSNR [dB]"] = psnr(forecast, truth, data_range=spread).mean(0).tolist()
    return found


def _summary(task: FieldForecasting, measured: Forecasts) -> str:
    error = _by_step(measured)["relative L2"]
    windows = "1 window" if len(measured.truth) == 1 else f"{len(measured.truth)} windows"
    return (
        f"{task.model}: relative L2 error {error[0]:.3%} after 1 step, {error[-1]:.3%} after {len(error)} ({windows})."
    )


def _errors(measured: Forecasts) -> list[Part]:
    found = _by_step(measured)
    steps = range(1, 1 + measured.truth.shape[1])
    # What a forecaster would get who says that nothing changes.
    still = measured._replace(outputs=np.broadcast_to(measured.start[:, None], measured.truth.shape))
    series = {"forecast": (steps, found["relative L2"]), "last frame": (steps, _by_step(still)["relative L2"])}
    rows: list[list[Cell]] = [
        [step, *values] for step, values in zip(steps, zip(*found.values(), strict=True), strict=True)
    ]
    return [
        Lines("Error against step", "step", "relative L2", series, log_y=True, caption="Means over the windows."),
        Table("Errors at each step", ["step", *found], rows, "PSNR refers to the range of the true frames."),
    ]


def _pictures(measured: Forecasts) -> list[Part]:
    steps = measured.truth.shape[1]
    shown = [
        field_row(measured.start[0], measured.outputs[0, step], measured.truth[0, step], f"step {step + 1}")
        for step in sorted({0, steps // 2, steps - 1})
    ]
    return _grouped("Last frame, truth, forecast and error", shown)


def _grouped(title: str, shown: Sequence[tuple[Array, str] | Lines]) -> list[Part]:
    """Pictures as one part, curves as one part each."""
    pictures = [each for each in shown if not isinstance(each, Lines)]
    curves: list[Part] = [each for each in shown if isinstance(each, Lines)]
    return [*([Images(title, pictures)] if pictures else []), *curves]
