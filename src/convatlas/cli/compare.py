"""``convatlas compare``: several models under one budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from convatlas.catalog import TASKS
from convatlas.cli.parser import UsageError, choose_task, fresh_folder
from convatlas.cli.train import built, output_to_stderr, task_parser

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    """Train each model on the same data with the same settings and write one report."""
    cls, words = choose_task(argv, "compare")
    if cls is None:
        print(f"usage: convatlas compare TASK --models A,B ...\n\ntasks: {', '.join(TASKS)}")
        return 0
    parser = task_parser(cls, "compare")
    parser.add_argument(
        "--models",
        type=str | dict[str, dict[str, Any]],
        required=True,
        help="names with commas between them, or a mapping from a label to settings, e.g. {net: {model: A, options: {}}}",
    )
    parser.add_argument("--out", type=str | None, help="folder of the comparison; by default one below runs/ with the time")
    arguments = parser.parse_args(words)
    choices = _choices(arguments.models)
    task, training = built(parser, arguments, cls)
    folder = Path(arguments.out) if arguments.out else fresh_folder("runs", f"compare-{cls.name}")
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} already exists: choose another folder")
    tasks, runs = {}, {}
    with output_to_stderr(arguments.json):
        from convatlas.training.run import Run

        candidates = {label: dataclasses.replace(task, **settings) for label, settings in choices.items()}
        for label, candidate in candidates.items():
            candidate.fit(folder / label, training)
            tasks[label], runs[label] = candidate, Run.open(folder / label)
        report = cls.compare(tasks, runs, folder)
        report.save(folder)
    if arguments.json:
        print(report.to_json())
    else:
        report.to_terminal()
        print(f"report: {folder / 'report.html'}")
    return 0


def _choices(models: str | Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    if isinstance(models, str):
        return {name.strip(): {"model": name.strip()} for name in models.split(",") if name.strip()}
    for label, settings in models.items():
        if "model" not in settings:
            raise UsageError(f"the entry {label!r} of --models names no model")
        if not label.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise UsageError(f"labels of --models become folder names: letters, digits, '-', '_' and '.', got {label!r}")
    return {label: dict(settings) for label, settings in models.items()}
