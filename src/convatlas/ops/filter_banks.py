"""Banks of filters on the bins of a Fourier transform: Mel, gammatone, log-frequency; and what follows them.

Decibels and the cosine transform make cepstral coefficients of Mel bands. Slaney: "Auditory Toolbox", 1998; Young et
al.: "The HTK Book", 2006; Su, Yang: "Combining Spectral and Temporal Representations for Multipitch Estimation of
Polyphonic Music", 2015.
"""

from __future__ import annotations

import math
import warnings
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_Array = npt.NDArray[np.float64]

__all__ = [
    "decibels",
    "discrete_cosine_basis",
    "gammatone_filter_bank",
    "log_frequency_maps",
    "mel_filter_bank",
    "triangular_filters",
]

_SLANEY_LINEAR = 200 / 3
_SLANEY_LOG_STEP = math.log(6.4) / 27
#: Glasberg and Moore: quality of the auditory filters, and their width in Hz at frequency zero.
_EAR_Q, _LEAST_WIDTH = 9.26449, 24.7


def triangular_filters(edges: Tensor, places: Tensor) -> Tensor:
    """Triangles (F, P): row i rises from edges[i] to 1 at edges[i + 1] and falls to 0 at edges[i + 2].

    Args:
        edges: (F + 2,), ascending.
        places: (P,), where the triangles are taken.
    """
    edges = edges[:, None]
    rising = (places - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - places) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp_min(0)


