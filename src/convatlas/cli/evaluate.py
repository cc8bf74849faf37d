"""``convatlas evaluate``: measure a trained run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from convatlas.cli.parser import Parser, add_screening, options_of_run, screen, told_options
from convatlas.cli.train import output_to_stderr

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    """Evaluate a run on its own held-out data or on other data and write a report."""
    parser = Parser("convatlas evaluate", description="Measure a trained run on held-out data.")
    parser.add_argument("run", help="folder of the run")
    parser.add_argument("--data", help="other labelled data, in any form that training reads")
    parser.add_argument("--out", help="where to write the report; by default RUN/evaluation")
    add_screening(parser)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    kind = options_of_run(argv, "evaluate")
    if kind is not None:
        parser.add_fields(kind)
    arguments = parser.parse_args(argv)
    told = told_options(kind, arguments)
    from convatlas.training.task import open_task

    folder = Path(arguments.out) if arguments.out else Path(arguments.run) / "evaluation"
    with output_to_stderr(arguments.json):
        task = open_task(arguments.run)
        task.require("evaluate")
        screen(task, arguments)
        report = task.evaluate(arguments.data, folder=folder, **told)
    if arguments.json:
        print(report.to_json())
    else:
        report.to_terminal()
        print(f"report: {folder / 'report.html'}")
    return 0
