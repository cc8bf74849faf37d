"""How far a volume is from another, and how sharp it is, as scikit-image measures them.

SSIM: Wang, Bovik, Sheikh, Simoncelli: "Image Quality Assessment: From Error Visibility to Structural Similarity", IEEE
Transactions on Image Processing 2004.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["nrmse", "sharpness", "volume_psnr", "volume_ssim"]

_WINDOW = 7


def volume_psnr(x: Tensor, truth: Tensor) -> Tensor:
    """20 log10(max - min of the truth) - 10 log10(mean squared difference), in decibels; equal volumes give infinity.

    Args:
        x: a volume (D, H, W), or an array of any shape.
        truth: what it should be, of the same shape.

    Returns:
        () in float64.

    Raises:
        ValueError: the shapes differ, or the truth is constant.
    """
    x, truth, extent = _pair(x, truth)
    return 20 * torch.log10(extent) - 10 * torch.log10((x - truth).square().mean())


def nrmse(x: Tensor, truth: Tensor) -> Tensor:
    """Root mean squared difference over the extent of the truth, sqrt(mean((x - t)^2)) / (max(t) - min(t)).

    Args:
        x: a volume (D, H, W), or an array of any shape.
        truth: what it should be, of the same shape.

    Returns:
        () in float64.

    Raises:
        ValueError: the shapes differ, or the truth is constant.
    """
    x, truth, extent = _pair(x, truth)
    return (x - truth).square().mean().sqrt() / extent


def volume_ssim(x: Tensor, truth: Tensor, dims: Literal[2, 3] = 3) -> Tensor:
    """Structural similarity under a flat window of 7 voxels a side, of the volume or of its slices along the last axis.

    Variances and covariance are those of a sample, divided by n - 1 of the n voxels of a window; windows that reach
    beyond the border do not count; the range is that of the truth.

    Args:
        x: a volume (D, H, W), at least 7 voxels along each axis that the window has.
        truth: what it should be, of the same shape.
        dims: 3, or 2 for the mean over slices (D, H), as DISGAN's code measures.

    Returns:
        () in float64.

    Raises:
        ValueError: the shapes differ or are no volumes of that size, or the truth is constant, or dims is out of range.
    """
    if dims not in (2, 3):
        raise ValueError(f"dims must be 2 or 3, got {dims}")
    x, truth, extent = _pair(x, truth)
    if x.dim() != 3 or min(x.shape[:dims]) < _WINDOW:
        least = " x ".join([str(_WINDOW)] * dims)
        raise ValueError(f"x must be (D, H, W) with at least {least} voxels, got {tuple(x.shape)}")
    count = _WINDOW**dims
    unbiased = count / (count - 1)
    mean_x, mean_y = _windowed(x, dims), _windowed(truth, dims)
    variance_x = unbiased * (_windowed(x * x, dims) - mean_x**2)
    variance_y = unbiased * (_windowed(truth * truth, dims) - mean_y**2)
    joint = unbiased * (_windowed(x * truth, dims) - mean_x * mean_y)
    c1, c2 = (0.01 * extent) ** 2, (0.03 * extent) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * joint + c2)
    return (similarity / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))).mean()


def sharpness(x: Tensor) -> Tensor:
    """Mean length of the gradient by central differences, one-sided at the borders.

    Args:
        x: a volume (D, H, W), or an array of any number of axes, at least 2 long.

    Returns:
        () in float64, in units of x for each voxel.

    Raises:
        ValueError: an axis is shorter than 2, or there is none.
    """
    if x.dim() < 1 or min(x.shape) < 2:
        raise ValueError(f"x must have axes of at least 2 voxels, got {tuple(x.shape)}")
    return torch.stack(torch.gradient(x.double())).square().sum(0).sqrt().mean()


def _pair(x: Tensor, truth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both in float64, and the extent of the truth."""
    if x.shape != truth.shape:
        raise ValueError(f"x and truth must have the same shape, got {tuple(x.shape)} and {tuple(truth.shape)}")
    x, truth = x.double(), truth.double()
    extent = truth.max() - truth.min()
    if not extent > 0:
        raise ValueError("truth must not be constant: its extent is what differences are measured by")
    return x, truth, extent


def _windowed(x: Tensor, dims: int) -> Tensor:
    """Means under the window where it lies inside, one axis after the other."""
    for axis in range(dims):
        moved = x.movedim(axis, -1)
        x = F.avg_pool1d(moved.reshape(1, -1, moved.shape[-1]), _WINDOW, 1)[0].reshape(*moved.shape[:-1], -1)
        x = x.movedim(-1, axis)
    return x
