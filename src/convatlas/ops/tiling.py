"""Running a function on a large signal, image or volume tile by tile, with bounded memory and no seams."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from convatlas.errors import unknown

__all__ = ["Window", "tiled"]

Window = Literal["flat", "linear", "hann", "gaussian"]
#: Standard deviation of the Gaussian window in lengths of a tile.
_SIGMA = 1 / 8
Scale = int | Fraction
Number = TypeVar("Number", int, Scale)


def tiled(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    tile: int | Sequence[int],
    overlap: int | Sequence[int] = 0,
    scale: Scale | Sequence[Scale] = 1,
    window: Window = "flat",
    batch_size: int = 1,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Run a function on overlapping tiles of x and put the results together.

    With the window "flat" each value comes from the tile where it lies farthest from the border. That is exact when
    overlap / 2 is at least the reach of the function (half its receptive field) and its output at a position does not
    depend on the position: strides and windows of the function must divide the tile minus the overlap, and what a
    function takes over the whole input, such as a mean, it then takes over the tile. The other windows blend the tiles
    linearly with weights that sum to one, which hides the seams of functions that reach farther.

    Args:
        function: (N, C, *tile) -> (N, C', *tile * scale); N is at most batch_size times the batch of x.
        x: (B, C, *positions) with any number of position axes.
        tile: length of a tile, one number or one for each axis; an axis that is shorter is taken whole.
        overlap: positions that neighbouring tiles share, at least; smaller than the tile.
        scale: output positions for each input position, for instance 4 in super-resolution or Fraction(1, 2); the tile,
            the overlap and the positions times scale must be whole numbers.
        window: "flat"; weights that fall linearly or as a cosine ("hann") over the overlap; or "gaussian", weights that
            fall from the middle of each tile, with a standard deviation of an eighth of it.
        batch_size: tiles that go through the function together.
        device: where the result is put together, by default where x is; tiles go to the function where x is.
        out: where to put the result, for one that is larger than the memory: a tensor over a memory-mapped file, of the
            result's shape, whatever it holds before. Nothing else then grows with the size of x.
        progress: called with the tiles done and the number of all tiles after each call of the function.

    Returns:
        (B, C', *positions * scale) in the type that the function gives, or ``out``.

    Raises:
        ValueError: x has no position axis, an argument is out of range, or the function gives another shape than
            scale says, or out does not fit.
    """
    lengths, tiles, overlaps, scales = _checked(x, tile, overlap, scale, window, batch_size)
    axes = [_cut(*numbers, window) for numbers in zip(lengths, tiles, overlaps, scales, strict=True)]
    wanted = [int(size * factor) for size, factor in zip(tiles, scales, strict=True)]
    target = x.device if device is None else torch.device(device)
    places = list(itertools.product(*axes))
    result = x.new_empty(0)  # made with the first outputs, which tell channels and type
    for first in range(0, len(places), batch_size):
        batch = places[first : first + batch_size]
        pieces = torch.cat([x[_index(part.read for part in place)] for place in batch])
        outputs = function(pieces)
        if outputs.shape[0] != pieces.shape[0] or list(outputs.shape[2:]) != wanted:
            raise ValueError(
                f"function must turn {tuple(pieces.shape)} into ({pieces.shape[0]}, C, {', '.join(map(str, wanted))}) "
                f"at scale {scale}, got {tuple(outputs.shape)}"
            )
        if first == 0:
            if window != "flat" and not outputs.is_floating_point():
                raise ValueError(f"window must be 'flat' for a function that gives {outputs.dtype}, got {window!r}")
            whole = [int(length * factor) for length, factor in zip(lengths, scales, strict=True)]
            kind = outputs.dtype if window == "flat" else torch.promote_types(outputs.dtype, torch.float32)
            shape = (x.shape[0], outputs.shape[1], *whole)
            result = torch.zeros(shape, dtype=kind, device=target) if out is None else _emptied(out, shape, kind)
        for place, output in zip(batch, outputs.to(result.device).chunk(len(batch)), strict=True):
            region = result[_index(part.written for part in place)]
            kept = output[_index(part.kept for part in place)]
            if window == "flat":
                region.copy_(kept)
            else:
                region.add_(_weighted(kept.to(result.dtype), place))
        if progress is not None:
            progress(first + len(batch), len(places))
    return result.to(outputs.dtype) if out is None else out


