"""How well pairs of feature vectors tell whether two images show the same person, by ten-fold cross-validation.

The protocol of "Labeled Faces in the Wild" (Huang et al., 2007) in the form in which TVConv (arXiv 2203.10489) and
others of its time use it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.errors import unknown

__all__ = ["Verification", "verification_accuracy"]

#: Thresholds that are tried.
_THRESHOLDS = (-3.0, 3.0, 20001)


class Verification(NamedTuple):
    """Accuracy in % of each fold, on the threshold that the other folds chose, and these thresholds."""

    accuracies: Tensor
    thresholds: Tensor

    @property
    def accuracy(self) -> float:
        """Mean accuracy of the folds in %."""
        return self.accuracies.mean().item()

    @property
    def threshold(self) -> float:
        """Mean threshold of the folds."""
        return self.thresholds.mean().item()


def verification_accuracy(
    left: Tensor,
    right: Tensor,
    same: Tensor,
    folds: Tensor | None = None,
    *,
    method: Literal["l2_distance", "cosine"] = "l2_distance",
    independent_folds: bool = False,
) -> Verification:
    """Verify pairs fold by fold.

    Features are scaled to length 1. For each fold the mean of both sides of the other folds is taken off all features,
    which are scaled again; the threshold is the mean of all that tell most pairs of the other folds apart; pairs count
    as the same person if their score is strictly on the better side of it.

    Args:
        left, right: features of the two images of each pair (N, D).
        same: whether they show one person (N): bool, or a number above 0 where they do.
        folds: number of the fold of each pair (N); by default ten of neighbouring pairs.
        method: ``l2_distance``, the squared distance, or ``cosine``.
        independent_folds: take the mean off the features as given in every fold. The authors' code takes it off those
            of the fold before, so that the result depends on the order of the folds.

    Raises:
        ValueError: shapes do not fit, or there are fewer than two folds.
        UnknownName: there is no such method.
    """
    if left.dim() != 2 or left.shape != right.shape or same.shape != left.shape[:1]:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (left, right, same))
        raise ValueError(f"left and right must be (N, D) and same (N), got {shapes}")
    if method not in ("l2_distance", "cosine"):
        raise unknown("method", method, ("l2_distance", "cosine"))
    if folds is None:
        folds = torch.arange(len(left), device=left.device) * 10 // len(left)
    numbers = folds.unique()
    if len(numbers) < 2:
        raise ValueError(f"there must be at least 2 folds, got {len(numbers)}")
    same = same > 0
    dtype = torch.promote_types(left.dtype, torch.float32)
    first, second = F.normalize(left.to(dtype), dim=1), F.normalize(right.to(dtype), dim=1)
    thresholds = torch.linspace(*_THRESHOLDS, dtype=torch.float64, device=left.device)
    accuracies, chosen = [], []
    for number in numbers:
        others = folds != number
        mean = torch.cat([first[others], second[others]]).mean(0)
        a, b = (F.normalize(side - mean, dim=1) for side in (first, second))
        if not independent_folds:
            first, second = a, b
        # The smaller, the more alike.
        scores = (a - b).square().sum(1) if method == "l2_distance" else -(a * b).sum(1)
        right_of = _right(scores[others], same[others], thresholds)
        best = thresholds[right_of == right_of.max()].mean()
        chosen.append(best if method == "l2_distance" else -best)
        accuracies.append(100 * _right(scores[~others], same[~others], best[None])[0] / (~others).sum())
    return Verification(torch.stack(accuracies).double(), torch.stack(chosen))


def _right(scores: Tensor, same: Tensor, thresholds: Tensor) -> Tensor:
    """How many pairs each threshold (T) tells right: below it if they are the same, above it if not."""
    scores = scores.to(thresholds.dtype)
    below = torch.searchsorted(scores[same].sort().values, thresholds)  # strictly smaller
    above = (~same).sum() - torch.searchsorted(scores[~same].sort().values, thresholds, right=True)
    return below + above
