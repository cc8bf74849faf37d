"""``convatlas train``: fit a task to the user's data."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convatlas.catalog import TASKS
from convatlas.cli.parser import Parser, UsageError, choose_task, fresh_folder

if TYPE_CHECKING:
    from convatlas.training.arguments import SettingsParser

__all__ = ["built", "output_to_stderr", "run", "task_parser", "train", "with_recipe"]

_RUN = "CONVATLAS_RUN"


def run(argv: Sequence[str]) -> int:
    """Train, write a run folder and say where it lies."""
    cls, words = choose_task(argv, "train")
    if cls is None:
        print("usage: convatlas train TASK ...\n")
        print(f"tasks: {', '.join(TASKS)}\n\n'convatlas train TASK --help' lists the settings.")
        return 0
    return train(cls, words, f"convatlas train {cls.name}")


def train(cls: type[Any], words: list[str], command: str) -> int:
    """Train a task by the words of a command that names it."""
    from convatlas.training.task import is_helper

    if any(word.partition("=")[0] == "--resume" for word in words):
        arguments, task, training = _interrupted(words, cls, command)
        folder = Path(arguments.resume)
    else:
        parser = task_parser(cls, command, "[--run RUN | --resume RUN] [--SETTING VALUE ...]")
        parser.add_argument("--run", type=str | None, help="folder to write; by default one below runs/ with the time")
        parser.add_argument(
            "--resume", type=str | None, help="go on with this interrupted run; only settings of where it runs"
        )
        arguments = parser.parse_args(with_recipe(words, cls))
        task, training = built(parser, arguments, cls)
        told = os.environ.get(_RUN) if is_helper() else None
        label = "-".join(filter(None, (cls.name, getattr(task, "model", ""))))
        folder = Path(arguments.run or told or fresh_folder("runs", label))
    with output_to_stderr(arguments.json), _told_to_helpers(folder):
        report = task.fit(folder, training, resume=arguments.resume is not None)
    if arguments.json:
        print(report.to_json())
    else:
        report.to_terminal()
        print(f"run: {folder}\nreport: {folder / 'report.html'}")
    return 0


def _interrupted(words: Sequence[str], cls: type[Any], command: str) -> tuple[Any, Any, Any]:
    """The words of a command with --resume, and the task and the training settings of that run."""
    from convatlas.training.arguments import SettingsParser
    from convatlas.training.run import Run
    from convatlas.training.settings import MOVABLE, Training
    from convatlas.training.task import split_settings

    parser = Parser(command, description="Go on with an interrupted run.")
    parser.add_argument("--resume", metavar="RUN", required=True, help="folder of the run")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments, others = parser.parse_known_args(words)
    fixed = [word for word in others if word.startswith("-") and word.strip("-").partition("=")[0] not in MOVABLE]
    if fixed:
        raise UsageError(
            f"--resume takes no other settings than {', '.join(MOVABLE)}, got {' '.join(fixed)}: a run goes on with "
            "those in its config.yaml"
        )
    values = Run.open(arguments.resume).settings()
    if values["task"] != cls.name:
        raise UsageError(f"{arguments.resume} is a run of the task {values['task']}, not of {cls.name}")
    movable = SettingsParser()
    movable.add_class_arguments(Training, skip={entry.name for entry in dataclasses.fields(Training)} - set(MOVABLE))
    movable.set_defaults({name: values[name] for name in MOVABLE if name in values})
    values |= vars(movable.instantiate(movable.parse_args(others)))
    return arguments, *split_settings(cls, values)


def task_parser(cls: type[Any], command: str, usage: str) -> SettingsParser:
    """A parser for the settings of a task and its training, with configuration files and recipes."""
    from convatlas.training.arguments import SettingsParser
    from convatlas.training.settings import Training

    summary = (cls.__doc__ or "").strip().splitlines()[0]
    parser = SettingsParser(prog=command, description=summary, usage=f"{command} {usage}")
    parser.add_argument("--config", action="config", help="YAML file with settings, e.g. the config.yaml of a run")
    parser.add_argument("--recipe", type=str | None, help=f"published recipe: {', '.join(cls.recipes()) or 'none yet'}")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--task", type=str, default=cls.name, help="name of the task, as it stands in YAML files")
    parser.add_class_arguments(cls, help="settings of the task")
    parser.add_class_arguments(Training, help="settings of the training")
    parser.set_defaults(dict(cls.defaults))
    return parser


def built(parser: SettingsParser, arguments: Any, cls: type[Any]) -> tuple[Any, Any]:
    """The task and the training settings that parsed arguments describe.

    Raises:
        UsageError: they are those of another task.
    """
    from convatlas.training.settings import Training

    values = vars(parser.instantiate(arguments))
    if values["task"] != cls.name:
        raise UsageError(f"these are settings of the task {values['task']}, not of {cls.name}")
    task = cls(**{entry.name: values[entry.name] for entry in dataclasses.fields(cls) if entry.init})
    return task, Training(**{entry.name: values[entry.name] for entry in dataclasses.fields(Training)})


def with_recipe(words: list[str], cls: type[Any]) -> list[str]:
    """Put a recipe's file before all other settings, so that they override it."""
    for index, word in enumerate(words):
        name = word.partition("=")[2] if word.startswith("--recipe=") else None
        if word == "--recipe" and index + 1 < len(words):
            name = words[index + 1]
        if name:
            return ["--config", str(cls.recipe(name)), *words]
    return words


@contextlib.contextmanager
def _told_to_helpers(folder: Path) -> Iterator[None]:
    # Lightning starts this command again for every further device; all must use the same folder.
    os.environ[_RUN] = str(folder)
    try:
        yield
    finally:
        del os.environ[_RUN]


@contextlib.contextmanager
def output_to_stderr(active: bool) -> Iterator[None]:
    """While a job runs, keep standard output free for its JSON."""
    if not active:
        yield
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield
