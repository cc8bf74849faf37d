"""OFormer without its decoder: attention without softmax beside a spectral convolution.

Li, Meidani, Farimani: "Transformer for Partial Differential Equations' Operator Learning", TMLR 2023, arXiv 2205.13671;
modified as in Berner et al., 2025, arXiv 2506.10973.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from convatlas.networks.base import FieldNetwork, FieldNetworkConfig
from convatlas.nn.attention_integral import AttentionKernelIntegral
from convatlas.nn.conv.spectral_conv import SpectralConv
from convatlas.nn.fields import coordinates
from convatlas.nn.graph_integral import PointwiseMLP

__all__ = ["VARIANTS", "OFormer", "OFormerConfig"]


@dataclass(frozen=True, kw_only=True)
class OFormerConfig(FieldNetworkConfig):
    """Config of `OFormer`.

    Attributes:
        dim: channels of a point.
        depth: blocks.
        num_heads: heads of the attention.
        head_dim: channels of a head; ``dim`` when left out.
        n_modes: frequencies of each axis of the spectral branch, or one number for all; 0 leaves the branch out.
        mlp_expansion: hidden channels of a block over ``dim``.
        rotary: turn queries and keys by the coordinates.

    Raises:
        ValueError: a value is out of range.
    """

    dim: int = 32
    depth: int = 3
    num_heads: int = 4
    head_dim: int | None = None
    n_modes: int | tuple[int, ...] = 12
    mlp_expansion: float = 2.0
    rotary: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dim < 1 or self.depth < 1 or round(self.dim * self.mlp_expansion) < 1:
            raise ValueError(
                f"dim, depth and hidden channels must be at least 1, got {self.dim}, {self.depth} and "
                f"{self.mlp_expansion} times as many"
            )
        if len(self.modes) != self.dims or min(self.modes) < 0:
            raise ValueError(f"n_modes must be one number or {self.dims}, at least 0, got {self.n_modes}")

    @property
    def modes(self) -> tuple[int, ...]:
        """Frequencies of each axis of the spectral branch."""
        return (self.n_modes,) * self.dims if isinstance(self.n_modes, int) else tuple(self.n_modes)

    def build(self) -> OFormer:
        return OFormer(self)


class _Block(nn.Module):
    """u <- (u + spectral_conv(norm u) + attention(norm u)) / sqrt 3, then u <- u + MLP(norm u)."""

    def __init__(self, config: OFormerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = AttentionKernelIntegral(
            dim,
            dim,
            config.num_heads,
            config.head_dim or dim,
            position="rotary" if config.rotary else None,
            position_dims=config.dims,
        )
        self.spectral = SpectralConv(dim, dim, config.modes) if min(config.modes) else None
        self.mlp = PointwiseMLP((dim, round(dim * config.mlp_expansion), dim))

    def forward(self, u: Tensor, places: Tensor, grid: tuple[int, ...]) -> Tensor:
        h = self.norm1(u)
        total = u + self.attention(h, places)
        if self.spectral is not None:
            total = total + self.spectral(h.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
        u = total / math.sqrt(2 + (self.spectral is not None))
        y: Tensor = u + self.mlp(self.norm2(u))
        return y


class OFormer(FieldNetwork):
    """Points with values and coordinates become tokens, blocks, and a map of the channels to the answer.

    Args:
        config: what to build.
    """

    def __init__(self, config: OFormerConfig) -> None:
        super().__init__(config)
        self.lifting = PointwiseMLP((config.in_channels + config.dims, config.dim, config.dim))
        self.blocks = nn.ModuleList([_Block(config) for _ in range(config.depth)])
        self.projection = PointwiseMLP((config.dim, config.dim, config.out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """The answer (B, out_channels, *grid) to a field (B, in_channels, *grid)."""
        self._check_input(x)
        grid = tuple(x.shape[2:])
        places = coordinates(grid, x, end=True).flatten(1).t().expand(x.shape[0], -1, -1)
        u = self.lifting(torch.cat([x.flatten(2).transpose(1, 2), places], -1))
        for block in self.blocks:
            u = block(u, places, grid)
        y: Tensor = self.projection(u)
        return y.transpose(1, 2).unflatten(2, grid)


VARIANTS: dict[str, OFormerConfig] = {
    "oformer": OFormerConfig(),
    "oformer_navier_stokes": OFormerConfig(dim=220, depth=4, num_heads=16, n_modes=16, resolution=128),
}
