"""Multi-scale deformable sampling beside the authors' plain form, which reads level by level with grid_sample."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from convatlas.bench.ratio import Bar, Call, Case, backward, compare, forward, report
from convatlas.ops.deform_attention import deform_attention, pixel_centres
from convatlas.report import Report

__all__ = ["run"]

# No paper gives a ratio over another implementation, so nothing has to be reached.
BARS: list[Bar] = []

#: Sides of three levels, heads and channels of a head: an open-vocabulary decoder, and backbones with a pyramid.
SIZES = (((32, 16, 8), 8, 32), ((64, 32, 16), 8, 32), ((64, 32, 16), 6, 64), ((40, 20, 10), 12, 32))


def run(*, threads: Sequence[int] | None = None, quick: bool = False) -> Report:
    """Ratios of time and memory when every pixel of a pyramid reads four points of each level for each head.

    Args:
        threads: numbers of threads to measure with; by default 1 and 2.
        quick: one size only.
    """
    cases = [
        Case(
            f"{' + '.join(f'{side} x {side}' for side in sides)}, {heads} heads of {size}",
            what,
            partial(_sides, what, sides, heads, size),
            # Gradients by locations jump where rounding moves a point across a pixel.
            tolerance=1e-3,
        )
        for what in ("forward", "forward and backward")
        for sides, heads, size in (SIZES[:1] if quick else SIZES)
    ]
    return report("deform_attention", compare(cases, threads=threads, quick=quick), BARS, quick=quick)


def _sides(what: str, sides: Sequence[int], heads: int, size: int, device: torch.device) -> dict[str, Call]:
    shapes = [(side, side) for side in sides]
    places = pixel_centres(shapes, device=device)
    pixels = len(places)
    value = torch.randn(1, pixels, heads, size, device=device)
    locations = places[:, None, None, None] + 0.05 * torch.randn(1, pixels, heads, len(shapes), 4, 2, device=device)
    weights = torch.rand(1, pixels, heads, len(shapes), 4, device=device)
    measured = forward if what == "forward" else backward
    return {
        "deform_attention": measured(deform_attention, value, shapes, locations, weights),
        "grid_sample": measured(partial(deform_attention, backend="naive"), value, shapes, locations, weights),
    }
