"""Constant-Q and variable-Q transforms as layers, in one pass over the signal or octave by octave.

Each gives (B, n_bins, T), or (B, n_bins, T, 2) for complex output and for phases. The sinusoid of bin k has the
magnitude 1 in it with the normalisation ``wrap``.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.nn.spectrogram.fourier import same_fourier_kernels
from convatlas.nn.spectrogram.signals import (
    OutputFormat,
    SpectrogramLayer,
    check_format,
    check_padding,
    formatted,
    signals,
)
from convatlas.ops.constant_q import Bins, early_factor, lowpass_filter, spectral_kernels, time_kernels
from convatlas.ops.framing import PadMode, Window, frame_pieces, frames, pad_ends
from convatlas.ops.precision import without_autocast
from convatlas.ops.stft import fourier_kernels, stft
from convatlas.ops.strided_correlation import Band, bands, decimate, strided_correlation

__all__ = ["CQT", "CQT1992", "VQT", "CQT1992v2", "CQT2010", "CQT2010v2"]

Normalization = Literal["librosa", "convolutional", "wrap"]


class _ConstantQ(SpectrogramLayer):
    """What all of them do: validate, transform, normalise, put into the format that is asked for."""

    lengths: Tensor
    trained = False

    def __init__(
        self, bins: Bins, sr: float, hop_length: int, pad_mode: str, output_format: str, verbose: bool
    ) -> None:
        super().__init__(verbose)
        check_padding(hop_length, pad_mode)
        check_format(output_format)
        if not sr > 0:
            raise ValueError(f"sr must be positive, got {sr}")
        self.bins, self.sr, self.hop_length = bins, sr, hop_length
        self.pad_mode: Any = pad_mode
        self.output_format: Any = output_format

    @property
    def frequencies(self) -> Tensor:
        """Frequency of each bin in Hz, (n_bins,)."""
        return self.bins.frequencies

    def transform(self, x: Tensor) -> Tensor:
        """Real and imaginary parts (B, n_bins, T, 2) of signals (B, L), without normalisation."""
        raise NotImplementedError

    def gain(self, normalization_type: str) -> float:
        """A factor of the normalisation that is common to all bins."""
        return 1.0

    def conjugated(self, output_format: str) -> bool:
        """Whether the imaginary part of an output has the opposite sign."""
        return False

    def forward(
        self,
        x: Tensor,
        output_format: OutputFormat | None = None,
        normalization_type: Normalization = "librosa",
    ) -> Tensor:
        """Transform signals.

        Args:
            x: signals (L,), (B, L) or (B, 1, L).
            output_format: overrides that of the layer; a phase is (cosine, sine).
            normalization_type: ``librosa`` multiplies by the root of the lengths of the filters, ``convolutional`` by
                1, ``wrap`` by 2.
        """
        form = output_format or self.output_format
        check_format(form)
        if normalization_type not in ("librosa", "convolutional", "wrap"):
            raise ValueError(
                f"The normalization_type {normalization_type!r} is not part of our current options."
                " They are 'librosa', 'convolutional' and 'wrap'."
            )
        x = signals(x)
        with without_autocast(x):
            spectrum = self.transform(x) * self.gain(normalization_type)
            if normalization_type == "librosa":
                spectrum = spectrum * self.lengths.to(spectrum.dtype).sqrt()[:, None, None]
            elif normalization_type == "wrap":
                spectrum = spectrum * 2
            if self.conjugated(form):
                spectrum = spectrum * spectrum.new_tensor([1.0, -1.0])
            return formatted(spectrum, form, self.trained, as_vector=True)

    def extra_repr(self) -> str:
        """Show bins, sample rate and hop."""
        bins = self.bins
        return f"fmin={bins.fmin:g}, n_bins={bins.n_bins}, sr={self.sr:g}, hop_length={self.hop_length}"

    def _surrounded(self, x: Tensor, width: int) -> Tensor:
        """Padded by half a kernel; by zeros where the signal is too short to be mirrored."""
        mode: PadMode = self.pad_mode
        if mode == "reflect" and x.shape[-1] <= width // 2:
            warnings.warn(
                f"a signal of {x.shape[-1]} samples is too short to be mirrored around filters of {width}: it is "
                "padded by zeros",
                stacklevel=4,
            )
            mode = "constant"
        return pad_ends(x, width // 2, mode)


class CQT1992v2(_ConstantQ):
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
        bins = _bins(fmin, fmax, n_bins, bins_per_octave, filter_scale)
        super().__init__(bins, sr, hop_length, pad_mode, output_format, verbose)
        self.center, self.trained = center, trainable
        kernels = time_kernels(bins, sr, kind=window, norm=norm)
        _keep_kernels(self, kernels, "", trainable, dtype, device)
        self.keep("lengths", bins.lengths(sr).to(device, dtype or torch.get_default_dtype()))
        self.parts: tuple[Band, ...] | None = None
        _find_bands(self, None)
        self.register_load_state_dict_post_hook(_find_bands)

    @property
    def reach(self) -> int | None:
        """Samples before and after the middle of a frame that it depends on; None where frames are not centred."""
        return self.cqt_kernels_real.shape[-1] // 2 if self.center else None

    def transform(self, x: Tensor) -> Tensor:
        """Real and imaginary parts (B, n_bins, T, 2) of signals (B, L), without normalisation."""
        width = self.cqt_kernels_real.shape[-1]
        if self.center:
            x = self._surrounded(x, width)
        elif x.shape[-1] < width:
            raise ValueError(f"without padding x must have the {width} samples of a kernel, got {x.shape[-1]}")
        return _correlated(x, self.cqt_kernels_real, self.cqt_kernels_imag, self.hop_length, self.parts)


CQT = CQT1992v2


class CQT1992(_ConstantQ):
    """Constant-Q transform by an STFT and products with the spectra of the kernels, whose STFT may be trained too.

    The kernels of the STFT take 4 W^2 bytes, W the samples of the longest kernel: for low frequencies take `CQT1992v2`.

    Args:
        trainable_STFT: train the kernels of the STFT.
        trainable_CQT: train the spectra.
        legacy_spectra: nnAudio's numbers: phases have the sign opposite to that of complex output, and
            ``convolutional`` is larger by W.
        sr, hop_length, fmin, fmax, n_bins, bins_per_octave, filter_scale, output_format, norm, window, center,
            pad_mode, verbose, dtype, device: as `CQT1992v2` takes them.

    Raises:
        ValueError: an argument is out of range or unknown, or the top bin lies above half the sample rate.
    """

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
        bins = _bins(fmin, fmax, n_bins, bins_per_octave, filter_scale)
        super().__init__(bins, sr, hop_length, pad_mode, output_format, verbose)
        self.center, self.trained, self.legacy_spectra = center, trainable_STFT or trainable_CQT, legacy_spectra
        _keep_spectra(
            self, time_kernels(bins, sr, kind=window, norm=norm), trainable_STFT, trainable_CQT, dtype, device
        )
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
            x = self._surrounded(x, width)
        elif x.shape[-1] < width:
            raise ValueError(f"without padding x must have the {width} samples of a kernel, got {x.shape[-1]}")
        return _by_spectra(self, x, self.hop_length)


class _MultiRate(_ConstantQ):
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
        rounded_hop: bool,
        legacy_downsample: bool,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        super().__init__(bins, sr, hop_length, pad_mode, output_format, verbose)
        kind = dtype or torch.get_default_dtype()
        factor = early_factor(bins, sr, hop_length) if earlydownsample else 1
        self.downsample_factor, self.rounded_hop, self.legacy_downsample = factor, rounded_hop, legacy_downsample
        self.basis_norm = basis_norm
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

    def octave(self, x: Tensor, number: int, hop: int, places: Tensor | None) -> Tensor:
        """Real and imaginary parts of octave ``number``, 0 is the highest, of a signal at its rate."""
        raise NotImplementedError

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
        legacy_spectra: nnAudio's numbers: imaginary parts have the opposite sign, and ``convolutional`` is larger by the
            samples of a kernel.
        sr, hop_length, fmin, fmax, n_bins, bins_per_octave, window, pad_mode, filter_scale, output_format, verbose,
            dtype, device: as `CQT1992v2` takes them.

    Raises:
        ValueError: an argument is out of range or unknown, or the top bin lies above half the sample rate.
    """

    _legacy_gain = 1.0

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
        legacy_spectra: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            _bins(fmin, fmax, n_bins, bins_per_octave, filter_scale),
            *(sr, hop_length, pad_mode, output_format, verbose),
            earlydownsample=earlydownsample,
            basis_norm=basis_norm,
            rounded_hop=rounded_hop,
            legacy_downsample=legacy_downsample,
            dtype=dtype,
            device=device,
        )
        self.trained, self.legacy_spectra = trainable_STFT or trainable_CQT, legacy_spectra
        kernels = time_kernels(self.bins.highest_octave, self.early_sr, kind=window, norm=basis_norm)
        _keep_spectra(self, kernels, trainable_STFT, trainable_CQT, dtype, device)

    def gain(self, normalization_type: str) -> float:
        """Makes up for filters that are shorter at the reduced sample rate."""
        wider = self.legacy_spectra and normalization_type == "convolutional"
        return super().gain(normalization_type) * (self.wcos.shape[-1] if wider else 1)

    def conjugated(self, output_format: str) -> bool:
        """Whether the imaginary part of an output has the opposite sign."""
        return self.legacy_spectra

    def octave(self, x: Tensor, number: int, hop: int, places: Tensor | None) -> Tensor:
        """Real and imaginary parts of octave ``number``, 0 is the highest, of a signal at its rate."""
        x = self._surrounded(x, self.wcos.shape[-1])
        return _by_spectra(self, x, hop, places)


