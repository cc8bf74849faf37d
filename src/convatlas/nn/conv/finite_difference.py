"""Finite-difference layers: convolutions that become derivatives when the grid is refined.

Liu-Schiaffini et al.: "Neural Operators with Localized Integral and Differential Kernels", ICML 2024, arXiv 2402.16845.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from convatlas.errors import Unsupported
from convatlas.nn.conv.geometry import geometry, plain_conv
from convatlas.ops.finite_difference import centred_kernel
from convatlas.weights import Layout

__all__ = ["FiniteDifferenceConv1d", "FiniteDifferenceConv2d", "FiniteDifferenceConv3d"]


class _FiniteDifferenceConv:
    """Body; stands before one of torch's convolutions."""

    #: The authors keep a second name of the same kernel.
    layouts: ClassVar[Mapping[str, Layout]] = {"authors": Layout(renames=((r"^conv\.weight$", ""),))}

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        grid_width: float = 1.0,
        base_resolution: int | None = None,
    ) -> None:
        place = (stride, padding, dilation, groups, bias, padding_mode, device, dtype)
        super().__init__(in_channels, out_channels, kernel_size, *place)  # type: ignore[call-arg]
        layer: Any = self
        if any(size % 2 == 0 for size in layer.kernel_size):
            raise ValueError(f"kernel size should be odd, got {layer.kernel_size}")
        if not grid_width > 0:
            raise ValueError(f"grid_width must be positive, got {grid_width}")
        if base_resolution is not None and base_resolution < 1:
            raise ValueError(f"base_resolution must be at least 1, got {base_resolution}")
        self.grid_width, self.base_resolution = grid_width, base_resolution

    @classmethod
    def from_conv(cls, conv: nn.Module, **options: Any) -> Self:
        """A layer with the geometry, kernel and bias of a convolution, which loses the sum of each kernel.

        Args:
            conv: the convolution of torch that the layer is a subclass of.
            **options: of the layer.

        Raises:
            Unsupported: it is something else, or its kernel is even or a single tap.
        """
        arguments = geometry(conv, next(n for n, kind in _FORMS.items() if issubclass(cls, kind)))
        if max(arguments["kernel_size"]) == 1:
            raise Unsupported("a kernel of one tap has no neighbours to differ from")
        try:
            layer: Any = cls(**arguments, **options)
        except ValueError as error:
            raise Unsupported(str(error)) from None
        layer.load_state_dict(conv.state_dict())
        return layer.train(conv.training)

    def to_conv(self) -> Any:
        """The plain convolution that computes the same; None where the distance follows the grid."""
        if self.base_resolution is not None:
            return None
        conv = plain_conv(self)
        with torch.no_grad():
            conv.weight.copy_(centred_kernel(conv.weight) / self.grid_width)
        return conv

    def forward(self, x: Tensor, grid_width: float | None = None) -> Tensor:
        """(conv(x; K) - (sum of K) x) / h + bias, as a plain convolution maps shapes.

        Args:
            x: (B, in_channels, *grid).
            grid_width: h on the grid of x; when left out that of the constructor, scaled from the base resolution.
        """
        layer: Any = self
        if grid_width is None:
            ratio = 1.0 if self.base_resolution is None else self.base_resolution / x.shape[-1]
            grid_width = self.grid_width * ratio
        kernel = centred_kernel(layer.weight) / grid_width
        y: Tensor = layer._conv_forward(x, kernel, layer.bias)
        return y


class FiniteDifferenceConv1d(_FiniteDifferenceConv, nn.Conv1d):
    """Finite differences of a signal; see `FiniteDifferenceConv2d` for the arguments."""


class FiniteDifferenceConv2d(_FiniteDifferenceConv, nn.Conv2d):
    """Convolution with a kernel that sums to zero, over the distance of the points.

    Of a smooth field it tends to sum_j K_j (j . grad) x when the grid is refined, and gives 0 for constants.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            torch's convolution takes them; kernels must be odd.
        grid_width: distance of the points, or its ratio to that on the grid of the training.
        base_resolution: points of the last axis that have this distance; on other grids it follows. Without it the
            distance is the same on all.

    Raises:
        ValueError: the kernel is even or grid_width is not positive.
    """


class FiniteDifferenceConv3d(_FiniteDifferenceConv, nn.Conv3d):
    """Finite differences of a volume; see `FiniteDifferenceConv2d` for the arguments."""


_FORMS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
