"""Constant-Q and variable-Q transforms as layers, octave by octave of a signal that is decimated in between.

Outputs are those of `convatlas.nn.spectrogram.constant_q`.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.nn.spectrogram.constant_q_parts import (
    ConstantQ,
    by_spectra,
    correlated,
    keep_kernels,
    keep_spectra,
    make_bins,
)
from convatlas.nn.spectrogram.signals import OutputFormat
from convatlas.ops.constant_q import Bins, early_factor, lowpass_filter, time_kernels
from convatlas.ops.framing import PadMode, Window
from convatlas.ops.strided_correlation import decimate

__all__ = ["CQT2010", "VQT", "CQT2010v2"]


class _MultiRate(ConstantQ):
    """Octave by octave: the same number of samples an octave serves all, because the signal is decimated in between."""

    lowpass_filter: Tensor
    early_downsample_filter: Tensor | None
    _legacy_gain: float

    def __init__(
        self,
        bins: Bins,
        sr: float,
        hop_length: int,
        pad_mode: str,
        output_format: str,
        verbose: bool,
        *,
        earlydownsample: bool,
        basis_norm: float | None,
        window: Window,
        rounded_hop: bool,
        legacy_downsample: bool,
        legacy_octave: bool,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        super().__init__(bins, sr, hop_length, pad_mode, output_format, verbose)
        kind = dtype or torch.get_default_dtype()
        factor = early_factor(bins, sr, hop_length) if earlydownsample else 1
        self.downsample_factor, self.rounded_hop, self.legacy_downsample = factor, rounded_hop, legacy_downsample
        self.basis_norm, self.window, self.highest_octave = basis_norm, window, bins.highest_octave
        if legacy_octave and bins.n_bins < bins.bins_per_octave:
            self.highest_octave = bins._replace(fmin=float(bins.frequencies[-1]) / 2 ** (1 - 1 / bins.bins_per_octave))
        self.early_sr = sr / factor
        lowest_hop = hop_length // factor >> (bins.octaves - 1)
        if lowest_hop < 1 and not rounded_hop:
            raise ValueError(
                f"hop_length must be at least {factor << (bins.octaves - 1)} for {bins.octaves} octaves, got "
                f"{hop_length}; rounded_hop=True takes any"
            )
        self.register_buffer("lowpass_filter", lowpass_filter(0.5).view(1, 1, -1).to(device, kind))
        early = lowpass_filter(1 / factor, transition=0.03).view(1, 1, -1).to(device, kind) if factor > 1 else None
        self.register_buffer("early_downsample_filter", early)
        self.keep("lengths", bins.lengths(self.early_sr).to(device, kind))

    def gain(self, normalization_type: str) -> float:
        """Makes up for filters that are shorter at the reduced sample rate."""
        if self.legacy_downsample:
            return self._legacy_gain
        root: float = self.downsample_factor**0.5
        return (root if normalization_type == "librosa" else 1.0) * (root if self.basis_norm == 2 else 1.0)

    @property
    def reach(self) -> int | None:
        """Samples before and after the middle of a frame that it depends on."""
        widths = [
            value.shape[-1] for name, value in self.state_dict().items() if "cqt_kernels" in name or name == "wcos"
        ]
        # All the low-pass filters together reach as far as twice the last one.
        return self._lowest_rate * (max(widths) + 2 * self.lowpass_filter.shape[-1])

    @property
    def grid(self) -> int:
        """A signal may be cut at multiples of so many samples without a change of the frames far from the cut."""
        return self._lowest_rate

    @property
    def _lowest_rate(self) -> int:
        """Samples of the signal for one sample of the lowest octave."""
        return self.downsample_factor << (self.bins.octaves - 1)

    @abstractmethod
    def octave(self, x: Tensor, number: int, hop: int, places: Tensor | None) -> Tensor:
        """Real and imaginary parts of octave ``number``, 0 is the highest, of a signal at its rate."""

    def transform(self, x: Tensor) -> Tensor:
        """Real and imaginary parts (B, n_bins, T, 2) of signals (B, L), without normalisation."""
        length = x.shape[-1]
        if self.early_downsample_filter is not None:
            x = decimate(x, self.early_downsample_filter.flatten(), self.downsample_factor)
        found = []
        for number in range(self.bins.octaves):
            if number:
                x = decimate(x, self.lowpass_filter.flatten(), 2)
            scale = self.downsample_factor << number
            places = None
            if self.rounded_hop:
                times = torch.arange(1 + length // self.hop_length, device=x.device, dtype=torch.float64)
                places = (times * self.hop_length / scale).round().long().clamp_max(x.shape[-1])
            found.append(self.octave(x, number, self.hop_length // scale, places))
        return torch.cat(self._joined(found)[::-1], dim=1)[:, -self.bins.n_bins :]

    def _joined(self, octaves: list[Tensor]) -> list[Tensor]:
        counts = [octave.shape[2] for octave in octaves]
        least = min(counts)
        if max(counts) == least:
            return octaves
        factor = self._lowest_rate
        if self.hop_length % factor:
            warnings.warn(
                f"hop_length {self.hop_length} is no multiple of {factor}, so octaves have {least} to {max(counts)} "
                "frames and are resampled to the fewest; rounded_hop=True places the frames rightly",
                stacklevel=4,
            )
        return [
            octave
            if octave.shape[2] == least
            else F.interpolate(octave, size=(least, 2), mode="bilinear", align_corners=False)
            for octave in octaves
        ]


class CQT2010(_MultiRate):
    """Constant-Q transform, octave by octave, each by an STFT and the spectra of the kernels of the highest one.

    Args:
        basis_norm: 1 or 2, of each kernel; 0 or None leaves them.
        trainable_STFT: train the kernels of the STFT.
        trainable_CQT: train the spectra.
        earlydownsample: decimate the signal first where the highest bin allows it.
        rounded_hop: put each frame of each octave at the sample nearest to its time, for any hop_length; otherwise the
            hop is halved and rounded down from octave to octave.
        legacy_downsample: nnAudio's scale after an early decimation by f, smaller by sqrt(f).
        legacy_spectra: nnAudio's numbers: imaginary parts have the opposite sign, and ``convolutional`` is larger by
            the samples of a kernel.
        legacy_arguments: what nnAudio ignores is ignored: fmax beside n_bins, and the window, which is a Hann window.
        legacy_octave: nnAudio's filters for fewer bins than an octave, which end an octave above their first instead of
            beginning at fmin, so that they find lower frequencies.
        sr, hop_length, fmin, fmax, n_bins: as `CQT1992v2` takes them.
        bins_per_octave, window, pad_mode, filter_scale, output_format, verbose, dtype, device: the same.

    Raises:
        ValueError: an argument is out of range or unknown, or the top bin lies above half the sample rate.
    """

    _legacy_gain = 1.0
    wsin: Tensor
    wcos: Tensor

    def __init__(
        self,
        sr: float = 22050,
        hop_length: int = 512,
        fmin: float = 32.70,
        fmax: float | None = None,
        n_bins: int | None = 84,
        bins_per_octave: int = 12,
        basis_norm: float | None = 1,
        window: Window = "hann",
        pad_mode: PadMode = "reflect",
        trainable_STFT: bool = False,
        filter_scale: float = 1,
        trainable_CQT: bool = False,
        output_format: OutputFormat = "Magnitude",
        earlydownsample: bool = True,
        verbose: bool = False,
        *,
        rounded_hop: bool = False,
        legacy_downsample: bool = False,
        legacy_arguments: bool = False,
        legacy_octave: bool = False,
        legacy_spectra: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            make_bins(fmin, fmax, n_bins, bins_per_octave, filter_scale, legacy_arguments=legacy_arguments),
            *(sr, hop_length, pad_mode, output_format, verbose),
            earlydownsample=earlydownsample,
            basis_norm=basis_norm,
            window="hann" if legacy_arguments else window,
            rounded_hop=rounded_hop,
            legacy_downsample=legacy_downsample,
            legacy_octave=legacy_octave,
            dtype=dtype,
            device=device,
        )
        self.trained, self.legacy_spectra = trainable_STFT or trainable_CQT, legacy_spectra
        kernels = time_kernels(self.highest_octave, self.early_sr, kind=self.window, norm=basis_norm)
        keep_spectra(self, kernels, trainable_STFT, trainable_CQT, dtype, device)

    def gain(self, normalization_type: str) -> float:
        """Makes up for filters that are shorter at the reduced sample rate."""
        wider = self.legacy_spectra and normalization_type == "convolutional"
        return super().gain(normalization_type) * (self.wcos.shape[-1] if wider else 1)

    def conjugated(self, output_format: str) -> bool:
        """Whether the imaginary part of an output has the opposite sign."""
        return self.legacy_spectra

    def octave(self, x: Tensor, number: int, hop: int, places: Tensor | None) -> Tensor:
        """Real and imaginary parts of octave ``number``, 0 is the highest, of a signal at its rate."""
        x = self.surrounded(x, self.wcos.shape[-1])
        return by_spectra(self, x, hop, places)


class CQT2010v2(_MultiRate):
    """Constant-Q transform, octave by octave, by convolution with the kernels of the highest one.

    Args:
        basis_norm: 1 or 2, of each kernel; 0 or None leaves them.
        earlydownsample: decimate the signal first where the highest bin allows it.
        trainable: train the kernels; magnitudes are then sqrt(re^2 + im^2 + 1e-8).
        rounded_hop: put each frame of each octave at the sample nearest to its time, for any hop_length; otherwise the
            hop is halved and rounded down from octave to octave.
        legacy_downsample: nnAudio's scale after an early decimation by f, larger by sqrt(f).
        legacy_arguments: what nnAudio ignores is ignored: fmax beside n_bins, and the window, which is a Hann window.
        legacy_octave: nnAudio's filters for fewer bins than an octave, which end an octave above their first instead of
            beginning at fmin, so that they find lower frequencies.
        sr, hop_length, fmin, fmax, n_bins: as `CQT1992v2` takes them.
        filter_scale, bins_per_octave, window, pad_mode, output_format, verbose, dtype, device: the same.

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
        filter_scale: float = 1,
        bins_per_octave: int = 12,
        basis_norm: float | None = 1,
        window: Window = "hann",
        pad_mode: PadMode = "reflect",
        earlydownsample: bool = True,
        trainable: bool = False,
        output_format: OutputFormat = "Magnitude",
        verbose: bool = False,
        *,
        rounded_hop: bool = False,
        legacy_downsample: bool = False,
        legacy_arguments: bool = False,
        legacy_octave: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            make_bins(fmin, fmax, n_bins, bins_per_octave, filter_scale, legacy_arguments=legacy_arguments),
            *(sr, hop_length, pad_mode, output_format, verbose),
            earlydownsample=earlydownsample,
            basis_norm=basis_norm,
            window="hann" if legacy_arguments else window,
            rounded_hop=rounded_hop,
            legacy_downsample=legacy_downsample,
            legacy_octave=legacy_octave,
            dtype=dtype,
            device=device,
        )
        self.trained, self._legacy_gain = trainable, float(self.downsample_factor)
        kernels = time_kernels(self.highest_octave, self.early_sr, kind=self.window, norm=basis_norm)
        keep_kernels(self, kernels, "", trainable, dtype, device)

    def octave(self, x: Tensor, number: int, hop: int, places: Tensor | None) -> Tensor:
        """Real and imaginary parts of octave ``number``, 0 is the highest, of a signal at its rate."""
        x = self.surrounded(x, self.cqt_kernels_real.shape[-1])
        return correlated(x, self.cqt_kernels_real, self.cqt_kernels_imag, hop, None, places)


