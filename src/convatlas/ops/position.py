"""Position embeddings on another grid than the one they were learnt on."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.ops.tokens import map_to_tokens, tokens_to_map

__all__ = ["resize_position_embedding"]


def resize_position_embedding(
    embedding: Tensor,
    grid: tuple[int, int],
    *,
    num_prefix_tokens: int = 0,
    source_grid: tuple[int, int] | None = None,
    mode: Literal["bicubic", "bilinear"] = "bicubic",
) -> Tensor:
    """Interpolate a learnt position embedding to another grid of patches.

    The samples lie at the centres of their patches (``align_corners=False``), as in DeiT, MAE and their followers.
    Half precision is computed in float32; the result has the dtype of ``embedding``.

    Args:
        embedding: (1, N, C), prefix tokens first, then the grid of patches row by row; or (1, C, H, W).
        grid: rows and columns wanted.
        num_prefix_tokens: tokens that stand for no patch (class, distillation, register); they are kept as they are.
        source_grid: rows and columns of the patches in (1, N, C); a square when left out.
        mode: kind of interpolation.

    Returns:
        (1, num_prefix_tokens + rows * columns, C), or (1, C, rows, columns).

    Raises:
        ValueError: the shape is neither of the two, the patches do not fill the source grid, or an argument is out of
            range.
    """
    if min(grid) < 1:
        raise ValueError(f"grid must be positive, got {grid}")
    if embedding.dim() == 4 and embedding.shape[0] == 1:
        if num_prefix_tokens:
            raise ValueError(f"num_prefix_tokens must be 0 for an embedding (1, C, H, W), got {num_prefix_tokens}")
        return _resize(embedding, grid, mode)
    if embedding.dim() != 3 or embedding.shape[0] != 1:
        raise ValueError(f"embedding must be (1, N, C) or (1, C, H, W), got {tuple(embedding.shape)}")
    patches = embedding.shape[1] - num_prefix_tokens
    if num_prefix_tokens < 0 or patches < 1:
        raise ValueError(f"num_prefix_tokens must be 0 to {embedding.shape[1] - 1}, got {num_prefix_tokens}")
    if source_grid is None:
        source_grid = (math.isqrt(patches), math.isqrt(patches))
        if math.prod(source_grid) != patches:
            raise ValueError(f"embedding must hold a square grid of patches, got {patches} after the prefix tokens")
    elif math.prod(source_grid) != patches:
        raise ValueError(f"embedding must hold {source_grid} patches after the prefix tokens, got {patches}")
    prefix, tokens = embedding[:, :num_prefix_tokens], embedding[:, num_prefix_tokens:]
    maps = _resize(tokens_to_map(tokens, source_grid), grid, mode)
    return torch.cat([prefix, map_to_tokens(maps)], dim=1)


def _resize(maps: Tensor, grid: tuple[int, int], mode: Literal["bicubic", "bilinear"]) -> Tensor:
    # An exported program for any size has symbols here, which must not be compared; the result is the same.
    if all(isinstance(side, int) for side in grid) and tuple(maps.shape[2:]) == tuple(grid):
        return maps
    computed = maps.to(torch.promote_types(maps.dtype, torch.float32))
    return F.interpolate(computed, size=grid, mode=mode, align_corners=False).to(maps.dtype)
