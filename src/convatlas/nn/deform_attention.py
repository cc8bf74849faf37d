"""Multi-scale deformable attention: a query attends to a few places that it chooses itself on every level.

Zhu et al.: "Deformable DETR", ICLR 2021, arXiv 2010.04159, section 4.1. Parameters have the names of the authors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from convatlas.ops.deform_attention import deform_attention

__all__ = ["MultiScaleDeformableAttention"]


class MultiScaleDeformableAttention(nn.Module):
    """Attention of queries to the pixels of a pyramid, at places near their reference points.

    A new layer averages places along a ray for each head, 1, 2, ... pixels away from the reference point on each level.

    Args:
        channels: of queries and values.
        num_levels: levels of the pyramid.
        num_heads: divides ratio * channels.
        num_points: places of a head on a level.
        ratio: channels of the projected values over channels.

    Raises:
        ValueError: a number is smaller than 1, or num_heads does not divide the channels of the projected values.
    """

    def __init__(
        self, channels: int, num_levels: int = 4, num_heads: int = 8, num_points: int = 4, *, ratio: float = 1.0
    ) -> None:
        super().__init__()
        if min(channels, num_levels, num_heads, num_points) < 1 or ratio <= 0:
            raise ValueError(
                "channels, num_levels, num_heads and num_points must be at least 1 and ratio positive, got "
                f"{channels}, {num_levels}, {num_heads}, {num_points} and {ratio}"
            )
        width = int(channels * ratio)
        if width < 1 or width % num_heads:
            raise ValueError(f"value dim {width} is not divisible by {num_heads} heads")
        self.channels, self.num_levels, self.num_heads, self.num_points = channels, num_levels, num_heads, num_points
        places = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(channels, 2 * places)
        self.attention_weights = nn.Linear(channels, places)
        self.value_proj = nn.Linear(channels, width)
        self.output_proj = nn.Linear(width, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Rays as offsets, equal weights, Xavier's distribution for the projections."""
        angles = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        distance = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        rays = directions[:, None, None] * distance[:, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(rays.expand(-1, self.num_levels, -1, -1).flatten())
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference: Tensor,
        value: Tensor,
        shapes: Sequence[tuple[int, int]],
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from queries (B, Q, C) to values and map to (B, Q, C).

        Args:
            query: (B, Q, C).
            reference: points (x, y) from 0 to 1, (B or 1, Q, L or 1, 2).
            value: (B, S, C), pixels of all levels in rows, one level after the other.
            shapes: height and width of each level.
            padding_mask: (B, S), true where a pixel is padding and counts as zero; or None.

        Raises:
            ValueError: shapes do not fit.
        """
        self._check(query, reference, value, shapes, padding_mask)
        values = self.value_proj(value)
        if padding_mask is not None:
            values = values.masked_fill(padding_mask[..., None], 0.0)
        values = values.unflatten(-1, (self.num_heads, -1))
        places = (self.num_heads, self.num_levels, self.num_points)
        offsets = self.sampling_offsets(query).unflatten(-1, (*places, 2))
        weights = (
            self.attention_weights(query).unflatten(-1, (self.num_heads, -1)).softmax(-1).unflatten(-1, places[1:])
        )
        # Positions need more digits than values: at least float32, which autocast would lower.
        dtype = torch.promote_types(query.dtype, torch.float32)
        sizes = torch.tensor([(width, height) for height, width in shapes], dtype=dtype, device=query.device)
        locations = reference[:, :, None, :, None].to(dtype) + offsets.to(dtype) / sizes[:, None]
        sampled = deform_attention(values, shapes, locations, weights)
        mixed: Tensor = self.output_proj(sampled)
        return mixed

    def _check(
        self,
        query: Tensor,
        reference: Tensor,
        value: Tensor,
        shapes: Sequence[tuple[int, int]],
        padding_mask: Tensor | None,
    ) -> None:
        for name, tensor in (("query", query), ("value", value)):
            if tensor.dim() != 3 or tensor.shape[2] != self.channels:
                raise ValueError(f"{name} must be (B, N, {self.channels}), got {tuple(tensor.shape)}")
        if len(shapes) != self.num_levels:
            raise ValueError(f"shapes must be those of {self.num_levels} levels, got {len(shapes)}")
        fits = reference.dim() == 4 and reference.shape[1::2] == (query.shape[1], 2)
        # A comparison with 1 would fix the batch of an exported program.
        alike = torch.compiler.is_compiling() or reference.shape[0] in (1, query.shape[0])
        if not fits or not alike or reference.shape[2] not in (1, self.num_levels):
            raise ValueError(
                f"reference must be ({query.shape[0]} or 1, {query.shape[1]}, {self.num_levels} or 1, 2), "
                f"got {tuple(reference.shape)}"
            )
        if padding_mask is not None and padding_mask.shape != value.shape[:2]:
            raise ValueError(f"padding_mask must be {tuple(value.shape[:2])}, got {tuple(padding_mask.shape)}")

    def extra_repr(self) -> str:
        """Show the sizes."""
        return (
            f"{self.channels}, num_levels={self.num_levels}, num_heads={self.num_heads}, num_points={self.num_points}"
        )
