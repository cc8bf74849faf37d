"""``convatlas design``: search for an architecture."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convatlas.catalog import DESIGNS, resolve
from convatlas.cli.parser import Parser, UsageError, fresh_folder
from convatlas.cli.train import output_to_stderr
from convatlas.errors import unknown

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    """Search, write a folder with what was found, and say how to train it."""
    if argv and argv[0] in ("-h", "--help"):
        print("usage: convatlas design METHOD ...\n")
        print(f"methods: {', '.join(DESIGNS)}\n\n'convatlas design METHOD --help' lists the settings.")
        return 0
    if not argv or argv[0].startswith("-"):
        raise UsageError(f"name a method first: convatlas design {'|'.join(DESIGNS)}")
    if argv[0] not in DESIGNS:
        raise unknown("method", argv[0], DESIGNS)
    study, arguments = _read(list(argv[1:]), resolve(DESIGNS[argv[0]]))
    if arguments.score is not None:
        with output_to_stderr(arguments.json):
            report = study.score(arguments.score)
        if arguments.out is not None:
            report.save(arguments.out)
        print(report.to_json()) if arguments.json else report.to_terminal()
        return 0
    folder = Path(arguments.resume or arguments.out or fresh_folder("runs", f"design-{study.name}"))
    with output_to_stderr(arguments.json):
        report = study.run(folder, resume=arguments.resume is not None)
    if arguments.json:
        print(report.to_json())
    else:
        report.to_terminal()
        print(f"report: {folder / 'report.html'}")
        print(f"train it: convatlas train recognition --config {folder / 'train.yaml'} --data FOLDER")
    return 0


def _read(words: list[str], cls: type[Any]) -> tuple[Any, Any]:
    """The search that the words describe, and the other arguments."""
    prog, summary = f"convatlas design {cls.name}", (cls.__doc__ or "").strip().splitlines()[0]
    if any(word.partition("=")[0] == "--resume" for word in words):
        short = Parser(prog, description="Go on with an interrupted search.")
        short.add_argument("--resume", metavar="FOLDER", required=True, help="folder of the search")
        short.add_argument("--json", action="store_true", help="print the report as JSON")
        arguments, others = short.parse_known_args(words)
        if others:
            raise UsageError(
                f"--resume takes no other settings, got {' '.join(others)}: a search goes on with its config.yaml"
            )
        arguments.score = arguments.out = None
        return cls.open(arguments.resume), arguments
    from convatlas.training.arguments import SettingsParser

    usage = f"{prog} [--out FOLDER | --resume FOLDER | --score ARCHITECTURE] [--SETTING VALUE ...]"
    parser = SettingsParser(prog=prog, description=summary, usage=usage)
    parser.add_argument("--config", action="config", help="YAML file with settings, e.g. the config.yaml of a search")
    parser.add_argument("--out", type=str | None, help="folder to write; by default one below runs/ with the time")
    parser.add_argument("--resume", type=str | None, help="go on with the search in this folder; takes no settings")
    parser.add_argument("--score", type=str | None, help="only score this architecture: a file, or in its own notation")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--design", type=str, default=cls.name, help="name of the method, as it stands in YAML files")
    parser.add_class_arguments(cls, help="settings of the search")
    arguments = parser.parse_args(words)
    values = vars(parser.instantiate(arguments))
    if values["design"] != cls.name:
        raise UsageError(f"these are settings of the method {values['design']}, not of {cls.name}")
    study = cls(**{entry.name: values[entry.name] for entry in dataclasses.fields(cls) if entry.init})
    return study, arguments
