"""The colour of the light: what two exposures tell of it, estimates by statistics of one image, errors, white balance.

Afifi, Hu, Liang: "Optimizing Illuminant Estimation in Dual-Exposure HDR Imaging", ECCV 2024, arXiv 2403.02449. Images
are linear, in the camera's own colours, with the black level taken off, in [0, 1].

The paper's formula of the dual-exposure feature is not public. The one here is this library's own: it is 0 where both
exposures are scaled copies of each other, and it has the size that the published numbers of parameters ask for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.errors import unknown
from convatlas.ops.fourier import work_type
from convatlas.ops.log_chroma import check_images
from convatlas.ops.precision import without_autocast

__all__ = [
    "FEATURE_SIZES",
    "STATISTICAL",
    "Feature",
    "angular_error",
    "apply_white_balance",
    "channel_ratios",
    "dual_exposure_feature",
    "error_statistics",
    "exposure_ratio",
    "gray_edge",
    "gray_world",
    "reproduction_error",
    "shades_of_gray",
    "white_patch",
]

Feature = Literal["uv", "matrix", "concat"]

#: Numbers of each form of the dual-exposure feature.
FEATURE_SIZES: Mapping[str, int] = {"uv": 2, "matrix": 9, "concat": 11}
#: A pixel counts in the feature where all six values are above this.
_LEAST = 0.01
#: From which value on a pixel counts as clipped where that matters.
_CLIPPED = 0.98
#: What cosines are multiplied by before the arc cosine, whose slope at 1 is infinite; as C5 has it.
_SHRINK = 0.9999999


# -- two exposures -----------------------------------------------------------------------------------------------------


def channel_ratios(long: Tensor, short: Tensor, mask: Tensor | None = None, *, least: float = _LEAST) -> Tensor:
    """How many times as bright each channel is in the long exposure: quotients of sums, (B, 3).

    Pixels count where all six values are above ``least``. Clipped ones count as well: they carry the signal.

    Args:
        long, short: exposures of the same scene (B, 3, H, W).
        mask: (B, 1, H, W) bool, True where a pixel counts.
        least: smallest value.

    Raises:
        ValueError: the images have other or different shapes, or one of them has no valid pixel.
    """
    long, short, valid = _valid(long, short, mask, least)
    return (long * valid).sum((2, 3)) / (short * valid).sum((2, 3))


def dual_exposure_feature(
    long: Tensor,
    short: Tensor,
    kind: Feature = "uv",
    mask: Tensor | None = None,
    *,
    ratio: Tensor | float | None = None,
    least: float = _LEAST,
) -> Tensor:
    """The dual-exposure feature: how the colours change between two exposures.

    ``uv``: (ln q_G / q_R, ln q_G / q_B) of the `channel_ratios` q. Where a channel clips in the long exposure or sinks
    into the noise of the short one, it moves off 0. ``matrix``: the matrix M (3 x 3, row by row) that takes the short
    exposure, times the ratio of the exposures, to the long one with the least squares. ``concat``: both.

    Args:
        long, short: exposures of the same scene (B, 3, H, W), linear, in [0, 1].
        kind: of the feature.
        mask: (B, 1, H, W) bool, True where a pixel counts.
        ratio: exposure of the long frame over that of the short one, a number or (B); used by ``matrix`` and estimated
            by `exposure_ratio` when left out.
        least: a pixel counts where all six values are above it.

    Returns:
        (B, 2), (B, 9) or (B, 11), in the type of ``long``.

    Raises:
        UnknownName: there is no such kind.
        ValueError: the images have other or different shapes, or one of them has no valid pixel.
    """
    if kind not in get_args(Feature):
        raise unknown("kind of the feature", str(kind), get_args(Feature))
    parts = []
    if kind != "matrix":
        red, green, blue = channel_ratios(long, short, mask, least=least).log().unbind(1)
        parts.append(torch.stack([green - red, green - blue], 1))
    if kind != "uv":
        parts.append(_colour_matrix(long, short, mask, ratio, least).flatten(1))
    return torch.cat([part.to(long.dtype) for part in parts], 1)


def exposure_ratio(long: Tensor, short: Tensor, mask: Tensor | None = None) -> Tensor:
    """How many times as long the long exposure is, estimated from pixels that are neither dark nor clipped, (B).

    Raises:
        ValueError: the images have other or different shapes, or there is no such pixel.
    """
    clear = (long < _CLIPPED).all(1, keepdim=True)
    ratios = channel_ratios(long, short, clear if mask is None else clear & mask)
    return ratios.log().mean(1).exp()


def _valid(long: Tensor, short: Tensor, mask: Tensor | None, least: float) -> tuple[Tensor, Tensor, Tensor]:
    for name, image in (("long", long), ("short", short)):
        check_images(image, name)
    if long.shape != short.shape:
        raise ValueError(f"long and short must have the same shape, got {tuple(long.shape)} and {tuple(short.shape)}")
    valid = ((long > least) & (short > least)).all(1, keepdim=True)
    if mask is not None:
        valid = valid & mask
    if not valid.flatten(1).any(1).all():
        raise ValueError(f"long and short have no valid pixels: none has all six values above {least:g}")
    dtype = work_type(long, short)
    return long.to(dtype), short.to(dtype), valid.to(dtype)


def _colour_matrix(
    long: Tensor, short: Tensor, mask: Tensor | None, ratio: Tensor | float | None, least: float
) -> Tensor:
    k = torch.as_tensor(exposure_ratio(long, short, mask) if ratio is None else ratio)
    long, short, valid = _valid(long, short, mask, least)
    # Normal equations square the condition, hence double precision; the pseudo-inverse serves images of one colour.
    target, source = (image.double().flatten(2) for image in (long * valid, short * valid))
    source = source * k.to(source).reshape(-1, 1, 1)
    return target @ source.mT @ torch.linalg.pinv(source @ source.mT, hermitian=True)


# -- one image ---------------------------------------------------------------------------------------------------------


def gray_world(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean colour of images (B, 3, H, W) as unit vectors (B, 3) (Buchsbaum, 1980).

    Raises:
        ValueError: x is no batch of images, or no pixel counts.
    """
    return shades_of_gray(x, 1, mask)


