"""Activations that torch lacks, or whose gradients are slow in it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["QuickGELU", "ScalarPReLU"]


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), an approximation of GELU that CLIP and CvT were trained with.

    Hendrycks, Gimpel: "Gaussian Error Linear Units", 2016, arXiv 1606.08415, section 2.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map any shape to the same shape."""
        # As a scaled SiLU it keeps one tensor for the backward pass, not two.
        return F.silu(1.702 * x) / 1.702


class ScalarPReLU(nn.PReLU):
    """`torch.nn.PReLU` with one slope for all channels, whose gradient on a CPU takes a fraction of the time.

    torch writes a gradient of the slope for every value before it adds them up.

    Args:
        init: slope for negative values to begin with.
    """

    def __init__(self, init: float = 0.25) -> None:
        super().__init__(1, init)

    def forward(self, x: Tensor) -> Tensor:
        """Map any shape to the same shape."""
        trained = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        exact = x.dtype == self.weight.dtype and x.dtype in (torch.float32, torch.float64)
        if not trained or not exact or x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        y: Tensor = _ScalarPReLU.apply(x, self.weight)  # type: ignore[no-untyped-call]
        return y


class _ScalarPReLU(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return F.prelu(x, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        slope = torch.dot(g.flatten(), x.clamp(max=0).flatten()).view(1)
        return torch.ops.aten.leaky_relu_backward(g, x, weight.item(), False), slope
