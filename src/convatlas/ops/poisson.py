"""The pressure Poisson operator of a grid of cells, applied without a matrix, in any number of dimensions.

Kaneda, Akar, Chen, Kala, Hyde, Teran: "A Deep Conjugate Direction Method for Iteratively Solving Linear Systems", ICML
2023, arXiv 2205.10763; the discretisation is that of Bridson: "Fluid Simulation for Computer Graphics".

A cell holds fluid, air or solid. The row of a fluid cell is (number of neighbours that are not solid) x_i minus the sum
of x over its fluid neighbours: in air the pressure is zero (Dirichlet), into a solid nothing flows (Neumann). The rows
and columns of all other cells are zero. The spacing of the grid is 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage, sparse
from torch import Tensor

from convatlas.errors import unknown
from convatlas.ops.backend import Backends

__all__ = ["Boundary", "PoissonOperator", "Wall", "boundary_walls", "poisson_product", "without_means"]

#: What lies beyond a side of the box: air (``dirichlet``) or a solid wall (``neumann``).
Wall: TypeAlias = Literal["dirichlet", "neumann"]
#: One for all sides, or for each axis one or a pair (low side, high side).
Boundary: TypeAlias = Wall | Sequence[Wall | Sequence[Wall]]


_backends = Backends("poisson_product", auto=lambda *_: "shifts")


def poisson_product(x: Tensor, fluid: Tensor | None, degree: Tensor, *, backend: str = "auto") -> Tensor:
    """y_i = degree_i x_i - sum of x_j over the fluid neighbours j, in fluid cells; 0 elsewhere.

    Args:
        x: values (..., *grid); those outside the fluid do not matter, but must be finite.
        fluid: which cells are fluid, (*grid), True or 1; None where all are. Fastest in the type of x.
        degree: for each fluid cell how many of its neighbours are not solid, (*grid).
        backend: ``auto``; ``naive`` (the definition on a padded copy); ``shifts`` (slices subtracted in place).

    Returns:
        (..., *grid).

    Raises:
        ValueError: shapes do not fit, or x is not floating point.
    """
    dims = degree.dim()
    if dims < 1 or x.shape[-dims:] != degree.shape or (fluid is not None and fluid.shape != degree.shape):
        given = "none" if fluid is None else str(tuple(fluid.shape))
        raise ValueError(
            f"x, fluid and degree must be (..., *grid), (*grid) and (*grid), got {tuple(x.shape)}, {given} and "
            f"{tuple(degree.shape)}"
        )
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point, got {x.dtype}")
    return _backends.run(backend, x, fluid, degree)


@_backends.register("naive")
def _naive(x: Tensor, fluid: Tensor | None, degree: Tensor) -> Tensor:
    dims = degree.dim()
    inside = x if fluid is None else torch.where(fluid.bool(), x, 0)
    wide = F.pad(inside, (1, 1) * dims)
    y = degree * inside
    for axis in range(-dims, 0):
        for side in (0, 2):
            start = [side if other == axis else 1 for other in range(-dims, 0)]
            shifted = wide
            for other, first in zip(range(-dims, 0), start, strict=True):
                shifted = shifted.narrow(other, first, degree.shape[other])
            y = y - shifted
    return (y if fluid is None else torch.where(fluid.bool(), y, 0)).to(x.dtype)


@_backends.register("shifts")
def _shifts(x: Tensor, fluid: Tensor | None, degree: Tensor) -> Tensor:
    # Products with a mask of x's type take a tenth of the time of choices by a bool mask.
    mask = None if fluid is None else fluid.to(x.dtype)
    inside = x if mask is None else x * mask
    y = degree.to(x.dtype) * inside
    for axis in range(-degree.dim(), 0):
        size = degree.shape[axis] - 1
        y.narrow(axis, 1, size).sub_(inside.narrow(axis, 0, size))
        y.narrow(axis, 0, size).sub_(inside.narrow(axis, 1, size))
    return y if mask is None else y.mul_(mask)


def boundary_walls(boundary: Boundary, dims: int) -> tuple[tuple[Wall, Wall], ...]:
    """For each axis what lies beyond its low and its high side.

    Raises:
        ValueError: another number of axes or sides.
        UnknownName: neither ``dirichlet`` nor ``neumann``.
    """
    axes: list[Any] = [boundary] * dims if isinstance(boundary, str) else list(boundary)
    pairs = [(axis, axis) if isinstance(axis, str) else tuple(axis) for axis in axes]
    if len(pairs) != dims or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"boundary must be one word, or one or a pair for each of {dims} axes, got {boundary}")
    for wall in (wall for pair in pairs for wall in pair):
        if wall not in ("dirichlet", "neumann"):
            raise unknown("boundary", str(wall), ("dirichlet", "neumann"))
    return cast("tuple[tuple[Wall, Wall], ...]", tuple(pairs))


class PoissonOperator:
    """The negative Laplacian of a grid of cells: symmetric, and positive definite on fluid that touches air.

    ``operator(x)`` is the product with vectors (..., n) or grids (..., *shape). Cells that are neither fluid nor air
    are solid.

    Args:
        shape: cells along each axis.
        fluid: which cells hold fluid, bool (*shape); all that are not air when left out.
        air: which hold air, bool (*shape); none when left out.
        boundary: what lies beyond the box.

    Raises:
        ValueError: a mask has another shape or type, a cell is fluid and air, or the shape is empty.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        fluid: Tensor | None = None,
        air: Tensor | None = None,
        boundary: Boundary = "dirichlet",
    ) -> None:
        self.shape = tuple(int(size) for size in shape)
        if not self.shape or min(self.shape) < 1:
            raise ValueError(f"shape must be at least one size of at least 1, got {self.shape}")
        for name, mask in (("fluid", fluid), ("air", air)):
            if mask is not None and (tuple(mask.shape) != self.shape or mask.dtype != torch.bool):
                raise ValueError(f"{name} must be bool {self.shape}, got {mask.dtype} {tuple(mask.shape)}")
        self.boundary = boundary_walls(boundary, len(self.shape))
        self.air = torch.zeros(self.shape, dtype=torch.bool) if air is None else air
        self.fluid = ~self.air if fluid is None else fluid
        if bool((self.fluid & self.air).any()):
            raise ValueError("fluid and air must not share cells")
        self.degree = self._neighbours().to(torch.int8)
        self._full = bool(self.fluid.all())
        self._typed: dict[tuple[torch.dtype, torch.device], tuple[Tensor | None, Tensor]] = {}

    @property
    def n(self) -> int:
        """Number of cells, which is that of rows and columns."""
        return math.prod(self.shape)

    def _neighbours(self) -> Tensor:
        open_cells = (self.fluid | self.air).long()
        degree = torch.zeros_like(open_cells)
        for axis, walls in enumerate(self.boundary):
            size = self.shape[axis] - 1
            degree.narrow(axis, 1, size).add_(open_cells.narrow(axis, 0, size))
            degree.narrow(axis, 0, size).add_(open_cells.narrow(axis, 1, size))
            for wall, end in zip(walls, (0, -1), strict=True):
                degree.select(axis, end).add_(int(wall == "dirichlet"))
        return degree * self.fluid

    def to(self, device: torch.device | str) -> PoissonOperator:
        """The operator with its masks on a device."""
        return PoissonOperator(self.shape, fluid=self.fluid.to(device), air=self.air.to(device), boundary=self.boundary)

    def __call__(self, x: Tensor) -> Tensor:
        """A x of vectors (..., n) or grids (..., *shape).

        Raises:
            ValueError: x has another shape.
        """
        grid = x.reshape(*x.shape[:-1], *self.shape) if self._is_flat(x) else x
        key = (x.dtype, x.device)
        if key not in self._typed:
            fluid = None if self._full else self.fluid.to(x.device, x.dtype)
            self._typed[key] = fluid, self.degree.to(x.device, x.dtype)
        return poisson_product(grid, *self._typed[key]).reshape(x.shape)

    def _is_flat(self, x: Tensor) -> bool:
        if tuple(x.shape[-len(self.shape) :]) == self.shape:
            return False
        if not x.shape or x.shape[-1] != self.n:
            raise ValueError(f"x must be (..., {self.n}) or (..., {self.shape}), got {tuple(x.shape)}")
        return True

    def diagonal(self) -> Tensor:
        """The diagonal (n,), zero outside the fluid."""
        return self.degree.reshape(-1).double()

    def to_csr(self) -> Any:
        """The same as a scipy CSR array (n, n) in float64; rows of cells that are not fluid are empty."""
        index = np.arange(self.n).reshape(self.shape)
        fluid = self.fluid.cpu().numpy()
        rows, columns = [], []
        for axis, size in enumerate(self.shape):
            low, high = (np.take(index, range(*span), axis) for span in ((size - 1,), (1, size)))
            both = np.take(fluid, range(size - 1), axis) & np.take(fluid, range(1, size), axis)
            rows += [low[both], high[both]]
            columns += [high[both], low[both]]
        where = np.flatnonzero(fluid.reshape(-1))
        off = np.full(sum(map(len, rows)), -1.0)
        values = np.concatenate([off, self.degree.cpu().numpy().reshape(-1)[where].astype(np.float64)])
        entries = (values, (np.concatenate([*rows, where]), np.concatenate([*columns, where])))
        return sparse.csr_array(entries, shape=(self.n, self.n))

    @cached_property
    def _closed(self) -> Tensor | None:
        """Numbers from 1 of the bodies of fluid that touch no air, (*shape), 0 elsewhere; None if there are none."""
        labels, count = ndimage.label(self.fluid.cpu().numpy())
        # A row sums to more than zero exactly where the cell has a neighbour of air.
        touching = self(self.fluid.double()).cpu().numpy() > 0.5
        opened = np.isin(labels, np.unique(labels[touching]))
        if count == 0 or bool(opened[labels > 0].all()):
            return None
        return torch.from_numpy(np.where(opened, 0, labels)).to(self.fluid.device)

    @property
    def singular(self) -> bool:
        """Whether some fluid touches no air: its pressure is then known up to a constant only."""
        return self._closed is not None

    def project(self, x: Tensor) -> Tensor:
        """x (..., n) or (..., *shape) without its null space: zero outside the fluid, mean zero in closed bodies."""
        rows = x.reshape(-1, self.n) * self.fluid.to(x.device, x.dtype).reshape(-1)
        if self._closed is not None:
            rows = without_means(rows, self._closed.reshape(-1))
        return rows.reshape(x.shape)


def without_means(rows: Tensor, bodies: Tensor) -> Tensor:
    """Vectors (B, n) less the mean over each body; those whose number in ``bodies`` (n,) is 0 stay as they are."""
    bodies = bodies.to(rows.device)
    counts = torch.bincount(bodies).to(rows.dtype)
    sums = rows.new_zeros(len(rows), len(counts)).index_add_(1, bodies, rows)
    means = sums / counts.clamp(min=1)
    means[:, 0] = 0
    return rows - means[:, bodies]
