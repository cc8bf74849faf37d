"""Smoke: the projection leaves no divergence, solids are held, and pictures of physics come out right."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from convatlas.data.smoke import Obstacle, Scene, SmokeSimulator, box, plume, plume_past, sphere, torus
from convatlas.physics.dcdm import dcdm
from convatlas.physics.linear_solvers import IncompleteCholesky, SolveResult, cg, pcg, pressure_solver

EXACT = pressure_solver(partial(cg, tol=1e-12))
MOVING = Obstacle(sphere((5, 8), 3), velocity=(0.0, 0.25))


@pytest.mark.parametrize(
    "scene",
    [
        plume((12, 10)),
        plume_past((16, 12)),
        plume_past((14, 16), MOVING, Obstacle(box((10, 3), (1, 2)))),
        plume_past((6, 10, 8)),
        plume_past((8, 12, 8), Obstacle(torus((4, 6, 4), 1.8, 0.8), velocity=(0.0, -0.2, 0.1))),
    ],
    ids=["plume", "ball", "moving", "volume", "moving torus"],
)
def test_no_divergence_and_held_solids(scene: Scene):
    simulator = SmokeSimulator(scene, EXACT)
    for system in simulator.run(6):
        inside = system.fluid
        assert np.abs(simulator.divergence()[inside]).max() < 1e-10
        assert np.abs(system.b[inside]).max() > 0
        assert system.b[~inside].sum() == 0
        assert simulator.density.min() >= 0
        assert simulator.density.max() <= 1 + 1e-12
        for axis, (velocity, walls) in enumerate(zip(simulator.velocity, scene.boundary, strict=True)):
            for wall, face in zip(walls, (0, -1), strict=True):
                edge = np.moveaxis(velocity, axis, 0)[face]
                assert wall == "dirichlet" or np.abs(edge).max() == 0
    if len(scene.obstacles) == 1:
        (obstacle,) = scene.obstacles
        for axis, velocity in enumerate(simulator.velocity):
            rows = np.moveaxis(velocity, axis, 0)
            touched = np.moveaxis(~system.fluid, axis, 0)
            speed = 0.0 if obstacle.velocity is None else obstacle.velocity[axis]
            np.testing.assert_allclose(rows[1:][touched], speed)
            np.testing.assert_allclose(rows[:-1][touched], speed)


def test_smoke_rises():
    simulator = SmokeSimulator(plume((32, 24)), EXACT)

    def height() -> float:
        rows = simulator.density.sum(1)
        return float((rows * np.arange(32)).sum() / rows.sum())

    simulator.step()
    start, smoke = height(), simulator.density.sum()
    for _ in simulator.run(15):
        pass
    assert height() < start - 1
    assert simulator.density.sum() > smoke
    np.testing.assert_allclose(simulator.density, simulator.density[:, ::-1], atol=1e-9)  # as the scene


def test_a_uniform_wind_carries_smoke_without_change():
    walls = (("dirichlet", "dirichlet"), ("dirichlet", "dirichlet"))
    simulator = SmokeSimulator(Scene((8, 16), sphere((-9, -9), 1), boundary=walls), EXACT)
    simulator.velocity[1][:] = 1.0
    simulator.density[:, 3:5] = 1.0
    for _ in simulator.run(4):
        pass
    expected = np.zeros((8, 16))
    expected[:, 7:9] = 1.0
    # It is lifted by its buoyancy, but not in its middle rows.
    np.testing.assert_allclose(simulator.density[4], expected[4], atol=0.02)
    assert simulator.time == 4


def test_any_solver_gives_the_pressure():
    results: list[SolveResult] = []

    def by_factor(A: Any, b: Any) -> SolveResult:
        factor = IncompleteCholesky(A)
        return dcdm(A, b, factor, tol=1e-9)

    simulators = [
        SmokeSimulator(plume_past((12, 10)), pressure_solver(by_factor, results=results)),
        SmokeSimulator(plume_past((12, 10)), pressure_solver(lambda A, b: pcg(A, b, IncompleteCholesky(A), tol=1e-9))),
    ]
    for _ in range(3):
        systems = [simulator.step() for simulator in simulators]
    assert len(results) == 3
    assert all(result.converged for result in results)
    assert systems[0].name == "smoke_12x10_0003"
    np.testing.assert_allclose(simulators[0].pressure, simulators[1].pressure, atol=1e-7)


def test_distances():
    points = np.array([[2.0, 0.0], [0.0, 5.0], [0.0, 0.0]])  # columns are points
    np.testing.assert_allclose(sphere((0, 0, 0), 1)(points), [1, 4])
    np.testing.assert_allclose(box((0, 0, 0), (1, 1, 1))(points), [1, 4])
    np.testing.assert_allclose(box((0, 0, 0), (3, 2, 1))(points[:, :1]), [-1])
    np.testing.assert_allclose(torus((0, 0, 0), 2, 0.5)(points), [-0.5, np.hypot(2, 5) - 0.5])
    np.testing.assert_allclose(torus((0, 0), 2, 0.5)(points[:2]), [-0.5, 2.5])


def test_mistakes_are_told():
    with pytest.raises(ValueError, match=r"shape must be two or three sizes of at least 2, got \(4,\)"):
        Scene((4,), sphere((1,), 1))
    with pytest.raises(ValueError, match=r"velocity must have 2 values, got \(1.0,\)"):
        plume_past((4, 4), Obstacle(sphere((1, 1), 1), velocity=(1.0,)))
    with pytest.raises(ValueError, match="boundary must be a pair of dirichlet or neumann for each axis"):
        Scene((4, 4), sphere((1, 1), 1), boundary=(("wall", "neumann"),) * 2)
    with pytest.raises(ValueError, match=r"solve must give a finite pressure \(4, 4\), got \(2,\)"):
        SmokeSimulator(plume((4, 4)), lambda system: np.zeros(2)).step()
