"""Colour spaces of images: luma and chroma in the forms in which papers publish them, linear light, gray."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from convatlas.errors import unknown

__all__ = ["Gray", "YCbCr", "linear_to_srgb", "rgb_to_gray", "rgb_to_ycbcr", "srgb_to_linear", "ycbcr_to_rgb"]

YCbCr = Literal["matlab", "studio256", "jpeg"]
Gray = Literal["bt601", "bt709", "opencv", "pillow"]
Row = tuple[float, float, float]


class _Affine(NamedTuple):
    """Each new channel is a row times the channels, plus an offset."""

    rows: tuple[Row, Row, Row]
    offsets: Row


#: There and back. The inverses of the first two forms are the rounded ones that are published with them.
_FORMS: dict[str, tuple[_Affine, _Affine]] = {
    "matlab": (
        _Affine(
            ((65.481, 128.553, 24.966), (-37.797, -74.203, 112.0), (112.0, -93.786, -18.214)),
            (16.0, 128.0, 128.0),
        ),
        _Affine(
            (
                (255 * 0.00456621, 0.0, 255 * 0.00625893),
                (255 * 0.00456621, 255 * -0.00153632, 255 * -0.00318811),
                (255 * 0.00456621, 255 * 0.00791071, 0.0),
            ),
            (-222.921, 135.576, -276.836),
        ),
    ),
    "studio256": (
        _Affine(
            (
                (64.738 / 256, 129.057 / 256, 25.064 / 256),
                (-37.945 / 256, -74.494 / 256, 112.439 / 256),
                (112.439 / 256, -94.154 / 256, -18.285 / 256),
            ),
            (16.0, 128.0, 128.0),
        ),
        _Affine(
            (
                (298.082 / 256, 0.0, 408.583 / 256),
                (298.082 / 256, -100.291 / 256, -208.120 / 256),
                (298.082 / 256, 516.412 / 256, 0.0),
            ),
            (-222.921, 135.576, -276.836),
        ),
    ),
    "jpeg": (
        _Affine(
            (
                (0.299, 0.587, 0.114),
                (-0.299 / 1.772, -0.587 / 1.772, 0.5),
                (0.5, -0.587 / 1.402, -0.114 / 1.402),
            ),
            (0.0, 0.5, 0.5),
        ),
        _Affine(
            (
                (1.0, 0.0, 1.402),
                (1.0, -1.772 * 0.114 / 0.587, -1.402 * 0.299 / 0.587),
                (1.0, 1.772, 0.0),
            ),
            (-0.701, 0.5 * (1.772 * 0.114 + 1.402 * 0.299) / 0.587, -0.886),
        ),
    ),
}
_GRAY: dict[str, Row] = {"bt601": (0.299, 0.587, 0.114), "bt709": (0.2126, 0.7152, 0.0722)}
#: Whole-number weights and the bits of their fraction.
_GRAY_BYTES = {"opencv": ((9798, 19235, 3735), 15), "pillow": ((19595, 38470, 7471), 16)}


def rgb_to_ycbcr(x: Tensor, form: YCbCr = "matlab") -> Tensor:
    """Luma and two chroma channels (ITU-R BT.601) of gamma-encoded RGB. Nothing is rounded or clipped.

    Args:
        x: (..., 3, H, W), floating point.
        form: "matlab": x and the result in [0, 1], studio range (black is 16/255, white 235/255), as MATLAB's
            ``rgb2ycbcr``; "studio256": the same range for x in [0, 255], with coefficients in 1/256; "jpeg": full range
            (JFIF), x and the result in [0, 1].

    Returns:
        (..., 3, H, W): Y, Cb, Cr.

    Raises:
        ValueError: x has not three channels or is not floating point, or form is unknown.
    """
    _check(x)
    if form not in _FORMS:
        raise unknown("form of YCbCr", form, _FORMS)
    y = _mixed(x, _FORMS[form][0])
    return y / 255 if form == "matlab" else y


def ycbcr_to_rgb(x: Tensor, form: YCbCr = "matlab") -> Tensor:
    """RGB from luma and chroma, the inverse of `rgb_to_ycbcr`; not clipped.

    Two of the inverses are as published: there and back again, "matlab" is off by 3e-6, and "studio256", whose two
    directions disagree about the number of levels (256 and 255), by 1.2 of 255.

    Args:
        x: (..., 3, H, W): Y, Cb, Cr, floating point.
        form: as in `rgb_to_ycbcr`.

    Returns:
        (..., 3, H, W).

    Raises:
        ValueError: x has not three channels or is not floating point, or form is unknown.
    """
    _check(x)
    if form not in _FORMS:
        raise unknown("form of YCbCr", form, _FORMS)
    back = _FORMS[form][1]
    return _mixed(x * 255, back) / 255 if form == "matlab" else _mixed(x, back)


def rgb_to_gray(x: Tensor, form: Gray = "bt601") -> Tensor:
    """The weighted sum of the three channels.

    Args:
        x: (..., 3, H, W), floating point or uint8.
        form: "bt601" (0.299, 0.587, 0.114) or "bt709" (0.2126, 0.7152, 0.0722) for floating point; for uint8 the
            whole-number arithmetic of "opencv" or "pillow", both BT.601 and bit-equal to theirs.

    Returns:
        (..., 1, H, W) in the type of x.

    Raises:
        ValueError: x has not three channels, or form is unknown or does not belong to the type of x.
    """
    if x.dtype != torch.uint8:
        _check(x)
        if form not in _GRAY:
            raise unknown("form of gray of floating-point images", form, _GRAY)
        return _combined(x.unbind(-3), _GRAY[form]).unsqueeze(-3)
    _check_channels(x)
    if form not in _GRAY_BYTES:
        raise unknown("form of gray of uint8 images", form, _GRAY_BYTES)
    weights, bits = _GRAY_BYTES[form]
    total = _combined(x.int().unbind(-3), weights)
    return ((total + (1 << bits - 1)) >> bits).to(torch.uint8).unsqueeze(-3)


def srgb_to_linear(x: Tensor) -> Tensor:
    """Light intensity of sRGB values (IEC 61966-2-1), both in [0, 1]; below 0 the curve is straight.

    Raises:
        ValueError: x is not floating point.
    """
    _check_type(x)
    # Each branch sees only values of its own, or the gradient of the power would be NaN below zero.
    curved = ((x.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4
    return torch.where(x <= 0.04045, x / 12.92, curved)


def linear_to_srgb(x: Tensor) -> Tensor:
    """sRGB values of light intensity (IEC 61966-2-1), both in [0, 1]; below 0 the curve is straight.

    Raises:
        ValueError: x is not floating point.
    """
    _check_type(x)
    curved = 1.055 * x.clamp(min=0.0031308) ** (1 / 2.4) - 0.055
    return torch.where(x <= 0.0031308, 12.92 * x, curved)


def _check_type(x: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point, got {x.dtype}")


def _check_channels(x: Tensor) -> None:
    if x.dim() < 3 or x.shape[-3] != 3:
        raise ValueError(f"x must be (..., 3, H, W), got {tuple(x.shape)}")


def _check(x: Tensor) -> None:
    _check_type(x)
    _check_channels(x)


def _combined(channels: tuple[Tensor, ...], weights: tuple[float, float, float]) -> Tensor:
    first, second, third = (channel * weight for channel, weight in zip(channels, weights, strict=True))
    return first + second + third


def _mixed(x: Tensor, affine: _Affine) -> Tensor:
    channels = x.unbind(-3)
    return torch.stack(
        [_combined(channels, row) + offset for row, offset in zip(affine.rows, affine.offsets, strict=True)], -3
    )
