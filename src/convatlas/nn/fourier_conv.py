"""A convolution of time series whose kernel is as long as they are and is learned as a spectrum."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.ops.fourier_conv import fourier_conv1d

__all__ = ["FourierConv1d"]


class FourierConv1d(nn.Module):
    """Global convolution in the frequency domain, and a bias.

    Frequencies are cycles per series, so that a series of another length is filtered at as many low frequencies.

    Args:
        in_channels, out_channels: I and O.
        length: T of the series that it is made for.
        modes: number of frequencies from 0 on; all T // 2 + 1 when left out.
        band: lowest and highest frequency instead, both included; the others are 0.
        padding: ``circular`` (a series goes on at its beginning) or ``linear`` (after it come T zeros, so that its end
            does not act on its beginning).
        bias: whether there is one.

    Raises:
        ValueError: a number is out of range, or both modes and band are given.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        length: int,
        modes: int | None = None,
        *,
        band: tuple[int, int] | None = None,
        padding: Literal["circular", "linear"] = "circular",
        bias: bool = True,
    ) -> None:
        super().__init__()
        if min(in_channels, out_channels, length) < 1:
            raise ValueError(
                f"in_channels, out_channels and length must be at least 1, got {in_channels}, {out_channels}, {length}"
            )
        if padding not in ("circular", "linear"):
            raise ValueError(f"padding must be 'circular' or 'linear', got {padding!r}")
        if modes is not None and band is not None:
            raise ValueError(f"modes and band exclude each other, got {modes} and {band}")
        most = (length if padding == "circular" else 2 * length) // 2
        low, high = band or (0, most if modes is None else modes - 1)
        if not 0 <= low <= high <= most:
            given = f"modes {modes}" if band is None else f"band {band}"
            raise ValueError(f"frequencies must be from 0 to {most} for length {length}, got {given}")
        self.in_channels, self.out_channels, self.length = in_channels, out_channels, length
        self.first, self.padding = low, padding
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, high - low + 1, 2))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random phases and the variance of the input at every kept frequency; no bias."""
        nn.init.normal_(self.weight, std=math.sqrt(0.5 / self.in_channels))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, in_channels, T) to (B, out_channels, T)."""
        if x.dim() != 3 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must be (B, {self.in_channels}, T), got {tuple(x.shape)}")
        length = x.shape[2]
        long = F.pad(x, (0, length)) if self.padding == "linear" else x
        y = fourier_conv1d(long, self.weight, self.first)[..., :length]
        return y if self.bias is None else y + self.bias[:, None].to(y.dtype)

    def extra_repr(self) -> str:
        """Show the sizes."""
        band = f"frequencies {self.first} to {self.first + self.weight.shape[2] - 1}"
        return f"{self.in_channels}, {self.out_channels}, {self.length}, {band}, padding={self.padding}"
