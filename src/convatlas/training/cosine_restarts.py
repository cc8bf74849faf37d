"""A learning rate that falls along a cosine and begins again, counted in steps of the optimizer.

Loshchilov, Hutter: "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017, arXiv 1608.03983, equation 5; the
forecasts of video in Poli et al.: "Transform Once", NeurIPS 2022, arXiv 2211.14453, begin again every 32 steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from convatlas.errors import Unsupported
from convatlas.training.method import Method
from convatlas.training.optim import make_optimizer, restarted_cosine
from convatlas.training.settings import Training

__all__ = ["CosineRestarts"]


@dataclass(kw_only=True)
class CosineRestarts(Method):
    """The method with its settings; it takes the place of the schedule of the run, with adamw as optimizer.

    Attributes:
        first: steps of the first period.
        growth: how many times as long each further period is.
        min_lr: what the learning rate falls towards.
    """

    first: int = 32
    growth: int = 1
    min_lr: float = 0.0

    def __post_init__(self) -> None:
        restarted_cosine(0, self.first, self.growth)
        if not self.min_lr >= 0:
            raise ValueError(f"min_lr must not be negative, got {self.min_lr}")

    def optimizers(self, model: nn.Module, training: Training) -> Sequence[Optimizer]:
        """The AdamW of the settings with this schedule.

        Raises:
            Unsupported: the settings ask for another optimizer.
        """
        if training.optimizer != "adamw":
            raise Unsupported(
                f"cosine_restarts needs the optimizer adamw, which counts its steps, got {training.optimizer}"
            )
        optimizer = make_optimizer(model, training)

        def reschedule(optimizer: Optimizer, *_: Any) -> None:
            # The count that AdamW keeps survives stopping and resuming.
            steps = max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)
            factor = restarted_cosine(steps, self.first, self.growth)
            for group in optimizer.param_groups:
                peak = training.lr * group["lr_scale"]
                group["lr"] = self.min_lr + (peak - self.min_lr) * factor

        optimizer.register_step_pre_hook(reschedule)
        return (optimizer,)
