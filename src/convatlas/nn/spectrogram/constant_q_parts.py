"""What the constant-Q layers share: normalisation and output, the making of kernels, and the two ways to use them."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor

from convatlas.nn.spectrogram.fourier import same_fourier_kernels
from convatlas.nn.spectrogram.signals import (
    OutputFormat,
    SpectrogramLayer,
    check_format,
    check_padding,
    formatted,
    signals,
)
from convatlas.ops.constant_q import Bins, spectral_kernels
from convatlas.ops.framing import PadMode, frame_pieces, frames, pad_ends
from convatlas.ops.precision import without_autocast
from convatlas.ops.stft import fourier_kernels, stft
from convatlas.ops.strided_correlation import Band, strided_correlation

__all__ = ["ConstantQ", "Normalization", "by_spectra", "correlated", "keep_kernels", "keep_spectra", "make_bins"]

Normalization = Literal["librosa", "convolutional", "wrap"]


class ConstantQ(SpectrogramLayer, ABC):
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

    @abstractmethod
    def transform(self, x: Tensor) -> Tensor:
        """Real and imaginary parts (B, n_bins, T, 2) of signals (B, L), without normalisation."""

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

    def surrounded(self, x: Tensor, width: int) -> Tensor:
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


# -- arguments and kernels ---------------------------------------------------------------------------------------------


def make_bins(
    fmin: float,
    fmax: float | None,
    n_bins: int | None,
    bins_per_octave: int,
    filter_scale: float,
    gamma: float = 0,
    *,
    legacy_arguments: bool = False,
) -> Bins:
    """The bins that the arguments of a layer ask for; as some of nnAudio's layers do it, n_bins goes before fmax.

    Raises:
        ValueError: an argument is out of range.
    """
    if not fmin > 0:
        raise ValueError(f"fmin must be positive, got {fmin}")
    if bins_per_octave < 1 or not filter_scale > 0:
        raise ValueError(f"bins_per_octave and filter_scale must be positive, got {bins_per_octave} and {filter_scale}")
    if fmax is not None and not (legacy_arguments and n_bins is not None):
        if fmax <= fmin:
            raise ValueError(f"fmax must be above fmin, got {fmax} and {fmin}")
        if n_bins is not None:
            warnings.warn("fmax is given, so n_bins follows from it; pass n_bins=None to say so", stacklevel=3)
        octaves = torch.tensor(fmax / fmin, dtype=torch.float64).log2()
        n_bins = int((bins_per_octave * octaves).ceil())
    if n_bins is None or n_bins < 1:
        raise ValueError(f"n_bins must be positive, got {n_bins}" if n_bins else "give n_bins or fmax, got neither")
    return Bins(fmin, n_bins, bins_per_octave, filter_scale, gamma)


def keep_kernels(
    layer: SpectrogramLayer,
    kernels: Tensor,
    ending: str,
    trained: bool,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> None:
    """Register complex kernels (K, W) as ``cqt_kernels_real`` and ``cqt_kernels_imag``, each (K, 1, W)."""
    kind = dtype or torch.get_default_dtype()
    for name, part in (("real", kernels.real), ("imag", kernels.imag)):
        layer.keep(f"cqt_kernels_{name}{ending}", part.unsqueeze(1).to(device, kind).contiguous(), trained)


def keep_spectra(
    layer: Any,
    kernels: Tensor,
    trainable_stft: bool,
    trainable_cqt: bool,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> None:
    """Register Fourier kernels as ``wsin`` and ``wcos``, and the spectra of complex kernels (K, W)."""
    kind = dtype or torch.get_default_dtype()
    spectra, width = spectral_kernels(kernels), kernels.shape[1]
    cos, sin = fourier_kernels(width, torch.arange(width // 2 + 1))
    layer.keep("wsin", sin.unsqueeze(1).to(device, kind), trainable_stft)
    layer.keep("wcos", cos.unsqueeze(1).to(device, kind), trainable_stft)
    layer.keep("cqt_kernels_real", spectra.real.to(device, kind).contiguous(), trainable_cqt)
    layer.keep("cqt_kernels_imag", spectra.imag.to(device, kind).contiguous(), trainable_cqt)
    layer.trainable_STFT = trainable_stft
    layer.exact = not trainable_stft
    layer.after_loading(_compare_kernels)


def _compare_kernels(layer: Any, _: object) -> None:
    """After loading: the FFT stands for the kernels only if they are those of the transform."""
    ones = layer.wcos.new_ones(layer.wcos.shape[-1])
    layer.exact = not layer.trainable_STFT and same_fourier_kernels(layer.wcos, layer.wsin, ones)


# -- transforms --------------------------------------------------------------------------------------------------------


def correlated(
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


def by_spectra(layer: Any, x: Tensor, hop: int, places: Tensor | None = None) -> Tensor:
    """The STFT with a window of ones times the conjugate spectra, over W: (B, K, T, 2)."""
    width: int = layer.wcos.shape[-1]
    dtype = torch.promote_types(x.dtype, layer.wcos.dtype)
    wide = torch.promote_types(dtype, torch.float32)
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
    return (found[0] if len(found) == 1 else torch.cat(found, dim=2)).to(dtype)
