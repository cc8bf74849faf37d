"""What a user wants to see of a detector for LiDAR sweeps: quality, boxes from above, cost."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from convatlas.data.images import Skipped
from convatlas.files import write_text
from convatlas.report import Cell, Files, Images, Lines, Note, Part, Report, Section, Table, printable
from convatlas.training.comparison import cost_table
from convatlas.training.left_out import skipped_sections
from convatlas.training.measure import provenance
from convatlas.training.run import Run

if TYPE_CHECKING:
    from convatlas.geometry.lidar_detection import Finding, LidarDetection

__all__ = ["evaluation_report", "from_above", "prediction_report", "training_report"]

_PICTURES, _WIDTH = 8, 360
_FOUND, _TRUE = (210, 60, 30), (30, 140, 60)


def evaluation_report(task: LidarDetection, findings: Sequence[Finding], skipped: Sequence[Skipped]) -> Report:
    """Quality of labelled sweeps and what was found in some of them."""
    measured = task.measures(findings)
    first = next(iter(measured))
    sections = [
        Section("Quality", [_measured(measured)]),
        Section("Sweeps", [_pictures(task, findings)]),
        *skipped_sections({entry.path: entry.reason for entry in skipped}),
    ]
    summary = f"{task.model}: {first.partition(' [')[0]} {measured[first]:.4g} % on {len(findings)} sweeps."
    return Report(f"Evaluation of {task.model}", summary, sections, provenance())


def prediction_report(
    task: LidarDetection, findings: Sequence[Finding], skipped: Sequence[Skipped], folder: Path
) -> Report:
    """Every box as a row of ``boxes.csv``, and pictures."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["sweep", "class", "score", "x", "y", "z", "length", "width", "height", "heading"])
    for entry in findings:
        for box, score, label in zip(entry.boxes, entry.scores, entry.labels, strict=True):
            numbers = [f"{value:.3f}" for value in box.tolist()]
            writer.writerow([printable(entry.name), task.classes[int(label)], f"{float(score):.4f}", *numbers])
    write_text(folder / "boxes.csv", text.getvalue())
    files = Files("In this folder", {"all boxes": "boxes.csv"})
    sections = [
        Section("Sweeps", [_pictures(task, findings), files]),
        *skipped_sections({entry.path: entry.reason for entry in skipped}),
    ]
    count = sum(len(entry.boxes) for entry in findings)
    summary = f"{task.model} found {count} boxes in {len(findings)} sweep{'s' if len(findings) != 1 else ''}."
    return Report(f"Boxes of {task.model}", summary, sections, provenance())


def training_report(task: LidarDetection, run: Run) -> Report:
    """Curves, quality on the held-out sweeps, pictures and cost of a finished run."""
    findings, skipped = task.findings(task.splits["test"])
    measured, rows = task.measures(findings), run.read_metrics()
    first = next(iter(measured))
    epochs = [row["epoch"] for row in rows]
    curves: list[Part] = [
        Lines("Training loss", "epoch", "loss", {"training": (epochs, [row["train_loss"] for row in rows])}),
        Lines("Validation", "epoch", "average precision", {"validation": (epochs, [row["val_ap"] for row in rows])}),
    ]
    parts: list[list[Cell]] = [[name, len(task.splits[name])] for name in ("train", "val", "test")]
    origin = [Note(f"Started from {task.started_from}")] if task.started_from else []
    files = {
        "settings": "config.yaml",
        "weights of the best epoch": "checkpoints/best.safetensors",
        "one row an epoch": "metrics.csv",
    }
    left = {entry.path: entry.reason for entry in skipped} | task.unreadable
    sections = [
        Section("Quality on held-out sweeps", [_measured(measured)]),
        Section("Sweeps", [_pictures(task, findings)]),
        Section("Training", [*curves, Table("Sweeps", ["part", "sweeps"], parts), *origin]),
        Section("Cost", [cost_table({task.model: task}, {task.model: run})]),
        *skipped_sections(left),
        Section("Files", [Files("In the folder of the run", files)]),
    ]
    summary = f"{task.model}: {first.partition(' [')[0]} {measured[first]:.4g} % on {len(findings)} held-out sweeps."
    return Report(f"{task.name} with {task.model}", summary, sections, provenance(data=task.data))


def _measured(measured: dict[str, float]) -> Table:
    caption = "AP: mean of the best precision at 40 recalls; boxes that are hard to see do not count."
    return Table("Measured", list(measured), [list(measured.values())], caption)


def _pictures(task: LidarDetection, findings: Sequence[Finding]) -> Images:
    span = task.network.config.point_range
    pictures = [(from_above(entry, span), entry.name) for entry in findings[:_PICTURES]]
    return Images("Sweeps from above", pictures, "Red: found; green: true boxes. x goes up, y to the left.")


def from_above(finding: Finding, point_range: Sequence[float]) -> npt.NDArray[np.uint8]:
    """A picture (H, W, 3) of a sweep from above, with the boxes found and the true ones.

    Args:
        finding: what was found.
        point_range: least x, y, z and greatest x, y, z that are shown.
    """
    low, high = np.array(point_range[:2]), np.array(point_range[3:5])
    scale = _WIDTH / float(high[1] - low[1])
    height = max(2, round(scale * float(high[0] - low[0])))
    picture = np.full((height, _WIDTH, 3), 255, dtype=np.uint8)

    def place(ground: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.stack([_WIDTH - (ground[..., 1] - low[1]) * scale, height - (ground[..., 0] - low[0]) * scale], -1)

    at = place(finding.sweep.points[:, :2].astype(np.float64)).astype(int)
    inside = (at >= 0).all(1) & (at < [_WIDTH, height]).all(1)
    picture[at[inside, 1], at[inside, 0]] = 110
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    for boxes, colour in ((finding.sweep.boxes, _TRUE), (finding.boxes.numpy(), _FOUND)):
        for x, y, _, length, width, _, heading in boxes.astype(np.float64):
            local = np.array([[1, 1], [1, -1], [-1, -1], [-1, 1], [1, 1], [1.5, 0]]) / 2 * [length, width]
            turn = np.array([[np.cos(heading), -np.sin(heading)], [np.sin(heading), np.cos(heading)]])
            corners = place(local @ turn.T + [x, y])
            draw.line([(float(across), float(down)) for across, down in corners], fill=colour)
    return np.asarray(image)
