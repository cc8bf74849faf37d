"""How far an image is from another: peak signal-to-noise ratio and structural similarity."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.errors import unknown

__all__ = ["psnr", "ssim"]

#: Pixels that the Gaussian window reaches to either side, and its width.
_REACH = 5
_WINDOW = 2 * _REACH + 1
_SIGMA = 1.5
_GAUSSIAN = [math.exp(-0.5 * (distance / _SIGMA) ** 2) for distance in range(_REACH + 1)]
#: Of the pixel itself, and of both at each distance.
_WEIGHTS = [value / (2 * sum(_GAUSSIAN) - 1) for value in _GAUSSIAN]
#: Numbers that are worked on at once: as many as stay in the cache of a processor, or as fill a GPU.
_AT_ONCE, _AT_ONCE_ON_GPU = 1 << 17, 1 << 24
_LEAST_ROWS = 32


def psnr(x: Tensor, y: Tensor, *, data_range: float, shave: int = 0) -> Tensor:
    """Peak signal-to-noise ratio of each image, 10 log10(data_range^2 / mean squared difference), in decibels.

    The mean runs over channels and pixels in float64; equal images give infinity. Whether values are rounded to whole
    numbers first changes the result: that is up to the caller.

    Args:
        x: images (..., C, H, W), floating point or uint8.
        y: images of the same shape.
        data_range: the difference between the largest and the smallest possible value, 1 or 255.
        shave: pixels to leave out along every border.

    Returns:
        (...) in float64, a number for each image; their mean is the mean PSNR. PSNR of a whole clip is that of the
        clip given as one image, or of the mean of 10^(-PSNR / 10).

    Raises:
        ValueError: the shapes differ or are no images, shave leaves nothing, or data_range is not positive.
    """
    x, y = _pair(x, y, data_range, shave)
    error = (x.double() - y.double()).square().mean(dim=(-3, -2, -1))
    return 10 * torch.log10(data_range**2 / error)


def ssim(
    x: Tensor,
    y: Tensor,
    *,
    data_range: float,
    shave: int = 0,
    covariance: Literal["population", "sample"] = "population",
) -> Tensor:
    """Structural similarity of each image: the mean over channels and pixels of

        (2 mx my + c1) (2 sxy + c2) / ((mx^2 + my^2 + c1) (sx^2 + sy^2 + c2)),

    with means, variances and covariance under a Gaussian window of 11 x 11 pixels and standard deviation 1.5, at the
    pixels whose window lies inside the image; c1 = (0.01 data_range)^2, c2 = (0.03 data_range)^2. In float64, and
    without gradients in memory that does not grow with the image.

    Wang, Bovik, Sheikh, Simoncelli: "Image Quality Assessment: From Error Visibility to Structural Similarity", 2004.

    Args:
        x: images (..., C, H, W), at least 11 x 11 pixels after shaving, floating point or uint8.
        y: images of the same shape.
        data_range: the difference between the largest and the smallest possible value, 1 or 255.
        shave: pixels to leave out along every border.
        covariance: "population" as published; "sample" multiplies variances and covariance by 121 / 120, as
            scikit-image does unless told otherwise.

    Returns:
        (...) in float64, a number for each image.

    Raises:
        ValueError: the shapes differ or are no images, the images are smaller than the window, data_range is not
            positive, or covariance is unknown.
    """
    if covariance not in ("population", "sample"):
        raise unknown("covariance", covariance, ("population", "sample"))
    x, y = _pair(x, y, data_range, shave)
    if min(x.shape[-2:]) < _WINDOW:
        height, width = x.shape[-2:]
        raise ValueError(f"images must be at least {_WINDOW} x {_WINDOW} pixels after shaving, got {height} x {width}")
    height, width = x.shape[-2:]
    first, second = (image.reshape(-1, height, width) for image in (x, y))
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad):
        sums = _similarity(first, second, data_range, covariance).sum((-2, -1))
    else:
        lots = zip(_lots(first), _lots(second), strict=True)
        sums = torch.cat([_summed(a, b, data_range, covariance) for a, b in lots])
    pixels = (height - _WINDOW + 1) * (width - _WINDOW + 1)
    return sums.reshape(x.shape[:-2]).mean(-1) / pixels


def _lots(planes: Tensor) -> tuple[Tensor, ...]:
    """Planes (N, H, W) in lots that are worked on together."""
    return planes.split(max(1, _at_once(planes) // (planes.shape[1] * planes.shape[2])))


def _at_once(x: Tensor) -> int:
    return _AT_ONCE_ON_GPU if x.is_cuda else _AT_ONCE


def _summed(x: Tensor, y: Tensor, data_range: float, covariance: str) -> Tensor:
    """The sum of the similarity over the pixels of planes (N, H, W), by strips that fit the processor's cache."""
    height, width = x.shape[-2:]
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    step = max(_LEAST_ROWS, _at_once(x) // (len(x) * width))
    for first in range(0, height - _WINDOW + 1, step):
        rows = slice(first, first + step + _WINDOW - 1)
        total += _similarity(x[:, rows], y[:, rows], data_range, covariance).sum((-2, -1))
    return total


def _similarity(x: Tensor, y: Tensor, data_range: float, covariance: str) -> Tensor:
    """The structural similarity (..., H - 10, W - 10) at each pixel of planes (..., H, W)."""
    x, y = x.double(), y.double()
    unbiased = _WINDOW**2 / (_WINDOW**2 - 1) if covariance == "sample" else 1.0
    mean_x, mean_y = _windowed(x), _windowed(y)
    product, squares = mean_x * mean_y, mean_x * mean_x + mean_y * mean_y
    variances = unbiased * (_windowed(x * x + y * y) - squares)  # their sum is all that is asked for
    joint = unbiased * (_windowed(x * y) - product)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    return (2 * product + c1) * (2 * joint + c2) / ((squares + c1) * (variances + c2))


def _pair(x: Tensor, y: Tensor, data_range: float, shave: int) -> tuple[Tensor, Tensor]:
    """The two images without their borders."""
    if x.shape != y.shape:
        raise ValueError(f"x and y must have the same shape, got {tuple(x.shape)} and {tuple(y.shape)}")
    if x.dim() < 3:
        raise ValueError(f"x and y must be (..., C, H, W), got {tuple(x.shape)}")
    for name, image in (("x", x), ("y", y)):
        if not image.is_floating_point() and image.dtype != torch.uint8:
            raise ValueError(f"{name} must be floating point or uint8, got {image.dtype}")
    if not data_range > 0:
        raise ValueError(f"data_range must be positive, got {data_range}")
    height, width = x.shape[-2:]
    if shave < 0 or min(height, width) <= 2 * shave:
        raise ValueError(f"shave must be at least 0 and leave some of the {height} x {width} pixels, got {shave}")
    inside = (..., slice(shave, height - shave), slice(shave, width - shave))
    return x[inside], y[inside]


def _windowed(x: Tensor) -> Tensor:
    """Means under the Gaussian window, one axis after the other, where it lies inside."""
    return _Means.apply(_Means.apply(x, -2), -1)  # type: ignore[no-untyped-call]


class _Means(torch.autograd.Function):
    """Means along one axis as a sum of shifted images: the convolution of float64 takes twenty times as long."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        ctx.dim = dim
        count = x.shape[dim] - _WINDOW + 1
        means = _WEIGHTS[0] * x.narrow(dim, _REACH, count)
        for shift, weight in enumerate(_WEIGHTS[1:], start=1):
            both = x.narrow(dim, _REACH - shift, count) + x.narrow(dim, _REACH + shift, count)
            means.add_(both, alpha=weight)
        return means

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # The window is symmetric: its transpose is itself, on what is surrounded by zeros.
        border = [2 * _REACH, 2 * _REACH]
        padded = F.pad(grad, border if ctx.dim == -1 else [0, 0, *border])
        return _Means.apply(padded, ctx.dim), None  # type: ignore[no-untyped-call]
