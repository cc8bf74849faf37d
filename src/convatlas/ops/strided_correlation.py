"""Correlation of signals with a bank of long kernels at every hop: the convolution behind spectrograms.

Cheuk, Anderson, Agres, Herremans: "nnAudio: An on-the-fly GPU Audio to Spectrogram Conversion Toolbox Using 1D
Convolution Neural Networks", IEEE Access 2020, arXiv 1912.12055. Torch's convolution with one input
channel is slow at it; products of matrices give the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.ops.backend import Backends
from convatlas.ops.framing import frame_pieces, frames
from convatlas.ops.precision import without_autocast

__all__ = ["Band", "bands", "decimate", "strided_correlation"]

_SHORTEST_HOP = 64
#: Outputs of one row of the matrix that decimates.
_OUTPUTS = 64


class Band(NamedTuple):
    """Rows first_row to last_row of a bank are zero outside the samples start to stop."""

    first_row: int
    last_row: int
    start: int
    stop: int


def bands(kernels: Tensor) -> tuple[Band, ...]:
    """Neighbouring rows of a bank (K, N) with the samples outside which they are zero.

    A row joins the band before it unless it is less than half as wide.
    """
    found: list[Band] = []
    for row, taps in enumerate(kernels.detach().ne(0).cpu()):
        places = taps.nonzero()
        start, stop = (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 1)
        last = found[-1] if found else None
        if last is not None and 2 * (stop - start) > last.stop - last.start:
            found[-1] = Band(last.first_row, row + 1, min(start, last.start), max(stop, last.stop))
        else:
            found.append(Band(row, row + 1, start, stop))
    return tuple(found)


def _auto(x: Tensor, kernels: Tensor, hop: int, parts: Sequence[Band] | None = None) -> str:
    if torch.compiler.is_compiling():
        return "conv"
    rows, size = kernels.shape
    if rows < hop and hop >= _SHORTEST_HOP and size > hop:
        return "polyphase"
    # With many rows the convolution of oneDNN is at its peak and saves the copy of the frames.
    return "conv" if rows > 256 and x.device.type == "cpu" else "matmul"


_backends = Backends("strided_correlation", auto=_auto)


def strided_correlation(
    x: Tensor, kernels: Tensor, hop: int, parts: Sequence[Band] | None = None, *, backend: str = "auto"
) -> Tensor:
    """y[b, k, t] = sum_n kernels[k, n] x[b, t hop + n] for every frame that fits.

    Args:
        x: signals (B, L), L at least N.
        kernels: bank (K, N).
        hop: samples from one frame to the next.
        parts: what `bands` found, to leave out the zeros; the rows of the bank that they cover, in order.
        backend: ``auto``; ``naive`` (the sum, tap by tap); ``conv`` (torch's convolution); ``matmul`` (frames times
            kernels); ``polyphase`` (blocks of ``hop`` samples times slices of the kernels, which copies no frames).

    Returns:
        (B, K, T) with T = 1 + (L - N) // hop, of the wider type of x and kernels.

    Raises:
        ValueError: a tensor has a wrong shape or type, hop is not positive, or the signal is shorter than a kernel.
    """
    if x.dim() != 2 or kernels.dim() != 2:
        raise ValueError(f"x must be (B, L) and kernels (K, N), got {tuple(x.shape)} and {tuple(kernels.shape)}")
    if not x.is_floating_point() or not kernels.is_floating_point():
        raise ValueError(f"x and kernels must be real floating point, got {x.dtype} and {kernels.dtype}")
    if hop < 1:
        raise ValueError(f"hop must be at least 1, got {hop}")
    if x.shape[1] < kernels.shape[1] or kernels.shape[1] < 1:
        raise ValueError(f"x must have the {kernels.shape[1]} samples of a kernel at least, got {x.shape[1]}")
    dtype = torch.promote_types(x.dtype, kernels.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    with without_autocast(x):
        return _backends.run(backend, x.to(wide), kernels.to(wide), hop, parts).to(dtype)


@_backends.register("naive")
def _naive(x: Tensor, kernels: Tensor, hop: int, parts: Sequence[Band] | None) -> Tensor:
    count = 1 + (x.shape[1] - kernels.shape[1]) // hop
    if parts is not None:
        inside = torch.zeros_like(kernels, dtype=torch.bool)
        for first_row, last_row, start, stop in parts:
            inside[first_row:last_row, start:stop] = True
        kernels = torch.where(inside, kernels, 0)
    y = x.new_zeros(x.shape[0], kernels.shape[0], count)
    for tap, weights in enumerate(kernels.unbind(1)):
        y = y + weights[:, None] * x[:, None, tap : tap + (count - 1) * hop + 1 : hop]
    return y


def _banded(x: Tensor, kernels: Tensor, hop: int, parts: Sequence[Band] | None) -> list[tuple[Tensor, Tensor]]:
    """Signals and kernels of each band, cut so that each has the same frames."""
    if parts is None:
        return [(x, kernels)]
    last = (x.shape[1] - kernels.shape[1]) // hop * hop
    return [
        (x[:, start : last + stop], kernels[first_row:last_row, start:stop])
        for first_row, last_row, start, stop in parts
    ]


@_backends.register("conv")
def _conv(x: Tensor, kernels: Tensor, hop: int, parts: Sequence[Band] | None) -> Tensor:
    results = [F.conv1d(u.unsqueeze(1), k.unsqueeze(1), stride=hop) for u, k in _banded(x, kernels, hop, parts)]
    return results[0] if len(results) == 1 else torch.cat(results, dim=1)


@_backends.register("matmul")
def _matmul(x: Tensor, kernels: Tensor, hop: int, parts: Sequence[Band] | None) -> Tensor:
    results = []
    for u, k in _banded(x, kernels, hop, parts):
        pieces = [frames(piece, k.shape[1], hop) @ k.T for piece in frame_pieces(u, k.shape[1], hop)]
        results.append(pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1))
    return (results[0] if len(results) == 1 else torch.cat(results, dim=2)).transpose(1, 2)


@_backends.register("polyphase")
def _polyphase(x: Tensor, kernels: Tensor, hop: int, parts: Sequence[Band] | None) -> Tensor:
    results = []
    for u, k in _banded(x, kernels, hop, parts):
        rows, size = k.shape
        count = 1 + (u.shape[1] - size) // hop
        phases = -(-size // hop)
        blocks = count + phases - 1
        slices = F.pad(k, (0, phases * hop - size)).unflatten(1, (phases, hop))
        # Column r K + k of the matrix holds slice r of kernel k.
        matrix = slices.permute(2, 1, 0).reshape(hop, phases * rows)
        u = u[:, : blocks * hop]
        u = F.pad(u, (0, blocks * hop - u.shape[1])).unflatten(1, (blocks, hop))
        products = (u @ matrix).unflatten(2, (phases, rows))
        # What phase r finds in block t + r belongs to frame t: the diagonals, read as a view.
        batch, block, phase, row = products.stride()
        diagonals = products.as_strided((len(u), count, phases, rows), (batch, block, block + phase, row))
        results.append(diagonals.sum(2))
    return (results[0] if len(results) == 1 else torch.cat(results, dim=2)).transpose(1, 2)


def decimate(x: Tensor, taps: Tensor, factor: int, *, backend: str = "auto") -> Tensor:
    """Low-pass signals (B, L) and keep every ``factor``-th sample: (B, (L + 2 p - M) // factor + 1).

    As a convolution with stride ``factor`` and p = (M - 1) // 2 zeros on either side. Several outputs at once are one
    product of matrices, because a single kernel leaves nothing to compute in parallel.

    Args:
        x: signals (B, L).
        taps: low-pass filter (M,).
        factor: stride.
        backend: as `strided_correlation` takes it.

    Raises:
        ValueError: a shape is wrong, factor is not positive, or the padded signal is shorter than the filter.
    """
    if taps.dim() != 1:
        raise ValueError(f"taps must be (M,), got {tuple(taps.shape)}")
    if factor < 1:
        raise ValueError(f"factor must be at least 1, got {factor}")
    margin = (taps.shape[0] - 1) // 2
    length = (x.shape[-1] + 2 * margin - taps.shape[0]) // factor + 1
    if x.shape[-1] + 2 * margin < taps.shape[0]:
        raise ValueError(f"x of {x.shape[-1]} samples is too short for a filter of {taps.shape[0]} taps")
    span, hop = (_OUTPUTS - 1) * factor + taps.shape[0], _OUTPUTS * factor
    blocks = -(-length // _OUTPUTS)
    # Row q holds the taps shifted by q times the factor.
    shifted = F.pad(taps, ((_OUTPUTS - 1) * factor,) * 2).unfold(0, span, factor).flip(0)
    padded = F.pad(x, (margin, (blocks - 1) * hop + span - x.shape[-1] - margin))
    y = strided_correlation(padded[:, : (blocks - 1) * hop + span], shifted, hop, backend=backend)
    return y.transpose(1, 2).flatten(1)[:, :length]
