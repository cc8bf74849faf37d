"""FNO and FFNO as Transform Once was compared with them: a transform and its inverse in every layer.

Li et al.: "Fourier Neural Operator for Parametric Partial Differential Equations", ICLR 2021, arXiv 2010.08895; Tran,
Mathews, Xie, Ong: "Factorized Fourier Neural Operators", ICLR 2023, arXiv 2111.13802; both in the configurations of
Poli et al.: "Transform Once", NeurIPS 2022, arXiv 2211.14453.
"""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.errors import unknown
from convatlas.networks.base import FieldNetwork, FieldNetworkConfig
from convatlas.networks.transform_once.spectral import ACTIVATIONS, Transform, coordinates, each_axis
from convatlas.nn.spectral_weights import as_complex, spectral_weight
from convatlas.nn.transform_conv import DCTConv, DFTConv
from convatlas.ops.mode_mixing import mix_modes, mode_major
from convatlas.ops.precision import without_autocast
from convatlas.weights import Layout

__all__ = ["FFNO", "FNO", "VARIANTS", "FFNOConfig", "FNOConfig"]

_HEAD_WIDTH = 128
_CONVS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, kw_only=True)
class _Config(FieldNetworkConfig):
    """What both have in common.

    Attributes:
        modes: frequencies kept of each axis, or one number for all.
        width: channels of the layers.
        depth: how many layers.
    """

    modes: int | tuple[int, ...] = 24
    width: int = 48
    depth: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width < 1 or self.depth < 1:
            raise ValueError(f"width and depth must be at least 1, got {self.width} and {self.depth}")
        if len(self.kept) != self.dims or min(self.kept) < 1:
            raise ValueError(f"modes must be one number or {self.dims}, at least 1, got {self.modes}")
        if any(kept > most for kept, most in zip(self.kept, self._most(), strict=True)):
            raise ValueError(f"modes {self.kept} must not exceed those of the resolution {self.grid}: {self._most()}")

    @property
    def kept(self) -> tuple[int, ...]:
        """Modes of each axis that have weights."""
        return each_axis(self.modes, self.dims)

    @abstractmethod
    def _most(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, kw_only=True)
