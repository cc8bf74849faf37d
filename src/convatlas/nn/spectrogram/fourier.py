"""STFT with fixed, warped or trained kernels, its inverse, and Griffin-Lim's reconstruction from magnitudes."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from convatlas.nn.spectrogram.signals import (
    OutputFormat,
    SpectrogramLayer,
    check_format,
    check_padding,
    formatted,
    signals,
)
from convatlas.ops.framing import PadMode, Window, pad_ends, window, zero_padded
from convatlas.ops.precision import without_autocast
from convatlas.ops.stft import (
    FrequencyScale,
    bin_positions,
    fourier_kernels,
    griffin_lim,
    inverse_stft,
    stft,
)
from convatlas.ops.strided_correlation import strided_correlation

__all__ = ["STFT", "Griffin_Lim", "iSTFT", "same_fourier_kernels"]

#: Largest difference of loaded kernels from those of the transform that may be computed by FFT instead.
_SAME_KERNELS = 2e-6


class STFT(SpectrogramLayer):
    """Short-time Fourier transform: (B, K, T), or (B, K, T, 2) for complex output, with T = 1 + L // hop if centred.

    Args:
        n_fft: samples N of a frame.
        win_length: samples of the window, which stands in the middle of a frame; by default n_fft.
        freq_bins: number K of bins; by default n_fft // 2 + 1.
        hop_length: samples from one frame to the next; by default a quarter of win_length.
        window: what `scipy.signal.get_window` takes.
        freq_scale: ``no`` for the bins of the transform; ``linear``, ``log`` or ``log2`` for bins from fmin to below
            fmax.
        center: surround the signal by n_fft // 2 samples, so that frame t has its middle at t hop.
        pad_mode: ``reflect`` or ``constant``.
        iSTFT: keep what `inverse` needs.
        fmin, fmax: in Hz, for warped scales.
        sr: sample rate in Hz, for warped scales.
        trainable: train the kernels; magnitudes are then sqrt(re^2 + im^2 + 1e-8).
        output_format: ``Complex`` (real and imaginary part), ``Magnitude`` or ``Phase`` (angle in radians).
        verbose: log when kernels are made.
        backend: ``auto`` takes the FFT where the kernels are those of the transform; ``fft`` or ``conv``.
        legacy_inverse: nnAudio's inverse for warped scales, which transposes the kernels.
        dtype: of the kernels; they are computed in float64.
        device: of the kernels.

    Raises:
        ValueError: an argument is out of range or unknown.
    """

    wsin: Tensor
    wcos: Tensor
    window_mask: Tensor
    kernel_sin_inv: Tensor
    kernel_cos_inv: Tensor

    def __init__(
        self,
        n_fft: int = 2048,
        win_length: int | None = None,
        freq_bins: int | None = None,
        hop_length: int | None = None,
        window: Window = "hann",
        freq_scale: FrequencyScale = "no",
        center: bool = True,
        pad_mode: PadMode = "reflect",
        iSTFT: bool = False,
        fmin: float = 50,
        fmax: float = 6000,
        sr: float = 22050,
        trainable: bool = False,
        output_format: OutputFormat = "Complex",
        verbose: bool = False,
        *,
        backend: Literal["auto", "fft", "conv"] = "auto",
        legacy_inverse: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(verbose)
        self.hop_length, taper = _taper(n_fft, win_length, hop_length, window)
        check_padding(self.hop_length, pad_mode)
        check_format(output_format)
        if backend not in ("auto", "fft", "conv"):
            raise ValueError(f"backend must be 'auto', 'fft' or 'conv', got {backend!r}")
        bins = bin_positions(n_fft, freq_bins, freq_scale=freq_scale, fmin=fmin, fmax=fmax, sr=sr)
        self.n_fft, self.center, self.pad_mode, self.output_format = n_fft, center, pad_mode, output_format
        self.trainable, self.iSTFT, self.backend = trainable, iSTFT, backend
        self.legacy_inverse = legacy_inverse
        self._whole = freq_scale == "no" and not trainable and len(bins) <= n_fft // 2 + 1
        if backend == "fft" and not self._whole:
            raise ValueError("backend 'fft' computes fixed kernels with freq_scale 'no' only")
        kept: dict[str, Any] = {"dtype": dtype or torch.get_default_dtype(), "device": device}
        cos, sin = fourier_kernels(n_fft, bins)
        self.keep("wsin", (sin * taper).unsqueeze(1).to(**kept), trainable)
        self.keep("wcos", (cos * taper).unsqueeze(1).to(**kept), trainable)
        self.keep("window_mask", taper.view(1, -1, 1).to(**kept))
        if iSTFT:
            for name, kernels, sign in (("kernel_sin_inv", sin, -1), ("kernel_cos_inv", cos, 1)):
                whole = torch.cat([kernels, sign * kernels[1 : n_fft - len(bins) + 1].flip(0)])
                self.keep(name, whole[:, None, :, None].to(**kept))
        #: Whether the kernels are those that the FFT computes; loaded ones may not be.
        self.exact = self._whole
        self.after_loading(_compare_kernels)

    @property
    def reach(self) -> int | None:
        """Samples before and after the middle of a frame that it depends on; None where frames are not centred."""
        return self.n_fft // 2 if self.center else None

    def padded(self, x: Tensor) -> Tensor:
        """Signals as (B, L), padded if frames are to be centred."""
        x = signals(x)
        if not self.center:
            return x
        if self.pad_mode == "reflect" and x.shape[-1] <= self.n_fft // 2:
            raise ValueError(
                "Signal length shorter than reflect padding length (n_fft // 2): got "
                f"{x.shape[-1]} samples for n_fft {self.n_fft}"
            )
        return pad_ends(x, self.n_fft // 2, self.pad_mode)

    def spectrum(self, x: Tensor) -> Tensor:
        """Real and imaginary parts (B, K, T, 2) of signals (B, L) that are padded already."""
        if x.shape[-1] < self.n_fft:
            raise ValueError(f"a signal must have the n_fft = {self.n_fft} samples of a frame, got {x.shape[-1]}")
        count = self.wcos.shape[0]
        if self.exact and self.backend != "conv":
            return stft(x, self.window_mask[0, :, 0], self.hop_length)[:, :count]
        kernels = torch.cat([self.wcos, -self.wsin]).squeeze(1)
        return torch.stack(strided_correlation(x, kernels, self.hop_length).split(count, dim=1), dim=-1)

    def forward(self, x: Tensor, output_format: OutputFormat | None = None) -> Tensor:
        """Transform signals; ``output_format`` overrides that of the layer."""
        form = output_format or self.output_format
        check_format(form)
        return formatted(self.spectrum(self.padded(x)), form, self.trainable, as_vector=False)

    def inverse(self, X: Tensor, onesided: bool = True, length: int | None = None, refresh_win: bool = True) -> Tensor:
        """Signals (B, samples) of complex spectra (B, K, T, 2); exact for freq_scale ``no``.

        Args:
            X: real and imaginary parts.
            onesided: whether the bins above n_fft / 2 are left out.
            length: samples to keep; by default all that the frames cover.
            refresh_win: of no effect: the sum of squared windows is always that of this call.

        Raises:
            NameError: the layer was built without ``iSTFT=True``.
            ValueError: X is not complex or its bins do not fit.
        """
        if not self.iSTFT:
            raise NameError("Please activate the iSTFT module by setting `iSTFT=True` if you want to use `inverse`")
        _check_complex(X)
        kernels = None
        if not self.exact or self.backend == "conv":
            kernels = _square(self.kernel_cos_inv, self.kernel_sin_inv, self.legacy_inverse)
        return inverse_stft(
            X,
            self.window_mask[0, :, 0],
            self.hop_length,
            onesided=onesided,
            center=self.center,
            length=length,
            kernels=kernels,
        )

    def extra_repr(self) -> str:
        """Show sizes and whether the kernels are trained."""
        return f"n_fft={self.n_fft}, hop_length={self.hop_length}, bins={len(self.wcos)}, trainable={self.trainable}"


class iSTFT(SpectrogramLayer):
    """Inverse of `STFT`: spectra (B, K, T, 2) to signals (B, samples).

    Args:
        n_fft, win_length, freq_bins, hop_length, window, freq_scale, center, fmin, fmax, sr: as `STFT` takes them.
        trainable_kernels: train the kernels.
        trainable_window: train the window.
        verbose: log when kernels are made.
        refresh_win: of no effect: the sum of squared windows is always that of the call.
        legacy_inverse: nnAudio's numbers for warped scales and trained kernels, which it transposes.
        dtype, device: of the kernels.

    Raises:
        ValueError: an argument is out of range or unknown.
    """

    kernel_sin: Tensor
    kernel_cos: Tensor
    window_mask: Tensor

    def __init__(
        self,
        n_fft: int = 2048,
        win_length: int | None = None,
        freq_bins: int | None = None,
        hop_length: int | None = None,
        window: Window = "hann",
        freq_scale: FrequencyScale = "no",
        center: bool = True,
        fmin: float = 50,
        fmax: float = 6000,
        sr: float = 22050,
        trainable_kernels: bool = False,
        trainable_window: bool = False,
        verbose: bool = False,
        refresh_win: bool = True,
        *,
        legacy_inverse: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(verbose)
        self.hop_length, taper = _taper(n_fft, win_length, hop_length, window)
        check_padding(self.hop_length, "reflect")
        count = n_fft if freq_bins is None else freq_bins
        bins = bin_positions(n_fft, count, freq_scale=freq_scale, fmin=fmin, fmax=fmax, sr=sr)
        self.legacy_inverse = legacy_inverse
        self.n_fft, self.center = n_fft, center
        kept: dict[str, Any] = {"dtype": dtype or torch.get_default_dtype(), "device": device}
        cos, sin = fourier_kernels(n_fft, bins)
        self.keep("kernel_sin", sin[:, None, :, None].to(**kept), trainable_kernels)
        self.keep("kernel_cos", cos[:, None, :, None].to(**kept), trainable_kernels)
        self.keep("window_mask", taper.view(1, -1, 1).to(**kept), trainable_window)

    def forward(
        self, X: Tensor, onesided: bool = False, length: int | None = None, refresh_win: bool | None = None
    ) -> Tensor:
        """Signals (B, samples) of spectra (B, K, T, 2).

        Args:
            X: real and imaginary parts of all n_fft bins, or of n_fft // 2 + 1 if ``onesided``.
            onesided: whether the bins above n_fft / 2 are left out.
            length: samples to keep; by default all that the frames cover.
            refresh_win: of no effect.
        """
        _check_complex(X)
        return inverse_stft(
            X,
            self.window_mask[0, :, 0],
            self.hop_length,
            onesided=onesided,
            center=self.center,
            length=length,
            kernels=_square(self.kernel_cos, self.kernel_sin, self.legacy_inverse),
        )


class Griffin_Lim(nn.Module):
    """Signals (B, hop (T - 1)) whose spectrogram is near given magnitudes (B, n_fft // 2 + 1, T).

    Args:
        n_fft: samples of a frame.
        n_iter: number of iterations.
        hop_length: samples from one frame to the next; by default a quarter of win_length.
        win_length: samples of the window; by default n_fft.
        window: what `scipy.signal.get_window` takes.
        center, pad_mode: as `STFT` takes them.
        momentum: of the accelerated iteration, from 0 to below 1.

    Raises:
        ValueError: an argument is out of range or unknown.
    """

    def __init__(
        self,
        n_fft: int,
        n_iter: int = 32,
        hop_length: int | None = None,
        win_length: int | None = None,
        window: Window = "hann",
        center: bool = True,
        pad_mode: PadMode = "reflect",
        momentum: float = 0.99,
    ) -> None:
        super().__init__()
        self.hop_length, _ = _taper(n_fft, win_length, hop_length, window)
        check_padding(self.hop_length, pad_mode)
        if n_iter < 0 or not 0 <= momentum < 1:
            raise ValueError(f"n_iter must not be negative and momentum from 0 to below 1, got {n_iter} and {momentum}")
        self.n_fft, self.n_iter, self.win_length, self.window = n_fft, n_iter, win_length, window
        self.center, self.pad_mode, self.momentum = center, pad_mode, momentum

    def forward(self, S: Tensor, init_phase: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Reconstruct signals from magnitudes S, beginning with ``init_phase`` (radians) or with random phases."""
        with without_autocast(S):
            return griffin_lim(
                S,
                init_phase,
                n_fft=self.n_fft,
                hop_length=self.hop_length,
                win_length=self.win_length,
                kind=self.window,
                center=self.center,
                pad_mode=self.pad_mode,
                n_iter=self.n_iter,
                momentum=self.momentum,
                generator=generator,
            )


def _taper(n_fft: int, win_length: int | None, hop_length: int | None, kind: Window) -> tuple[int, Tensor]:
    """The hop, and the window in the middle of a frame."""
    length = n_fft if win_length is None else win_length
    if n_fft < 2:
        raise ValueError(f"n_fft must be at least 2, got {n_fft}")
    if not 1 <= length <= n_fft:
        raise ValueError(f"win_length must be from 1 to n_fft = {n_fft}, got {length}")
    hop = max(1, length // 4) if hop_length is None else hop_length
    return hop, zero_padded(window(kind, length), n_fft)


def _check_complex(X: Tensor) -> None:
    if X.dim() != 4 or X.shape[-1] != 2:
        raise ValueError(
            "Inverse iSTFT only works for complex number, make sure our tensor is in the shape of "
            f"(batch, freq_bins, timesteps, 2), got {tuple(X.shape)}"
        )


def _square(cos: Tensor, sin: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    if cos.shape[0] != cos.shape[2]:
        raise ValueError(f"the inverse needs as many bins as samples of a frame, {cos.shape[2]}, got {cos.shape[0]}")
    cos, sin = cos[:, 0, :, 0], sin[:, 0, :, 0]
    return (cos.T, sin.T) if transposed else (cos, sin)


def same_fourier_kernels(cos: Tensor, sin: Tensor, taper: Tensor) -> bool:
    """Whether kernels (K, 1, N) are those of the Fourier transform with a window (N,), to the precision of float32."""
    exact = fourier_kernels(len(taper), torch.arange(len(cos), device=cos.device))
    pairs = zip((cos.detach(), sin.detach()), exact, strict=True)
    return all(float((a.squeeze(1) - b * taper.double()).abs().max()) < _SAME_KERNELS for a, b in pairs)


def _compare_kernels(layer: nn.Module, _: object) -> None:
    """After loading: the FFT stands for the kernels only if they are those of the transform."""
    if not isinstance(layer, STFT) or not layer._whole:
        return
    layer.exact = same_fourier_kernels(layer.wcos, layer.wsin, layer.window_mask[0, :, 0])
    if layer.iSTFT and layer.exact:
        inverse = (layer.kernel_cos_inv.squeeze(3), layer.kernel_sin_inv.squeeze(3))
        layer.exact = same_fourier_kernels(*inverse, layer.window_mask.new_ones(layer.n_fft))
    if layer.backend == "fft" and not layer.exact:
        raise ValueError(
            "the loaded kernels are not those of the Fourier transform: build the layer with backend 'conv'"
        )
