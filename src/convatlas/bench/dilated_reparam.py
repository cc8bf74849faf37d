"""The Dilated Reparam Block merged into one kernel, beside its branches as they are trained."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from convatlas.bench.ratio import Bar, Call, Case, compare, forward, report
from convatlas.nn.mixers.dilated_reparam import DilatedReparamBlock
from convatlas.report import Report

__all__ = ["run"]

BARS = [
    Bar(
        statement="The merged kernel of 13 is at least twice as fast as the kernel, its five branches and their norms",
        published="merged for efficient inference, no figure (section 3.1)",
        theirs="branches",
        at_least=2.0,
        what="forward",
        group="kernel of 13",
    ),
]

#: Channels and side of the maps of the three stages of UniRepLKNet-T with large kernels.
STAGES = ((160, 28), (320, 14), (640, 7))
KERNELS = (7, 13, 17)


def run(*, threads: Sequence[int] | None = None, quick: bool = False) -> Report:
    """Ratios of time and memory for kernels of 7, 13 and 17 in the stages of a network, batch of 2, channels last.

    Args:
        threads: numbers of threads to measure with; by default 1 and 2.
        quick: one stage only.
    """
    cases = [
        Case(
            f"2 x {channels} x {side} x {side}, kernel {kernel}",
            "forward",
            partial(_sides, channels, side, kernel),
            group=f"kernel of {kernel}",
            tolerance=1e-3,
        )
        for channels, side in (STAGES[:1] if quick else STAGES)
        for kernel in KERNELS
    ]
    return report("dilated_reparam", compare(cases, threads=threads, quick=quick), BARS, quick=quick)


def _sides(channels: int, side: int, kernel: int, device: torch.device) -> dict[str, Call]:
    block = DilatedReparamBlock(channels, kernel).eval().to(device)
    merged: Any = block.merged()
    # As within the network, whose norms put the channels last.
    x = torch.randn(2, channels, side, side, device=device).contiguous(memory_format=torch.channels_last)
    return {"merged": forward(merged, x), "branches": forward(block, x)}
