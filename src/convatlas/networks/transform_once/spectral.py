"""What the networks of Transform Once share: one transform of the input, answers among the modes, coordinates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.errors import unknown
from convatlas.networks.base import FieldNetwork, FieldNetworkConfig
from convatlas.ops.dct import dct, idct
from convatlas.ops.mode_boxes import lowest, with_zeros
from convatlas.ops.precision import without_autocast

__all__ = ["ACTIVATIONS", "SpectralConfig", "SpectralNetwork", "Transform", "coordinates", "each_axis"]

#: ``dct``: cosines, real modes; ``dft``: Fourier transform of a real field, complex modes.
Transform = Literal["dct", "dft"]

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "sin": torch.sin, "tanh": torch.tanh}
_COMPLEX_ACTIVATIONS = ("sin", "tanh")


def each_axis(value: int | tuple[int, ...], dims: int) -> tuple[int, ...]:
    """One number for each axis."""
    return (value,) * dims if isinstance(value, int) else tuple(value)


def coordinates(grid: Sequence[int], like: Tensor) -> Tensor:
    """Coordinates from 0 to 1 of the points of a grid, one channel for each axis: (axes, *grid)."""
    lines = [torch.linspace(0, 1, size, dtype=like.dtype, device=like.device) for size in grid]
    return torch.stack(torch.meshgrid(*lines, indexing="ij"))


@dataclass(frozen=True, kw_only=True)
class SpectralConfig(FieldNetworkConfig):
    """Config of a network that transforms its input once and answers in modes.

    Attributes:
        modes: the lowest of each axis that the layers mix, or one number for all.
        transform: ``dct`` or ``dft``.
        act: activation of the layers: ``gelu`` (``dct`` only), ``sin`` or ``tanh``.
        residual: whether a layer adds its input to its output.
        keep_high: whether modes above those that a layer mixes pass through it.
        init: initialisation of the mixing of channels.
        padding: zeros behind the last point of each axis, at the resolution of the training.
        output_space: whether `forward` gives ``modes`` or a field on the ``grid``.
        crop: whether an answer on the grid is cut to it where there is padding; the authors' code leaves it longer.

    Raises:
        ValueError: a value is out of range.
        UnknownName: there is no such transform, activation or output space.
    """

    modes: int | tuple[int, ...] = 24
    transform: Transform = "dct"
    act: Literal["gelu", "sin", "tanh"] = "gelu"
    residual: bool = True
    keep_high: bool = False
    init: Literal["naive", "vp", "zero", "fan_in"] = "vp"
    padding: int = 0
    output_space: Literal["modes", "grid"] = "modes"
    crop: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (
            ("transform", get_args(Transform)),
            ("act", tuple(ACTIVATIONS)),
            ("output_space", ("modes", "grid")),
        ):
            if getattr(self, name) not in known:
                raise unknown(name, str(getattr(self, name)), known)
        if self.transform == "dft" and self.act not in _COMPLEX_ACTIVATIONS:
            raise ValueError(f"act must be one of {', '.join(_COMPLEX_ACTIVATIONS)} with dft, got {self.act!r}")
        if self.padding < 0:
            raise ValueError(f"padding must not be negative, got {self.padding}")
        if len(self.kept) != self.dims or min(self.kept) < 1:
            raise ValueError(f"modes must be one number or {self.dims}, at least 1, got {self.modes}")
        if any(kept > size for kept, size in zip(self.kept, self.spectrum, strict=True)):
            raise ValueError(f"modes {self.kept} must not exceed the padded resolution {self.spectrum}")

    @property
    def kept(self) -> tuple[int, ...]:
        """Modes of each axis that the layers mix."""
        return each_axis(self.modes, self.dims)

    @property
    def padded(self) -> tuple[int, ...]:
        """Points of each axis of the grid of the training with the padding."""
        return tuple(size + self.padding for size in self.grid)

    @property
    def spectrum(self) -> tuple[int, ...]:
        """Modes of each axis that a field on that grid has."""
        return _spectrum(self.padded, self.transform)

    @property
    def points(self) -> int:
        """Points of that grid."""
        return math.prod(self.padded)


class SpectralNetwork(FieldNetwork):
    """A network that transforms a field once, together with the coordinates of its points.

    On another grid than that of the training it sees the same function: modes are scaled by the root of the ratio of
    the points. Modes that a coarse grid does not have are zero.
    """

    config: SpectralConfig
    #: The lifting, one matrix for the channels of the input and the coordinates.
    fc0: torch.nn.Linear

    def as_answer(self, field: Tensor) -> Tensor:
        """The modes (B, out_channels, *modes) of a true field (B, out_channels, *grid), or the field itself.

        Cosine modes have the norm of the field. Fourier modes count each pair of mirrored frequencies once.
        """
        if self.config.output_space == "grid":
            return field
        return self._modes(self._pad(field))

    def as_field(self, answer: Tensor, grid: Sequence[int]) -> Tensor:
        """The field (B, out_channels, *grid) whose modes the network answered."""
        return answer if self.config.output_space == "grid" else lowest(self._padded_field(answer, grid), grid)

    def _padded(self, grid: Sequence[int]) -> tuple[int, ...]:
        config = self.config
        return tuple(
            size + round(config.padding * size / trained) for size, trained in zip(grid, config.grid, strict=True)
        )

    def _pad(self, x: Tensor) -> Tensor:
        if not self.config.padding:
            return x
        grid = x.shape[-self.config.dims :]
        return with_zeros(x, self._padded(grid))

    def _modes(self, x: Tensor, kept: Sequence[int] | None = None) -> Tensor:
        """Modes of fields (..., *grid): all, or the lowest of each axis."""
        axes = tuple(range(-self.config.dims, 0))
        if self.config.transform == "dct":
            return dct(x, axes, kept)
        with without_autocast(x):
            z = torch.fft.rfftn(x.to(torch.promote_types(x.dtype, torch.float32)), dim=axes, norm="ortho")
        return z if kept is None else lowest(z, kept)

    def _padded_field(self, modes: Tensor, grid: Sequence[int]) -> Tensor:
        padded, axes = self._padded(grid), tuple(range(-self.config.dims, 0))
        if self.config.transform == "dct":
            return idct(modes, axes, padded)
        with without_autocast(modes):
            return torch.fft.irfftn(modes, s=padded, dim=axes, norm="ortho")

    def _lifted(self, x: Tensor) -> Tensor:
        """Modes of fc0 applied to the input and the coordinates; only those that layers mix unless others pass through.

        The transform is linear and fc0 acts on each point alone, so fc0 comes after it, on few modes.
        """
        config, grid = self.config, x.shape[2:]
        padded = self._padded(grid)
        available = _spectrum(padded, config.transform)
        kept = None if config.keep_high else tuple(map(min, config.kept, available))
        scale = math.sqrt(config.points / math.prod(padded))
        fixed = torch.cat([coordinates(grid, x), x.new_ones(1, *grid)])
        inputs, constants = self._modes(self._pad(x), kept), self._modes(self._pad(fixed), kept)
        weight, bias = self.fc0.weight, self.fc0.bias
        channels = config.in_channels
        of_constants = torch.cat([weight[:, channels:], bias[:, None]], 1)
        z = _mixed(inputs * scale, weight[:, :channels]) + _mixed(constants[None] * scale, of_constants)
        return with_zeros(z, config.kept)

    def _answered(self, z: Tensor, grid: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Bring low modes (B, out_channels, *some) to all modes of the grid, or to a field on it."""
        config, padded = self.config, self._padded(grid)
        whole = _spectrum(padded, config.transform)
        z = lowest(z, whole) * math.sqrt(math.prod(padded) / config.points)
        if config.output_space == "modes":
            return with_zeros(z, whole)
        field = self._padded_field(z if config.transform == "dct" else with_zeros(z, whole), grid).to(dtype)
        return lowest(field, grid) if config.crop else field


def _spectrum(grid: Sequence[int], transform: Transform) -> tuple[int, ...]:
    return tuple(grid) if transform == "dct" else (*grid[:-1], grid[-1] // 2 + 1)


def _mixed(x: Tensor, weight: Tensor) -> Tensor:
    """Channels (B, I, *modes) mixed by (O, I) alike at each mode: (B, O, *modes)."""
    weight = weight.to(x.dtype)
    return torch.matmul(weight, x.flatten(2)).view(x.shape[0], weight.shape[0], *x.shape[2:])
