"""The discrete wavelet transform and its inverse as layers without parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from torch import Tensor, nn

from convatlas.errors import unknown
from convatlas.ops.wavelet_filters import Wavelet, find_wavelet
from convatlas.ops.wavelets import Coefficients, Mode, wavedec, waverec

__all__ = ["DWT", "IDWT"]


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


def _checked(wavelet: str | Wavelet, mode: str) -> Wavelet:
    if mode not in get_args(Mode):
        raise unknown("mode", mode, get_args(Mode))
    return find_wavelet(wavelet) if isinstance(wavelet, str) else wavelet
