"""What a user wants to see of a super-resolution network: quality beside bicubic interpolation, pictures, cost."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from convatlas.data.image_pairs import Pairs
from convatlas.data.images import Skipped
from convatlas.files import atomic_path
from convatlas.report import Cell, Files, Images, Lines, Note, Part, Report, Section, Table
from convatlas.restoration.comparison import MOST_PICTURES, compared, cost_table, curves, row_of, signed
from convatlas.restoration.evaluation import ClipQuality, Measured, mean_quality, write_qualities
from convatlas.restoration.protocol import PROTOCOLS
from convatlas.restoration.super_resolution_files import Enlarged
from convatlas.training.left_out import skipped_sections
from convatlas.training.measure import provenance
from convatlas.training.run import Run

if TYPE_CHECKING:
    from convatlas.restoration.super_resolution import SuperResolution

__all__ = [
    "clip_report",
    "comparison_report",
    "evaluation_report",
    "panel",
    "prediction_report",
    "training_report",
]

Array = npt.NDArray[Any]

_MOST_ROWS = 100
#: What differences are multiplied by to be seen.
_ERROR_GAIN = 4
_SHOWN = 96


def evaluation_report(
    task: SuperResolution, pairs: Pairs, measured: Sequence[Measured], skipped: Sequence[Skipped]
) -> Report:
    """Quality on images of which the truth is known, by the task's protocol and by the others in use."""
    rows: list[list[Cell]] = []
    for name, protocol in PROTOCOLS.items():
        again = measured if protocol == task.protocol else task.measure(pairs, protocol)[0]
        network, bicubic = (mean_quality(getattr(each, which) for each in again) for which in ("network", "bicubic"))
        rows.append([name, bicubic.psnr, network.psnr, bicubic.ssim, network.ssim, protocol.describe(task.scale)])
    columns = ["protocol", "bicubic PSNR [dB]", "PSNR [dB]", "bicubic SSIM", "SSIM", "in words"]
    others = Table(
        "The same network by the protocols in use", columns, rows, "Figures of different protocols do not compare."
    )
    sections = [
        Section("Quality", [_means({task.model: measured}, task), _each_image(measured)]),
        Section("Protocols", [others]),
        Section("Pictures", _pictures(measured)),
        *skipped_sections({each.path: each.reason for each in skipped}),
    ]
    return Report(f"Evaluation of {task.model}", _summary(task, measured), sections, provenance())


def clip_report(task: SuperResolution, path: Path, quality: ClipQuality) -> Report:
    """Quality on every frame of a clip."""
    rows: list[list[Cell]] = [
        [name, statistics.fmean(values), quality.overall(values), min(values), max(values)]
        for name, values in (("bicubic", quality.bicubic), (task.model, quality.network))
    ]
    columns = ["", "mean of the frames [dB]", "whole clip [dB]", "worst frame [dB]", "best frame [dB]"]
    highlight: Any = dict.fromkeys(columns[1:], "max")
    means = Table("PSNR of luma", columns, rows, task.protocol.describe(task.scale), highlight)
    numbers = list(range(len(quality.network)))
    curve = Lines(
        "PSNR of each frame",
        "frame",
        "dB",
        {task.model: (numbers, quality.network), "bicubic": (numbers, quality.bicubic)},
    )
    speed = Note(f"{quality.frames_per_second:.2f} frames a second, without reading, shrinking and measuring.")
    shown = Images("The square with most detail", [(panel(*quality.shown), _PANEL)])
    gain = statistics.fmean(quality.network) - statistics.fmean(quality.bicubic)
    summary = (
        f"{task.model} enlarges the {len(numbers)} frames of {path.name} {task.scale} times at "
        f"{statistics.fmean(quality.network):.2f} dB, {signed(gain)} dB to bicubic interpolation."
    )
    sections = [Section("Quality", [means, curve, speed]), Section("Pictures", [shown])]
    return Report(f"Evaluation of {task.model}", summary, sections, provenance(data=str(path)))


