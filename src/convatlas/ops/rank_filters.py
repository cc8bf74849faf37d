"""Minimum and maximum of the pixels around each pixel; beyond the border the outermost pixels are repeated."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["maximum_filter", "minimum_filter"]


def minimum_filter(x: Tensor, size: int) -> Tensor:
    """The smallest value in the square window of each pixel, one axis after the other.

    Args:
        x: (..., H, W) of any type.
        size: side of the window; an even one reaches one pixel further up and left, as in SciPy.

    Returns:
        (..., H, W).

    Raises:
        ValueError: size is not positive.
    """
    return _filtered(x, size, torch.minimum)


def maximum_filter(x: Tensor, size: int) -> Tensor:
    """The largest value in the square window of each pixel; arguments as in `minimum_filter`."""
    return _filtered(x, size, torch.maximum)


def _filtered(x: Tensor, size: int, choose: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    if size < 1:
        raise ValueError(f"size must be positive, got {size}")
    for dim in (-2, -1):
        length, result = x.shape[dim], x.clone()
        # A repeated outermost pixel lies in every window that reaches beyond it: cutting the window is the same.
        for shift in range(-(size // 2), size - size // 2):
            count = length - abs(shift)
            if shift and count > 0:
                place = result.narrow(dim, max(0, -shift), count)
                place.copy_(choose(place, x.narrow(dim, max(0, shift), count)))
        x = result
    return x
