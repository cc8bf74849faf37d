"""Signals cut into frames and put together again: windows, padding, frames as views, overlap-add."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["PadMode", "Window", "frame_pieces", "frames", "overlap_add", "pad_ends", "window", "zero_padded"]

#: A name that `scipy.signal.get_window` knows, one with its parameters, or ("gaussian", attenuation in dB).
Window = str | float | tuple[str | float, ...]
PadMode = Literal["reflect", "constant"]

#: Samples of the frames that are worked on at once: more would leave the cache.
_PIECE = 1 << 21


def window(kind: Window, length: int) -> Tensor:
    """A periodic window (length,), float64.

    Args:
        kind: what `scipy.signal.get_window` takes, or ``("gaussian", dB)``: a Gaussian that has fallen by so many
            decibels at the ends.
        length: number of samples.

    Raises:
        ValueError: there is no such window, or length is not positive.
    """
    from scipy.signal import get_window

    if length < 1:
        raise ValueError(f"length of a window must be positive, got {length}")
    if isinstance(kind, tuple) and kind and kind[0] == "gaussian":
        if len(kind) != 2 or not float(kind[1]) > 0:
            raise ValueError(f"a Gaussian window is ('gaussian', dB) with a positive attenuation, got {kind}")
        sigma = np.floor(-length / 2 / np.sqrt(-2 * np.log(10 ** (-float(kind[1]) / 20))))
        kind = ("gaussian", float(max(abs(sigma), 1.0)))
    try:
        values = get_window("boxcar" if kind == "ones" else kind, length, fftbins=True)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"window must be one that scipy.signal.get_window knows, got {kind!r}: {error}") from None
    return torch.from_numpy(np.asarray(values, dtype=np.float64))


def zero_padded(values: Tensor, length: int) -> Tensor:
    """Put ``values`` (..., n) into the middle of ``length`` samples; the left margin is the smaller one."""
    left = (length - values.shape[-1]) // 2
    return F.pad(values, (left, length - values.shape[-1] - left))


def pad_ends(x: Tensor, amount: int, mode: PadMode = "reflect") -> Tensor:
    """Surround signals (B, L) by ``amount`` samples on either side: mirrored without the end itself, or zeros.

    Raises:
        ValueError: a signal of at most ``amount`` samples cannot be mirrored.
    """
    if mode == "reflect" and amount and x.shape[-1] <= amount:
        raise ValueError(
            f"signal of {x.shape[-1]} samples is shorter than the reflect padding of {amount} samples (n_fft // 2) and "
            "one more: give a longer signal or pad_mode 'constant'"
        )
    return F.pad(x, (amount, amount), mode=mode) if amount else x


def frames(x: Tensor, size: int, hop: int) -> Tensor:
    """Every whole frame of signals (..., L), as a view (..., T, size) with T = 1 + (L - size) // hop."""
    return x.unfold(-1, size, hop)


def frame_pieces(x: Tensor, size: int, hop: int) -> Iterator[Tensor]:
    """Cut signals (B, L) into overlapping pieces that hold all frames once, each piece small enough for the cache.

    A graph that is being captured gets one piece.
    """
    if torch.compiler.is_compiling():
        yield x
        return
    count = 1 + (x.shape[-1] - size) // hop
    step = max(1, _PIECE // max(1, x.shape[0] * size))
    for first in range(0, count, step):
        last = min(first + step, count)
        yield x[..., first * hop : (last - 1) * hop + size]


def overlap_add(pieces: Tensor, hop: int) -> Tensor:
    """Add frames (..., T, size) at distances of ``hop``: (..., (T - 1) hop + size), the transpose of `frames`."""
    count, size = pieces.shape[-2:]
    rows = -(-size // hop)
    parts = F.pad(pieces, (0, rows * hop - size)).unflatten(-1, (rows, hop))
    length = (count - 1) * hop + size
    if rows == 1:
        return parts.flatten(-3)[..., :length]
    total = parts.new_zeros(*parts.shape[:-3], count + rows - 1, hop)
    for row in range(rows):
        total = total + F.pad(parts[..., row, :], (0, 0, row, rows - 1 - row))
    return total.flatten(-2)[..., :length]
