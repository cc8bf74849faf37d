"""Kernels of the constant-Q and the variable-Q transform, and the low-pass filters that go before them.

Brown, Puckette: "An efficient algorithm for the calculation of a constant Q transform", 1992; Schoerkhuber, Klapuri:
"Constant-Q transform toolbox for music processing", 2010; Cheuk et al.: "nnAudio", IEEE Access 2020, arXiv 1912.12055.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from convatlas.ops.framing import Window, window

__all__ = ["Bins", "early_factor", "lowpass_filter", "spectral_kernels", "time_kernels"]

_TAPS = 256


class Bins(NamedTuple):
    """Bins of a transform, a constant number of them in an octave.

    Attributes:
        fmin: frequency of the lowest bin in Hz.
        n_bins: number of bins.
        bins_per_octave: of them.
        filter_scale: length of the filters; 1 is critical.
        gamma: Hz that are added to each bandwidth: 0 for a constant quality, larger for shorter low filters.
    """

    fmin: float
    n_bins: int
    bins_per_octave: int = 12
    filter_scale: float = 1
    gamma: float = 0

    @property
    def quality(self) -> float:
        """Centre frequency over bandwidth: Q = filter_scale / (2^(1 / bins_per_octave) - 1)."""
        return self.filter_scale / self.alpha

    @property
    def alpha(self) -> float:
        """Distance to the next bin, over the frequency."""
        return 2 ** (1 / self.bins_per_octave) - 1

    @property
    def octaves(self) -> int:
        """Number of octaves, the lowest one perhaps not full."""
        return math.ceil(self.n_bins / self.bins_per_octave)

    @property
    def frequencies(self) -> Tensor:
        """f_k = fmin 2^(k / bins_per_octave) in Hz, (n_bins,) float64."""
        return self.fmin * 2 ** (torch.arange(self.n_bins, dtype=torch.float64) / self.bins_per_octave)

    def lengths(self, sr: float) -> Tensor:
        """Samples of each filter, ceil(Q sr / (f_k + gamma / alpha)), (n_bins,) float64."""
        return (self.quality * sr / (self.frequencies + self.gamma / self.alpha)).ceil()

    @property
    def highest_octave(self) -> Bins:
        """The octave that ends with the highest bin; all bins where they are fewer than an octave."""
        count = min(self.bins_per_octave, self.n_bins)
        return self._replace(fmin=self.fmin * 2 ** ((self.n_bins - count) / self.bins_per_octave), n_bins=count)


def time_kernels(
    bins: Bins, sr: float, *, kind: Window = "hann", norm: float | None = 1, width: int | None = None
) -> Tensor:
    """Windowed complex sinusoids, one for each bin, (n_bins, W) complex128.

    Row k has l_k samples in the middle: window times exp(2 pi i m f_k / sr) / l_k for m from -ceil(l_k / 2) on, divided
    by its norm.

    Args:
        bins: which bins.
        sr: sample rate in Hz.
        kind: window.
        norm: 1 for the sum of the magnitudes, 2 for the root of the sum of their squares; 0 or None leaves them.
        width: W; by default the next power of two.

    Raises:
        ValueError: the highest bin lies above half the sample rate.
    """
    frequencies, lengths = bins.frequencies.numpy(), bins.lengths(sr).numpy().astype(int)
    if frequencies[-1] > sr / 2:
        raise ValueError(
            f"The top bin {frequencies[-1]:g}Hz has exceeded the Nyquist frequency, please reduce the n_bins"
        )
    size = 1 << (int(lengths.max()) - 1).bit_length() if width is None else width
    kernels = np.zeros((len(frequencies), size), np.complex128)
    for row, f, length in zip(kernels, frequencies, lengths, strict=True):
        start = math.ceil(size / 2 - length / 2) - length % 2
        m = np.arange(length) - (length + 1) // 2
        values = window(kind, int(length)).numpy() * np.exp(2j * np.pi * m * f / sr) / length
        if norm:
            values /= np.linalg.norm(values, norm)
        row[start : start + length] = values
    return torch.from_numpy(kernels)


def spectral_kernels(kernels: Tensor) -> Tensor:
    """Fourier transforms of `time_kernels` up to half the sample rate, (n_bins, W // 2 + 1)."""
    return torch.fft.fft(kernels)[:, : kernels.shape[1] // 2 + 1]


def lowpass_filter(band: float, *, transition: float = 0.001) -> Tensor:
    """A filter (256,) float64 that passes frequencies below ``band`` times half the sample rate.

    Args:
        band: from 0 to 1.
        transition: width of the slope, over the band.
    """
    from scipy.signal import firwin2

    corners = [0.0, band / (1 + transition), band * (1 + transition), 1.0]
    return torch.from_numpy(np.asarray(firwin2(_TAPS, corners, [1.0, 1.0, 0.0, 0.0]), dtype=np.float64))


def early_factor(bins: Bins, sr: float, hop: int) -> int:
    """By how much a signal can be decimated before all bins of a transform, a power of two."""
    highest = float(bins.frequencies[-1])
    cutoff = highest * (1 + 0.75 / bins.quality)
    by_rate = max(0, math.ceil(math.log2(0.85 * (sr // 2) / cutoff)) - 2)
    by_hop = max(0, math.ceil(math.log2(hop)) - bins.octaves + 1)
    return 1 << min(by_rate, by_hop)
