"""Histograms of the colours of an image, as convolutional colour constancy sees them: log-chroma, gradients.

Barron: "Convolutional Color Constancy", ICCV 2015, arXiv 1507.00410 (CCC). Barron, Tsai: "Fast Fourier Color
Constancy", CVPR 2017, arXiv 1611.07596 (FFCC). Afifi, Barron, LeGendre, Tsai, Bleibel: "Cross-Camera Convolutional
Color Constancy", ICCV 2021, arXiv 2011.11890 (C5).

A tint of the light moves a histogram of log-chroma as a whole, so that finding the light is finding a place.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.ops.backend import Backends
from convatlas.ops.fourier import work_type
from convatlas.ops.precision import without_autocast

__all__ = [
    "BOUNDARY",
    "check_bins",
    "check_images",
    "local_gradient",
    "log_chroma_axis",
    "log_chroma_histogram",
    "log_chroma_to_rgb",
    "rgb_to_log_chroma",
    "valid_pixels",
    "wrapped_log_chroma_histogram",
]

#: Largest |u| and |v| of the histograms of C5.
BOUNDARY = 2.85
#: Keeps logarithms, quotients and darkness finite; as C5 has it.
_EPSILON = 1e-9
#: Pixels of which a channel is darker do not count in the wrapped form.
_LEAST_INTENSITY = 1 / 256


def rgb_to_log_chroma(rgb: Tensor, epsilon: float = _EPSILON) -> Tensor:
    """u = ln G - ln R and v = ln G - ln B of colours (..., 3), as (..., 2).

    Raises:
        ValueError: rgb has another shape or is not floating point.
    """
    if not rgb.is_floating_point() or rgb.dim() < 1 or rgb.shape[-1] != 3:
        raise ValueError(f"rgb must be (..., 3) and floating point, got {tuple(rgb.shape)} {rgb.dtype}")
    red, green, blue = (rgb + epsilon).log().unbind(-1)
    return torch.stack([green - red, green - blue], -1)


def log_chroma_to_rgb(uv: Tensor) -> Tensor:
    """The colours (..., 3) of unit length whose log-chroma is uv (..., 2): (e^-u, 1, e^-v) over its length.

    Raises:
        ValueError: uv has another shape or is not floating point.
    """
    if not uv.is_floating_point() or uv.dim() < 1 or uv.shape[-1] != 2:
        raise ValueError(f"uv must be (..., 2) and floating point, got {tuple(uv.shape)} {uv.dtype}")
    with without_autocast(uv):
        red, blue = (-uv).exp().unbind(-1)
        rgb = torch.stack([red, torch.ones_like(red), blue], -1)
        return rgb / rgb.norm(dim=-1, keepdim=True)


def local_gradient(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """How much each pixel differs from its neighbours: the mean over the eight of the absolute differences.

    The image goes on beyond its border with its border pixels. With a mask only neighbours that count are averaged over
    (the local absolute deviation of FFCC), and what lies under the mask or has no such neighbour is 0.

    Args:
        x: images (..., C, H, W), floating point.
        mask: (..., 1, H, W) bool, True where a pixel counts.

    Returns:
        The shape and type of x.

    Raises:
        ValueError: x has fewer than three dimensions, or the mask has another shape.
    """
    if x.dim() < 3 or not x.is_floating_point():
        raise ValueError(f"x must be (..., C, H, W) and floating point, got {tuple(x.shape)} {x.dtype}")
    _check_mask(x, mask)
    height, width = x.shape[-2:]
    flat = x.reshape(-1, *x.shape[-3:])
    padded = F.pad(flat, (1, 1, 1, 1), mode="replicate")
    shifts = [(i, j) for i in range(3) for j in range(3) if (i, j) != (1, 1)]
    if mask is None:
        total = torch.zeros_like(flat)
        for i, j in shifts:
            total = total + (flat - padded[..., i : i + height, j : j + width]).abs()
        return (total / len(shifts)).reshape(x.shape)
    counted = mask.to(x.dtype).expand(*x.shape[:-3], 1, height, width).reshape(-1, 1, height, width)
    weights = F.pad(counted, (1, 1, 1, 1), mode="replicate")
    total, count = torch.zeros_like(flat), torch.zeros_like(counted)
    for i, j in shifts:
        weight = weights[..., i : i + height, j : j + width]
        total = total + weight * (flat - padded[..., i : i + height, j : j + width]).abs()
        count = count + weight
    return (counted * total / count.clamp(min=1)).reshape(x.shape)


def log_chroma_axis(bins: int, boundary: float = BOUNDARY, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """The centres of the bins from -boundary to +boundary, rising.

    Raises:
        ValueError: bins is no even number, or boundary is not positive.
    """
    check_bins(bins)
    if not 0 < boundary < math.inf:
        raise ValueError(f"boundary must be positive, got {boundary}")
    step = 2 * boundary / (bins - 1)
    return (torch.arange(bins, dtype=torch.float64) * step - boundary).to(dtype)


# -- C5 ----------------------------------------------------------------------------------------------------------------


def _no_pixels(x: Tensor, *_: object) -> str:
    return "scatter" if x.numel() > 0 else "naive"


_HISTOGRAM = Backends("log_chroma_histogram", _no_pixels)


def log_chroma_histogram(
    x: Tensor, bins: int = 32, boundary: float = BOUNDARY, mask: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """The square root of the normalised histogram of log-chroma, as C5 has it.

    A pixel adds its intensity, the length of its colour, to every bin (row i, column j) with 0 < abs(v - A_v(i)) <=
    step and 0 < abs(u - A_u(j)) <= step, mostly four of them. A_u rises along the columns, A_v falls along the rows. A
    pixel that hits a centre exactly is not counted in that bin, and one whose channels sum up to at most 1e-9 nowhere.

    Args:
        x: linear images (B, 3, H, W) from 0 on, floating point; computed in float32 at least.
        bins: of each axis, an even number.
        boundary: largest abs(u) and abs(v) of a centre.
        mask: (B, 1, H, W) or (1, 1, H, W) bool, True where a pixel counts; all count when left out.
        backend: "naive" (each pixel beside each bin), "scatter" or "auto".

    Returns:
        (B, bins, bins) in the type of x: squares sum up to 1, or 0 where no pixel counts.

    Raises:
        ValueError: an argument has another shape or type or is out of range.
    """
    check_images(x)
    check_bins(bins)
    _check_mask(x, mask)
    if not 0 < boundary < math.inf:
        raise ValueError(f"boundary must be positive, got {boundary}")
    return _HISTOGRAM.run(backend, x, bins, boundary, mask)


@_HISTOGRAM.register("naive")
def _naive(x: Tensor, bins: int, boundary: float, mask: Tensor | None) -> Tensor:
    with without_autocast(x):
        u, v, weight = _weighted(x, mask)
        axis = log_chroma_axis(bins, boundary, dtype=u.dtype).to(u.device)
        step = 2 * boundary / (bins - 1)
        column, row = (u[..., None] - axis).abs(), (v[..., None] - axis.flip(0)).abs()
        columns, rows = (((d > 0) & (d <= step)).to(u.dtype) for d in (column, row))
        counts = (rows * weight[..., None]).mT @ columns
        return _root_share(counts).to(x.dtype)


@_HISTOGRAM.register("scatter")
def _scatter(x: Tensor, bins: int, boundary: float, mask: Tensor | None) -> Tensor:
    """Each pixel is added once, to the cell of the bins that it counts in; a small product then deals the cells out.

    The nearest centre and whether the pixel is within a step of it and of the two beside it make the cell of an axis.
    These are the comparisons of the definition itself, so that both count every pixel in the same bins.
    """
    with without_autocast(x):
        u, v, weight = _weighted(x, mask)
        axis = log_chroma_axis(bins, boundary, dtype=u.dtype).to(u.device)
        step = 2 * boundary / (bins - 1)
        cell = _cells(v, axis, step).mul_(8 * (bins + 2)).add_(_cells(u, axis, step))
        size = 8 * (bins + 2)
        counts = torch.zeros(len(x), size * size, dtype=u.dtype, device=u.device).scatter_add(1, cell, weight)
        table = _membership(bins, u)
        dealt = table.mT @ counts.view(-1, size, size) @ table
        return _root_share(dealt.flip(1)).to(x.dtype)


def _weighted(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """u, v and intensity of every pixel (B, H * W); the intensity is 0 where it is not to count."""
    x = x.to(work_type(x)).flatten(2)
    red, green, blue = (x.detach() + _EPSILON).log().unbind(1)
    lit = x.detach().sum(1) > _EPSILON
    if mask is not None:
        lit = lit & mask.expand(len(x), *mask.shape[1:]).flatten(1)
    # The length of a dark pixel has no gradient: it is taken of ones instead and left out.
    weight = torch.where(lit, torch.where(lit[:, None], x, 1.0).square().sum(1).sqrt(), 0.0)
    return green - red, green - blue, weight


def _cells(values: Tensor, axis: Tensor, step: float) -> Tensor:
    """The nearest centre (one beyond the axis for what lies outside) and three bits, as one number."""
    bins = len(axis)
    near = ((values - axis[0]) / step).round().clamp(-1, bins).long()
    beyond = values.new_full((2,), math.inf)
    padded = torch.cat([beyond, axis, beyond])
    cell = (near + 1) * 8
    for bit, offset in enumerate((-1, 0, 1)):
        distance = (values - padded[near + (2 + offset)]).abs_()
        cell += ((distance > 0) & (distance <= step)).long() << bit
    return cell


def _membership(bins: int, like: Tensor) -> Tensor:
    """Which bins each cell counts in, (8 * (bins + 2), bins)."""
    near, bit = torch.arange(-1, bins + 1), torch.arange(3)
    bits = (torch.arange(8)[:, None] >> bit) & 1
    hit = (near[:, None] + bit - 1)[..., None] == torch.arange(bins)
    table = torch.einsum("kb,nbj->nkj", bits.double(), hit.double()).reshape(8 * (bins + 2), bins)
    return table.to(like)


def _root_share(counts: Tensor) -> Tensor:
    share = counts / (counts.sum((1, 2), keepdim=True) + _EPSILON)
    # The root of an empty bin is 0 and stays so for small changes of the pixels that lie in others.
    full = share > 0
    return torch.where(full, torch.where(full, share, 1.0).sqrt(), 0.0)


# -- FFCC --------------------------------------------------------------------------------------------------------------


_WRAPPED = Backends("wrapped_log_chroma_histogram", _no_pixels)


def wrapped_log_chroma_histogram(
    x: Tensor,
    bins: int = 64,
    bin_size: float = 1 / 32,
    start: tuple[float, float] = (-1.0, -1.0),
    mask: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """The histogram of log-chroma on a torus, as FFCC has it: each pixel counts 1, shared out among four bins.

    u runs along the rows and v along the columns; what lies beyond the range comes in again at the other side. Pixels
    of which a channel is below 1/256 do not count.

    Args:
        x: linear images (B, 3, H, W) from 0 on, floating point; computed in float32 at least.
        bins: of each axis, an even number.
        bin_size: extent of a bin in u and v.
        start: u and v of the centres of the first bins; `histogram_start` fits it to the lights of a camera.
        mask: (B, 1, H, W) or (1, 1, H, W) bool, True where a pixel counts; all count when left out.
        backend: "naive" (each pixel beside each bin), "scatter" or "auto".

    Returns:
        (B, bins, bins) in the type of x: sums up to 1, or 0 where no pixel counts.

    Raises:
        ValueError: an argument has another shape or type or is out of range.
    """
    check_images(x)
    check_bins(bins)
    _check_mask(x, mask)
    if not 0 < bin_size < math.inf:
        raise ValueError(f"bin_size must be positive, got {bin_size}")
    return _WRAPPED.run(backend, x, bins, bin_size, start, mask)


@_WRAPPED.register("naive")
def _wrapped_naive(x: Tensor, bins: int, bin_size: float, start: tuple[float, float], mask: Tensor | None) -> Tensor:
    with without_autocast(x):
        places, counts = _places(x, bin_size, start, mask)
        number = torch.arange(bins, dtype=places.dtype, device=x.device)
        away = (places[..., None] - number + bins / 2).remainder(bins) - bins / 2
        share = (1 - away.abs()).clamp(min=0)
        total = (share[:, 0] * counts[..., None]).mT @ share[:, 1]
        return (total / counts.sum(1).clamp(min=1)[:, None, None]).to(x.dtype)


@_WRAPPED.register("scatter")
def _wrapped_scatter(x: Tensor, bins: int, bin_size: float, start: tuple[float, float], mask: Tensor | None) -> Tensor:
    with without_autocast(x):
        places, counts = _places(x, bin_size, start, mask)
        low = places.detach().floor()
        after, first = places - low, low.long()
        total = torch.zeros(len(x), bins * bins, dtype=places.dtype, device=x.device)
        for down in (0, 1):
            row = (first[:, 0] + down).remainder(bins) * bins
            weight = (after[:, 0] if down else 1 - after[:, 0]) * counts
            for right in (0, 1):
                column = (first[:, 1] + right).remainder(bins)
                share = after[:, 1] if right else 1 - after[:, 1]
                total = total.scatter_add(1, row + column, weight * share)
        return (total.view(-1, bins, bins) / counts.sum(1).clamp(min=1)[:, None, None]).to(x.dtype)


def _places(x: Tensor, bin_size: float, start: tuple[float, float], mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where each pixel lies in bins, (B, 2, H * W), and whether it counts, (B, H * W)."""
    x = x.to(work_type(x))
    bright = valid_pixels(x.detach(), _LEAST_INTENSITY)
    if mask is not None:
        bright = bright & mask
    bright, x = bright.flatten(1), x.flatten(2)
    red, green, blue = torch.where(bright[:, None], x, 1.0).log().unbind(1)
    origin = x.new_tensor(start)[:, None]
    return (torch.stack([green - red, green - blue], 1) - origin) / bin_size, bright.to(x.dtype)


