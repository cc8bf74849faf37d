"""Errors of fields as integrals over the domain, so that they do not depend on the grid.

As in the neural operators of Li et al., ICLR 2021, arXiv 2010.08895, and Berner et al., 2025, arXiv 2506.10973.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["h1_error", "l2_sum_squared", "lp_error"]


def lp_error(
    prediction: Tensor,
    truth: Tensor,
    p: float = 2.0,
    *,
    lengths: float | Sequence[float] = 1.0,
    relative: bool = False,
) -> Tensor:
    """(integral of |prediction - truth|^p)^(1 / p) of each sample, over the channels as well.

    Args:
        prediction, truth: (B, C, *grid).
        p: of the norm, at least 1.
        lengths: of the domain's axes, or one for all.
        relative: divide by the norm of the truth; the domain then makes no difference.

    Returns:
        (B,).

    Raises:
        ValueError: the shapes differ, or p is smaller than 1.
    """
    if not p >= 1:
        raise ValueError(f"p must be at least 1, got {p}")
    widths = _widths(prediction, truth, lengths)
    error, size = (torch.linalg.vector_norm(each.flatten(1), p, dim=1) for each in (prediction - truth, truth))
    return error / size if relative else error * math.prod(widths) ** (1 / p)


def h1_error(
    prediction: Tensor,
    truth: Tensor,
    *,
    lengths: float | Sequence[float] = 1.0,
    periodic: bool = True,
    relative: bool = False,
) -> Tensor:
    """Norm in H1 of the error of each sample: sqrt(integral of |e|^2 + |grad e|^2), by differences of second order.

    Args:
        prediction, truth: (B, C, *grid).
        lengths: of the domain's axes, or one for all.
        periodic: whether the fields go on at the other side; else differences at the border are one-sided.
        relative: divide by the norm of the truth.

    Returns:
        (B,).

    Raises:
        ValueError: the shapes differ, or an axis has fewer than three points.
    """
    widths = _widths(prediction, truth, lengths)
    if min(prediction.shape[2:]) < 3:
        raise ValueError(f"fields must have at least 3 points on each axis, got {tuple(prediction.shape)}")

    def squared(field: Tensor) -> Tensor:
        total = field.square()
        for axis, width in enumerate(widths, 2):
            total = total + _derivative(field, axis, width, periodic).square()
        return total.flatten(1).sum(1)

    error = squared(prediction - truth)
    return (error / squared(truth)).sqrt() if relative else (error * math.prod(widths)).sqrt()


def l2_sum_squared(prediction: Tensor, truth: Tensor, *, lengths: float | Sequence[float] = 2 * math.pi) -> Tensor:
    """(sum over the batch of the L2 norms of the errors)^2, with which Berner et al. train: squared after the sum.

    Args:
        prediction, truth: (B, C, *grid).
        lengths: of the domain's axes, or one for all.

    Returns:
        A scalar.

    Raises:
        ValueError: the shapes differ.
    """
    return lp_error(prediction, truth, lengths=lengths).sum().square()


def _widths(prediction: Tensor, truth: Tensor, lengths: float | Sequence[float]) -> list[float]:
    """Distances of the points of each axis."""
    if prediction.shape != truth.shape or prediction.dim() < 3:
        raise ValueError(
            f"prediction and truth must both be (B, C, *grid), got {tuple(prediction.shape)} and {tuple(truth.shape)}"
        )
    grid = prediction.shape[2:]
    each = [lengths] * len(grid) if isinstance(lengths, int | float) else list(lengths)
    if len(each) != len(grid) or min(each) <= 0:
        raise ValueError(f"lengths must be one positive number or {len(grid)}, got {lengths}")
    return [length / points for length, points in zip(each, grid, strict=True)]


def _derivative(field: Tensor, axis: int, width: float, periodic: bool) -> Tensor:
    if periodic:
        return (field.roll(-1, axis) - field.roll(1, axis)) / (2 * width)
    # One-sided formulas of second order at both ends.
    return torch.gradient(field, spacing=width, dim=axis, edge_order=2)[0]
