"""Filters of the whole field of view, learnt in the Fourier domain.

Rao, Zhao, Zhu, Lu, Zhou: "Global Filter Networks for Image Classification", NeurIPS 2021, arXiv 2107.00645, section
3.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.ops.precision import without_autocast

__all__ = ["global_filter", "resize_global_filter"]


def global_filter(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply the spectrum of each channel by a learnt one: a circular convolution with a kernel as large as the map.

    The imaginary parts of the mean and, of even sizes, of the highest frequency have no effect. Half precision is
    computed in float32, also under autocast.

    Args:
        x: (B, C, H, W).
        weight: real and imaginary part of the filter on the frequencies of a real transform, (C, h, w, 2); resized
            where these are not H and W // 2 + 1.

    Returns:
        The shape and type of x.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    height, width = x.shape[2:]
    with without_autocast(x):
        filters = torch.view_as_complex(resize_global_filter(weight.to(dtype), (height, width // 2 + 1)).contiguous())
        spectrum = torch.fft.rfft2(x.to(dtype), norm="ortho") * filters
        return torch.fft.irfft2(spectrum, s=(height, width), norm="ortho").to(x.dtype)


def resize_global_filter(weight: Tensor, grid: tuple[int, int]) -> Tensor:
    """Bring a filter (C, h, w, 2) to another grid of frequencies by bilinear interpolation between its corners.

    Raises:
        ValueError: weight has another shape.
    """
    if weight.dim() != 4 or weight.shape[3] != 2:
        raise ValueError(f"weight must be (C, h, w, 2), got {tuple(weight.shape)}")
    if tuple(weight.shape[1:3]) == tuple(grid):
        return weight
    parts = weight.permute(3, 0, 1, 2)
    return F.interpolate(parts, grid, mode="bilinear", align_corners=True).permute(1, 2, 3, 0)
