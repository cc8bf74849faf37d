"""Multi-head attention on queries, keys and values that are given.

Vaswani et al.: "Attention Is All You Need", NeurIPS 2017, arXiv 1706.03762, section 3.2.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["attention_weights", "multi_head_attention"]


def multi_head_attention(
    query: Tensor, key: Tensor, value: Tensor, num_heads: int, *, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """softmax(scale * q k^T) v in each head, heads side by side on the last axis.

    The scores are not kept in memory where `torch.nn.functional.scaled_dot_product_attention` has a fused form. That
    has only first derivatives; within ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`` there are all of them.

    Args:
        query: (B, N, C); head by head on the last axis.
        key: (B, M, C).
        value: (B, M, D).
        num_heads: divides C and D.
        scale: factor of the scores; (C / num_heads)^-0.5 when left out.
        dropout: probability to drop one of the softmax's outputs, which are then rescaled. The caller gives 0 in
            evaluation.

    Returns:
        (B, N, D).
    """
    heads = F.scaled_dot_product_attention(
        _heads(query, num_heads), _heads(key, num_heads), _heads(value, num_heads), dropout_p=dropout, scale=scale
    )
    return heads.transpose(1, 2).flatten(2)


def attention_weights(query: Tensor, key: Tensor, num_heads: int, *, scale: float | None = None) -> Tensor:
    """softmax(scale * q k^T) of each head, which `multi_head_attention` multiplies the values by.

    Args:
        query: (B, N, C); head by head on the last axis.
        key: (B, M, C).
        num_heads: divides C.
        scale: factor of the scores; (C / num_heads)^-0.5 when left out.

    Returns:
        (B, num_heads, N, M); each row sums to 1.
    """
    if scale is None:
        scale = (query.shape[-1] // num_heads) ** -0.5
    return (scale * _heads(query, num_heads) @ _heads(key, num_heads).transpose(-2, -1)).softmax(-1)


def _heads(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)
