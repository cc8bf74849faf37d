"""Measures and weights for classes of unequal size."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["balanced_weights", "class_scores", "confusion_matrix"]


def balanced_weights(counts: Tensor) -> Tensor:
    """The weight of each class in the loss, N / (K N_c), with which all K classes weigh the same.

    Args:
        counts: samples of each class, (K), at least one.

    Returns:
        (K) float64, for the argument ``weight`` of `torch.nn.functional.cross_entropy`.

    Raises:
        ValueError: a class has no sample.
    """
    if counts.dim() != 1 or not len(counts) or int(counts.min()) < 1:
        raise ValueError(f"counts must be (K) and at least 1 each, got {counts.tolist()}")
    return counts.sum() / (len(counts) * counts.to(torch.float64))


def confusion_matrix(labels: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """How often samples of one class (rows) were taken for another (columns), (num_classes, num_classes) int64."""
    return torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)


def class_scores(confusion: Tensor) -> dict[str, Tensor]:
    """Precision, recall, specificity and F1 of each class, (K), from a confusion matrix with the true classes in rows.

    A ratio without a sample in its denominator is 0.
    """
    confusion = confusion.to(torch.float64)
    hits, true, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
    others = confusion.sum() - true
    precision, recall = _ratio(hits, predicted), _ratio(hits, true)
    return {
        "precision": precision,
        "recall": recall,
        "specificity": _ratio(others - (predicted - hits), others),
        "f1": _ratio(2 * hits, true + predicted),
    }


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole.clamp_min(1), torch.zeros_like(part))
