"""How far an image is from another: peak signal-to-noise ratio and structural similarity."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.errors import unknown

__all__ = ["psnr", "ssim"]

_WINDOW = 11
_SIGMA = 1.5


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
    error = (x - y).square().mean(dim=(-3, -2, -1))
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
    pixels whose window lies inside the image; c1 = (0.01 data_range)^2, c2 = (0.03 data_range)^2. In float64.

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
    unbiased = _WINDOW**2 / (_WINDOW**2 - 1) if covariance == "sample" else 1.0
    mean_x, mean_y = _windowed(x), _windowed(y)
    variance_x = unbiased * (_windowed(x * x) - mean_x**2)
    variance_y = unbiased * (_windowed(y * y) - mean_y**2)
    joint = unbiased * (_windowed(x * y) - mean_x * mean_y)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * joint + c2)
    similarity = similarity / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))
    return similarity.mean(dim=(-3, -2, -1))


def _pair(x: Tensor, y: Tensor, data_range: float, shave: int) -> tuple[Tensor, Tensor]:
    """The two images in float64 without their borders."""
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
    return x[inside].double(), y[inside].double()


def _windowed(x: Tensor) -> Tensor:
    """Means under the Gaussian window, one axis after the other, where it lies inside."""
    distance = torch.arange(_WINDOW, dtype=torch.float64, device=x.device) - _WINDOW // 2
    window = torch.exp(-0.5 * (distance / _SIGMA) ** 2)
    window = window / window.sum()
    planes = x.reshape(-1, 1, *x.shape[-2:])
    planes = F.conv2d(F.conv2d(planes, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
    return planes.reshape(*x.shape[:-2], *planes.shape[-2:])
