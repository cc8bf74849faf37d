"""Sums over the rows of a compressed list of pairs."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from convatlas.ops.backend import Backends

__all__ = ["segment_sum"]

_backends = Backends("segment_sum", auto=lambda *_: "index_add")


def segment_sum(values: Tensor, row_splits: Tensor, mean: bool = False, *, backend: str = "auto") -> Tensor:
    """y[..., i, :] = the sum of values[..., e, :] over the pairs e of row i; 0 where there is none.

    Args:
        values: (..., E, C).
        row_splits: where each row begins, and the end of the last, int64 (M + 1).
        mean: divide by the number of pairs of the row.
        backend: ``auto``; ``naive`` (row by row); ``index_add`` (all at once).

    Returns:
        (..., M, C).

    Raises:
        ValueError: the shapes do not fit.
    """
    if values.dim() < 2 or row_splits.dim() != 1 or not len(row_splits):
        raise ValueError(
            f"values must be (..., E, C) and row_splits (M + 1,), got {tuple(values.shape)} and "
            f"{tuple(row_splits.shape)}"
        )
    return _backends.run(backend, values, row_splits, mean)


@_backends.register("naive")
def _naive(values: Tensor, row_splits: Tensor, mean: bool) -> Tensor:
    ends = row_splits.tolist()
    rows = []
    for start, end in itertools.pairwise(ends):
        total = values[..., start:end, :].sum(-2)
        rows.append(total / max(end - start, 1) if mean else total)
    return torch.stack(rows, -2) if rows else values[..., :0, :]


@_backends.register("index_add")
def _index_add(values: Tensor, row_splits: Tensor, mean: bool) -> Tensor:
    counts = row_splits.diff()
    rows = torch.arange(len(counts), device=values.device).repeat_interleave(counts, output_size=values.shape[-2])
    total = values.new_zeros(*values.shape[:-2], len(counts), values.shape[-1]).index_add(-2, rows, values)
    return total / counts.clamp(min=1)[:, None].to(values.dtype) if mean else total
