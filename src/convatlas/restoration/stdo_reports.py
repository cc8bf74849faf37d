"""What a user wants to see of a delivered video: quality for its bytes, where which network works, pictures, speed."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from convatlas.data.footage import Footage
from convatlas.data.images import Skipped
from convatlas.data.video import Frame
from convatlas.files import atomic_path
from convatlas.report import Bars, Cell, Files, Images, Lines, Note, Part, Report, Scatter, Section, Table
from convatlas.restoration.comparison import row_of, signed
from convatlas.restoration.delivery import Described, PackageBytes, network_bytes
from convatlas.restoration.delivery_quality import DeliveryQuality, PlainVideo, bytes_for, to_psnr
from convatlas.restoration.playing import Played
from convatlas.restoration.super_resolution_reports import panel
from convatlas.restoration.video_chunks import Chunks, PatchGrid
from convatlas.training.comparison import files_section
from convatlas.training.left_out import skipped_sections
from convatlas.training.measure import count_parameters, provenance
from convatlas.training.run import Run

if TYPE_CHECKING:
    from convatlas.restoration.stdo import VideoDelivery

__all__ = ["chunk_map", "comparison_report", "evaluation_report", "playing_report", "training_report"]

Array = npt.NDArray[Any]

#: Side of the squares that are shown.
_SHOWN = 96
#: Seconds that a network of NAS serves.
_SEGMENT = 5.0
_JOINED = "Up and to the left is better. Joined: the clip itself, encoded plainly."
_PANEL = "bicubic, networks, truth, error of the networks times 4"


def training_report(
    task: VideoDelivery,
    run: Run,
    footage: Footage,
    quality: DeliveryQuality,
    plain: Sequence[PlainVideo],
    chunks: Chunks,
    labels: Array | None,
) -> Report:
    """Quality and bytes of a finished run, its chunks, curves of the fits, pictures; writes these in ``samples``."""
    for name, picture in (("squares", _squares(quality)), ("chunks", chunk_map(quality, task))):
        with atomic_path(run.samples / f"{name}.png") as part:
            Image.fromarray(picture).save(part, format="PNG")
    rows = run.read_metrics()
    fits = sorted({int(row["fit"]) for row in rows})
    names = [path.name for path in _fit_folders(run)]
    curves: dict[str, Any] = {}
    for fit, name in zip(fits, names, strict=False):
        own = [row for row in rows if row["fit"] == fit]
        curves[name] = ([row["epoch"] for row in own], [row["val_psnr"] for row in own])
    links = {
        "settings": "config.yaml",
        "package: all that a client needs": "package",
        "label of each patch": "labels.npy",
        "chunk of each patch": "assignment.npy",
        "quality of each frame": "quality.csv",
        **{f"fit of {name}": f"fits/{name}/report.html" for name in names},
    }
    if labels is None:
        del links["label of each patch"]
    sections = [
        Section("Quality and bytes", _delivery_parts(task, footage, quality, plain)),
        Section("Chunks", _chunk_parts(task, quality, chunks, labels)),
        Section("Pictures", _pictures(task, quality)),
        Section("Fits", [Lines("PSNR of the fitted patches", "epoch", "dB", curves)]),
        Section("Files", [Files("In the folder of the run", links)]),
    ]
    title = f"Delivery of {footage.name} with {task.model}"
    return Report(title, _summary(task, quality, footage, plain), sections, provenance(data=task.data))


def evaluation_report(
    task: VideoDelivery, footage: Footage, quality: DeliveryQuality, plain: Sequence[PlainVideo]
) -> Report:
    """Quality and bytes of a delivered video, measured again."""
    sections = [
        Section("Quality and bytes", _delivery_parts(task, footage, quality, plain)),
        Section("Pictures", _pictures(task, quality)),
    ]
    title = f"Evaluation of the delivery of {footage.name}"
    return Report(title, _summary(task, quality, footage, plain), sections, provenance(data=str(footage.name)))


def playing_report(described: Described, done: Sequence[Played], skipped: Sequence[Skipped]) -> Report:
    """What was played, with a frame of each beside bicubic interpolation."""
    rows: list[list[Cell]] = [
        [
            each.name,
            each.path,
            f"{each.before[1]} x {each.before[0]}",
            f"{each.after[1]} x {each.after[0]}",
            each.frames,
            each.networks,
            each.seconds,
            each.frames / each.seconds,
        ]
        for each in done
    ]
    columns = ["file", "written", "size", "enlarged", "frames", "networks", "time [s]", "frames a second"]
    pictures = [(_beside(each), f"{each.name}: bicubic, networks") for each in done]
    sections = [
        Section(
            "Played",
            [
                Table("Videos", columns, rows, "Frames a second: with reading and writing."),
                Images("A square of a frame", pictures),
                Files("In this folder", {each.name: each.path for each in done}),
            ],
        ),
        *skipped_sections({each.path: each.reason for each in skipped}),
    ]
    videos = "1 video" if len(done) == 1 else f"{len(done)} videos"
    return Report(f"Playing with {described.model}", f"Played {videos}.", sections, provenance())


def comparison_report(
    tasks: Mapping[str, VideoDelivery],
    runs: Mapping[str, Run],
    footage: Footage,
    qualities: Mapping[str, DeliveryQuality],
    plain: Sequence[PlainVideo],
) -> Report:
    """Several ways to deliver one clip, from the best quality down."""
    ranked = sorted(tasks, key=lambda name: qualities[name].psnr, reverse=True)
    rows: list[list[Cell]] = []
    points: dict[str, tuple[float, float]] = {}
    for name in ranked:
        task, quality = tasks[name], qualities[name]
        sizes, seconds = PackageBytes.of(task.folder), _seconds(task, footage)
        networks = task.playback.networks
        points[name] = (sizes.total / seconds / 1000, quality.psnr)
        rows.append(
            [
                name,
                task.model,
                len(networks),
                count_parameters(networks[0]),
                quality.psnr,
                quality.psnr - quality.bicubic_psnr,
                sizes.total / 1000,
                sizes.total / seconds / 1000,
                quality.frames_per_second,
            ]
        )
    columns = [
        *("", "network", "networks", "parameters of one", "PSNR [dB]", "gain [dB]", "bytes [kB]", "a second [kB]"),
        "frames a second",
    ]
    highlight: Any = {"PSNR [dB]": "max", "bytes [kB]": "min", "frames a second": "max"}
    table = Table("Side by side", columns, rows, f"PSNR of the whole of {footage.name}, RGB.", highlight)
    first = next(iter(tasks.values()))
    points |= _plain_points(plain, _seconds(first, footage))
    scatter = Scatter(
        "Quality for bytes", "kB a second", "PSNR [dB]", points, True, _JOINED, tuple(_plain_points(plain, 1.0))
    )
    frames = Lines(
        "PSNR of each frame",
        "frame",
        "dB",
        {name: _frame_psnr(qualities[name].network) for name in ranked}
        | {"bicubic": _frame_psnr(qualities[ranked[0]].bicubic)},
    )
    squares = [_square(qualities[name].shown, which) for name, which in [(ranked[0], 0), *((n, 1) for n in ranked)]]
    squares.append(_square(qualities[ranked[0]].shown, 2))
    picture = Images("The square with most detail", [(row_of(squares), f"bicubic, {', '.join(ranked)}, truth")])
    sections = [
        Section("Side by side", [table, scatter, frames]),
        Section("Pictures", [picture]),
        files_section(runs, next(iter(runs.values())).folder.parent),
    ]
    best = qualities[ranked[0]]
    summary = (
        f"{ranked[0]} is the best: {best.psnr:.2f} dB, {signed(best.psnr - best.bicubic_psnr)} dB to bicubic "
        "interpolation of the same small clip."
    )
    return Report(f"Deliveries of {footage.name}", summary, sections, provenance(data=first.data))


# -- quality and bytes -------------------------------------------------------------------------------------------------


def _seconds(task: VideoDelivery, footage: Footage) -> float:
    return float(task.described.frames / footage.fps)


def _summary(task: VideoDelivery, quality: DeliveryQuality, footage: Footage, plain: Sequence[PlainVideo]) -> str:
    sizes, seconds = PackageBytes.of(task.folder), _seconds(task, footage)
    count = len(task.playback.networks)
    networks = "one network" if count == 1 else f"{count} networks"
    text = (
        f"{quality.psnr:.2f} dB at {sizes.total / seconds / 1000:.1f} kB a second with {networks}, "
        f"{signed(quality.psnr - quality.bicubic_psnr)} dB to bicubic interpolation."
    )
    needed = bytes_for(quality.psnr, plain)
    if needed is not None:
        text += f" The clip itself, encoded plainly, takes {needed / seconds / 1000:.1f} kB a second for that."
    return text


def _delivery_parts(
    task: VideoDelivery, footage: Footage, quality: DeliveryQuality, plain: Sequence[PlainVideo]
) -> list[Part]:
    sizes, seconds = PackageBytes.of(task.folder), _seconds(task, footage)
    parameters = count_parameters(task.playback.networks[0])
    count, store = len(task.playback.networks), task.described.store
    rows: list[list[Cell]] = [
        ["package", quality.psnr, quality.patch_psnr, sizes.total / 1000, sizes.total / seconds / 1000],
        ["small clip, bicubic", quality.bicubic_psnr, None, sizes.low / 1000, sizes.low / seconds / 1000],
        *(
            [f"clip itself, rate factor {each.crf}", each.psnr, None, each.bytes / 1000, each.bytes / seconds / 1000]
            for each in plain
        ),
    ]
    if footage.clip is not None:
        size = footage.clip.stat().st_size
        rows.append(["clip as it was given", None, None, size / 1000, size / seconds / 1000])
    columns = ["", "PSNR [dB]", "without borders of patches [dB]", "bytes [kB]", "a second [kB]"]
    caption = (
        f"PSNR of the whole clip over RGB of 8 bits: of the mean error. Borders: {task.border} pixels along each "
        "side of a patch, as the paper measures it. Clips are H.264 with their sound."
    )
    quality_table = Table("Quality for bytes", columns, rows, caption)
    points = {
        "package": (sizes.total / seconds / 1000, quality.psnr),
        "bicubic": (sizes.low / seconds / 1000, quality.bicubic_psnr),
        **_plain_points(plain, seconds),
    }
    scatter = Scatter(
        "Quality for bytes",
        "kB a second",
        "PSNR [dB]",
        points,
        True,
        _JOINED,
        tuple(_plain_points(plain, seconds)),
    )
    bars = Bars(
        "What the bytes are for",
        "kB",
        {"small clip": sizes.low / 1000, "networks": sizes.networks / 1000, "chunks": sizes.chunks / 1000},
    )
    segments = max(1, math.ceil(seconds / _SEGMENT))
    formula: list[list[Cell]] = [
        [name, number, parameters, network_bytes(parameters, store, number) / 1000]
        for name, number in (
            ("delivered", count),
            ("a network for 5 s each (NAS)", segments),
            ("one network (awDNN)", 1),
        )
    ]
    index = task.playback.index
    bits = math.ceil(math.log2(count)) * index.size / 8 / 1000 if count > 1 else 0.0
    networks = Table(
        f"Bytes of networks in {store}",
        ["", "networks", "parameters of one", "bytes [kB]"],
        formula,
        f"Networks x parameters x bytes of one. The chunks of {index.size:,} patches take {bits:.3g} kB in whole bits, "
        f"{sizes.chunks / 1000:.3g} kB as they are delivered.",
    )
    frames = Lines(
        "PSNR of each frame",
        "frame",
        "dB",
        {"networks": _frame_psnr(quality.network), "bicubic": _frame_psnr(quality.bicubic)},
    )
    speed = Note(f"{quality.frames_per_second:.2f} frames a second on this machine, without decoding.")
    return [quality_table, scatter, bars, networks, frames, speed]


def _plain_points(plain: Sequence[PlainVideo], seconds: float) -> dict[str, tuple[float, float]]:
    return {f"rate factor {each.crf}": (each.bytes / seconds / 1000, each.psnr) for each in plain}


def _frame_psnr(errors: Sequence[float]) -> tuple[list[int], list[float]]:
    values = [to_psnr(error) for error in errors]
    return list(range(len(errors))), [value if math.isfinite(value) else math.nan for value in values]


# -- chunks ------------------------------------------------------------------------------------------------------------


def _chunk_parts(task: VideoDelivery, quality: DeliveryQuality, chunks: Chunks, labels: Array | None) -> list[Part]:
    errors = quality.patches.reshape(-1)
    rows: list[list[Cell]] = []
    for chunk in range(int(chunks.index.max()) + 1):
        members = chunks.index == chunk
        low, high = (None, None) if labels is None else (float(labels[members].min()), float(labels[members].max()))
        rows.append([f"chunk {chunk}", int(members.sum()), low, high, to_psnr(float(errors[members].mean()))])
    columns = ["", "patches", "least label [dB]", "largest label [dB]", "PSNR with the networks [dB]"]
    how = {
        "psnr": "PSNR of the general network"
        if task.general_epochs or task.weights
        else "PSNR of bicubic interpolation",
        "variance": "variance of luma in decibels",
        "dct": "weighted energy of the cosine transform in decibels",
        "time": "time",
        "random": "chance",
    }[task.division]
    caption = f"Divided by {how}; chunk 0 is the hardest." if labels is not None else f"Divided by {how}."
    parts: list[Part] = [Table("Chunks", columns, rows, caption)]
    if labels is not None:
        finite = labels[np.isfinite(labels)]
        if len(finite):
            counts, edges = np.histogram(finite, bins=min(40, max(2, len(finite) // 4)))
            middles = (edges[1:] + edges[:-1]) / 2
            parts.append(
                Lines(
                    "Labels of the patches",
                    f"{how} [dB]",
                    "patches",
                    {"patches": (middles.tolist(), counts.tolist())},
                    caption="Chunks are equally large parts of this from left to right.",
                )
            )
    frames, patches = quality.patches.shape
    of_frame = chunks.index.reshape(frames, patches)
    shares = {
        f"chunk {chunk}": (list(range(frames)), (100 * (of_frame == chunk).mean(1)).tolist())
        for chunk in range(int(chunks.index.max()) + 1)
    }
    parts.append(Lines("Share of the patches of each frame", "frame", "%", shares))
    return parts


def chunk_map(quality: DeliveryQuality, task: VideoDelivery) -> Frame:
    """A frame whose patches are tinted by the network that enlarges them, (H, W, 3) uint8."""
    frame = quality.shown[1].astype(np.float32)
    height, width = frame.shape[:2]
    index = task.playback.index[quality.shown_number]
    grid: PatchGrid = task.playback.grid
    sizes = grid.patch_size(*(task.scale * length for length in task.playback.low_size))
    tint = np.repeat(np.repeat(index.reshape(grid.rows, grid.columns), sizes[0], 0), sizes[1], 1)[:height, :width]
    count = max(1, len(task.playback.networks))
    colours = np.array([colorsys.hsv_to_rgb(number / count, 0.9, 1.0) for number in range(count)]) * 255
    tinted = 0.6 * frame + 0.4 * colours[tint]
    edge = np.zeros((height, width), bool)
    edge[:: sizes[0]], edge[:, :: sizes[1]] = True, True
    tinted[edge] *= 0.8
    return np.asarray(tinted.round().clip(0, 255), np.uint8)


# -- pictures ----------------------------------------------------------------------------------------------------------


def _pictures(task: VideoDelivery, quality: DeliveryQuality) -> list[Part]:
    number = quality.shown_number
    squares = (_squares(quality), f"frame {number}: {_PANEL}")
    parts: list[Part] = [Images("The square with most detail", [squares])]
    if len(task.playback.networks) > 1:
        caption = "A colour for each network, from the hardest chunk (red) on." if task.division == "psnr" else ""
        parts.append(Images("Which network enlarges what", [(chunk_map(quality, task), f"frame {number}")], caption))
    return parts


def _squares(quality: DeliveryQuality) -> Frame:
    return np.asarray(panel(*(_square(quality.shown, which) for which in range(3))), np.uint8)


def _square(shown: Sequence[Frame], which: int) -> Frame:
    """The square of one of the pictures in which the last of them has most detail."""
    top, left, side = _busiest(shown[-1])
    return np.ascontiguousarray(shown[which][top : top + side, left : left + side])


def _busiest(picture: Frame) -> tuple[int, int, int]:
    side = min(_SHOWN, *picture.shape[:2])
    grey = picture.astype(np.float32).mean(2)
    step = max(1, side // 4)
    corners = [
        (top, left)
        for top in range(0, picture.shape[0] - side + 1, step)
        for left in range(0, picture.shape[1] - side + 1, step)
    ]
    top, left = max(corners, key=lambda corner: _detail(grey[corner[0] : corner[0] + side, corner[1] :][:, :side]))
    return top, left, side


def _detail(grey: Array) -> float:
    return float(np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean())


def _beside(each: Played) -> Frame:
    return np.asarray(row_of([_square(each.shown, 0), _square(each.shown, 1)]), np.uint8)


def _fit_folders(run: Run) -> list[Path]:
    """The fits in their order: the general one first."""
    folders = [path for path in (run.folder / "fits").iterdir() if (path / "metrics.csv").is_file()]
    return sorted(folders, key=lambda path: (path.name != "general", len(path.name), path.name))