def _emptied(out: Tensor, shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
    if out.shape != shape or out.dtype != kind:
        raise ValueError(f"out must be {shape} of {kind}, got {tuple(out.shape)} of {out.dtype}")
    out.zero_()
    return out


class _Part(NamedTuple):
    """A tile on one axis: where it is read, which part of the output is kept and where that is written."""

    read: slice
    kept: slice
    written: slice
    weights: Tensor


def _index(slices: Iterable[slice]) -> tuple[slice, ...]:
    return (slice(None), slice(None), *slices)


def _checked(
    x: Tensor,
    tile: int | Sequence[int],
    overlap: int | Sequence[int],
    scale: Scale | Sequence[Scale],
    window: str,
    batch_size: int,
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[Fraction, ...]]:
    """Lengths, tiles no longer than these, overlaps and scales, one for each axis."""
    dims = x.dim() - 2
    if dims < 1 or min(x.shape) < 1:
        raise ValueError(f"x must be (B, C, *positions) and not empty, got {tuple(x.shape)}")
    tiles, overlaps = _each("tile", tile, dims), _each("overlap", overlap, dims)
    scales = tuple(Fraction(factor) for factor in _each("scale", scale, dims))
    if window not in _RISES:
        raise unknown("window", window, _RISES)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if min(scales) <= 0:
        raise ValueError(f"scale must be positive, got {scale}")
    if not all(0 <= shared < size for shared, size in zip(overlaps, tiles, strict=True)):
        raise ValueError(f"overlap must be at least 0 and smaller than the tile, got {overlap} with tile {tile}")
    lengths = tuple(x.shape[2:])
    for name, numbers in (("tile", tiles), ("overlap", overlaps), ("positions of x", lengths)):
        if any((number * factor).denominator != 1 for number, factor in zip(numbers, scales, strict=True)):
            raise ValueError(f"{name} times scale must be whole, got {numbers} and scale {scale}")
    return lengths, tuple(map(min, tiles, lengths)), overlaps, scales


def _each(name: str, value: Number | Sequence[Number], dims: int) -> tuple[Number, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,) * dims
    if len(values) != dims:
        raise ValueError(f"{name} must be one number or {dims}, got {value}")
    return values


def _cut(length: int, tile: int, overlap: int, scale: Fraction, window: str) -> list[_Part]:
    """Tiles of one length that cover an axis; the last is moved back to end where the axis ends."""
    # A tile that covers the whole axis has no neighbour to share anything with.
    step = tile - overlap if tile < length else tile
    starts = [min(number * step, length - tile) for number in range(math.ceil((length - tile) / step) + 1)]
    size, begins = int(tile * scale), [int(start * scale) for start in starts]
    reads = [slice(start, start + tile) for start in starts]
    if window == "flat":
        # Halfway through what two neighbours share, both are equally far from their borders.
        cuts = [0, *((after + before + size) // 2 for before, after in pairwise(begins)), int(length * scale)]
        return [
            _Part(read, slice(low - begin, high - begin), slice(low, high), torch.empty(0))
            for read, begin, (low, high) in zip(reads, begins, pairwise(cuts), strict=True)
        ]
    weights = _ramps(begins, size, int(overlap * scale), window)
    total = torch.zeros(int(length * scale), dtype=torch.float64)
    for begin, weight in zip(begins, weights, strict=True):
        total[begin : begin + size] += weight
    return [
        _Part(read, slice(None), slice(begin, begin + size), weight / total[begin : begin + size])
        for read, begin, weight in zip(reads, begins, weights, strict=True)
    ]


_RISES: dict[str, Callable[[Tensor], Tensor]] = {
    "flat": torch.ones_like,
    "linear": lambda fraction: fraction,
    "hann": lambda fraction: torch.sin(0.5 * math.pi * fraction).square(),
    "gaussian": torch.ones_like,  # it does not look at the overlap
}


def _ramps(begins: list[int], size: int, overlap: int, window: str) -> list[Tensor]:
    """Weights of each tile of an axis, which rise and fall over the overlap except at the ends of the axis."""
    if window == "gaussian":
        distance = (torch.arange(size, dtype=torch.float64) - (size - 1) / 2) / (_SIGMA * size)
        return [torch.exp(-0.5 * distance.square())] * len(begins)
    rise = _RISES[window]((torch.arange(overlap, dtype=torch.float64) + 0.5) / max(overlap, 1))
    weights = []
    for begin in begins:
        weight = torch.ones(size, dtype=torch.float64)
        if begin != begins[0]:
            weight[:overlap] *= rise
        if begin != begins[-1]:
            weight[size - overlap :] *= rise.flip(0)
        weights.append(weight)
    return weights


def _weighted(output: Tensor, place: tuple[_Part, ...]) -> Tensor:
    for axis, part in enumerate(place):
        shape = [1] * (len(place) - axis - 1)
        output = output * part.weights.to(output.dtype).to(output.device).reshape(-1, *shape)
    return output