class CQT2010v2(_MultiRate):
    """Constant-Q transform, octave by octave, by convolution with the kernels of the highest one.

    Args:
        basis_norm: 1 or 2, of each kernel; 0 or None leaves them.
        earlydownsample: decimate the signal first where the highest bin allows it.
        trainable: train the kernels; magnitudes are then sqrt(re^2 + im^2 + 1e-8).
        rounded_hop: put each frame of each octave at the sample nearest to its time, for any hop_length; otherwise the
            hop is halved and rounded down from octave to octave.
        legacy_downsample: nnAudio's scale after an early decimation by f, larger by sqrt(f).
        sr, hop_length, fmin, fmax, n_bins, filter_scale, bins_per_octave, window, pad_mode, output_format, verbose,
            dtype, device: as `CQT1992v2` takes them.

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
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            _bins(fmin, fmax, n_bins, bins_per_octave, filter_scale),
            *(sr, hop_length, pad_mode, output_format, verbose),
            earlydownsample=earlydownsample,
            basis_norm=basis_norm,
            rounded_hop=rounded_hop,
            legacy_downsample=legacy_downsample,
            dtype=dtype,
            device=device,
        )
        self.trained, self._legacy_gain = trainable, float(self.downsample_factor)
        kernels = time_kernels(self.bins.highest_octave, self.early_sr, kind=window, norm=basis_norm)
        _keep_kernels(self, kernels, "", trainable, dtype, device)

    def octave(self, x: Tensor, number: int, hop: int, places: Tensor | None) -> Tensor:
        """Real and imaginary parts of octave ``number``, 0 is the highest, of a signal at its rate."""
        x = self._surrounded(x, self.cqt_kernels_real.shape[-1])
        return _correlated(x, self.cqt_kernels_real, self.cqt_kernels_imag, hop, None, places)


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
        sr, hop_length, fmin, fmax, n_bins, filter_scale, bins_per_octave, window, pad_mode, output_format, verbose,
            dtype, device: as `CQT1992v2` takes them.

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
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if gamma < 0:
            raise ValueError(f"gamma must not be negative, got {gamma}")
        super().__init__(
            _bins(fmin, fmax, n_bins, bins_per_octave, filter_scale, gamma),
            *(sr, hop_length, pad_mode, output_format, verbose),
            earlydownsample=earlydownsample,
            basis_norm=basis_norm,
            rounded_hop=rounded_hop,
            legacy_downsample=legacy_downsample,
            dtype=dtype,
            device=device,
        )
        self.trained, self._legacy_gain = trainable, float(self.downsample_factor)
        top, rate = self.bins.highest_octave, sr if legacy_downsample else self.early_sr
        for number in range(self.bins.octaves):
            bins = top._replace(fmin=top.fmin / 2**number)
            kernels = time_kernels(bins, rate / 2**number, kind=window, norm=basis_norm)
            _keep_kernels(self, kernels, f"_{number}", trainable, dtype, device)

    def octave(self, x: Tensor, number: int, hop: int, places: Tensor | None) -> Tensor:
        """Real and imaginary parts of octave ``number``, 0 is the highest, of a signal at its rate."""
        real, imag = (getattr(self, f"cqt_kernels_{part}_{number}") for part in ("real", "imag"))
        x = self._surrounded(x, real.shape[-1])
        return _correlated(x, real, imag, hop, None, places)


# -- arguments and kernels ---------------------------------------------------------------------------------------------


def _bins(
    fmin: float, fmax: float | None, n_bins: int | None, bins_per_octave: int, filter_scale: float, gamma: float = 0
) -> Bins:
    if not fmin > 0:
        raise ValueError(f"fmin must be positive, got {fmin}")
    if bins_per_octave < 1 or not filter_scale > 0:
        raise ValueError(f"bins_per_octave and filter_scale must be positive, got {bins_per_octave} and {filter_scale}")
    if fmax is not None:
        if fmax <= fmin:
            raise ValueError(f"fmax must be above fmin, got {fmax} and {fmin}")
        if n_bins is not None:
            warnings.warn("fmax is given, so n_bins follows from it; pass n_bins=None to say so", stacklevel=3)
        octaves = torch.tensor(fmax / fmin, dtype=torch.float64).log2()
        n_bins = int((bins_per_octave * octaves).ceil())
    if n_bins is None or n_bins < 1:
        raise ValueError(f"n_bins must be positive, got {n_bins}" if n_bins else "give n_bins or fmax, got neither")
    return Bins(fmin, n_bins, bins_per_octave, filter_scale, gamma)


def _keep_kernels(
    layer: SpectrogramLayer,
    kernels: Tensor,
    ending: str,
    trained: bool,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> None:
    kind = dtype or torch.get_default_dtype()
    for name, part in (("real", kernels.real), ("imag", kernels.imag)):
        layer.keep(f"cqt_kernels_{name}{ending}", part.unsqueeze(1).to(device, kind).contiguous(), trained)


def _keep_spectra(
    layer: Any,
    kernels: Tensor,
    trainable_stft: bool,
    trainable_cqt: bool,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> None:
    kind = dtype or torch.get_default_dtype()
    spectra, width = spectral_kernels(kernels), kernels.shape[1]
    cos, sin = fourier_kernels(width, torch.arange(width // 2 + 1))
    layer.keep("wsin", sin.unsqueeze(1).to(device, kind), trainable_stft)
    layer.keep("wcos", cos.unsqueeze(1).to(device, kind), trainable_stft)
    layer.keep("cqt_kernels_real", spectra.real.to(device, kind).contiguous(), trainable_cqt)
    layer.keep("cqt_kernels_imag", spectra.imag.to(device, kind).contiguous(), trainable_cqt)
    layer.trainable_STFT = trainable_stft
    layer.exact = not trainable_stft
    layer.register_load_state_dict_post_hook(_compare_kernels)


def _compare_kernels(layer: Any, _: object) -> None:
    """After loading: the FFT stands for the kernels only if they are those of the transform."""
    ones = layer.wcos.new_ones(layer.wcos.shape[-1])
    layer.exact = not layer.trainable_STFT and same_fourier_kernels(layer.wcos, layer.wsin, ones)


def _find_bands(layer: nn.Module, _: object) -> None:
    """Where the kernels are zero, from their values; trained ones may be zero nowhere soon."""
    if isinstance(layer, CQT1992v2):
        real, imag = layer.cqt_kernels_real.detach(), layer.cqt_kernels_imag.detach()
        layer.parts = None if layer.trained else bands((real.abs() + imag.abs()).squeeze(1))


# -- transforms --------------------------------------------------------------------------------------------------------


def _correlated(
    x: Tensor,
    real: Tensor,
    imag: Tensor,
    hop: int,
    parts: tuple[Band, ...] | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """sum of x times the conjugate kernels, (B, K, T, 2), at every hop or at given places."""
    kernels = torch.stack([real, -imag], dim=1).flatten(0, 1).squeeze(1)
    if places is not None:
        y = (frames(x, kernels.shape[1], 1)[:, places] @ kernels.to(x.dtype).T).transpose(1, 2)
    else:
        # Both rows of a bin stand together, so that bands hold whole bins.
        double = parts and tuple(Band(2 * part.first_row, 2 * part.last_row, *part[2:]) for part in parts)
        y = strided_correlation(x, kernels, hop, double)
    return y.unflatten(1, (-1, 2)).transpose(2, 3)


def _by_spectra(layer: Any, x: Tensor, hop: int, places: Tensor | None = None) -> Tensor:
    """The STFT with a window of ones times the conjugate spectra, over W: (B, K, T, 2)."""
    width: int = layer.wcos.shape[-1]
    wide = torch.promote_types(torch.promote_types(x.dtype, layer.wcos.dtype), torch.float32)
    kernels = torch.complex(layer.cqt_kernels_real.to(wide), -layer.cqt_kernels_imag.to(wide))
    if places is not None:
        x, hop = frames(x, width, 1)[:, places].flatten(1), width
    found = []
    for piece in frame_pieces(x, width, hop):
        if layer.exact:
            spectrum = stft(piece, layer.wcos.new_ones(width), hop)
        else:
            fourier = torch.cat([layer.wcos, -layer.wsin]).squeeze(1)
            spectrum = torch.stack(strided_correlation(piece, fourier, hop).chunk(2, dim=1), dim=-1)
        values = torch.view_as_complex(spectrum.to(wide).contiguous())
        found.append(torch.view_as_real(kernels @ values) / width)
    return found[0] if len(found) == 1 else torch.cat(found, dim=2)