def mel_filter_bank(
    sr: float,
    n_fft: int,
    n_mels: int = 128,
    fmin: float = 0.0,
    fmax: float | None = None,
    *,
    htk: bool = False,
    norm: Literal[1] | None = 1,
) -> Tensor:
    """Triangles in Hz whose corners lie at equal distances in mel, (n_mels, n_fft // 2 + 1) float64.

    Args:
        sr: sample rate in Hz.
        n_fft: samples of the Fourier transform.
        n_mels: number of bands.
        fmin, fmax: lowest and highest corner in Hz; fmax is half the sample rate by default.
        htk: mel = 2595 log10(1 + f / 700) instead of Slaney's scale, linear below 1000 Hz and logarithmic above.
        norm: 1 divides each triangle by half its width, None leaves its peak at 1.

    Warns:
        UserWarning: a band is so narrow that it holds no bin.

    Raises:
        ValueError: an argument is out of range.
    """
    high = sr / 2 if fmax is None else fmax
    if n_fft < 2 or n_mels < 1:
        raise ValueError(f"n_fft must be at least 2 and n_mels positive, got {n_fft} and {n_mels}")
    if not 0 <= fmin < high:
        raise ValueError(f"fmin must be from 0 to below fmax, got {fmin} and {high}")
    if norm not in (1, None):
        raise ValueError(f"norm must be 1 or None, got {norm!r}")
    to_mel, to_hertz = (_to_htk, _from_htk) if htk else (_to_slaney, _from_slaney)
    edges = to_hertz(np.linspace(to_mel(fmin), to_mel(high), n_mels + 2))
    corners = torch.from_numpy(edges)
    bins = torch.linspace(0, sr / 2, n_fft // 2 + 1, dtype=torch.float64)
    bank = triangular_filters(corners, bins)
    if norm is not None:
        bank = bank * (2 / (corners[2:] - corners[:-2]))[:, None]
    empty = (bank.amax(1) == 0).nonzero().flatten().tolist()
    if empty:
        warnings.warn(
            f"the Mel bands {empty} hold no bin of a transform of {n_fft} samples at {sr:g} Hz: take fewer n_mels or a "
            "larger n_fft",
            stacklevel=2,
        )
    return bank


def _to_htk(hertz: float) -> float:
    return 2595 * math.log10(1 + hertz / 700)


def _from_htk(mel: _Array) -> _Array:
    return 700 * (10 ** (mel / 2595) - 1)


def _to_slaney(hertz: float) -> float:
    return hertz / _SLANEY_LINEAR if hertz < 1000 else 15 + math.log(hertz / 1000) / _SLANEY_LOG_STEP


def _from_slaney(mel: _Array) -> _Array:
    return np.where(mel < 15, mel * _SLANEY_LINEAR, 1000 * np.exp((mel - 15) * _SLANEY_LOG_STEP))


def gammatone_filter_bank(
    sr: float, n_fft: int, n_bins: int = 64, fmin: float = 20.0, fmax: float | None = None
) -> Tensor:
    """Magnitudes of fourth-order gammatone filters at the bins of a transform, (n_bins, n_fft // 2 + 1) float64.

    The centres lie at equal distances on the scale of equivalent rectangular bandwidths, the lowest at fmin; the values
    are divided by n_fft.

    Raises:
        ValueError: an argument is out of range.
    """
    high = sr / 2 if fmax is None else fmax
    if n_fft < 2 or n_bins < 1:
        raise ValueError(f"n_fft must be at least 2 and n_bins positive, got {n_fft} and {n_bins}")
    if not 0 <= fmin < high:
        raise ValueError(f"fmin must be from 0 to below fmax, got {fmin} and {high}")
    c, T = _EAR_Q * _LEAST_WIDTH, 1 / sr
    j = np.arange(n_bins, 0, -1)
    f = (high + c) * np.exp(j * (math.log(fmin + c) - math.log(high + c)) / n_bins) - c
    B = 1.019 * 2 * np.pi * (f / _EAR_Q + _LEAST_WIDTH)
    theta, decay = 2 * np.pi * f * T, np.exp(-B * T)
    signs = np.array([[a * math.sqrt(3 + b * 2**1.5)] for a in (1, -1) for b in (1, -1)])
    mix = np.cos(theta) + signs * np.sin(theta)
    turn = np.exp(2j * theta)
    numerator = np.prod(-2 * turn * T + 2 * decay * np.exp(1j * theta) * T * mix, axis=0)
    denominator = (-2 * decay**2 - 2 * turn + 2 * (1 + turn) * decay) ** 4
    gain = np.abs(numerator / denominator)
    u = np.exp(2j * np.pi * np.arange(n_fft // 2 + 1) / n_fft)
    zeros, pole = decay * mix, (decay * np.exp(1j * theta))[:, None]
    response = np.abs(u - zeros[:, :, None]).prod(0) * np.abs((pole - u) * (pole.conj() - u)) ** -4
    return torch.from_numpy((T**4 / gain)[:, None] * response / n_fft)


def decibels(
    power: Tensor,
    *,
    ref: float | Tensor = 1.0,
    amin: float | Tensor = 1e-10,
    top_db: float | None = 80.0,
    loudest: Tensor | None = None,
) -> Tensor:
    """10 log10(power / ref) of (B, F, T), no lower than ``top_db`` below the largest value of each sample.

    Args:
        power: (B, F, T), not negative.
        ref: power of 0 dB.
        amin: smaller powers, and a smaller ref, count as this.
        top_db: None for no floor.
        loudest: largest power (B, 1, 1) of the samples that ``power`` is a part of; by default its own.
    """
    least, reference = (torch.as_tensor(value, dtype=power.dtype, device=power.device) for value in (amin, ref))

    def level(values: Tensor) -> Tensor:
        return 10 * torch.maximum(values, least).log10() - 10 * torch.maximum(least, reference).log10()

    if top_db is None:
        return level(power)
    highest = power.amax(dim=(-2, -1), keepdim=True) if loudest is None else loudest
    return torch.maximum(level(power), level(highest) - top_db)


def discrete_cosine_basis(size: int, *, orthonormal: bool = True) -> Tensor:
    """DCT-II: row m holds s_m cos(pi m (2 j + 1) / (2 M)), (M, M) float64.

    Args:
        size: M.
        orthonormal: s_0 = sqrt(1 / M), else sqrt(2 / M); otherwise s_m = 2.
    """
    m, j = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)
    basis = 2 * (math.pi * m * (2 * j + 1) / (2 * size)).cos()
    if orthonormal:
        basis = basis * math.sqrt(1 / (2 * size))
        basis[0] /= math.sqrt(2)
    return basis


def log_frequency_maps(
    fs: float, n_fft: int, fr: float, fc: float, tc: float, bins_per_octave: int
) -> tuple[Tensor, Tensor]:
    """Triangular maps from frequencies and from quefrencies to bins fc 2^(i / bins_per_octave) below 1 / tc.

    Row 0 of both is zero.

    Args:
        fs: sample rate in Hz.
        n_fft: samples of the transform.
        fr: distance of its bins in Hz.
        fc: lowest frequency in Hz.
        tc: shortest quefrency in seconds.
        bins_per_octave: of the result.

    Returns:
        (bins - 1, round(1 / (tc fr)) + 1) for frequencies and (bins - 1, round(fs / fc) + 1) for quefrencies, float64.

    Raises:
        ValueError: fewer than three bins fit between fc and 1 / tc.
    """
    count = math.ceil(bins_per_octave * math.log2(1 / tc / fc)) if 0 < fc * tc < 1 else 0
    centres = fc * 2.0 ** (np.arange(count + 1) / bins_per_octave)
    centres = centres[centres < 1 / tc]
    if len(centres) < 3:
        raise ValueError(f"fc must be so far below 1 / tc that three bins lie between, got {fc:g} and {1 / tc:g} Hz")
    frequency = np.zeros((len(centres) - 1, round(1 / tc / fr) + 1))
    quefrency = np.zeros((len(centres) - 1, round(fs / fc) + 1))
    # The half of the spectrum is spread over its first half of bins with both ends, a little wider than fr.
    hertz = np.linspace(0, fs / 2, n_fft // 2)[: frequency.shape[1]]
    with np.errstate(divide="ignore"):
        period = fs / np.arange(quefrency.shape[1])
    for i in range(1, len(centres) - 1):
        below, centre, above = centres[i - 1 : i + 2]
        first, last = round(below / fr), round(above / fr) + 1
        if first >= last - 1:
            frequency[i, first] = 1
        else:
            span = slice(first, last)
            frequency[i, span] = _triangle(hertz[span], below, centre, above)
        span = slice(round(fs / above), round(fs / below) + 1)
        quefrency[i, span] = _triangle(period[span], below, centre, above)
    return torch.from_numpy(frequency), torch.from_numpy(quefrency)


def _triangle(f: _Array, below: float, centre: float, above: float) -> _Array:
    # The centre itself counts on neither side, as in the published code.
    rising = np.where((below < f) & (f < centre), (f - below) / (centre - below), 0)
    return rising + np.where((centre < f) & (f < above), (above - f) / (above - centre), 0)
