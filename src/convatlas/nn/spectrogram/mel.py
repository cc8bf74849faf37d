"""Mel spectrogram, Mel-frequency cepstral coefficients and gammatonegram: filters on the bins of an STFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from convatlas.nn.spectrogram.fourier import STFT
from convatlas.nn.spectrogram.signals import SpectrogramLayer, magnitude
from convatlas.ops.filter_banks import decibels, discrete_cosine_basis, gammatone_filter_bank, mel_filter_bank
from convatlas.ops.framing import PadMode, Window, frame_pieces
from convatlas.ops.precision import without_autocast
from convatlas.ops.strided_correlation import Band

__all__ = ["MFCC", "Gammatonegram", "MelSpectrogram"]

#: Groups of neighbouring Mel bands that are computed from the bins of their filters only.
_GROUPS = 4


class MelSpectrogram(SpectrogramLayer):
    """Powers of an STFT summed in Mel bands: (B, n_mels, T).

    Args:
        sr: sample rate in Hz.
        n_fft, win_length, hop_length, window, center, pad_mode: as `STFT` takes them.
        n_mels: number of bands.
        power: exponent of the magnitudes, 1 or 2 mostly.
        htk: HTK's Mel scale instead of Slaney's.
        fmin, fmax: lowest and highest frequency in Hz; fmax is half the sample rate by default.
        norm: 1 divides each band by half its width, None leaves its peak at 1.
        trainable_mel: train the bands.
        trainable_STFT: train the kernels of the STFT.
        verbose: log when kernels are made.
        stft: further arguments of `STFT`, e.g. ``backend``.
        dtype, device: of the kernels.

    Raises:
        ValueError: an argument is out of range or unknown.
    """

    mel_basis: Tensor

    def __init__(
        self,
        sr: float = 22050,
        n_fft: int = 2048,
        win_length: int | None = None,
        n_mels: int = 128,
        hop_length: int = 512,
        window: Window = "hann",
        center: bool = True,
        pad_mode: PadMode = "reflect",
        power: float = 2.0,
        htk: bool = False,
        fmin: float = 0.0,
        fmax: float | None = None,
        norm: Literal[1] | None = 1,
        trainable_mel: bool = False,
        trainable_STFT: bool = False,
        verbose: bool = False,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **stft: Any,
    ) -> None:
        super().__init__(verbose)
        self.power = _checked_power(power)
        options = {"window": window, "center": center, "pad_mode": pad_mode, "trainable": trainable_STFT, "sr": sr}
        self.stft = _magnitudes(n_fft, win_length, hop_length, {**options, "dtype": dtype, "device": device, **stft})
        basis = mel_filter_bank(sr, n_fft, n_mels, fmin, fmax, htk=htk, norm=norm)
        self.keep("mel_basis", basis.to(device, self.stft.window_mask.dtype), trainable_mel)
        self.parts: tuple[Band, ...] | None = None
        _find_parts(self, None)
        self.after_loading(_find_parts)

    @property
    def reach(self) -> int | None:
        """Samples before and after the middle of a frame that it depends on; None where frames are not centred."""
        return self.stft.reach

    @property
    def hop_length(self) -> int:
        """Samples from one frame to the next."""
        return self.stft.hop_length

    def forward(self, x: Tensor) -> Tensor:
        """Mel spectrogram of signals."""
        return _banded(self.stft, x, self.mel_basis, self.power, self.parts)

    def magnitudes(self, bands: Tensor, n_iter: int = 100) -> Tensor:
        """Magnitudes (B, n_fft // 2 + 1, T) that give a Mel spectrogram; `Griffin_Lim` makes a signal of them.

        Args:
            bands: (B, bands, T), not negative.
            n_iter: steps of the search for the nearest ones.

        Raises:
            ValueError: bands have another shape or are negative.
        """
        return _unbanded(bands, self.mel_basis, self.power, n_iter)


class MFCC(SpectrogramLayer):
    """Mel-frequency cepstral coefficients, the cosine transform of a Mel spectrogram in decibels: (B, n_mfcc, T).

    Args:
        sr: sample rate in Hz.
        n_mfcc: number of coefficients, at most n_mels.
        norm: ``ortho`` for the orthonormal cosine transform, None for the plain one.
        verbose: log when kernels are made.
        ref: power of 0 dB.
        amin: smaller powers count as this.
        top_db: largest distance in dB below the maximum of a sample; None for any.
        legacy_arguments: nnAudio's numbers: norm is ignored, the transform is orthonormal always.
        mel: arguments of `MelSpectrogram`.

    Raises:
        ValueError: an argument is out of range or unknown.
    """

    amin: Tensor
    ref: Tensor
    dct: Tensor

    def __init__(
        self,
        sr: float = 22050,
        n_mfcc: int = 20,
        norm: Literal["ortho"] | None = "ortho",
        verbose: bool = False,
        ref: float = 1.0,
        amin: float = 1e-10,
        top_db: float | None = 80.0,
        *,
        legacy_arguments: bool = False,
        **mel: Any,
    ) -> None:
        super().__init__(verbose)
        if amin <= 0 or ref <= 0:
            raise ValueError(f"amin and ref must be positive, got {amin} and {ref}")
        if top_db is not None and top_db < 0:
            raise ValueError(f"top_db must not be negative, got {top_db}")
        if norm not in ("ortho", None):
            raise ValueError(f"norm must be 'ortho' or None, got {norm!r}")
        self.melspec_layer = MelSpectrogram(sr=sr, **mel)
        basis = self.melspec_layer.mel_basis
        if not 1 <= n_mfcc <= basis.shape[0]:
            raise ValueError(f"n_mfcc must be from 1 to n_mels = {basis.shape[0]}, got {n_mfcc}")
        self.top_db = top_db
        self.keep("amin", torch.tensor([amin], dtype=basis.dtype, device=basis.device))
        self.keep("ref", torch.tensor([abs(ref)], dtype=basis.dtype, device=basis.device))
        rows = discrete_cosine_basis(basis.shape[0], orthonormal=legacy_arguments or norm == "ortho")[:n_mfcc]
        self.register_buffer("dct", rows.to(basis), persistent=False)

    @property
    def hop_length(self) -> int:
        """Samples from one frame to the next."""
        return self.melspec_layer.hop_length

    def cepstrum(self, mel: Tensor, loudest: Tensor | None = None) -> Tensor:
        """Coefficients (B, n_mfcc, T) of a Mel spectrogram (B, n_mels, T), whose largest value is (B, 1, 1).

        It is that of the whole signals where ``mel`` is a part; by default that of ``mel``.
        """
        level = decibels(mel, ref=self.ref, amin=self.amin, top_db=self.top_db, loudest=loudest)
        with without_autocast(level):
            return self.dct.to(level.dtype) @ level

    def forward(self, x: Tensor) -> Tensor:
        """Cepstral coefficients of signals."""
        return self.cepstrum(self.melspec_layer(x))


class Gammatonegram(SpectrogramLayer):
    """Powers of an STFT summed with the responses of gammatone filters: (B, n_bins, T).

    Args:
        sr: sample rate in Hz.
        n_fft, win_length, hop_length, window, center, pad_mode: as `STFT` takes them.
        n_bins: number of filters.
        power: exponent of the magnitudes.
        fmin, fmax: lowest and highest frequency in Hz; fmax is half the sample rate by default.
        trainable_bins: train the filters.
        trainable_STFT: train the kernels of the STFT.
        verbose: log when kernels are made.
        stft: further arguments of `STFT`, e.g. ``backend``.
        dtype, device: of the kernels.

    Raises:
        ValueError: an argument is out of range or unknown.
    """

    gammatone_basis: Tensor

    def __init__(
        self,
        sr: float = 22050,
        n_fft: int = 2048,
        win_length: int | None = None,
        n_bins: int = 64,
        hop_length: int = 512,
        window: Window = "hann",
        center: bool = True,
        pad_mode: PadMode = "reflect",
        power: float = 2.0,
        fmin: float = 0.0,
        fmax: float | None = None,
        trainable_bins: bool = False,
        trainable_STFT: bool = False,
        verbose: bool = False,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **stft: Any,
    ) -> None:
        super().__init__(verbose)
        self.power = _checked_power(power)
        options = {"window": window, "center": center, "pad_mode": pad_mode, "trainable": trainable_STFT, "sr": sr}
        self.stft = _magnitudes(n_fft, win_length, hop_length, {**options, "dtype": dtype, "device": device, **stft})
        basis = gammatone_filter_bank(sr, n_fft, n_bins, fmin, fmax)
        self.keep("gammatone_basis", basis.to(device, self.stft.window_mask.dtype), trainable_bins)

    @property
    def reach(self) -> int | None:
        """Samples before and after the middle of a frame that it depends on; None where frames are not centred."""
        return self.stft.reach

    @property
    def hop_length(self) -> int:
        """Samples from one frame to the next."""
        return self.stft.hop_length

    def forward(self, x: Tensor) -> Tensor:
        """Gammatonegram of signals."""
        return _banded(self.stft, x, self.gammatone_basis, self.power)

    def magnitudes(self, bands: Tensor, n_iter: int = 100) -> Tensor:
        """Magnitudes (B, n_fft // 2 + 1, T) that give a gammatonegram; `Griffin_Lim` makes a signal of them.

        Args:
            bands: (B, bands, T), not negative.
            n_iter: steps of the search for the nearest ones.

        Raises:
            ValueError: bands have another shape or are negative.
        """
        return _unbanded(bands, self.gammatone_basis, self.power, n_iter)


def _find_parts(layer: nn.Module, _: object) -> None:
    """Where groups of bands have no filter, from the values; trained ones may be zero nowhere soon."""
    if not isinstance(layer, MelSpectrogram):
        return
    basis = layer.mel_basis
    rows = -(-len(basis) // _GROUPS)
    found = []
    for first in range(0, len(basis), rows):
        last = min(first + rows, len(basis))
        places = basis[first:last].detach().ne(0).any(0).nonzero().flatten().tolist() or [0]
        found.append(Band(first, last, places[0], places[-1] + 1))
    layer.parts = None if isinstance(basis, nn.Parameter) else tuple(found)


def _checked_power(power: float) -> float:
    if not power > 0:
        raise ValueError(f"power must be positive, got {power}")
    return power


def _magnitudes(n_fft: int, win_length: int | None, hop_length: int, options: Mapping[str, Any]) -> STFT:
    return STFT(n_fft, win_length, hop_length=hop_length, output_format="Magnitude", **options)


def _banded(stft: STFT, x: Tensor, basis: Tensor, power: float, parts: tuple[Band, ...] | None = None) -> Tensor:
    """basis @ magnitudes^power, for as many frames at once as the cache holds."""
    bands = []
    with without_autocast(x):
        padded = stft.padded(x)
        if padded.shape[-1] < stft.n_fft:
            raise ValueError(f"a signal must have the n_fft = {stft.n_fft} samples of a frame, got {padded.shape[-1]}")
        for piece in frame_pieces(padded, stft.n_fft, stft.hop_length):
            spectrum = stft.spectrum(piece).transpose(1, 2)
            if power == 2 and not stft.trainable:
                real, imag = spectrum.unbind(-1)
                values = torch.addcmul(real * real, imag, imag)
            else:
                values = magnitude(spectrum, stft.trainable) ** power
            filters = basis.to(values.dtype).T
            if parts is None:
                bands.append(values @ filters)
            else:
                several = [values[..., start:stop] @ filters[start:stop, a:b] for a, b, start, stop in parts]
                bands.append(torch.cat(several, dim=2))
    return (bands[0] if len(bands) == 1 else torch.cat(bands, dim=1)).transpose(1, 2)


def _unbanded(bands: Tensor, basis: Tensor, power: float, n_iter: int) -> Tensor:
    """The magnitudes, not negative, with basis @ magnitudes^power nearest to ``bands``.

    Lee, Seung: "Algorithms for Non-negative Matrix Factorization", NIPS 2000: each step multiplies the powers by the
    gradient's parts, so that none gets negative, and the distance never grows. Bins of no filter are zero.
    """
    if bands.dim() != 3 or bands.shape[1] != len(basis):
        raise ValueError(f"bands must be (B, {len(basis)}, T), got {tuple(bands.shape)}")
    if bool((bands < 0).any()):
        raise ValueError(f"bands must not be negative, got {float(bands.min())}")
    with without_autocast(bands):
        wide = bands.to(torch.promote_types(bands.dtype, torch.float32))
        filters = basis.detach().to(wide)
        tiny = torch.finfo(wide.dtype).tiny
        wanted = filters.T @ wide
        powers = wanted
        for _ in range(n_iter):
            powers = powers * wanted / (filters.T @ (filters @ powers)).clamp_min(tiny)
        return (powers ** (1 / power)).to(bands.dtype)
