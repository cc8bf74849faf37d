"""Lower resolution of images and volumes as data sets for super-resolution make it, and the plain way back.

Where the voxels of low resolution lie depends on the way: a mean lies in the middle of what it is the mean of, a picked
voxel and a cropped spectrum where the first one lay. The way back takes care of it.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor

from convatlas.errors import unknown
from convatlas.ops.fourier_resize import fourier_resize

__all__ = ["Degradation", "is_centred", "linear_enlarge", "shrink"]

#: How low resolution comes about: ``linear`` interpolation in the middle of each block (for factor 2 its mean),
#: ``nearest``, its first voxel, or ``kspace``, a cropped spectrum, as a scanner measures it.
Degradation = Literal["linear", "nearest", "kspace"]

_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


def is_centred(degradation: Degradation) -> bool:
    """Whether a voxel of low resolution lies in the middle of its block, not on the first voxel of it."""
    if degradation not in get_args(Degradation):
        raise unknown("degradation", degradation, get_args(Degradation))
    return degradation == "linear"


def shrink(x: Tensor, scale: int, degradation: Degradation = "linear") -> Tensor:
    """Lower the resolution.

    Args:
        x: (B, C, *positions), each length a multiple of scale.
        scale: factor.
        degradation: how.

    Returns:
        (B, C, *positions / scale).

    Raises:
        ValueError: x has no one to three position axes, or a length is no multiple of scale.
        UnknownName: there is no such degradation.
    """
    centred = is_centred(degradation)
    _check(x, scale)
    if any(length % scale for length in x.shape[2:]):
        raise ValueError(f"positions of x must be multiples of scale {scale}, got {tuple(x.shape[2:])}")
    size = [length // scale for length in x.shape[2:]]
    if degradation == "nearest":
        for axis in range(2, x.dim()):
            x = x[(slice(None),) * axis + (slice(None, None, scale),)]
        return x.contiguous()
    if centred:
        return F.interpolate(x, size, mode=_LINEAR[len(size)], align_corners=False)
    return fourier_resize(x, size)


def linear_enlarge(x: Tensor, scale: int, degradation: Degradation = "linear") -> Tensor:
    """Raise the resolution by linear interpolation between the voxels where `shrink` has put them.

    Args:
        x: (B, C, *positions).
        scale: factor.
        degradation: how low resolution came about.

    Returns:
        (B, C, *positions * scale).

    Raises:
        ValueError: x has no one to three position axes.
        UnknownName: there is no such degradation.
    """
    centred = is_centred(degradation)
    _check(x, scale)
    dims = x.dim() - 2
    size = [scale * length for length in x.shape[2:]]
    if centred:
        return F.interpolate(x, size, mode=_LINEAR[dims], align_corners=False)
    around = F.pad(x, (0, 1) * dims, mode="replicate")
    y = F.interpolate(around, [length + 1 for length in size], mode=_LINEAR[dims], align_corners=True)
    for axis, length in enumerate(size, start=2):
        y = y.narrow(axis, 0, length)
    return y.contiguous()


def _check(x: Tensor, scale: int) -> None:
    if not 3 <= x.dim() <= 5:
        raise ValueError(f"x must be (B, C, *positions) with one to three position axes, got {tuple(x.shape)}")
    if scale < 1:
        raise ValueError(f"scale must be at least 1, got {scale}")
