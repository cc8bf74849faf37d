"""Simulated clouds: solids with normals, and scenes of ground, walls, boxes and balls with a class for each point."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from convatlas.data.points import Cloud
from convatlas.errors import unknown

__all__ = ["SCENE_CLASSES", "SOLIDS", "scene", "solid"]

Array = npt.NDArray[np.float64]

#: Names of the solids.
SOLIDS = ("sphere", "cube", "cone", "torus", "cylinder", "pyramid")
#: Names of the classes of points in a scene.
SCENE_CLASSES = ("ground", "wall", "box", "ball")


def solid(kind: str, *, points: int = 1024, noise: float = 0.02, seed: int = 0) -> Cloud:
    """Points on the surface of a solid of about unit size, with its normals as features.

    It is turned about z and scaled on each axis by 0.8 to 1.2 at random.

    Args:
        kind: one of `SOLIDS`.
        points: how many.
        noise: standard deviation of what is added to every coordinate.
        seed: of everything that is random.

    Raises:
        UnknownName: there is no such solid.
    """
    if kind not in SOLIDS:
        raise unknown("solid", kind, SOLIDS)
    generator = np.random.default_rng(seed)
    places, normals = _surface(kind, points, generator)
    scale = generator.uniform(0.8, 1.2, 3)
    places, normals = places * scale, normals / scale
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    angle = generator.uniform(0, 2 * math.pi)
    turn = np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])
    places = places @ turn.T + noise * generator.standard_normal(places.shape)
    return Cloud(places.astype(np.float32), (normals @ turn.T).astype(np.float32))


def _surface(kind: str, count: int, generator: np.random.Generator) -> tuple[Array, Array]:
    around = generator.uniform(0, 2 * math.pi, count)
    ring = np.stack([np.cos(around), np.sin(around), np.zeros(count)], 1)
    up = np.array([0.0, 0.0, 1.0])
    if kind == "sphere":
        normals = generator.standard_normal((count, 3))
        normals /= np.linalg.norm(normals, axis=1, keepdims=True)
        return 0.7 * normals, normals
    if kind == "cube":
        return _box(count, np.full(3, 0.6), generator)
    if kind == "torus":
        inner = generator.uniform(0, 2 * math.pi, count)
        normals = np.cos(inner)[:, None] * ring + np.sin(inner)[:, None] * up
        return 0.6 * ring + 0.25 * normals, normals
    # The others have a flat bottom at z = -0.6: a third of the points.
    low = generator.random(count) < 1 / 3
    if kind == "cylinder":
        height = generator.uniform(-0.6, 0.6, count)
        lid = generator.random(count) < 0.5
        radius = 0.5 * np.sqrt(generator.random(count))
        flat = radius[:, None] * ring + np.where(lid, 0.6, -0.6)[:, None] * up
        side = 0.5 * ring + height[:, None] * up
        return np.where(low[:, None], flat, side), np.where(low[:, None], np.where(lid, 1, -1)[:, None] * up, ring)
    # Cone and pyramid get narrower to the top at z = 0.6; a slant normal leans up.
    share = np.sqrt(generator.random(count))
    edge, outwards = (ring, ring) if kind == "cone" else _square(count, generator)
    size = np.where(low, np.sqrt(generator.random(count)), share)
    height = np.where(low, -0.6, 0.6 - 1.2 * share)
    places = 0.6 * size[:, None] * edge + height[:, None] * up
    slant = (outwards + 0.5 * up) / math.sqrt(1.25)
    return places, np.where(low[:, None], -up, slant)


def _square(count: int, generator: np.random.Generator) -> tuple[Array, Array]:
    """Points on the border of a square of half side 1, and its normals."""
    side = generator.integers(0, 4, count) * math.pi / 2
    along = generator.uniform(-1, 1, count)
    normals = np.stack([np.cos(side), np.sin(side), np.zeros(count)], 1)
    across = np.stack([-np.sin(side), np.cos(side), np.zeros(count)], 1)
    return normals + along[:, None] * across, normals


def _box(count: int, half: Array, generator: np.random.Generator) -> tuple[Array, Array]:
    axis = generator.integers(0, 3, count)
    sign = generator.choice([-1.0, 1.0], count)
    places = generator.uniform(-1, 1, (count, 3))
    normals = np.zeros((count, 3))
    normals[np.arange(count), axis] = sign
    places[np.arange(count), axis] = sign
    return places * half, normals


def scene(*, points: int = 4096, noise: float = 0.01, seed: int = 0) -> Cloud:
    """A ground of 6 m x 6 m with two walls, boxes and balls on it; the feature is an intensity that tells little.

    Args:
        points: how many in all.
        noise: standard deviation in metres of what is added to every coordinate.
        seed: of everything that is random.
    """
    generator = np.random.default_rng(seed)
    things = [("box", generator.uniform(0.3, 0.7)) for _ in range(generator.integers(2, 5))]
    things += [("ball", generator.uniform(0.3, 0.6)) for _ in range(generator.integers(2, 5))]
    share = points // (4 + len(things))
    places, labels = [], []

    def add(kind: str, part: Array) -> None:
        places.append(part)
        labels.append(np.full(len(part), SCENE_CLASSES.index(kind)))

    ground = generator.uniform(-3, 3, (points - (2 + len(things)) * share, 3))
    ground[:, 2] = 0.03 * np.sin(ground[:, 0] * generator.uniform(1, 3))
    add("ground", ground)
    for axis in (0, 1):
        wall = generator.uniform(-3, 3, (share, 3))
        wall[:, 2] = generator.uniform(0, 2, share)
        wall[:, axis] = generator.choice([-3.0, 3.0])
        add("wall", wall)
    for kind, size in things:
        centre = np.append(generator.uniform(-2.3, 2.3, 2), size)
        part = _box(share, np.full(3, size), generator)[0] if kind == "box" else generator.standard_normal((share, 3))
        part = part if kind == "box" else size * part / np.linalg.norm(part, axis=1, keepdims=True)
        add(kind, part + centre)
    every = np.concatenate(places) + noise * generator.standard_normal((points, 3))
    label = np.concatenate(labels)
    intensity = 0.5 + 0.02 * label[:, None] + 0.1 * generator.standard_normal((points, 1))
    order = generator.permutation(points)
    return Cloud(every[order].astype(np.float32), intensity[order].astype(np.float32), label[order].astype(np.int64))
