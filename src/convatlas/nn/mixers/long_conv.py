"""Convolution of sequences with a long kernel of its own in both directions, as a layer that keeps the shape.

Fu, Kumbong, Nguyen, Re: "FlashFFTConv: Efficient Convolutions for Long Sequences with Tensor Cores", ICLR 2024,
arXiv 2311.05908: the layer of its example of a long-convolution network.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.ops.fft_conv import fft_conv

__all__ = ["LongConv", "squash"]


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

    def __init__(self, channels: int, *, length: int, heads: int = 1, lam: float = 0.1, dropout: float = 0.1) -> None:
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
