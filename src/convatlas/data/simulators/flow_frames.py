"""Flows as sequences of frames, to learn how they go on."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from convatlas.data.simulators.gaussian_fields import gaussian_field
from convatlas.data.simulators.navier_stokes import solve_navier_stokes

__all__ = ["flow_frames"]

Array = npt.NDArray[Any]

#: Points of each axis of the grid on which solutions are computed, at least.
_FINE = 64


def flow_frames(samples: int, frames: int, resolution: int, seed: int, *, viscosity: float = 1e-3) -> Array:
    """Vorticity of flows on the unit torus at the times 0, 0.5, 1, ..., (samples, frames, 1, resolution, resolution).

    The beginnings and the force are those of `convatlas.data.simulators.navier_stokes`.

    Args:
        samples: how many flows.
        frames: of each.
        resolution: points of each axis.
        seed: the same seed gives the same flows at each resolution.
        viscosity: of the fluid.
    """
    fields = gaussian_field(samples, 2, np.random.default_rng(seed), scale=2 * 7**3, shift=49, power=2.5, modes=20)
    every = max(1, -(-_FINE // resolution))
    places = np.arange(every * resolution) / (every * resolution)
    angle = 2 * np.pi * (places[:, None] + places[None])
    forcing = torch.from_numpy(0.1 * (np.sin(angle) + np.cos(angle)))
    initial = torch.from_numpy(fields.on(places, places))
    found = [initial[:, None]]
    if frames > 1:
        found.append(solve_navier_stokes(initial, forcing, viscosity, 0.5 * (frames - 1), step=0.02, record=frames - 1))
    return torch.cat(found, 1)[:, :, None, ::every, ::every].numpy()
