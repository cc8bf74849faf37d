"""Volumes that look like heads and are known exactly: ellipsoids with textures, in the manner of Shepp and Logan.

Shepp, Logan: "The Fourier reconstruction of a head section", IEEE Transactions on Nuclear Science 1974.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["phantom"]

_INNER = (9, 14)
#: Voxels over which the surface of an ellipsoid goes from outside to inside.
_SURFACE = 0.6


def phantom(
    size: int | tuple[int, int, int], generator: np.random.Generator, *, texture: float = 0.08
) -> npt.NDArray[np.float32]:
    """A skull with a brain of nine to thirteen turned ellipsoids, each with a level and a texture of its own.

    Args:
        size: voxels of each side, or of all.
        generator: draws everything.
        texture: standard deviation of the textures.

    Returns:
        (D, H, W) in [0, 1], 0 outside the skull.

    Raises:
        ValueError: a side is shorter than 8 voxels, or texture is negative.
    """
    sides = (size,) * 3 if isinstance(size, int) else tuple(size)
    if len(sides) != 3 or min(sides) < 8:
        raise ValueError(f"size must be at least 8 voxels a side, got {size}")
    if texture < 0:
        raise ValueError(f"texture must not be negative, got {texture}")
    axes = [np.linspace(-1, 1, side, dtype=np.float32) for side in sides]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"))
    step = 2 / min(sides)
    radii = generator.uniform(0.78, 0.92, 3)
    volume = 0.9 * _inside(grid, np.zeros(3), radii, np.eye(3), step)
    brain = _inside(grid, np.zeros(3), radii - 0.12, np.eye(3), step)
    volume += brain * (0.45 + _texture(grid, generator, texture) - volume)
    for _ in range(generator.integers(*_INNER)):
        centre = generator.uniform(-0.5, 0.5, 3) * radii
        own = _inside(grid, centre, generator.uniform(0.08, 0.4, 3), _rotation(generator), step) * brain
        level = generator.uniform(0.1, 0.85)
        volume += own * (level + _texture(grid, generator, texture) - volume)
    return np.clip(volume, 0, 1).astype(np.float32)


def _inside(
    grid: npt.NDArray[np.float32],
    centre: npt.NDArray[np.float64],
    radii: npt.NDArray[np.float64],
    turn: object,
    step: float,
) -> npt.NDArray[np.float64]:
    """How far each voxel lies within an ellipsoid, from 0 to 1, with a surface of less than a voxel."""
    away = np.einsum("ij,j...->i...", turn, grid - centre[:, None, None, None])  # type: ignore[call-overload]
    distance = (np.sqrt(((away / radii[:, None, None, None]) ** 2).sum(0)) - 1) * radii.min()
    inside: npt.NDArray[np.float64] = 1 / (1 + np.exp(np.clip(distance / (_SURFACE * step), -30, 30)))
    return inside


def _texture(grid: npt.NDArray[np.float32], generator: np.random.Generator, level: float) -> npt.NDArray[np.float64]:
    """Waves of three directions, some of them too fine for half the resolution."""
    waves = np.zeros(grid.shape[1:])
    highest = 0.35 * np.pi * min(grid.shape[1:])
    for _ in range(3):
        direction = generator.normal(size=3)
        frequency = generator.uniform(0.15, 1) * highest * direction / np.linalg.norm(direction)
        waves += np.sin(np.tensordot(frequency, grid, 1) + generator.uniform(0, 2 * np.pi))
    scaled: npt.NDArray[np.float64] = level * waves / np.sqrt(1.5)
    return scaled


def _rotation(generator: np.random.Generator) -> npt.NDArray[np.float64]:
    turn, triangle = np.linalg.qr(generator.normal(size=(3, 3)))
    rotation: npt.NDArray[np.float64] = turn * np.sign(np.diag(triangle))
    return rotation
