"""What a user wants to see of a classifier of time series: quality, early answers, what decides, simple methods."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from convatlas.data.sentinel2 import SentinelTimeSeries
from convatlas.errors import DataError
from convatlas.files import write_text
from convatlas.networks.ffdnn import FFDNN, explain
from convatlas.recognition.class_scores import class_scores, confusion_matrix
from convatlas.report import Bars, Cell, Files, Heatmap, Lines, Note, Part, Report, Section, Table, printable
from convatlas.training.comparison import cost_table, files_section, listed, side_by_side
from convatlas.training.left_out import skipped_sections
from convatlas.training.measure import provenance
from convatlas.training.run import Run

if TYPE_CHECKING:
    from convatlas.recognition.sequences import Named, SequenceRecognition

__all__ = [
    "classical_accuracies",
    "comparison_report",
    "evaluation_report",
    "prediction_report",
    "quality",
    "training_report",
    "write_predictions",
]

#: Training series that a forest or an SVM gets at most.
_MOST_CLASSICAL = 5000
#: Steps of a component of a capsule that the report shows.
_TRAVERSED = (-0.2, 0.0, 0.2)
_SHOWN_COMPONENTS = 4


def quality(named: Named) -> dict[str, float]:
    """Overall accuracy, Cohen's kappa, macro F1 and cross-entropy."""
    from sklearn.metrics import cohen_kappa_score, f1_score

    labels, best = named.series.labels, named.best
    present = np.unique(labels)
    right = named.probabilities[np.arange(len(labels)), labels]
    several = len(np.unique(np.concatenate([labels, best]))) > 1
    return {
        "accuracy": float((labels == best).mean()),
        "kappa": float(cohen_kappa_score(labels, best)) if several else 1.0,
        "macro F1": float(f1_score(labels, best, labels=present, average="macro", zero_division=0)),
        "cross-entropy [nats]": float(-np.log(np.maximum(right, 1e-12)).mean()),
    }


