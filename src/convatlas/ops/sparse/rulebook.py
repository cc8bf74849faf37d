"""Which row of the input meets which row of the output through which offset of a kernel.

The semantics are those of spconv 2: offsets q of a kernel are numbered row-major over the axes, from 0 on every axis,
and a convolution connects an input place x with the output place o where x + padding = o stride + q dilation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from convatlas.ops.sparse.tensor import linear_keys, unravel_keys

__all__ = ["Kernel", "RowLookup", "Rulebook", "conv_rulebook", "submanifold_rulebook", "transposed_rulebook"]

#: Places of a grid up to which rows are looked up in a table with a number for each, and how many for each row.
_TABLE_PLACES, _PLACES_PER_ROW = 2**26, 512


@dataclass(frozen=True)
class Kernel:
    """The geometry of a convolution, a number for each axis.

    Attributes:
        size, stride, padding, dilation: as in `torch.nn.functional.conv3d`.
        output_padding: of a transposed convolution.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...] = ()

    def offsets(self) -> list[tuple[int, ...]]:
        """Every offset, the last axis fastest."""
        return list(itertools.product(*map(range, self.size)))

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The grid after a convolution of a grid.

        Raises:
            ValueError: nothing is left.
        """
        sizes = zip(shape, self.size, self.stride, self.padding, self.dilation, strict=True)
        found = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)
        if min(found) < 1:
            raise ValueError(f"a kernel of {self.size} leaves nothing of a grid of {tuple(shape)}")
        return found

    def transposed_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The grid after a transposed convolution of a grid.

        Raises:
            ValueError: nothing is left.
        """
        more = self.output_padding or (0,) * len(self.size)
        sizes = zip(shape, self.size, self.stride, self.padding, self.dilation, more, strict=True)
        found = tuple((n - 1) * s - 2 * p + d * (k - 1) + 1 + a for n, k, s, p, d, a in sizes)
        if min(found) < 1:
            raise ValueError(f"a transposed kernel of {self.size} leaves nothing of a grid of {tuple(shape)}")
        return found


@dataclass(frozen=True, eq=False)
class Rulebook:
    """The pairs of rows of a convolution, one offset of the kernel after the other.

    Attributes:
        source, target: (P,) int32, rows of the input and of the output.
        counts: number of pairs of each offset. Within one offset every row comes at most once.
        input_indices, output_indices: places of the rows, (N, 1 + D) and (M, 1 + D).
        input_shape, output_shape: the grids.
        batch_size: number of samples.
        kernel: the geometry.
        kind: ``submanifold``, ``conv``, ``transposed`` or ``inverse``.
        identity: offset whose pairs are every row with itself, or -1.
    """

    source: Tensor
    target: Tensor
    counts: tuple[int, ...]
    input_indices: Tensor
    output_indices: Tensor
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    batch_size: int
    kernel: Kernel
    kind: str
    identity: int = -1

    @property
    def num_inputs(self) -> int:
        """Rows of the input."""
        return len(self.input_indices)

    @property
    def num_outputs(self) -> int:
        """Rows of the output."""
        return len(self.output_indices)

    @property
    def num_pairs(self) -> int:
        """Pairs of all offsets; a multiply-add of C_in x C_out each."""
        return sum(self.counts)

    @cached_property
    def inverse(self) -> Rulebook:
        """The same pairs with source and target swapped: back to the places, and the rows, of the input."""
        return Rulebook(
            source=self.target,
            target=self.source,
            counts=self.counts,
            input_indices=self.output_indices,
            output_indices=self.input_indices,
            input_shape=self.output_shape,
            output_shape=self.input_shape,
            batch_size=self.batch_size,
            kernel=self.kernel,
            kind="conv" if self.kind in ("transposed", "inverse") else "inverse",
            identity=self.identity,
        )


