"""The Inception depthwise convolution beside a split, three convolutions and a concatenation, in the four stages."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.bench.ratio import Bar, Call, Case, backward, compare, forward, report
from convatlas.ops.inception import inception_dwconv2d
from convatlas.report import Report

__all__ = ["run"]

LARGE = "first stage"
_NO_FIGURE = "no figure; the paper (arXiv 2303.16900) compares whole networks, on a GPU"

# The smallest ratios that count, fixed before anything was measured. Where the operator takes the way of the other
# side, the two are as fast as each other; "not slower" leaves room for what choosing costs.
BARS = [
    *(
        Bar(
            statement=f"On the large maps of the first stage it is at least 1.2 times as fast, {what}",
            published=_NO_FIGURE,
            theirs="three convolutions",
            at_least=1.2,
            what=what,
            group=LARGE,
        )
        for what in ("forward", "forward and backward")
    ),
    *(
        Bar(
            statement=f"On the smaller maps of the other stages it is not slower, {what}",
            published=_NO_FIGURE,
            theirs="three convolutions",
            at_least=0.95,
            what=what,
        )
        for what in ("forward", "forward and backward")
    ),
]

#: Channels and side of the maps in the stages of InceptionNeXt-T, whose branches take an eighth of the channels each.
STAGES = ((96, 56), (192, 28), (384, 14), (768, 7))
BATCH = 4


def _three_convolutions(
    x: Tensor, w_hw: Tensor, b_hw: Tensor, w_w: Tensor, b_w: Tensor, w_h: Tensor, b_h: Tensor
) -> Tensor:
    """As the paper's algorithm 1 writes it."""
    g = len(b_hw)
    x_id, x_hw, x_w, x_h = torch.split(x, [x.shape[1] - 3 * g, g, g, g], dim=1)
    half = w_w.shape[3] // 2
    y_hw = F.conv2d(x_hw, w_hw, b_hw, padding=w_hw.shape[2] // 2, groups=g)
    y_w = F.conv2d(x_w, w_w, b_w, padding=(0, half), groups=g)
    y_h = F.conv2d(x_h, w_h, b_h, padding=(half, 0), groups=g)
    return torch.cat((x_id, y_hw, y_w, y_h), dim=1)


def run(*, threads: Sequence[int] | None = None, quick: bool = False) -> Report:
    """Ratios of time and memory in the stages of InceptionNeXt-T.

    Args:
        threads: numbers of threads to measure with; by default 1 and 2.
        quick: the first and the third stage only.
    """
    cases = [
        Case(
            f"{BATCH} x {channels} x {side} x {side}",
            what,
            partial(_sides, what, channels, side),
            group=LARGE if channels == STAGES[0][0] else "",
        )
        for what in ("forward", "forward and backward")
        for channels, side in (STAGES[::2] if quick else STAGES)
    ]
    return report("inception", compare(cases, threads=threads, quick=quick), BARS, quick=quick)


def _sides(what: str, channels: int, side: int, device: torch.device) -> dict[str, Call]:
    g = channels // 8
    shapes = [(BATCH, channels, side, side), (g, 1, 3, 3), (g,), (g, 1, 1, 11), (g,), (g, 1, 11, 1), (g,)]
    tensors = [torch.randn(shape, device=device) for shape in shapes]
    measured = forward if what == "forward" else backward
    return {
        "inception_dwconv2d": measured(inception_dwconv2d, *tensors),
        "three convolutions": measured(_three_convolutions, *tensors),
    }
