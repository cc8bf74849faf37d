"""Short-time Fourier transform, its inverse, and Griffin-Lim's search for phases.

Cheuk, Anderson, Agres, Herremans: "nnAudio: An on-the-fly GPU Audio to Spectrogram Conversion Toolbox Using 1D
Convolution Neural Networks", IEEE Access 2020, arXiv 1912.12055; Perraudin, Balazs, Soendergaard: "A fast Griffin-Lim
algorithm", WASPAA 2013.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from convatlas.ops.backend import Backends
from convatlas.ops.framing import PadMode, Window, frame_pieces, frames, overlap_add, pad_ends, window, zero_padded
from convatlas.ops.precision import without_autocast
from convatlas.ops.strided_correlation import strided_correlation

__all__ = [
    "FrequencyScale",
    "bin_positions",
    "fourier_kernels",
    "griffin_lim",
    "inverse_stft",
    "stft",
]

FrequencyScale = Literal["no", "linear", "log", "log2"]
#: Sum of squared windows below which a sample of the inverse is left as it is.
_UNCOVERED = 1e-10


def bin_positions(
    n_fft: int,
    freq_bins: int | None = None,
    *,
    freq_scale: FrequencyScale = "no",
    fmin: float = 50.0,
    fmax: float = 6000.0,
    sr: float = 22050,
) -> Tensor:
    """Positions b_k of the K = freq_bins (by default n_fft // 2 + 1) bins in bins of the transform, (K,) float64.

    ``no``: k; ``linear``, ``log`` and ``log2``: from fmin towards fmax (Hz), which is never reached, in steps of equal
    difference or ratio; the last two are the same.

    Raises:
        ValueError: an argument is out of range or the scale is unknown.
    """
    count = n_fft // 2 + 1 if freq_bins is None else freq_bins
    if n_fft < 2:
        raise ValueError(f"n_fft must be at least 2, got {n_fft}")
    if count < 1:
        raise ValueError(f"freq_bins must be positive, got {freq_bins}")
    steps = torch.arange(count, dtype=torch.float64)
    if freq_scale == "no":
        return steps
    if freq_scale not in ("linear", "log", "log2"):
        raise ValueError(f"freq_scale must be 'no', 'linear', 'log' or 'log2', got {freq_scale!r}")
    if not 0 <= fmin < fmax or (fmin == 0 and freq_scale != "linear"):
        raise ValueError(f"fmin and fmax must be positive with fmin below fmax, got {fmin} and {fmax}")
    if freq_scale == "linear":
        return (fmin + steps * (fmax - fmin) / count) * n_fft / sr
    return fmin * n_fft / sr * (steps * math.log(fmax / fmin) / count).exp()


def fourier_kernels(n_fft: int, bins: Tensor) -> tuple[Tensor, Tensor]:
    """cos(2 pi b_k n / N) and sin(2 pi b_k n / N) for the positions of `bin_positions`, each (K, N) float64."""
    phase = bins.double()[:, None] * torch.arange(n_fft, dtype=torch.float64, device=bins.device) / n_fft
    # Whole turns are taken off before the sine is, or large products would lose digits.
    angle = 2 * math.pi * (phase - phase.round())
    return angle.cos(), angle.sin()


def _auto(x: Tensor, taper: Tensor, hop: int, bins: Tensor | None = None) -> str:
    return "fft" if bins is None else "conv"


_backends = Backends("stft", auto=_auto)


def stft(x: Tensor, taper: Tensor, hop: int, bins: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """X[b, k, t] = sum_n w[n] x[b, t hop + n] exp(-2 pi i b_k n / N) for every frame that fits.

    Args:
        x: signals (B, L), already padded.
        taper: window w (N,).
        hop: samples from one frame to the next.
        bins: positions b_k (K,) in bins of the transform, in float64; None for all integers from 0 to N // 2.
        backend: ``auto``; ``naive`` (the sum); ``conv`` (correlation with Fourier kernels); ``fft`` (integer bins).

    Returns:
        (B, K, T, 2), real and imaginary parts, of the wider type of x and taper.

    Raises:
        ValueError: a tensor has a wrong shape or type, hop is not positive, or the signal is shorter than the window.
        Unsupported: the backend cannot serve the call.
    """
    if x.dim() != 2 or taper.dim() != 1:
        raise ValueError(f"x must be (B, L) and taper (N,), got {tuple(x.shape)} and {tuple(taper.shape)}")
    if not x.is_floating_point() or not taper.is_floating_point():
        raise ValueError(f"x and taper must be real floating point, got {x.dtype} and {taper.dtype}")
    if hop < 1:
        raise ValueError(f"hop must be at least 1, got {hop}")
    if x.shape[1] < len(taper):
        raise ValueError(f"x must have the {len(taper)} samples of the window at least, got {x.shape[1]}")
    dtype = torch.promote_types(x.dtype, taper.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    with without_autocast(x):
        return _backends.run(backend, x.to(wide), taper.to(wide), hop, bins).to(dtype)


@_backends.register("naive")
def _naive(x: Tensor, taper: Tensor, hop: int, bins: Tensor | None) -> Tensor:
    size = len(taper)
    cos, sin = _kernels(taper, bins)
    parts = frames(x, size, hop) * taper
    return torch.stack([parts @ cos.T, -parts @ sin.T], dim=-1).transpose(1, 2)


@_backends.register("conv")
def _conv(x: Tensor, taper: Tensor, hop: int, bins: Tensor | None) -> Tensor:
    cos, sin = _kernels(taper, bins)
    return torch.stack(strided_correlation(x, torch.cat([taper * cos, -taper * sin]), hop).chunk(2, dim=1), dim=-1)


def _kernels(taper: Tensor, bins: Tensor | None) -> tuple[Tensor, Tensor]:
    places = torch.arange(len(taper) // 2 + 1, device=taper.device) if bins is None else bins
    cos, sin = fourier_kernels(len(taper), places)
    return cos.to(taper.dtype), sin.to(taper.dtype)


def _refuses_fft(x: Tensor, taper: Tensor, hop: int, bins: Tensor | None = None) -> str | None:
    return None if bins is None else "it computes the integer bins only, got others"


@_backends.register("fft", refuses=_refuses_fft)
def _fft(x: Tensor, taper: Tensor, hop: int, bins: Tensor | None) -> Tensor:
    size = len(taper)
    if len(x) == 0:  # MKL has no transform of nothing
        return _naive(x, taper, hop, bins)
    pieces = [torch.fft.rfft(frames(piece, size, hop) * taper) for piece in frame_pieces(x, size, hop)]
    spectrum = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
    return torch.view_as_real(spectrum.transpose(1, 2))


def inverse_stft(
    spectrum: Tensor,
    taper: Tensor,
    hop: int,
    *,
    onesided: bool = True,
    center: bool = True,
    length: int | None = None,
    kernels: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The signals whose transform is nearest to ``spectrum``: windowed frames, added and divided by the squared window.

    Args:
        spectrum: (B, K, T, 2), real and imaginary parts, K = N // 2 + 1 if onesided, else N.
        taper: window w (N,) of the transform.
        hop: samples from one frame to the next.
        onesided: whether the bins above N / 2 are left out, as conjugates of those below.
        center: whether the signals were padded by N // 2 samples, which are cut off.
        length: samples to keep; by default all that the frames cover, without the padding.
        kernels: (cosines, sines), each (N, N), to use instead of those of the Fourier transform.

    Returns:
        (B, samples).

    Raises:
        ValueError: the number of bins does not fit the window.
    """
    size = len(taper)
    expected = size // 2 + 1 if onesided else size
    if spectrum.shape[1] != expected:
        raise ValueError(
            f"a {'one' if onesided else 'two'}-sided spectrum for a window of {size} must have {expected} bins, "
            f"got {spectrum.shape[1]}"
        )
    dtype = torch.promote_types(spectrum.dtype, taper.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    taper = taper.to(wide)
    with without_autocast(spectrum):
        bins = spectrum.to(wide).transpose(1, 2)
        if kernels is None:
            values = torch.view_as_complex(bins.contiguous())
            parts = torch.fft.irfft(values, size) if onesided else torch.fft.ifft(values).real
        else:
            real, imag = bins.unbind(-1)
            if onesided:
                inner = slice(1, size - expected + 1)
                real = torch.cat([real, real[..., inner].flip(-1)], dim=-1)
                imag = torch.cat([imag, -imag[..., inner].flip(-1)], dim=-1)
            parts = (real @ kernels[0].to(wide) - imag @ kernels[1].to(wide)) / size
        signal = overlap_add(parts * taper, hop)
        weight = overlap_add((taper * taper).expand(parts.shape[1], size), hop)
        signal = torch.where(weight > _UNCOVERED, signal / weight.clamp_min(_UNCOVERED), signal)
    first = size // 2 if center else 0
    last = first + length if length is not None else signal.shape[1] - first
    return signal[:, first:last].to(dtype)


def griffin_lim(
    magnitude: Tensor,
    init_phase: Tensor | None = None,
    *,
    n_fft: int | None = None,
    hop_length: int | None = None,
    win_length: int | None = None,
    kind: Window = "hann",
    center: bool = True,
    pad_mode: PadMode = "reflect",
    n_iter: int = 32,
    momentum: float = 0.99,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Signals whose spectrogram is near ``magnitude``: inverse and transform in turn, with an accelerated step.

    Args:
        magnitude: (B, N // 2 + 1, T).
        init_phase: phases to begin with, in radians, of the same shape; by default random ones.
        n_fft: N, by default that of the bins.
        hop_length: samples from one frame to the next; by default a quarter of win_length.
        win_length: samples of the window; by default N.
        kind: window.
        center: whether the transform pads the signal by N // 2 samples.
        pad_mode: how it does.
        n_iter: number of iterations.
        momentum: from 0 (Griffin and Lim, 1984) to below 1.
        generator: of the random phases; with the seed of the process by default.

    Returns:
        (B, hop (T - 1)).

    Raises:
        ValueError: an argument is out of range or the shape does not fit.
    """
    size = 2 * (magnitude.shape[1] - 1) if n_fft is None and magnitude.dim() == 3 else (n_fft or 0)
    if magnitude.dim() != 3 or magnitude.shape[1] != size // 2 + 1:
        raise ValueError(f"magnitude must be (B, n_fft // 2 + 1, T), got {tuple(magnitude.shape)} and n_fft {n_fft}")
    if n_iter < 0 or not 0 <= momentum < 1:
        raise ValueError(f"n_iter must not be negative and momentum from 0 to below 1, got {n_iter} and {momentum}")
    length = size if win_length is None else win_length
    hop = length // 4 if hop_length is None else hop_length
    taper = zero_padded(window(kind, length), size).to(magnitude)
    if init_phase is None:
        init_phase = 2 * math.pi * torch.rand(magnitude.shape, generator=generator, dtype=magnitude.dtype).to(magnitude)
    elif init_phase.shape != magnitude.shape:
        raise ValueError(f"init_phase must have the shape {tuple(magnitude.shape)}, got {tuple(init_phase.shape)}")
    angles, before = (
        torch.polar(torch.ones_like(magnitude), init_phase.to(magnitude)),
        torch.zeros((), device=magnitude.device),
    )

    def signal() -> Tensor:
        return inverse_stft(torch.view_as_real(magnitude * angles), taper, hop, center=center)

    for _ in range(n_iter):
        padded = pad_ends(signal(), size // 2, pad_mode) if center else signal()
        rebuilt = torch.view_as_complex(stft(padded, taper, hop).contiguous())
        angles = rebuilt - momentum / (1 + momentum) * before
        angles = angles / (angles.abs() + 1e-16)
        before = rebuilt
    return signal()
