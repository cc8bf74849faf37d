"""Combined frequency and periodicity: a spectrum and a cepstrum that suppress each other's harmonics.

Su, Yang: "Combining Spectral and Temporal Representations for Multipitch Estimation of Polyphonic Music", IEEE/ACM
TASLP 2015.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convatlas.nn.spectrogram.signals import SpectrogramLayer, check_padding, magnitude, signals
from convatlas.ops.filter_banks import log_frequency_maps
from convatlas.ops.framing import frame_pieces, pad_ends, window, zero_padded
from convatlas.ops.precision import without_autocast
from convatlas.ops.stft import stft

__all__ = ["CFP", "Combined_Frequency_Periodicity", "Periodicity"]


class Periodicity(NamedTuple):
    """Maps (B, bins, T) over a logarithmic frequency: the product Z, the spectrum L0, and its two processed forms."""

    Z: Tensor
    tfrL0: Tensor
    tfrLF: Tensor
    tfrLQ: Tensor


class Combined_Frequency_Periodicity(SpectrogramLayer):
    """Product of a processed spectrum and a processed cepstrum; the first and the last frame are left out.

    Args:
        fr: distance of the bins of the transform in Hz.
        fs: sample rate in Hz.
        hop_length: samples from one frame to the next.
        window_size: samples of the Blackman-Harris window.
        fc: lowest frequency in Hz.
        tc: shortest quefrency in seconds.
        g: exponents of the layers, spectrum and cepstrum in turn; 0 stands for the logarithm.
        NumPerOct: bins in an octave of the result.
        dtype, device: of the buffers.

    Raises:
        ValueError: an argument is out of range.
    """

    _ends_kept = False
    freq2logfreq_matrix: Tensor
    quef2logfreq_matrix: Tensor
    h: Tensor

    def __init__(
        self,
        fr: float = 2,
        fs: float = 16000,
        hop_length: int = 320,
        window_size: int = 2049,
        fc: float = 80,
        tc: float = 1 / 1000,
        g: Sequence[float] = (0.24, 0.6, 1),
        NumPerOct: int = 48,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_padding(hop_length, "constant")
        self.n_fft = int(fs / fr)
        if not 1 <= window_size <= self.n_fft:
            raise ValueError(f"window_size must be from 1 to fs / fr = {self.n_fft}, got {window_size}")
        if len(g) < 2 or min(g) < 0:
            raise ValueError(f"g must hold at least two exponents, none negative, got {tuple(g)}")
        if NumPerOct < 1:
            raise ValueError(f"NumPerOct must be positive, got {NumPerOct}")
        self.hop_length, self.g = hop_length, tuple(g)
        self.low_bins, self.low_lags = round(fc / fr), round(fs * tc)
        frequency, quefrency = log_frequency_maps(fs, self.n_fft, fr, fc, tc, NumPerOct)
        kept: dict[str, Any] = {"dtype": dtype or torch.get_default_dtype(), "device": device}
        # Symmetric: a periodic one of one sample less, and the first sample again.
        shape = window("blackmanharris", window_size - 1) if window_size > 1 else torch.ones(1, dtype=torch.float64)
        shape = torch.cat([shape, shape[:1]]) if window_size > 1 else shape
        self.register_buffer("h", shape.to(**kept))
        self.register_buffer("freq2logfreq_matrix", frequency.to(**kept))
        self.register_buffer("quef2logfreq_matrix", quefrency.to(**kept))

    def forward(self, x: Tensor) -> Periodicity:
        """The product and its parts, of signals."""
        x = signals(x)
        dtype = torch.promote_types(x.dtype, self.h.dtype)
        with without_autocast(x):
            padded = pad_ends(x.to(torch.promote_types(x.dtype, torch.float32)), self.n_fft // 2, "constant")
            pieces = [self._maps(piece) for piece in frame_pieces(padded, self.n_fft, self.hop_length)]
        kept = slice(None) if self._ends_kept else slice(1, -1)
        return Periodicity(*(torch.cat(parts, dim=2)[:, :, kept].to(dtype) for parts in zip(*pieces, strict=True)))

    def _maps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        taper = zero_padded(self.h / self.h.norm(), self.n_fft)
        half = magnitude(stft(x, taper.to(x.dtype), self.hop_length), trained=False)
        # Both sides: the bins above half are those below in reverse.
        whole = torch.cat([half, half[:, 1 : self.n_fft - half.shape[1] + 1].flip(1)], dim=1)
        layers = {0: _compressed(whole, self.g[0], 0), 1: whole}
        for number, exponent in enumerate(self.g[1:], start=1):
            # The transform of a real even sequence.
            transformed = torch.fft.fft(layers[1 - number % 2], dim=1).real / math.sqrt(self.n_fft)
            layers[number % 2] = _compressed(transformed, exponent, self.low_lags if number % 2 else self.low_bins)
        frequency = self.freq2logfreq_matrix.to(whole.dtype)
        quefrency = self.quef2logfreq_matrix.to(whole.dtype)
        spectrum = frequency @ layers[0][:, : frequency.shape[1]]
        cepstrum = quefrency @ layers[1][:, : quefrency.shape[1]]
        return spectrum * cepstrum, frequency @ whole[:, : frequency.shape[1]], spectrum, cepstrum


class CFP(Combined_Frequency_Periodicity):
    """The same with all frames kept."""

    _ends_kept = True


def _compressed(x: Tensor, exponent: float, low: int) -> Tensor:
    """What is positive, to a power, without the ``low`` lowest entries (B, N, T) at either end."""
    x = x.relu()
    if exponent == 0:
        y = x.clamp_min(torch.finfo(x.dtype).tiny).log()
    elif exponent == 1:
        y = x
    else:
        # Zeros stay zero and get no gradient, which would be infinite.
        positive = x > 0
        y = torch.where(positive, torch.where(positive, x, 1) ** exponent, 0)
    inside = torch.zeros(x.shape[1], 1, dtype=torch.bool, device=x.device)
    inside[low : x.shape[1] - low] = True
    return torch.where(inside, y, 0)
