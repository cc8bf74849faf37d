"""Long convolutions as modules that get their kernel at every call: whole, partial and frequency-sparse.

Fu, Kumbong, Nguyen, Re: "FlashFFTConv: Efficient Convolutions for Long Sequences with Tensor Cores", ICLR 2024,
arXiv 2311.05908.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from convatlas.ops.fft_conv import fft_conv
from convatlas.ops.frequency_sparse import frequency_sparse_conv, frequency_sparse_kernel, sparsity
from convatlas.ops.partial_conv import partial_conv, stream_conv

__all__ = ["DROPPED_CONSTANTS", "FFTConv1d", "FrequencySparseFFTConv", "PartialFFTConv"]

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

    Raises:
        ValueError: keep or factors are out of range or do not fit.
    """

    def __init__(
        self, keep: int | Sequence[int], factors: Sequence[int] | None = None, seqlen: int | None = None
    ) -> None:
        super().__init__()
        if isinstance(keep, int) and (keep < 1 or factors is not None):
            raise ValueError(f"keep must be at least 1, and a block for factors, got {keep} and {factors}")
        if not isinstance(keep, int):
            sparsity(factors or (), keep)
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
