"""Position embeddings on another grid than the one they were learnt on."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["resize_position_embedding"]


def resize_position_embedding(embedding: Tensor, grid: tuple[int, int], *, num_prefix_tokens: int = 0) -> Tensor:
    """Bicubic interpolation of a learnt position embedding to another grid of patches.

    The samples lie at the centres of their patches (``align_corners=False``), as in DeiT, MAE and their followers.
    Half precision is computed in float32; the result has the dtype of ``embedding``.

    Args:
        embedding: (1, N, C), prefix tokens first, then a square grid of patches row by row; or (1, C, H, W), whose grid
            may be of any shape.
        grid: rows and columns wanted.
        num_prefix_tokens: tokens that stand for no patch (class, distillation, register); they are kept as they are.

    Returns:
        (1, num_prefix_tokens + rows * columns, C), or (1, C, rows, columns).

    Raises:
        ValueError: the shape is neither of the two, the patches are no square grid, or an argument is out of range.
    """
    if min(grid) < 1:
        raise ValueError(f"grid must be positive, got {grid}")
    if embedding.dim() == 4 and embedding.shape[0] == 1:
        if num_prefix_tokens:
            raise ValueError(f"num_prefix_tokens must be 0 for an embedding (1, C, H, W), got {num_prefix_tokens}")
        return _resize(embedding, grid)
    if embedding.dim() != 3 or embedding.shape[0] != 1:
        raise ValueError(f"embedding must be (1, N, C) or (1, C, H, W), got {tuple(embedding.shape)}")
    patches = embedding.shape[1] - num_prefix_tokens
    if num_prefix_tokens < 0 or patches < 1:
        raise ValueError(f"num_prefix_tokens must be 0 to {embedding.shape[1] - 1}, got {num_prefix_tokens}")
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(f"embedding must hold a square grid of patches, got {patches} after the prefix tokens")
    prefix, tokens = embedding[:, :num_prefix_tokens], embedding[:, num_prefix_tokens:]
    maps = _resize(tokens.transpose(1, 2).reshape(1, -1, side, side), grid)
    return torch.cat([prefix, maps.flatten(2).transpose(1, 2)], dim=1)


def _resize(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    if tuple(maps.shape[2:]) == tuple(grid):
        return maps
    computed = maps.to(torch.promote_types(maps.dtype, torch.float32))
    return F.interpolate(computed, size=grid, mode="bicubic", align_corners=False).to(maps.dtype)
