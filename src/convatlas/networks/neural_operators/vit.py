"""A vision transformer on fields, and the operator that it becomes when its patches have a size in space.

Dosovitskiy et al.: "An Image is Worth 16x16 Words", ICLR 2021, arXiv 2010.11929; configuration of Berner et al., 2025,
arXiv 2506.10973.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.networks.base import FieldNetwork, FieldNetworkConfig
from convatlas.nn.attention import SelfAttention, check_heads
from convatlas.nn.conv.kernel_interpolation import interpolate_field
from convatlas.nn.mlp import Mlp
from convatlas.ops.position import resize_position_embedding
from convatlas.ops.tokens import map_to_tokens, tokens_to_map

__all__ = ["VARIANTS", "FieldViT", "FieldViTConfig"]


@dataclass(frozen=True, kw_only=True)
class FieldViTConfig(FieldNetworkConfig):
    """Config of `FieldViT`.

    Attributes:
        patch_size: side of a patch in points, on the grid of ``resolution``.
        dim: channels of a token.
        depth: blocks.
        num_heads: divides dim.
        mlp_dim: hidden channels of a block.
        physical_patches: let patches keep their size in space instead of that in points, so that there are as many on
            every grid; kernels are resized, and the output is brought to the grid.

    Raises:
        ValueError: a value is out of range, or patch_size does not divide the resolution.
    """

    patch_size: int = 4
    dim: int = 96
    depth: int = 4
    num_heads: int = 4
    mlp_dim: int = 192
    physical_patches: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dims != 2:
            raise ValueError(f"dims must be 2, got {self.dims}")
        if self.patch_size < 1 or any(n % self.patch_size for n in self.grid):
            raise ValueError(f"patch_size must divide the resolution {self.grid}, got {self.patch_size}")
        if self.depth < 1 or self.mlp_dim < 1:
            raise ValueError(f"depth and mlp_dim must be at least 1, got {self.depth} and {self.mlp_dim}")
        check_heads(self.dim, self.num_heads)

    def build(self) -> FieldViT:
        return FieldViT(self)


class _Block(nn.Module):
    """x + attention(norm x), x + MLP(norm x)."""

    def __init__(self, config: FieldViTConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.dim), nn.LayerNorm(config.dim)
        self.attn = SelfAttention(config.dim, config.num_heads)
        self.mlp = Mlp(config.dim, config.mlp_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class FieldViT(FieldNetwork):
    """Patches become tokens, blocks of attention, and tokens become patches of the answer.

    The position embedding is interpolated where there are other patches than in the training.

    Args:
        config: what to build.
    """

    def __init__(self, config: FieldViTConfig) -> None:
        super().__init__(config)
        size = config.patch_size
        self.patch_embed = nn.Conv2d(config.in_channels, config.dim, size, stride=size)
        rows, columns = (n // size for n in config.grid)
        self.pos_embed = nn.Parameter(torch.empty(1, rows * columns, config.dim))
        self.blocks = nn.ModuleList([_Block(config) for _ in range(config.depth)])
        self.norm = nn.LayerNorm(config.dim)
        self.decoder = nn.Conv2d(config.dim, size * size * config.out_channels, 1)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """The answer (B, out_channels, H, W) to a field (B, in_channels, H, W).

        Raises:
            ValueError: the grid cannot be cut into the patches.
        """
        self._check_input(x)
        config, grid = self.config, tuple(x.shape[2:])
        maps = self._patches(x)
        rows, columns = maps.shape[2:]
        source = (config.grid[0] // config.patch_size, config.grid[1] // config.patch_size)
        position = resize_position_embedding(self.pos_embed, (rows, columns), source_grid=source, mode="bilinear")
        tokens = map_to_tokens(maps) + position.to(maps.dtype)
        for block in self.blocks:
            tokens = block(tokens)
        decoded = self.decoder(tokens_to_map(self.norm(tokens), (rows, columns)))
        y = F.pixel_shuffle(decoded, config.patch_size)
        return interpolate_field(y, grid, "bilinear")

    def _patches(self, x: Tensor) -> Tensor:
        """A token for each patch, (B, dim, rows, columns)."""
        size, grid, base = self.config.patch_size, x.shape[2:], self.config.grid
        if not self.config.physical_patches:
            if any(n % size for n in grid):
                raise ValueError(f"x must have a grid that can be cut into patches of {size}, got {tuple(x.shape)}")
            maps: Tensor = self.patch_embed(x)
            return maps
        counts = [wanted // size for wanted in base]
        if any(n % count for n, count in zip(grid, counts, strict=True)):
            raise ValueError(f"x must have a grid that can be cut into {counts} patches, got {tuple(x.shape)}")
        patch = [n // count for n, count in zip(grid, counts, strict=True)]
        weight = interpolate_field(self.patch_embed.weight, patch, "bilinear")
        # The kernel of the finer grid has the same sum.
        return F.conv2d(x, weight * (size**2 / math.prod(patch)), self.patch_embed.bias, stride=patch)


_PUBLISHED = {"patch_size": 16, "dim": 768, "depth": 12, "num_heads": 12, "mlp_dim": 1900, "resolution": 128}

VARIANTS: dict[str, FieldViTConfig] = {
    "field_vit": FieldViTConfig(),
    "field_vit_navier_stokes": FieldViTConfig(**_PUBLISHED),  # type: ignore[arg-type]
    "field_vit_physical_navier_stokes": FieldViTConfig(physical_patches=True, **_PUBLISHED),
}
