"""Pixel shuffle by one permuted copy beside `torch.nn.functional.pixel_shuffle`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F

from convatlas.bench.ratio import Bar, Call, Case, backward, compare, forward, report
from convatlas.ops.shuffle import pixel_shuffle
from convatlas.report import Report

__all__ = ["run"]

# The smallest ratio that counts, fixed before anything was measured.
BARS = [
    Bar(
        statement="Pixel shuffle is at least 1.7 times as fast as torch's",
        published="no figure; ESPCN (arXiv 1609.05158) calls the operation free of cost",
        theirs="torch",
        at_least=1.7,
        what="forward",
    )
]

#: Side of the blocks, for colour images of 180 x 320 positions.
FACTORS = (2, 3, 4)


def run(*, threads: Sequence[int] | None = None, quick: bool = False) -> Report:
    """Ratios of time and memory, for the factors of super-resolution.

    Args:
        threads: numbers of threads to measure with; by default 1 and 2.
        quick: one factor only.
    """
    cases = [
        Case(f"1 x {3 * factor**2} x 180 x 320, factor {factor}", what, partial(_sides, what, factor), tolerance=0.0)
        for what in ("forward", "forward and backward")
        for factor in (FACTORS[1:2] if quick else FACTORS)
    ]
    return report("pixel_shuffle", compare(cases, threads=threads, quick=quick), BARS, quick=quick)


def _sides(what: str, factor: int, device: torch.device) -> dict[str, Call]:
    x = torch.randn(1, 3 * factor**2, 180, 320, device=device)
    measured = forward if what == "forward" else backward
    return {"pixel_shuffle": measured(pixel_shuffle, x, factor), "torch": measured(F.pixel_shuffle, x, factor)}
