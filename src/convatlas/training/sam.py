"""Sharpness-aware minimisation: the step is made with the gradient of the worst point nearby.

Foret, Kleiner, Mobahi, Neyshabur: "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021,
arXiv 2010.01412. Adaptive form: Kwon, Kim, Park, Choi: "ASAM", ICML 2021, arXiv 2102.11600.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from convatlas.errors import Unsupported
from convatlas.training.method import Method
from convatlas.training.optim import make_optimizer
from convatlas.training.settings import Training

__all__ = ["SAM", "SharpnessAware"]


class SAM(Optimizer):
    """Makes the steps of another optimizer with the gradient at w + e.

    e = rho s g / (||s' g|| + 1e-12) with s = s' = 1, or, adaptive, s = w^2 and s' = |w|; the norm is over all
    parameters together. Learning rates, momentum and state are those of the other optimizer.

    Args:
        base: makes the step, e.g. `torch.optim.SGD` with momentum.
        rho: how far to climb.
        adaptive: scale by the size of the weights, so that rescaling them does not matter.

    Raises:
        ValueError: rho is negative.
    """

    def __init__(self, base: Optimizer, rho: float = 0.05, *, adaptive: bool = False) -> None:
        if rho < 0:
            raise ValueError(f"rho must not be negative, got {rho}")
        super().__init__(base.param_groups, base.defaults)
        self.base, self.rho, self.adaptive = base, rho, adaptive
        self.param_groups, self.state = base.param_groups, base.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore learning rates and state, here and in the other optimizer."""
        super().load_state_dict(state_dict)
        self.base.param_groups, self.base.state = self.param_groups, self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step.

        Args:
            closure: computes the loss and its gradients anew and returns the loss; it is called twice, with the same
                random numbers.

        Returns:
            The loss before the step.

        Raises:
            ValueError: there is no closure.
        """
        if closure is None:
            raise ValueError("SAM.step needs a closure that computes the loss and its gradients, got None")
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        devices = {parameter.device.index for parameter in parameters if parameter.is_cuda}
        self.zero_grad()
        with torch.enable_grad(), torch.random.fork_rng(devices=list(devices)):
            loss = closure()
        kept = self._climb([parameter for parameter in parameters if parameter.grad is not None])
        self.zero_grad()
        with torch.enable_grad():
            closure()
        for parameter, value in kept:
            parameter.copy_(value)
        self.base.step()
        return loss

    def _climb(self, parameters: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Move to w + e; gives the parameters with their values before."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not gradients:
            return []
        scaled = [p.abs() * g for p, g in zip(parameters, gradients, strict=True)] if self.adaptive else gradients
        device = gradients[0].device
        norm = torch.stack([each.norm().to(device) for each in scaled]).norm()
        scale = self.rho / (norm + 1e-12)
        kept = []
        for parameter, gradient in zip(parameters, gradients, strict=True):
            kept.append((parameter, parameter.clone()))
            direction = parameter.square() * gradient if self.adaptive else gradient
            parameter.add_(direction * scale.to(parameter))
        return kept


@dataclass(frozen=True, kw_only=True)
class SharpnessAware(Method):
    """Train with `SAM` around the optimizer that the settings ask for; each step takes two passes.

    Attributes:
        rho: how far to climb.
        adaptive: scale by the size of the weights.

    Raises:
        ValueError: rho is negative.
    """

    rho: float = 0.05
    adaptive: bool = False

    def __post_init__(self) -> None:
        if self.rho < 0:
            raise ValueError(f"rho must not be negative, got {self.rho}")

    def optimizers(self, model: nn.Module, training: Training) -> Sequence[Optimizer]:
        """SAM around the optimizer of the settings.

        Raises:
            ValueError: several batches make a step, or the precision is 16.
            Unsupported: the weights are shared out among processes.
        """
        if training.accumulate != 1:
            raise ValueError(f"accumulate must be 1 with sam, which needs each batch twice, got {training.accumulate}")
        if training.precision == "16":
            raise ValueError("precision must be 32 or bf16 with sam, got 16")
        if training.strategy == "fsdp":
            raise Unsupported("sam cannot train with the strategy fsdp: take ddp")
        return [SAM(make_optimizer(model, training), self.rho, adaptive=self.adaptive)]
