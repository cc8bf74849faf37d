"""Long convolutions of sequences as layers: whole, partial, frequency-sparse, and with a kernel of their own.

Fu, Kumbong, Nguyen, Re: "FlashFFTConv: Efficient Convolutions for Long Sequences with Tensor Cores", ICLR 2024,
arXiv 2311.05908.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.ops.fft_conv import fft_conv
from convatlas.ops.frequency_sparse import frequency_sparse_conv, frequency_sparse_kernel
from convatlas.ops.partial_conv import partial_conv, stream_conv

__all__ = ["DROPPED_CONSTANTS", "FFTConv1d", "FrequencySparseFFTConv", "LongConv", "PartialFFTConv", "squash"]

#: What the authors' module leaves in the checkpoint of any model that holds it, as a rename that drops it: constants.
DROPPED_CONSTANTS = (r"^(.*\.)?flashfftconv\..*$", "")


class FFTConv1d(nn.Module):
    """The authors' ``FlashFFTConv``: long convolution of a fixed period, with a kernel given at every call.

    It has neither parameters nor buffers, and any period works.

    Args:
        seqlen: period N of the transform: L for circular, 2 L for causal convolution.

    Raises:
        ValueError: seqlen is smaller than 1.
    """

    def __init__(self, seqlen: int) -> None:
        super().__init__()
        if seqlen < 1:
            raise ValueError(f"seqlen must be at least 1, got {seqlen}")
        self.seqlen = seqlen

    def forward(
        self,
        u: Tensor,
        k: Tensor,
        pregate: Tensor | None = None,
        postgate: Tensor | None = None,
        *,
        skip: Tensor | None = None,
    ) -> Tensor:
        """Convolve u (B, C, L) with k (C, K) or (1, C, K), see `convatlas.ops.fft_conv.fft_conv`."""
        return fft_conv(u, k, self.seqlen, pregate, postgate, skip=skip)

    def extra_repr(self) -> str:
        """Show the period."""
        return f"seqlen={self.seqlen}"


class PartialFFTConv(nn.Module):
    """Causal convolution with the first taps of a kernel only (section 3.3).

    Args:
        n_partial: taps that count.

    Raises:
        ValueError: n_partial is smaller than 1.
    """

    def __init__(self, n_partial: int) -> None:
        super().__init__()
        if n_partial < 1:
            raise ValueError(f"n_partial must be at least 1, got {n_partial}")
        self.n_partial = n_partial

    def forward(self, u: Tensor, k: Tensor, pregate: Tensor | None = None, postgate: Tensor | None = None) -> Tensor:
        """Convolve u (B, C, L) of any length with k (C, K)."""
        return partial_conv(u, k, self.n_partial, pregate, postgate)

    def step(
        self,
        u: Tensor,
        k: Tensor,
        state: Tensor | None = None,
        pregate: Tensor | None = None,
        postgate: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The next samples u (B, C, T) of an endless signal; returns their result and the state for the next call."""
        return stream_conv(u, k[..., : self.n_partial], state, pregate, postgate)

    def extra_repr(self) -> str:
        """Show the number of taps."""
        return f"n_partial={self.n_partial}"


class FrequencySparseFFTConv(nn.Module):
    """Long convolution with a kernel of which only some frequencies count (section 3.3).

    Args:
        keep: frequencies below which all are kept, or a block of the permuted spectrum; the authors' plain form with
            N_partial is ``keep=N_partial // 2``.
        factors: of the Monarch decomposition, for a block.
        seqlen: period N; twice the length of the signal when left out, or the product of the factors.
    """

    def __init__(
        self, keep: int | Sequence[int], factors: Sequence[int] | None = None, seqlen: int | None = None
    ) -> None:
        super().__init__()
        self.keep = keep if isinstance(keep, int) else tuple(keep)
        self.factors = None if factors is None else tuple(factors)
        self.seqlen = seqlen

    def forward(self, u: Tensor, k: Tensor, pregate: Tensor | None = None, postgate: Tensor | None = None) -> Tensor:
        """Convolve u (B, C, L) with k (C, K), see `convatlas.ops.frequency_sparse.frequency_sparse_conv`."""
        return frequency_sparse_conv(u, k, self._period(u.shape[-1]), self.keep, self.factors, pregate, postgate)

    def sparse_kernel(self, k: Tensor, length: int) -> Tensor:
        """The kernel (C, N) that does the same by a plain long convolution of signals of a length."""
        return frequency_sparse_kernel(k, self._period(length), self.keep, self.factors)

    def _period(self, length: int) -> int:
        if self.seqlen is not None:
            return self.seqlen
        return 2 * length if self.factors is None else math.prod(self.factors)

    def extra_repr(self) -> str:
        """Show what is kept."""
        return f"keep={self.keep}, factors={self.factors}, seqlen={self.seqlen}"


def squash(k: Tensor, lam: float) -> Tensor:
    """sign(k) max(|k| - lam, 0): small taps are zero, so that a long kernel is sparse and smooth in frequency."""
    return F.softshrink(k, lam)


class LongConv(nn.Module):
    """The layer of long-convolution networks: a kernel in both directions, GELU, linear, GLU.

    The kernel holds its taps themselves, two for each sample of ``length``: those of the lags 0 to length - 1, then
    those of the lags -length to -1. Sequences may have any length; what lies further away than the kernel reaches is
    not seen, which is a partial convolution.

    With the authors' defaults every tap starts below the threshold, and gets no gradient there: to train a kernel from
    its start, take ``lam`` below the size of its taps, 0.002.

    Args:
        channels: channels C of the sequence.
        length: reach of the kernel in either direction; the length of the sequences for a long convolution.
        heads: kernels of each channel, whose results are joined.
        lam: threshold of `squash`.
        dropout: rate after the GELU.

    Raises:
        ValueError: a size or rate is out of range.
    """

    def __init__(self, channels: int, length: int, *, heads: int = 1, lam: float = 0.1, dropout: float = 0.1) -> None:
        super().__init__()
        if min(channels, length, heads) < 1 or lam < 0:
            raise ValueError(
                "channels, length and heads must be at least 1, and lam not negative, "
                f"got {channels}, {length}, {heads} and {lam}"
            )
        self.channels, self.length, self.lam = channels, length, lam
        self.kernel = nn.Parameter(0.002 * torch.randn(heads, channels, 2 * length))
        self.skip = nn.Parameter(torch.randn(heads, channels))
        self.dropout = nn.Dropout(dropout)
        self.output_linear = nn.Linear(heads * channels, 2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, L) to the same shape."""
        if x.dim() != 3 or x.shape[1] != self.channels:
            raise ValueError(f"x must be (B, {self.channels}, L), got {tuple(x.shape)}")
        heads, kernel, skip = len(self.skip), squash(self.kernel, self.lam).flatten(0, 1), self.skip.flatten()
        if heads > 1:
            x = x.repeat(1, heads, 1)
        if x.shape[2] <= self.length:
            y = fft_conv(x, kernel, 2 * self.length, skip=skip)
        else:  # causal, with a kernel that starts at its first lag
            kernel = kernel.roll(self.length, dims=1)
            y = fft_conv(F.pad(x, (0, self.length)), kernel)[..., self.length :] + skip[:, None] * x
        y = self.output_linear(self.dropout(F.gelu(y)).mT)
        return F.glu(y, dim=-1).mT

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"{self.channels}, length={self.length}, heads={len(self.skip)}, lam={self.lam}"
