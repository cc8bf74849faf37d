"""Finite-difference layers: convolutions that become derivatives when the grid is refined.

Liu-Schiaffini et al.: "Neural Operators with Localized Integral and Differential Kernels", ICML 2024, arXiv 2402.16845.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from convatlas.errors import Unsupported
from convatlas.nn.conv.derived import DerivedConv, derive, originals
from convatlas.ops.finite_difference import centred_kernel
from convatlas.weights import Layout

__all__ = ["CentredWeight", "FiniteDifferenceConv1d", "FiniteDifferenceConv2d", "FiniteDifferenceConv3d"]


class CentredWeight(nn.Module):
    """Parametrization of a weight by K: (K less its sum at the middle tap) / h.

    Args:
        grid_width: distance h of the points.
    """

    def __init__(self, grid_width: float) -> None:
        super().__init__()
        self.grid_width = grid_width

    def forward(self, weight: Tensor) -> Tensor:
        """The kernel that sums to zero, of K (O, I, *k)."""
        return centred_kernel(weight) / self.grid_width

    def right_inverse(self, weight: Tensor) -> Tensor:
        """K of a kernel; of one that does not sum to zero the sum is lost."""
        return weight * self.grid_width


class _FiniteDifferenceConv(DerivedConv):
    """Body; stands before one of torch's convolutions."""

    #: The authors keep a second name of the same kernel.
    layouts: ClassVar[Mapping[str, Layout]] = {
        "authors": Layout(renames=((r"^conv\.weight$", ""), (r"^weight$", "parametrizations.weight.original")))
    }

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
        place = (stride, padding, dilation, groups, bias, padding_mode, "meta", dtype)
        super().__init__(in_channels, out_channels, kernel_size, *place)  # type: ignore[call-arg]
        layer: Any = self
        if any(size % 2 == 0 for size in layer.kernel_size):
            raise ValueError(f"kernel size should be odd, got {layer.kernel_size}")
        if not grid_width > 0:
            raise ValueError(f"grid_width must be positive, got {grid_width}")
        if base_resolution is not None and base_resolution < 1:
            raise ValueError(f"base_resolution must be at least 1, got {base_resolution}")
        self.grid_width, self.base_resolution = grid_width, base_resolution
        derive(layer, CentredWeight(grid_width), torch.empty(layer.weight.shape, device=device, dtype=dtype))
        if layer.bias is not None:
            layer.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw K and the bias anew, as torch's convolution does."""
        layer: Any = self
        if not is_parametrized(layer):  # called by torch's constructor
            return
        (kernel,) = originals(layer)
        bound = 1 / math.sqrt(kernel[0].numel())
        nn.init.uniform_(kernel, -bound, bound)
        if layer.bias is not None:
            nn.init.uniform_(layer.bias, -bound, bound)

    @classmethod
    def from_conv(cls, conv: nn.Module, **options: Any) -> Self:
        """A layer with the geometry, kernel and bias of a convolution, which loses the sum of each kernel.

        Args:
            conv: the convolution of torch that the layer is a subclass of.
            **options: of the layer.

        Raises:
            Unsupported: it is something else, or its kernel is even or a single tap.
        """
        if max(getattr(conv, "kernel_size", (3,))) == 1:
            raise Unsupported("a kernel of one tap has no neighbours to differ from")
        return super().from_conv(conv, **options)

    def to_conv(self) -> Any:
        """The plain convolution that computes the same; None where the distance follows the grid."""
        return super().to_conv() if self.base_resolution is None else None

    def forward(self, x: Tensor, grid_width: float | None = None) -> Tensor:
        """(conv(x; K) - (sum of K) x) / h + bias, as a plain convolution maps shapes.

        Args:
            x: (B, in_channels, *grid).
            grid_width: h on the grid of x; when left out that of the constructor, scaled from the base resolution.
        """
        layer: Any = self
        kernel: Tensor = layer.weight
        if grid_width is not None:
            kernel = kernel * (self.grid_width / grid_width)
        elif self.base_resolution is not None:
            kernel = kernel * (x.shape[-1] / self.base_resolution)
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
