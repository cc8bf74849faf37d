"""Filter banks in front of and behind the separator of Conv-TasNet, and the encoder and decoder that use them.

Luo, Mesgarani: "Conv-TasNet", TASLP 2019, arXiv 1809.07454, section 2.2; the kinds besides free filters are those of
Pariente, Cornell, Deleforge, Vincent: "Filterbank design for end-to-end speech separation", ICASSP 2020, arXiv
1910.10400, built from their definitions.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.errors import unknown

__all__ = [
    "AnalyticFilterbank",
    "Decoder",
    "Encoder",
    "Filterbank",
    "FilterbankKind",
    "FreeFilterbank",
    "STFTFilterbank",
    "SincFilterbank",
    "make_filterbank",
]

#: Which filters: free, pairs of free ones and their Hilbert transforms, band passes with learnt edges, or Fourier's.
FilterbankKind = Literal["free", "analytic_free", "param_sinc", "stft"]

#: Lowest edge and narrowest band of the band passes, in Hz.
_LOWEST_HZ, _NARROWEST_HZ = 50.0, 50.0
_FIRST_HZ = 30.0


class Filterbank(nn.Module, ABC):
    """Filters (features, 1, kernel_size).

    Args:
        features: number of features that a frame has.
        kernel_size: L of the paper, samples of a filter.
    """

    def __init__(self, features: int, kernel_size: int) -> None:
        super().__init__()
        self.features, self.kernel_size = features, kernel_size

    @abstractmethod
    def forward(self) -> Tensor:
        """The filters (features, 1, kernel_size)."""

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"features={self.features}, kernel_size={self.kernel_size}"


class FreeFilterbank(Filterbank):
    """Filters that are parameters, the paper's; drawn by Xavier's normal rule.

    Args:
        num_filters: N of the paper.
        kernel_size: L.
    """

    def __init__(self, num_filters: int, kernel_size: int) -> None:
        super().__init__(num_filters, kernel_size)
        self.weight = nn.Parameter(torch.empty(num_filters, 1, kernel_size))
        nn.init.xavier_normal_(self.weight)

    def forward(self) -> Tensor:
        return self.weight


class AnalyticFilterbank(Filterbank):
    """Half of the filters are parameters, the other half their Hilbert transforms, so that pairs are analytic.

    Args:
        num_filters: even.
        kernel_size: samples of a filter.

    Raises:
        ValueError: num_filters is odd.
    """

    def __init__(self, num_filters: int, kernel_size: int) -> None:
        super().__init__(num_filters, kernel_size)
        _check_even(num_filters)
        self.weight = nn.Parameter(torch.empty(num_filters // 2, 1, kernel_size))
        nn.init.xavier_normal_(self.weight)

    def forward(self) -> Tensor:
        # Half precision has no transform.
        wide = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        turned = torch.fft.irfft(-1j * torch.fft.rfft(wide, dim=-1), self.kernel_size, dim=-1)
        return torch.cat([self.weight, turned.to(self.weight.dtype)])


class SincFilterbank(Filterbank):
    """Pairs of even and odd band passes of which only the edges are learnt, under a Hamming window.

    Ravanelli, Bengio: "Speaker recognition from raw waveform with SincNet", SLT 2018, arXiv 1808.00158; the edges begin
    on the mel scale.

    Args:
        num_filters: even.
        kernel_size: odd.
        sample_rate: in Hz.

    Raises:
        ValueError: num_filters is odd, or kernel_size even.
    """

    window: Tensor
    time: Tensor

    def __init__(self, num_filters: int, kernel_size: int, sample_rate: float) -> None:
        super().__init__(num_filters, kernel_size)
        _check_even(num_filters)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size of filterbank 'param_sinc' must be odd, got {kernel_size}")
        self.sample_rate = sample_rate
        highest = sample_rate / 2 - (_LOWEST_HZ + _NARROWEST_HZ)
        mel = torch.linspace(_mel(_FIRST_HZ), _mel(highest), num_filters // 2 + 1, dtype=torch.float64)
        edges = 700 * (10 ** (mel / 2595) - 1)
        self.low_hz = nn.Parameter(edges[:-1, None].float())
        self.band_hz = nn.Parameter(edges.diff()[:, None].float())
        half = kernel_size // 2
        window = torch.hamming_window(kernel_size, periodic=False, dtype=torch.float64)[:half]
        time = 2 * math.pi * torch.arange(-half, 0, dtype=torch.float64) / sample_rate
        self.register_buffer("window", window.float(), persistent=False)
        self.register_buffer("time", time[None].float(), persistent=False)

    def forward(self) -> Tensor:
        low = _LOWEST_HZ + self.low_hz.abs()
        high = (low + _NARROWEST_HZ + self.band_hz.abs()).clamp(_LOWEST_HZ, self.sample_rate / 2)
        band = high - low
        at_low, at_high = low * self.time, high * self.time
        even = (at_high.sin() - at_low.sin()) / (self.time / 2) * self.window
        odd = (at_low.cos() - at_high.cos()) / (self.time / 2) * self.window
        cosines = torch.cat([even, 2 * band, even.flip(1)], 1)
        sines = torch.cat([odd, torch.zeros_like(band), -odd.flip(1)], 1)
        return (torch.cat([cosines, sines]) / (2 * band).repeat(2, 1)).unsqueeze(1)


class STFTFilterbank(Filterbank):
    """The real and imaginary parts of a Fourier transform of num_filters points under the root of a Hann window; fixed.

    There are num_filters + 2 features. With the same bank in the decoder and a stride that divides half the window the
    mixture is given back.

    Args:
        num_filters: points of the transform, even.
        kernel_size: samples of the window, at most num_filters.
        stride: distance of the frames.

    Raises:
        ValueError: num_filters is odd or smaller than kernel_size.
    """

    filters: Tensor

    def __init__(self, num_filters: int, kernel_size: int, stride: int) -> None:
        super().__init__(num_filters + 2, kernel_size)
        _check_even(num_filters)
        if num_filters < kernel_size:
            raise ValueError(
                f"num_filters of filterbank 'stft' must be at least kernel_size {kernel_size}, got {num_filters}"
            )
        left = (num_filters - kernel_size) // 2
        time = torch.arange(left, left + kernel_size, dtype=torch.float64)
        phase = torch.arange(num_filters // 2 + 1, dtype=torch.float64)[:, None] * time / num_filters
        angle = 2 * math.pi * (phase - phase.round())
        scale = torch.full((num_filters // 2 + 1, 1), 1 / (0.5 * math.sqrt(kernel_size * num_filters / stride)))
        scale[[0, -1]] /= math.sqrt(2)
        window = torch.hann_window(kernel_size, dtype=torch.float64).sqrt()
        filters = torch.cat([angle.cos() * scale, -angle.sin() * scale]) * window
        self.register_buffer("filters", filters.float().unsqueeze(1), persistent=False)

    def forward(self) -> Tensor:
        return self.filters


def make_filterbank(
    kind: FilterbankKind, num_filters: int, kernel_size: int, stride: int, sample_rate: float
) -> Filterbank:
    """A filter bank by name.

    Raises:
        UnknownName: there is no such kind.
        ValueError: a size does not suit it.
    """
    if kind == "free":
        return FreeFilterbank(num_filters, kernel_size)
    if kind == "analytic_free":
        return AnalyticFilterbank(num_filters, kernel_size)
    if kind == "param_sinc":
        return SincFilterbank(num_filters, kernel_size, sample_rate)
    if kind == "stft":
        return STFTFilterbank(num_filters, kernel_size, stride)
    raise unknown("filterbank", str(kind), get_args(FilterbankKind))


class Encoder(nn.Module):
    """Features of overlapping frames: w = x * filters at every stride-th sample (paper, equation 2).

    Args:
        filterbank: the filters.
        stride: distance of the frames in samples.
    """

    def __init__(self, filterbank: Filterbank, stride: int) -> None:
        super().__init__()
        self.filterbank, self.stride = filterbank, stride

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T) to (B, N, K), K = (T - L) // stride + 1."""
        return F.conv1d(x.unsqueeze(1), self.filterbank(), stride=self.stride)


class Decoder(nn.Module):
    """Signals from features by overlap-add of the filters (paper, equation 4), the transpose of `Encoder`.

    Args:
        filterbank: the filters.
        stride: distance of the frames in samples.
    """

    def __init__(self, filterbank: Filterbank, stride: int) -> None:
        super().__init__()
        self.filterbank, self.stride = filterbank, stride

    def forward(self, w: Tensor) -> Tensor:
        """Map (B, C, N, K) to (B, C, (K - 1) stride + L)."""
        y = F.conv_transpose1d(w.flatten(0, 1), self.filterbank(), stride=self.stride)
        return y.squeeze(1).unflatten(0, w.shape[:2])


def _check_even(num_filters: int) -> None:
    if num_filters % 2:
        raise ValueError(f"num_filters of this filterbank must be even, got {num_filters}")


def _mel(hz: float) -> float:
    return 2595 * math.log10(1 + hz / 700)
