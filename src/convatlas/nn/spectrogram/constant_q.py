"""Constant-Q transforms as layers, with one kernel for each bin.

Each gives (B, n_bins, T), or (B, n_bins, T, 2) for complex output and for phases. The sinusoid of bin k has the
magnitude 1 in it with the normalisation ``wrap``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from convatlas.nn.spectrogram.constant_q_parts import (
    ConstantQ,
    by_spectra,
    correlated,
    keep_kernels,
    keep_spectra,
    make_bins,
)
from convatlas.nn.spectrogram.signals import OutputFormat
from convatlas.ops.constant_q import time_kernels
from convatlas.ops.framing import PadMode, Window
from convatlas.ops.strided_correlation import Band, bands

__all__ = ["CQT", "CQT1992", "CQT1992v2"]


class CQT1992v2(ConstantQ):
    """Constant-Q transform by convolution with one kernel for each bin; `CQT` is the same.

    Args:
        sr: sample rate in Hz.
        hop_length: samples from one frame to the next.
        fmin: frequency of the lowest bin in Hz.
        fmax: highest frequency in Hz, which n_bins then follows from.
        n_bins: number of bins.
        bins_per_octave: of them.
        filter_scale: length of the filters; below 1 they are shorter and less selective.
        norm: 1 or 2, of each kernel; 0 or None leaves them.
        window: what `scipy.signal.get_window` takes, or ``("gaussian", dB)``.
        center: surround the signal by half a kernel, so that frame t has its middle at t hop.
        pad_mode: ``reflect`` or ``constant``.
        trainable: train the kernels; magnitudes are then sqrt(re^2 + im^2 + 1e-8).
        output_format: ``Magnitude``, ``Complex`` (real and imaginary part) or ``Phase`` (cosine and sine).
        verbose: log when kernels are made.
        dtype: of the kernels; they are computed in float64.
        device: of the kernels.

    Raises:
        ValueError: an argument is out of range or unknown, or the top bin lies above half the sample rate.
    """

    cqt_kernels_real: Tensor
    cqt_kernels_imag: Tensor

    def __init__(
        self,
        sr: float = 22050,
        hop_length: int = 512,
        fmin: float = 32.70,
        fmax: float | None = None,
        n_bins: int | None = 84,
        bins_per_octave: int = 12,
        filter_scale: float = 1,
        norm: float | None = 1,
        window: Window = "hann",
        center: bool = True,
        pad_mode: PadMode = "reflect",
        trainable: bool = False,
        output_format: OutputFormat = "Magnitude",
        verbose: bool = False,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        bins = make_bins(fmin, fmax, n_bins, bins_per_octave, filter_scale)
        super().__init__(bins, sr, hop_length, pad_mode, output_format, verbose)
        self.center, self.trained = center, trainable
        kernels = time_kernels(bins, sr, kind=window, norm=norm)
        keep_kernels(self, kernels, "", trainable, dtype, device)
        self.keep("lengths", bins.lengths(sr).to(device, dtype or torch.get_default_dtype()))
        self.parts: tuple[Band, ...] | None = None
        _find_bands(self, None)
        self.after_loading(_find_bands)

    @property
    def reach(self) -> int | None:
        """Samples before and after the middle of a frame that it depends on; None where frames are not centred."""
        return self.cqt_kernels_real.shape[-1] // 2 if self.center else None

    def transform(self, x: Tensor) -> Tensor:
        """Real and imaginary parts (B, n_bins, T, 2) of signals (B, L), without normalisation."""
        width = self.cqt_kernels_real.shape[-1]
        if self.center:
            x = self.surrounded(x, width)
        elif x.shape[-1] < width:
            raise ValueError(f"without padding x must have the {width} samples of a kernel, got {x.shape[-1]}")
        return correlated(x, self.cqt_kernels_real, self.cqt_kernels_imag, self.hop_length, self.parts)


CQT = CQT1992v2


class CQT1992(ConstantQ):
    """Constant-Q transform by an STFT and products with the spectra of the kernels, whose STFT may be trained too.

    The kernels of the STFT take 4 W^2 bytes, W the samples of the longest kernel: for low frequencies take `CQT1992v2`.

    Args:
        trainable_STFT: train the kernels of the STFT.
        trainable_CQT: train the spectra.
        legacy_spectra: nnAudio's numbers: phases have the sign opposite to that of complex output, and
            ``convolutional`` is larger by W.
        sr, hop_length, fmin, fmax, n_bins: as `CQT1992v2` takes them.
        bins_per_octave, filter_scale, output_format, norm, window, center, pad_mode, verbose, dtype, device: the same.

    Raises:
        ValueError: an argument is out of range or unknown, or the top bin lies above half the sample rate.
    """

    wsin: Tensor
    wcos: Tensor
    cqt_kernels_real: Tensor
    cqt_kernels_imag: Tensor

    def __init__(
        self,
        sr: float = 22050,
        hop_length: int = 512,
        fmin: float = 220,
        fmax: float | None = None,
        n_bins: int | None = 84,
        trainable_STFT: bool = False,
        trainable_CQT: bool = False,
        bins_per_octave: int = 12,
        filter_scale: float = 1,
        output_format: OutputFormat = "Magnitude",
        norm: float | None = 1,
        window: Window = "hann",
        center: bool = True,
        pad_mode: PadMode = "reflect",
        verbose: bool = False,
        *,
        legacy_spectra: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        bins = make_bins(fmin, fmax, n_bins, bins_per_octave, filter_scale)
        super().__init__(bins, sr, hop_length, pad_mode, output_format, verbose)
        self.center, self.trained, self.legacy_spectra = center, trainable_STFT or trainable_CQT, legacy_spectra
        keep_spectra(self, time_kernels(bins, sr, kind=window, norm=norm), trainable_STFT, trainable_CQT, dtype, device)
        self.keep("lengths", bins.lengths(sr).to(device, dtype or torch.get_default_dtype()))

    @property
    def reach(self) -> int | None:
        """Samples before and after the middle of a frame that it depends on; None where frames are not centred."""
        return self.wcos.shape[-1] // 2 if self.center else None

    def gain(self, normalization_type: str) -> float:
        """A factor of the normalisation that is common to all bins."""
        return float(self.wcos.shape[-1]) if self.legacy_spectra and normalization_type == "convolutional" else 1.0

    def conjugated(self, output_format: str) -> bool:
        """Whether the imaginary part of an output has the opposite sign."""
        return self.legacy_spectra and output_format == "Phase"

    def transform(self, x: Tensor) -> Tensor:
        """Real and imaginary parts (B, n_bins, T, 2) of signals (B, L), without normalisation."""
        width = self.wcos.shape[-1]
        if self.center:
            x = self.surrounded(x, width)
        elif x.shape[-1] < width:
            raise ValueError(f"without padding x must have the {width} samples of a kernel, got {x.shape[-1]}")
        return by_spectra(self, x, self.hop_length)


def _find_bands(layer: nn.Module, _: object) -> None:
    """Where the kernels are zero, from their values; trained ones may be zero nowhere soon."""
    if isinstance(layer, CQT1992v2):
        real, imag = layer.cqt_kernels_real.detach(), layer.cqt_kernels_imag.detach()
        layer.parts = None if layer.trained else bands((real.abs() + imag.abs()).squeeze(1))