# -- arguments ---------------------------------------------------------------------------------------------------------


def valid_pixels(x: Tensor, least: float) -> Tensor:
    """Where all channels of images (..., C, H, W) are at least some value, (..., 1, H, W) bool."""
    return (x >= least).all(-3, keepdim=True)


def check_images(x: Tensor, name: str = "x") -> None:
    """Refuse what is no batch of floating-point images (B, 3, H, W).

    Raises:
        ValueError: it is not.
    """
    if x.dim() != 4 or x.shape[1] != 3 or not x.is_floating_point():
        raise ValueError(f"{name} must be (B, 3, H, W) and floating point, got {tuple(x.shape)} {x.dtype}")


def check_bins(bins: int) -> None:
    """Refuse a number of bins that is not even and at least 4.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(bins, int) or bins < 4 or bins % 2:
        raise ValueError(f"bins must be an even number of at least 4, got {bins}")


def _check_mask(x: Tensor, mask: Tensor | None) -> None:
    if mask is None:
        return
    wanted = (*x.shape[:-3], 1, *x.shape[-2:])
    leads = len(mask.shape) == len(wanted) and all(
        have in (1, want) for have, want in zip(mask.shape[:-3], wanted[:-3], strict=True)
    )
    if mask.dtype != torch.bool or not leads or mask.shape[-3:] != wanted[-3:]:
        raise ValueError(f"mask must be {wanted} bool, got {tuple(mask.shape)} {mask.dtype}")