class VQT(_MultiRate):
    """Variable-Q transform: as `CQT2010v2`, with kernels for each octave, of which gamma shortens the low ones.

    Args:
        basis_norm: 1 or 2, of each kernel; 0 or None leaves them.
        gamma: Hz that are added to each bandwidth; 0 gives a constant quality.
        earlydownsample: decimate the signal first where the highest bin allows it.
        trainable: train the kernels; magnitudes are then sqrt(re^2 + im^2 + 1e-8).
        rounded_hop: put each frame of each octave at the sample nearest to its time, for any hop_length; otherwise the
            hop is halved and rounded down from octave to octave.
        legacy_downsample: after an early decimation by f, nnAudio's scale and its kernels, made for the rate before
            it, which find frequencies that are lower by f.
        legacy_arguments: what nnAudio ignores is ignored: fmax beside n_bins, and the window, which is a Hann window.
        legacy_octave: nnAudio's filters for fewer bins than an octave, which end an octave above their first instead of
            beginning at fmin, so that they find lower frequencies.
        sr, hop_length, fmin, fmax, n_bins: as `CQT1992v2` takes them.
        filter_scale, bins_per_octave, window, pad_mode, output_format, verbose, dtype, device: the same.

    Raises:
        ValueError: an argument is out of range or unknown, or the top bin lies above half the sample rate.
    """

    def __init__(
        self,
        sr: float = 22050,
        hop_length: int = 512,
        fmin: float = 32.70,
        fmax: float | None = None,
        n_bins: int | None = 84,
        filter_scale: float = 1,
        bins_per_octave: int = 12,
        basis_norm: float | None = 1,
        gamma: float = 0,
        window: Window = "hann",
        pad_mode: PadMode = "reflect",
        earlydownsample: bool = True,
        trainable: bool = False,
        output_format: OutputFormat = "Magnitude",
        verbose: bool = False,
        *,
        rounded_hop: bool = False,
        legacy_downsample: bool = False,
        legacy_arguments: bool = False,
        legacy_octave: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if gamma < 0:
            raise ValueError(f"gamma must not be negative, got {gamma}")
        super().__init__(
            make_bins(fmin, fmax, n_bins, bins_per_octave, filter_scale, gamma, legacy_arguments=legacy_arguments),
            *(sr, hop_length, pad_mode, output_format, verbose),
            earlydownsample=earlydownsample,
            basis_norm=basis_norm,
            window="hann" if legacy_arguments else window,
            rounded_hop=rounded_hop,
            legacy_downsample=legacy_downsample,
            legacy_octave=legacy_octave,
            dtype=dtype,
            device=device,
        )
        self.trained, self._legacy_gain = trainable, float(self.downsample_factor)
        top, rate = self.highest_octave, sr if legacy_downsample else self.early_sr
        for number in range(self.bins.octaves):
            bins = top._replace(fmin=top.fmin / 2**number)
            kernels = time_kernels(bins, rate / 2**number, kind=self.window, norm=basis_norm)
            keep_kernels(self, kernels, f"_{number}", trainable, dtype, device)

    def octave(self, x: Tensor, number: int, hop: int, places: Tensor | None) -> Tensor:
        """Real and imaginary parts of octave ``number``, 0 is the highest, of a signal at its rate."""
        real, imag = (getattr(self, f"cqt_kernels_{part}_{number}") for part in ("real", "imag"))
        x = self.surrounded(x, real.shape[-1])
        return correlated(x, real, imag, hop, None, places)
