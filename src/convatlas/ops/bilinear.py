"""Bilinear interpolation as a weighted sum of rows: the four pixels around a position, and one fused gather of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["bilinear_corners", "index_type", "weighted_rows"]


def bilinear_corners(y: Tensor, x: Tensor, height: int | Tensor, width: int | Tensor) -> tuple[Tensor, Tensor]:
    """The pixels around positions in a map, and how much each counts.

    A pixel outside the map counts nothing. On the centre of a pixel the derivative is the one to the right and down.

    Args:
        y, x: positions in pixels, the centre of the first at 0; of one shape (...).
        height, width: of the map, or tensors of them that broadcast with the positions.

    Returns:
        Indices of the pixels in row-major order (..., 4) int32, 0 for those outside, and weights (..., 4).
    """
    top, left = y.detach().floor(), x.detach().floor()
    down, right = y - top, x - left
    indices, weights = [], []
    for row, of_row in ((top, 1 - down), (top + 1, down)):
        for column, of_column in ((left, 1 - right), (left + 1, right)):
            # Compared as they are: a position far outside may be no integer of the machine.
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            indices.append((row.int() * width + column.int()) * inside)
            weights.append(of_row * of_column * inside)
    return torch.stack(indices, -1), torch.stack(weights, -1)


def index_type(rows: int) -> torch.dtype:
    """The smallest type of indices into a table of so many rows."""
    return torch.int32 if rows < 2**31 else torch.int64


def weighted_rows(table: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of rows of ``table`` (N, C): (n, C) for indices and weights (n, k), without the n * k rows."""
    return F.embedding_bag(indices, table, mode="sum", per_sample_weights=weights.to(table.dtype))
