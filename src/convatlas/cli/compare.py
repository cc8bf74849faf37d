"""``convatlas compare``: several models under one budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from convatlas.catalog import LAYERS, TASKS
from convatlas.cli.parser import UsageError, choose_task, fresh_folder
from convatlas.cli.train import built, output_to_stderr, task_parser, with_recipe
from convatlas.errors import Interrupted

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    """Train each model on the same data with the same settings and write one report."""
    cls, words = choose_task(argv, "compare")
    if cls is None:
        print(
            f"usage: convatlas compare TASK --models A,B ... | --model A --with LAYER,...\n\ntasks: {', '.join(TASKS)}"
        )
        return 0
    parser = task_parser(
        cls, f"convatlas compare {cls.name}", "--models A,B | --with LAYER,... [--out FOLDER] [--SETTING VALUE ...]"
    )
    parser.add_argument(
        "--models",
        type=dict[str, dict[str, Any]] | str | None,
        help="names with commas between them, or a mapping of labels to settings: {net: {model: A, options: {}}, ...}; "
        "among these may be the training's methods: {net: {model: A, methods: {sam: {}}}, ...}",
    )
    parser.add_argument(
        "--with",
        type=dict[str, dict[str, Any]] | str | None,
        help="layers to try in each model: names with commas between them, or a mapping of labels to settings: "
        f"{{ph: {{layer: hypercomplex, layer_options: {{n: 4}}}}, ...}}; there are {', '.join(LAYERS)}",
    )
    parser.add_argument("--out", type=str | None, help="folder to write; by default one below runs/ with the time")
    parser.add_argument("--resume", action="store_true", help="go on with the interrupted comparison in --out")
    arguments = parser.parse_args(with_recipe(words, cls))
    layers = _mapping("--with", "layer", arguments["with"])
    if layers and "layer" not in {entry.name for entry in dataclasses.fields(cls)}:
        raise UsageError(f"the task {cls.name} puts no layers into its networks, so --with has no use")
    choices = _choices(arguments.models, arguments.model if layers else None, layers)
    if arguments.resume and not arguments.out:
        raise UsageError("--resume needs --out: the folder of the comparison to go on with")
    task, training = built(parser, arguments, cls)
    if training.devices != 1 or training.nodes != 1:
        raise UsageError(f"compare trains on one device, got devices {training.devices} and nodes {training.nodes}")
    folder = Path(arguments.out) if arguments.out else fresh_folder("runs", f"compare-{cls.name}")
    if not arguments.resume and folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} already exists: choose another folder, or go on with it by --resume")
    with output_to_stderr(arguments.json):
        from convatlas.training.run import Run, from_mapping, to_mapping

        common = to_mapping(task)
        trainings = {
            label: dataclasses.replace(training, methods=settings.pop("methods", training.methods))
            for label, settings in choices.items()
        }
        tasks = {label: from_mapping(cls, {**common, **settings}) for label, settings in choices.items()}
        runs = {label: Run(folder / label) for label in tasks}
        for label, candidate in tasks.items():
            try:
                candidate.fit(folder / label, trainings[label], resume=runs[label].config.is_file())
            except Interrupted as stopped:
                text = f"stopped; go on with the same command and --out {folder} --resume"
                raise Interrupted(text, stopped.exit_code) from None
        report = cls.compare(tasks, runs, folder)
        report.save(folder)
    if arguments.json:
        print(report.to_json())
    else:
        report.to_terminal()
        print(f"report: {folder / 'report.html'}")
    return 0


def _choices(
    models: str | Mapping[str, Mapping[str, Any]] | None, model: str | None, layers: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Settings by label: each model, and each model with each layer."""
    plain = _mapping("--models", "model", model if models is None else models)
    choices = {label: dict(settings) for label, settings in plain.items()}
    for label, settings in plain.items():
        choices |= {f"{label}-{layer}": {**settings, **more} for layer, more in layers.items()}
    if len(choices) < 2:
        raise UsageError(f"--models needs at least two different models, got {', '.join(choices) or 'none'}")
    return choices


def _mapping(argument: str, setting: str, given: str | Mapping[str, Mapping[str, Any]] | None) -> dict[str, Any]:
    """Settings by label, of an argument that is a list of names or such a mapping."""
    if isinstance(given, str):
        if given.lstrip().startswith("{"):
            raise UsageError(f"{argument} is no valid mapping: {given}")
        given = {name.strip(): {setting: name.strip()} for name in given.split(",") if name.strip()}
    for label, settings in (given or {}).items():
        if setting not in settings:
            raise UsageError(f"the entry {label!r} of {argument} names no {setting}")
        if not label.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise UsageError(
                f"a label of {argument} becomes a folder: letters, digits, '-', '_' and '.', got {label!r}"
            )
    return dict(given or {})
