"""Efficient channel attention beside the module that one writes with `torch.nn.Conv1d`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.bench.ratio import Bar, Call, Case, backward, compare, forward, report
from convatlas.ops.eca import eca
from convatlas.report import Report

__all__ = ["run"]

# The smallest ratio that counts, fixed before anything was measured: the gate itself is a small part of the time, most
# of it goes into reading the map twice and writing it once. "Not slower" leaves room for what choosing costs.
BARS = [
    Bar(
        statement=f"The attention is not slower than with Conv1d, {what}",
        published="no figure of the operator; the paper (arXiv 1910.03151) compares whole networks",
        theirs="Conv1d",
        at_least=0.95,
        what=what,
    )
    for what in ("forward", "forward and backward")
]

#: Batch, channels and side of the maps behind the stages of ResNet-50.
SIZES = tuple((batch, channels, side) for batch in (1, 8) for channels, side in ((256, 56), (512, 28), (2048, 7)))
TAPS = 5


def _with_conv1d(x: Tensor, weight: Tensor) -> Tensor:
    """Pooling, a convolution along the channels, a sigmoid, and a product."""
    y = F.adaptive_avg_pool2d(x, 1).squeeze(-1).transpose(1, 2)
    y = F.conv1d(y, weight, padding=weight.shape[2] // 2)
    return x * torch.sigmoid(y).transpose(1, 2).unsqueeze(-1).expand_as(x)


def run(*, threads: Sequence[int] | None = None, quick: bool = False) -> Report:
    """Ratios of time and memory behind the stages of ResNet-50.

    Args:
        threads: numbers of threads to measure with; by default 1 and 2.
        quick: two sizes only.
    """
    cases = [
        Case(f"{batch} x {channels:,} x {side} x {side}", what, partial(_sides, what, batch, channels, side))
        for what in ("forward", "forward and backward")
        for batch, channels, side in (SIZES[1::3] if quick else SIZES)
    ]
    return report("eca", compare(cases, threads=threads, quick=quick), BARS, quick=quick)


def _sides(what: str, batch: int, channels: int, side: int, device: torch.device) -> dict[str, Call]:
    x, weight = torch.randn(batch, channels, side, side, device=device), torch.randn(1, 1, TAPS, device=device)
    measured = forward if what == "forward" else backward
    return {"eca": measured(eca, x, weight), "Conv1d": measured(_with_conv1d, x, weight)}
