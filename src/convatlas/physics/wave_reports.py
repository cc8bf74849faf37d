"""What a user wants to see of a wave surrogate: errors along the rollout, pictures of forecasts, cost; files."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from convatlas.data.wave_fem import WaveSequences
from convatlas.data.wave_files import write_sequences
from convatlas.files import atomic_path
from convatlas.networks.wave_surrogate import WaveSurrogate
from convatlas.physics.field_pictures import field_picture
from convatlas.physics.wave_evaluation import ForecastErrors, bounded_error
from convatlas.report import Cell, Files, Images, Lines, Note, Part, Report, Section, Table
from convatlas.training.comparison import cost_table
from convatlas.training.measure import provenance
from convatlas.training.run import Run

if TYPE_CHECKING:
    from convatlas.physics.wave import Waves

__all__ = [
    "Rollout",
    "evaluation_report",
    "prediction_report",
    "training_report",
    "write_errors",
    "write_rollouts",
]

Array = npt.NDArray[Any]

#: Times of a strip, pixels between its pictures, scenes of a report, and milliseconds of a field in a film.
_COLUMNS, _GAP, _SCENES, _DURATION = 6, 4, 3, 120


@dataclass(frozen=True, eq=False)
class Rollout:
    """Forecasts for the scenes of a file.

    Attributes:
        name: of the file.
        given: its sequences.
        made: (S, T, H, W).
        first: place of the first of them in the sequences.
    """

    name: str
    given: WaveSequences
    made: Tensor
    first: int

    def truth(self) -> Tensor | None:
        """The true fields of the rollout that the file holds, (S, up to T, H, W)."""
        fields = self.given.fields[:, self.first : self.first + self.made.shape[1]]
        return fields if fields.shape[1] else None


def evaluation_report(task: Waves, errors: ForecastErrors) -> Report:
    """Errors of rollouts whose truth is known."""
    sections = [Section("Errors", _errors({task.model: errors})), Section("Pictures", [_pictures(errors)])]
    return Report(f"Evaluation of {task.model}", _summary(task, errors), sections, provenance())


def training_report(task: Waves, run: Run) -> Report:
    """Curves of the training, errors on the test scenes, pictures and cost."""
    errors = task.measure(task.splits["test"])
    write_errors(run.folder / "errors.csv", errors)
    with atomic_path(run.samples / "rollout.png") as part:
        Image.fromarray(_strip(errors.truth[0], errors.prediction[0])).save(part, format="PNG")
    rows = run.read_metrics()
    best = min(rows, key=lambda row: (row["val_rollout"], row["epoch"]))
    chosen = f" Best epoch {best['epoch']:.0f} of {len(rows)}, chosen by the rollouts of the validation scenes."
    epochs = [row["epoch"] for row in rows]
    curves = {
        name: (epochs, [row.get(key, float("nan")) for row in rows])
        for name, key in (("training loss", "train_loss"), ("rollout", "val_rollout"), ("first step", "val_step"))
    }
    counts: list[list[Cell]] = [
        [name, len(task.splits[name]), task.splits[name].fields.shape[1]] for name in ("train", "val", "test")
    ]
    height, width = errors.truth.shape[2:]
    origin = [Note(f"Started from {task.started_from}")] if task.started_from else []
    files = {
        "settings": "config.yaml",
        "weights of the best epoch": "checkpoints/best.safetensors",
        "one row an epoch": "metrics.csv",
        "error of each test scene": "errors.csv",
    }
    caption = f"Fields of {height} x {width} nodes."
    sections = [
        Section("Errors on test scenes", _errors({task.model: errors})),
        Section("Pictures", [_pictures(errors)]),
        Section(
            "Training",
            [
                Lines("Relative L2 error of validation scenes", "epoch", "relative L2", curves, log_y=True),
                Table("Scenes", ["part", "scenes", "fields of each"], counts, caption),
                *origin,
            ],
        ),
        Section("Cost", [cost_table({task.model: task}, {task.model: run})]),
        Section("Files", [Files("In the folder of the run", files)]),
    ]
    return Report(f"Waves with {task.model}", _summary(task, errors) + chosen, sections, provenance(data=task.data))


def prediction_report(task: Waves, done: Sequence[Rollout], written: Sequence[str]) -> Report:
    """What was rolled out, with pictures."""
    rows: list[list[Cell]] = []
    pictures: list[tuple[Array, str]] = []
    for rollout, name in zip(done, written, strict=True):
        truth, error = rollout.truth(), None
        if truth is not None:
            error = float(bounded_error(rollout.made[:, : truth.shape[1]], truth, task.scale).mean())
        rows.append([rollout.name, len(rollout.made), rollout.made.shape[1], name, error])
        for scene in range(min(_SCENES, len(rollout.made))):
            strip = _strip(None if truth is None else truth[scene], rollout.made[scene])
            pictures.append((strip, f"{rollout.name}, scene {scene}"))
    table = Table("Files", ["file", "scenes", "fields", "written", "relative L2"], rows)
    stems = [name.removesuffix(".npz") for name in written]
    links = {f"{stem}{kind}": f"{stem}{kind}" for stem in stems for kind in (".npz", ".png", ".gif")}
    count = sum(len(rollout.made) for rollout in done)
    scenes = "1 scene" if count == 1 else f"{count} scenes"
    summary = f"{task.model} went on with {scenes} for {done[0].made.shape[1]} fields."
    parts: list[Part] = [table, Images("Rollouts", pictures, _ROWS), Files("In this folder", links)]
    return Report(f"Predictions of {task.model}", summary, [Section("Rollouts", parts)], provenance())


def write_errors(path: Path, errors: ForecastErrors) -> None:
    """Write the errors of each scene as CSV: of the rollout, its energy and spectrum, and of each field."""
    with atomic_path(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        fields = [f"field {errors.first + step}" for step in range(errors.each.shape[1])]
        writer.writerow(["scene", "relative L2", "energy drift", "spectrum error", *fields])
        for scene, each in enumerate(errors.each.tolist()):
            whole = (errors.whole[scene], errors.energy[scene], errors.spectrum[scene])
            writer.writerow([scene, *(f"{float(value):.6g}" for value in (*whole, *each))])


def write_rollouts(folder: Path, done: Sequence[Rollout]) -> list[str]:
    """Write the fields as ``.npz`` files that training reads, and of the first scene a strip and a film; the names."""
    names: list[str] = []
    for rollout in done:
        name = f"{rollout.name}_rollout"
        if f"{name}.npz" in names:
            name = f"{name}_{len(names)}"
        write_sequences(folder / f"{name}.npz", replace(rollout.given, fields=rollout.made))
        truth = rollout.truth()
        with atomic_path(folder / f"{name}.png") as part:
            strip = _strip(None if truth is None else truth[0], rollout.made[0])
            Image.fromarray(strip).save(part, format="PNG")
        most = _largest(rollout.made[0])
        film = [Image.fromarray(field_picture(field, -most, most)) for field in rollout.made[0].numpy()]
        with atomic_path(folder / f"{name}.gif") as part:
            film[0].save(part, format="GIF", save_all=True, append_images=film[1:], duration=_DURATION, loop=0)
        names.append(f"{name}.npz")
    return names


_ROWS = (
    "From left to right: times of the rollout; from top to bottom: the truth, if it is known, the forecast, the error."
)


def _summary(task: Waves, errors: ForecastErrors) -> str:
    scenes, steps = errors.each.shape
    what = "steps on" if isinstance(task.network, WaveSurrogate) else "makes"
    fields = "1 field" if steps == 1 else f"{steps} fields"
    held = "1 scene" if scenes == 1 else f"{scenes} scenes"
    return f"{task.model} {what} {fields} of {held} with a relative L2 error of {float(errors.whole.mean()):.2%}."


def _errors(measured: dict[str, ForecastErrors]) -> list[Part]:
    columns = list(next(iter(measured.values())).means())
    rows: list[list[Cell]] = [[name, *errors.means().values()] for name, errors in measured.items()]
    caption = (
        "Means over the scenes. Energy drift: difference of the energies at the end, over the true energy at the "
        "beginning. Spectrum error: of the energy at each wave number, whatever the phases."
    )
    table = Table("Errors", ["", *columns], rows, caption)
    lines = {
        name: (list(range(1, 1 + errors.each.shape[1])), errors.each.mean(0).tolist())
        for name, errors in measured.items()
    }
    spectra = Lines("Error along the rollout", "field", "relative L2", lines, log_y=True)
    return [table, spectra]


def _pictures(errors: ForecastErrors) -> Images:
    order = errors.whole.argsort(descending=True).tolist()
    chosen = dict.fromkeys((order[0], order[len(order) // 2], order[-1]))
    pictures = [
        (_strip(errors.truth[scene], errors.prediction[scene]), f"scene {scene}: relative L2 {errors.whole[scene]:.2%}")
        for scene in chosen
    ]
    return Images("Rollouts, the worst first", pictures, _ROWS)


def _largest(fields: Tensor) -> float:
    finite = fields.nan_to_num(0, 0, 0).abs()
    return max(float(finite.max()), 1e-12)


def _strip(truth: Tensor | None, made: Tensor) -> Array:
    """Rows of the truth, the forecast and the error at some times, (H, W, 3); where the truth ends, white."""
    shown = np.unique(np.linspace(0, len(made) - 1, min(_COLUMNS, len(made))).round().astype(int)).tolist()
    most = _largest(made if truth is None else truth)
    rows: list[list[Tensor | None]] = [[made[time] for time in shown]]
    if truth is not None:
        rows.insert(0, [truth[time] if time < len(truth) else None for time in shown])
        rows.append([made[time] - truth[time] if time < len(truth) else None for time in shown])
    blank = np.full_like(field_picture(made[0].numpy(), -most, most), 255)
    pictures = [
        [blank if field is None else field_picture(field.numpy(), -most, most) for field in row] for row in rows
    ]
    height, width = blank.shape[:2]
    page = np.full((len(rows) * (height + _GAP) - _GAP, len(shown) * (width + _GAP) - _GAP, 3), 255, dtype=np.uint8)
    for down, row in enumerate(pictures):
        for across, picture in enumerate(row):
            top, left = down * (height + _GAP), across * (width + _GAP)
            page[top : top + height, left : left + width] = picture
    return page
