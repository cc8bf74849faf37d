"""What a user wants to see of a classifier: quality, confusions, mistakes, cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from convatlas.data.volumes import montage
from convatlas.files import atomic_path
from convatlas.recognition.class_scores import class_scores, confusion_matrix
from convatlas.report import Bars, Cell, Files, Heatmap, Images, Lines, Note, Part, Report, Section, Table
from convatlas.training.comparison import cost_table, files_section, listed, side_by_side
from convatlas.training.left_out import skipped_sections
from convatlas.training.measure import provenance
from convatlas.training.run import Run

if TYPE_CHECKING:
    from convatlas.recognition.predictions import Predictions
    from convatlas.recognition.task import Recognition

__all__ = ["comparison_report", "evaluation_report", "prediction_report", "quality", "training_report"]

#: Pictures on one page; a page of thousands is slow to open.
_MOST_PICTURES = 60
#: Longest side of a picture in pixels; smaller ones than the other are enlarged where they are files.
_LARGE, _SMALL = 320, 128


def quality(predictions: Predictions) -> dict[str, float]:
    """Accuracy, top-5 accuracy (of more than 5 classes), macro F1, balanced accuracy and cross-entropy."""
    from sklearn.metrics import balanced_accuracy_score, f1_score

    labels, best = predictions.images.labels, predictions.best
    right = predictions.probabilities[np.arange(len(labels)), labels]
    measured = {"accuracy": float((best == labels).mean())}
    if len(predictions.classes) > 5:
        rank = (predictions.probabilities > right[:, None]).sum(1)
        measured["top-5 accuracy"] = float((rank < 5).mean())
    present = np.unique(labels)
    measured["macro F1"] = float(f1_score(labels, best, labels=present, average="macro", zero_division=0))
    several = len(present) > 1
    measured["balanced accuracy"] = float(balanced_accuracy_score(labels, best)) if several else measured["accuracy"]
    measured["cross-entropy [nats]"] = float(-np.log(np.maximum(right, 1e-12)).mean())
    return measured


def evaluation_report(task: Recognition, predictions: Predictions) -> Report:
    """Quality of labelled images: numbers, confusion matrix, worst mistakes."""
    measured = quality(predictions)
    summary = f"{task.model}: {measured['accuracy']:.2%} of {len(predictions.images)} images are named rightly."
    skipped = {skipped.path: skipped.reason for skipped in predictions.skipped}
    sections = [
        Section("Quality", _quality_parts(predictions, measured)),
        *_mistakes(predictions),
        *skipped_sections(skipped),
    ]
    return Report(f"Evaluation of {task.model}", summary, sections, provenance())


def prediction_report(task: Recognition, predictions: Predictions) -> Report:
    """Every image with its class, as a page of pictures."""
    shown = range(min(len(predictions.images), _MOST_PICTURES))
    pictures = [(_picture(predictions, row), _caption(predictions, row)) for row in shown]
    count = len(predictions.images)
    caption = f"The first {len(pictures)} of {count}; predictions.csv has all." if count > len(pictures) else ""
    files = Files("In this folder", {"all predictions": "predictions.csv"})
    parts: list[Part] = [Images("Images and their most probable class", pictures, caption), files]
    named = [predictions.classes[index] for index in predictions.best]
    share = {name: named.count(name) for name in predictions.classes if name in named}
    if len(share) <= 30:
        parts.append(Bars("How often each class was found", "images", share))
    skipped = {skipped.path: skipped.reason for skipped in predictions.skipped}
    sections = [Section("Predictions", parts), *skipped_sections(skipped)]
    summary = f"{task.model} named {count} image{'s' if count != 1 else ''}."
    return Report(f"Predictions of {task.model}", summary, sections, provenance())


def training_report(task: Recognition, run: Run) -> Report:
    """Curves of the training, quality on the held-out images, mistakes and cost; writes the pictures in ``samples``."""
    predictions = task.probabilities(task.splits["test"])
    predictions.write_csv(run.folder / "predictions.csv")
    measured = quality(predictions)
    rows = run.read_metrics()
    _write_samples(run, predictions)
    best = max(rows, key=lambda row: (row["val_accuracy"], row["epoch"]))
    summary = (
        f"{task.model} names {measured['accuracy']:.2%} of {len(predictions.images)} held-out images rightly "
        f"(best epoch {best['epoch']:.0f} of {len(rows)}, chosen by validation accuracy)."
    )
    files = Files(
        "In the folder of the run",
        {
            "settings": "config.yaml",
            "weights of the best epoch": "checkpoints/best.safetensors",
            "one row an epoch": "metrics.csv",
            "predictions for the held-out images": "predictions.csv",
        },
    )
    origin = [Note(f"Started from {task.started_from}")] if task.started_from else []
    origin += [Note(f"Layer {task.placed}")] if task.placed else []
    skipped = {skipped.path: skipped.reason for skipped in predictions.skipped} | task.unreadable
    sections = [
        Section("Quality on held-out images", _quality_parts(predictions, measured)),
        *_mistakes(predictions),
        Section("Training", [*_curves({task.model: rows}), _data_table(task), *origin]),
        Section("Cost", [cost_table({task.model: task}, {task.model: run})]),
        *skipped_sections(skipped),
        Section("Files", [files]),
    ]
    return Report(f"Recognition with {task.model}", summary, sections, provenance(data=task.data))


def comparison_report(tasks: Mapping[str, Recognition], runs: Mapping[str, Run], folder: Path) -> Report:
    """Several networks that were trained on the same images under the same budget, side by side."""
    held_out = {name: task.probabilities(task.splits["test"]) for name, task in tasks.items()}
    measured = {name: quality(predictions) for name, predictions in held_out.items()}
    rows = {name: run.read_metrics() for name, run in runs.items()}
    ranked, parts = side_by_side(tasks, runs, measured)
    winner = ranked[0]
    confusions = [_confusion(held_out[name], f"Confusion matrix of {name}") for name in tasks]
    mistakes = [section for name in tasks for section in _mistakes(held_out[name], f"Worst mistakes of {name}")]
    sections = [
        Section("Side by side", parts),
        Section("Training", _curves(rows)),
        Section("Confusions", confusions),
        *mistakes,
        files_section(runs, folder),
    ]
    first = next(iter(tasks.values()))
    summary = (
        f"{winner} is the most accurate: {measured[winner]['accuracy']:.2%} of "
        f"{len(held_out[winner].images)} held-out images. All were trained on the same images with the same budget."
    )
    return Report(f"{listed(tasks)} on {first.data}", summary, sections, provenance(data=first.data))


def _quality_parts(predictions: Predictions, measured: Mapping[str, float]) -> list[Part]:
    return [
        Table("Measured", list(measured), [list(measured.values())]),
        _confusion(predictions),
        _by_class(predictions),
    ]


def _by_class(predictions: Predictions) -> Table:
    labels, best = torch.from_numpy(predictions.images.labels), torch.from_numpy(predictions.best)
    scores = class_scores(confusion_matrix(labels, best, len(predictions.classes)))
    counts = predictions.images.with_classes(predictions.classes).counts
    rows: list[list[Cell]] = [
        [name, int(counts[index]), *(float(values[index]) for values in scores.values())]
        for index, name in enumerate(predictions.classes)
        if counts[index]
    ]
    return Table("By class", ["class", "samples", "precision", "recall", "specificity", "F1"], rows)


def _confusion(predictions: Predictions, title: str = "Confusion matrix") -> Heatmap:
    from sklearn.metrics import confusion_matrix

    classes = predictions.classes
    matrix = confusion_matrix(predictions.images.labels, predictions.best, labels=range(len(classes)))
    return Heatmap(title, matrix, classes, classes, "predicted class", "true class")


def _mistakes(predictions: Predictions, title: str = "Worst mistakes", most: int = 12) -> list[Section]:
    labels, best = predictions.images.labels, predictions.best
    wrong = np.flatnonzero(best != labels)
    if len(wrong) == 0:
        return [Section(title, [Note("Every held-out image was named rightly.")])]
    worst = wrong[np.argsort(-predictions.probabilities[wrong, best[wrong]])][:most]
    pictures = [(_picture(predictions, row), _caption(predictions, row)) for row in worst]
    caption = f"{len(wrong)} of {len(labels)} answers are wrong." if len(wrong) > len(worst) else ""
    return [Section(title, [Images("The surest wrong answers", pictures, caption)])]


def _curves(rows: Mapping[str, Sequence[Mapping[str, float]]]) -> list[Part]:
    def series(key: str, label: str) -> dict[str, tuple[list[float], list[float]]]:
        many = len(rows) > 1
        return {
            f"{name}, {label}" if many else label: ([row["epoch"] for row in table], [row[key] for row in table])
            for name, table in rows.items()
        }

    losses = series("train_loss", "training") | series("val_loss", "validation")
    return [
        Lines("Loss", "epoch", "cross-entropy [nats]", losses, log_y=True),
        Lines("Accuracy", "epoch", "validation accuracy", series("val_accuracy", "validation")),
    ]


def _data_table(task: Recognition) -> Table:
    rows: list[list[Cell]] = [[name, len(task.splits[name])] for name in ("train", "val", "test")]
    size = " x ".join(str(side) for side in reversed(task.preprocess.shape))
    caption = f"{len(task.classes)} classes, seen at {size} {'voxels' if task.takes_volumes else 'pixels'}."
    if task.splits["test"] is task.splits["val"]:
        caption += " The data have no test part: the quality is measured on the images that chose the best epoch."
    return Table("Images", ["part", "images"], rows, caption)


def _write_samples(run: Run, predictions: Predictions, most: int = 16) -> None:
    rows = np.random.default_rng(0).permutation(len(predictions.images))[:most]
    for number, row in enumerate(rows):
        true = predictions.images.classes[predictions.images.labels[row]]
        name = f"{number:02d}_true-{_safe(true)}_predicted-{_safe(predictions.classes[predictions.best[row]])}.png"
        picture = Image.fromarray(_picture(predictions, int(row)))
        scale = max(1, math.ceil(_SMALL / max(picture.size)))
        picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
        with atomic_path(run.samples / name) as part:
            picture.save(part, format="PNG")


def _picture(predictions: Predictions, row: int) -> npt.NDArray[np.uint8]:
    """What was predicted on, as something that can be shown: (H, W) or (H, W, 3) uint8, reduced if it is large.

    Of volumes and videos some slices or frames side by side.
    """
    image = predictions.images.image(int(row))
    image = montage(image) if image.ndim == 4 else image
    image = image[..., :3] if image.shape[2] >= 3 else image[..., 0]
    if image.dtype != np.uint8:
        low, high = float(image.min()), float(image.max())
        image = (255 * (image - low) / max(high - low, 1e-12)).astype(np.uint8)
    picture = Image.fromarray(np.ascontiguousarray(image))
    picture.thumbnail((_LARGE, _LARGE))
    return np.asarray(picture)


def _caption(predictions: Predictions, row: int) -> str:
    label, best = predictions.images.labels[row], predictions.best[row]
    said = f"{_short(predictions.classes[best])} ({predictions.probabilities[row, best]:.0%})"
    name = _short(predictions.images.names[row], end=True)
    return f"{name}: {said}" if label < 0 else f"{name}: {said}, truly {_short(predictions.images.classes[label])}"


def _short(text: str, most: int = 48, *, end: bool = False) -> str:
    if len(text) <= most:
        return text
    return f"\u2026{text[1 - most :]}" if end else f"{text[: most - 1]}\u2026"


def _safe(name: str) -> str:
    # A file name has 255 bytes, a letter up to 4.
    return "".join(letter if letter.isalnum() else "-" for letter in name)[:24]
