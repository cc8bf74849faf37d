"""What a user wants to see and hear of a separating network: quality, spectrograms, sounds, cost, what it writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from convatlas.audio.pictures import spectrogram_picture, waveform_picture
from convatlas.audio.separation_evaluation import (
    IDEAL_MASKS,
    Measured,
    Quality,
    mean_quality,
    separate_like,
    write_qualities,
)
from convatlas.audio.separation_files import SeparatedFile, source_marks
from convatlas.data.audio import write_audio
from convatlas.data.images import Skipped
from convatlas.data.mixing_voices import Mixed, Mixtures
from convatlas.errors import MissingExtra
from convatlas.files import atomic_path
from convatlas.report import Bars, Cell, Files, Images, Lines, Note, Part, Report, Section, Sounds, Table
from convatlas.training.comparison import cost_table, files_section, listed, side_by_side
from convatlas.training.left_out import skipped_sections
from convatlas.training.measure import provenance
from convatlas.training.run import Run

if TYPE_CHECKING:
    from convatlas.audio.separation import Separation

__all__ = ["beginning", "comparison_report", "evaluation_report", "prediction_report", "training_report"]

Array = npt.NDArray[Any]
Samples = npt.NDArray[np.float32]

_MOST_ROWS = 100
#: Files of a prediction that are shown.
_MOST_FILES = 6
#: Seconds of each sound that a page can play.
_PLAYED = 5.0
#: Columns and rows of a picture.
_WIDTH, _BANDS, _WAVE = 320, 128, 40
_EXPLAINED = (
    "SI-SNR: scale-invariant signal-to-noise ratio, mean over the sources and the mixtures; SI-SNRi: by how much it is "
    "above that of the mixture as it is. Ideal masks are made from the true sources, on windows of 32 ms: what weights "
    "of an STFT reach where the answer is known."
)


def training_report(task: Separation, run: Run) -> Report:
    """Curves, quality on the test mixtures, pictures, sounds and cost; writes sounds and pictures in ``samples``."""
    mixtures = task.whole("test")
    measured, skipped = task.measure(mixtures)
    write_qualities(run.folder / "quality.csv", measured)
    rows = run.read_metrics()
    best = max(rows, key=lambda row: (row["val_si_snri"], row["epoch"]))
    chosen = f" Best epoch {best['epoch']:.0f} of {len(rows)}, chosen by the SI-SNRi of the validation mixtures."
    counts: list[list[Cell]] = [[name, _counted(part)] for name, part in task.splits.items()]
    notes = [Note(f"{note}.") for note in task.notes]
    if task.started_from:
        notes.append(Note(f"Started from {task.started_from}"))
    if task.splits["test"] is task.splits["val"]:
        notes.append(Note("The data have no test part: the quality is measured on the mixtures that chose the epoch."))
    files = {
        "settings": "config.yaml",
        "weights of the best epoch": "checkpoints/best.safetensors",
        "one row an epoch": "metrics.csv",
        "quality of each test mixture": "quality.csv",
    }
    shown = _shown(task, mixtures, measured)
    written = _write_samples(run.samples, shown, task.network.sample_rate)
    sections = [
        Section("Quality on test mixtures", _quality({task.model: measured}, task)),
        *_seen_and_heard(shown, task.network.sample_rate),
        Section("Training", [*_curves({task.model: rows}), Table("Data", ["part", "holds"], counts), *notes]),
        Section("Cost", [cost_table({task.model: task}, {task.model: run})]),
        *skipped_sections({each.path: each.reason for each in skipped} | task.unreadable),
        Section(
            "Files",
            [
                Files("In the folder of the run", files),
                Files("Pictures; the sounds lie beside them as WAV files", written),
            ],
        ),
    ]
    return Report(
        f"Separation with {task.model}", _summary(task, measured) + chosen, sections, provenance(data=task.data)
    )


def evaluation_report(
    task: Separation, mixtures: Mixtures, measured: Sequence[Measured], skipped: Sequence[Skipped], folder: Path | None
) -> Report:
    """Quality on mixtures of which the sources are known; sounds go to ``folder`` if it is given."""
    shown = _shown(task, mixtures, measured)
    rate = task.network.sample_rate
    written = {} if folder is None else _write_samples(folder / "samples", shown, rate)
    files = [Section("Files", [Files("Pictures; the sounds lie beside them as WAV files", written)])] if written else []
    notes = [Note(f"{note}.") for note in task.notes]
    sections = [
        Section("Quality", [*_quality({task.model: measured}, task), _each_mixture(measured), *notes]),
        *_seen_and_heard(shown, rate),
        *skipped_sections({each.path: each.reason for each in skipped}),
        *files,
    ]
    return Report(f"Evaluation of {task.model}", _summary(task, measured), sections, provenance())


def comparison_report(tasks: Mapping[str, Separation], runs: Mapping[str, Run], folder: Path) -> Report:
    """Several networks that were trained on the same sounds, beside ideal masks and the mixture as it is.

    Raises:
        ValueError: the networks find different sources, or their sample rates differ.
    """
    kinds = {(task.network.num_sources, task.network.sample_rate, task.scenario) for task in tasks.values()}
    if len(kinds) > 1:
        raise ValueError("the networks must find the same sources at the same sample rate to be compared")
    first = next(iter(tasks.values()))
    mixtures = first.whole("test")
    measured = {name: task.measure(mixtures)[0] for name, task in tasks.items()}
    means = {name: {"SI-SNRi [dB]": _network(each).si_snri} for name, each in measured.items()}
    ranked, parts = side_by_side(tasks, runs, means)
    row = _chosen(next(iter(measured.values())))["the middle one"].row
    mixed = mixtures.entries[row].read()
    estimates = {
        name: _matched(separate_like(task.network, mixed, fixed=task.order == "fixed")[0], mixed)
        for name, task in tasks.items()
    }
    pictures, sounds = _side_by_side(mixed, estimates, first.network.sample_rate)
    sections = [
        Section("Side by side", [*_quality(measured, first), *parts]),
        Section(mixed.name, [Images("Spectrograms and waveforms", pictures), Sounds("To listen to", sounds)]),
        Section("Training", _curves({name: run.read_metrics() for name, run in runs.items()})),
        files_section(runs, folder),
    ]
    winner = ranked[0]
    summary = (
        f"{winner} is the best: {_decibels(means[winner]['SI-SNRi [dB]'])} above the mixture on "
        f"{len(measured[winner])} test mixtures. All were trained on the same sounds with the same budget."
    )
    return Report(f"{listed(tasks)} on {first.data}", summary, sections, provenance(data=first.data))


def prediction_report(model: str, rate: int, done: Sequence[SeparatedFile], skipped: Sequence[Skipped]) -> Report:
    """What was written, with the beginning of some to see and to hear."""
    rows: list[list[Cell]] = [
        [each.name, each.length, each.how, each.seconds / each.length, each.note or None] for each in done[:_MOST_ROWS]
    ]
    caption = "The real-time factor is seconds from reading to writing for a second of sound."
    caption += f" The first {_MOST_ROWS} of {len(done)}." if len(done) > _MOST_ROWS else ""
    table = Table("Recordings", ["file", "length [s]", "separated", "real-time factor", "note"], rows, caption)
    links = {path: path for each in done[:_MOST_ROWS] for path in each.paths}
    parts: list[Part] = []
    for each in done[:_MOST_FILES]:
        parts += beginning(f"{each.name}: the beginning", each.shown, rate)
    sections = [
        Section("Separated", [table]),
        Section("Pictures and sounds", parts),
        Section("Files", [Files("In this folder", links)]),
        *skipped_sections({each.path: each.reason for each in skipped}),
    ]
    files = "1 recording" if len(done) == 1 else f"{len(done)} recordings"
    seconds = sum(each.length for each in done)
    summary = f"{model} separated {files}, {seconds:.1f} s of sound, in {sum(each.seconds for each in done):.1f} s."
    return Report(f"Predictions of {model}", summary, sections, provenance())


def beginning(title: str, shown: Samples, rate: int) -> list[Part]:
    """A recording and its sources, (1 + C, T), to see and to hear."""
    labels = ["recording", *source_marks(len(shown) - 1)]
    top = _loudest(shown[0])
    pictures = [(_picture(sound, top), label) for sound, label in zip(shown, labels, strict=True)]
    sounds = [(_played(sound, rate), rate, label) for sound, label in zip(shown, labels, strict=True)]
    return [Images(title, pictures), Sounds("To listen to", sounds)]


# -- tables ------------------------------------------------------------------------------------------------------------


def _network(measured: Sequence[Measured]) -> Quality:
    return mean_quality(measured, lambda each: each.network)


def _decibels(value: float) -> str:
    return f"{value:.1f} dB".replace("-", "\u2212")


def _summary(task: Separation, measured: Sequence[Measured]) -> str:
    found = _network(measured)
    mixtures = "1 mixture" if len(measured) == 1 else f"{len(measured)} mixtures"
    sdr = "" if found.sdri is None else f" and the SDR by {_decibels(found.sdri)}"
    return f"{task.model} raises the SI-SNR of {mixtures} by {_decibels(found.si_snri)}{sdr}."


def _counted(part: Any) -> str:
    if isinstance(part, Mixtures):
        return f"{len(part)} mixtures"
    return f"{len(part)} recordings of {len(part.speakers)} speakers"


def _quality(measured: Mapping[str, Sequence[Measured]], task: Separation) -> list[Part]:
    one = next(iter(measured.values()))
    found = {"mixture as it is": mean_quality(one, lambda each: each.mixture)}
    for kind, name in IDEAL_MASKS.items():
        found[name] = mean_quality(one, lambda each, kind=kind: each.ideal[kind])  # type: ignore[misc]
    found |= {name: _network(each) for name, each in measured.items()}
    factors = {
        name: sum(each.seconds for each in mixtures) / sum(each.length for each in mixtures)
        for name, mixtures in measured.items()
    }
    with_sdr = found["mixture as it is"].sdr is not None
    columns = ["", "SI-SNR [dB]", "SI-SNRi [dB]", *(["SDR [dB]", "SDRi [dB]"] if with_sdr else []), "real-time factor"]
    rows: list[list[Cell]] = [
        [name, *(value for value in quality if value is not None), factors.get(name)] for name, quality in found.items()
    ]
    caption = f"{_EXPLAINED} Real-time factor: seconds of computing for a second of sound."
    table = Table("Means over the mixtures", columns, rows, caption)
    bars = Bars("Improvement", "SI-SNRi [dB]", {name: quality.si_snri for name, quality in found.items()})
    ranks = {name: sorted(each.network.si_snri for each in mixtures) for name, mixtures in measured.items()}
    ranks[IDEAL_MASKS["ratio"]] = sorted(each.ideal["ratio"].si_snri for each in one)
    curves = {
        name: ([100 * (place + 0.5) / len(values) for place in range(len(values))], values)
        for name, values in ranks.items()
    }
    spread = Lines("From the worst mixture to the best", "share of the mixtures [%]", "SI-SNRi [dB]", curves)
    return [table, bars, spread]


def _each_mixture(measured: Sequence[Measured]) -> Table:
    rows: list[list[Cell]] = [
        [each.name, each.length, each.mixture.si_snr, *(value for value in each.network if value is not None)]
        for each in measured[:_MOST_ROWS]
    ]
    sdr = ["SDR [dB]", "SDRi [dB]"] if measured[0].network.sdr is not None else []
    columns = ["mixture", "length [s]", "SI-SNR before [dB]", "SI-SNR [dB]", "SI-SNRi [dB]", *sdr]
    caption = f"The first {_MOST_ROWS} of {len(measured)}; quality.csv has all." if len(measured) > _MOST_ROWS else ""
    return Table("Each mixture", columns, rows, caption)


def _curves(rows: Mapping[str, Sequence[Mapping[str, float]]]) -> list[Part]:
    def series(key: str) -> dict[str, tuple[list[float], list[float]]]:
        return {name: ([row["epoch"] for row in table], [row[key] for row in table]) for name, table in rows.items()}

    return [
        Lines("SI-SNRi", "epoch", "validation SI-SNRi [dB]", series("val_si_snri")),
        Lines("Loss", "epoch", "training loss [dB]", series("train_loss")),
        Lines("Learning rate", "epoch", "learning rate", series("lr"), log_y=True),
    ]


# -- pictures and sounds -----------------------------------------------------------------------------------------------


class _Shown:
    """A mixture to see and to hear: its truth, and what the network makes of it, as loud as the truth."""

    def __init__(self, title: str, mixed: Mixed, estimates: Samples) -> None:
        self.title, self.mixed, self.estimates = title, mixed, estimates


def _chosen(measured: Sequence[Measured]) -> dict[str, Measured]:
    ranked = sorted(measured, key=lambda each: each.network.si_snri)
    chosen = {"the middle one": ranked[len(ranked) // 2], "the worst": ranked[0], "the best": ranked[-1]}
    return {name: each for number, (name, each) in enumerate(chosen.items()) if number < len(ranked)}


def _shown(task: Separation, mixtures: Mixtures, measured: Sequence[Measured]) -> list[_Shown]:
    shown = []
    for which, each in _chosen(measured).items():
        mixed = mixtures.entries[each.row].read()
        estimates, _ = separate_like(task.network, mixed, fixed=task.order == "fixed")
        gain = _decibels(each.network.si_snri)
        shown.append(_Shown(f"{each.name}, {which}: {gain}", mixed, _matched(estimates, mixed)))
    return shown


def _labels(mixed: Mixed) -> list[str]:
    count = len(mixed.sources)
    return ["source"] if count == 1 else [f"speaker {number}" for number in range(1, count + 1)]


def _matched(estimates: Tensor, mixed: Mixed) -> Samples:
    """Estimates with the scale, which a scale-invariant loss leaves open, that brings them nearest to the sources."""
    found, sources = estimates.double(), torch.from_numpy(mixed.sources).double()
    scale = (found * sources).sum(1) / found.square().sum(1).clamp_min(1e-12)
    matched: Samples = (scale[:, None] * found).float().numpy()
    return matched


def _side_by_side(
    mixed: Mixed, estimates: Mapping[str, Samples], rate: int
) -> tuple[list[tuple[Array, str]], list[tuple[Samples, int, str]]]:
    """The mixture and, source by source, the truth and estimates (C, T) by name, to see and to hear."""
    told = [(mixed.mixture, mixed.mixture, "mixture")]
    for row, (label, truth) in enumerate(zip(_labels(mixed), mixed.sources, strict=True)):
        told.append((truth, truth, f"{label}: truth"))
        told += [(found[row], truth, f"{label}: {name}") for name, found in estimates.items()]
    pictures = [(_picture(samples, _loudest(scale)), name) for samples, scale, name in told]
    return pictures, [(_played(samples, rate), rate, name) for samples, _, name in told]


def _seen_and_heard(shown: Sequence[_Shown], rate: int) -> list[Section]:
    parts: list[Part] = []
    caption = "Spectrograms from 0 Hz to half the sample rate, 80 dB from black to white, and waveforms."
    for each in shown:
        pictures, sounds = _side_by_side(each.mixed, {"separated": each.estimates}, rate)
        parts += [Images(each.title, pictures, caption), Sounds("To listen to", sounds)]
    return [Section("Pictures and sounds", parts)]


def _write_samples(folder: Path, shown: Sequence[_Shown], rate: int) -> dict[str, str]:
    """WAV files and a picture of each mixture; names of the pictures relative to the folder above, by what they are."""
    written: dict[str, str] = {}
    for number, each in enumerate(shown):
        pictures, _ = _side_by_side(each.mixed, {"separated": each.estimates}, rate)
        with atomic_path(folder / f"{number}_spectrograms.png") as part:
            Image.fromarray(_column([picture for picture, _ in pictures])).save(part, format="PNG")
        written[each.title] = f"{folder.name}/{number}_spectrograms.png"
        sounds = {"mixture": each.mixed.mixture}
        for label, truth, sound in zip(_labels(each.mixed), each.mixed.sources, each.estimates, strict=True):
            place = label.replace(" ", "")
            sounds |= {f"{place}_truth": truth, f"{place}_separated": sound}
        try:
            for name, samples in sounds.items():
                write_audio(folder / f"{number}_{name}.wav", samples / max(1.0, _loudest(samples)), rate)
        except MissingExtra:
            pass  # simulated voices are learned from without the package for files
    return written


def _picture(samples: Samples, loudest: float) -> Array:
    """Spectrogram above, waveform below."""
    n_fft = 2 * (_BANDS - 1)
    hop = max(1, -(-len(samples) // _WIDTH))
    window = torch.hann_window(n_fft)
    spectrum = torch.stft(
        torch.from_numpy(np.array(samples)), n_fft, hop, window=window, pad_mode="constant", return_complex=True
    )
    # A sine of the loudest amplitude reaches a quarter of the window's length.
    top = (loudest * n_fft / 4) ** 2
    above = spectrogram_picture(spectrum.abs().square().numpy(), loudest=top)
    below = waveform_picture(samples, above.shape[1], _WAVE, loudest=loudest)
    return np.concatenate([above, np.full((3, above.shape[1], 3), 255, np.uint8), below])


def _column(pictures: Sequence[Array]) -> Array:
    gap = np.full((6, pictures[0].shape[1], 3), 255, np.uint8)
    return np.concatenate([part for picture in pictures for part in (picture, gap)][:-1])


def _loudest(samples: Samples) -> float:
    return max(float(np.abs(samples).max()), 1e-9)


def _played(samples: Samples, rate: int) -> Samples:
    """The beginning, no louder than full scale."""
    part: Samples = samples[: round(_PLAYED * rate)]
    return part / max(1.0, _loudest(part))
