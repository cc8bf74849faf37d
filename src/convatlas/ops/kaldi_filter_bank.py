"""The log-mel filter bank of the Kaldi speech recognition toolkit, which audio networks are commonly trained on.

Povey et al.: "The Kaldi Speech Recognition Toolkit", ASRU 2011: ``compute-fbank-feats`` without dither and energy.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.ops.filter_banks import triangular_filters
from convatlas.ops.precision import without_autocast

__all__ = ["kaldi_filter_bank", "kaldi_mel_filters"]

_PRE_EMPHASIS = 0.97
_LOWEST_HZ = 20.0


def kaldi_mel_filters(
    num_filters: int, n_fft: int, sample_rate: float, *, device: torch.device | None = None
) -> Tensor:
    """Triangles, linear in mel = 1127 ln(1 + f / 700), from 20 Hz to half the sample rate, (num_filters, n_fft/2 + 1).

    The last column, of half the sample rate itself, is zero. float64.

    Raises:
        ValueError: num_filters is not positive, n_fft is odd, or the sample rate is too low.
    """
    if num_filters < 1 or n_fft < 2 or n_fft % 2:
        raise ValueError(f"num_filters must be positive and n_fft even, got {num_filters} and {n_fft}")
    if sample_rate <= 2 * _LOWEST_HZ:
        raise ValueError(f"sample_rate must be above {2 * _LOWEST_HZ:g} Hz, got {sample_rate:g}")
    low, high = (1127 * math.log(1 + hertz / 700) for hertz in (_LOWEST_HZ, sample_rate / 2))
    edges = torch.linspace(low, high, num_filters + 2, dtype=torch.float64, device=device)
    hertz = torch.arange(n_fft // 2, dtype=torch.float64, device=device) * (sample_rate / n_fft)
    mel = 1127 * (1 + hertz / 700).log()
    return F.pad(triangular_filters(edges, mel), (0, 1))


def kaldi_filter_bank(
    waveform: Tensor,
    sample_rate: float = 16000,
    *,
    num_filters: int = 128,
    frame_length: float = 0.025,
    frame_shift: float = 0.01,
) -> Tensor:
    """Logarithms of the power in each mel band, frame by frame.

    Frames are taken only where they fit. Each loses its mean, is pre-emphasised (x_t - 0.97 x_{t-1}, the first sample
    by itself), multiplied by a symmetric Hann window and padded with zeros to a power of two; the power spectrum is
    summed in the bands of `kaldi_mel_filters`, and what is below 2^-23 is raised to it before the logarithm.

    Args:
        waveform: (..., samples).
        sample_rate: in Hz.
        num_filters: number F of bands.
        frame_length, frame_shift: in seconds.

    Returns:
        (..., T, F) with T = 1 + (samples - length) // shift frames; at least float32.

    Raises:
        ValueError: the waveform is shorter than a frame, or a length is not positive.
    """
    length, shift = int(sample_rate * frame_length), int(sample_rate * frame_shift)
    if length < 2 or shift < 1:
        raise ValueError(
            f"frame_length and frame_shift must hold samples, got {frame_length:g} s and {frame_shift:g} s at "
            f"{sample_rate:g} Hz"
        )
    if waveform.dim() < 1 or waveform.shape[-1] < length:
        raise ValueError(f"waveform must have at least the {length} samples of a frame, got {tuple(waveform.shape)}")
    x = waveform.to(torch.promote_types(waveform.dtype, torch.float32))
    n_fft = 1 << (length - 1).bit_length()
    with without_autocast(x):
        frames = x.unfold(-1, length, shift)
        frames = frames - frames.mean(-1, keepdim=True)
        frames = frames - _PRE_EMPHASIS * torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
        window = torch.hann_window(length, periodic=False, dtype=x.dtype, device=x.device)
        spectrum = torch.fft.rfft(frames * window, n_fft)
        power = spectrum.real.square() + spectrum.imag.square()
        filters = kaldi_mel_filters(num_filters, n_fft, sample_rate, device=x.device).to(x.dtype)
        return (power @ filters.T).clamp_min(torch.finfo(torch.float32).eps).log()