class RowLookup:
    """Finds the row of a key: in a table of all keys where that is small enough, else among the sorted ones.

    Args:
        keys: (N,) int64 from 0, each once.
        places: the keys are below.
        queries: how many keys will be looked for.
    """

    def __init__(self, keys: Tensor, places: int, queries: int = 0) -> None:
        rows = torch.arange(len(keys), dtype=torch.int32, device=keys.device)
        self.table = self.order = None
        if _fits_table(max(len(keys), queries // 64), places):
            self.table = torch.full((places,), -1, dtype=torch.int32, device=keys.device)
            self.table[keys] = rows
        else:
            self.keys, order = keys.sort()
            self.order = order.int()

    def __call__(self, keys: Tensor) -> Tensor:
        """The row (int32) of each key, or -1."""
        if self.table is not None:
            return self.table.index_select(0, keys)
        if self.order is None or not len(self.order):
            return torch.full_like(keys, -1, dtype=torch.int32)
        at = torch.searchsorted(self.keys, keys).clamp_(max=len(self.keys) - 1)
        found = self.keys.index_select(0, at) == keys
        return torch.where(found, self.order.index_select(0, at), -1)


def _fits_table(rows: int, places: int) -> bool:
    """Whether a number for each place is less work than sorting the rows."""
    return places <= min(_TABLE_PLACES, max(2**16, _PLACES_PER_ROW * rows))


def submanifold_rulebook(
    indices: Tensor, spatial_shape: Sequence[int], batch_size: int, kernel_size: Sequence[int], dilation: Sequence[int]
) -> Rulebook:
    """Pairs of a convolution whose output has the places of its input, in the same order; the kernel is centred.

    Args:
        indices: places (N, 1 + D).
        spatial_shape, batch_size: of the grid.
        kernel_size: odd, for each axis.
        dilation: for each axis.
    """
    reach = [size // 2 * step for size, step in zip(kernel_size, dilation, strict=True)]
    # A margin of empty places on every side: a neighbour beyond the border is found to be inactive.
    padded = [size + 2 * margin for size, margin in zip(spatial_shape, reach, strict=True)]
    margins = torch.tensor([0, *reach], device=indices.device)
    keys = linear_keys(indices + margins, (batch_size, *padded))
    rows = RowLookup(keys, batch_size * math.prod(padded))
    steps = [math.prod(padded[axis + 1 :]) for axis in range(len(padded))]
    kernel = Kernel(tuple(kernel_size), (1,) * len(reach), tuple(reach), tuple(dilation))
    offsets = kernel.offsets()
    middle = len(offsets) // 2
    source, target = [], []
    for offset in offsets[:middle]:
        shift = sum((q * d - r) * step for q, d, r, step in zip(offset, dilation, reach, steps, strict=True))
        neighbour = rows(keys + shift)
        found = (neighbour >= 0).nonzero().squeeze(1)
        source.append(neighbour.index_select(0, found))
        target.append(found.int())
    # Mirrored offsets join the same rows the other way round.
    every = torch.arange(len(indices), dtype=torch.int32, device=indices.device)
    counts = [len(part) for part in source]
    return Rulebook(
        source=torch.cat([*source, every, *reversed(target)]),
        target=torch.cat([*target, every, *reversed(source)]),
        counts=(*counts, len(indices), *reversed(counts)),
        input_indices=indices,
        output_indices=indices,
        input_shape=tuple(spatial_shape),
        output_shape=tuple(spatial_shape),
        batch_size=batch_size,
        kernel=kernel,
        kind="submanifold",
        identity=middle,
    )


def conv_rulebook(indices: Tensor, spatial_shape: Sequence[int], batch_size: int, kernel: Kernel) -> Rulebook:
    """Pairs of a convolution whose output has every place that an active input reaches, in the order of coordinates.

    Args:
        indices: places (N, 1 + D).
        spatial_shape, batch_size: of the grid.
        kernel: the geometry.
    """
    shape = kernel.output_shape(spatial_shape)
    reached = []  # for each axis and offset: where an input goes, and whether it is divisible by the stride and inside
    for axis, size in enumerate(shape):
        at = indices[:, axis + 1].long() + kernel.padding[axis]
        stride = kernel.stride[axis]
        steps = []
        for q in range(kernel.size[axis]):
            moved = at - q * kernel.dilation[axis]
            goes = moved if stride == 1 else moved.div(stride, rounding_mode="floor")
            steps.append((goes, (goes >= 0) & (goes < size) & (goes * stride == moved)))
        reached.append(steps)
    return _rulebook(indices, spatial_shape, shape, batch_size, kernel, reached, "conv")


def transposed_rulebook(indices: Tensor, spatial_shape: Sequence[int], batch_size: int, kernel: Kernel) -> Rulebook:
    """Pairs of a transposed convolution, o = x stride - padding + q dilation, in the order of coordinates.

    Args:
        indices: places (N, 1 + D).
        spatial_shape, batch_size: of the grid.
        kernel: the geometry.
    """
    shape = kernel.transposed_shape(spatial_shape)
    reached = []
    for axis, size in enumerate(shape):
        at = indices[:, axis + 1].long() * kernel.stride[axis] - kernel.padding[axis]
        moved = [at + q * kernel.dilation[axis] for q in range(kernel.size[axis])]
        reached.append([(goes, (goes >= 0) & (goes < size)) for goes in moved])
    return _rulebook(indices, spatial_shape, shape, batch_size, kernel, reached, "transposed")


def _rulebook(
    indices: Tensor,
    input_shape: Sequence[int],
    output_shape: tuple[int, ...],
    batch_size: int,
    kernel: Kernel,
    reached: list[list[tuple[Tensor, Tensor]]],
    kind: str,
) -> Rulebook:
    sizes = (batch_size, *output_shape)
    linear_keys(indices[:0], sizes)  # refuses grids that are too large
    sample = indices[:, 0].long()
    source, goals = [], []
    for offset in kernel.offsets():
        goes, valid = zip(*(steps[q] for steps, q in zip(reached, offset, strict=True)), strict=True)
        rows = torch.stack(valid).all(0).nonzero().squeeze(1)
        keys = sample.index_select(0, rows)
        for place, size in zip(goes, output_shape, strict=True):
            keys = keys * size + place.index_select(0, rows)
        source.append(rows.int())
        goals.append(keys)
    keys = torch.cat(goals)
    places = math.prod(sizes)
    if _fits_table(len(indices), places):
        active = torch.zeros(places, dtype=torch.bool, device=keys.device)
        active[keys] = True
        found = active.nonzero().squeeze(1)
        target = RowLookup(found, places)(keys)
    else:
        found, inverse = keys.unique(return_inverse=True)
        target = inverse.int()
    return Rulebook(
        source=torch.cat(source),
        target=target,
        counts=tuple(len(part) for part in source),
        input_indices=indices,
        output_indices=unravel_keys(found, sizes).to(indices.dtype),
        input_shape=tuple(input_shape),
        output_shape=output_shape,
        batch_size=batch_size,
        kernel=kernel,
        kind=kind,
    )
