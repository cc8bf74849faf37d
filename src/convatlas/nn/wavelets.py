"""The discrete wavelet transform and its inverse as layers without parameters, and followed by a convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.errors import unknown
from convatlas.ops.boundary import extend
from convatlas.ops.wavelet_filters import Wavelet, find_wavelet
from convatlas.ops.wavelets import Coefficients, Mode, dwt, idwt, wavedec, waverec

__all__ = ["DWT", "IDWT", "DWTConv"]


class DWT(nn.Module):
    """Wavelet transform of (B, C, L), (B, C, H, W) or (B, C, D, H, W) over several levels.

    Args:
        wavelet: name of a wavelet, such as ``haar``, ``db4`` or ``bior4.4``, or one of your own.
        levels: how often the low-pass band is transformed.
        mode: what lies beyond the ends of a signal, see `convatlas.ops.wavelets.Mode`.

    Raises:
        ValueError: levels is smaller than 1.
        UnknownName: there is no such wavelet or mode.
    """

    def __init__(self, wavelet: str | Wavelet = "haar", levels: int = 1, mode: Mode = "symmetric") -> None:
        super().__init__()
        if levels < 1:
            raise ValueError(f"levels must be at least 1, got {levels}")
        self.levels = levels
        self.wavelet = _checked(wavelet, mode)
        self.mode: Mode = mode

    def forward(self, x: Tensor) -> Coefficients:
        """The low-pass band and, finest level first, the others (B, C, 2^d - 1, *positions)."""
        return wavedec(x, self.wavelet, self.mode, self.levels)

    def extra_repr(self) -> str:
        """Show wavelet, levels and mode."""
        return f"{self.wavelet.name!r}, levels={self.levels}, mode={self.mode!r}"


class IDWT(nn.Module):
    """The inverse of `DWT`.

    Args:
        wavelet, mode: as for `DWT`.

    Raises:
        UnknownName: there is no such wavelet or mode.
    """

    def __init__(self, wavelet: str | Wavelet = "haar", mode: Mode = "symmetric") -> None:
        super().__init__()
        self.wavelet = _checked(wavelet, mode)
        self.mode: Mode = mode

    def forward(self, coefficients: Coefficients, size: Sequence[int] | None = None) -> Tensor:
        """The signal (B, C, *positions), cropped to ``size``, which is needed where it was odd."""
        return waverec(coefficients, self.wavelet, self.mode, size)

    def extra_repr(self) -> str:
        """Show wavelet and mode."""
        return f"{self.wavelet.name!r}, mode={self.mode!r}"


class DWTConv(nn.Module):
    """One level of the transform, then a 1 x 1 convolution of the low-pass band and one of all others.

    Both together are one convolution of kernel size and stride 2 where the wavelet is Haar, and run as such. Wang et
    al.: "DISGAN: Wavelet-informed Discriminator Guides GAN to MRI Super-resolution with Noise Cleaning", 2023,
    arXiv 2308.12084.

    Args:
        in_channels: C of the input.
        out_channels: K of both results.
        dims: position axes, 1 to 3.
        wavelet: name of a wavelet; those longer than Haar see a periodic signal.
        odd: what to do with a length that is odd: an "error", or one more sample, "zero".

    Raises:
        ValueError: a number or option is out of range.
        UnknownName: there is no such wavelet.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        dims: int = 3,
        wavelet: str = "haar",
        odd: Literal["error", "zero"] = "error",
    ) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if dims not in _CONVOLUTIONS:
            raise ValueError(f"dims must be 1, 2 or 3, got {dims}")
        if odd not in ("error", "zero"):
            raise unknown("odd", odd, ("error", "zero"))
        self.dims, self.odd, self.wavelet = dims, odd, find_wavelet(wavelet)
        self.low = _CONVOLUTIONS[dims](in_channels, out_channels, 1)
        self.high = _CONVOLUTIONS[dims]((2**dims - 1) * in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Low-pass and other bands (B, out_channels, *positions / 2) each of (B, in_channels, *positions).

        The others come sub-band by sub-band, as `convatlas.ops.wavelets.subbands` names them, each with all channels.

        Raises:
            ValueError: x has a wrong number of axes or channels, or an odd length that is an error.
        """
        channels = self.low.in_channels
        if x.dim() != self.dims + 2 or x.shape[1] != channels:
            raise ValueError(f"x must be (B, {channels}, {', '.join('DHW'[-self.dims :])}), got {tuple(x.shape)}")
        for axis in range(2, x.dim()):
            if x.shape[axis] % 2:
                if self.odd == "error":
                    raise ValueError(f"size {x.shape[axis]} on axis {axis} is odd: pad x, or take odd='zero'")
                x = extend(x, axis, 0, 1, "zero")
        if self.wavelet.length == 2:
            return self._folded(x)
        bands = dwt(x, self.wavelet, "periodization").transpose(1, 2).flatten(1, 2)
        return self.low(bands[:, :channels]), self.high(bands[:, channels:])

    def _folded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # The kernel of 2 x 2 x 2 that gives a mixture of bands is what the inverse transform makes of that mixture.
        others, rest = self.high.weight.unflatten(1, (-1, self.low.in_channels)).transpose(1, 2), (0, 0) * self.dims
        low = F.pad(self.low.weight.unsqueeze(2), (*rest, 0, others.shape[2]))
        kernel = idwt(torch.cat([low, F.pad(others, (*rest, 1, 0))]), self.wavelet, "periodization")
        bias = torch.cat([self.low.bias, self.high.bias])  # type: ignore[list-item]
        low, high = _FUNCTIONS[self.dims](x, kernel, bias, stride=2).chunk(2, 1)
        return low, high

    def extra_repr(self) -> str:
        """Show wavelet and what happens to odd lengths."""
        return f"{self.wavelet.name!r}, odd={self.odd!r}"


_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_FUNCTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def _checked(wavelet: str | Wavelet, mode: str) -> Wavelet:
    if mode not in get_args(Mode):
        raise unknown("mode", mode, get_args(Mode))
    return find_wavelet(wavelet) if isinstance(wavelet, str) else wavelet
