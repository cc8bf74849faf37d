"""Integer spikes with a surrogate gradient.

Qiu, Yao, Zhang, Chou, Qiao, Zhou, Xu, Li: "Efficient 3D Recognition with Event-driven Spike Sparse Convolution",
AAAI 2025, arXiv 2412.07360, section on the integer leaky integrate-and-fire neuron. A spike of n stands for n binary
spikes in as many virtual steps; convolution is linear, so both give the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["binary_spikes", "integer_lif", "integer_spikes"]


class _IntegerSpikes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, potential: Tensor, max_spikes: int) -> Tensor:
        ctx.save_for_backward((potential > 0) & (potential < max_spikes))
        # Halves are rounded up, not to even numbers as torch.round does.
        return (potential.clamp(0, max_spikes) + 0.5).floor()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (between,) = ctx.saved_tensors
        return gradients[0] * between, None


def integer_spikes(potential: Tensor, max_spikes: int = 4) -> Tensor:
    """S(u) = floor(clip(u, 0, D) + 1/2): whole numbers from 0 to D, halves rounded up.

    The gradient is taken to be 1 for 0 < u < D and 0 elsewhere.

    Args:
        potential: u, any shape.
        max_spikes: D, at least 1.

    Raises:
        ValueError: max_spikes is smaller than 1.
    """
    if max_spikes < 1:
        raise ValueError(f"max_spikes must be at least 1, got {max_spikes}")
    spikes: Tensor = _IntegerSpikes.apply(potential, max_spikes)  # type: ignore[no-untyped-call]
    return spikes


def integer_lif(current: Tensor, max_spikes: int = 4, beta: float = 0.25) -> Tensor:
    """Leaky integrate-and-fire with integer spikes over time.

    U[t] = H[t - 1] + X[t], S[t] = `integer_spikes` of U[t], H[t] = beta (U[t] - S[t]), H[0] = 0.

    Args:
        current: X (T, ...).
        max_spikes: D.
        beta: share of the potential that is left for the next step.

    Returns:
        S (T, ...).
    """
    spikes: list[Tensor] = []
    kept = torch.zeros_like(current[0])
    for step in current:
        potential = kept + step
        spikes.append(integer_spikes(potential, max_spikes))
        kept = beta * (potential - spikes[-1])
    return torch.stack(spikes)


def binary_spikes(spikes: Tensor, max_spikes: int = 4) -> Tensor:
    """The binary spikes (D, ...) in the virtual steps that integer spikes stand for; their sum is the integer."""
    steps = torch.arange(max_spikes, device=spikes.device).reshape(-1, *(1,) * spikes.dim())
    return (spikes > steps).to(spikes.dtype)
