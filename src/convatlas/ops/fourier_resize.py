"""Resizing of periodic fields by their Fourier series: exact for fields without frequencies above either grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from convatlas.ops.precision import without_autocast

__all__ = ["fourier_resize"]


def fourier_resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resize the last axes of a field by cutting off its spectrum, or continuing it with zeros.

    The frequencies that both grids hold are copied as they are, the highest one of an even grid included, and the
    values keep their scale. Half precision is computed in float32, also under autocast.

    Berner et al.: "Principled Approaches for Extending Neural Architectures to Function Spaces for Operator Learning",
    2025, arXiv 2506.10973.

    Args:
        x: (..., *grid), real.
        size: wanted lengths of the last axes.

    Returns:
        (..., *size) in the type of x.

    Raises:
        ValueError: x is not real floating point, has fewer axes than size, or a length is smaller than 1.
    """
    size = tuple(size)
    if not x.is_floating_point():
        raise ValueError(f"x must be real and floating point, got {x.dtype}")
    if not size or min(size) < 1 or x.dim() < len(size):
        raise ValueError(f"size must hold positive lengths of axes of x, got {size} for {tuple(x.shape)}")
    grid = tuple(x.shape[-len(size) :])
    if grid == size:
        return x
    axes = tuple(range(-len(size), 0))
    with without_autocast(x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        spectrum = torch.fft.rfftn(wide, dim=axes, norm="forward")
        for axis, old, new in zip(axes[:-1], grid, size, strict=False):
            positive, negative = min(old + 1, new + 1) // 2, min(old, new) // 2
            gap = list(spectrum.shape)
            gap[axis] = new - positive - negative
            parts = (spectrum.narrow(axis, 0, positive), spectrum.narrow(axis, old - negative, negative))
            spectrum = torch.cat([parts[0], spectrum.new_zeros(gap), parts[1]], axis)
        spectrum = spectrum[..., : min(grid[-1], size[-1]) // 2 + 1]
        return torch.fft.irfftn(spectrum, s=size, dim=axes, norm="forward").to(x.dtype)