def prediction_report(task: SuperResolution, done: Sequence[Enlarged], skipped: Sequence[Skipped]) -> Report:
    """What was enlarged, with a square of each beside bicubic interpolation."""
    rows: list[list[Cell]] = [
        [
            each.name,
            each.path,
            f"{each.before[1]} x {each.before[0]}",
            f"{each.after[1]} x {each.after[0]}",
            each.frames,
            each.seconds,
        ]
        for each in done[:_MOST_ROWS]
    ]
    caption = f"The first {_MOST_ROWS} of {len(done)}." if len(done) > _MOST_ROWS else ""
    table = Table("Files", ["file", "written", "size", "enlarged", "frames", "time [s]"], rows, caption)
    pictures = [(_before_after(task, each), f"{each.name}: bicubic, {task.model}") for each in done[:MOST_PICTURES]]
    links = Files("In this folder", {each.name: each.path for each in done[:_MOST_ROWS]})
    sections = [
        Section("Enlarged", [table, Images("The square with most detail", pictures), links]),
        *skipped_sections({each.path: each.reason for each in skipped}),
    ]
    files = "1 file" if len(done) == 1 else f"{len(done)} files"
    summary = f"{task.model} enlarged {files} {task.scale} times."
    return Report(f"Predictions of {task.model}", summary, sections, provenance())


def training_report(task: SuperResolution, run: Run) -> Report:
    """Curves of the training, quality on the test images, pictures and cost; writes the pictures in ``samples``."""
    measured, skipped = task.measure(task.splits["test"])
    write_qualities(run.folder / "quality.csv", measured)
    rows = run.read_metrics()
    for number, each in enumerate(measured[:MOST_PICTURES]):
        label = "".join(letter if letter.isalnum() else "-" for letter in Path(each.name).stem)[:40]
        with atomic_path(run.samples / f"{number:02d}_{label}.png") as part:
            Image.fromarray(panel(*each.shown)).save(part, format="PNG")
    best = max(rows, key=lambda row: (row["val_psnr"], row["epoch"]))
    chosen = f" Best epoch {best['epoch']:.0f} of {len(rows)}, chosen by the PSNR of the validation images."
    files = Files(
        "In the folder of the run",
        {
            "settings": "config.yaml",
            "weights of the best epoch": "checkpoints/best.safetensors",
            "one row an epoch": "metrics.csv",
            "quality of each test image": "quality.csv",
        },
    )
    origin = [Note(f"Started from {task.started_from}")] if task.started_from else []
    left_out = {each.path: each.reason for each in skipped} | task.unreadable
    sections = [
        Section("Quality on test images", [_means({task.model: measured}, task), _each_image(measured)]),
        Section("Pictures", _pictures(measured)),
        Section("Training", [*curves({task.model: rows}), _data_table(task), *origin]),
        Section("Cost", [cost_table({task.model: task}, {task.model: run})]),
        *skipped_sections(left_out),
        Section("Files", [files]),
    ]
    title = f"Super-resolution with {task.model}"
    return Report(title, _summary(task, measured) + chosen, sections, provenance(data=task.data))


def comparison_report(tasks: Mapping[str, SuperResolution], runs: Mapping[str, Run], folder: Path) -> Report:
    """Several networks that were trained on the same images under the same budget, side by side."""
    scales = {task.scale for task in tasks.values()}
    if len(scales) > 1:
        raise ValueError(f"the networks must enlarge by the same factor to be compared, got {sorted(scales)}")
    first = next(iter(tasks.values()))
    measured = {name: task.measure(task.splits["test"])[0] for name, task in tasks.items()}
    quality = {name: mean_quality(each.network for each in images) for name, images in measured.items()}
    bicubic = mean_quality(each.bicubic for each in next(iter(measured.values())))
    return compared(
        tasks,
        runs,
        folder,
        means=_means(measured, first),
        psnr={name: each.psnr for name, each in quality.items()},
        before=("bicubic", "bicubic interpolation", bicubic.psnr),
        rows=[
            (rows[0].name, [rows[0].shown[0], *(each.shown[1] for each in rows), rows[0].shown[2]])
            for rows in zip(*measured.values(), strict=True)
        ],
        images=len(next(iter(measured.values()))),
    )


# -- tables ------------------------------------------------------------------------------------------------------------


def _summary(task: SuperResolution, measured: Sequence[Measured]) -> str:
    network, bicubic = (mean_quality(getattr(each, which) for each in measured) for which in ("network", "bicubic"))
    images = "1 image" if len(measured) == 1 else f"{len(measured)} images"
    return (
        f"{task.model} enlarges {images} {task.scale} times at {network.psnr:.2f} dB, "
        f"{signed(network.psnr - bicubic.psnr)} dB to bicubic interpolation."
    )


