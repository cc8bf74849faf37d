"""Late fusion: the class scores of several classifiers as one, and how much the classifiers differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from convatlas.errors import unknown

__all__ = ["Fusion", "best_fusion_weights", "disagreement", "fuse_scores", "q_statistic"]

#: How scores become one.
Fusion = Literal["mean", "product", "max", "weighted"]


def fuse_scores(
    scores: Sequence[Tensor] | Tensor, method: Fusion = "mean", weights: Sequence[float] | None = None
) -> Tensor:
    """Class probabilities (B, K) of M classifiers as one (B, K).

    Args:
        scores: M probabilities (B, K), or (M, B, K).
        method: ``mean``; ``product``, whose rows are divided by their sum; ``max``, whose rows are not and sum to 1 or
            more; ``weighted``, a mean with ``weights``.
        weights: of the classifiers, of which only the ratios matter.

    Raises:
        ValueError: there are no scores, they differ in shape, or the weights are not one for each classifier, negative
            or all zero.
        UnknownName: there is no such method.
    """
    if method not in get_args(Fusion):
        raise unknown("method", method, get_args(Fusion))
    if not len(scores) or any(each.shape != scores[0].shape for each in scores) or scores[0].dim() != 2:
        shapes = ", ".join(str(tuple(each.shape)) for each in scores) or "none"
        raise ValueError(f"scores must be (B, K) of one shape, got {shapes}")
    stacked = torch.stack(list(scores))
    if method == "weighted":
        given = torch.as_tensor(() if weights is None else tuple(weights), dtype=stacked.dtype, device=stacked.device)
        if given.shape != (len(stacked),) or not bool((given >= 0).all()) or not bool(given.sum() > 0):
            raise ValueError(
                f"weights must be {len(stacked)} numbers of at least 0, not all 0, got "
                f"{'none' if weights is None else tuple(weights)}"
            )
        return torch.einsum("m,mbk->bk", given / given.sum(), stacked)
    if weights is not None:
        raise ValueError(f"weights are for the method 'weighted', got them with {method!r}")
    if method == "mean":
        return stacked.mean(0)
    if method == "max":
        return stacked.amax(0)
    # Of logarithms, because a product of many small numbers is zero.
    return stacked.clamp_min(torch.finfo(stacked.dtype).tiny).log().sum(0).softmax(1)


def best_fusion_weights(scores: Sequence[Tensor] | Tensor, labels: Tensor, step: float = 0.1) -> tuple[float, ...]:
    """The weights on a grid over the simplex with which the weighted mean is most often right.

    Of equally good ones those nearest to equal weights.

    Args:
        scores: M probabilities (B, K) of held-out samples.
        labels: (B).
        step: of the grid; 1 must be a multiple of it.

    Raises:
        ValueError: step does not divide 1.
    """
    parts = round(1 / step)
    if parts < 1 or abs(parts * step - 1) > 1e-9:
        raise ValueError(f"step must divide 1, got {step}")
    stacked = torch.stack(list(scores))
    grid = torch.tensor(_compositions(parts, len(stacked)), dtype=torch.float64) / parts
    best = (-1.0, 0.0)
    chosen = grid[0]
    for weights in grid:
        fused = torch.einsum("m,mbk->bk", weights.to(stacked), stacked)
        right = float((fused.argmax(1) == labels).double().mean())
        rank = (right, -float((weights - 1 / len(stacked)).square().sum()))
        if rank > best:
            best, chosen = rank, weights
    return tuple(chosen.tolist())


def _compositions(total: int, parts: int) -> list[list[int]]:
    """All lists of ``parts`` whole numbers from 0 that sum to ``total``."""
    if parts == 1:
        return [[total]]
    return [[first, *rest] for first in range(total + 1) for rest in _compositions(total - first, parts - 1)]


def disagreement(first: Tensor, second: Tensor, labels: Tensor) -> float:
    """Share of the samples that exactly one of two classifiers names rightly; answers and labels are (B)."""
    return float(((first == labels) != (second == labels)).double().mean())


def q_statistic(first: Tensor, second: Tensor, labels: Tensor) -> float:
    """Yule's Q of two classifiers: 1 where they are wrong together, 0 where independently, below where in turn.

    NaN where neither both are right or wrong on a sample nor one alone is.
    """
    a, b = first == labels, second == labels
    both, neither = float((a & b).sum()), float((~a & ~b).sum())
    one, other = float((a & ~b).sum()), float((~a & b).sum())
    same, apart = both * neither, one * other
    return (same - apart) / (same + apart) if same + apart else float("nan")
