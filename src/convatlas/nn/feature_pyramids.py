"""Feature pyramids: maps of a backbone brought to the same channels, each with what the coarser ones know.

Lin, Dollar, Girshick, He, Hariharan, Belongie: "Feature Pyramid Networks for Object Detection", CVPR 2017,
arXiv 1612.03144.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FeaturePyramid"]


class FeaturePyramid(nn.Module):
    """A 1x1 convolution of each map, sums from coarse to fine, a last convolution of each; coarser levels by sampling.

    Args:
        in_channels: channels of the maps, from fine to coarse.
        out_channels: channels of every level.
        num_outs: number of levels; those beyond the maps take every second position of the level before.
        make_output: makes the last convolution of a level from its input and output channels; by default 3x3.

    Raises:
        ValueError: there is no map, or there are fewer levels than maps.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        *,
        num_outs: int | None = None,
        make_output: Callable[[int, int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        num_outs = num_outs or len(in_channels)
        if not in_channels or num_outs < len(in_channels):
            raise ValueError(
                f"num_outs must be at least the {len(in_channels)} maps, which must be one or more, got {num_outs}"
            )
        make = make_output or (lambda before, after: nn.Conv2d(before, after, 3, padding=1))
        self.in_channels = tuple(in_channels)
        self.num_outs = num_outs
        self.lateral_convs = nn.ModuleList(nn.Conv2d(channels, out_channels, 1) for channels in in_channels)
        self.fpn_convs = nn.ModuleList(make(out_channels, out_channels) for _ in in_channels)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Map features (B, C_i, H_i, W_i), from fine to coarse, to levels (B, out_channels, ...)."""
        if len(features) != len(self.in_channels):
            raise ValueError(f"there must be {len(self.in_channels)} maps, got {len(features)}")
        levels = [conv(feature) for conv, feature in zip(self.lateral_convs, features, strict=True)]
        for fine in range(len(levels) - 1, 0, -1):
            levels[fine - 1] = levels[fine - 1] + F.interpolate(
                levels[fine], levels[fine - 1].shape[2:], mode="nearest"
            )
        outputs = [conv(level) for conv, level in zip(self.fpn_convs, levels, strict=True)]
        while len(outputs) < self.num_outs:
            outputs.append(F.max_pool2d(outputs[-1], 1, stride=2))
        return outputs
