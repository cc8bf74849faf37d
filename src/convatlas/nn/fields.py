"""Parts of networks on fields that act alike at every point, and the coordinates that they are given."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from convatlas.nn.conv.kernel_interpolation import Interpolation, interpolate_field

__all__ = ["ChannelMLP", "InputOutputInterpolate", "PointwiseConv", "SoftGating", "coordinates", "with_coordinates"]


def coordinates(grid: Sequence[int], x: Tensor, *, end: bool = False) -> Tensor:
    """Coordinates in [0, 1) of the points of a grid, (d, *grid), in the type and on the device of x.

    Args:
        grid: points of each axis.
        x: any tensor.
        end: whether the last point lies at 1, as the authors' OFormer has it.
    """
    lines = [torch.linspace(0, 1, n if end else n + 1, device=x.device, dtype=x.dtype)[:n] for n in grid]
    return torch.stack(torch.meshgrid(*lines, indexing="ij"))


def with_coordinates(x: Tensor) -> Tensor:
    """A field (B, C, *grid) with the coordinates behind its channels, (B, C + d, *grid)."""
    places = coordinates(x.shape[2:], x)
    return torch.cat([x, places.expand(x.shape[0], *places.shape)], 1)


class PointwiseConv(nn.Module):
    """A linear map of the channels, the same at every point of a field with any number of axes.

    Args:
        in_channels, out_channels: of the field.
        bias: whether one is added.
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, *grid) to (B, out_channels, *grid)."""
        y: Tensor = self.conv(x.flatten(2))
        return y.unflatten(2, x.shape[2:])


class ChannelMLP(nn.Module):
    """Linear maps of the channels with GELU between them, the same at every point of a field.

    Args:
        channels: of input, hidden layers and output.
    """

    def __init__(self, *channels: int) -> None:
        super().__init__()
        self.fcs = nn.ModuleList([nn.Conv1d(*pair, 1) for pair in itertools.pairwise(channels)])
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, *grid) to (B, C', *grid)."""
        y = x.flatten(2)
        for index, layer in enumerate(self.fcs):
            y = layer(self.act(y) if index else y)
        return y.unflatten(2, x.shape[2:])


class SoftGating(nn.Module):
    """Multiply each channel by a learnt factor that starts at 1.

    Args:
        channels: of the field.
        dims: axes of position.
    """

    def __init__(self, channels: int, dims: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, channels, *[1] * dims))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, *grid) to the same shape."""
        return x * self.weight


class InputOutputInterpolate(nn.Module):
    """Any network on fields as an operator: the input is brought to the grid of the training, the output back.

    Berner et al., 2025, arXiv 2506.10973, section 4: it holds on all grids, but sees no more than that one does.

    Args:
        model: takes fields (B, C, *grid) and gives such on the same grid.
        train_resolution: points of each axis of the training's grid, or one number for all.
        interpolation: ``bilinear`` or ``fourier``.

    Raises:
        ValueError: train_resolution is smaller than 1.
    """

    def __init__(
        self, model: nn.Module, train_resolution: int | Sequence[int], interpolation: Interpolation = "bilinear"
    ) -> None:
        super().__init__()
        grid = (train_resolution,) if isinstance(train_resolution, int) else tuple(train_resolution)
        if min(grid) < 1:
            raise ValueError(f"train_resolution must be at least 1, got {train_resolution}")
        self.model, self.train_resolution, self.interpolation = model, grid, interpolation

    def forward(self, x: Tensor) -> Any:
        """The model's answer to (B, C, *grid) on the grid of x."""
        dims = x.dim() - 2
        grid = self.train_resolution * dims if len(self.train_resolution) == 1 else self.train_resolution
        if len(grid) != dims:
            raise ValueError(f"x must have {len(grid)} axes of position, got {tuple(x.shape)}")
        return interpolate_field(
            self.model(interpolate_field(x, grid, self.interpolation)), x.shape[2:], self.interpolation
        )

    def extra_repr(self) -> str:
        """Show the grid."""
        return f"train_resolution={self.train_resolution}, interpolation={self.interpolation}"
