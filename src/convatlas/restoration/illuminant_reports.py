"""What a user wants to see of estimates of the light: errors beside those of baselines, pictures, heat maps, cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from convatlas.data.images import Skipped
from convatlas.files import atomic_path
from convatlas.networks.colour_constancy.ensembles import DualExposureEnsemble
from convatlas.ops.illuminant import angular_error, error_statistics, reproduction_error
from convatlas.ops.log_chroma import rgb_to_log_chroma
from convatlas.report import Bars, Cell, Files, Images, Lines, Note, Part, Report, Section, Table
from convatlas.restoration.comparison import MOST_PICTURES, row_of
from convatlas.restoration.illuminant_evaluation import Estimate, MeasuredScene, errors_of, view, write_errors
from convatlas.restoration.illuminant_files import BalancedScene
from convatlas.training.comparison import comparison_report, cost_table
from convatlas.training.left_out import skipped_sections
from convatlas.training.measure import provenance
from convatlas.training.run import Run

if TYPE_CHECKING:
    from convatlas.restoration.illuminant_estimation import IlluminantEstimation

__all__ = [
    "comparison",
    "cross_validation_report",
    "evaluation_report",
    "illuminant_report",
    "prediction_report",
    "training_report",
]

Array = npt.NDArray[Any]

_MOST_ROWS = 100
#: Side of a map of log-chroma, and what it shows at least of u and v.
_SIDE, _MARGIN = 420, 0.1
#: How many times as large heat maps are drawn.
_ZOOM = 6
_TRUE, _FOUND = (30, 120, 60), (200, 40, 40)


def illuminant_report(estimates: Mapping[str, Tensor], truth: Tensor) -> Report:
    """Errors of any estimates of the light, in the statistics of the literature.

    Args:
        estimates: colours (N, 3) by name.
        truth: colours (N, 3).

    Raises:
        ValueError: the numbers of colours differ, or there is none.
    """
    for name, rgb in estimates.items():
        if rgb.shape != truth.shape or truth.dim() != 2:
            raise ValueError(f"{name} must be {tuple(truth.shape)} as the truth, got {tuple(rgb.shape)}")
    errors = {
        name: (angular_error(rgb.double(), truth.double()), reproduction_error(rgb.double(), truth.double()))
        for name, rgb in estimates.items()
    }
    best = min(errors, key=lambda name: float(errors[name][0].mean()))
    summary = f"{best} is the best: {float(errors[best][0].mean()):.2f} degrees on {len(truth)} scenes."
    return Report("Estimates of the light", summary, [Section("Errors", _tables(errors))], provenance())


def evaluation_report(
    task: IlluminantEstimation, measured: Sequence[MeasuredScene], skipped: Sequence[Skipped]
) -> Report:
    """Errors on scenes of which the light is known."""
    sections = [*_quality(task, measured), *skipped_sections({each.path: each.reason for each in skipped})]
    return Report(f"Evaluation of {task.model}", _summary(task, measured), sections, provenance())


def training_report(task: IlluminantEstimation, run: Run) -> Report:
    """Errors on the held-out scenes, pictures, what was learned, curves and cost; writes pictures in ``samples``."""
    measured, skipped = task.held_out()
    write_errors(run.folder / "errors.csv", measured)
    for number, each in enumerate(_worst_first(measured, task.model)):
        label = "".join(letter if letter.isalnum() else "-" for letter in each.name)[:40]
        with atomic_path(run.samples / f"{number:02d}_{label}.png") as part:
            Image.fromarray(_panel(each, task.model)).save(part, format="PNG")
    rows = run.read_metrics()
    counts: list[list[Cell]] = [[name, len(task.splits[name])] for name in ("train", "val", "test")]
    caption = ""
    if task.splits["test"] is task.splits["val"]:
        caption = "The data have no test part: errors are measured on the scenes that chose the best epoch."
    training: list[Part] = [*_curves(rows), Table("Scenes", ["part", "scenes"], counts, caption)]
    if task.started_from:
        training.append(Note(f"Started from {task.started_from}"))
    reasons = {each.path: each.reason for each in skipped} | task.unreadable
    files = {
        "settings": "config.yaml",
        "weights of the best epoch": "checkpoints/best.safetensors",
        "one row an epoch": "metrics.csv",
        "errors of each held-out scene": "errors.csv",
    }
    sections = [
        *_quality(task, measured),
        *_learned(task),
        Section("Training", training),
        Section("Cost", [cost_table({task.model: task}, {task.model: run})]),
        *skipped_sections(reasons),
        Section("Files", [Files("In the folder of the run", files)]),
    ]
    title = f"The light by {task.model}"
    return Report(title, _summary(task, measured), sections, provenance(data=task.data))


def cross_validation_report(
    task: IlluminantEstimation, folds: Sequence[tuple[list[MeasuredScene], list[Skipped]]], run: Run
) -> Report:
    """All scenes, each measured by the network that has not seen it."""
    measured = [each for found, _ in folds for each in found]
    write_errors(run.folder / "errors.csv", measured)
    rows: list[list[Cell]] = []
    for number, (found, _) in enumerate(folds, 1):
        statistics = error_statistics(errors_of(found, task.model)[0])
        rows.append([number, len(found), *(statistics[name] for name in ("mean", "median", "worst 25 %"))])
    columns = ["fold", "scenes", "mean [deg]", "median [deg]", "worst 25 % [deg]"]
    table = Table("Each fold", columns, rows, "Of scenes that the network of the fold has not seen.")
    links = {f"report of fold {number}": f"fold_{number}/report.html" for number in range(1, len(folds) + 1)}
    skipped = {each.path: each.reason for _, failed in folds for each in failed}
    sections = [
        *_quality(task, measured),
        Section("Folds", [table, Files("Runs", {**links, "errors of each scene": "errors.csv"})]),
        *skipped_sections(skipped),
    ]
    note = f" {len(folds)} networks, whose answers are averaged for new pictures."
    return Report(
        f"Cross-validation of {task.model}", _summary(task, measured) + note, sections, provenance(data=task.data)
    )


def comparison(tasks: Mapping[str, Any], runs: Mapping[str, Run], folder: Path) -> Report:
    """Several networks that were trained on the same scenes, with all statistics and with their average."""
    report = comparison_report(tasks, runs, folder)
    held_out = {label: task.held_out()[0] for label, task in tasks.items()}
    first = next(iter(held_out.values()))
    truth = torch.stack([each.truth for each in first])
    models = {label: task.model for label, task in tasks.items()}
    estimates = {
        label: torch.stack([each.rgb[models[label]] for each in measured]) for label, measured in held_out.items()
    }
    average = torch.nn.functional.normalize(torch.stack(list(estimates.values())).mean(0), dim=1)
    baselines = {
        name: torch.stack([each.rgb[name] for each in first]) for name in first[0].rgb if name not in models.values()
    }
    together = illuminant_report({**estimates, "average of all": average, **baselines}, truth)
    return Report(
        report.title, report.summary, [*report.sections[:1], *together.sections, *report.sections[1:]], provenance()
    )


def prediction_report(task: IlluminantEstimation, done: Sequence[BalancedScene], skipped: Sequence[Skipped]) -> Report:
    """What was found and written, with pictures before and after."""
    rows: list[list[Cell]] = []
    for each in done[:_MOST_ROWS]:
        size = f"{each.size[1]} x {each.size[0]}"
        rows.append([each.name, size, *each.rgb.tolist(), max(each.deviation), each.seconds])
    columns = ["scene", "size", "r", "g", "b", "deviation", "time [s]"]
    caption = (
        "The light has unit length; its gains stand in illuminants.csv. Deviation: the larger standard deviation of u "
        "and v, told by networks of the form ffcc themselves and by others through their errors on validation scenes."
    )
    if len(done) > _MOST_ROWS:
        caption += f" The first {_MOST_ROWS} of {len(done)}."
    parts: list[Part] = [Table("Light", columns, rows, caption)]
    if task.drift is not None and len(done) > 1:
        parts.append(_frames(done))
    shown = [(row_of(each.shown), f"{each.name}: as taken, white-balanced") for each in done[:MOST_PICTURES]]
    parts.append(Images("Pictures", shown, "Reduced, and encoded as sRGB to be looked at."))
    parts += _heat_maps([(each.name, each.found, None) for each in done[:MOST_PICTURES]])
    links = {each.name: each.paths[0] for each in done[:_MOST_ROWS]}
    parts.append(Files("In this folder", {"all numbers": "illuminants.csv", **links}))
    scenes = "1 scene" if len(done) == 1 else f"{len(done)} scenes"
    sections = [Section("Found", parts), *skipped_sections({each.path: each.reason for each in skipped})]
    return Report(f"Predictions of {task.model}", f"{task.model} found the light of {scenes}.", sections, provenance())


# -- tables ------------------------------------------------------------------------------------------------------------


def _summary(task: IlluminantEstimation, measured: Sequence[MeasuredScene]) -> str:
    means = {name: float(errors_of(measured, name)[0].mean()) for name in measured[0].rgb}
    others = {name: value for name, value in means.items() if name != task.model}
    best = min(others, key=lambda name: others[name])
    scenes = "1 scene" if len(measured) == 1 else f"{len(measured)} scenes"
    return (
        f"{task.model} misses the light of {scenes} by {means[task.model]:.2f} degrees in the mean; the best estimate "
        f"that learns no more than a mean, {best}, by {others[best]:.2f}."
    )


def _quality(task: IlluminantEstimation, measured: Sequence[MeasuredScene]) -> list[Section]:
    errors = {name: errors_of(measured, name) for name in measured[0].rgb}
    own = errors[task.model][0].tolist()
    rows: list[list[Cell]] = []
    for error, each in sorted(zip(own, measured, strict=True), key=lambda pair: -pair[0])[:_MOST_ROWS]:
        rows.append([each.name, error, *each.rgb[task.model].tolist(), *each.truth.tolist()])
    caption = "From the worst down; errors.csv has all."
    columns = ["scene", "error [deg]", "r", "g", "b", "true r", "true g", "true b"]
    table = Table("Each scene", columns, rows, caption)
    worst = _worst_first(measured, task.model)
    panels = [(_panel(each, task.model), f"{each.name}: {_error(each, task.model):.2f} degrees") for each in worst]
    pictures: list[Part] = [
        Images(
            "The worst scenes", panels, "From left to right: as taken, white-balanced by the estimate, by the truth."
        ),
        Images("Log-chroma", [(_chroma_map(measured, task.model), "u to the right, v upwards")], _map_caption()),
    ]
    pictures += _heat_maps(
        [(caption, each.found, each.truth) for (_, caption), each in zip(panels, worst, strict=True)]
    )
    return [Section("Errors on held-out scenes", [*_tables(errors), table]), Section("Pictures", pictures)]


def _tables(errors: Mapping[str, tuple[Tensor, Tensor]]) -> list[Part]:
    """Statistics of angular and reproduction errors by name."""
    parts: list[Part] = []
    for place, title in enumerate(("Angular error", "Reproduction error")):
        statistics = {name: error_statistics(each[place]) for name, each in errors.items()}
        columns = [f"{name} [deg]" for name in next(iter(statistics.values()))]
        rows: list[list[Cell]] = [[name, *each.values()] for name, each in statistics.items()]
        highlight: Any = dict.fromkeys(columns, "min")
        parts.append(Table(title, ["", *columns], rows, "", highlight))
    means = {name: float(each[0].mean()) for name, each in errors.items()}
    return [parts[0], Bars("Mean angular error", "angular error [deg]", means), *parts[1:]]


def _curves(rows: Sequence[Mapping[str, float]]) -> list[Part]:
    parts: list[Part] = []
    for key, title, label in (
        ("val_error", "Validation error", "mean angular error [deg]"),
        ("train_loss", "Loss", "training loss"),
    ):
        known = [row for row in rows if key in row]
        if len(known) > 1:
            parts.append(Lines(title, "epoch", label, {"": ([r["epoch"] for r in known], [r[key] for r in known])}))
    return parts


def _frames(done: Sequence[BalancedScene]) -> Part:
    """Log-chroma by frame, of each frame alone and smoothed."""
    number = list(range(1, len(done) + 1))
    alone = torch.stack([each.found.rgb for each in done])
    smooth = torch.stack([each.rgb for each in done])
    series = {}
    for name, rgb in (("alone", alone), ("smoothed", smooth)):
        for axis, letter in enumerate("uv"):
            series[f"{letter}, {name}"] = (number, rgb_to_log_chroma(rgb)[:, axis].tolist())
    return Lines("Over the frames", "frame", "log-chroma", series)


# -- pictures ----------------------------------------------------------------------------------------------------------


def _error(each: MeasuredScene, name: str) -> float:
    return float(angular_error(each.rgb[name].double(), each.truth.double()))


def _worst_first(measured: Sequence[MeasuredScene], name: str) -> list[MeasuredScene]:
    return sorted(measured, key=lambda each: -_error(each, name))[:MOST_PICTURES]


def _panel(each: MeasuredScene, name: str) -> Array:
    return row_of([view(each.picture, light) for light in (None, each.rgb[name], each.truth)])


def _map_caption() -> str:
    return "A line from the true light (green ring) to the estimate (red point) of each scene."


def _chroma_map(measured: Sequence[MeasuredScene], name: str) -> Array:
    truth, found = (
        rgb_to_log_chroma(torch.stack(colours).double()).numpy()
        for colours in ([each.truth for each in measured], [each.rgb[name].clamp(min=1e-6) for each in measured])
    )
    both = np.concatenate([truth, found])
    low, high = both.min(0) - _MARGIN, both.max(0) + _MARGIN
    span = float((high - low).max())
    image = Image.new("RGB", (_SIDE, _SIDE), "white")
    draw = ImageDraw.Draw(image)

    def place(uv: Array) -> tuple[float, float]:
        x, y = (uv - low) / span * _SIDE
        return float(x), float(_SIDE - y)

    draw.rectangle((0, 0, _SIDE - 1, _SIDE - 1), outline=(120, 120, 120))
    for start, end in zip(truth, found, strict=True):
        (x0, y0), (x1, y1) = place(start), place(end)
        draw.line((x0, y0, x1, y1), fill=(170, 170, 170))
        draw.ellipse((x0 - 3, y0 - 3, x0 + 3, y0 + 3), outline=_TRUE)
        draw.ellipse((x1 - 2, y1 - 2, x1 + 2, y1 + 2), fill=_FOUND)
    return np.asarray(image)


def _heat_maps(found: Sequence[tuple[str, Estimate, Tensor | None]]) -> list[Part]:
    """Heat maps of scenes with their captions and true lights, as far as there are any."""
    maps = [(_heat(each, truth), caption) for caption, each, truth in found if each.heat is not None]
    if not maps:
        return []
    torus = any(each.config is not None and each.config.form == "ffcc" for _, each, _ in found)
    axes = "u downwards, v to the right" if torus else "u to the right, v upwards"
    caption = (
        f"Probability of each log-chroma, the root of it, dark is likely; red the estimate, green the truth; {axes}."
    )
    return [Images("Where the light may be", maps, caption)]


def _heat(found: Estimate, truth: Tensor | None) -> Array:
    """Probabilities as grey: the root over that of the largest, so that what is unlikely is seen as well."""
    if found.heat is None or found.config is None:
        raise ValueError("found must have a heat map, got None")
    root, bins = found.heat.float().sqrt(), found.config.bins
    grey = (255 - 255 * root / root.max()).round().to(torch.uint8).numpy()
    pixels = np.repeat(np.kron(grey, np.ones((_ZOOM, _ZOOM), np.uint8))[..., None], 3, 2)
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    for rgb, colour in ((found.rgb, _FOUND), (truth, _TRUE)):
        if rgb is None:
            continue
        uv = rgb_to_log_chroma(rgb.double().clamp(min=1e-6))
        if found.config.form == "ffcc":
            row, column = ((uv - torch.tensor(found.config.start)) / found.config.bin_size).remainder(bins).tolist()
        else:
            right, up = (uv * bins / (2 * found.config.boundary)).tolist()
            row, column = (bins - 1) / 2 - up, (bins - 1) / 2 + right
        x, y = (_ZOOM * (place + 0.5) for place in (column, row))
        draw.ellipse((x - 5, y - 5, x + 5, y + 5), outline=colour, width=2)
    return np.asarray(image)


def _learned(task: IlluminantEstimation) -> list[Section]:
    """Filters and biases as pictures, each from its lowest to its highest value."""
    network: Any = task.network
    member = network.eccc if isinstance(network, DualExposureEnsemble) else network
    if not hasattr(member, "filters"):
        return []
    shown = []
    frames = ("long", "short") if member.config.frames == "both" else (member.config.frames,)
    names = [f"filter, {kind} of the {frame} exposure" for frame in frames for kind in ("colours", "gradients")]
    for label, maps in ((names, member.filters), ([f"bias {i + 1}" for i in range(len(member.biases))], member.biases)):
        for name, each in zip(label, maps.detach().cpu(), strict=True):
            centred = each.roll((each.shape[0] // 2, each.shape[1] // 2), (0, 1)) if name.startswith("filter") else each
            low, high = centred.min(), centred.max()
            grey = (255 * (centred - low) / (high - low).clamp(min=1e-12)).round().to(torch.uint8).numpy()
            shown.append((grey, f"{name}: {float(low):.3g} to {float(high):.3g}"))
    return [Section("What was learned", [Images("Filters, their origin in the middle, and biases", shown)])]