def write_predictions(task: SequenceRecognition, named: Named, path: Path) -> None:
    """One row a pixel: name, field, class, probability of each class, true class where it is known."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "field", "class", *(f"probability of {name}" for name in task.classes), "true class"])
    series = named.series
    for row, name in enumerate(series.names):
        label = series.labels[row]
        shares = [f"{value:.6f}" for value in named.probabilities[row]]
        true = series.classes[label] if label >= 0 else ""
        writer.writerow([printable(name), printable(series.fields[row]), task.classes[named.best[row]], *shares, true])
    write_text(path, text.getvalue())


def evaluation_report(task: SequenceRecognition, named: Named) -> Report:
    """Quality of labelled pixels, early answers, and what decides."""
    measured = quality(named)
    summary = f"{task.model}: {measured['accuracy']:.2%} of {len(named.series)} pixels are named rightly."
    sections = [
        Section("Quality", _quality_parts(task, named, measured)),
        *_explained(task, named),
        *skipped_sections({each.path: each.reason for each in named.grid.skipped}),
    ]
    return Report(f"Evaluation of {task.model}", summary, sections, provenance())


def prediction_report(task: SequenceRecognition, named: Named) -> Report:
    """How often each class was found, and the mean series of each."""
    count = len(named.series)
    found = [task.classes[index] for index in named.best]
    parts: list[Part] = [
        Bars("How often each class was found", "pixels", {name: found.count(name) for name in task.classes}),
        *_mean_series(task, named, named.best),
        Files("In this folder", {"all predictions": "predictions.csv"}),
    ]
    sections = [
        Section("Predictions", parts),
        *skipped_sections({each.path: each.reason for each in named.grid.skipped}),
    ]
    summary = f"{task.model} named {count} pixel{'s' if count != 1 else ''}."
    return Report(f"Predictions of {task.model}", summary, sections, provenance())


def training_report(task: SequenceRecognition, run: Run) -> Report:
    """Quality on the held-out fields, what decides, simple methods on the same fields, curves and cost."""
    named = task.named(task.splits["test"])
    write_predictions(task, named, run.folder / "predictions.csv")
    measured, rows = quality(named), run.read_metrics()
    best = max(rows, key=lambda row: (row["val_accuracy"], row["epoch"]))
    summary = (
        f"{task.model} names {measured['accuracy']:.2%} of {len(named.series)} pixels in held-out fields rightly "
        f"(best epoch {best['epoch']:.0f} of {len(rows)}, chosen by validation accuracy)."
    )
    files = {
        "settings": "config.yaml",
        "weights of the best epoch": "checkpoints/best.safetensors",
        "one row an epoch": "metrics.csv",
        "predictions for the held-out pixels": "predictions.csv",
    }
    origin = [Note(f"Started from {task.started_from}")] if task.started_from else []
    unusable = {each.path: each.reason for each in named.grid.skipped} | task.unusable
    sections = [
        Section("Quality on held-out fields", _quality_parts(task, named, measured)),
        *_explained(task, named),
        Section("Simple methods on the same fields", [_classical_table(task)]),
        Section("Training", [*_curves({task.model: rows}), _data_table(task), *origin]),
        Section("Cost", [cost_table({task.model: task}, {task.model: run})]),
        *skipped_sections(unusable),
        Section("Files", [Files("In the folder of the run", files)]),
    ]
    return Report(f"Time series with {task.model}", summary, sections, provenance(data=task.data))


def comparison_report(tasks: Mapping[str, SequenceRecognition], runs: Mapping[str, Run], folder: Path) -> Report:
    """Several networks that were trained on the same pixels under the same budget, and simple methods beside them."""
    first = next(iter(tasks.values()))
    held_out = {name: task.named(task.splits["test"]) for name, task in tasks.items()}
    measured = {name: quality(named) for name, named in held_out.items()}
    ranked, parts = side_by_side(tasks, runs, measured)
    confusions: list[Part] = [_confusion(tasks[name], held_out[name], f"Confusion matrix of {name}") for name in tasks]
    sections = [
        Section("Side by side", [*parts, _classical_table(first)]),
        Section("Training", _curves({name: run.read_metrics() for name, run in runs.items()})),
        Section("Confusions", confusions),
        files_section(runs, folder),
    ]
    winner = ranked[0]
    summary = (
        f"{winner} is the most accurate network: {measured[winner]['accuracy']:.2%} of "
        f"{len(held_out[winner].series)} pixels in held-out fields."
    )
    return Report(f"{listed(tasks)} on {first.data}", summary, sections, provenance(data=first.data))


# -- simple methods ----------------------------------------------------------------------------------------------------


def classical_accuracies(
    task: SequenceRecognition, transforms: Mapping[str, SentinelTimeSeries], seed: int = 0
) -> dict[str, float]:
    """Accuracies of a random forest and an SVM on the test fields, by method and features.

    Args:
        task: prepared, for its split.
        transforms: by name, what to bring the pixels to.
        seed: of the forest, and of the training pixels where there are more than 5,000.
    """
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    found = {}
    for name, transform in transforms.items():
        arrays = {part: _flat(transform, task.splits[part]) for part in ("train", "test")}
        x, y = arrays["train"]
        some = np.random.default_rng(seed).permutation(len(y))[:_MOST_CLASSICAL]
        methods: dict[str, Any] = {
            "random forest": RandomForestClassifier(200, random_state=seed),
            "SVM": make_pipeline(StandardScaler(), SVC()),
        }
        for method, model in methods.items():
            found[f"{method}, {name}"] = float(model.fit(x[some], y[some]).score(*arrays["test"]))
    return found


def _flat(transform: SentinelTimeSeries, series: Any) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    grid = transform(series)
    return grid.values.reshape(len(grid.values), -1), series.labels[grid.rows]


def _classical_table(task: SequenceRecognition) -> Table:
    columns = dataclasses.replace(task.transform, features="columns")
    transforms = {"same features": task.transform, "all columns": columns}
    if task.transform.features == "columns":
        del transforms["all columns"]
    rows: list[list[Cell]] = [[name, value] for name, value in classical_accuracies(task, transforms).items()]
    caption = f"Trained on the same fields, at most {_MOST_CLASSICAL:,} pixels, with the settings of scikit-learn."
    return Table("Random forest and SVM", ["method", "accuracy"], rows, caption, {"accuracy": "max"})


# -- parts -------------------------------------------------------------------------------------------------------------


def _quality_parts(task: SequenceRecognition, named: Named, measured: Mapping[str, float]) -> list[Part]:
    labels, best = torch.from_numpy(named.series.labels), torch.from_numpy(named.best)
    scores = class_scores(confusion_matrix(labels, best, len(task.classes)))
    counts = named.series.counts
    rows: list[list[Cell]] = [
        [name, int(counts[index]), *(float(scores[key][index]) for key in ("recall", "precision", "f1"))]
        for index, name in enumerate(task.classes)
        if counts[index]
    ]
    return [
        Table("Measured", list(measured), [list(measured.values())]),
        _confusion(task, named),
        Table("By class", ["class", "pixels", "producer's accuracy", "user's accuracy", "F1"], rows),
        _early(task, named),
        *_mean_series(task, named, named.series.labels),
    ]


def _confusion(task: SequenceRecognition, named: Named, title: str = "Confusion matrix") -> Heatmap:
    labels, best = torch.from_numpy(named.series.labels), torch.from_numpy(named.best)
    matrix = confusion_matrix(labels, best, len(task.classes)).numpy()
    return Heatmap(title, matrix, task.classes, task.classes, "predicted class", "true class")


def _early(task: SequenceRecognition, named: Named) -> Lines:
    """Accuracy if a season is known up to a day only."""
    values, days = task.standardised(named.grid), named.grid.days
    accuracies = []
    for step in range(len(days)):
        known = values.clone()
        known[:, :, step + 1 :] = 0
        best = task.probabilities(known).argmax(1)
        accuracies.append(float((best == named.series.labels).mean()))
    caption = "Later steps are replaced by the mean of the training data; the network is not trained anew."
    series = {task.model: (list(days), accuracies)}
    return Lines("Accuracy with the season known up to a day", "day", "accuracy", series, caption=caption)


def _mean_series(task: SequenceRecognition, named: Named, labels: npt.NDArray[np.int64]) -> list[Part]:
    parts: list[Part] = []
    for channel, feature in enumerate(named.grid.features):
        series = {
            name: (list(named.grid.days), list(named.grid.values[labels == index, channel].mean(0)))
            for index, name in enumerate(task.classes)
            if (labels == index).any()
        }
        parts.append(Lines(f"Mean {feature} of each class", "day", feature, series))
    return parts


def _explained(task: SequenceRecognition, named: Named) -> list[Section]:
    """Which dates speak for a class, and what the capsules stand for, of a network with capsules."""
    network = task.network
    if not isinstance(network, FFDNN):
        return []
    values, days = task.standardised(named.grid), list(named.grid.days)
    labels = named.series.labels
    curves, table = {}, []
    for index, name in enumerate(task.classes):
        members = values[torch.from_numpy(labels == index)]
        if len(members):
            importance = explain(network, members).importance[:, index].mean(0)
            curves[name] = (days, importance.mean(-1).tolist())
            table.append(importance.T.numpy())
    caption = "Coupling of each date to a class, mean over the groups of features and the pixels of that class."
    groups = [
        f"{name}, group {group + 1}" for name, rows in zip(curves, table, strict=True) for group in range(len(rows))
    ]
    parts: list[Part] = [
        Lines("Importance of the dates", "day", "coupling", curves, caption=caption),
        Heatmap(
            "Importance of dates and groups of features", np.concatenate(table), groups, [f"{day:g}" for day in days],
            "day", "class and group",
        ),
    ]  # fmt: skip
    if network.decoder is not None:
        parts += _traversals(task, values, labels, days)
    return [Section("What decides", parts)]


def _traversals(
    task: SequenceRecognition, values: torch.Tensor, labels: npt.NDArray[np.int64], days: list[float]
) -> list[Part]:
    network = task.network
    if not isinstance(network, FFDNN):
        raise DataError(f"{task.model} has no capsules")
    parts: list[Part] = []
    for index in sorted(set(labels.tolist())):
        first = values[torch.from_numpy(labels == index)][:1]
        moved = network.traverse(first, _TRAVERSED)[0]
        for channel, feature in enumerate(task.features):
            made = moved[:_SHOWN_COMPONENTS, :, channel] * task.std[channel] + task.mean[channel]
            series = {
                f"component {number + 1}, {step:+g}": (days, made[number, place].tolist())
                for number in range(len(made))
                for place, step in enumerate(_TRAVERSED)
            }
            title = f"{feature} that the decoder makes of a capsule of {task.classes[index]}"
            parts.append(Lines(title, "day", feature, series))
    return parts


def _curves(rows: Mapping[str, Sequence[Mapping[str, float]]]) -> list[Part]:
    def series(key: str) -> dict[str, tuple[list[float], list[float]]]:
        return {name: ([row["epoch"] for row in table], [row[key] for row in table]) for name, table in rows.items()}

    return [
        Lines("Training loss", "epoch", "loss", series("train_loss"), log_y=True),
        Lines("Validation accuracy", "epoch", "accuracy", series("val_accuracy")),
    ]


def _data_table(task: SequenceRecognition) -> Table:
    rows: list[list[Cell]] = [
        [name, len(task.splits[name]), len(set(task.splits[name].fields))] for name in ("train", "val", "test")
    ]
    days = task.transform.grid
    caption = (
        f"{', '.join(task.features)} from day {days[0]:g} to {days[-1]:g} every {task.transform.step:g} days. No field "
        "lies in two parts."
    )
    if all(task.splits["train"].fields[row] == name for row, name in enumerate(task.splits["train"].names)):
        caption += " The table names no fields: neighbouring pixels in several parts would flatter the quality."
    return Table("Pixels", ["part", "pixels", "fields"], rows, caption)
