"""Deformable convolution beside its plain forms in torch: patches of four gathers, and patches by grid_sample."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.bench.ratio import Bar, Call, Case, backward, compare, forward, report
from convatlas.ops.deform_conv import deform_conv2d
from convatlas.report import Report

__all__ = ["run"]

# No paper gives a ratio over another implementation, so nothing has to be reached.
BARS: list[Bar] = []

#: Batch, channels and side of maps: levels of a feature pyramid, and stages of a streaming detector.
SIZES = ((1, 256, 25), (1, 256, 50), (2, 64, 40), (4, 96, 38), (4, 16, 32))


def run(*, threads: Sequence[int] | None = None, quick: bool = False) -> Report:
    """Ratios of time and memory of 3 x 3 kernels whose taps move by about one and a half pixels.

    Args:
        threads: numbers of threads to measure with; by default 1 and 2.
        quick: one size only.
    """
    cases = [
        Case(
            f"{batch} x {channels} x {side} x {side}, {'modulated' if modulated else 'plain'}",
            what,
            partial(_sides, what, batch, channels, side, modulated),
            # Gradients by offsets jump where rounding moves a tap across a pixel.
            tolerance=1e-3,
        )
        for what in ("forward", "forward and backward")
        for batch, channels, side in (SIZES[2:3] if quick else SIZES)
        for modulated in (False, True)
    ]
    return report("deform_conv", compare(cases, threads=threads, quick=quick), BARS, quick=quick)


def _sides(what: str, batch: int, channels: int, side: int, modulated: bool, device: torch.device) -> dict[str, Call]:
    x = torch.randn(batch, channels, side, side, device=device)
    offset = 1.5 * torch.randn(batch, 18, side, side, device=device)
    weight = torch.randn(channels, channels, 3, 3, device=device)
    inputs = (x, offset, weight, *((torch.rand(batch, 9, side, side, device=device),) if modulated else ()))
    measured = forward if what == "forward" else backward
    return {
        "deform_conv2d": measured(partial(_ours, backend="auto"), *inputs),
        "gathers": measured(partial(_ours, backend="naive"), *inputs),
        "grid_sample": measured(_grid_sample, *inputs),
    }


def _ours(x: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None = None, *, backend: str) -> Tensor:
    return deform_conv2d(x, offset, weight, None, 1, 1, 1, mask, backend=backend)


def _grid_sample(x: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None = None) -> Tensor:
    """All taps of all positions in one call of grid_sample, and a matrix product."""
    batch, channels, height, width = x.shape
    tap = torch.arange(9, device=x.device)[:, None, None]
    moved = offset.view(batch, 9, 2, height, width)
    y = moved[:, :, 0] + torch.arange(height, device=x.device)[:, None] + tap // 3 - 1
    right = moved[:, :, 1] + torch.arange(width, device=x.device) + tap % 3 - 1
    grid = torch.stack([(2 * right + 1) / width - 1, (2 * y + 1) / height - 1], -1).flatten(1, 2)
    patches = F.grid_sample(x, grid, align_corners=False)
    if mask is not None:
        patches = patches * mask.view(batch, 1, 9 * height, width)
    y = weight.flatten(1) @ patches.view(batch, channels * 9, height * width)
    return y.view(batch, -1, height, width)
