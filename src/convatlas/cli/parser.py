"""What the verbs share to read their words: one-line errors that offer the nearest names, tasks, new folders."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import os
import re
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from convatlas.catalog import TASKS, resolve
from convatlas.errors import Unsupported, unknown

__all__ = [
    "Parser",
    "UsageError",
    "add_screening",
    "choose_task",
    "fresh_folder",
    "options_of_run",
    "screen",
    "sizes",
    "told_options",
]


class UsageError(ValueError):
    """The words of a command are wrong."""


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are exceptions of one line, with the nearest names of a mistyped option."""

    def __init__(self, prog: str, *, description: str) -> None:
        super().__init__(prog, description=description, allow_abbrev=False)

    def add_fields(self, cls: type[Any]) -> None:
        """Give the parser an option for each field of a dataclass: a switch where it is False by default."""
        told = _described(cls)
        hints = get_type_hints(cls)
        for entry in dataclasses.fields(cls):
            flag, hint = f"--{entry.name.replace('_', '-')}", hints[entry.name]
            common: dict[str, Any] = {"dest": entry.name, "help": told.get(entry.name, ""), "default": entry.default}
            if hint is bool:
                self.add_argument(flag, action="store_true", **common)
                continue
            kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
            kind: Any = next(kind for kind in kinds if kind is not types.NoneType)
            if get_origin(kind) is Literal:
                self.add_argument(flag, choices=get_args(kind), **common)
            else:
                self.add_argument(flag, type=kind, metavar=kind.__name__.upper(), **common)

    def error(self, message: str) -> NoReturn:
        """Raise the message as a `UsageError`."""
        word = message.removeprefix("unrecognized arguments: ").split()[0]
        if word == message.split()[0]:
            raise UsageError(message.removeprefix("argument "))
        if not word.startswith("-"):
            raise UsageError(f"{word!r} is not expected here")
        options = [option for action in self._actions for option in action.option_strings if len(option) > 2]
        raise UsageError(str(unknown("option", word.partition("=")[0], options)))


def choose_task(argv: Sequence[str], verb: str) -> tuple[type[Any] | None, list[str]]:
    """The task class that the first word names, and the other words; None when help is asked for instead.

    Raises:
        UnknownName: there is no such task.
        UsageError: no task is named.
    """
    if argv and argv[0] in ("-h", "--help"):
        return None, list(argv)
    if not argv or argv[0].startswith("-"):
        raise UsageError(f"name a task first: convatlas {verb} {'|'.join(TASKS)}")
    if argv[0] not in TASKS:
        raise unknown("task", argv[0], TASKS)
    task: type[Any] = resolve(TASKS[argv[0]])
    if verb not in task.verbs:
        raise Unsupported(f"the task {argv[0]} has no verb {verb!r}; it has {', '.join(task.verbs)}")
    return task, list(argv[1:])


def add_screening(parser: Parser) -> None:
    """Options of the verbs that use a run: whether camouflaged images are looked for, whatever the training did."""
    parser.add_argument(
        "--camouflage.thresholds",
        dest="thresholds",
        metavar="FILE",
        help="look for camouflaged images with these thresholds, or with none of them, 'null'; else as in the training",
    )
    parser.add_argument(
        "--camouflage.action", dest="action", choices=("refuse", "flag"), help="leave them out, or use and list them"
    )


def screen(task: Any, arguments: argparse.Namespace) -> None:
    """Have a task look for camouflaged images as the options of `add_screening` say.

    Raises:
        UsageError: the task reads no images in which they are looked for.
    """
    given = {name: value for name in ("thresholds", "action") if (value := getattr(arguments, name)) is not None}
    if not given:
        return
    if not dataclasses.is_dataclass(getattr(task, "camouflage", None)):
        raise UsageError(f"the task {task.name} does not look for camouflaged images")
    if given.get("thresholds") == "null":
        given["thresholds"] = None
    task.camouflage = dataclasses.replace(task.camouflage, **given)


def options_of_run(words: Sequence[str], verb: str) -> type[Any] | None:
    """The dataclass of what a verb may be told for the run that is among its words; None if there is nothing."""
    from convatlas.training.run import Run

    run = next((word for word in words if not word.startswith("-") and Run(word).config.is_file()), None)
    if run is None:
        return None  # the verb itself tells what is wrong
    name = str(Run(run).settings()["task"])
    task: Any = resolve(TASKS[name]) if name in TASKS else None
    found: type[Any] | None = None if task is None else task.verb_options.get(verb)
    return found


def told_options(kind: type[Any] | None, arguments: argparse.Namespace) -> dict[str, Any]:
    """The argument ``options`` of a verb, as its words tell it; none where there is no such dataclass."""
    if kind is None:
        return {}
    return {"options": kind(**{entry.name: getattr(arguments, entry.name) for entry in dataclasses.fields(kind)})}


def _described(cls: type[Any]) -> dict[str, str]:
    """What the docstring of a dataclass says of each of its fields."""
    told: dict[str, str] = {}
    name = ""
    for line in inspect.cleandoc(cls.__doc__ or "").partition("Attributes:")[2].splitlines():
        if match := re.fullmatch(r"    (\w+): (.*)", line):
            name, told[match[1]] = match[1], match[2]
        elif name and line.startswith("        "):
            told[name] += f" {line.strip()}"
        elif line.strip():
            break
    return {name: text.replace("``", "'").replace("%", "%%") for name, text in told.items()}


def fresh_folder(base: str | os.PathLike[str], name: str) -> Path:
    """A folder below ``base`` that does not exist yet: the name and the time."""
    stem = Path(base) / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, number = stem, 1
    while folder.exists():
        folder, number = stem.with_name(f"{stem.name}-{number}"), number + 1
    return folder


def sizes(text: str | None) -> tuple[int, ...] | None:
    """The numbers of ``--size``, e.g. ``224,224``; None where it is not given.

    Raises:
        UsageError: they are no positive numbers.
    """
    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise UsageError(f"--size must be positive numbers with commas between them, e.g. 224,224, got {text}")
    return tuple(map(int, words))