class FNOConfig(_Config):
    """Config of `FNO`.

    Attributes:
        transform: ``dft``, or ``dct`` for the same network with cosine transforms.
        act: activation of the layers: ``gelu``, ``sin`` or ``tanh``.
        residual: whether a layer adds its input.
        conv_residual: whether a layer adds a 1 x 1 convolution of its input.
        init: of the spectral weights.

    Raises:
        ValueError: a value is out of range.
        UnknownName: there is no such transform or activation.
    """

    transform: Transform = "dft"
    act: Literal["gelu", "sin", "tanh"] = "gelu"
    residual: bool = True
    conv_residual: bool = True
    init: Literal["naive", "vp", "zero", "fan_in"] = "naive"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("transform", ("dct", "dft")), ("act", tuple(ACTIVATIONS))):
            if getattr(self, name) not in known:
                raise unknown(name, str(getattr(self, name)), known)

    def _most(self) -> tuple[int, ...]:
        last = self.grid[-1] // 2 + 1 if self.transform == "dft" else self.grid[-1]
        return (*(max(1, size // 2) for size in self.grid[:-1]), last)

    def build(self) -> FNO:
        return FNO(self)


class _FNOLayer(nn.Module):
    """act(spectral convolution + input + 1 x 1 convolution)."""

    def __init__(self, config: FNOConfig) -> None:
        super().__init__()
        make = DFTConv if config.transform == "dft" else DCTConv
        self.conv = make(config.width, config.width, config.kept, points=math.prod(config.grid), init=config.init)
        self.w = _CONVS[config.dims - 1](config.width, config.width, 1) if config.conv_residual else None
        self.act, self.residual = ACTIVATIONS[config.act], config.residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.residual:
            y = y + x
        return self.act(y if self.w is None else y + self.w(x))


def _without_unused(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The authors' layers hold their 1 x 1 convolution also where it is multiplied by zero."""
    if model.config.conv_residual:  # type: ignore[union-attr]
        return state
    return {key: tensor for key, tensor in state.items() if not re.match(r"blocks\.\d+\.w\.", key)}


class FNO(FieldNetwork):
    """fc0 on input and coordinates, layers with a transform and its inverse each, two matrices with GELU between them.

    Args:
        config: what to build.
    """

    config: FNOConfig
    layouts: ClassVar[Mapping[str, Layout]] = {
        "authors": Layout(renames=((r"^layers\.", "blocks."),), function=_without_unused)
    }

    def __init__(self, config: FNOConfig) -> None:
        super().__init__(config)
        self.fc0 = nn.Linear(config.in_channels + config.dims, config.width)
        self.blocks = nn.ModuleList(_FNOLayer(config) for _ in range(config.depth))
        self.fc1 = nn.Linear(config.width, _HEAD_WIDTH)
        self.fc2 = nn.Linear(_HEAD_WIDTH, config.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """A field (B, out_channels, *grid) of a field (B, in_channels, *grid), on any grid.

        Raises:
            ValueError: x has a wrong number of dimensions or channels, or is not real.
        """
        self._check_input(x)
        x = self.fc0(_located(x)).movedim(-1, 1)
        for block in self.blocks:
            x = block(x)
        return self.fc2(F.gelu(self.fc1(x.movedim(1, -1)))).movedim(-1, 1)


@dataclass(frozen=True, kw_only=True)
class FFNOConfig(_Config):
    """Config of `FFNO`.

    Attributes:
        factor: how many times as wide the layer between two linear ones is.

    Raises:
        ValueError: a value is out of range.
    """

    width: int = 64
    depth: int = 8
    factor: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor < 1:
            raise ValueError(f"factor must be at least 1, got {self.factor}")

    def _most(self) -> tuple[int, ...]:
        return tuple(size // 2 + 1 for size in self.grid)

    def build(self) -> FFNO:
        return FFNO(self)


class _FeedForward(nn.Module):
    """Two linear layers with ReLU between them, at each point."""

    def __init__(self, channels: int, factor: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                nn.Sequential(nn.Linear(channels, factor * channels), nn.ReLU()),
                nn.Sequential(nn.Linear(factor * channels, channels)),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class _FFNOLayer(nn.Module):
    """Transform, matrices of low frequencies and inverse along each axis; two linear layers on the sum."""

    def __init__(self, config: FFNOConfig) -> None:
        super().__init__()
        width = config.width
        # Xavier's deviation, for each axis from the last to the first.
        self.fourier_weight = nn.ParameterList(
            spectral_weight(
                *(width, width, modes), deviation=math.sqrt(1 / width / modes), layout=mode_major, complex_valued=True
            )
            for modes in reversed(config.kept)
        )
        self.backcast_ff = _FeedForward(width, config.factor)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for place, weight in enumerate(self.fourier_weight):
            y = y + _mixed_along(x, weight, -1 - place)
        return self.backcast_ff(y.movedim(1, -1)).movedim(-1, 1)


class FFNO(FieldNetwork):
    """in_proj on input and coordinates, layers whose output b is subtracted from their input, and a head on the last b.

    Args:
        config: what to build.
    """

    config: FFNOConfig

    def __init__(self, config: FFNOConfig) -> None:
        super().__init__(config)
        self.in_proj = nn.Linear(config.in_channels + config.dims, config.width)
        self.spectral_layers = nn.ModuleList(_FFNOLayer(config) for _ in range(config.depth))
        self.out = nn.Sequential(nn.Linear(config.width, _HEAD_WIDTH), nn.Linear(_HEAD_WIDTH, config.out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """A field (B, out_channels, *grid) of a field (B, in_channels, *grid), on any grid.

        Raises:
            ValueError: x has a wrong number of dimensions or channels, or is not real.
        """
        self._check_input(x)
        x = self.in_proj(_located(x)).movedim(-1, 1)
        for layer in self.spectral_layers:
            b = layer(x)
            x = x - b
        return self.out(b.movedim(1, -1)).movedim(-1, 1)


def _located(x: Tensor) -> Tensor:
    """A field with the coordinates of its points behind its channels, channels last: (B, *grid, C + axes)."""
    grid = x.shape[2:]
    places = coordinates(grid, x).expand(x.shape[0], -1, *grid)
    return torch.cat([x, places], 1).movedim(1, -1)


def _mixed_along(x: Tensor, weight: Tensor, axis: int) -> Tensor:
    """The spectral convolution of one axis; a short one takes the weights of the lowest frequencies."""
    size = x.shape[axis]
    with without_autocast(x):
        spectrum = torch.fft.rfft(x.to(torch.promote_types(x.dtype, torch.float32)), dim=axis, norm="ortho")
        kept = min(weight.shape[2], spectrum.shape[axis])
        low = spectrum.narrow(axis, 0, kept).movedim(axis, 2)
        # The other axes of position are samples of the batch here.
        rows = low.reshape(*low.shape[:3], -1).permute(0, 3, 1, 2).flatten(0, 1)
        mixed = mix_modes(rows, as_complex(weight)[..., :kept])
        mixed = mixed.unflatten(0, (x.shape[0], -1)).permute(0, 2, 3, 1).reshape(low.shape).movedim(2, axis)
        return torch.fft.irfft(mixed, size, dim=axis, norm="ortho").to(x.dtype)


VARIANTS: dict[str, FNOConfig | FFNOConfig] = {
    "t1_fno_navier_stokes": FNOConfig(),
    "t1_fno_airfoil": FNOConfig(in_channels=3, out_channels=3, resolution=128),
    "t1_ffno_navier_stokes": FFNOConfig(),
}
