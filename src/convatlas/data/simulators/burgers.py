"""Burgers' equation on a circle of length 1: du/dt + u du/dx = viscosity d²u/dx²."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from convatlas.data.fields import FieldPairs
from convatlas.data.simulators.gaussian_fields import gaussian_field

__all__ = ["burgers", "solve_burgers"]

Array = npt.NDArray[Any]

#: Points of the grid on which the solution is computed, at least.
_FINE = 512


def solve_burgers(initial: Array, viscosity: float, time: float, *, courant: float = 0.5) -> Array:
    """Solve by Fourier series without aliases: the diffusion exactly, the rest by a Runge-Kutta method of order 4.

    Args:
        initial: u (samples, points) at time 0.
        viscosity: positive.
        time: of the solution.
        courant: points that the fastest sample moves in a step.

    Returns:
        u (samples, points) at ``time``.
    """
    points = initial.shape[-1]
    waves = 2 * np.pi * np.arange(points // 2 + 1)
    kept = np.arange(points // 2 + 1) < points / 3  # the rule of two thirds
    steps = max(1, math.ceil(time * points * float(np.abs(initial).max(initial=0)) / courant))
    step = time / steps
    half = np.exp(-viscosity * waves**2 * step / 2)

    def change(spectrum: Array) -> Array:
        u = np.fft.irfft(spectrum, points)
        return -0.5j * waves * kept * np.fft.rfft(u * u)

    spectrum = np.fft.rfft(initial) * kept
    for _ in range(steps):
        a = change(spectrum)
        b = change(half * (spectrum + step / 2 * a))
        c = change(half * spectrum + step / 2 * b)
        d = change(half**2 * spectrum + step * half * c)
        spectrum = half**2 * spectrum + step / 6 * (half**2 * a + 2 * half * (b + c) + d)
    return np.fft.irfft(spectrum, points)


def burgers(samples: int, resolution: int, seed: int, *, viscosity: float = 0.01, time: float = 1.0) -> FieldPairs:
    """Pairs of u at time 0 and at ``time``, each (samples, 1, resolution).

    Li, Kovachki et al., ICLR 2021, arXiv 2010.08895, appendix A.3: the beginnings have covariance
    625 (25 - Laplacian) ** -2. The solution is computed on 512 points or more and read on the grid asked for.

    Args:
        samples: how many.
        resolution: points of the circle.
        seed: the same seed gives the same functions at each resolution.
        viscosity: of the fluid.
        time: between the two.
    """
    fields = gaussian_field(samples, 1, np.random.default_rng(seed), scale=625, shift=25, power=2, modes=64)
    every = max(1, -(-_FINE // resolution))
    initial = fields.on(np.arange(every * resolution) / (every * resolution))
    final = solve_burgers(initial, viscosity, time)
    return FieldPairs(initial[:, None, ::every], final[:, None, ::every])
