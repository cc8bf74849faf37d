"""``convatlas predict``: apply a trained run to the user's files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from convatlas.cli.parser import Parser, add_screening, fresh_folder, options_of_run, screen, told_options
from convatlas.cli.train import output_to_stderr

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    """Predict for files or folders and write the results."""
    parser = Parser("convatlas predict", description="Apply a trained run to your files.")
    parser.add_argument("run", help="folder of the run")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files or folders to predict for")
    parser.add_argument("--out", help="where to write; by default a new folder below RUN/predictions")
    add_screening(parser)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    kind = options_of_run(argv, "predict")
    if kind is not None:
        parser.add_fields(kind)
    arguments = parser.parse_args(argv)
    told = told_options(kind, arguments)
    from convatlas.training.task import open_task

    folder = Path(arguments.out) if arguments.out else fresh_folder(Path(arguments.run) / "predictions", "predict")
    stdout_taken = bool(getattr(told.get("options"), "takes_stdout", False))  # by what is predicted
    with output_to_stderr(arguments.json or stdout_taken):
        task = open_task(arguments.run)
        task.require("predict")
        screen(task, arguments)
        report = task.predict(arguments.inputs, folder, **told)
    with output_to_stderr(stdout_taken):
        if arguments.json:
            print(report.to_json())
        else:
            report.to_terminal()
            print(f"predictions: {folder}")
    return task.exit_code
