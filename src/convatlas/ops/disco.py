"""Discrete-continuous convolution: a kernel given as a function of the offset in space, so that it fits any grid.

Ocampo, Price, McEwen: "Scalable and Equivariant Spherical CNNs by Discrete-Continuous (DISCO) Convolutions", ICLR 2023,
arXiv 2209.13603; Liu-Schiaffini et al.: "Neural Operators with Localized Integral and Differential Kernels", ICML 2024,
arXiv 2402.16845. The kernel is a sum of hat functions on a disk, and the integral a sum with quadrature weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.ops.neighbours import Neighbours
from convatlas.ops.segment_sum import segment_sum

__all__ = [
    "basis_size",
    "check_disk",
    "disco_basis",
    "equidistant_basis",
    "equidistant_disco",
    "point_disco",
    "stencil_size",
]

_EPS = 1e-9


def check_disk(kernel_shape: Sequence[int], radius: float) -> tuple[int, int]:
    """Rings and angles of the hat functions on a disk.

    Raises:
        ValueError: kernel_shape is not one or two positive numbers, there are several angles but a single ring, or
            the radius is not positive.
    """
    shape = (*kernel_shape, 1)[:2] if len(kernel_shape) <= 2 else ()
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"kernel_shape must be (rings, angles), both positive, got {tuple(kernel_shape)}")
    if shape[0] == 1 and shape[1] > 1:
        raise ValueError(f"kernel_shape must have at least 2 rings to have {shape[1]} angles, got {shape[0]}")
    if not 0 < radius < math.inf:
        raise ValueError(f"radius must be positive, got {radius}")
    return shape[0], shape[1]


def basis_size(kernel_shape: tuple[int, int]) -> int:
    """Number of hat functions on the disk."""
    rings, angles = kernel_shape
    return (rings // 2) * angles + rings % 2 if angles > 1 else (rings + 1) // 2


def disco_basis(first: Tensor, second: Tensor, kernel_shape: tuple[int, int], radius: float) -> Tensor:
    """Values of the hat functions at some offsets, not normalised.

    They are piecewise linear in the distance r and, with several angles, in the direction. With an odd number of rings
    the first one sits in the middle; with an even number the middle is shared by the innermost ones, which reach to
    the other side of it.

    Args:
        first, second: offsets along the two axes, of one shape.
        kernel_shape: rings across the disk, and angles; 1 angle makes functions of the distance alone.
        radius: of the disk.

    Returns:
        (K, *shape) with K of `basis_size`.
    """
    rings, angles = kernel_shape
    distance, direction = torch.hypot(first, second), torch.atan2(second, first) + math.pi
    step = 2 * radius / (rings + 1)
    index = torch.arange(basis_size(kernel_shape), device=first.device).view(-1, *[1] * first.dim())
    if angles == 1:
        centre = index * step if rings % 2 else (index + 0.5) * step
        return _hat(distance - centre, step) * (distance <= radius)
    turn = 2 * math.pi / angles
    if rings % 2:
        ring, angle = torch.where(index > 0, (index - 1) // angles + 1, 0) * step, (index - 1) % angles * turn - math.pi
        around = torch.where(index > 0, _circular_hat(direction, angle, turn), 1.0)
        return _hat(distance - ring, step) * around * (distance <= radius)
    ring, angle = (index // angles + 0.5) * step, index % angles * turn - math.pi
    opposite = torch.where(direction + math.pi >= math.pi, direction - math.pi, direction + math.pi)
    here = _hat(distance - ring, step) * _circular_hat(direction, angle, turn)
    across = _hat(-distance - ring, step) * _circular_hat(opposite, angle, turn)
    return (here + across) * (distance <= radius)


def _hat(distance: Tensor, width: float) -> Tensor:
    return (1 - distance.abs() / width).clamp(min=0)


def _circular_hat(angle: Tensor, centre: Tensor, width: float) -> Tensor:
    # The two angles live on circles that begin at other places, so their difference may exceed a turn.
    apart = (angle - centre).abs()
    return _hat(torch.minimum(apart, (2 * math.pi - apart).abs()), width)


# On a regular grid


def stencil_size(points: int, length: float, radius: float) -> int:
    """Points across the disk on a grid of some points over a length."""
    return math.floor(2 * radius * points / length) + 1


def equidistant_basis(
    grid: tuple[int, int], domain: tuple[float, float], kernel_shape: tuple[int, int], radius: float
) -> Tensor:
    """The hat functions on the points of a regular grid around one of them, each with integral 1, in float64.

    Args:
        grid: points of the two axes, (H, W).
        domain: lengths of the two axes.
        kernel_shape, radius: as in `disco_basis`.

    Returns:
        (K, s_W, s_H): offsets along the width first.
    """
    sizes = [stencil_size(points, length, radius) for points, length in zip(grid, domain, strict=True)]
    height, width = (torch.linspace(-radius, radius, size, dtype=torch.float64) for size in sizes)
    first, second = torch.meshgrid(width, height, indexing="ij")
    values = disco_basis(first, second, kernel_shape, radius)
    weight = domain[0] * domain[1] / (grid[0] * grid[1])
    return values / (values.sum((1, 2), keepdim=True) * weight + _EPS)


def equidistant_disco(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kernel_shape: tuple[int, int],
    radius: float,
    domain: tuple[float, float],
    stride: tuple[int, int] = (1, 1),
    groups: int = 1,
    periodic: bool = False,
    trim_even: bool = False,
) -> Tensor:
    """The integral of x with a kernel sum_k weight[o, i, k] psi_k on a regular grid: a single convolution.

    Args:
        x: (B, I, H, W).
        weight: (O, I / groups, K); columns beyond `basis_size` have no effect.
        bias: (O) or None.
        kernel_shape, radius: as in `disco_basis`.
        domain: lengths of the two axes.
        stride: of the output's points, in those of x.
        groups: of channels.
        periodic: x goes on periodically beyond its border, else as zeros.
        trim_even: let an even stencil, which has no middle, shorten the result by one, as the authors' code does.

    Returns:
        (B, O, ceil(H / stride), ceil(W / stride)), but for ``trim_even``.

    Raises:
        ValueError: the shapes do not fit, or the stencil is wider than a periodic x.
    """
    if x.dim() != 4 or weight.dim() != 3 or x.shape[1] != groups * weight.shape[1]:
        raise ValueError(
            f"x must be (B, I, H, W) and weight (O, I / groups, K), got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    height, width = x.shape[2:]
    basis = equidistant_basis((height, width), domain, kernel_shape, radius).to(weight)
    # Rows before columns; turned round, because offsets point from the input to the output.
    kernel = torch.einsum("kxy,oik->oiyx", basis, weight[..., : len(basis)]).flip(-1, -2)
    before = [(size + 1) // 2 - 1 for size in kernel.shape[2:]]
    after = [pad if trim_even else size - 1 - pad for pad, size in zip(before, kernel.shape[2:], strict=True)]
    if periodic and max(*before, *after) > min(height, width):
        raise ValueError(f"x must be as wide as half the stencil {tuple(kernel.shape[2:])}, got {height} x {width}")
    quadrature = domain[0] * domain[1] / (height * width)
    edges = (before[1], after[1], before[0], after[0])
    padded = F.pad(x, edges, mode="circular") if periodic else F.pad(x, edges)
    return F.conv2d(padded, kernel * quadrature, bias, stride, groups=groups)


# On points


def point_disco(
    f: Tensor,
    points_in: Tensor,
    points_out: Tensor,
    quadrature: Tensor,
    neighbours: Neighbours,
    kernel_shape: tuple[int, int],
    radius: float,
) -> Tensor:
    """Integrals of f with every hat function around every point of the output.

    Each function is normalised to integral 1 at each point, so that the border and uneven points make no difference to
    a constant.

    Args:
        f: (..., N, C) on ``points_in``.
        points_in: (N, 2).
        points_out: (M, 2).
        quadrature: weights of the points (N): the area that each stands for.
        neighbours: the points within the radius of each point of the output.
        kernel_shape, radius: as in `disco_basis`.

    Returns:
        (..., M, K, C).
    """
    # From the input to the output, as on a grid.
    offsets = points_out[neighbours.rows] - points_in[neighbours.indices]
    values = disco_basis(offsets[:, 0], offsets[:, 1], kernel_shape, radius)
    weighted = (values * quadrature[neighbours.indices]).t()
    total = segment_sum(weighted, neighbours.row_splits)
    sums = segment_sum(
        (weighted.to(f.dtype)[..., None] * f[..., neighbours.indices, :].unsqueeze(-2)).flatten(-2),
        neighbours.row_splits,
    )
    # Away from all points of a function its integral is 0 and so is the sum.
    return sums.unflatten(-1, (len(values), -1)) / (total.to(f.dtype)[..., None] + _EPS)
