"""The layer of Transform Once, which works on the modes of a field and needs no transform.

Poli, Massaroli, Berto, Park, Dao, Re, Ermon: "Transform Once: Efficient Operator Learning in Frequency Domain", NeurIPS
2022, arXiv 2211.14453, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.nn.spectral_weights import SpectralInit, as_complex, spectral_deviation, spectral_weight
from convatlas.ops.mode_boxes import lowest, with_zeros
from convatlas.ops.mode_mixing import channel_major, mix_axis, mix_modes, mode_major

__all__ = ["T1Layer"]


class T1Layer(nn.Module):
    """Mix the channels at each low mode, then an activation, then mix the modes along each axis for each channel.

    Weights keep the shapes of the authors' checkpoints; their memory is laid out for the products.

    Args:
        channels: of the field, the width.
        modes: how many of the lowest are kept of each axis.
        points: of the whole grid; the initialisation ``vp`` needs it.
        complex_valued: whether the modes are those of a Fourier transform; of a cosine transform otherwise.
        act: activation, on every mode.
        residual: whether the low modes are added to what the layer makes of them.
        keep_high: whether the modes above pass through; they become zero otherwise. On all axes but the last, the
            highest ``modes`` count as negative frequencies and become zero below the last axis' limit as well.
        init: of the mixing of channels; the mixing of modes starts from ``fan_in``.

    Raises:
        ValueError: channels, modes or points is smaller than 1.
        UnknownName: there is no such initialisation.
    """

    def __init__(
        self,
        channels: int,
        modes: Sequence[int],
        *,
        points: int,
        complex_valued: bool = False,
        act: Callable[[Tensor], Tensor] = F.gelu,
        residual: bool = True,
        keep_high: bool = False,
        init: SpectralInit = "vp",
    ) -> None:
        super().__init__()
        if min(channels, points, *modes) < 1:
            raise ValueError(f"channels, modes and points must be at least 1, got {channels}, {modes} and {points}")
        self.channels, self.modes = channels, tuple(modes)
        self.complex_valued, self.residual, self.keep_high = complex_valued, residual, keep_high
        self.act = act
        count = math.prod(self.modes)
        deviation = spectral_deviation(init, channels, channels, count, points, complex_valued=complex_valued)
        self.ch_mixing_1 = spectral_weight(
            *(channels, channels, *self.modes), deviation=deviation, layout=mode_major, complex_valued=complex_valued
        )
        for axis, size in enumerate(self.modes, 1):
            deviation = spectral_deviation("fan_in", size, size, count, points, complex_valued=complex_valued)
            weight = spectral_weight(
                *(size, size, channels), deviation=deviation, layout=channel_major, complex_valued=complex_valued
            )
            self.register_parameter(f"spatial_mixing_{axis}", weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map modes (B, C, *modes) to the same shape; there may be more of them than the layer mixes.

        Raises:
            ValueError: x has a wrong number of channels, axes or modes.
        """
        if x.dim() != len(self.modes) + 2 or x.shape[1] != self.channels:
            raise ValueError(f"x must have {self.channels} channels and {len(self.modes)} axes, got {tuple(x.shape)}")
        if any(given < kept for given, kept in zip(x.shape[2:], self.modes, strict=True)):
            raise ValueError(f"x must have at least the modes {self.modes}, got {tuple(x.shape[2:])}")
        low = lowest(x, self.modes)
        z = self.act(mix_modes(low, self._weight("ch_mixing_1")))
        for axis in range(1, len(self.modes) + 1):
            z = mix_axis(z, self._weight(f"spatial_mixing_{axis}"), axis + 1)
        if self.residual:
            z = z + low
        if z.shape == x.shape:
            return z
        z = with_zeros(z, x.shape[2:])
        return torch.where(self._high(x), x, z) if self.keep_high else z

    def _weight(self, name: str) -> Tensor:
        weight: Tensor = getattr(self, name)
        return as_complex(weight) if self.complex_valued else weight

    def _high(self, x: Tensor) -> Tensor:
        """Which modes pass through."""
        sizes, dims = x.shape[2:], len(self.modes)
        high = torch.zeros(sizes, dtype=torch.bool, device=x.device)
        for axis, (size, kept) in enumerate(zip(sizes, self.modes, strict=True)):
            places = torch.arange(size, device=x.device)
            passing = (places >= kept) & (places < (size if axis == dims - 1 else size - kept))
            high = high | passing.view(*[1] * axis, -1, *[1] * (dims - 1 - axis))
        return high
