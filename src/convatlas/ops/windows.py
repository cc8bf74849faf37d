"""Maps cut into windows that do not overlap, for attention within each."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["merge_windows", "partition_windows"]


def partition_windows(x: Tensor, window: tuple[int, int]) -> Tensor:
    """Cut maps into windows, row by row; where they do not fit, zeros are added at the bottom and on the right.

    Args:
        x: (B, H, W, C).
        window: rows and columns of a window.

    Returns:
        (B * windows, rows * columns, C), the windows of a sample one after the other.
    """
    (height, width), (rows, columns) = x.shape[1:3], window
    if height % rows or width % columns:
        x = F.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
    blocks = x.unflatten(2, (-1, columns)).unflatten(1, (-1, rows))
    return blocks.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def merge_windows(windows: Tensor, window: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Undo `partition_windows`: put windows back into maps, without what was added.

    Args:
        windows: (B * windows, rows * columns, C).
        window: rows and columns of a window.
        grid: height and width of the maps.

    Returns:
        (B, height, width, C).
    """
    (height, width), (rows, columns) = grid, window
    down, across = -(-height // rows), -(-width // columns)
    blocks = windows.unflatten(0, (-1, down, across)).unflatten(3, window)
    return blocks.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :height, :width]