def shades_of_gray(x: Tensor, power: float = 6, mask: Tensor | None = None) -> Tensor:
    """The Minkowski mean of each channel, as unit vectors (B, 3) (Finlayson, Trezzi, 2004).

    Args:
        x: linear images (B, 3, H, W) from 0 on.
        power: 1 is gray world; the larger, the nearer to `white_patch`.
        mask: (B, 1, H, W) bool, True where a pixel counts.

    Raises:
        ValueError: x is no batch of images, the power is below 1, or no pixel counts.
    """
    check_images(x)
    if not 1 <= power < math.inf:
        raise ValueError(f"power must be at least 1, got {power}")
    return _unit(_minkowski(x.to(work_type(x)), power, mask))


def white_patch(x: Tensor, percentile: float = 100, mask: Tensor | None = None) -> Tensor:
    """The brightest value of each channel, as unit vectors (B, 3) (Land, McCann, 1971).

    Args:
        x: linear images (B, 3, H, W) from 0 on.
        percentile: 100 is the maximum; a little less is safe against single clipped pixels.
        mask: (B, 1, H, W) bool, True where a pixel counts.

    Raises:
        ValueError: x is no batch of images, the percentile is out of range, or no pixel counts.
    """
    check_images(x)
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile must be above 0 and at most 100, got {percentile}")
    values = x.to(work_type(x)).flatten(2)
    if mask is not None:
        _check_counted(mask)
        values = torch.where(mask.expand(len(x), 1, *x.shape[2:]).flatten(2), values, torch.nan)
    if percentile == 100:
        return _unit(values.nan_to_num(-math.inf).amax(2))
    return _unit(torch.stack([image.nanquantile(percentile / 100, 1) for image in values]))


def gray_edge(x: Tensor, order: int = 1, power: float = 6, sigma: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """The Minkowski mean of the edges of each channel, as unit vectors (B, 3) (van de Weijer, Gevers, Gijsenij, 2007).

    Args:
        x: linear images (B, 3, H, W) from 0 on.
        order: of the derivatives: 1 or 2.
        power: of the Minkowski mean, at least 1.
        sigma: of the Gaussian whose derivatives are taken, in pixels.
        mask: (B, 1, H, W) bool, True where a pixel counts.

    Raises:
        ValueError: x is no batch of images, a value is out of range, or no pixel counts.
    """
    check_images(x)
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order}")
    if not 0 < sigma < math.inf or not 1 <= power < math.inf:
        raise ValueError(f"sigma must be positive and power at least 1, got {sigma} and {power}")
    x = x.to(work_type(x))
    if order == 1:
        squares = _derived(x, 1, 0, sigma).square() + _derived(x, 0, 1, sigma).square()
    else:
        squares = _derived(x, 2, 0, sigma).square() + _derived(x, 0, 2, sigma).square()
        squares = squares + 4 * _derived(x, 1, 1, sigma).square()
    return _unit(_minkowski(squares.sqrt(), power, mask))


def _derived(x: Tensor, down: int, right: int, sigma: float) -> Tensor:
    """The image convolved with a derivative of a Gaussian; it goes on beyond its border with its border pixels."""
    radius = max(1, math.ceil(3 * sigma))
    place = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    bell = torch.exp(-0.5 * (place / sigma) ** 2)
    bell = bell / bell.sum()
    slopes = {0: bell, 1: -place / sigma**2 * bell, 2: (place**2 / sigma**4 - 1 / sigma**2) * bell}
    slopes[2] = slopes[2] - slopes[2].mean()
    flat = F.pad(x.flatten(0, 1)[:, None], (radius,) * 4, mode="replicate")
    rows = F.conv2d(flat, slopes[down].view(1, 1, -1, 1))
    return F.conv2d(rows, slopes[right].view(1, 1, 1, -1)).view_as(x)


