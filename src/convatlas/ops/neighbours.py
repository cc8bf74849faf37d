"""Neighbours of points in space, in compressed rows."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from convatlas.errors import Unsupported, unknown

__all__ = ["Neighbours", "check_neighbours", "radius_neighbors"]

#: Distances that are computed at a time.
_TOGETHER = 2**24
#: Pairs of points from which on a tree is worth its building.
_TREE = 2**14


class Neighbours(NamedTuple):
    """Which points are near each query, in compressed rows.

    Attributes:
        indices: numbers of the points, query after query, int64 (E).
        row_splits: where the neighbours of each query begin, and the end of the last, int64 (M + 1).
    """

    indices: Tensor
    row_splits: Tensor

    @property
    def rows(self) -> Tensor:
        """The query of each pair (E)."""
        queries = torch.arange(len(self.row_splits) - 1, device=self.indices.device)
        return queries.repeat_interleave(self.row_splits.diff(), output_size=len(self.indices))


def radius_neighbors(
    points: Tensor, queries: Tensor, radius: float, *, backend: Literal["auto", "naive", "tree"] = "auto"
) -> Neighbours:
    """The points within a distance of each query, the border included, in the order of their numbers.

    Args:
        points: (N, d).
        queries: (M, d).
        radius: positive.
        backend: ``auto``; ``naive`` (all distances); ``tree`` (a k-d tree, on the CPU only).

    Raises:
        ValueError: the shapes do not fit or the radius is not positive.
        Unsupported: ``tree`` of tensors on another device.
        UnknownName: there is no such backend.
    """
    if points.dim() != 2 or queries.dim() != 2 or points.shape[1] != queries.shape[1]:
        raise ValueError(
            f"points must be (N, d) and queries (M, d), got {tuple(points.shape)} and {tuple(queries.shape)}"
        )
    if not 0 < radius < math.inf:
        raise ValueError(f"radius must be positive, got {radius}")
    if backend not in ("auto", "naive", "tree"):
        raise unknown("backend of radius_neighbors", backend, ("auto", "naive", "tree"))
    on_cpu = points.device.type == queries.device.type == "cpu"
    if backend == "tree" and not on_cpu:
        raise Unsupported(f"backend 'tree' works on the CPU only, got points on {points.device}")
    if backend == "auto":
        backend = "tree" if on_cpu and len(points) * len(queries) >= _TREE else "naive"
    search = _tree if backend == "tree" else _naive
    return search(points.detach(), queries.detach(), radius)


def _naive(points: Tensor, queries: Tensor, radius: float) -> Neighbours:
    wide = torch.promote_types(points.dtype, torch.float32)
    pairs = []
    step = max(1, _TOGETHER // max(1, len(points)))
    for start in range(0, len(queries), step):
        # Differences, not products, so that near points keep all their digits.
        near = torch.cdist(
            queries[start : start + step].to(wide), points.to(wide), compute_mode="donot_use_mm_for_euclid_dist"
        )
        pairs.append((near <= radius).nonzero() + torch.tensor([start, 0], device=points.device))
    found = torch.cat(pairs) if pairs else torch.zeros(0, 2, dtype=torch.long, device=points.device)
    return _rows(found[:, 1], torch.bincount(found[:, 0], minlength=len(queries)))


def _tree(points: Tensor, queries: Tensor, radius: float) -> Neighbours:
    wide = [each.to(torch.promote_types(each.dtype, torch.float32)).numpy() for each in (points, queries)]
    found = cKDTree(wide[0]).query_ball_point(wide[1], radius, return_sorted=True)
    index = np.concatenate([np.asarray(row, dtype=np.int64) for row in found]) if len(found) else np.zeros(0, np.int64)
    return _rows(torch.from_numpy(index), torch.tensor([len(row) for row in found], dtype=torch.long))


def _rows(index: Tensor, counts: Tensor) -> Neighbours:
    return Neighbours(index, torch.cat([counts.new_zeros(1), counts.cumsum(0)]))


def check_neighbours(neighbours: Neighbours, points: int, queries: int) -> None:
    """Refuse rows that do not fit the points; it waits for a GPU, so call it once for a graph.

    Raises:
        ValueError: the shapes do not fit, the splits fall or do not begin with 0, or an index is out of range.
    """
    index, splits = neighbours
    if splits.shape != (queries + 1,) or index.dim() != 1:
        raise ValueError(
            f"row_splits must be ({queries + 1},) and index (E,), got {tuple(splits.shape)} and {tuple(index.shape)}"
        )
    ends = (int(splits[0]), int(splits[-1]))
    if ends != (0, len(index)) or bool((splits.diff() < 0).any()):
        raise ValueError(f"row_splits must rise from 0 to the number of pairs {len(index)}, got {splits.tolist()[:8]}")
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < points:
        raise ValueError(f"index must be from 0 to {points - 1}, got {int(index.min())} to {int(index.max())}")
