"""What a user wants to see of a network that enlarges volumes: quality beside interpolation, noise, slices, cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from convatlas.data.images import Skipped
from convatlas.files import atomic_path
from convatlas.report import Cell, Files, Images, Lines, Note, Part, Report, Section, Table
from convatlas.restoration.comparison import signed
from convatlas.restoration.volume_evaluation import (
    MeasuredVolume,
    VolumeQuality,
    mean_volume_quality,
    write_measured,
)
from convatlas.restoration.volume_pictures import RESIDUAL_GAIN
from convatlas.restoration.volume_upscaling import EnlargedScan
from convatlas.training.comparison import cost_table, files_section, listed, side_by_side
from convatlas.training.left_out import skipped_sections
from convatlas.training.measure import provenance
from convatlas.training.run import Run

if TYPE_CHECKING:
    from convatlas.restoration.volume_super_resolution import VolumeSuperResolution

__all__ = ["comparison_report", "evaluation_report", "prediction_report", "training_report"]

Array = npt.NDArray[Any]

_MOST_ROWS = 100
_MOST_PICTURES = 4
_GAP = 4
_ROWS = ("linear", "network", "truth", "linear residual", "network residual")
_RED_BLUE = (
    f"Residuals: red is too bright, blue too dark; full colour is {100 // RESIDUAL_GAIN} % of the range and more."
)
_PARTS = {
    "train_plain": "mean absolute difference",
    "train_adversarial": "adversarial loss of the network",
    "train_features": "distance of features",
    "train_discriminator": "loss of the discriminator; 0.69 where it cannot tell",
}


def evaluation_report(
    task: VolumeSuperResolution, measured: Sequence[MeasuredVolume], skipped: Sequence[Skipped]
) -> Report:
    """Quality on volumes of which the truth is known."""
    sections = [
        *_quality_sections({task.model: measured}, task),
        Section("Each volume", [_each_volume(measured)]),
        Section("Slices", _pictures(measured)),
        *skipped_sections({each.path: each.reason for each in skipped}),
    ]
    return Report(f"Evaluation of {task.model}", _summary(task, measured), sections, provenance())


def training_report(task: VolumeSuperResolution, run: Run) -> Report:
    """Curves of the training, quality on the test volumes, slices and cost; writes the slices in ``samples``."""
    measured, skipped = task.measure(task.splits["test"])
    write_measured(run.folder / "quality.csv", measured)
    rows = run.read_metrics()
    for number, each in enumerate(measured[:_MOST_PICTURES]):
        label = "".join(letter if letter.isalnum() else "-" for letter in Path(each.name).name)[:40]
        for mark, slices in (("", each.slices), ("_noisy", each.noisy_slices)):
            with atomic_path(run.samples / f"{number:02d}_{label}{mark}.png") as part:
                Image.fromarray(_stacked([slices[row] for row in _ROWS])).save(part, format="PNG")
    best = max(rows, key=lambda row: (row["val_psnr"], row["epoch"]))
    chosen = f" Best epoch {best['epoch']:.0f} of {len(rows)}, chosen by the PSNR of the validation volumes."
    counts: list[list[Cell]] = [[name, len(task.splits[name])] for name in ("train", "val", "test")]
    caption = f"{len(task.train_set):,} patches of {task.patch_size} voxels a side, {task.patch_stride} voxels apart."
    if task.splits["test"] is task.splits["val"]:
        caption += " The data have no test part: the quality is measured on the volumes that chose the best epoch."
    files = {
        "settings": "config.yaml",
        "weights of the best epoch": "checkpoints/best.safetensors",
        "one row an epoch": "metrics.csv",
        "quality of each test volume": "quality.csv",
    }
    origin = [Note(f"Started from {task.started_from}")] if task.started_from else []
    sections = [
        *_quality_sections({task.model: measured}, task),
        Section("Slices", _pictures(measured)),
        Section("Each volume", [_each_volume(measured)]),
        Section(
            "Training", [*_curves({task.model: rows}), Table("Volumes", ["part", "volumes"], counts, caption), *origin]
        ),
        Section("Cost", [cost_table({task.model: task}, {task.model: run})]),
        *skipped_sections({each.path: each.reason for each in skipped} | task.unreadable),
        Section("Files", [Files("In the folder of the run", files)]),
    ]
    title = f"Super-resolution of volumes with {task.model}"
    return Report(title, _summary(task, measured) + chosen, sections, provenance(data=task.data))


def comparison_report(tasks: Mapping[str, VolumeSuperResolution], runs: Mapping[str, Run], folder: Path) -> Report:
    """Several networks, or ways to train them, on the same volumes under the same budget, side by side.

    Raises:
        ValueError: they enlarge by different factors, or undo different degradations.
    """
    ways = {(task.scale, task.degradation, task.noise) for task in tasks.values()}
    if len(ways) > 1:
        raise ValueError("the networks must enlarge by one factor, undo one degradation and meet one noise")
    first = next(iter(tasks.values()))
    measured = {name: task.measure(task.splits["test"])[0] for name, task in tasks.items()}
    ranking = {}
    for name, volumes in measured.items():
        clean, noisy = _mean(volumes, "network"), _mean(volumes, "noisy_network")
        ranking[name] = {"PSNR [dB]": clean.psnr, "SSIM": clean.ssim, "PSNR from noisy [dB]": noisy.psnr}
    ranked, parts = side_by_side(tasks, runs, ranking)
    rows: list[tuple[Array, str]] = []
    for same in list(zip(*(measured[name] for name in ranked), strict=True))[:_MOST_PICTURES]:
        for kind, what in (("slices", ""), ("noisy_slices", ", from noisy low resolution")):
            shown = [getattr(volume, kind) for volume in same]
            stack = [shown[0]["linear"], *(each["network"] for each in shown), shown[0]["truth"]]
            stack += [each["network residual"] for each in shown]
            rows.append((_stacked(stack), f"{same[0].name}{what}"))
    caption = (
        f"From top to bottom: linear interpolation, {listed(ranked)}, truth, residuals of {listed(ranked)}. {_RED_BLUE}"
    )
    linear, winner = _mean(measured[ranked[0]], "linear"), ranked[0]
    sections = [
        *_quality_sections({name: measured[name] for name in ranked}, first),
        Section("Side by side", parts),
        Section("Slices", [Images("Through the middle", rows, caption)]),
        Section("Training", _curves({name: run.read_metrics() for name, run in runs.items()})),
        files_section(runs, folder),
    ]
    gain = signed(ranking[winner]["PSNR [dB]"] - linear.psnr)
    summary = (
        f"{winner} is the best: {ranking[winner]['PSNR [dB]']:.2f} dB on held-out volumes, {gain} dB to trilinear "
        "interpolation. All were trained on the same volumes with the same budget."
    )
    return Report(f"{listed(tasks)} on {first.data}", summary, sections, provenance(data=first.data))


def prediction_report(task: VolumeSuperResolution, done: Sequence[EnlargedScan], skipped: Sequence[Skipped]) -> Report:
    """What was enlarged, with three slices of each beside linear interpolation."""
    rows: list[list[Cell]] = [
        [
            each.name,
            each.path,
            " x ".join(map(str, each.before)),
            " x ".join(map(str, each.after)),
            " x ".join(f"{length:.3g}" for length in each.spacing),
            each.seconds,
        ]
        for each in done[:_MOST_ROWS]
    ]
    columns = ["file", "written", "voxels", "enlarged", "voxel size [mm]", "time [s]"]
    caption = f"The first {_MOST_ROWS} of {len(done)}." if len(done) > _MOST_ROWS else ""
    pictures = [(_stacked(each.pictures), each.name) for each in done[:_MOST_PICTURES]]
    shown = (
        f"From top to bottom: linear interpolation, {task.model}, and what it has changed: red is brighter, blue "
        f"darker; full colour is {100 // RESIDUAL_GAIN} % of the range and more."
    )
    links = Files("In this folder", {each.name: each.path for each in done[:_MOST_ROWS]})
    sections = [
        Section(
            "Enlarged", [Table("Files", columns, rows, caption), Images("Through the middle", pictures, shown), links]
        ),
        *skipped_sections({each.path: each.reason for each in skipped}),
    ]
    files = "1 volume" if len(done) == 1 else f"{len(done)} volumes"
    summary = f"{task.model} enlarged {files} {task.scale} times along each axis."
    return Report(f"Predictions of {task.model}", summary, sections, provenance())


# -- tables and pictures -----------------------------------------------------------------------------------------------


def _mean(measured: Sequence[MeasuredVolume], which: str) -> VolumeQuality:
    return mean_volume_quality(getattr(each, which) for each in measured)


def _summary(task: VolumeSuperResolution, measured: Sequence[MeasuredVolume]) -> str:
    network, linear = _mean(measured, "network"), _mean(measured, "linear")
    noisy, noisy_linear = _mean(measured, "noisy_network"), _mean(measured, "noisy_linear")
    volumes = "1 volume" if len(measured) == 1 else f"{len(measured)} volumes"
    return (
        f"{task.model} enlarges {volumes} {task.scale} times at {network.psnr:.2f} dB, "
        f"{signed(network.psnr - linear.psnr)} dB to trilinear interpolation, and from noisy ones at "
        f"{noisy.psnr:.2f} dB, {signed(noisy.psnr - noisy_linear.psnr)} dB to it."
    )


def _quality_sections(measured: Mapping[str, Sequence[MeasuredVolume]], task: VolumeSuperResolution) -> list[Section]:
    some = next(iter(measured.values()))
    sharp = float(np.mean([each.sharpness for each in some]))
    made = {"linear": "trilinear interpolation", "nearest": "picked voxels", "kspace": "a cropped spectrum"}
    clean = (
        f"Low resolution is made by {made[task.degradation]}. SSIM under a flat window of 7 voxels, of volumes and of "
        f"their slices; sharpness is the mean length of the gradient, {sharp:.4f} for the truth."
    )
    noisy = f"Gaussian noise of standard deviation {task.noise:g} of the range is added to low resolution."
    return [
        Section("Quality", [_means(measured, "linear", "network", clean)]),
        Section("Noise cleaning", [_means(measured, "noisy_linear", "noisy_network", noisy)]),
    ]


def _means(measured: Mapping[str, Sequence[MeasuredVolume]], linear: str, network: str, caption: str) -> Table:
    some = next(iter(measured.values()))
    base = _mean(some, linear)
    rows: list[list[Cell]] = [["trilinear", *base, 0.0]]
    for name, volumes in measured.items():
        mean = _mean(volumes, network)
        rows.append([name, *mean, mean.psnr - base.psnr])
    columns = ["", "PSNR [dB]", "SSIM", "slice SSIM", "NRMSE", "sharpness", "gain [dB]"]
    highlight: Any = {"PSNR [dB]": "max", "SSIM": "max", "slice SSIM": "max", "NRMSE": "min"}
    return Table("Means over the volumes", columns, rows, caption, highlight)


def _each_volume(measured: Sequence[MeasuredVolume]) -> Table:
    rows: list[list[Cell]] = [
        [
            each.name,
            " x ".join(map(str, each.shape)),
            *(each.linear.psnr, each.network.psnr, each.linear.ssim, each.network.ssim),
            *(each.noisy_linear.psnr, each.noisy_network.psnr),
        ]
        for each in measured[:_MOST_ROWS]
    ]
    columns = [
        *("volume", "voxels", "trilinear PSNR [dB]", "PSNR [dB]", "trilinear SSIM", "SSIM"),
        *("noisy trilinear PSNR [dB]", "noisy PSNR [dB]"),
    ]
    caption = f"The first {_MOST_ROWS} of {len(measured)}; quality.csv has all." if len(measured) > _MOST_ROWS else ""
    return Table("Each volume", columns, rows, caption)


def _pictures(measured: Sequence[MeasuredVolume]) -> list[Part]:
    worst_first = sorted(measured, key=lambda each: each.network.psnr)[:_MOST_PICTURES]
    clean = [
        (
            _stacked([each.slices[row] for row in _ROWS]),
            f"{each.name}: {each.linear.psnr:.2f} and {each.network.psnr:.2f} dB",
        )
        for each in worst_first
    ]
    noisy = [
        (
            _stacked([each.noisy_slices[row] for row in _ROWS]),
            f"{each.name}: {each.noisy_linear.psnr:.2f} and {each.noisy_network.psnr:.2f} dB",
        )
        for each in worst_first
    ]
    caption = (
        "Axial, coronal and sagittal; from top to bottom linear interpolation, network, truth, residual of "
        f"interpolation, residual of the network. {_RED_BLUE}"
    )
    return [Images("Through the middle", clean, caption), Images("From noisy low resolution", noisy, caption)]


def _stacked(pictures: Sequence[Array]) -> Array:
    """Pictures (H, W, 3) of one width, one below the other."""
    gap = np.full((_GAP, pictures[0].shape[1], 3), 255, np.uint8)
    parts = [part for picture in pictures for part in (picture, gap)]
    return np.concatenate(parts[:-1])


def _curves(rows: Mapping[str, Sequence[Mapping[str, float]]]) -> list[Part]:
    def series(key: str) -> dict[str, tuple[list[float], list[float]]]:
        having = {name: table for name, table in rows.items() if table and key in table[0]}
        return {name: ([row["epoch"] for row in table], [row[key] for row in table]) for name, table in having.items()}

    curves = [
        Lines("PSNR", "epoch", "validation PSNR [dB]", series("val_psnr")),
        Lines("Loss", "epoch", "training loss, of all steps together", series("train_loss")),
    ]
    parts: list[Part] = [curve for curve in curves if curve.series]
    parts += [
        Lines(f"Loss: {key.removeprefix('train_')}", "epoch", what, series(key))
        for key, what in _PARTS.items()
        if series(key)
    ]
    return parts
