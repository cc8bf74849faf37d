"""Accuracies of class scores: by k guesses, and by sets of right labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["label_sets", "real_accuracy", "top_k_accuracy"]


def top_k_accuracy(scores: Tensor, labels: Tensor, k: int = 1) -> Tensor:
    """Share of samples whose label is among the k highest scores, a scalar of the scores' dtype.

    Args:
        scores: (B, classes).
        labels: (B), class indices.
        k: number of guesses.

    Raises:
        ValueError: k is not from 1 to the number of classes, or there is no sample.
    """
    if not 1 <= k <= scores.shape[1]:
        raise ValueError(f"k must be from 1 to {scores.shape[1]}, the number of classes, got {k}")
    if len(scores) == 0:
        raise ValueError("scores must hold at least one sample, got none")
    return (scores.topk(k, dim=1).indices == labels[:, None]).any(1).to(scores.dtype).mean()


def label_sets(sets: Sequence[Sequence[int]]) -> Tensor:
    """Sets of labels of different size as one tensor (B, largest size), filled up with -1."""
    rows = [torch.tensor(list(each), dtype=torch.int64) for each in sets]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


def real_accuracy(scores: Tensor, sets: Tensor) -> Tensor:
    """Share of samples whose highest score is one of their labels, a scalar of the scores' dtype; NaN if none has one.

    Beyer, Henaff, Kolesnikov, Zhai, van den Oord: "Are we done with ImageNet?", 2020, arXiv 2006.07159 (ReaL). Samples
    without any label do not count.

    Args:
        scores: (B, classes).
        sets: (B, n), labels of each sample; places that are not needed hold -1, see `label_sets`.
    """
    labelled = (sets >= 0).any(1)
    right = (scores.argmax(1)[:, None] == sets).any(1)
    return right[labelled].to(scores.dtype).mean()
