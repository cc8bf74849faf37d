"""Points into the cells of a grid: the cell of each point, keys of cells, and one point or one mean a cell.

The conventions are those of Pointcept's grid sampling: cells are counted from the lowest one of each cloud, a key is
the 64-bit hash FNV-1 of the three numbers or their place in the box around the cloud, training takes a random point
of each cell, and a test takes them all, in as many fragments as the fullest cell has points.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from convatlas.errors import unknown
from convatlas.ops.sparse import SparseTensor
from convatlas.ops.sparse.tensor import linear_keys, unravel_keys

__all__ = [
    "PointGrid",
    "farthest_points",
    "fnv_keys",
    "from_points",
    "grid_cells",
    "grid_sample",
    "ravel_keys",
    "voxel_means",
]

_FNV_START, _FNV_PRIME = 14695981039346656037 - 2**64, 1099511628211
_LOWEST = -(2**63)


def grid_cells(coordinates: Tensor, size: float | Sequence[float]) -> Tensor:
    """The cell (N, A) int64 of each point (N, A) of a cloud, counted from the lowest on every axis.

    The division is done in float64, whatever the type of the coordinates.

    Raises:
        ValueError: a coordinate is not finite, or size is not positive.
    """
    if coordinates.dim() != 2:
        raise ValueError(f"coordinates must be (N, A), got {tuple(coordinates.shape)}")
    sides = torch.as_tensor(size, dtype=torch.float64, device=coordinates.device)
    if not (sides > 0).all():
        raise ValueError(f"size must be positive, got {size}")
    if not coordinates.isfinite().all():
        row = int(coordinates.isfinite().all(1).int().argmin())
        raise ValueError(f"coordinates must be finite, but row {row} is {coordinates[row].tolist()}")
    cells = (coordinates.double() / sides).floor().long()
    return cells - cells.amin(0) if len(cells) else cells


def fnv_keys(cells: Tensor) -> Tensor:
    """The hash FNV-1 (N,) of each cell (N, A): h = 14695981039346656037, then h = (h * 1099511628211) xor c an axis.

    Keys are unsigned numbers of 64 bits; the result holds their bits as int64.
    """
    keys = torch.full((len(cells),), _FNV_START, dtype=torch.int64, device=cells.device)
    for column in cells.long().unbind(1):
        keys = (keys * _FNV_PRIME) ^ column
    return keys


def ravel_keys(cells: Tensor) -> Tensor:
    """The place (N,) of each cell (N, A) in a row-major box that ends with the highest cell of every axis."""
    cells = cells - cells.amin(0) if len(cells) else cells
    sizes = [int(size) + 1 for size in cells.amax(0)] if len(cells) else [1] * cells.shape[1]
    return linear_keys(cells, sizes)


@dataclass(frozen=True, eq=False)
class PointGrid:
    """The points of a cloud, cell by cell.

    Attributes:
        cells: (N, A) int64, the cell of each point.
        keys: (N,) int64, its key.
        order: (N,) int64, points sorted by the keys of their cells, and as they came within a cell.
        starts, counts: (V,) int64, where each of the V cells begins in ``order``, and its number of points.
    """

    cells: Tensor
    keys: Tensor
    order: Tensor
    starts: Tensor
    counts: Tensor

    def choose(self, generator: torch.Generator | None = None) -> Tensor:
        """A random point of each cell, (V,) indices of points; as a training sees a cloud."""
        if not len(self.counts):
            return self.order
        drawn = torch.randint(int(self.counts.max()), self.counts.shape, generator=generator).to(self.counts.device)
        return self.order[self.starts + drawn % self.counts]

    def fragments(self) -> Iterator[Tensor]:
        """Point i mod count of each cell, (V,) indices, for every i below the largest count: together all points."""
        for index in range(int(self.counts.max()) if len(self.counts) else 0):
            yield self.order[self.starts + index % self.counts]


def grid_sample(
    coordinates: Tensor, size: float | Sequence[float], *, keys: Literal["fnv", "ravel"] = "fnv"
) -> PointGrid:
    """Sort the points (N, A) of one cloud into cubic cells.

    Args:
        coordinates: of the points.
        size: side of a cell, one for all axes or one for each, in the unit of the coordinates.
        keys: what cells are sorted by.

    Raises:
        ValueError: a coordinate is not finite, or size is not positive.
        UnknownName: there are no such keys.
    """
    makers = {"fnv": fnv_keys, "ravel": ravel_keys}
    if keys not in makers:
        raise unknown("keys", keys, makers)
    cells = grid_cells(coordinates, size)
    found = makers[keys](cells)
    # Hashes are unsigned: with the sign turned they sort as such.
    ordered, order = (found ^ _LOWEST if keys == "fnv" else found).sort(stable=True)
    _, counts = ordered.unique_consecutive(return_counts=True)
    return PointGrid(cells, found, order, counts.cumsum(0) - counts, counts)


def farthest_points(coordinates: Tensor, count: int) -> Tensor:
    """Indices (count,) of points far from each other: the first one, then always the one farthest from all so far.

    Raises:
        ValueError: there are fewer points.
    """
    if not 0 < count <= len(coordinates):
        raise ValueError(f"count must be from 1 to the {len(coordinates)} points, got {count}")
    chosen = torch.zeros(count, dtype=torch.int64, device=coordinates.device)
    columns = coordinates.T.contiguous()
    nearest = torch.full((len(coordinates),), torch.inf, dtype=coordinates.dtype, device=coordinates.device)
    last = chosen[0]
    for index in range(1, count):
        nearest = torch.minimum(nearest, (columns - columns[:, last, None]).square_().sum(0))
        last = nearest.argmax()
        chosen[index] = last
    return chosen


def from_points(
    coordinates: Tensor,
    features: Tensor,
    batch: Tensor,
    voxel_size: float | Sequence[float],
    *,
    reduce: Literal["mean", "first", "random"] = "mean",
    margin: int = 1,
    generator: torch.Generator | None = None,
) -> SparseTensor:
    """The voxels that hold points, in the order of sample and coordinates.

    Args:
        coordinates: (N, D), floating point.
        features: (N, C) of the points.
        batch: (N,) index of the sample of each point.
        voxel_size: side of a voxel, one for all axes or one for each. Voxels are counted from the lowest of a sample.
        reduce: what a voxel gets: the mean of its points, the first of them, or a random one.
        margin: the grid ends so many voxels after the lowest place of the last voxel of all samples.
        generator: of ``random``.

    Raises:
        ValueError: shapes do not fit, or there is no point.
        UnknownName: there is no such reduction.
    """
    if reduce not in ("mean", "first", "random"):
        raise unknown("reduction", reduce, ("mean", "first", "random"))
    if not len(coordinates) == len(features) == len(batch):
        raise ValueError(
            f"coordinates, features and batch must have as many rows, got {len(coordinates)}, {len(features)} and "
            f"{len(batch)}"
        )
    if not len(batch):
        raise ValueError("coordinates must hold at least one point, got none")
    cells = torch.empty(coordinates.shape, dtype=torch.int64, device=coordinates.device)
    for sample in batch.unique():
        cells[batch == sample] = grid_cells(coordinates[batch == sample], voxel_size)
    shape = tuple(int(size) + margin for size in cells.amax(0))
    batch_size = int(batch.max()) + 1
    sizes = (batch_size, *shape)
    keys, order = linear_keys(torch.cat([batch[:, None].long(), cells], 1), sizes).sort(stable=True)
    places, inverse, counts = keys.unique_consecutive(return_inverse=True, return_counts=True)
    if reduce == "mean":
        total = features.new_zeros(len(places), features.shape[1]).index_add(0, inverse, features[order])
        values = total / counts[:, None]
    else:
        drawn = torch.zeros_like(counts)
        if reduce == "random":
            drawn = torch.randint(int(counts.max()), counts.shape, generator=generator).to(counts.device) % counts
        values = features[order[counts.cumsum(0) - counts + drawn]]
    return SparseTensor(values, unravel_keys(places, sizes), shape, batch_size, check=False)


def voxel_means(
    points: Tensor,
    voxel_size: Sequence[float],
    point_range: Sequence[float],
    *,
    max_points: int = 5,
) -> tuple[Tensor, Tensor]:
    """Voxels of one LiDAR sweep as detectors take them: means of the first points in each.

    Args:
        points: (N, 3 + C): x, y, z, then other features.
        voxel_size: along x, y and z.
        point_range: least x, y, z, then greatest; points outside are left out.
        max_points: points of a voxel that count, the first ones.

    Returns:
        Features (V, 3 + C) and coordinates (V, 3) int32 in the order z, y, x, sorted.
    """
    low, high = points.new_tensor(point_range[:3]), points.new_tensor(point_range[3:])
    sides = points.new_tensor(voxel_size)
    points = points[((points[:, :3] >= low) & (points[:, :3] < high)).all(1)]
    shape = ((high - low) / sides).round().long()
    cells = ((points[:, :3] - low) / sides).floor().long().minimum(shape - 1).flip(1)
    sizes = shape.flip(0).tolist()
    keys, order = linear_keys(cells, sizes).sort(stable=True)
    places, inverse, counts = keys.unique_consecutive(return_inverse=True, return_counts=True)
    rank = torch.arange(len(keys), device=keys.device) - (counts.cumsum(0) - counts)[inverse]
    first = rank < max_points
    total = points.new_zeros(len(places), points.shape[1]).index_add(0, inverse[first], points[order[first]])
    return total / counts.clamp(max=max_points)[:, None], unravel_keys(places, sizes)
