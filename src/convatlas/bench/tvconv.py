"""Translation variant convolution beside the form of the authors, and beside plain depthwise convolution."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.bench.ratio import Bar, Call, Case, backward, compare, forward, report
from convatlas.ops.per_pixel_conv import translation_variant_conv2d
from convatlas.report import Report

__all__ = ["run"]

# Fixed before anything was measured. The map with which the head-room was found: four to five times.
BARS = [
    Bar(
        statement="Shifts are faster than patches",
        published="no figure of the operator; the paper (arXiv 2203.10489) compares whole networks",
        theirs="unfold",
        at_least=3.5,
        what="forward",
        group="3 x 3",
    )
]

#: Batch, channels and side of maps in the networks of the paper, and the one of the bar.
SIZES = ((4, 96, 28), (1, 96, 24), (32, 96, 24), (1, 192, 12), (32, 192, 12), (1, 576, 6), (128, 576, 6))


def run(*, threads: Sequence[int] | None = None, quick: bool = False) -> Report:
    """Ratios of time and memory of stored 3 x 3 kernels.

    Args:
        threads: numbers of threads to measure with; by default 1 and 2.
        quick: one size only.
    """
    cases = [
        Case(
            f"{batch} x {channels} x {side} x {side}",
            what,
            partial(_sides, what, batch, channels, side),
            pairs=(("shifts", "unfold"), ("shifts", "depthwise")),
            group="3 x 3" if (batch, channels, side) == SIZES[0] else "networks",
            tolerance=1e-4,
        )
        for what in ("forward", "forward and backward")
        for batch, channels, side in (SIZES[:1] if quick else SIZES)
    ]
    return report("tvconv", compare(cases, threads=threads, quick=quick), BARS, quick=quick)


def _sides(what: str, batch: int, channels: int, side: int, device: torch.device) -> dict[str, Call]:
    x, kernel = torch.randn(batch, channels, side, side, device=device), torch.randn(channels, 1, 3, 3, device=device)
    # The same kernel everywhere, so that all sides give the same.
    maps = kernel[:, 0, :, :, None, None].expand(-1, -1, -1, side, side).contiguous()
    if what == "forward":
        return {
            "shifts": forward(translation_variant_conv2d, x, maps, 1, 1),
            "unfold": forward(_unfold, x, maps),
            "depthwise": forward(partial(_depthwise, channels=channels), x, kernel),
        }
    ours: Call = backward(partial(translation_variant_conv2d, stride=1, padding=1), x, maps)
    return {"shifts": ours, "unfold": backward(_unfold, x, maps)}


def _unfold(x: Tensor, maps: Tensor) -> Tensor:
    """All patches at once, times the kernels, as the authors do."""
    channels, *_, height, width = maps.shape
    patches = F.unfold(x, 3, padding=1).reshape(x.shape[0], channels, 9, height, width)
    return (maps.flatten(1, 2) * patches).sum(2)


def _depthwise(x: Tensor, kernel: Tensor, *, channels: int) -> Tensor:
    return F.conv2d(x, kernel, padding=1, groups=channels)
