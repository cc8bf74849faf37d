"""Moving blocks between channels and positions: pixel shuffle, its inverse, in both channel orders and any dimensions.

Shi et al.: "Real-Time Single Image and Video Super-Resolution Using an Efficient Sub-Pixel Convolutional Neural
Network", CVPR 2016, arXiv 1609.05158, equation 4.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.errors import unknown
from convatlas.ops.backend import Backends

__all__ = ["Order", "pixel_shuffle", "pixel_unshuffle"]

Order = Literal["CRD", "DCR"]


_SMALL = 2**15  # elements below which a call costs more than the copy
_MANY_CHANNELS = 8


def _auto(x: Tensor, factor: int | Sequence[int], order: Order = "CRD") -> str:
    if _torch_refuses(x, factor, order):
        return "view"
    if torch.compiler.is_compiling():  # one operator of the graph, DepthToSpace in ONNX, and no guard on the size
        return "torch"
    # Torch has a good kernel for channels_last, but it needs several channels to run along.
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    many = x.shape[1] >= _MANY_CHANNELS * math.prod(_factors(x, factor))
    return "torch" if x.numel() < _SMALL or (channels_last and many) else "view"


_shuffle = Backends("pixel_shuffle", auto=_auto)
_unshuffle = Backends("pixel_unshuffle", auto=_auto)


def pixel_shuffle(x: Tensor, factor: int | Sequence[int], order: Order = "CRD", *, backend: str = "auto") -> Tensor:
    """Spread groups of channels over the positions: each position becomes a block of factor x factor positions.

    With "CRD", out[c, y, x] = in[c r^2 + r (y mod r) + (x mod r), floor(y / r), floor(x / r)], as torch and ONNX's mode
    CRD; with "DCR" the channel within its block comes last, in[(r (y mod r) + (x mod r)) C + c, ...], as the paper's
    formula and TensorFlow's depth_to_space.

    Args:
        x: (B, C * r^n, *positions) with n position axes, of any type.
        factor: r, or one factor for each position axis.
        order: "CRD" or "DCR".
        backend: ``auto``, ``naive`` (a strided copy for each place in the block), ``view`` (one permuted copy) or
            ``torch`` (torch's own, for two equal factors in order CRD).

    Returns:
        (B, C, *positions * r).

    Raises:
        ValueError: the channels are no multiple of the block, x has no position axis, or an option is out of range.
    """
    factors = _checked(x, factor, order)
    block = math.prod(factors)
    if x.shape[1] % block:
        raise ValueError(f"x must have a multiple of {block} channels for factor {factor}, got {x.shape[1]}")
    return _shuffle.run(backend, x, factors, order)


def pixel_unshuffle(x: Tensor, factor: int | Sequence[int], order: Order = "CRD", *, backend: str = "auto") -> Tensor:
    """Gather each block of factor x factor positions into channels: the inverse of `pixel_shuffle`.

    Args:
        x: (B, C, *positions), each length a multiple of its factor, of any type.
        factor: r, or one factor for each position axis.
        order: as in `pixel_shuffle`.
        backend: as in `pixel_shuffle`.

    Returns:
        (B, C * r^n, *positions / r).

    Raises:
        ValueError: a length is no multiple of its factor, x has no position axis, or an option is out of range.
    """
    factors = _checked(x, factor, order)
    if any(length % part for length, part in zip(x.shape[2:], factors, strict=True)):
        raise ValueError(f"positions of x must be multiples of factor {factor}, got {tuple(x.shape[2:])}")
    return _unshuffle.run(backend, x, factors, order)


def _factors(x: Tensor, factor: int | Sequence[int]) -> tuple[int, ...]:
    return (factor,) * (x.dim() - 2) if isinstance(factor, int) else tuple(factor)


def _checked(x: Tensor, factor: int | Sequence[int], order: str) -> tuple[int, ...]:
    if x.dim() < 3:
        raise ValueError(f"x must be (B, C, *positions), got {tuple(x.shape)}")
    if order not in ("CRD", "DCR"):
        raise unknown("order", order, ("CRD", "DCR"))
    factors = _factors(x, factor)
    if len(factors) != x.dim() - 2 or min(factors) < 1:
        raise ValueError(f"factor must be positive, one or {x.dim() - 2} numbers, got {factor}")
    return factors


def _places(factors: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The places within a block, row by row."""
    return list(itertools.product(*map(range, factors)))


def _channels_of(place: int, channels: int, places: int, order: Order) -> slice:
    """The channels that hold one place of every block."""
    return slice(place, None, places) if order == "CRD" else slice(place * channels, (place + 1) * channels)


@_shuffle.register("naive")
def _shuffle_naive(x: Tensor, factors: tuple[int, ...], order: Order) -> Tensor:
    places = _places(factors)
    channels = x.shape[1] // len(places)
    lengths = [length * factor for length, factor in zip(x.shape[2:], factors, strict=True)]
    result = x.new_zeros(x.shape[0], channels, *lengths)
    for number, place in enumerate(places):
        part = x[:, _channels_of(number, channels, len(places), order)]
        result[:, :, *(slice(start, None, step) for start, step in zip(place, factors, strict=True))] = part
    return result


@_unshuffle.register("naive")
def _unshuffle_naive(x: Tensor, factors: tuple[int, ...], order: Order) -> Tensor:
    places = _places(factors)
    channels = x.shape[1]
    lengths = [length // factor for length, factor in zip(x.shape[2:], factors, strict=True)]
    result = x.new_zeros(x.shape[0], channels * len(places), *lengths)
    for number, place in enumerate(places):
        part = x[:, :, *(slice(start, None, step) for start, step in zip(place, factors, strict=True))]
        result[:, _channels_of(number, channels, len(places), order)] = part
    return result


def _shuffle_axes(dims: int, order: Order) -> list[int]:
    """Where the axes of (B, C, *factors, *positions) or (B, *factors, C, *positions) go."""
    first = 2 if order == "CRD" else 1
    pairs = itertools.chain.from_iterable((2 + dims + dim, first + dim) for dim in range(dims))
    return [0, 1 if order == "CRD" else 1 + dims, *pairs]


@_shuffle.register("view")
def _shuffle_view(x: Tensor, factors: tuple[int, ...], order: Order) -> Tensor:
    dims = len(factors)
    channels = x.shape[1] // math.prod(factors)
    split = (channels, *factors) if order == "CRD" else (*factors, channels)
    lengths = [length * factor for length, factor in zip(x.shape[2:], factors, strict=True)]
    blocks = x.reshape(x.shape[0], *split, *x.shape[2:]).permute(_shuffle_axes(dims, order))
    return blocks.reshape(x.shape[0], channels, *lengths)


@_unshuffle.register("view")
def _unshuffle_view(x: Tensor, factors: tuple[int, ...], order: Order) -> Tensor:
    dims = len(factors)
    lengths = [length // factor for length, factor in zip(x.shape[2:], factors, strict=True)]
    pairs = itertools.chain.from_iterable(zip(lengths, factors, strict=True))
    axes = _shuffle_axes(dims, order)
    blocks = x.reshape(x.shape[0], x.shape[1], *pairs).permute([axes.index(axis) for axis in range(len(axes))])
    return blocks.reshape(x.shape[0], x.shape[1] * math.prod(factors), *lengths)


def _torch_refuses(x: Tensor, factor: int | Sequence[int], order: Order = "CRD") -> str | None:
    factors = _factors(x, factor)
    square = len(factors) == 2 and factors[0] == factors[1]
    return None if square and order == "CRD" else "it takes images, one factor and order CRD"


@_shuffle.register("torch", refuses=_torch_refuses)
def _shuffle_torch(x: Tensor, factors: tuple[int, ...], order: Order) -> Tensor:
    return F.pixel_shuffle(x, factors[0])


@_unshuffle.register("torch", refuses=_torch_refuses)
def _unshuffle_torch(x: Tensor, factors: tuple[int, ...], order: Order) -> Tensor:
    return F.pixel_unshuffle(x, factors[0])
