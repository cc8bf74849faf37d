"""Local integral layer: a convolution whose kernel has a size in space instead of one in pixels.

Liu-Schiaffini et al.: "Neural Operators with Localized Integral and Differential Kernels", ICML 2024, arXiv 2402.16845.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.ops.disco import basis_size, check_disk, equidistant_basis, equidistant_disco, point_disco
from convatlas.ops.neighbours import Neighbours, radius_neighbors

__all__ = ["DiscreteContinuousConv2d", "PointDiscreteContinuousConv"]


class _DiscreteContinuousConv(nn.Module):
    """Weights on the hat functions of a disk.

    The authors allocate a number of columns that exceeds the number of functions; the last ones do nothing, and are
    kept for their checkpoints.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_shape: int | Sequence[int],
        radius_cutoff: float,
        groups: int,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        if groups < 1 or in_channels % groups or out_channels % groups or in_channels < 1 or out_channels < 1:
            raise ValueError(f"groups must divide the channels {in_channels} and {out_channels}, got {groups}")
        shape = (kernel_shape,) if isinstance(kernel_shape, int) else tuple(kernel_shape)
        self.kernel_shape, self.radius_cutoff = check_disk(shape, radius_cutoff), float(radius_cutoff)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        rings, angles = self.kernel_shape
        columns = max((rings - 1) * angles + 1, basis_size(self.kernel_shape))
        place = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, columns, **place))  # type: ignore[arg-type]
        self.bias = nn.Parameter(torch.empty(out_channels, **place)) if bias else None  # type: ignore[arg-type]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew: normal with variance 1 / in_channels of a group; the bias is zero."""
        nn.init.normal_(self.weight, std=1 / math.sqrt(self.in_channels // self.groups))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        """Show the channels and the disk."""
        disk = f"kernel_shape={self.kernel_shape}, radius_cutoff={self.radius_cutoff:g}"
        return f"{self.in_channels}, {self.out_channels}, {disk}, groups={self.groups}, bias={self.bias is not None}"


class DiscreteContinuousConv2d(_DiscreteContinuousConv):
    """The integral of a field with a kernel on a disk, on a regular grid of any size: one convolution.

    Args:
        in_channels, out_channels: of the field.
        kernel_shape: rings across the disk and angles, or rings alone for a kernel of the distance.
        radius_cutoff: radius of the disk, in units of ``domain_length``.
        domain_length: of the two axes.
        stride: points of the input for each of the output.
        groups: of channels.
        bias: whether one is added.
        periodic: the field goes on periodically beyond its border, else as zeros.
        trim_even: let an even stencil, which has no middle, shorten the result by one, as the authors' code does.
        device, dtype: of the parameters.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_shape: int | Sequence[int],
        radius_cutoff: float,
        *,
        domain_length: Sequence[float] = (2.0, 2.0),
        stride: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        periodic: bool = False,
        trim_even: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_shape, radius_cutoff, groups, bias, device, dtype)
        if len(domain_length) != 2 or min(domain_length) <= 0:
            raise ValueError(f"domain_length must hold two positive numbers, got {tuple(domain_length)}")
        self.domain_length = (float(domain_length[0]), float(domain_length[1]))
        self.stride = (stride, stride) if isinstance(stride, int) else tuple(stride)
        if min(self.stride) < 1:
            raise ValueError(f"stride must be at least 1, got {stride}")
        self.periodic, self.trim_even = periodic, trim_even

    def filter_matrix(self, grid: Sequence[int]) -> Tensor:
        """The hat functions around a point of a grid (H, W), (columns, s_W, s_H); those of dead columns are zero."""
        basis = equidistant_basis((grid[0], grid[1]), self.domain_length, self.kernel_shape, self.radius_cutoff)
        return F.pad(basis, (0, 0, 0, 0, 0, self.weight.shape[2] - len(basis)))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H / stride, W / stride).

        Raises:
            ValueError: x has a wrong number of axes or channels.
        """
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must be (B, {self.in_channels}, H, W), got {tuple(x.shape)}")
        return equidistant_disco(
            x,
            self.weight,
            self.bias,
            kernel_shape=self.kernel_shape,
            radius=self.radius_cutoff,
            domain=self.domain_length,
            stride=(self.stride[0], self.stride[1]),
            groups=self.groups,
            periodic=self.periodic,
            trim_even=self.trim_even,
        )


class PointDiscreteContinuousConv(_DiscreteContinuousConv):
    """The integral of a function on points in the plane with a kernel on a disk.

    Args:
        in_channels, out_channels, kernel_shape, radius_cutoff, groups, bias, device, dtype: as
            `DiscreteContinuousConv2d` has them.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_shape: int | Sequence[int],
        radius_cutoff: float,
        *,
        groups: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_shape, radius_cutoff, groups, bias, device, dtype)

    def forward(
        self,
        f: Tensor,
        points_in: Tensor,
        points_out: Tensor | None = None,
        *,
        quadrature: Tensor | None = None,
        neighbours: Neighbours | None = None,
    ) -> Tensor:
        """Map f (..., N, in_channels) on points to (..., M, out_channels) on others.

        Args:
            f: values of the function.
            points_in: (N, 2).
            points_out: (M, 2); the same when left out.
            quadrature: area that each point stands for (N); equal ones when left out.
            neighbours: those within the radius; searched when left out. Give them where the points stay the same.

        Raises:
            ValueError: the shapes do not fit.
        """
        if f.dim() < 2 or f.shape[-1] != self.in_channels or f.shape[-2] != len(points_in):
            raise ValueError(f"f must be (..., {len(points_in)}, {self.in_channels}), got {tuple(f.shape)}")
        targets = points_in if points_out is None else points_out
        if neighbours is None:
            neighbours = radius_neighbors(points_in, targets, self.radius_cutoff)
        if quadrature is None:
            quadrature = points_in.new_full((len(points_in),), 1 / len(points_in))
        sums = point_disco(f, points_in, targets, quadrature, neighbours, self.kernel_shape, self.radius_cutoff)
        weight = self.weight[..., : sums.shape[-2]].unflatten(0, (self.groups, -1))
        y = torch.einsum("...kgi,goik->...go", sums.unflatten(-1, (self.groups, -1)), weight).flatten(-2)
        return y if self.bias is None else y + self.bias
