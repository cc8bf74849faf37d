"""Poisson's equation on the unit interval, square or cube: -Laplacian(u) = f with u = 0 at the boundary."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.fft import dstn, idstn

from convatlas.data.fields import FieldPairs
from convatlas.data.simulators.gaussian_fields import gaussian_field

__all__ = ["poisson", "solve_poisson"]

Array = npt.NDArray[Any]


def solve_poisson(source: Array, dims: int) -> Array:
    """Solve by the sine series through the inner points, exact for every f that the series of the grid represents.

    Args:
        source: f (samples, *grid) at equal distances from boundary to boundary, both included.
        dims: axes of position.

    Returns:
        u of the same shape.
    """
    inside = (slice(None), *[slice(1, -1)] * dims)
    axes = tuple(range(1, dims + 1))
    squares = sum(
        np.meshgrid(*[(np.pi * np.arange(1, size - 1)) ** 2 for size in source.shape[1:]], indexing="ij", sparse=True)
    )
    solution = np.zeros_like(source)
    solution[inside] = idstn(dstn(source[inside], type=1, axes=axes) / squares, type=1, axes=axes)
    return solution


def poisson(samples: int, resolution: int, seed: int, *, dims: int = 2) -> FieldPairs:
    """Pairs of a random source f and the solution u, each (samples, 1, *grid), boundary included.

    The solutions are computed on a grid at least four times as fine as the coarsest that is sensible, and read on the
    one asked for, so that all resolutions show the same functions.

    Args:
        samples: how many.
        resolution: points of each axis, at least 3.
        seed: the same seed gives the same functions at each resolution.
        dims: axes of position, 1 to 3.
    """
    fields = gaussian_field(samples, dims, np.random.default_rng(seed), scale=1e4, shift=25, power=2, modes=16)
    every = max(1, -(-64 // (resolution - 1)))
    places = np.linspace(0, 1, every * (resolution - 1) + 1)
    source = fields.on(*[places] * dims)
    read = (slice(None), *[slice(None, None, every)] * dims)
    return FieldPairs(source[read][:, None], solve_poisson(source, dims)[read][:, None])
