"""Resizing images, signals and volumes with the exact conventions of MATLAB, OpenCV and Pillow.

The three differ in where they sample, in the kernel, in what they do beyond the border and in whether they smooth
before they shrink; the same "bicubic" gives results up to half a decibel apart. All are separable and linear: each axis
is a matrix whose rows sum to one, built in float64 for every call.

Sources: MATLAB's ``imresize``; Keys, "Cubic convolution interpolation for digital image processing", 1981; OpenCV's
``resize``; Pillow's ``Image.resize``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from convatlas.errors import unknown
from convatlas.ops.precision import without_autocast

__all__ = ["Convention", "Interpolation", "resize", "resize_matrix"]

Convention = Literal["matlab", "opencv", "pillow"]
Interpolation = Literal["nearest", "box", "bilinear", "bicubic", "lanczos", "area"]
Kernel = Callable[[Tensor], Tensor]

_PILLOW_BITS = 22  # of the fraction of Pillow's integer weights
_OPENCV_BITS = 11
_BLOCK = 128  # rows of a matrix at a time
_AT_ONCE, _LEAST_ROWS = 1 << 17, 8  # numbers of a result of bytes that are worked on at once, and its rows


class _Taps(NamedTuple):
    """Sparse rows of the matrix of one axis: output i is the sum over t of weights[i, t] * x[indices[i, t]]."""

    indices: Tensor
    weights: Tensor


class _Axis(NamedTuple):
    dim: int  # from the end
    length: int
    wanted: int
    scale: float  # output samples for each input sample


def resize(
    x: Tensor,
    size: int | Sequence[int] | None = None,
    *,
    scale: float | Sequence[float] | None = None,
    convention: Convention,
    interpolation: Interpolation = "bicubic",
    antialias: bool | None = None,
) -> Tensor:
    """Resize the last axes of a tensor as MATLAB, OpenCV or Pillow does.

    float32 and float64 are computed as they are, half precision in float32, and no value is clipped. uint8 is rounded
    as the convention does it: Pillow after each axis in its fixed point (bit-equal to version 13), MATLAB after each
    axis with halves up, OpenCV in its fixed point (bit-equal but for single pixels of "area"; builds with Intel's
    library differ by at most 1 in "bicubic"). OpenCV rounds the sample positions of most floating-point images to
    single precision, this function does not: at 2000 pixels they differ by up to 1e-4 of the contrast. Differentiable
    for floating point.

    Args:
        x: (..., *axes), for images (B, C, H, W) or (H, W); floating point or uint8.
        size: wanted lengths of the last axes, for images (height, width); a number stands for a single axis.
        scale: instead of size, the factors of the last axes; a number stands for height and width. MATLAB rounds the
            lengths up, OpenCV to the nearest even at halves, and both sample by the factor that was given; Pillow has
            only sizes, here the nearest to the factor.
        convention: "matlab" (imresize), "opencv" (cv2.resize) or "pillow" (Image.resize).
        interpolation: "nearest", "bilinear", "bicubic", "lanczos" (OpenCV: of 8 samples, the others of 6), "box" (not
            OpenCV) or "area" (OpenCV only).
        antialias: widen the kernel when an axis shrinks. MATLAB's choice, by default made except for "nearest"; Pillow
            always does it except for "nearest", OpenCV never.

    Returns:
        (..., *size) in the type of x.

    Raises:
        ValueError: x, a size, a factor or an option is out of range or does not belong to the convention.
    """
    antialias = _checked(convention, interpolation, antialias)
    axes = _axes(x, size, scale, convention)
    if not x.is_floating_point() and x.dtype != torch.uint8:
        raise ValueError(f"x must be floating point or uint8, got {x.dtype}")
    if x.dtype == torch.uint8:
        return _RESIZE_BYTES[convention](x, axes, interpolation, antialias)
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    enlarge = _some_axis_grows(axes)
    for axis in _order(axes, convention):
        if axis.length != axis.wanted or axis.scale != 1:
            values = _apply(values, _taps(axis, convention, interpolation, antialias, enlarge=enlarge), axis.dim)
    return values.to(x.dtype)


def resize_matrix(
    length: int,
    size: int,
    *,
    convention: Convention,
    interpolation: Interpolation = "bicubic",
    antialias: bool | None = None,
) -> Tensor:
    """The matrix (size, length) in float64 that `resize` multiplies one axis with; its rows sum to one.

    Args:
        length: samples that there are.
        size: samples wanted.
        convention: as in `resize`.
        interpolation: as in `resize`.
        antialias: as in `resize`.

    Raises:
        ValueError: a length is not positive, or an option does not belong to the convention.
    """
    antialias = _checked(convention, interpolation, antialias)
    if length < 1 or size < 1:
        raise ValueError(f"length and size must be positive, got {length} and {size}")
    axis = _Axis(-1, length, size, size / length)
    return _dense(_taps(axis, convention, interpolation, antialias, enlarge=size > length), length)


def _checked(convention: str, interpolation: str, antialias: bool | None) -> bool:
    """Check the names, and fill in whether the kernel widens when an axis shrinks."""
    if convention not in _INTERPOLATIONS:
        raise unknown("convention", convention, _INTERPOLATIONS)
    if interpolation not in _INTERPOLATIONS[convention]:
        raise unknown(f"interpolation of convention {convention!r}", interpolation, _INTERPOLATIONS[convention])
    own = convention != "opencv" and interpolation != "nearest"
    if antialias not in (None, own) and convention != "matlab":
        raise ValueError(f"antialias is a choice of convention 'matlab' only, got {antialias} with {convention!r}")
    return own if antialias is None else antialias


def _axes(
    x: Tensor, size: int | Sequence[int] | None, scale: float | Sequence[float] | None, convention: str
) -> list[_Axis]:
    if (size is None) == (scale is None):
        raise ValueError(f"give either size or scale, got size={size} and scale={scale}")
    if scale is not None:
        factors = (scale, scale) if isinstance(scale, int | float) else tuple(scale)
        sizes: tuple[int, ...] | None = None
        count = len(factors)
    elif size is not None:
        sizes = (size,) if isinstance(size, int) else tuple(size)
        count = len(sizes)
    if not 1 <= count <= x.dim():
        raise ValueError(f"x of shape {tuple(x.shape)} must have an axis for each of the {count} given")
    lengths = tuple(x.shape[-count:])
    if min(lengths) < 1:
        raise ValueError(f"x must not be empty, got shape {tuple(x.shape)}")
    if sizes is None:
        if not all(math.isfinite(factor) and factor > 0 for factor in factors):
            raise ValueError(f"scale must be positive, got {scale}")
        round_up = convention == "matlab"
        products = [length * factor for length, factor in zip(lengths, factors, strict=True)]
        sizes = tuple(max(1, math.ceil(product) if round_up else round(product)) for product in products)
    if min(sizes) < 1:
        raise ValueError(f"size must be positive, got {size}")
    if scale is None or convention == "pillow":
        factors = tuple(wanted / length for wanted, length in zip(sizes, lengths, strict=True))
    dims = range(-count, 0)
    return [_Axis(*parts) for parts in zip(dims, lengths, sizes, factors, strict=True)]


def _order(axes: list[_Axis], convention: str) -> list[_Axis]:
    """The order of the passes, which matters where each is rounded and clipped."""
    if convention == "matlab":  # the axis that shrinks most, the first of equals
        return sorted(axes, key=lambda axis: axis.scale)
    if len(axes) > 1:  # Pillow since version 13: the height first where it loses more than twice what the width does
        height, width = (axis.length - axis.wanted for axis in axes[-2:])
        if height > max(0, 2 * width):
            return [axes[-2], axes[-1], *axes[-3::-1]]
    return axes[::-1]


def _some_axis_grows(axes: list[_Axis]) -> bool:
    return any(axis.scale > 1 for axis in axes)


# The taps of one axis.


def _box(distance: Tensor) -> Tensor:
    return ((distance >= -0.5) & (distance < 0.5)).to(distance.dtype)


def _box_closed_right(distance: Tensor) -> Tensor:
    return ((distance > -0.5) & (distance <= 0.5)).to(distance.dtype)


def _triangle(distance: Tensor) -> Tensor:
    return (1 - distance.abs()).clamp(min=0)


def _keys(a: float) -> Kernel:
    def kernel(distance: Tensor) -> Tensor:
        x = distance.abs()
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = (((x - 5) * x + 8) * x - 4) * a
        return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))

    return kernel


def _lanczos(lobes: int) -> Kernel:
    return lambda x: torch.where(x.abs() < lobes, torch.sinc(x) * torch.sinc(x / lobes), 0.0)


#: Kernel and half of its width by interpolation.
_MATLAB: dict[str, tuple[Kernel, float]] = {
    "nearest": (_box, 0.5),
    "box": (_box, 0.5),
    "bilinear": (_triangle, 1.0),
    "bicubic": (_keys(-0.5), 2.0),
    "lanczos": (_lanczos(3), 3.0),
}
_PILLOW: dict[str, tuple[Kernel, float]] = {**_MATLAB, "box": (_box_closed_right, 0.5)}
_INTERPOLATIONS: dict[str, tuple[str, ...]] = {
    "matlab": tuple(_MATLAB),
    "opencv": ("nearest", "bilinear", "bicubic", "lanczos", "area"),
    "pillow": tuple(_PILLOW),
}


def _taps(
    axis: _Axis,
    convention: Convention,
    interpolation: Interpolation,
    antialias: bool,
    *,
    enlarge: bool = False,
    single_precision: bool = False,
) -> _Taps:
    if convention == "matlab":
        return _matlab_taps(axis, *_MATLAB[interpolation], antialias)
    if convention == "opencv":
        return _opencv_taps(axis, interpolation, enlarge, single_precision)
    if interpolation == "nearest":
        return _pillow_nearest(axis)
    return _pillow_taps(axis, *_PILLOW[interpolation])


def _positions(axis: _Axis) -> Tensor:
    return torch.arange(axis.wanted, dtype=torch.float64)


def _matlab_taps(axis: _Axis, kernel: Kernel, support: float, antialias: bool) -> _Taps:
    stretch = max(1.0, 1 / axis.scale) if antialias else 1.0
    centre = (_positions(axis) + 1) / axis.scale + 0.5 * (1 - 1 / axis.scale)  # counted from 1
    first = torch.floor(centre - support * stretch)
    indices = first[:, None] + torch.arange(math.ceil(2 * support * stretch) + 2)
    weights = kernel((centre[:, None] - indices) / stretch)
    weights = weights / weights.sum(1, keepdim=True)
    mirrored = torch.cat([torch.arange(axis.length), torch.arange(axis.length - 1, -1, -1)])
    return _Taps(mirrored[(indices.long() - 1) % (2 * axis.length)], weights)


def _pillow_taps(axis: _Axis, kernel: Kernel, support: float) -> _Taps:
    step = axis.length / axis.wanted
    stretch = max(step, 1.0)
    centre = (_positions(axis) + 0.5) * step
    # Truncation, as of an integer conversion; what it leaves below zero is cut off all the same.
    first = (centre - support * stretch + 0.5).trunc().clamp(min=0)
    end = (centre + support * stretch + 0.5).trunc().clamp(max=axis.length)
    indices = first[:, None] + torch.arange(math.ceil(2 * support * stretch) + 1)
    weights = kernel((indices - centre[:, None] + 0.5) * (1 / stretch)) * (indices < end[:, None])
    weights = weights * (1 / weights.sum(1, keepdim=True))
    return _Taps(indices.long().clamp(max=axis.length - 1), weights)


def _pillow_nearest(axis: _Axis) -> _Taps:
    # Pillow adds the step up, whose rounding errors decide where a sample falls on the boundary of two pixels.
    step = axis.length / axis.wanted
    sums = itertools.accumulate(itertools.repeat(step, axis.wanted - 1), initial=step * 0.5)
    return _Taps(*_single(torch.tensor([int(position) for position in sums]), axis.length))


def _opencv_taps(axis: _Axis, interpolation: str, enlarge: bool, single_precision: bool) -> _Taps:
    step = 1 / axis.scale
    if interpolation == "nearest":
        return _Taps(*_single(torch.floor(_positions(axis) * step).long(), axis.length))
    if interpolation == "area" and not enlarge:
        return _opencv_area(axis, step)
    if interpolation == "area":  # linear between the pixels, but flat over what lies inside one
        start = torch.floor(_positions(axis) * step)
        # In single precision, because what is a rounding error below one must count as one.
        fraction = (_positions(axis) + 1 - (start + 1) * axis.scale).float().double()
        fraction = torch.where(fraction <= 0, 0.0, fraction - fraction.floor())
    else:
        position = (_positions(axis) + 0.5) * step - 0.5
        position = position.float().double() if single_precision else position
        start = position.floor()
        fraction = position - start
    if interpolation in ("bilinear", "area"):
        offsets, weights = torch.arange(0, 2), torch.stack([1 - fraction, fraction], 1)
    elif interpolation == "bicubic":
        offsets = torch.arange(-1, 3)
        weights = _keys(-0.75)(fraction[:, None] - offsets)
    else:
        offsets = torch.arange(-3, 5)
        weights = _lanczos(4)(fraction[:, None] - offsets)
        weights = weights / weights.sum(1, keepdim=True)
    return _Taps((start[:, None] + offsets).long().clamp(0, axis.length - 1), weights)


def _opencv_area(axis: _Axis, step: float) -> _Taps:
    begin = _positions(axis) * step
    end = (begin + step).clamp(max=axis.length)
    indices = begin.floor()[:, None] + torch.arange(math.ceil(step) + 1)
    weights = (torch.minimum(indices + 1, end[:, None]) - torch.maximum(indices, begin[:, None])).clamp(min=0)
    return _Taps(indices.long().clamp(max=axis.length - 1), weights / weights.sum(1, keepdim=True))


def _single(indices: Tensor, length: int) -> tuple[Tensor, Tensor]:
    indices = indices.clamp(max=length - 1)[:, None]
    return indices, torch.ones(indices.shape, dtype=torch.float64)


# Applying them.


def _dense(taps: _Taps, length: int) -> Tensor:
    return taps.weights.new_zeros(len(taps.indices), length).scatter_add_(1, taps.indices, taps.weights)


def _apply(x: Tensor, taps: _Taps, dim: int) -> Tensor:
    """Combine the samples of one axis; the sums are exact for whole numbers in float64."""
    flat = x.flatten(dim + 1) if dim < -2 else x
    along = max(dim, -2)
    blocks = []
    # A block of the result needs only a stretch of the input: long axes cost no more than short ones. What is compiled
    # or exported cannot look at the indices and takes one block.
    traced = torch.compiler.is_compiling()
    size = len(taps.indices) if traced else _BLOCK
    for indices, weights in zip(taps.indices.split(size), taps.weights.split(size), strict=True):
        first, last = (0, x.shape[dim] - 1) if traced else (int(indices.min()), int(indices.max()))
        matrix = _dense(_Taps(indices - first, weights), last - first + 1).to(x.dtype).to(x.device)
        part = flat.narrow(along, first, last - first + 1)
        with without_autocast(x):
            blocks.append(torch.matmul(part, matrix.T) if along == -1 else torch.matmul(matrix, part))
    result = torch.cat(blocks, along) if len(blocks) > 1 else blocks[0]
    return result if dim >= -2 else result.unflatten(-1, x.shape[dim + 1 :])


# Whole numbers.


def _to_bytes(values: Tensor) -> Tensor:
    return values.clamp(0, 255).to(torch.uint8)


def _halves_up(values: Tensor) -> Tensor:
    return torch.floor(values + 0.5)


def _matlab_bytes(x: Tensor, axes: list[_Axis], interpolation: Interpolation, antialias: bool) -> Tensor:
    for axis in _order(axes, "matlab"):
        taps = _taps(axis, "matlab", interpolation, antialias)
        x = _to_bytes(_halves_up(_apply(x.double(), taps, axis.dim)))
    return x


def _pillow_bytes(x: Tensor, axes: list[_Axis], interpolation: Interpolation, antialias: bool) -> Tensor:
    for axis in _order(axes, "pillow"):
        if axis.length == axis.wanted:
            continue
        taps = _taps(axis, "pillow", interpolation, antialias)
        whole = (taps.weights * 2**_PILLOW_BITS).abs().add(0.5).floor() * taps.weights.sign()
        sums = _apply(x.double(), _Taps(taps.indices, whole), axis.dim)
        x = _to_bytes(_halves_up(sums / 2**_PILLOW_BITS))
    return x


def _opencv_bytes(x: Tensor, axes: list[_Axis], interpolation: Interpolation, antialias: bool) -> Tensor:
    if len(axes) != 2:
        raise ValueError(f"uint8 with convention 'opencv' needs a size for height and width, got {len(axes)} axes")
    height, width = axes
    enlarge = _some_axis_grows(axes)
    rows, columns = (
        _taps(axis, "opencv", interpolation, antialias, enlarge=enlarge, single_precision=True) for axis in axes
    )
    if not torch.compiler.is_compiling():  # rows that no result looks at
        used, places = rows.indices.unique(return_inverse=True)
        x, rows = x.index_select(-2, used.to(x.device)), rows._replace(indices=places)
    if interpolation == "nearest" or (interpolation == "area" and not enlarge):
        # OpenCV has a path of its own for means of 2 x 2 pixels.
        rounded = _halves_up if height.scale == width.scale == 0.5 else lambda means: means.float().round()
        means = _apply(x.double(), columns, -1)
        return _by_rows(rows, means, lambda taps: _to_bytes(rounded(_apply(means, taps, -2))))
    rows, columns = (
        _Taps(taps.indices, torch.round(taps.weights.float() * 2**_OPENCV_BITS).double()) for taps in (rows, columns)
    )
    sums = _apply(x.double(), columns, -1)
    if interpolation in ("bicubic", "lanczos"):
        whole = 2 ** (2 * _OPENCV_BITS)
        return _by_rows(rows, sums, lambda taps: _to_bytes(_halves_up(_apply(sums, taps, -2) / whole)))
    # With two taps OpenCV drops four bits before and sixteen after each product, and so does this.
    shortened = sums.int() >> 4

    def combined(taps: _Taps) -> Tensor:
        first, second = (
            shortened.index_select(-2, taps.indices[:, tap].to(x.device)).mul_(
                taps.weights[:, tap, None].int().to(x.device)
            )
            >> 16
            for tap in range(2)
        )
        return first.add_(second).add_(2).bitwise_right_shift_(2).clamp_(0, 255).to(torch.uint8)

    return _by_rows(rows, sums, combined)


def _by_rows(taps: _Taps, x: Tensor, combined: Callable[[_Taps], Tensor]) -> Tensor:
    """Rows of a result by blocks that fit a processor's cache."""
    count = max(_LEAST_ROWS, _AT_ONCE // max(1, x[..., 0, :].numel()))
    blocks = zip(taps.indices.split(count), taps.weights.split(count), strict=True)
    return torch.cat([combined(_Taps(*block)) for block in blocks], -2)


_RESIZE_BYTES: dict[str, Callable[[Tensor, list[_Axis], Interpolation, bool], Tensor]] = {
    "matlab": _matlab_bytes,
    "opencv": _opencv_bytes,
    "pillow": _pillow_bytes,
}
