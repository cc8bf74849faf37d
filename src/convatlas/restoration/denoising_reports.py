"""What a user wants to see of a denoising network: quality before and after, pictures, cost; the files it cleans."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from convatlas.data.image_files import Unreadable
from convatlas.data.images import Skipped
from convatlas.data.pictures import Picture, read_picture, write_picture
from convatlas.errors import DataError
from convatlas.files import atomic_path, free_name
from convatlas.networks.base import Denoiser
from convatlas.report import Cell, Files, Images, Note, Part, Report, Section, Table
from convatlas.restoration.comparison import MOST_PICTURES, compared, cost_table, curves, row_of, signed
from convatlas.restoration.denoising_evaluation import Cleaned, denoise_image, means, write_cleaned
from convatlas.restoration.naming import JPEG, found_files, shown
from convatlas.training.left_out import skipped_sections
from convatlas.training.measure import provenance
from convatlas.training.progress import progress
from convatlas.training.run import Run

if TYPE_CHECKING:
    from convatlas.restoration.denoising import Denoising

__all__ = [
    "CleanedFile",
    "clean_files",
    "comparison_report",
    "evaluation_report",
    "prediction_report",
    "training_report",
]

Array = npt.NDArray[Any]

_MOST_ROWS = 100
_SHOWN = 160
#: What differences are multiplied by to be seen.
_ERROR_GAIN = 4
_PANEL = f"noisy, cleaned, truth, error of the cleaned one times {_ERROR_GAIN}"


def evaluation_report(task: Denoising, measured: Sequence[Cleaned], skipped: Sequence[Skipped]) -> Report:
    """Quality on images of which the truth is known."""
    sections = [
        Section("Quality", [_means({task.model: measured}, task), _each_image(measured)]),
        Section("Pictures", _pictures(measured)),
        *skipped_sections({each.path: each.reason for each in skipped}),
    ]
    return Report(f"Evaluation of {task.model}", _summary(task, measured), sections, provenance())


def training_report(task: Denoising, run: Run) -> Report:
    """Curves of the training, quality on the test images, pictures and cost; writes the pictures in ``samples``."""
    measured, skipped = task.measure(task.splits["test"])
    write_cleaned(run.folder / "quality.csv", measured)
    rows = run.read_metrics()
    for number, each in enumerate(measured[:MOST_PICTURES]):
        label = "".join(letter if letter.isalnum() else "-" for letter in Path(each.name).stem)[:40]
        with atomic_path(run.samples / f"{number:02d}_{label}.png") as part:
            Image.fromarray(_panel(each)).save(part, format="PNG")
    best = max(rows, key=lambda row: (row["val_psnr"], row["epoch"]))
    chosen = f" Best epoch {best['epoch']:.0f} of {len(rows)}, chosen by the PSNR of the validation images."
    counts: list[list[Cell]] = [[name, len(task.splits[name])] for name in ("train", "val", "test")]
    caption = f"{len(task.train_set):,} patches of {task.patch_size} x {task.patch_size} pixels."
    if task.splits["test"] is task.splits["val"]:
        caption += " The data have no test part: the quality is measured on the images that chose the best epoch."
    files = {
        "settings": "config.yaml",
        "weights of the best epoch": "checkpoints/best.safetensors",
        "one row an epoch": "metrics.csv",
        "quality of each test image": "quality.csv",
    }
    origin = [Note(f"Started from {task.started_from}")] if task.started_from else []
    sections = [
        Section("Quality on test images", [_means({task.model: measured}, task), _each_image(measured)]),
        Section("Pictures", _pictures(measured)),
        Section(
            "Training", [*curves({task.model: rows}), Table("Images", ["part", "images"], counts, caption), *origin]
        ),
        Section("Cost", [cost_table({task.model: task}, {task.model: run})]),
        *skipped_sections({each.path: each.reason for each in skipped} | task.unreadable),
        Section("Files", [Files("In the folder of the run", files)]),
    ]
    title = f"Denoising with {task.model}"
    return Report(title, _summary(task, measured) + chosen, sections, provenance(data=task.data))


def comparison_report(tasks: Mapping[str, Denoising], runs: Mapping[str, Run], folder: Path) -> Report:
    """Several networks that were trained on the same images under the same budget, side by side.

    Raises:
        ValueError: they were trained for different noise or colours.
    """
    if len({(task.noise, task.colour) for task in tasks.values()}) > 1:
        raise ValueError("the networks must clean the same noise and colours to be compared")
    first = next(iter(tasks.values()))
    measured = {name: task.measure(task.splits["test"])[0] for name, task in tasks.items()}
    after = {name: means(images)[1] for name, images in measured.items()}
    before = means(next(iter(measured.values())))[0]
    return compared(
        tasks,
        runs,
        folder,
        means=_means(measured, first),
        psnr={name: each.psnr for name, each in after.items()},
        before=("noisy", "the noisy ones", before.psnr),
        rows=[
            (rows[0].name, [rows[0].shown[0], *(each.shown[1] for each in rows), rows[0].shown[2]])
            for rows in zip(*measured.values(), strict=True)
        ],
        images=len(next(iter(measured.values()))),
    )


# -- a user's files ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class CleanedFile:
    """A file that was cleaned.

    Attributes:
        name: of the input, as given or relative to a folder that was given.
        path: of the result, relative to the output folder.
        size: height and width.
        seconds: from reading to writing.
        sample: a square of the image before and after, (H, W, 3) uint8.
    """

    name: str
    path: str
    size: tuple[int, int]
    seconds: float
    sample: tuple[Array, Array]


def clean_files(
    model: Denoiser, inputs: Sequence[str | Path], folder: Path, check: Callable[[str, Array], None]
) -> tuple[list[CleanedFile], list[Skipped]]:
    """Clean image files and all in folders; transparency and colour profile are kept.

    Args:
        model: the network.
        inputs: files and folders.
        folder: where to write.
        check: called with the name and the pixels of each image; raises `Unreadable` to have it left out.

    Returns:
        What was written, and what was left out with the reasons.

    Raises:
        DataError: an input does not exist, or nothing can be read.
        OSError: a file cannot be written.
    """
    found = list(found_files(inputs, clips=False))
    if not found:
        raise DataError(f"there is no image in {', '.join(map(str, inputs)) or 'nothing'}")
    done: list[CleanedFile] = []
    skipped: list[Skipped] = []
    taken: set[str] = set()
    for path, name in found:
        started = time.perf_counter()
        try:
            picture = read_picture(path, name=name)
            check(name, picture.pixels)
        except Unreadable as error:
            skipped.append(Skipped(name, error.reason))
            continue
        with progress(name, None) as advance:
            pixels = denoise_image(model, picture.pixels, progress=lambda *_, advance=advance: advance())
        plain = picture.alpha is None and pixels.dtype == np.uint8
        suffix = path.suffix if path.suffix.lower() in JPEG and plain else ".png"
        written = free_name(name, "clean", suffix, taken)
        write_picture(folder / written, Picture(np.ascontiguousarray(pixels), picture.alpha, picture.icc))
        sample = _square(shown(picture.pixels), shown(pixels))
        done.append(CleanedFile(name, written, pixels.shape[:2], time.perf_counter() - started, sample))
    if not done:
        raise DataError(f"{skipped[0].path} cannot be cleaned: {skipped[0].reason}")
    return done, skipped


def prediction_report(task: Denoising, done: Sequence[CleanedFile], skipped: Sequence[Skipped]) -> Report:
    """What was cleaned, with a square of each."""
    rows: list[list[Cell]] = [
        [each.name, each.path, f"{each.size[1]} x {each.size[0]}", each.seconds] for each in done[:_MOST_ROWS]
    ]
    caption = f"The first {_MOST_ROWS} of {len(done)}." if len(done) > _MOST_ROWS else ""
    table = Table("Files", ["file", "written", "size", "time [s]"], rows, caption)
    pictures = [(row_of(each.sample), f"{each.name}: before, after") for each in done[:MOST_PICTURES]]
    links = Files("In this folder", {each.name: each.path for each in done[:_MOST_ROWS]})
    sections = [
        Section("Cleaned", [table, Images("The middle", pictures), links]),
        *skipped_sections({each.path: each.reason for each in skipped}),
    ]
    files = "1 file" if len(done) == 1 else f"{len(done)} files"
    return Report(f"Predictions of {task.model}", f"{task.model} cleaned {files}.", sections, provenance())


# -- tables and pictures -----------------------------------------------------------------------------------------------


def _summary(task: Denoising, measured: Sequence[Cleaned]) -> str:
    noisy, network = means(measured)
    images = "1 image" if len(measured) == 1 else f"{len(measured)} images"
    gain = signed(network.psnr - noisy.psnr)
    return f"{task.model} cleans {images} to {network.psnr:.2f} dB, {gain} dB to the noisy ones."


def _means(measured: Mapping[str, Sequence[Cleaned]], task: Denoising) -> Table:
    noisy = means(next(iter(measured.values())))[0]
    rows: list[list[Cell]] = [["noisy", noisy.psnr, noisy.ssim, 0.0]]
    for name, images in measured.items():
        _, network = means(images)
        rows.append([name, network.psnr, network.ssim, network.psnr - noisy.psnr])
    highlight: Any = {"PSNR [dB]": "max", "SSIM": "max"}
    columns = ["", "PSNR [dB]", "SSIM", "gain [dB]"]
    return Table("Means over the images", columns, rows, task.noise.describe(), highlight)


def _each_image(measured: Sequence[Cleaned]) -> Table:
    rows: list[list[Cell]] = [
        [
            each.name,
            f"{each.shape[1]} x {each.shape[0]}",
            each.noisy.psnr,
            each.network.psnr,
            each.network.psnr - each.noisy.psnr,
            each.noisy.ssim,
            each.network.ssim,
        ]
        for each in measured[:_MOST_ROWS]
    ]
    columns = ["image", "size", "noisy PSNR [dB]", "PSNR [dB]", "gain [dB]", "noisy SSIM", "SSIM"]
    caption = f"The first {_MOST_ROWS} of {len(measured)}; quality.csv has all." if len(measured) > _MOST_ROWS else ""
    return Table("Each image", columns, rows, caption)


def _panel(each: Cleaned) -> Array:
    noisy, network, truth = each.shown
    error = _ERROR_GAIN * np.abs(network.astype(np.int16) - truth.astype(np.int16)).max(2, keepdims=True)
    return row_of([noisy, network, truth, np.broadcast_to(error.clip(max=255).astype(np.uint8), truth.shape)])


def _pictures(measured: Sequence[Cleaned]) -> list[Part]:
    worst_first = sorted(measured, key=lambda each: each.network.psnr)[:MOST_PICTURES]
    pictures = [
        (_panel(each), f"{each.name}: {each.noisy.psnr:.2f} and {each.network.psnr:.2f} dB") for each in worst_first
    ]
    return [Images("The square with most detail", pictures, f"From left to right: {_PANEL}.")]


def _square(before: Array, after: Array) -> tuple[Array, Array]:
    side = min(_SHOWN, *before.shape[:2])
    y, x = ((length - side) // 2 for length in before.shape[:2])
    return before[y : y + side, x : x + side], after[y : y + side, x : x + side]
