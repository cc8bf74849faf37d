"""Simulated equations against solutions that are known or refined, and the same functions at every resolution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from convatlas.data.simulators import SIMULATORS
from convatlas.data.simulators.burgers import solve_burgers
from convatlas.data.simulators.darcy import solve_darcy
from convatlas.data.simulators.gaussian_fields import gaussian_field
from convatlas.data.simulators.navier_stokes import solve_navier_stokes
from convatlas.data.simulators.poisson import solve_poisson


def test_gaussian_fields_have_their_covariance():
    places = np.arange(32) / 32
    for boundary in ("periodic", "neumann"):
        random = np.random.default_rng(0)
        field = gaussian_field(4000, 1, random, scale=9, shift=4, power=1.5, boundary=boundary, modes=10)
        values = field.on(places)
        waves = (2 * np.pi if boundary == "periodic" else np.pi) * np.arange(1, 11)
        spectrum = 9 * (waves**2 + 4) ** -1.5
        # Mean of the variance over the circle; the cosines at one place.
        if boundary == "periodic":
            expected, found = 2 * spectrum.sum(), values.var(0).mean()
        else:
            expected, found = (2 * spectrum * np.cos(waves * places[5]) ** 2).sum(), values[:, 5].var()
        assert found == pytest.approx(expected, rel=0.1)
        assert abs(values.mean()) < 0.05


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_poisson_of_sines(dims: int):
    axes = np.meshgrid(*[np.linspace(0, 1, 9 + 2 * axis) for axis in range(dims)], indexing="ij")
    waves = [axis + 1 for axis in range(dims)]
    u = np.prod([np.sin(k * np.pi * x) for k, x in zip(waves, axes, strict=True)], axis=0)
    source = sum(k**2 for k in waves) * np.pi**2 * u
    np.testing.assert_allclose(solve_poisson(source[None], dims)[0], u, atol=1e-12)


def test_darcy_converges_with_order_two():
    # u = sin(pi x) sin(pi y) with a = 2 + x y: the right-hand side follows from -div(a grad u).
    errors = []
    for points in (17, 33):
        x, y = np.meshgrid(*[np.linspace(0, 1, points)] * 2, indexing="ij")
        a, u = 2 + x * y, np.sin(np.pi * x) * np.sin(np.pi * y)
        grown = y * np.cos(np.pi * x) * np.sin(np.pi * y) + x * np.sin(np.pi * x) * np.cos(np.pi * y)
        errors.append(np.abs(solve_darcy(a, 2 * np.pi**2 * a * u - np.pi * grown) - u).max())
    assert errors[1] < 0.3 * errors[0] < 0.01


def test_darcy_across_phases_follows_the_refined_solution():
    def solution(points: int) -> np.ndarray:
        x, y = np.meshgrid(*[np.linspace(0, 1, points)] * 2, indexing="ij")
        medium = np.where(x + 0.4 * y < 0.51, 12.0, 3.0)
        return solve_darcy(medium, np.ones_like(medium))[:: (points - 1) // 10, :: (points - 1) // 10]

    fine = solution(161)
    errors = [np.linalg.norm(solution(points) - fine) / np.linalg.norm(fine) for points in (11, 41)]
    assert errors[1] < 0.5 * errors[0] < 0.05


def test_burgers_follows_cole_and_hopf():
    # u = -2 viscosity phi_x / phi with phi = 1 + b cos(2 pi x) exp(-4 pi² viscosity t) solves it.
    x, viscosity, wave = np.arange(128) / 128, 0.02, 2 * np.pi

    def exact(time: float) -> np.ndarray:
        amplitude = 0.7 * math.exp(-(wave**2) * viscosity * time)
        return 2 * viscosity * amplitude * wave * np.sin(wave * x) / (1 + amplitude * np.cos(wave * x))

    np.testing.assert_allclose(solve_burgers(exact(0)[None], viscosity, 0.5)[0], exact(0.5), atol=1e-8)


def test_vortices_of_taylor_and_green_decay():
    x = torch.arange(16, dtype=torch.float64) / 16
    w = (torch.sin(2 * math.pi * x)[:, None] * torch.sin(2 * math.pi * x)[None])[None]
    found = solve_navier_stokes(w, torch.zeros(16, 16, dtype=torch.float64), 0.01, 0.5, step=0.005, record=2)
    for number in (1, 2):
        expected = w * math.exp(-8 * math.pi**2 * 0.01 * 0.25 * number)
        torch.testing.assert_close(found[:, number - 1], expected, rtol=1e-5, atol=1e-6)


def test_flows_converge_with_order_two_and_keep_energy_without_viscosity():
    field = gaussian_field(2, 2, np.random.default_rng(0), scale=2 * 7**3, shift=49, power=2.5, modes=5)
    w = torch.from_numpy(field.on(*[np.arange(32) / 32] * 2))
    still = torch.zeros(32, 32, dtype=torch.float64)
    long, half, short = (solve_navier_stokes(w, still, 1e-3, 0.4, step=s)[:, -1] for s in (0.04, 0.02, 0.005))
    assert (half - short).norm() < 0.3 * (long - short).norm()
    # Neither mean nor, without viscosity, energy and enstrophy change.
    moved = solve_navier_stokes(w, still, 0.0, 0.2, step=0.002)[:, -1]
    assert moved.mean().abs() < 1e-12
    torch.testing.assert_close(moved.square().mean(), w.square().mean(), rtol=1e-4, atol=0)
    assert (moved - w).norm() > 0.01 * w.norm()


def test_a_step_that_is_too_long_is_told():
    w = 1e3 * torch.randn(1, 16, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match="step must be shorter"):
        solve_navier_stokes(w, torch.zeros_like(w), 0.0, 100.0, step=1.0)


@pytest.mark.parametrize("name", sorted(SIMULATORS))
def test_every_resolution_shows_the_same_functions(name: str):
    ends = name in ("poisson", "darcy")  # grids from boundary to boundary
    coarse, fine = (SIMULATORS[name](2, size, 3) for size in ((17, 33) if ends else (16, 32)))
    every = (slice(None), slice(None), *[slice(None, None, 2)] * len(coarse.grid))
    np.testing.assert_allclose(coarse.x, fine.x[every], atol=1e-12)
    assert coarse.y.shape[1:] == (1, *coarse.grid)
    error = np.linalg.norm(coarse.y - fine.y[every]) / np.linalg.norm(coarse.y)
    assert error < (0.1 if name == "darcy" else 1e-8)  # the jumps of the medium lie between other points
    other = SIMULATORS[name](2, 17, 4)
    assert not np.allclose(other.x.ravel()[:200], SIMULATORS[name](2, 17, 3).x.ravel()[:200])
