"""Depthwise convolution in the layout that suits its size, beside torch's own call."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.bench.ratio import Bar, Call, Case, backward, compare, forward, report
from convatlas.ops.depthwise import depthwise_conv
from convatlas.report import Report

__all__ = ["run"]

ELEVEN, LARGER, SMALL = "kernel of 11", "kernels from 13 to 31", "kernels up to 9"
_PUBLISHED = "implicit GEMM: 20 times over torch at 31 x 31 on a GPU (pytorch issue 74363)"

# The smallest ratios that count, fixed before anything was measured.
BARS = [
    Bar(
        statement="A kernel of 11 is at least 8 times as fast as by torch's call, changes of layout included",
        published=_PUBLISHED,
        theirs="torch",
        at_least=8.0,
        what="forward",
        group=ELEVEN,
    ),
    Bar(
        statement="Kernels of 13 to 31 are at least 10 times as fast as by torch's call, changes of layout included",
        published=_PUBLISHED,
        theirs="torch",
        at_least=10.0,
        what="forward",
        group=LARGER,
    ),
    Bar(
        statement="Small kernels are not slower than torch's call",
        published="no figure",
        theirs="torch",
        at_least=0.95,
        what="forward",
        group=SMALL,
    ),
]

#: Channels and side of the maps of three stages.
STAGES = ((96, 56), (192, 28), (384, 14))
KERNELS = {SMALL: (3, 5, 7, 9), ELEVEN: (11,), LARGER: (13, 17, 31)}


def run(*, threads: Sequence[int] | None = None, quick: bool = False) -> Report:
    """Ratios of time and memory for square kernels of 3 to 31 in three stages of a network, batch of 2.

    Args:
        threads: numbers of threads to measure with; by default 1 and 2.
        quick: one stage only.
    """
    cases = [
        Case(
            f"2 x {channels} x {side} x {side}, kernel {kernel}",
            what,
            partial(_sides, what, channels, side, kernel),
            group=group,
        )
        for what in ("forward", "forward and backward")
        for channels, side in (STAGES[1:2] if quick else STAGES)
        for group, kernels in KERNELS.items()
        for kernel in kernels
    ]
    return report("depthwise", compare(cases, threads=threads, quick=quick), BARS, quick=quick)


def _sides(what: str, channels: int, side: int, kernel: int, device: torch.device) -> dict[str, Call]:
    x = torch.randn(2, channels, side, side, device=device)
    weight, bias = torch.randn(channels, 1, kernel, kernel, device=device), torch.randn(channels, device=device)
    half, measured = kernel // 2, forward if what == "forward" else backward

    def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, 1, half, 1, channels)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return depthwise_conv(x, weight, bias, 1, half)

    return {"depthwise_conv": measured(ours, x, weight, bias), "torch": measured(theirs, x, weight, bias)}
