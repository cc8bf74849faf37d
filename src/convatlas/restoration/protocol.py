"""How super-resolution is measured: what low resolution is, and what is compared with what.

The same network and image give figures up to a decibel apart under protocols that all call themselves "PSNR, bicubic".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.errors import unknown
from convatlas.ops.colour import YCbCr, rgb_to_ycbcr
from convatlas.ops.image_quality import psnr, ssim
from convatlas.ops.resize import Convention, resize

__all__ = ["PROTOCOLS", "Protocol", "Quality", "as_pixels", "as_tensor"]

Array = npt.NDArray[Any]

_SSIM_WINDOW = 11


class Quality(NamedTuple):
    """How near an image is to the truth: PSNR of luma in dB, SSIM of luma; NaN for images smaller than its window."""

    psnr: float
    ssim: float


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What low resolution is, and what is compared with what.

    Attributes:
        downscale: how images of low resolution are made, where they are not given: ``matlab`` or ``pillow`` bicubic,
            or ``gaussian`` blur and every scale-th pixel.
        blur_sigma: standard deviation of that blur in pixels of the large image; 1.6 is usual for a scale of 3.
        luma: form of Y: ``matlab``, or ``studio256`` with coefficients in 1/256.
        rounding: whether images are rounded to whole values before they are compared, as files are.
        shave: pixels left out along every border; the scale when left out.
        multiple: images are cut to a multiple of this before anything else; the scale when left out.

    Raises:
        ValueError: a value is out of range.
    """

    downscale: Literal["matlab", "pillow", "gaussian"] = "matlab"
    blur_sigma: float = 1.6
    luma: Literal["matlab", "studio256"] = "matlab"
    rounding: bool = True
    shave: int | None = None
    multiple: int | None = None

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for name in ("downscale", "luma"):
            if getattr(self, name) not in get_args(hints[name]):
                raise unknown(name, str(getattr(self, name)), get_args(hints[name]))
        if not 0 < self.blur_sigma < math.inf:
            raise ValueError(f"blur_sigma must be positive, got {self.blur_sigma}")
        if self.shave is not None and self.shave < 0:
            raise ValueError(f"shave must not be negative, got {self.shave}")
        if self.multiple is not None and self.multiple < 1:
            raise ValueError(f"multiple must be at least 1, got {self.multiple}")

    @property
    def convention(self) -> Convention:
        """Whose bicubic interpolation enlarges chroma, transparency and the image that networks are compared with."""
        return "pillow" if self.downscale == "pillow" else "matlab"

    def describe(self, scale: int) -> str:
        """The protocol in one sentence."""
        blur = f"by Gaussian blur of {self.blur_sigma:g} pixels and taking one pixel of {scale}"
        names = {"matlab": "MATLAB", "pillow": "Pillow"}
        small = f"by bicubic interpolation as in {names[self.downscale]}" if self.downscale in names else blur
        form = {"matlab": "MATLAB's form", "studio256": "the form in 1/256"}[self.luma]
        values = "values rounded as in a file" if self.rounding else "values not rounded"
        shave = scale if self.shave is None else self.shave
        return (
            f"Low resolution {small}; PSNR and SSIM of luma in {form}, {values}, {shave} pixels left out at the border."
        )

    def cut(self, pixels: Array, scale: int) -> Array:
        """An image (H, W, C) without what exceeds a multiple of ``multiple`` and of the scale."""
        step = math.lcm(scale, self.multiple or scale)
        height, width = (length - length % step for length in pixels.shape[:2])
        return pixels[:height, :width]

    def shrink(self, pixels: Array, scale: int) -> Array:
        """An image (H, W, C) at low resolution, rounded where its values are whole numbers.

        Raises:
            ValueError: its sides are no multiples of the scale.
        """
        height, width = pixels.shape[:2]
        if height % scale or width % scale or not pixels.size:
            raise ValueError(f"the sides of the image must be multiples of {scale}, got {height} x {width}")
        if self.downscale == "gaussian":
            return as_pixels(_blurred(as_tensor(pixels), scale, self.blur_sigma), pixels.dtype)
        size = (height // scale, width // scale)
        return _resized(pixels, size, self.convention)

    def bicubic(self, pixels: Array, scale: int) -> Array:
        """An image (H, W, C) enlarged by bicubic interpolation: what a network has to be better than."""
        return _resized(pixels, (scale * pixels.shape[0], scale * pixels.shape[1]), self.convention)

    def luma_of(self, x: Tensor, *, is_luma: bool = False) -> Tensor:
        """Luma (..., 1, H, W) in [0, 1], studio range, of grey or RGB images (..., 1 or 3, H, W) in [0, 1]."""
        if is_luma:
            return x
        x = x.expand(*x.shape[:-3], 3, *x.shape[-2:])
        form: YCbCr = self.luma
        return rgb_to_ycbcr(x, form)[..., :1, :, :] if form == "matlab" else _studio256(x)

    def measure(self, result: Array, truth: Array, scale: int, *, is_luma: bool = False) -> Quality:
        """Quality of an image (H, W, C) in the type of the truth, or in floating point if it is not to be rounded.

        Raises:
            ValueError: the sizes differ, or the border leaves nothing.
        """
        if result.shape[:2] != truth.shape[:2]:
            raise ValueError(f"images must have one size, got {result.shape[:2]} and {truth.shape[:2]}")
        x, y = (self.luma_of(as_tensor(pixels).double(), is_luma=is_luma) for pixels in (result, truth))
        shave = scale if self.shave is None else self.shave
        large = min(truth.shape[:2]) - 2 * shave >= _SSIM_WINDOW
        similarity = float(ssim(x, y, data_range=1, shave=shave)) if large else math.nan
        return Quality(float(psnr(x, y, data_range=1, shave=shave)), similarity)


#: Protocols by name: what most papers use, and those of the two implementations whose figures are quoted.
PROTOCOLS: dict[str, Protocol] = {
    "usual": Protocol(),
    "Lornatang's": Protocol(shave=0),
    "yjn870's": Protocol(downscale="pillow", luma="studio256", rounding=False, shave=0),
}


def as_tensor(pixels: Array) -> Tensor:
    """An image (..., H, W, C) as floating point (..., C, H, W) in [0, 1]."""
    tensor = torch.from_numpy(np.require(np.moveaxis(pixels, -1, -3), requirements=["C", "W"]))
    if pixels.dtype == np.uint8:
        return tensor.float() / 255
    return tensor.float() / 65535 if pixels.dtype == np.uint16 else tensor


def as_pixels(x: Tensor, dtype: npt.DTypeLike) -> Array:
    """An image (..., C, H, W) in [0, 1], cut to that range, as (..., H, W, C) of another type, rounded."""
    x = x.clamp(0, 1).movedim(-3, -1)
    if np.dtype(dtype).kind == "f":
        return x.cpu().numpy().astype(dtype)
    return (x * np.iinfo(dtype).max).round().cpu().numpy().astype(dtype)


def _studio256(x: Tensor) -> Tensor:
    return rgb_to_ycbcr(x * 255, "studio256")[..., :1, :, :] / 255


def _resized(pixels: Array, size: tuple[int, int], convention: Convention) -> Array:
    if pixels.dtype == np.uint8:
        tensor = torch.from_numpy(np.require(np.moveaxis(pixels, -1, 0), requirements=["C", "W"]))
        return np.moveaxis(resize(tensor, size, convention=convention).numpy(), 0, -1)
    return as_pixels(resize(as_tensor(pixels), size, convention=convention), pixels.dtype)


def _blurred(x: Tensor, scale: int, sigma: float) -> Tensor:
    """Means under a Gaussian around the middle of each block of scale x scale pixels."""
    beyond = math.ceil(3 * sigma)
    places = torch.arange(scale + 2 * beyond, dtype=x.dtype) - (scale + 2 * beyond - 1) / 2
    weights = torch.exp(-0.5 * (places / sigma) ** 2)
    weights = weights / weights.sum()
    x = F.pad(x[:, None], (beyond,) * 4, mode="replicate")
    x = F.conv2d(x, weights.view(1, 1, -1, 1), stride=(scale, 1))
    return F.conv2d(x, weights.view(1, 1, 1, -1), stride=(1, scale))[:, 0]
