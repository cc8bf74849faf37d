"""Feature maps as sequences of tokens and back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

__all__ = ["map_to_tokens", "prepend_tokens", "tokens_to_map"]


def map_to_tokens(x: Tensor) -> Tensor:
    """The positions of a map (B, C, *grid) as tokens (B, N, C), row by row; a view where channels lie last in memory.

    Args:
        x: a map of one or more position axes.
    """
    if _is_single(x):
        x.register_hook(partial(_laid_out, x.shape, x.stride()))
    return x.flatten(2).transpose(1, 2)


def tokens_to_map(tokens: Tensor, grid: Sequence[int]) -> Tensor:
    """Tokens (B, N, C) as a map (B, C, *grid): a view, whose channels lie last in memory, or a copy of a lone sample.

    Args:
        tokens: one for each position, row by row.
        grid: sizes of the position axes; their product is N.

    Raises:
        RuntimeError: the grid has another number of positions.
    """
    x = tokens.transpose(1, 2).unflatten(2, tuple(grid))
    return x.contiguous() if _is_single(x) else x


def prepend_tokens(prefix: Tensor, tokens: Tensor) -> Tensor:
    """Put the same learnt tokens (1, n, C) in front of those of each sample (B, N, C); gives (B, n + N, C)."""
    return torch.cat([prefix.expand(tokens.shape[0], -1, -1), tokens], dim=1)


def _is_single(x: Tensor) -> bool:
    """Whether x is one sample that is trained on.

    Batch norm of torch 2.13 on a CPU gives a wrong gradient for one sample if that of its output lies otherwise in
    memory than its input. So maps of one sample keep one layout. (A captured graph must serve every size.)
    """
    return x.requires_grad and not torch.compiler.is_compiling() and len(x) == 1


def _laid_out(size: Sequence[int], stride: Sequence[int], gradient: Tensor | None) -> Tensor | None:
    """A gradient, where there is one, with the strides of what it belongs to."""
    return None if gradient is None else gradient.new_empty_strided(size, stride).copy_(gradient)
