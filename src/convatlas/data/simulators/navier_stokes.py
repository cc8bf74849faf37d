"""Incompressible flow on the unit torus by its vorticity: dw/dt + (velocity . grad) w = viscosity Laplacian(w) + f."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from convatlas.data.fields import FieldPairs
from convatlas.data.simulators.gaussian_fields import gaussian_field

__all__ = ["navier_stokes", "navier_stokes_forcing", "solve_navier_stokes"]

#: Points of each axis of the grid on which solutions are computed, at least.
_FINE = 64
#: Samples that are solved together.
_TOGETHER = 32


def solve_navier_stokes(
    initial: Tensor,
    forcing: Tensor,
    viscosity: float,
    time: float,
    *,
    step: float = 5e-3,
    record: int = 1,
    advance: Callable[[], None] | None = None,
) -> Tensor:
    """Solve by Fourier series: diffusion by Crank and Nicolson, advection by Adams and Bashforth (order 2), dealiased.

    Args:
        initial: vorticity w (samples, n, n) at time 0; the first axis is x.
        forcing: f (n, n) or (samples, n, n), the curl of the force; it does not change in time.
        viscosity: not negative.
        time: of the solution.
        step: longest step in time; it is stable while a step moves the fluid by less than a point or so.
        record: how many times to return, at equal distances; the last is ``time``.
        advance: called after each step.

    Returns:
        Vorticity (samples, record, n, n).

    Raises:
        ValueError: the solution is no longer finite: the step is too long.
    """
    points = initial.shape[-1]
    full = torch.fft.fftfreq(points, 1 / points, dtype=initial.dtype, device=initial.device)[:, None]
    half = torch.arange(points // 2 + 1, dtype=initial.dtype, device=initial.device)[None]
    kept = (full.abs() < points / 3) & (half < points / 3)
    laplacian = -4 * math.pi**2 * (full**2 + half**2)
    inverse = torch.where(laplacian == 0, 0, 1 / laplacian.where(laplacian != 0, 1))
    d_x, d_y = (2j * math.pi * wave * kept for wave in (full, half))
    steps = record * max(1, math.ceil(time / step / record - 1e-9))
    step = time / steps

    def change(w: Tensor) -> Tensor:
        # Of the stream function -Laplacian(psi) = w; velocity (dpsi/dy, -dpsi/dx).
        psi = -w * inverse
        velocity_x, velocity_y = (
            torch.fft.irfft2(d_y * psi, (points, points)),
            torch.fft.irfft2(-d_x * psi, (points, points)),
        )
        moved = velocity_x * torch.fft.irfft2(d_x * w, (points, points)) + velocity_y * torch.fft.irfft2(
            d_y * w, (points, points)
        )
        return (force - torch.fft.rfft2(moved)) * kept

    force = torch.fft.rfft2(forcing)
    w = torch.fft.rfft2(initial)
    decay = viscosity * step / 2 * laplacian
    before: Tensor | None = None
    found = []
    for number in range(1, steps + 1):
        now = change(w)
        if before is None:  # a first step of order 2: the slope in its middle
            middle = change(w + step / 2 * (now + viscosity * laplacian * w))
            slope = middle
        else:
            slope = 1.5 * now - 0.5 * before
        w = ((1 + decay) * w + step * slope) / (1 - decay)
        before = now
        if number % (steps // record) == 0:
            found.append(torch.fft.irfft2(w, (points, points)))
        if advance is not None:
            advance()
    result = torch.stack(found, 1)
    if not result.isfinite().all():
        raise ValueError(f"step must be shorter for a flow this fast: with {step:g} the solution is not finite")
    return result


def navier_stokes(
    samples: int, resolution: int, seed: int, *, viscosity: float = 1e-3, time: float = 5.0
) -> FieldPairs:
    """Pairs of the vorticity at time 0 and at ``time`` of a flow under a fixed force.

    Li, Kovachki et al.: "Fourier Neural Operator for Parametric Partial Differential Equations", ICLR 2021, arXiv
    2010.08895, section 5.3: beginnings of covariance 7 ** 1.5 (49 - Laplacian) ** -2.5 and the force
    0.1 (sin(2 pi (x + y)) + cos(2 pi (x + y))). Solutions are computed on 64 x 64 points or more.

    Args:
        samples: how many.
        resolution: points of each axis.
        seed: the same seed gives the same flows at each resolution.
        viscosity: of the fluid.
        time: between the two; the published data have 50 at this viscosity.
    """
    fields = gaussian_field(samples, 2, np.random.default_rng(seed), scale=7**1.5, shift=49, power=2.5, modes=20)
    places, every = _grid(resolution)
    angle = 2 * np.pi * (places[:, None] + places[None])
    forcing = torch.from_numpy(0.1 * (np.sin(angle) + np.cos(angle)))
    initial = torch.from_numpy(fields.on(places, places))
    final = [solve_navier_stokes(some, forcing, viscosity, time, step=0.01)[:, -1] for some in initial.split(_TOGETHER)]
    return FieldPairs(initial[:, None, ::every, ::every].numpy(), torch.cat(final)[:, None, ::every, ::every].numpy())


def navier_stokes_forcing(
    samples: int, resolution: int, seed: int, *, viscosity: float = 1e-3, time: float = 5.0
) -> FieldPairs:
    """Pairs of a random force and the vorticity that it has made of a fluid at rest after ``time``.

    Kossaifi et al.: "Multi-Grid Tensorized Fourier Neural Operator", TMLR 2024, has data of this kind; forces here have
    covariance 27 (9 - Laplacian) ** -4, smooth on the scale of the torus.

    Args:
        samples: how many.
        resolution: points of each axis.
        seed: the same seed gives the same flows at each resolution.
        viscosity: of the fluid.
        time: for which the force acts.
    """
    fields = gaussian_field(samples, 2, np.random.default_rng(seed), scale=27e3, shift=9, power=4, modes=12)
    places, every = _grid(resolution)
    forcing = torch.from_numpy(fields.on(places, places))
    final = [
        solve_navier_stokes(torch.zeros_like(some), some, viscosity, time, step=0.01)[:, -1]
        for some in forcing.split(_TOGETHER)
    ]
    return FieldPairs(forcing[:, None, ::every, ::every].numpy(), torch.cat(final)[:, None, ::every, ::every].numpy())


def _grid(resolution: int) -> tuple[np.ndarray, int]:
    every = max(1, -(-_FINE // resolution))
    return np.arange(every * resolution) / (every * resolution), every
