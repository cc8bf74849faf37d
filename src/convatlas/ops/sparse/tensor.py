"""Features at few places of a grid: rows with their batch index and coordinates."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["SparseTensor", "linear_keys", "unravel_keys"]

_INTEGERS = (torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class SparseTensor:
    """A batch of grids with features at some of their places, zero elsewhere.

    Attributes:
        features: (N, C), floating point, a row for each active place.
        indices: (N, 1 + D) int32 or int64: index of the sample, then the coordinates in the order of ``spatial_shape``.
            Every place comes once; the order of the rows is free.
        spatial_shape: size of the grid on each of the D axes.
        batch_size: number of samples; some may have no row.
        rulebooks: which rows meet in convolutions that were applied before, by their key; tensors with the same places
            share it.
        check: whether to look for places outside the grid and for repeated ones.

    Raises:
        ValueError: shapes or types do not fit, or a place is outside or comes twice.
    """

    features: Tensor
    indices: Tensor
    spatial_shape: tuple[int, ...]
    batch_size: int
    rulebooks: dict[Any, Any] = field(default_factory=dict, repr=False)
    check: InitVar[bool] = True

    def __post_init__(self, check: bool) -> None:
        object.__setattr__(self, "spatial_shape", tuple(int(size) for size in self.spatial_shape))
        if not check:
            return
        if self.features.dim() != 2:
            raise ValueError(f"features must be (N, C), got {tuple(self.features.shape)}")
        if self.indices.dim() != 2 or self.indices.dtype not in _INTEGERS:
            shape, dtype = tuple(self.indices.shape), self.indices.dtype
            raise ValueError(f"indices must be (N, 1 + D) of int32 or int64, got {shape} of {dtype}")
        if len(self.features) != len(self.indices):
            raise ValueError(f"features has {len(self.features)} rows but indices has {len(self.indices)}")
        if len(self.spatial_shape) != self.indices.shape[1] - 1 or min(self.spatial_shape, default=0) < 1:
            raise ValueError(
                f"spatial_shape must be {self.indices.shape[1] - 1} positive sizes, as many as there are coordinates, "
                f"got {self.spatial_shape}"
            )
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        self._check_places()

    def _check_places(self) -> None:
        sizes = (self.batch_size, *self.spatial_shape)
        limits = torch.tensor(sizes, device=self.indices.device)
        inside = ((self.indices >= 0) & (self.indices < limits)).all(1)
        if not inside.all():
            row = int(inside.int().argmin())
            place = tuple(self.indices[row].tolist())
            raise ValueError(f"indices[{row}] = {place} is outside {sizes}: batch size, then the sizes of the grid")
        keys, order = linear_keys(self.indices, sizes).sort(stable=True)
        repeated = keys[1:] == keys[:-1]
        if repeated.any():
            at = int(repeated.int().argmax())
            first, second = int(order[at]), int(order[at + 1])
            place = tuple(self.indices[first].tolist())
            raise ValueError(f"places must come once, but indices[{second}] repeats indices[{first}] = {place}")

    @property
    def dims(self) -> int:
        """Number of spatial axes."""
        return len(self.spatial_shape)

    @property
    def channels(self) -> int:
        """Number of features of a place."""
        return int(self.features.shape[1])

    @property
    def occupancy(self) -> float:
        """Share of the places that are active."""
        return len(self.indices) / (self.batch_size * math.prod(self.spatial_shape))

    def replace_feature(self, features: Tensor) -> SparseTensor:
        """Other features (N, C') at the same places.

        Raises:
            ValueError: the number of rows differs.
        """
        if features.dim() != 2 or len(features) != len(self.indices):
            raise ValueError(f"features must be ({len(self.indices)}, C), got {tuple(features.shape)}")
        return dataclasses.replace(self, features=features, check=False)

    def dense(self) -> Tensor:
        """The whole grid (B, C, *spatial_shape), zero at inactive places."""
        grid = self.features.new_zeros(self.batch_size, *self.spatial_shape, self.channels)
        return grid.index_put(tuple(self.indices.long().unbind(1)), self.features).movedim(-1, 1)

    @classmethod
    def from_dense(cls, x: Tensor) -> SparseTensor:
        """The places of a grid (B, C, *spatial_shape) where any feature is not zero, in the order of their coordinates.

        Raises:
            ValueError: x has no spatial axis.
        """
        if x.dim() < 3:
            raise ValueError(f"x must be (B, C, *sizes), got {tuple(x.shape)}")
        last = x.movedim(1, -1)
        indices = (last != 0).any(-1).nonzero()
        features = last[tuple(indices.unbind(1))]
        return cls(features, indices.int(), tuple(x.shape[2:]), x.shape[0], check=False)

    def __getitem__(self, samples: slice) -> SparseTensor:
        """Some consecutive samples of the batch.

        Raises:
            ValueError: there is none.
        """
        start, stop, step = samples.indices(self.batch_size)
        if step != 1 or stop <= start:
            raise ValueError(f"samples must be one or more consecutive ones of {self.batch_size}, got {samples}")
        kept = (self.indices[:, 0] >= start) & (self.indices[:, 0] < stop)
        indices = self.indices[kept].clone()
        indices[:, 0] -= start
        return SparseTensor(self.features[kept], indices, self.spatial_shape, stop - start, check=False)

    def repeat(self, count: int) -> SparseTensor:
        """The samples one after the other, again and again, as a batch of so many.

        Raises:
            ValueError: count is smaller than 1.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        parts = [self[index % self.batch_size :][:1] for index in range(count)]
        indices = [part.indices + part.indices.new_tensor([i] + [0] * self.dims) for i, part in enumerate(parts)]
        features = torch.cat([part.features for part in parts])
        return SparseTensor(features, torch.cat(indices), self.spatial_shape, count, check=False)

    def to(self, target: torch.device | torch.dtype | str) -> SparseTensor:
        """A copy on another device, or with features of another type."""
        features = self.features.to(target)
        if isinstance(target, torch.dtype):
            return self.replace_feature(features)
        return SparseTensor(features, self.indices.to(target), self.spatial_shape, self.batch_size, check=False)

    def double(self) -> SparseTensor:
        """With features in float64."""
        return self.to(torch.float64)

    def bfloat16(self) -> SparseTensor:
        """With features in bfloat16."""
        return self.to(torch.bfloat16)


def linear_keys(indices: Tensor, sizes: Sequence[int]) -> Tensor:
    """One int64 number for each row of coordinates (N, A): its place in a row-major grid of ``sizes``, an axis each.

    Raises:
        ValueError: the grid has more than 2^63 places.
    """
    if math.prod(sizes) >= 2**63:
        raise ValueError(f"a grid must have less than 2^63 places, got {' x '.join(map(str, sizes))}")
    keys = indices[:, 0].long()
    for axis, size in enumerate(sizes[1:], 1):
        keys = keys * size + indices[:, axis]
    return keys


def unravel_keys(keys: Tensor, sizes: Sequence[int]) -> Tensor:
    """The coordinates (N, A) int32 of what `linear_keys` numbered."""
    columns = []
    for size in reversed(sizes[1:]):
        columns.append(keys % size)
        keys = keys // size
    return torch.stack([keys, *reversed(columns)], 1).int()


def _flatten(x: SparseTensor) -> tuple[list[Tensor], tuple[tuple[int, ...], int]]:
    return [x.features, x.indices], (x.spatial_shape, x.batch_size)


def _unflatten(tensors: Any, rest: tuple[tuple[int, ...], int]) -> SparseTensor:
    return SparseTensor(tensors[0], tensors[1], rest[0], rest[1], check=False)


def _flatten_with_keys(x: SparseTensor) -> Any:
    tensors, rest = _flatten(x)
    return list(zip(map(pytree.GetAttrKey, ("features", "indices")), tensors, strict=True)), rest


# Torch moves and traces nested inputs through this table.
pytree.register_pytree_node(SparseTensor, _flatten, _unflatten, flatten_with_keys_fn=_flatten_with_keys)
