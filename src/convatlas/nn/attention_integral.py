"""Attention without softmax as an integral over the domain, in linear time.

Cao: "Choose a Transformer: Fourier or Galerkin", NeurIPS 2021, arXiv 2105.14995; Li, Meidani, Farimani: "Transformer
for Partial Differential Equations' Operator Learning", TMLR 2023, arXiv 2205.13671 (OFormer); as in Berner et al.,
2025, arXiv 2506.10973, section 3.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.errors import unknown
from convatlas.weights import Layout

__all__ = ["AttentionKernelIntegral", "rotate_by_position"]


def rotate_by_position(x: Tensor, position: Tensor, *, min_freq: float = 1 / 64, scale: float = 1.0) -> Tensor:
    """Rotary embedding by coordinates: each axis of position turns its share of the channels.

    Su et al.: "RoFormer", 2021, arXiv 2104.09864; as in OFormer, with coordinates in place of indices.

    Args:
        x: (B, heads, N, C).
        position: (B, N, d); 2 d divides C.
        min_freq: shortest length that the embedding tells apart.
        scale: of the coordinates.
    """
    dims = position.shape[-1]
    share = x.shape[-1] // dims
    parts = []
    for axis, part in enumerate(x.split(share, -1)):
        steps = torch.arange(0, share, 2, device=x.device, dtype=x.dtype)
        angle = position[..., axis, None].to(x.dtype) * (scale / min_freq) * 10000 ** (-steps / share)
        cosine, sine = (torch.cat([wave, wave], -1).unsqueeze(1) for wave in (angle.cos(), angle.sin()))
        first, second = part.chunk(2, -1)
        parts.append(part * cosine + torch.cat([-second, first], -1) * sine)
    return torch.cat(parts, -1)


class AttentionKernelIntegral(nn.Module):
    """u(x_i) = sum_j w_j (q_i . k_j) v_j in each head: q (k^T (w v)), whose cost grows with the number of points.

    Keys and values are normalised at each point over the channels of their head, as the authors' code does it.

    Args:
        in_channels, out_channels: of the function.
        num_heads: heads.
        head_channels: channels of a head.
        project: whether a Linear follows where the heads have ``out_channels`` together; else one always does.
        position: ``rotary`` turns queries and keys by the coordinates; None does nothing.
        position_dims: axes of position, for ``rotary``.
        min_freq: of the rotary embedding.

    Raises:
        ValueError: a number is out of range, or the channels of a head cannot be rotated.
        UnknownName: there is no such embedding.
    """

    #: The authors' names.
    layouts = {"authors": Layout(renames=((r"(^|.*\.)inv_freq$", ""),))}  # noqa: RUF012

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_heads: int,
        head_channels: int,
        *,
        position: Literal["rotary"] | None = None,
        position_dims: int = 2,
        min_freq: float = 1 / 64,
    ) -> None:
        super().__init__()
        if min(in_channels, out_channels, num_heads, head_channels, position_dims) < 1:
            given = (in_channels, out_channels, num_heads, head_channels, position_dims)
            raise ValueError(f"channels, heads and position_dims must be at least 1, got {given}")
        if position not in (None, "rotary"):
            raise unknown("position", str(position), ("rotary",))
        if position and head_channels % (2 * position_dims):
            raise ValueError(f"head_channels must be a multiple of {2 * position_dims}, got {head_channels}")
        self.in_channels, self.num_heads, self.head_channels = in_channels, num_heads, head_channels
        self.position, self.min_freq = position, min_freq
        inner = num_heads * head_channels
        self.to_q, self.to_k, self.to_v = (nn.Linear(in_channels, inner, bias=False) for _ in range(3))
        self.to_out: nn.Module = nn.Linear(inner, out_channels) if inner != out_channels else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw queries, keys and values anew: Xavier with gain d^-1/2 for each head, near the identity if d is C."""
        gain = 1 / math.sqrt(self.head_channels)
        for layer in (self.to_q, self.to_k, self.to_v):
            for head in layer.weight.data.split(self.head_channels):
                nn.init.xavier_uniform_(head, gain=gain)
                if self.head_channels == self.in_channels:
                    head.diagonal().add_(gain)

    def forward(
        self,
        u: Tensor,
        position: Tensor | None = None,
        weights: Tensor | None = None,
        *,
        associative: bool = True,
    ) -> Tensor:
        """Map a function (B, N, in_channels) on points to (B, N, out_channels).

        Args:
            u: values.
            position: coordinates (B, N, d), for ``rotary``.
            weights: quadrature weights (N) or (B, N); 1 / N when left out.
            associative: multiply keys and values first; else the whole matrix of the kernel is formed, in quadratic
                time. The result is the same.

        Raises:
            ValueError: the shapes do not fit, or the coordinates are missing.
        """
        if u.dim() != 3 or u.shape[2] != self.in_channels:
            raise ValueError(f"u must be (B, N, {self.in_channels}), got {tuple(u.shape)}")
        query, key, value = (
            layer(u).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v)
        )
        key, value = (F.layer_norm(each, (self.head_channels,), eps=1e-5) for each in (key, value))
        if self.position:
            if position is None or position.shape[:2] != u.shape[:2]:
                given = None if position is None else tuple(position.shape)
                raise ValueError(f"position must be ({u.shape[0]}, {u.shape[1]}, d), got {given}")
            query, key = (rotate_by_position(each, position, min_freq=self.min_freq) for each in (query, key))
        quadrature: Tensor | float = 1 / u.shape[1]
        if weights is not None:
            quadrature = weights.to(value.dtype).reshape(-1, 1, u.shape[1], 1)
        value = value * quadrature
        mixed = query @ (key.transpose(-2, -1) @ value) if associative else (query @ key.transpose(-2, -1)) @ value
        result: Tensor = self.to_out(mixed.transpose(1, 2).flatten(2))
        return result