def _means(measured: Mapping[str, Sequence[Measured]], task: SuperResolution) -> Table:
    bicubic = mean_quality(each.bicubic for each in next(iter(measured.values())))
    rows: list[list[Cell]] = [["bicubic", bicubic.psnr, bicubic.ssim, 0.0]]
    for name, images in measured.items():
        quality = mean_quality(each.network for each in images)
        rows.append([name, quality.psnr, quality.ssim, quality.psnr - bicubic.psnr])
    columns = ["", "PSNR [dB]", "SSIM", "gain [dB]"]
    highlight: Any = {"PSNR [dB]": "max", "SSIM": "max"}
    return Table("Means over the images", columns, rows, task.protocol.describe(task.scale), highlight)


def _each_image(measured: Sequence[Measured]) -> Table:
    rows: list[list[Cell]] = [
        [
            each.name,
            f"{each.shape[1]} x {each.shape[0]}",
            each.bicubic.psnr,
            each.network.psnr,
            each.network.psnr - each.bicubic.psnr,
            each.bicubic.ssim,
            each.network.ssim,
        ]
        for each in measured[:_MOST_ROWS]
    ]
    columns = ["image", "size", "bicubic PSNR [dB]", "PSNR [dB]", "gain [dB]", "bicubic SSIM", "SSIM"]
    caption = f"The first {_MOST_ROWS} of {len(measured)}; quality.csv has all." if len(measured) > _MOST_ROWS else ""
    return Table("Each image", columns, rows, caption)


def _data_table(task: SuperResolution) -> Table:
    rows: list[list[Cell]] = [[name, len(task.splits[name])] for name in ("train", "val", "test")]
    caption = (
        f"{len(task.train_set):,} patches of {task.patch_size} x {task.patch_size} pixels at low resolution, "
        f"{task.patch_stride} pixels apart."
    )
    if task.splits["test"] is task.splits["val"]:
        caption += " The data have no test part: the quality is measured on the images that chose the best epoch."
    return Table("Images", ["part", "images"], rows, caption)


# -- pictures ----------------------------------------------------------------------------------------------------------

_PANEL = f"bicubic, network, truth, error of the network times {_ERROR_GAIN}"


def panel(bicubic: Array, network: Array, truth: Array) -> Array:
    """Squares side by side: bicubic interpolation, the network, the truth, and the network's error, (H, W, 3) uint8."""
    error = _ERROR_GAIN * np.abs(network.astype(np.int16) - truth.astype(np.int16)).max(2, keepdims=True)
    return row_of([bicubic, network, truth, np.broadcast_to(error.clip(max=255).astype(np.uint8), truth.shape)])


def _pictures(measured: Sequence[Measured]) -> list[Part]:
    worst_first = sorted(measured, key=lambda each: each.network.psnr)[:MOST_PICTURES]
    pictures = [
        (panel(*each.shown), f"{each.name}: {each.bicubic.psnr:.2f} and {each.network.psnr:.2f} dB")
        for each in worst_first
    ]
    caption = f"From left to right: {_PANEL}."
    if len(measured) > len(pictures):
        caption += f" The {len(pictures)} worst of {len(measured)}."
    return [Images("The square with most detail", pictures, caption)]


def _before_after(task: SuperResolution, each: Enlarged) -> Array:
    """A square of the enlarged picture beside the same by bicubic interpolation."""
    before, after = each.sample
    side = max(1, min(_SHOWN // task.scale, *before.shape[:2]))
    grey = before.astype(np.float32).mean(2)
    rows, columns = (max(1, (length - side) // side + 1) for length in before.shape[:2])
    blocks = grey[: rows * side, : columns * side].reshape(rows, side, columns, side)
    y, x = (side * int(place) for place in np.unravel_index(int(blocks.std((1, 3)).argmax()), (rows, columns)))
    # A border around the square, so that interpolation at its edges sees what is there.
    top, left = max(0, y - 4), max(0, x - 4)
    around = task.protocol.bicubic(before[top : y + side + 4, left : x + side + 4], task.scale)
    dy, dx = task.scale * (y - top), task.scale * (x - left)
    length = task.scale * side
    big_y, big_x = task.scale * y, task.scale * x
    return row_of([around[dy : dy + length, dx : dx + length], after[big_y : big_y + length, big_x : big_x + length]])
