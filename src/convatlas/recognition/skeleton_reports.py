"""What a user wants to see of a network for skeletons: quality, confusions, figures, and what an ensemble gains."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw

from convatlas.data.skeleton_sets import SkeletonSet, known_layout
from convatlas.data.skeletons import fill_missing, normalise_view, resample_frames
from convatlas.files import atomic_path
from convatlas.ops.score_fusion import best_fusion_weights, disagreement, fuse_scores, q_statistic
from convatlas.recognition.class_scores import class_scores, confusion_matrix
from convatlas.report import Cell, Files, Heatmap, Images, Lines, Note, Part, Report, Section, Table, printable
from convatlas.training.comparison import cost_table
from convatlas.training.left_out import skipped_sections
from convatlas.training.measure import provenance
from convatlas.training.run import Run

if TYPE_CHECKING:
    from convatlas.recognition.skeletons import Skeletons

__all__ = [
    "clip_picture",
    "diversity_table",
    "ensemble_report",
    "evaluation_report",
    "prediction_report",
    "quality",
    "subsets_table",
    "training_report",
    "write_predictions",
]

Array = npt.NDArray[Any]

#: Figures of a picture, its height, and pictures of a page.
_FIGURES, _HEIGHT, _MOST = 6, 110, 12
_COLOURS = ((31, 90, 160), (200, 90, 30))


def quality(clips: SkeletonSet, probabilities: Array) -> dict[str, float]:
    """Accuracy, macro F1 over the classes that are there, and cross-entropy."""
    labels, best = torch.from_numpy(clips.labels), torch.from_numpy(probabilities.argmax(1))
    right = probabilities[np.arange(len(clips)), clips.labels]
    f1 = class_scores(confusion_matrix(labels, best, probabilities.shape[1]))["f1"]
    return {
        "accuracy": float((labels == best).double().mean()),
        "macro F1": float(f1[labels.unique()].mean()),
        "cross-entropy [nats]": float(-np.log(np.maximum(right, 1e-12)).mean()),
    }


def evaluation_report(task: Skeletons, clips: SkeletonSet, probabilities: Array) -> Report:
    """Quality of labelled clips."""
    sections = [
        Section("Quality", _quality(task, clips, probabilities)),
        _mistakes(clips, probabilities),
        *_ensemble_sections(task, clips),
        *skipped_sections(dict(clips.skipped)),
    ]
    return Report(f"Evaluation of {task.model}", _summary(task, clips, probabilities), sections, provenance())


def prediction_report(task: Skeletons, clips: SkeletonSet, probabilities: Array) -> Report:
    """Every clip with its class, as a page of pictures."""
    shown = [
        (clip_picture(clips.clips[row]), _caption(task, clips, probabilities, row))
        for row in range(min(_MOST, len(clips)))
    ]
    caption = f"The first {len(shown)} of {len(clips)}; predictions.csv has all." if len(clips) > len(shown) else ""
    parts: list[Part] = [
        Images("Clips and their most probable class", shown, caption),
        Files("In this folder", {"all predictions": "predictions.csv"}),
    ]
    summary = f"{task.model} named {len(clips)} clip{'s' if len(clips) != 1 else ''}."
    sections = [Section("Predictions", parts), *skipped_sections(dict(clips.skipped))]
    return Report(f"Predictions of {task.model}", summary, sections, provenance())


def training_report(task: Skeletons, run: Run) -> Report:
    """Quality on the test clips, mistakes, curves and cost of one network."""
    clips = task.splits["test"]
    found = task.probabilities(clips)
    write_predictions(run.folder / "predictions.csv", clips, found, task.classes)
    rows = run.read_metrics()
    best = max(rows, key=lambda row: (row["val_accuracy"], row["epoch"]))
    chosen = f" Best epoch {best['epoch']:.0f} of {len(rows)}, chosen by validation accuracy."
    origin = [Note(f"Started from {task.started_from}")] if task.started_from else []
    files = {
        "settings": "config.yaml",
        "weights of the best epoch": "checkpoints/best.safetensors",
        "one row an epoch": "metrics.csv",
        "predictions for the test clips": "predictions.csv",
    }
    sections = [
        Section("Quality on test clips", _quality(task, clips, found)),
        _mistakes(clips, found),
        Section("Training", [*_curves({task.model: run}), _counts(task), *origin]),
        Section("Cost", [cost_table({task.model: task}, {task.model: run})]),
        *skipped_sections(dict(clips.skipped)),
        Section("Files", [Files("In the folder of the run", files)]),
    ]
    title = f"Skeletons with {task.model}"
    return Report(title, _summary(task, clips, found) + chosen, sections, provenance(data=task.data))


def ensemble_report(task: Skeletons, run: Run) -> Report:
    """Quality of the ensemble and of every subset of it, diversity, mistakes; writes ``scores.npz``."""
    clips = task.splits["test"]
    found = task.probabilities(clips)
    write_predictions(run.folder / "predictions.csv", clips, found, task.classes)
    names = list(_members(task))
    with atomic_path(run.folder / "scores.npz") as part, part.open("wb") as file:
        held = {split: task.member_probabilities(task.splits[split]) for split in ("val", "test")}
        labels = {f"{split}_labels": task.splits[split].labels for split in held}
        np.savez_compressed(file, networks=np.array(names), **held, **labels)  # type: ignore[arg-type]
    runs = {name: Run(run.folder / name) for name in names}
    files = {
        "settings": "config.yaml",
        "weights": "checkpoints/best.safetensors",
        "scores of each network": "scores.npz",
        "predictions for the test clips": "predictions.csv",
        **{f"report of {name}": f"{name}/report.html" for name in names},
    }
    sections = [
        Section("Quality on test clips", _quality(task, clips, found)),
        *_ensemble_sections(task, clips),
        _mistakes(clips, found),
        Section("Training", [*_curves(runs), _counts(task)]),
        *skipped_sections(dict(clips.skipped)),
        Section("Files", [Files("In the folder of the run", files)]),
    ]
    title = f"Skeletons with {task.model}"
    return Report(title, _summary(task, clips, found), sections, provenance(data=task.data))


def write_predictions(path: Path, clips: SkeletonSet, probabilities: Array, classes: Sequence[str]) -> None:
    """One row a clip: name, class, probability, true class where it is known, and the probability of each class."""
    with atomic_path(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["clip", "class", "probability", "true class", *(f"p({name})" for name in classes)])
        for row, name in enumerate(clips.names):
            best, label = int(probabilities[row].argmax()), int(clips.labels[row])
            true = clips.classes[label] if label >= 0 else ""
            numbers = [f"{value:.6f}" for value in probabilities[row]]
            writer.writerow([printable(name), classes[best], numbers[best], true, *numbers])


# -- ensembles ---------------------------------------------------------------------------------------------------------


def subsets_table(
    scores: Array, labels: Array, names: Sequence[str], val_scores: Array, val_labels: Array
) -> tuple[Table, float]:
    """Accuracy of every subset of networks by every fusion; and what all of them, by their mean, gain over the best.

    Args:
        scores: (M, N, K) of the clips that are measured.
        labels: (N).
        names: of the networks.
        val_scores, val_labels: of the clips on which the weights are chosen.
    """
    given, truth = torch.from_numpy(np.asarray(scores)), torch.from_numpy(np.asarray(labels))
    held, held_truth = torch.from_numpy(np.asarray(val_scores)), torch.from_numpy(np.asarray(val_labels))
    rows: list[list[Cell]] = []
    means: dict[tuple[int, ...], float] = {}
    for size in range(1, len(names) + 1):
        for chosen in itertools.combinations(range(len(names)), size):
            some = given[list(chosen)]
            weights = best_fusion_weights(held[list(chosen)], held_truth)
            fused = [
                *(fuse_scores(some, method) for method in ("mean", "product", "max")),
                fuse_scores(some, "weighted", weights),
            ]
            accuracies = [float((each.argmax(1) == truth).double().mean()) for each in fused]
            means[chosen] = accuracies[0]
            told = ", ".join(f"{weight:g}" for weight in weights)
            rows.append([", ".join(names[index] for index in chosen), *accuracies, told])
    gain = means[tuple(range(len(names)))] - max(means[(index,)] for index in range(len(names)))
    highlight: Any = dict.fromkeys(("mean", "product", "max", "weighted"), "max")
    caption = f"Accuracy. All of them, by the mean, gain {100 * gain:+.2f} points on the best one.".replace(
        "-", "\u2212"
    )
    columns = ["networks", "mean", "product", "max", "weighted", "weights, of validation"]
    return Table("Every subset", columns, rows, caption, highlight), gain


def diversity_table(scores: Array, labels: Array, names: Sequence[str]) -> Table:
    """Disagreement and Q statistic of every pair of networks, of scores (M, N, K) and labels (N)."""
    best, truth = torch.from_numpy(scores.argmax(2)), torch.from_numpy(np.asarray(labels))
    rows: list[list[Cell]] = []
    for a, b in itertools.combinations(range(len(names)), 2):
        pair = (best[a], best[b], truth)
        rows.append([names[a], names[b], disagreement(*pair), q_statistic(*pair)])
    caption = "Disagreement: share of the clips that one of the two names rightly. Q: 1 if they are wrong together."
    return Table("Diversity", ["network", "and", "disagreement", "Q"], rows, caption)


def _members(task: Skeletons) -> Sequence[str]:
    ensemble: Any = task.network
    return list(ensemble.members)


def _ensemble_sections(task: Skeletons, clips: SkeletonSet) -> list[Section]:
    if not task.is_ensemble or "val" not in task.splits:
        return []
    names, val = _members(task), task.splits["val"]
    scores = task.member_probabilities(clips)
    table, _ = subsets_table(scores, clips.labels, names, task.member_probabilities(val), val.labels)
    return [Section("The ensemble", [table, diversity_table(scores, clips.labels, names)])]


# -- tables and pictures -----------------------------------------------------------------------------------------------


def _summary(task: Skeletons, clips: SkeletonSet, probabilities: Array) -> str:
    accuracy = quality(clips, probabilities)["accuracy"]
    return f"{task.model} names {accuracy:.2%} of {len(clips)} held-out clips rightly."


def _quality(task: Skeletons, clips: SkeletonSet, probabilities: Array) -> list[Part]:
    measured = quality(clips, probabilities)
    labels, best = torch.from_numpy(clips.labels), torch.from_numpy(probabilities.argmax(1))
    matrix = confusion_matrix(labels, best, len(task.classes))
    scores = class_scores(matrix)
    rows: list[list[Cell]] = [
        [name, int(matrix[index].sum()), *(float(values[index]) for values in scores.values())]
        for index, name in enumerate(task.classes)
        if matrix[index].sum()
    ]
    return [
        Table("Measured", list(measured), [list(measured.values())]),
        Heatmap("Confusion matrix", matrix.numpy(), task.classes, task.classes, "predicted class", "true class"),
        Table("By class", ["class", "clips", "precision", "recall", "specificity", "F1"], rows),
    ]


def _mistakes(clips: SkeletonSet, probabilities: Array) -> Section:
    best = probabilities.argmax(1)
    wrong = np.flatnonzero(best != clips.labels)
    if not len(wrong):
        return Section("Worst mistakes", [Note("Every held-out clip was named rightly.")])
    worst = wrong[np.argsort(-probabilities[wrong, best[wrong]])][:_MOST]
    pictures = [
        (
            clip_picture(clips.clips[row]),
            f"{clips.names[row]}: {clips.classes[best[row]]} ({probabilities[row, best[row]]:.0%}), truly "
            f"{clips.classes[clips.labels[row]]}",
        )
        for row in worst
    ]
    caption = f"{len(wrong)} of {len(clips)} answers are wrong." if len(wrong) > len(worst) else ""
    return Section("Worst mistakes", [Images("The surest wrong answers", pictures, caption)])


def _caption(task: Skeletons, clips: SkeletonSet, probabilities: Array, row: int) -> str:
    best = int(probabilities[row].argmax())
    return f"{clips.names[row]}: {task.classes[best]} ({probabilities[row, best]:.0%})"


def _curves(runs: dict[str, Run]) -> list[Part]:
    rows = {name: run.read_metrics() for name, run in runs.items()}

    def series(key: str) -> dict[str, tuple[list[float], list[float]]]:
        return {
            name: ([row["epoch"] for row in table], [row.get(key, float("nan")) for row in table])
            for name, table in rows.items()
        }

    return [
        Lines("Training loss", "epoch", "cross-entropy [nats]", series("train_loss"), log_y=True),
        Lines("Accuracy", "epoch", "validation accuracy", series("val_accuracy")),
    ]


def _counts(task: Skeletons) -> Table:
    rows: list[list[Cell]] = [[name, len(task.splits[name])] for name in ("train", "val", "test")]
    joints, dim = task.shape
    caption = f"{len(task.classes)} classes; {joints} joints of {dim} coordinates, resampled to {task.frames} frames."
    if task.splits["test"] is task.splits["val"]:
        caption += " The data have no test part: the quality is measured on the clips that chose the best epoch."
    return Table("Clips", ["part", "clips"], rows, caption)


def clip_picture(clip: Array) -> npt.NDArray[np.uint8]:
    """Figures at some times of a clip (T, J, dim) side by side, (H, W, 3); bones where the layout is known."""
    known = known_layout(clip.shape[1])
    shown = resample_frames(fill_missing(clip), _FIGURES)
    if known is not None and clip.shape[2] == 3:
        shown = normalise_view(shown, *known[0].view)
    flat = shown[..., [0, 2]] if clip.shape[2] == 3 else shown * [1, -1]
    low, high = flat.reshape(-1, 2).min(0), flat.reshape(-1, 2).max(0)
    scale = (_HEIGHT - 10) / max(float((high - low).max()), 1e-9)
    page = Image.new("RGB", (_FIGURES * _HEIGHT, _HEIGHT), "white")
    draw = ImageDraw.Draw(page)
    for number, figure in enumerate(flat):
        middle = np.array([(number + 0.5) * _HEIGHT, _HEIGHT / 2])
        points = middle + (figure - (low + high) / 2) * scale * [1, -1]
        bones = [] if known is None else known[0].bones
        for body in range(1 if known is None else known[1]):
            first = 0 if known is None else body * len(known[0].joints)
            own = points if known is None else points[first : first + len(known[0].joints)]
            if body and not clip[:, first : first + len(own)].any():
                continue  # there is no second body
            for child, parent in bones:
                draw.line([tuple(own[child]), tuple(own[parent])], fill=_COLOURS[body], width=2)
            for x, y in own:
                draw.ellipse([x - 1.5, y - 1.5, x + 1.5, y + 1.5], fill=_COLOURS[body])
    return np.asarray(page)
