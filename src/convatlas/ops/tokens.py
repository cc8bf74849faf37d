"""Feature maps as sequences of tokens and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["map_to_tokens", "prepend_tokens", "tokens_to_map"]


def map_to_tokens(x: Tensor) -> Tensor:
    """The positions of a map (B, C, *grid) as tokens (B, N, C), row by row; a view where channels lie last in memory.

    Args:
        x: a map of one or more position axes.
    """
    return x.flatten(2).transpose(1, 2)


def tokens_to_map(tokens: Tensor, grid: Sequence[int]) -> Tensor:
    """Tokens (B, N, C) as a map (B, C, *grid): a view, whose channels lie last in memory.

    Args:
        tokens: one for each position, row by row.
        grid: sizes of the position axes; their product is N.

    Raises:
        RuntimeError: the grid has another number of positions.
    """
    return tokens.transpose(1, 2).unflatten(2, tuple(grid))


def prepend_tokens(prefix: Tensor, tokens: Tensor) -> Tensor:
    """Put the same learnt tokens (1, n, C) in front of those of each sample (B, N, C); gives (B, n + N, C)."""
    return torch.cat([prefix.expand(tokens.shape[0], -1, -1), tokens], dim=1)
