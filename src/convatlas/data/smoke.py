"""Smoke on a staggered grid in 2-D and 3-D, past solids of any shape that may move: a source of pressure systems.

As in the examples of Kaneda et al. (arXiv 2205.10763): semi-Lagrangian advection, buoyancy and a projection
onto velocities without divergence; the method is that of Stam: "Stable Fluids", SIGGRAPH 1999, and Bridson: "Fluid
Simulation for Computer Graphics". Whoever runs the simulation says how pressure systems are solved.

Axes are (H, W) or (D, H, W); up is towards row 0. Lengths are in cells, times in steps, and a speed of 1 is a cell a
step. Velocities stand on the faces between cells, all else in their middles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from convatlas.data.linear_systems import GridSystem

__all__ = ["Distance", "Obstacle", "Scene", "SmokeSimulator", "box", "plume", "plume_past", "sphere", "torus"]

Array = npt.NDArray[np.float64]
#: Signed distance to a solid of points (dims, ...) in cells, negative inside.
Distance = Callable[[Array], Array]
#: Gives the pressure (*shape) of a system.
Solve = Callable[[GridSystem], npt.NDArray[np.floating]]


def sphere(centre: Sequence[float], radius: float) -> Distance:
    """A ball, or a disc in 2-D."""
    return lambda points: _length(points - _column(centre, points)) - radius


def box(centre: Sequence[float], half_sizes: Sequence[float]) -> Distance:
    """A box along the axes."""

    def distance(points: Array) -> Array:
        beyond = np.abs(points - _column(centre, points)) - _column(half_sizes, points)
        outside: Array = _length(np.maximum(beyond, 0)) + np.minimum(beyond.max(0), 0)
        return outside

    return distance


def torus(centre: Sequence[float], radius: float, thickness: float) -> Distance:
    """A torus that lies flat, around the vertical; a ring in 2-D."""

    def distance(points: Array) -> Array:
        away = points - _column(centre, points)
        if len(away) == 2:
            return np.abs(_length(away) - radius) - thickness
        ring = _length(away[[0, 2]]) - radius
        return _length(np.stack([ring, away[1]])) - thickness

    return distance


def _length(points: Array) -> Array:
    squares: Array = np.square(points).sum(0)
    return np.sqrt(squares)


def _column(values: Sequence[float], points: Array) -> Array:
    return np.asarray(values, np.float64).reshape(-1, *(1,) * (points.ndim - 1))


@dataclass(frozen=True)
class Obstacle:
    """A solid.

    Attributes:
        distance: its signed distance at the beginning.
        velocity: along each axis, in cells a step; zero when left out.
    """

    distance: Distance
    velocity: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Scene:
    """What happens in the box.

    Attributes:
        shape: cells, (H, W) or (D, H, W).
        source: signed distance to where smoke is held at density 1 and moves up.
        obstacles: the solids.
        boundary: ``neumann`` (wall) or ``dirichlet`` (open) for the low and high side of each axis; by default the box
            is closed but for its top.
        inflow: speed of the smoke in the source.
        buoyancy: acceleration of smoke of density 1.

    Raises:
        ValueError: the shape is not 2-D or 3-D, or an obstacle's velocity has another number of axes.
    """

    shape: tuple[int, ...]
    source: Distance
    obstacles: tuple[Obstacle, ...] = ()
    boundary: tuple[tuple[str, str], ...] = ()
    inflow: float = 1.0
    buoyancy: float = 0.02

    def __post_init__(self) -> None:
        dims = len(self.shape)
        if dims not in (2, 3) or min(self.shape) < 2:
            raise ValueError(f"shape must be two or three sizes of at least 2, got {self.shape}")
        for obstacle in self.obstacles:
            if obstacle.velocity is not None and len(obstacle.velocity) != dims:
                raise ValueError(f"velocity must have {dims} values, got {obstacle.velocity}")
        if not self.boundary:
            walls = [("neumann", "neumann")] * dims
            walls[dims - 2] = ("dirichlet", "neumann")
            object.__setattr__(self, "boundary", tuple(walls))
        if len(self.boundary) != dims or any(
            wall not in ("dirichlet", "neumann") for pair in self.boundary for wall in pair
        ):
            raise ValueError(f"boundary must be a pair of dirichlet or neumann for each axis, got {self.boundary}")


def plume(shape: Sequence[int]) -> Scene:
    """Smoke that rises from the middle of the floor."""
    shape = tuple(shape)
    height, side = shape[-2], min(shape)
    middle = [size / 2 for size in shape]
    middle[-2] = 0.9 * height
    return Scene(shape, sphere(middle, max(0.12 * side, 1)), inflow=0.02 * height, buoyancy=0.0006 * height)


def plume_past(shape: Sequence[int], *obstacles: Obstacle) -> Scene:
    """The same past solids; past a ball in its way when none is given."""
    scene = plume(shape)
    middle = [size / 2 for size in scene.shape]
    middle[-2] = 0.55 * scene.shape[-2]
    given = obstacles or (Obstacle(sphere(middle, 0.15 * min(scene.shape))),)
    return Scene(scene.shape, scene.source, given, scene.boundary, scene.inflow, scene.buoyancy)


class SmokeSimulator:
    """A scene as it goes on.

    Args:
        scene: what happens.
        solve: gives the pressure of a system; see `convatlas.physics.linear_solvers.pressure_solver`.

    Attributes:
        density: of the smoke, (*shape).
        velocity: for each axis, on the faces: one more along that axis.
        pressure: of the last step, times the step, (*shape).
        time: steps so far.
    """

    def __init__(self, scene: Scene, solve: Solve) -> None:
        self.scene, self.solve = scene, solve
        shape = scene.shape
        self.density: Array = np.zeros(shape)
        self.velocity: list[Array] = [np.zeros(_faces(shape, axis)) for axis in range(len(shape))]
        self.pressure: Array = np.zeros(shape)
        self.time = 0

    def run(self, steps: int) -> Iterator[GridSystem]:
        """Go on step by step; gives the pressure system of each."""
        for _ in range(steps):
            yield self.step()

    def step(self) -> GridSystem:
        """Advance by one step and give the pressure system that was solved in it.

        Raises:
            ValueError: ``solve`` gives a pressure of another shape, or one that is not finite.
        """
        scene = self.scene
        self._advect()
        self._source()
        up = len(scene.shape) - 2
        lift = scene.buoyancy * self._between(self.density, up)
        self.velocity[up] -= lift
        self.time += 1
        solid = self._solid()
        self._hold_solids(solid)
        system = self._system(solid)
        pressure = np.asarray(self.solve(system), np.float64)
        if pressure.shape != scene.shape or not np.isfinite(pressure).all():
            raise ValueError(f"solve must give a finite pressure {scene.shape}, got {pressure.shape}")
        self.pressure = np.where(system.fluid, pressure, 0)
        self._project(system.fluid)
        self.density[~system.fluid] = 0
        return system

    def divergence(self) -> Array:
        """What flows out of each cell, (*shape)."""
        flows = [np.diff(velocity, axis=axis) for axis, velocity in enumerate(self.velocity)]
        total: Array = np.sum(flows, axis=0)
        return total

    # The parts of a step

    def _advect(self) -> None:
        shape = self.scene.shape
        density = _sample(self.density, self._back(_middles(shape)), None)
        self.velocity = [
            _sample(velocity, self._back(_middles(shape, axis)), axis) for axis, velocity in enumerate(self.velocity)
        ]
        self.density = density

    def _back(self, points: Array) -> Array:
        """Where the fluid at some points was a step before, by the midpoint rule."""
        return points - self._at(points - 0.5 * self._at(points))

    def _at(self, points: Array) -> Array:
        return np.stack([_sample(velocity, points, axis) for axis, velocity in enumerate(self.velocity)])

    def _source(self) -> None:
        scene = self.scene
        self.density[scene.source(_middles(scene.shape)) < 0] = 1
        for axis, velocity in enumerate(self.velocity):
            inside = scene.source(_middles(scene.shape, axis)) < 0
            velocity[inside] = -scene.inflow if axis == len(scene.shape) - 2 else 0

    @staticmethod
    def _between(values: Array, axis: int) -> Array:
        """Means of neighbours, on the faces of an axis."""
        wide = np.pad(values, [(1, 1) if other == axis else (0, 0) for other in range(values.ndim)], mode="edge")
        size = values.shape[axis] + 1
        return 0.5 * (np.take(wide, range(size), axis) + np.take(wide, range(1, size + 1), axis))

    def _solid(self) -> list[npt.NDArray[np.bool_]]:
        """The cells of each obstacle."""
        points = _middles(self.scene.shape)
        return [
            obstacle.distance(points - _column(obstacle.velocity or (0,) * len(points), points) * self.time) < 0
            for obstacle in self.scene.obstacles
        ]

    def _hold_solids(self, solids: Sequence[npt.NDArray[np.bool_]]) -> None:
        """What is next to a solid moves with it across its surface; nothing passes a wall."""
        for axis, velocity in enumerate(self.velocity):
            for obstacle, solid in zip(self.scene.obstacles, solids, strict=True):
                touched = self._between(solid.astype(np.float64), axis) > 0
                velocity[touched] = 0.0 if obstacle.velocity is None else obstacle.velocity[axis]
            for wall, face in zip(self.scene.boundary[axis], (0, -1), strict=True):
                if wall == "neumann":
                    np.moveaxis(velocity, axis, 0)[face] = 0

    def _system(self, solids: Sequence[npt.NDArray[np.bool_]]) -> GridSystem:
        fluid = np.ones(self.scene.shape, np.bool_)
        for solid in solids:
            fluid &= ~solid
        b = np.where(fluid, -self.divergence(), 0)
        air = np.zeros(self.scene.shape, np.bool_)
        name = f"smoke_{'x'.join(map(str, self.scene.shape))}_{self.time:04d}"
        return GridSystem(name, b, fluid, air, self.scene.boundary)

    def _project(self, fluid: npt.NDArray[np.bool_]) -> None:
        for axis, velocity in enumerate(self.velocity):
            ends = [(1, 1) if other == axis else (0, 0) for other in range(fluid.ndim)]
            pressure, inside = np.pad(self.pressure, ends), np.pad(fluid, ends)
            for wall, face in zip(self.scene.boundary[axis], (0, -1), strict=True):
                np.moveaxis(inside, axis, 0)[face] = wall == "dirichlet"
            size = velocity.shape[axis]
            low, high = (slice(0, size), slice(1, size + 1))
            both = np.moveaxis(inside, axis, 0)[low] & np.moveaxis(inside, axis, 0)[high]
            slope = np.moveaxis(pressure, axis, 0)[high] - np.moveaxis(pressure, axis, 0)[low]
            np.moveaxis(velocity, axis, 0)[...] -= np.where(both, slope, 0)


def _faces(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return tuple(size + (other == axis) for other, size in enumerate(shape))


def _middles(shape: tuple[int, ...], axis: int | None = None) -> Array:
    """Points (dims, ...) in the middles of the cells, or of the faces of an axis."""
    sizes = shape if axis is None else _faces(shape, axis)
    lines = [np.arange(size) + (0.0 if other == axis else 0.5) for other, size in enumerate(sizes)]
    return np.stack(np.meshgrid(*lines, indexing="ij"))


def _sample(values: Array, points: Array, axis: int | None) -> Array:
    """Linear interpolation of what stands in cells, or on the faces of an axis."""
    offsets = [0.0 if other == axis else 0.5 for other in range(len(points))]
    found: Array = ndimage.map_coordinates(values, points - _column(offsets, points), order=1, mode="nearest")
    return found
