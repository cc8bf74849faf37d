"""``convatlas reproduce``: test the central claim of a paper."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from convatlas.catalog import experiment_module
from convatlas.cli.parser import Parser, UsageError, fresh_folder
from convatlas.cli.train import output_to_stderr

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    """Run the experiment of a system and report its verdicts."""
    summary = "Test the central claim of a paper in a small experiment, with an honest verdict."
    parser = Parser("convatlas reproduce", description=summary)
    parser.add_argument("system", help="slug of the system, as 'convatlas list' shows it")
    budgets = "quick: two minutes on built-in data; full: the paper's setting on your data"
    parser.add_argument("--budget", choices=("quick", "full"), default="quick", help=budgets)
    parser.add_argument("--data", help="your data, for --budget full")
    parser.add_argument("--out", help="where to write the report; by default a folder below runs/ with the time")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args(argv)
    if arguments.budget == "full" and arguments.data is None:
        raise UsageError("--budget full needs --data: the paper's setting runs on your copy of its data")
    module = importlib.import_module(experiment_module(arguments.system))
    folder = Path(arguments.out) if arguments.out else fresh_folder("runs", f"reproduce-{arguments.system}")
    with output_to_stderr(arguments.json):
        report = module.run(arguments.budget, data=arguments.data, folder=folder)
        report.save(folder)
    if arguments.json:
        print(report.to_json())
    else:
        report.to_terminal()
        print(f"report: {folder / 'report.html'}")
    return 0
