"""The active places around points of a grid."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from convatlas.ops.sparse.rulebook import RowLookup
from convatlas.ops.sparse.tensor import SparseTensor, linear_keys

__all__ = ["places_around"]

#: Lookups at once.
_CHUNK = 2**19


def places_around(
    x: SparseTensor, points: Tensor, samples: Tensor, *, side: Tensor, reach: int, radius: float, most: int
) -> Tensor:
    """Rows of the first active places near each point: in a box about the point's own place, row-major.

    Args:
        x: the places; place i lies from i to i + 1 on an axis, its middle counts.
        points: (M, D), in places. Those outside of the grid have no neighbour.
        samples: (M) int64, the sample of each point.
        side: (D), length of a place on each axis.
        reach: places that the box goes beyond the point's own on each side.
        radius: largest distance, in the unit of ``side``.
        most: rows for a point.

    Returns:
        Pairs (2, P) int64, the number of the point and the row of the place, point after point.
    """
    padded = [size + 2 * reach for size in x.spatial_shape]
    sizes = (x.batch_size, *padded)
    margin = torch.tensor([0, *(reach,) * x.dims], device=points.device)
    offsets = torch.tensor(list(itertools.product(range(-reach, reach + 1), repeat=x.dims)), device=points.device)
    # The middle of a place o away is at least |o| - 1/2 from any point of this one.
    least = (offsets.abs() - 0.5).clamp(min=0) * side
    offsets = offsets[least.square().sum(1) <= radius**2]
    steps = torch.tensor([math.prod(padded[axis + 1 :]) for axis in range(x.dims)], device=points.device)
    shifts = (offsets * steps).sum(1)
    lookup = RowLookup(linear_keys(x.indices + margin, sizes), math.prod(sizes), len(points) * len(shifts))
    limits = torch.tensor(x.spatial_shape, device=points.device)
    found = []
    for rows in torch.arange(len(points), device=points.device).split(max(1, _CHUNK // len(shifts))):
        own = points[rows].floor().long()
        inside = ((own >= 0) & (own < limits)).all(1)
        rows, own = rows[inside], own[inside]
        keys = linear_keys(torch.cat([samples[rows, None], own], 1) + margin, sizes)
        near = lookup((keys[:, None] + shifts).flatten()).unflatten(0, (-1, len(shifts)))
        point, offset = (near >= 0).nonzero().unbind(1)
        place = near[point, offset].long()
        gap = (x.indices[place, 1:] + 0.5 - points[rows[point]]) * side
        close = gap.square().sum(1) <= radius**2
        point, place = point[close], place[close]
        starts = torch.searchsorted(point, point)  # where the places of the same point begin
        first = torch.arange(len(point), device=points.device) - starts < most
        found.append(torch.stack([rows[point[first]], place[first]]))
    return torch.cat(found, 1) if found else torch.zeros(2, 0, dtype=torch.int64, device=points.device)
