"""Graph kernel integral: a kernel given by a network of coordinates, integrated over the points of a ball.

Li et al.: "Neural Operator: Graph Kernel Network for Partial Differential Equations", 2020, arXiv 2003.03485; as in
Berner et al., 2025, arXiv 2506.10973, section 3. It is the message passing of graph networks with neighbours of a
radius instead of a number, and means weighted by quadrature instead of sums.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from convatlas.errors import unknown
from convatlas.ops.neighbours import Neighbours, check_neighbours, radius_neighbors
from convatlas.ops.segment_sum import segment_sum
from convatlas.weights import Layout

__all__ = ["GNOBlock", "IntegralTransform", "PointwiseMLP", "TransformType"]

TransformType = Literal["linear", "linear_kernelonly", "nonlinear", "nonlinear_kernelonly"]


class PointwiseMLP(nn.Module):
    """Linear layers over the last axis with GELU between them.

    Args:
        channels: of input, hidden layers and output.

    Raises:
        ValueError: there are fewer than two.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        if len(channels) < 2:
            raise ValueError(f"channels must hold those of input and output, got {tuple(channels)}")
        self.fcs = nn.ModuleList([nn.Linear(*pair) for pair in itertools.pairwise(channels)])
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., channels[0]) to (..., channels[-1])."""
        for index, layer in enumerate(self.fcs):
            x = layer(self.act(x) if index else x)
        return x


class IntegralTransform(nn.Module):
    """u(x) = mean over the points y near x of k(x, y, f(y)) f(y), or their weighted sum.

    The kernel k sees [y, x], and for the nonlinear types f(y) behind; ``linear_kernelonly`` and
    ``nonlinear_kernelonly`` leave the factor f(y) out.

    Args:
        kernel: the network k, or the channels of its layers.
        transform_type: one of the four.
        reduction: ``mean`` (a Monte-Carlo estimate), or ``sum``; with quadrature weights it is always a sum.

    Raises:
        UnknownName: there is no such type or reduction.
    """

    #: The authors call the kernel ``channel_mlp``.
    layouts = {"authors": Layout(renames=((r"(^|\.)channel_mlp\.", r"\1kernel."),))}  # noqa: RUF012

    def __init__(
        self,
        kernel: nn.Module | Sequence[int],
        *,
        transform_type: TransformType = "linear",
        reduction: Literal["mean", "sum"] = "mean",
    ) -> None:
        super().__init__()
        if transform_type not in get_args(TransformType):
            raise unknown("transform_type", str(transform_type), get_args(TransformType))
        if reduction not in ("mean", "sum"):
            raise unknown("reduction", str(reduction), ("mean", "sum"))
        self.kernel = kernel if isinstance(kernel, nn.Module) else PointwiseMLP(kernel)
        self.transform_type, self.reduction = transform_type, reduction

    def kernel_values(self, y: Tensor, x: Tensor, neighbours: Neighbours, f: Tensor | None = None) -> Tensor:
        """k of all pairs (..., E, C). Those of the linear types depend on the points alone: keep them for a fixed mesh.

        Args:
            y: coordinates of the points (N, d), in any embedding.
            x: coordinates of the queries (M, d).
            neighbours: the points near each query.
            f: values on the points (..., N, C), for the nonlinear types.
        """
        features = torch.cat([y[neighbours.indices], x[neighbours.rows]], -1)
        if self.transform_type.startswith("nonlinear"):
            if f is None:
                raise ValueError(f"f must be given to a {self.transform_type} transform")
            values = f[..., neighbours.indices, :]
            features = torch.cat([features.expand(*values.shape[:-1], -1), values], -1)
        result: Tensor = self.kernel(features)
        return result

    def forward(
        self,
        y: Tensor,
        neighbours: Neighbours,
        x: Tensor | None = None,
        f: Tensor | None = None,
        *,
        quadrature: Tensor | None = None,
        kernel: Tensor | None = None,
    ) -> Tensor:
        """u on the queries (..., M, C); 0 where a query has no neighbour.

        Args:
            y: coordinates of the points (N, d).
            neighbours: the points near each query, whose rows are checked.
            x: coordinates of the queries (M, d); those of the points when left out.
            f: values on the points (..., N, C); needed by all types but ``linear_kernelonly``.
            quadrature: weights of the points (N).
            kernel: what `kernel_values` gave for these points, so that it is not computed again.

        Raises:
            ValueError: the shapes or rows do not fit, or f is missing.
        """
        x = y if x is None else x
        check_neighbours(neighbours, len(y), len(x))
        if f is not None and (f.dim() < 2 or f.shape[-2] != len(y)):
            raise ValueError(f"f must be (..., {len(y)}, C), got {tuple(f.shape)}")
        if f is None and self.transform_type != "linear_kernelonly":
            raise ValueError(f"f must be given to a {self.transform_type} transform")
        values = self.kernel_values(y, x, neighbours, f) if kernel is None else kernel
        if f is not None and not self.transform_type.endswith("kernelonly"):
            values = values * f[..., neighbours.indices, :]
        if quadrature is not None:
            values = values * quadrature[neighbours.indices][:, None]
        return segment_sum(values, neighbours.row_splits, self.reduction == "mean" and quadrature is None)


class GNOBlock(nn.Module):
    """Search of the neighbours and the integral over them.

    Args:
        in_channels: of f.
        out_channels: of the result.
        coord_dim: axes of position.
        radius: of the ball.
        hidden_channels: of the kernel's network.
        transform_type, reduction: as in `IntegralTransform`; ``linear`` and ``nonlinear`` need as many channels out as
            in.

    Raises:
        ValueError: the channels do not fit or the radius is not positive.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        coord_dim: int,
        radius: float,
        *,
        hidden_channels: Sequence[int] = (64, 64),
        transform_type: TransformType = "linear",
        reduction: Literal["mean", "sum"] = "mean",
    ) -> None:
        super().__init__()
        if transform_type in ("linear", "nonlinear") and in_channels != out_channels:
            raise ValueError(
                f"a {transform_type} transform keeps its channels, got {in_channels} and {out_channels}; the types "
                "with 'kernelonly' change them"
            )
        if not radius > 0:
            raise ValueError(f"radius must be positive, got {radius}")
        features = 2 * coord_dim + (in_channels if transform_type.startswith("nonlinear") else 0)
        self.radius = radius
        self.integral_transform = IntegralTransform(
            (features, *hidden_channels, out_channels), transform_type=transform_type, reduction=reduction
        )

    def forward(
        self,
        y: Tensor,
        x: Tensor,
        f: Tensor | None = None,
        *,
        quadrature: Tensor | None = None,
        neighbours: Neighbours | None = None,
        kernel: Tensor | None = None,
    ) -> Tensor:
        """u on the queries; arguments as in `IntegralTransform`, with neighbours searched when left out."""
        if neighbours is None:
            neighbours = radius_neighbors(y, x, self.radius)
        result: Tensor = self.integral_transform(y, neighbours, x, f, quadrature=quadrature, kernel=kernel)
        return result
