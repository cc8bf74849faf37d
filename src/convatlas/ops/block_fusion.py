"""Residual blocks of convolutions as one operator, whose expanded features need not be whole in memory.

Lavin: "On the Efficiency of Convolutional Neural Networks", 2024, arXiv 2404.03617. Batch norms are folded into the
convolutions before them, so this is for inference.

A block that begins with its spatial convolution (ConvFirst) computes every tile of its output from a tile of its input
that is one kernel wider, and nothing twice. A block that expands first (MBConv) has its border on the expanded features
and computes that border again for every tile.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.errors import Unsupported
from convatlas.ops.backend import Backends
from convatlas.ops.precision import without_autocast

__all__ = ["fused_convfirst", "fused_mbconv"]

#: Bytes of expanded features that are worked on at a time: larger products are faster, smaller ones stay in the cache.
_CACHED = 2**20
#: Bytes of expanded features from which cutting them pays on a CPU, up to so many expanded channels; with more of them
#: there is more to compute for each byte, and it pays later.
_LARGE, _FEW = 2**23, 256
#: Expanded channels that a tile is multiplied with at a time.
_CHUNK = 64
_TILE = (8, 64)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: Most channels whose features one program of the GPU kernel keeps, and most for which ``auto`` takes it.
_TRITON_CHANNELS, _TRITON_AUTO_CHANNELS = 256, 128


# -- ConvFirst and MLP -------------------------------------------------------------------------------------------------


def _auto_convfirst(
    x: Tensor,
    wg: Tensor | None,
    bg: Tensor | None,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    stride: int,
    groups: int,
    tile: tuple[int, int] | None,
) -> str:
    if tile is not None:
        return "tiles"
    half = x.device.type == "cuda" and x.dtype in (torch.float16, torch.bfloat16)
    if half and not torch.compiler.is_compiling() and max(x.shape[1], len(w3)) <= _TRITON_AUTO_CHANNELS:
        known = "triton" in _convfirst.names
        if known and _refuses_triton(x, wg, bg, w2, b2, w3, b3, stride, groups, tile) is None:
            return "triton"
    # A captured graph must serve every size, and may run elsewhere; a backward pass needs the features anyway.
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype != torch.float32:
        return "naive"
    trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, wg, bg, w2, b2, w3, b3))
    expanded = 4 * len(w2) * x.shape[0] * x.shape[2] * x.shape[3] // stride**2
    large = expanded >= _LARGE * max(1, len(w2) / _FEW)
    return "chunks" if large and not trained and not torch.is_autocast_enabled("cpu") else "naive"


_convfirst = Backends("fused_convfirst", auto=_auto_convfirst)


def fused_convfirst(
    x: Tensor,
    wg: Tensor | None,
    bg: Tensor | None,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    stride: int = 1,
    groups: int = 1,
    tile: tuple[int, int] | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """ConvFirst block: x + W3 silu(W2 (Wg * x + bg) + b2) + b3, where x is added if the result has its shape.

    Without wg the block is an MLP over the channels: x + W3 silu(W2 x + b2) + b3.

    Args:
        x: input (B, C, H, W).
        wg, bg: spatial kernel (C, C / groups, R, R), R odd, and bias (C); both None for an MLP.
        w2, b2: expansion (M, C, 1, 1) and bias (M).
        w3, b3: projection (K, M, 1, 1) and bias (K).
        stride, groups: of the spatial convolution, which pads with R // 2 zeros.
        tile: height and width of the tiles of the output for ``tiles``; the result does not depend on it.
        backend: ``auto``; ``naive`` (three convolutions in turn); ``tiles`` (tile by tile through the whole block, as
            on a GPU; ``auto`` takes it where ``tile`` is given); ``chunks`` (the spatial convolution first, whose
            output is small, then the rest for as many pixels at a time as the cache holds); or ``triton`` (one kernel
            on a GPU, up to 256 channels, group widths that are powers of two; checked through the interpreter only).

    Returns:
        (B, K, ceil(H / stride), ceil(W / stride)).

    Raises:
        ValueError: a shape, type, stride or tile is wrong.
        Unsupported: the backend cannot serve the call.
    """
    _check(x, stride, tile)
    if (wg is None) != (bg is None):
        raise ValueError("wg and bg must be given both or none")
    if wg is None or bg is None:
        if stride != 1:
            raise ValueError(f"stride must be 1 where there is no spatial convolution, got {stride}")
    else:
        _check_spatial(wg, bg, x.shape[1], groups)
        if len(wg) != x.shape[1]:
            raise ValueError(f"wg must keep the {x.shape[1]} channels of x, got {tuple(wg.shape)}")
    _check_pointwise("w2", w2, b2, x.shape[1])
    _check_pointwise("w3", w3, b3, len(w2))
    if backend == "triton" and backend not in _convfirst.names:
        raise Unsupported("backend 'triton' of fused_convfirst needs the triton package")
    return _convfirst.run(backend, x, wg, bg, w2, b2, w3, b3, stride, groups, tile)


@_convfirst.register("naive")
def _convfirst_naive(
    x: Tensor,
    wg: Tensor | None,
    bg: Tensor | None,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    stride: int,
    groups: int,
    tile: tuple[int, int] | None,
) -> Tensor:
    y = x if wg is None else F.conv2d(x, wg, bg, stride, wg.shape[-1] // 2, 1, groups)
    y = F.conv2d(y, w2, b2)
    y = F.silu(y)
    y = F.conv2d(y, w3, b3)
    return x + y if _residual(x, w3, stride) else y


@_convfirst.register("tiles")
def _convfirst_tiles(
    x: Tensor,
    wg: Tensor | None,
    bg: Tensor | None,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    stride: int,
    groups: int,
    tile: tuple[int, int] | None,
) -> Tensor:
    wg, bg, w2, b2, w3, b3 = _as(x, wg, bg, w2, b2, w3, b3)
    kernel_size = 1 if wg is None else wg.shape[-1]
    y = _output(x, w3, stride)
    with without_autocast(x):
        for place, window, border in _tiles(x, y, kernel_size, stride, tile):
            t = x[window]
            if wg is not None:
                t = F.conv2d(F.pad(t, border), wg, bg, stride, 0, 1, groups)
            y[place] = _mlp(t, w2, b2, w3, b3)
            if _residual(x, w3, stride):
                y[place] += x[place]
    return y


@_convfirst.register("chunks")
def _convfirst_chunks(
    x: Tensor,
    wg: Tensor | None,
    bg: Tensor | None,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    stride: int,
    groups: int,
    tile: tuple[int, int] | None,
) -> Tensor:
    wg, bg, w2, b2, w3, b3 = _as(x, wg, bg, w2, b2, w3, b3)
    with without_autocast(x):
        # Pixels become rows of matrices, which channels last makes a view.
        moved = x.contiguous(memory_format=torch.channels_last)
        t = moved if wg is None else F.conv2d(moved, wg, bg, stride, wg.shape[-1] // 2, 1, groups)
        before, after = w2.flatten(1).t(), w3.flatten(1).t()
        rows = _rows(t)
        result = b3 + _rows(moved) if _residual(x, w3, stride) else b3.repeat(len(rows), 1)
        step = max(1, _CACHED // (len(b2) * x.element_size()))
        for first in range(0, len(rows), step):
            some = slice(first, first + step)
            hidden = torch.addmm(b2, rows[some], before)
            hidden = F.silu(hidden, inplace=not hidden.requires_grad)
            result[some].addmm_(hidden, after)
    # As in the other backends, the result lies in memory as x does.
    channels_last = result.view(len(x), *t.shape[2:], len(b3)).permute(0, 3, 1, 2)
    return channels_last.contiguous() if x.is_contiguous() else channels_last


def _refuses_triton(
    x: Tensor,
    wg: Tensor | None,
    bg: Tensor | None,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    stride: int,
    groups: int,
    tile: tuple[int, int] | None,
) -> str | None:
    if wg is None:
        return "it needs a spatial convolution"
    width = wg.shape[1]
    if width & (width - 1):
        return f"the group width must be a power of two, got {width}"
    most = max(x.shape[1], len(w3))
    if most > _TRITON_CHANNELS:
        return f"it takes up to {_TRITON_CHANNELS} channels, got {most}"
    if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"x must be on a CUDA device (or TRITON_INTERPRET=1 be set to interpret it), got {x.device.type}"
    return None


if importlib.util.find_spec("triton") is not None:

    @_convfirst.register("triton", refuses=_refuses_triton)
    def _convfirst_triton(
        x: Tensor,
        wg: Tensor,
        bg: Tensor,
        w2: Tensor,
        b2: Tensor,
        w3: Tensor,
        b3: Tensor,
        stride: int,
        groups: int,
        tile: tuple[int, int] | None,
    ) -> Tensor:
        from convatlas.ops.kernels.block_fusion import convfirst_block

        weights = _as(x, wg, bg, w2, b2, w3, b3)
        y: Tensor = convfirst_block(x, *weights, stride, groups, _residual(x, w3, stride))
        return y


# -- MBConv and fused MBConv -------------------------------------------------------------------------------------------


def _auto_mbconv(
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    wg: Tensor,
    bg: Tensor,
    w3: Tensor,
    b3: Tensor,
    stride: int,
    groups: int,
    tile: tuple[int, int] | None,
) -> str:
    # Tiles save memory, and cost time: their borders are computed again.
    return "naive" if tile is None else "tiles"


_mbconv = Backends("fused_mbconv", auto=_auto_mbconv)


def fused_mbconv(
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    wg: Tensor,
    bg: Tensor,
    w3: Tensor,
    b3: Tensor,
    stride: int = 1,
    groups: int = 1,
    tile: tuple[int, int] | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """MBConv block: x + W3 silu(Wg * silu(W1 x + b1) + bg) + b3, where x is added if the result has its shape.

    Without w1 it is the fused MBConv block, whose spatial convolution expands: x + W3 silu(Wg * x + bg) + b3. ("Fused"
    is the name of that block; here both are fused into one operator.)

    Args:
        x: input (B, C, H, W).
        w1, b1: expansion (M, C, 1, 1) and bias (M), or both None.
        wg, bg: spatial kernel (M, M / groups, R, R), without w1 (M, C / groups, R, R), R odd, and bias (M).
        w3, b3: projection (K, M, 1, 1) and bias (K).
        stride, groups: of the spatial convolution, which pads with R // 2 zeros.
        tile: height and width of the tiles of the output for ``tiles``; the result does not depend on it.
        backend: ``auto``; ``naive`` (three convolutions in turn); or ``tiles`` (tile by tile through the whole block;
            what it needs of the expansion around a tile is computed again, which saves memory and costs time: ``auto``
            takes it where ``tile`` is given).

    Returns:
        (B, K, ceil(H / stride), ceil(W / stride)).

    Raises:
        ValueError: a shape, type, stride or tile is wrong.
    """
    _check(x, stride, tile)
    if (w1 is None) != (b1 is None):
        raise ValueError("w1 and b1 must be given both or none")
    inner = x.shape[1]
    if w1 is not None and b1 is not None:
        _check_pointwise("w1", w1, b1, inner)
        inner = len(w1)
    _check_spatial(wg, bg, inner, groups)
    if w1 is not None and len(wg) != inner:
        raise ValueError(f"wg must keep the {inner} expanded channels, got {tuple(wg.shape)}")
    _check_pointwise("w3", w3, b3, len(wg))
    return _mbconv.run(backend, x, w1, b1, wg, bg, w3, b3, stride, groups, tile)


@_mbconv.register("naive")
def _mbconv_naive(
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    wg: Tensor,
    bg: Tensor,
    w3: Tensor,
    b3: Tensor,
    stride: int,
    groups: int,
    tile: tuple[int, int] | None,
) -> Tensor:
    y = x
    if w1 is not None:
        y = F.conv2d(y, w1, b1)
        y = F.silu(y)
    y = F.conv2d(y, wg, bg, stride, wg.shape[-1] // 2, 1, groups)
    y = F.silu(y)
    y = F.conv2d(y, w3, b3)
    return x + y if _residual(x, w3, stride) else y


@_mbconv.register("tiles")
def _mbconv_tiles(
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    wg: Tensor,
    bg: Tensor,
    w3: Tensor,
    b3: Tensor,
    stride: int,
    groups: int,
    tile: tuple[int, int] | None,
) -> Tensor:
    w1, b1, wg, bg, w3, b3 = _as(x, w1, b1, wg, bg, w3, b3)
    y = _output(x, w3, stride)
    with without_autocast(x):
        for place, window, border in _tiles(x, y, wg.shape[-1], stride, tile):
            t = x[window]
            if w1 is not None:
                t = F.silu(F.conv2d(t, w1, b1))
            # Zeros go around the expanded features: an expanded zero is not zero.
            t = F.silu(F.conv2d(F.pad(t, border), wg, bg, stride, 0, 1, groups))
            y[place] = F.conv2d(t, w3, b3)
            if _residual(x, w3, stride):
                y[place] += x[place]
    return y


# -- both --------------------------------------------------------------------------------------------------------------


def _residual(x: Tensor, w3: Tensor, stride: int) -> bool:
    return stride == 1 and len(w3) == x.shape[1]


def _as(x: Tensor, *weights: Tensor | None) -> Any:
    """Weights in the type of x, which under autocast may be another."""
    return [None if weight is None else weight.to(x.dtype) for weight in weights]


def _output(x: Tensor, w3: Tensor, stride: int) -> Tensor:
    height, width = (-(-size // stride) for size in x.shape[2:])
    channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((len(x), len(w3), height, width), dtype=x.dtype, device=x.device, memory_format=layout)


def _rows(x: Tensor) -> Tensor:
    """The channels of each pixel as a row."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _mlp(t: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor) -> Tensor:
    total: Tensor = b3.view(1, -1, 1, 1)
    for first in range(0, len(w2), _CHUNK):
        some = slice(first, first + _CHUNK)
        total = total + F.conv2d(F.silu(F.conv2d(t, w2[some], b2[some])), w3[:, some])
    return total


