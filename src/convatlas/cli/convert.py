"""``convatlas convert``: a published checkpoint as safetensors."""

from __future__ import annotations

from collections.abc import Sequence

from convatlas.cli.parser import Parser

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    """Read a checkpoint of any layout and write it in ours, or under its own names."""
    parser = Parser(
        "convatlas convert",
        description="Read a checkpoint without running its code and write it as safetensors (or .npz, .pth).",
    )
    parser.add_argument("source", help="path, hf://owner/name or https://...")
    parser.add_argument("destination", help="file to write; its suffix decides the format")
    parser.add_argument("--model", help="name of a model: check the checkpoint against it and write its layout")
    parser.add_argument("--num-classes", type=int, help="size of the classifier, where it is not the published one")
    parser.add_argument("--part", help="which part of the checkpoint, where it holds several, e.g. model_ema")
    arguments = parser.parse_args(argv)
    from convatlas.weights import convert

    model = None
    if arguments.model is not None:
        from convatlas.networks.registry import create_model

        changes = {} if arguments.num_classes is None else {"num_classes": arguments.num_classes}
        model = create_model(arguments.model, **changes)
    done = convert(arguments.source, arguments.destination, model=model, part=arguments.part)
    print(f"{done} tensors under their own names" if isinstance(done, int) else done.summary())
    print(f"written: {arguments.destination}")
    return 0
