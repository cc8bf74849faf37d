"""Cross-validation: the same training once for each fold of the training samples."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from convatlas.recognition.reports import quality
from convatlas.report import Cell, Files, Note, Report, Section, Table
from convatlas.training.measure import provenance
from convatlas.training.run import Run, check_same_settings, to_mapping
from convatlas.training.settings import Training

if TYPE_CHECKING:
    from convatlas.recognition.task import Recognition

__all__ = ["cross_validate"]


def cross_validate(task: Recognition, folder: str | Path, training: Training, *, resume: bool = False) -> Report:
    """Train once for each fold, in ``folder/fold-1`` and so on, and report on all of them.

    Each fold chooses its best epoch on its held-out part; the quality is measured on the test samples, which are the
    same for all. Afterwards the task holds the network of the last fold.

    Raises:
        FileExistsError: the folder is not empty and ``resume`` is off.
        Interrupted: the user stopped the run; with ``resume`` it goes on.
    """
    settings = {**to_mapping(task), **to_mapping(training)}
    if resume:
        run = Run.open(folder)
        check_same_settings(settings, run.settings())
    else:
        run = Run.create(folder, task.name, settings)
    rows: list[list[Cell]] = []
    links = {}
    for fold in range(1, task.folds + 1):
        one = dataclasses.replace(task, fold=fold)
        part = run.folder / f"fold-{fold}"
        one.fit(part, training, resume=Run(part).config.is_file())
        measured = quality(one.probabilities(one.splits["test"]))
        rows.append([f"fold {fold}", len(one.splits["train"]), len(one.splits["val"]), *measured.values()])
        links[f"report of fold {fold}"] = f"fold-{fold}/report.html"
        task.network, task.classes, task.preprocess = one.network, one.classes, one.preprocess
        task.splits, task.data_digest = one.splits, one.data_digest
    columns = ["", "training samples", "held out", *measured]
    numbers = [[float(row[column] or 0) for row in rows] for column in range(3, len(columns))]
    for label, value in (("mean", statistics.mean), ("standard deviation", statistics.stdev)):
        rows.append([label, None, None, *(float(value(each)) for each in numbers)])
    f1 = columns.index("macro F1") - 3
    summary = (
        f"{task.model}: macro F1 {statistics.mean(numbers[f1]):.4f} (standard deviation "
        f"{statistics.stdev(numbers[f1]):.4f} over {task.folds} folds) on {len(task.splits['test'])} test samples."
    )
    note = Note("Use one fold, or all of them: each is a run, e.g. 'convatlas predict FOLDER/fold-1 FILES'.")
    table = Table("Quality on the same test samples", columns, rows)
    sections = [Section("Folds", [table, note, Files("The runs", links)])]
    report = Report(f"Cross-validation of {task.model}", summary, sections, provenance(data=task.data))
    report.save(run.folder)
    return report
