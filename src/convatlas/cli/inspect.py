"""``convatlas inspect``: what a model costs, layer by layer, and what can be changed in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from convatlas.cli.parser import Parser, UsageError, fresh_folder, sizes
from convatlas.cli.train import output_to_stderr

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    """Open a run, a model or a checkpoint and report on its network."""
    summary = "What a model costs, layer by layer and on this machine, and what can be changed in it."
    parser = Parser("convatlas inspect", description=summary)
    parser.add_argument(
        "source", metavar="RUN|MODEL|CHECKPOINT", help="folder of a run, name of a model, or checkpoint"
    )
    parser.add_argument("--model", help="name of the model that a checkpoint belongs to, where the file does not tell")
    parser.add_argument("--num-classes", type=int, help="size of the classifier, where it is not the published one")
    parser.add_argument("--size", metavar="H,W", help="size of the input, where it is not that of the model")
    machine = (
        "GPU whose published ceilings the waterline is drawn for, e.g. h200 or a100_tf32; by default this machine's"
    )
    parser.add_argument("--machine", help=machine)
    parser.add_argument("--batch", type=int, default=128, help="samples of a batch on that GPU (default: 128)")
    parser.add_argument("--fused", metavar="CLASS,...", help="classes of modules that the waterline shows fused, too")
    parser.add_argument("--out", help="where to write the report; by default a folder below runs/ with the time")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args(argv)
    size = sizes(arguments.size)
    if arguments.batch < 1:
        raise UsageError(f"--batch must be at least 1, got {arguments.batch}")
    from convatlas.analysis.inspection import inspect
    from convatlas.analysis.waterline import find_machine
    from convatlas.catalog import models
    from convatlas.networks.registry import published_files
    from convatlas.training.opening import open_network

    ceilings = find_machine(arguments.machine) if arguments.machine else None
    with output_to_stderr(arguments.json):
        opened = open_network(arguments.source, model=arguments.model, num_classes=arguments.num_classes, size=size)
        files = published_files(opened.name) if opened.name in models() else ()
        report = inspect(
            opened.network,
            opened.inputs,
            name=opened.name,
            files=files,
            machine=ceilings,
            samples=arguments.batch,
            fused=arguments.fused.split(",") if arguments.fused else (),
            weights=opened.weights,
        )
        folder = Path(arguments.out) if arguments.out else fresh_folder("runs", f"inspect-{opened.name}")
        report.save(folder)
    if arguments.json:
        print(report.to_json())
    else:
        report.to_terminal()
        print(f"report: {folder / 'report.html'}")
    return 0
