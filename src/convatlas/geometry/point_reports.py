"""What a user wants to see of a network for point clouds: quality, mistakes, pictures, cost."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from convatlas.data.images import Skipped
from convatlas.data.points import Cloud, write_ply
from convatlas.files import write_text
from convatlas.report import Bars, Cell, Files, Heatmap, Images, Lines, Note, Part, Report, Section, Table, printable
from convatlas.training.comparison import cost_table
from convatlas.training.left_out import skipped_sections
from convatlas.training.measure import provenance
from convatlas.training.run import Run

if TYPE_CHECKING:
    from convatlas.geometry.point_clouds import Answer, PointTask

__all__ = ["colours", "evaluation_report", "portrait", "prediction_report", "training_report"]

_PICTURES, _SIDE = 12, 200


def evaluation_report(task: PointTask, answers: Sequence[Answer], skipped: Sequence[Skipped]) -> Report:
    """Quality of labelled clouds: numbers, confusions, pictures."""
    measured = task.measures(answers)
    first = next(iter(measured))
    sections = [
        Section("Quality", _quality(task, answers)),
        Section("Clouds", [_pictures(task, answers)]),
        *skipped_sections({entry.path: entry.reason for entry in skipped}),
    ]
    summary = f"{task.model}: {first} {measured[first]:.2%} on {len(answers)} clouds."
    return Report(f"Evaluation of {task.model}", summary, sections, provenance())


def prediction_report(task: PointTask, answers: Sequence[Answer], skipped: Sequence[Skipped], folder: Path) -> Report:
    """Every cloud with its class as ``predictions.csv``, or with those of its points as a coloured PLY file."""
    files = {}
    if not task.names_points:
        write_text(folder / "predictions.csv", _table(task, answers))
        files["all predictions"] = "predictions.csv"
        named = [task.classes[answer.best[0]] for answer in answers]
        share = {name: named.count(name) for name in task.classes if name in named}
        shown: list[Part] = [Bars("How often each class was found", "clouds", share)]
    else:
        palette = colours(len(task.classes))
        for number, answer in enumerate(answers):
            name = f"{number:04d}_{Path(answer.name).stem}.ply"
            write_ply(folder / name, answer.cloud.coordinates, palette[answer.best], answer.best)
            files[answer.name] = name
        counts = sum(np.bincount(answer.best, minlength=len(task.classes)) for answer in answers)
        share = {name: int(number) for name, number in zip(task.classes, np.asarray(counts), strict=True) if number}
        shown = [Bars("How often each class was found", "points", share)]
    sections = [
        Section("Predictions", [_pictures(task, answers), *shown, Files("In this folder", files)]),
        *skipped_sections({entry.path: entry.reason for entry in skipped}),
    ]
    summary = f"{task.model} named {len(answers)} cloud{'s' if len(answers) != 1 else ''}."
    return Report(f"Predictions of {task.model}", summary, sections, provenance())


def training_report(task: PointTask, run: Run) -> Report:
    """Curves, quality on the held-out clouds, pictures and cost of a finished run."""
    answers, skipped = task.answers(task.splits["test"])
    rows = run.read_metrics()
    monitor = task.monitor[0]
    best = max(rows, key=lambda row: (row[monitor], row["epoch"]))
    measured = task.measures(answers)
    first = next(iter(measured))
    summary = (
        f"{task.model}: {first} {measured[first]:.2%} on {len(answers)} held-out clouds (best epoch "
        f"{best['epoch']:.0f} of {len(rows)}, chosen by validation)."
    )
    epochs = [row["epoch"] for row in rows]
    label = monitor.removeprefix("val_").replace("iou", "mean IoU")
    losses = [row["train_loss"] for row in rows]
    curves: list[Part] = [
        Lines("Training loss", "epoch", "cross-entropy [nats]", {"training": (epochs, losses)}),
        Lines(f"Validation {label}", "epoch", label, {"validation": (epochs, [row[monitor] for row in rows])}),
    ]
    parts: list[list[Cell]] = [[name, len(task.splits[name])] for name in ("train", "val", "test")]
    size = f"{len(task.classes)} classes, voxels of {task.preprocess.grid_size:g}."
    origin = [Note(f"Started from {task.started_from}")] if task.started_from else []
    files = {
        "settings": "config.yaml",
        "weights of the best epoch": "checkpoints/best.safetensors",
        "one row an epoch": "metrics.csv",
    }
    left = {entry.path: entry.reason for entry in skipped} | task.unreadable
    sections = [
        Section("Quality on held-out clouds", _quality(task, answers)),
        Section("Clouds", [_pictures(task, answers)]),
        Section("Training", [*curves, Table("Clouds", ["part", "clouds"], parts, size), *origin]),
        Section("Cost", [cost_table({task.model: task}, {task.model: run})]),
        *skipped_sections(left),
        Section("Files", [Files("In the folder of the run", files)]),
    ]
    return Report(f"{task.name} with {task.model}", summary, sections, provenance(data=task.data))


def _quality(task: PointTask, answers: Sequence[Answer]) -> list[Part]:
    measured = task.measures(answers)
    parts: list[Part] = [Table("Measured", list(measured), [list(measured.values())])]
    names, matrix = task.classes, task.confusion(answers)
    if task.names_points:
        union = matrix.sum(0) + matrix.sum(1) - np.diag(matrix)
        rows: list[list[Cell]] = [
            [name, int(matrix[index].sum()), float(matrix[index, index] / union[index])]
            for index, name in enumerate(names)
            if union[index]
        ]
        parts.append(Table("By class", ["class", "points", "IoU"], rows))
        shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
        return [*parts, Heatmap("Shares of each true class", shares, names, names, "predicted class", "true class")]
    return [*parts, Heatmap("Confusion matrix", matrix, names, names, "predicted class", "true class")]


def _table(task: PointTask, answers: Sequence[Answer]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["cloud", "class", "probability"])
    for answer in answers:
        best = int(answer.best[0])
        writer.writerow([printable(answer.name), task.classes[best], f"{float(answer.probabilities[0, best]):.6f}"])
    return text.getvalue()


def _pictures(task: PointTask, answers: Sequence[Answer]) -> Images:
    """Clouds with what was said of them; the wrong answers first."""
    wrong = [float((answer.best != answer.truth)[answer.truth >= 0].mean()) if (answer.truth >= 0).any() else 0.0
             for answer in answers]  # fmt: skip
    order = sorted(range(len(answers)), key=lambda row: -wrong[row])[:_PICTURES]
    palette = colours(len(task.classes))
    pictures = []
    for row in order:
        answer = answers[row]
        if not task.names_points:
            said = task.classes[answer.best[0]]
            truth = f", truly {task.classes[answer.label]}" if answer.label >= 0 else ""
            pictures.append((portrait(answer.cloud), f"{answer.name}: {said}{truth}"))
            continue
        views = [portrait(answer.cloud, palette[answer.best])]
        if (answer.truth >= 0).any():
            views.append(portrait(answer.cloud, np.where(answer.truth[:, None] >= 0, palette[answer.truth], 160)))
        caption = f"{answer.name}: predicted{' and true classes' if len(views) > 1 else ' classes'}"
        pictures.append((np.concatenate(views, 1), caption))
    return Images("Clouds and what was said of them", pictures)


def colours(count: int) -> npt.NDArray[np.uint8]:
    """Colours (count, 3) that differ, from 0 to 255."""
    hue = (np.arange(count) * 0.61803398875) % 1
    phase = (hue[:, None] + np.array([0, 2 / 3, 1 / 3])) % 1
    ramp = np.clip(np.abs(6 * phase - 3) - 1, 0, 1)
    bright = np.where(np.arange(count) % 2, 0.95, 0.75)[:, None]
    return np.asarray(255 * bright * (0.25 + 0.75 * ramp), dtype=np.uint8)


def portrait(cloud: Cloud, colour: npt.NDArray[np.uint8] | None = None) -> npt.NDArray[np.uint8]:
    """A picture (200, 200, 3) of a cloud seen from above at an angle; what is near hides what is far.

    Args:
        cloud: of at least one point.
        colour: of each point, (N, 3); by default their distance makes them dark.
    """
    middle = (cloud.coordinates.max(0) + cloud.coordinates.min(0)) / 2
    x, y, z = (cloud.coordinates - middle).T
    right, depth, up = 0.87 * x - 0.5 * y, 0.43 * x + 0.75 * y - 0.5 * z, 0.25 * x + 0.43 * y + 0.87 * z
    reach = max(float(np.abs(right).max()), float(np.abs(up).max()), 1e-9)
    columns = np.clip((right / reach * 0.95 + 1) * _SIDE / 2, 1, _SIDE - 2).astype(int)
    rows = np.clip((1 - up / reach * 0.95) * _SIDE / 2, 1, _SIDE - 2).astype(int)
    if colour is None:
        span = float(np.ptp(depth)) or 1.0
        colour = np.repeat((40 + 170 * (depth - depth.min()) / span).astype(np.uint8)[:, None], 3, 1)
    picture = np.full((_SIDE, _SIDE, 3), 255, dtype=np.uint8)
    order = np.argsort(-depth, kind="stable")
    for down, across in ((0, 0), (0, 1), (1, 0), (1, 1)):
        picture[rows[order] + down, columns[order] + across] = colour[order]
    return picture
