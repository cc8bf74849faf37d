"""``convatlas export``: a model as ONNX or as a torch program, checked against the original."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from convatlas.cli.parser import Parser, UsageError, sizes
from convatlas.cli.train import output_to_stderr

if TYPE_CHECKING:
    from convatlas.export import Format

__all__ = ["run"]

_SUFFIXES: dict[str, Format] = {".onnx": "onnx", ".pt2": "torch"}


def run(argv: Sequence[str]) -> int:
    """Open a run, a model or a checkpoint, write its network for use elsewhere, and tell how exact the file is."""
    summary = "Write a model as ONNX or as a torch program, merged for use and checked against the original."
    parser = Parser("convatlas export", description=summary)
    parser.add_argument(
        "source", metavar="RUN|MODEL|CHECKPOINT", help="folder of a run, name of a model, or checkpoint"
    )
    parser.add_argument("--out", required=True, help="file to write, .onnx or .pt2; a .json beside it describes it")
    parser.add_argument("--format", choices=("onnx", "torch"), help="by default what the suffix of --out tells")
    dynamic = "axes of any size, with commas between them: batch, length, height, width, depth; none for fixed sizes"
    parser.add_argument("--dynamic", metavar="AXES", default="batch", help=f"{dynamic}; by default batch")
    parser.add_argument(
        "--no-merge", action="store_true", help="keep every layer instead of folding what can be folded"
    )
    parser.add_argument("--model", help="name of the model that a checkpoint belongs to, where the file does not tell")
    parser.add_argument("--num-classes", type=int, help="size of the classifier, where it is not the published one")
    parser.add_argument("--size", metavar="H,W", help="size of the input, where it is not that of the model")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args(argv)
    size, path = sizes(arguments.size), Path(arguments.out)
    form: Format | None = arguments.format or _SUFFIXES.get(path.suffix)
    if form is None:
        raise UsageError(f"--out must end in .onnx or .pt2, or --format be given, got {path.name}")
    named = [name.strip() for name in arguments.dynamic.split(",") if name.strip()]
    from convatlas.export import export
    from convatlas.training.measure import provenance
    from convatlas.training.opening import open_network

    with output_to_stderr(arguments.json):
        opened = open_network(arguments.source, model=arguments.model, num_classes=arguments.num_classes, size=size)
        done = export(
            opened.network,
            opened.inputs,
            path,
            form=form,
            dynamic=[] if named == ["none"] else named,
            merged=not arguments.no_merge,
            metadata=opened.description(),
        )
        report = dataclasses.replace(done.report(opened.name), provenance=provenance(weights=opened.weights))
    if arguments.json:
        print(report.to_json())
    else:
        report.to_terminal()
        print(f"written: {path} and {done.description.name}")
    return 0
