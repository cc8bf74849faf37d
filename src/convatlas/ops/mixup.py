"""Mixup of a batch with a permutation of itself: images, loss and accuracy of two labels at once.

Zhang, Cisse, Dauphin, Lopez-Paz: "mixup: Beyond Empirical Risk Minimization", ICLR 2018, arXiv 1710.09412. One ratio
holds for the whole batch, as in Bachmann et al., NeurIPS 2023, arXiv 2306.13575.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.ops.accuracy import top_k_accuracy

__all__ = ["Mixed", "mixed_accuracy", "mixed_cross_entropy", "mixup_batch"]


class Mixed(NamedTuple):
    """A mixed batch: images (B, ...), labels (B) of both parts, and the share of the first part."""

    images: Tensor
    labels: Tensor
    partner_labels: Tensor
    ratio: float


def mixup_batch(images: Tensor, labels: Tensor, alpha: float, *, generator: torch.Generator | None = None) -> Mixed:
    """ratio * x + (1 - ratio) * x_perm, with a ratio from Beta(alpha, alpha) and a random permutation.

    Args:
        images: (B, ...), floating point; they are not changed.
        labels: (B), class indices.
        alpha: of the Beta distribution; 0 leaves the images as they are.
        generator: source of the permutation and the ratio.

    Raises:
        ValueError: alpha is negative.
    """
    if alpha < 0:
        raise ValueError(f"alpha must not be negative, got {alpha}")
    device = images.device if generator is None else generator.device
    order = torch.randperm(len(images), generator=generator, device=device).to(images.device)
    ratio = 1.0
    if alpha > 0:  # torch's Beta distribution takes no generator
        seed = int(torch.randint(2**63 - 1, (), generator=generator, device=device))
        ratio = float(np.random.default_rng(seed).beta(alpha, alpha))
    return Mixed(ratio * images + (1 - ratio) * images[order], labels, labels[order], ratio)


def mixed_cross_entropy(
    scores: Tensor, labels: Tensor, partner_labels: Tensor, ratio: float, *, label_smoothing: float = 0.0
) -> Tensor:
    """ratio * CE(labels) + (1 - ratio) * CE(partner_labels), mean over the batch.

    Args:
        scores: (B, classes).
        labels, partner_labels: (B), class indices of both parts.
        ratio: share of the first part.
        label_smoothing: share of the target spread over all classes, that of the label included.
    """
    first, second = (
        F.cross_entropy(scores, each, label_smoothing=label_smoothing) for each in (labels, partner_labels)
    )
    return ratio * first + (1 - ratio) * second


def mixed_accuracy(scores: Tensor, labels: Tensor, partner_labels: Tensor, k: int = 1) -> Tensor:
    """The larger of the top-k accuracies of the batch by the labels of either part.

    Args:
        scores: (B, classes).
        labels, partner_labels: (B), class indices of both parts.
        k: number of guesses.
    """
    return torch.maximum(top_k_accuracy(scores, labels, k), top_k_accuracy(scores, partner_labels, k))
