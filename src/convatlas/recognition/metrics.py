"""Metrics of classifiers that torchmetrics lacks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

__all__ = ["CrossEntropy"]


class CrossEntropy(Metric):
    """Mean cross-entropy in nats of class scores (B, C) and labels (B)."""

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch."""
        self.total += F.cross_entropy(preds, target, reduction="sum")
        self.count += len(target)

    def compute(self) -> Tensor:
        """The mean over all samples so far."""
        return (self.total / self.count).float()
