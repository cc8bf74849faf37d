"""Multi-head self-attention of vision transformers."""

from __future__ import annotations

from torch import Tensor, nn

from convatlas.ops.attention import multi_head_attention

__all__ = ["SelfAttention", "check_heads"]


class SelfAttention(nn.Module):
    """Attention of tokens among themselves, with one Linear for queries, keys and values and one behind.

    The rows of ``qkv`` are those of the queries, the keys and the values in turn, head by head.

    Args:
        channels: channels C of the tokens.
        num_heads: divides C.
        qkv_bias: whether queries, keys and values have a bias.
        scale: factor of the scores; (C / num_heads)^-0.5 when left out.
        attn_drop: probability to drop one of the softmax's outputs.
        drop: probability of the dropout behind.

    Raises:
        ValueError: num_heads does not divide channels.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        scale: float | None = None,
        attn_drop: float = 0.0,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        check_heads(channels, num_heads)
        self.num_heads = num_heads
        self.scale = scale
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(channels, 3 * channels, bias=qkv_bias)
        self.proj = nn.Linear(channels, channels)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, C) to the same shape."""
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        dropout = self.attn_drop if self.training else 0.0
        y = multi_head_attention(query, key, value, self.num_heads, scale=self.scale, dropout=dropout)
        return self.drop(self.proj(y))


def check_heads(channels: int, num_heads: int) -> None:
    """Refuse channels that cannot be shared out among the heads.

    Raises:
        ValueError: num_heads does not divide channels.
    """
    if num_heads < 1 or channels < 1 or channels % num_heads:
        raise ValueError(f"channels must be divisible by num_heads, got {channels} and {num_heads}")
