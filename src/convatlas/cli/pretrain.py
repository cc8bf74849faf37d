"""``convatlas pretrain``: train a network without labels; ``convatlas train recognition`` goes on from its run."""

from __future__ import annotations

import json
from collections.abc import Sequence

from convatlas.catalog import TASKS, resolve
from convatlas.cli.parser import UsageError
from convatlas.cli.train import train

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    """Pre-train as ``convatlas train pretraining`` does; ``--method NAME`` is short for ``--methods {NAME: {}}``."""
    words = list(argv)
    for index, word in enumerate(words):
        if word == "--method" and index + 1 == len(words):
            raise UsageError("--method must be followed by the name of a method, such as spark")
        name = word.partition("=")[2] if word.startswith("--method=") else None
        taken = 1
        if word == "--method":
            name, taken = words[index + 1], 2
        if name:
            words[index : index + taken] = ["--methods", json.dumps({name: {}})]
            break
    return train(resolve(TASKS["pretraining"]), words, "convatlas pretrain")