def _tiles(
    x: Tensor, y: Tensor, kernel_size: int, stride: int, tile: tuple[int, int] | None
) -> Iterator[tuple[Any, Any, tuple[int, ...]]]:
    """For each tile of y its place, the window of x that it depends on, and the zeros around that window."""
    half = kernel_size // 2
    axes = []
    for count, out, size in zip(tile or _TILE, y.shape[2:], x.shape[2:], strict=True):
        along = []
        for first in range(0, out, count):
            last = min(first + count, out)
            start, stop = first * stride - half, (last - 1) * stride + half + 1
            window = slice(max(start, 0), min(stop, size))
            along.append((slice(first, last), window, (max(-start, 0), max(stop - size, 0))))
        axes.append(along)
    for (rows, down, above), (columns, across, beside) in itertools.product(*axes):
        yield (..., rows, columns), (..., down, across), (*beside, *above)


def _check(x: Tensor, stride: int, tile: tuple[int, int] | None) -> None:
    if x.dim() != 4:
        raise ValueError(f"x must be (B, C, H, W), got {x.dim()} dimensions")
    if x.dtype not in _FLOATS:
        raise ValueError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}")
    if tile is not None and (len(tile) != 2 or min(tile) < 1):
        raise ValueError(f"tile must be a height and a width of at least 1, got {tile}")


def _check_spatial(wg: Tensor, bg: Tensor, channels: int, groups: int) -> None:
    if groups < 1 or channels % groups or len(wg) % groups:
        raise ValueError(f"groups must divide the {channels} channels and the {len(wg)} kernels, got {groups}")
    if wg.dim() != 4 or wg.shape[1] != channels // groups or wg.shape[2] != wg.shape[3]:
        raise ValueError(f"wg must be (M, {channels // groups}, R, R), got {tuple(wg.shape)}")
    if wg.shape[2] % 2 == 0:
        raise ValueError(f"kernel size of wg must be odd, got {wg.shape[2]}")
    if bg.shape != wg.shape[:1]:
        raise ValueError(f"bg must be ({len(wg)},), got {tuple(bg.shape)}")


def _check_pointwise(name: str, weight: Tensor, bias: Tensor, channels: int) -> None:
    if weight.dim() != 4 or weight.shape[1:] != (channels, 1, 1):
        raise ValueError(f"{name} must be (M, {channels}, 1, 1), got {tuple(weight.shape)}")
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"{name.replace('w', 'b')} must be ({len(weight)},), got {tuple(bias.shape)}")