def _minkowski(x: Tensor, power: float, mask: Tensor | None) -> Tensor:
    if mask is None:
        return x.pow(power).mean((2, 3)).pow(1 / power)
    _check_counted(mask)
    counted = mask.expand(len(x), 1, *x.shape[2:]).to(x.dtype)
    return ((x.pow(power) * counted).sum((2, 3)) / counted.sum((2, 3))).pow(1 / power)


def _check_counted(mask: Tensor) -> None:
    if not mask.flatten(1).any(1).all():
        raise ValueError("mask must leave a pixel of each image, got none")


def _unit(rgb: Tensor) -> Tensor:
    return rgb / rgb.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(rgb.dtype).tiny)


#: Estimates that learn nothing, by name: of images (B, 3, H, W) and a mask or None, unit vectors (B, 3).
STATISTICAL: dict[str, Callable[..., Tensor]] = {
    "gray world": gray_world,
    "shades of gray": partial(shades_of_gray, power=6),
    "white patch": partial(white_patch, percentile=99.0),
    "gray edge": partial(gray_edge, order=1, power=6, sigma=1.0),
}


# -- errors ------------------------------------------------------------------------------------------------------------


def angular_error(predicted: Tensor, truth: Tensor, form: Literal["exact", "shrunk", "c5"] = "exact") -> Tensor:
    """The angle between colours (..., 3) in degrees.

    Args:
        predicted, truth: colours of any length above 0.
        form: "exact", to measure by, without a usable gradient where both agree; "shrunk", to learn by: the arc cosine
            of 0.9999999 times the cosine, 2.6e-2 degrees where both agree; "c5", the same with 22 / 7 for pi, as C5's
            code trains, 0.04 % less.

    Raises:
        ValueError: the shapes do not fit, or form is unknown.
    """
    if predicted.shape[-1:] != (3,) or truth.shape[-1:] != (3,):
        shapes = f"{tuple(predicted.shape)} and {tuple(truth.shape)}"
        raise ValueError(f"predicted and truth must be (..., 3), got {shapes}")
    if form not in ("exact", "shrunk", "c5"):
        raise unknown("form of the angular error", form, ("exact", "shrunk", "c5"))
    with without_autocast(predicted):
        first, second = (_unit(colour.to(work_type(colour))) for colour in (predicted, truth))
        if form == "exact":
            # The arc cosine loses small angles; this form does not.
            return 2 * torch.rad2deg(torch.atan2((first - second).norm(dim=-1), (first + second).norm(dim=-1)))
        cosine = (first * second).sum(-1).clamp(-1, 1) * _SHRINK
        return cosine.acos() * (180 / math.pi if form == "shrunk" else 180 * 7 / 22)


def reproduction_error(predicted: Tensor, truth: Tensor) -> Tensor:
    """The angle in degrees between white and what a white surface becomes when it is corrected by the predicted light.

    (Finlayson, Zakizadeh, Gijsenij, "The reproduction angular error", 2017.)

    Args:
        predicted, truth: colours (..., 3) above 0.

    Raises:
        ValueError: the shapes do not fit.
    """
    if predicted.shape[-1:] != (3,) or truth.shape[-1:] != (3,):
        shapes = f"{tuple(predicted.shape)} and {tuple(truth.shape)}"
        raise ValueError(f"predicted and truth must be (..., 3), got {shapes}")
    reproduced = truth / predicted
    return angular_error(reproduced, torch.ones_like(reproduced))


def error_statistics(errors: Tensor) -> dict[str, float]:
    """What the literature tells of errors (N): mean, median, trimean, best 25 %, worst 25 %, worst 5 %, max.

    The best and worst are means of the errors up to the first and from the third quartile and the 95th percentile on;
    the trimean is (Q1 + 2 Q2 + Q3) / 4.

    Raises:
        ValueError: there is no error.
    """
    if errors.dim() != 1 or not len(errors):
        raise ValueError(f"errors must be (N) with N of at least 1, got {tuple(errors.shape)}")
    errors = errors.double()
    levels = torch.tensor([0.25, 0.5, 0.75, 0.95], dtype=torch.float64, device=errors.device)
    first, median, third, high = errors.quantile(levels)
    found = {
        "mean": errors.mean(),
        "median": median,
        "trimean": (first + 2 * median + third) / 4,
        "best 25 %": errors[errors <= first].mean(),
        "worst 25 %": errors[errors >= third].mean(),
        "worst 5 %": errors[errors >= high].mean(),
        "max": errors.max(),
    }
    return {name: float(value) for name, value in found.items()}


def apply_white_balance(x: Tensor, illuminant: Tensor) -> Tensor:
    """Linear images (B, 3, H, W) as under white light: each channel over the light's, green as it is. Nothing is cut.

    Args:
        x: images.
        illuminant: colour of the light (B, 3) or (3), above 0.

    Raises:
        ValueError: x is no batch of images, or the illuminant has another shape or is not positive.
    """
    check_images(x)
    if illuminant.shape not in ((3,), (len(x), 3)) or not bool((illuminant > 0).all()):
        raise ValueError(f"illuminant must be ({len(x)}, 3) or (3) and positive, got {tuple(illuminant.shape)}")
    gains = illuminant[..., 1:2] / illuminant
    return x * gains.to(x).reshape(-1, 3, 1, 1)
