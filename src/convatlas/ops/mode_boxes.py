"""Boxes of the lowest modes: cut out of a spectrum, and put back among zeros."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

__all__ = ["lowest", "with_zeros"]


def lowest(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """The first so many entries of the last axes, of all where there are fewer; a view."""
    box: tuple[Any, ...] = (..., *(slice(size) for size in sizes))
    return x[box]


def with_zeros(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """The last axes with zeros behind, at least so long."""
    missing = [max(0, size - given) for size, given in zip(sizes, x.shape[x.dim() - len(sizes) :], strict=True)]
    if not any(missing):
        return x
    return F.pad(x, [side for count in reversed(missing) for side in (0, count)])
