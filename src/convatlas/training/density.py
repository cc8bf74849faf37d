"""Training density values beside the weights: each with a learning rate and a schedule of its own.

Cammarasana, Patane: "Optimal Density Functions for Weighted Convolution in Learning Models", 2025, arXiv 2505.24527.
The weights follow the settings of the run (there AdamW, 1e-4, a cosine over 100 epochs to 1e-6); the density values
follow AdamW with 1e-2 and cosines that begin again after 10 epochs, then after twice as many each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from convatlas.nn.conv.weighted_conv import density_param_groups
from convatlas.training.method import Method
from convatlas.training.optim import restarted_cosine
from convatlas.training.settings import Training

__all__ = ["DensityTraining"]


@dataclass(kw_only=True)
class DensityTraining(Method):
    """The method with its settings: AdamW for weights and density values, which have a schedule of their own.

    Attributes:
        lr: of the density values at the beginning of each period.
        weight_decay: of the density values.
        first: epochs of the first period.
        growth: how many times as long each further period is.
    """

    lr: float = 1e-2
    weight_decay: float = 1e-2
    first: int = 10
    growth: int = 2
    epoch: int = field(init=False, default=0, repr=False)

    def __post_init__(self) -> None:
        restarted_cosine(0, self.first, self.growth)
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")

    def optimizers(self, model: nn.Module, training: Training) -> Sequence[Optimizer]:
        """One AdamW with both groups.

        Raises:
            Unsupported: the model has no trained density.
        """
        groups = density_param_groups(model, lr=training.lr, density_lr=self.lr, weight_decay=training.weight_decay)
        groups[1]["weight_decay"] = self.weight_decay
        optimizer = torch.optim.AdamW(groups)

        def reschedule(optimizer: Optimizer, *_: Any) -> None:
            optimizer.param_groups[1]["lr"] = self.lr * restarted_cosine(self.epoch, self.first, self.growth)

        optimizer.register_step_pre_hook(reschedule)
        return (optimizer,)

    def start_epoch(self, model: nn.Module, epoch: int) -> None:
        """Remember the epoch."""
        self.epoch = epoch
