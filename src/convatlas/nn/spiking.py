"""Spiking neurons that are trained directly, and how much they fire."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from convatlas.hooks import record
from convatlas.ops.spiking import integer_lif, integer_spikes

__all__ = ["IntegerLIF", "firing_rates"]


class IntegerLIF(nn.Module):
    """The integer leaky integrate-and-fire neuron of E-3DSNN (arXiv 2412.07360); it has no parameters.

    With one time step it is stateless: potentials of any shape in, as many whole numbers from 0 to D out. With more the
    first axis of what it takes is time.

    Args:
        max_spikes: D, largest number of spikes in a step.
        timesteps: T.
        beta: share of the potential that is left for the next step.

    Raises:
        ValueError: an argument is out of range; in `forward`, the first axis is not time.
    """

    def __init__(self, max_spikes: int = 4, timesteps: int = 1, beta: float = 0.25) -> None:
        super().__init__()
        for name, value in (("max_spikes", max_spikes), ("timesteps", timesteps)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= beta <= 1:
            raise ValueError(f"beta must be in [0, 1], got {beta}")
        self.max_spikes, self.timesteps, self.beta = max_spikes, timesteps, beta

    def forward(self, potential: Tensor) -> Tensor:
        """Spikes in the shape of the potential."""
        if self.timesteps == 1:
            return integer_spikes(potential, self.max_spikes)
        if potential.shape[:1] != (self.timesteps,):
            raise ValueError(f"the potential must have {self.timesteps} time steps first, got {tuple(potential.shape)}")
        return integer_lif(potential, self.max_spikes, self.beta)

    def extra_repr(self) -> str:
        """The settings."""
        return f"max_spikes={self.max_spikes}, timesteps={self.timesteps}, beta={self.beta}"


@torch.no_grad()
def firing_rates(model: nn.Module, *inputs: Any) -> dict[str, float]:
    """Mean number of spikes of each neuron layer in one forward pass, in the order in which they fire.

    Raises:
        ValueError: the model has no spiking neuron.
    """

    def mean(tensor: Tensor) -> float:
        return float(tensor.double().mean()) if tensor.numel() else 0.0

    with record(model, IntegerLIF, keep=mean) as fired:
        model(*inputs)
    return {entry.name: entry.output for entry in fired}
