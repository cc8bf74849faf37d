"""``convatlas bench``: speed and memory beside what one would use instead."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convatlas.catalog import bench_module, benchmarks
from convatlas.cli.parser import Parser, UsageError, fresh_folder
from convatlas.cli.train import output_to_stderr

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    """Run a benchmark and report its ratios, or list the benchmarks."""
    summary = "Speed and memory beside what one would use instead, as ratios measured in one run. Without NAME: a list."
    parser = Parser("convatlas bench", description=summary)
    parser.add_argument("name", nargs="?", metavar="NAME", help=f"one of {', '.join(benchmarks())}")
    parser.add_argument("--threads", metavar="N,...", help="numbers of CPU threads to measure with; by default 1,2")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds")
    parser.add_argument("--models", metavar="A,...", help="of the benchmark networks: names of models")
    parser.add_argument("--out", help="where to write the report; by default a folder below runs/ with the time")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args(argv)
    if arguments.name is None:
        _list(arguments.json)
        return 0
    options: dict[str, Any] = {"threads": _threads(arguments.threads), "quick": arguments.quick}
    target = bench_module(arguments.name)
    module = importlib.import_module(target)
    if arguments.models is not None:
        if "models" not in inspect.signature(module.run).parameters:
            raise UsageError(f"the benchmark {arguments.name} takes no --models")
        options["models"] = [name.strip() for name in arguments.models.split(",") if name.strip()]
    folder = Path(arguments.out) if arguments.out else fresh_folder("runs", f"bench-{arguments.name}")
    with output_to_stderr(arguments.json):
        report = module.run(**options)
        report.save(folder)
    if arguments.json:
        print(report.to_json())
    else:
        report.to_terminal()
        print(f"report: {folder / 'report.html'}")
    return 0


def _list(as_json: bool) -> None:
    if as_json:
        print(json.dumps(benchmarks(), indent=1))
        return
    width = max(map(len, benchmarks()))
    for name, what in benchmarks().items():
        print(f"{name:<{width}}  {what}")


def _threads(text: str | None) -> list[int] | None:
    if text is None:
        return None
    numbers = text.split(",")
    if not all(number.strip().isdecimal() and int(number) > 0 for number in numbers):
        raise UsageError(f"--threads must be positive numbers with commas between them, got {text}")
    return [int(number) for number in numbers]
