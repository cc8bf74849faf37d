"""``convatlas separate``: the voices of recordings by a network that somebody has trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convatlas.cli.parser import Parser, UsageError, told_options
from convatlas.cli.train import output_to_stderr

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    """Separate files, folders or a stream with the network of a checkpoint, and write the results."""
    from convatlas.audio.separation_options import Separating

    parser = Parser("convatlas separate", description="Take the voices of recordings apart by a trained network.")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files or folders; - for standard input")
    parser.add_argument(
        "--checkpoint", required=True, help="a published file (path, hf://owner/name, https://...) or folder of a run"
    )
    parser.add_argument("--options", default="{}", help="JSON, what the file does not tell: '{\"sample_rate\": 16000}'")
    parser.add_argument("-o", "--out", required=True, help="folder to write")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_fields(Separating)
    arguments = parser.parse_args(argv)
    try:
        overrides = json.loads(arguments.options)
    except json.JSONDecodeError as error:
        raise UsageError(f"--options is no JSON: {error}") from None
    if not isinstance(overrides, dict):
        raise UsageError(f"--options must be a JSON object, got {arguments.options}")
    options: Separating = told_options(Separating, arguments)["options"]
    with output_to_stderr(arguments.json or options.takes_stdout):
        from convatlas.audio.separation_inputs import separate_inputs

        name, network = _opened(arguments.checkpoint, overrides)
        report = separate_inputs(name, network, arguments.inputs, Path(arguments.out), options)
    with output_to_stderr(options.takes_stdout):
        if arguments.json:
            print(report.to_json())
        else:
            report.to_terminal()
            print(f"written: {arguments.out}")
    return 0


def _opened(source: str, overrides: dict[str, Any]) -> tuple[str, Any]:
    """Name and network of a run or of a checkpoint."""
    from convatlas.networks.conv_tasnet.network import ConvTasNet
    from convatlas.training.opening import open_network
    from convatlas.weights import read_checkpoint

    if not Path(source).is_dir() and not {"convatlas", "config"} & set(read_checkpoint(source).metadata):
        return Path(source).name, ConvTasNet.from_pretrained(source, **overrides)
    opened = open_network(source)
    if not isinstance(opened.network, ConvTasNet):
        raise UsageError(f"--checkpoint must be of a separating network, that of {source} is {opened.name}")
    if overrides:
        raise UsageError("--options cannot change a network of ours")
    return opened.name, opened.network
