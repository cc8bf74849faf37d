"""Bilinear interpolation as a weighted sum of rows: the four pixels around a position, and one fused gather of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["bilinear_corners", "weighted_rows"]


def bilinear_corners(y: Tensor, x: Tensor, height: int | Tensor, width: int | Tensor) -> tuple[Tensor, Tensor]:
    """The pixels around positions in a map, and how much each counts.

    A pixel outside the map counts nothing. On the centre of a pixel the derivative is the one to the right and down.

    Args:
        y, x: positions in pixels, the centre of the first at 0; of one shape (...).
        height, width: of the map, or tensors of them that broadcast with the positions.

    Returns:
        Indices of the pixels in row-major order (..., 4), 0 for those outside, and weights (..., 4).
    """
    top, left = y.detach().floor(), x.detach().floor()
    down, right = y - top, x - left
    rows, columns = top.long(), left.long()
    indices, weights = [], []
    for row, of_row in ((rows, 1 - down), (rows + 1, down)):
        for column, of_column in ((columns, 1 - right), (columns + 1, right)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            indices.append((row * width + column) * inside)
            weights.append(of_row * of_column * inside)
    return torch.stack(indices, -1), torch.stack(weights, -1)


def weighted_rows(table: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of rows of ``table`` (N, C): (n, C) for indices and weights (n, k), without the n * k rows."""
    small = indices.int() if table.shape[0] < 2**31 else indices
    return F.embedding_bag(small, table, mode="sum", per_sample_weights=weights.to(table.dtype))
