"""Darcy flow through a random medium: -div(a grad u) = 1 on the unit square with u = 0 at the boundary."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.sparse import diags_array
from scipy.sparse.linalg import spsolve

from convatlas.data.fields import FieldPairs
from convatlas.data.simulators.gaussian_fields import gaussian_field

__all__ = ["darcy", "solve_darcy"]

Array = npt.NDArray[Any]


def solve_darcy(permeability: Array, source: Array) -> Array:
    """Solve by finite volumes of second order: between two points the permeability is their harmonic mean.

    Args:
        permeability: a (rows, columns), positive, at equal distances from boundary to boundary, both included.
        source: the right-hand side, of the same shape.

    Returns:
        u of the same shape, 0 at the boundary.
    """
    rows, columns = permeability.shape
    down = 2 / (1 / permeability[1:] + 1 / permeability[:-1]) * (rows - 1) ** 2
    right = 2 / (1 / permeability[:, 1:] + 1 / permeability[:, :-1]) * (columns - 1) ** 2
    centre = down[:-1, 1:-1] + down[1:, 1:-1] + right[1:-1, :-1] + right[1:-1, 1:]
    beside = right[1:-1, 1:].copy()
    beside[:, -1] = 0  # the last point of a row has no neighbour in the next one
    beside, below = beside.ravel()[:-1], down[1:-1, 1:-1].ravel()
    wide = columns - 2
    matrix = diags_array(
        [centre.ravel(), -beside, -beside, -below, -below], offsets=[0, 1, -1, wide, -wide], format="csc"
    )
    solution = np.zeros_like(permeability)
    solution[1:-1, 1:-1] = spsolve(matrix, source[1:-1, 1:-1].ravel()).reshape(rows - 2, wide)
    return solution


def darcy(
    samples: int, resolution: int, seed: int, *, medium: Literal["two_phases", "lognormal"] = "two_phases"
) -> FieldPairs:
    """Pairs of a permeability a and the pressure u, each (samples, 1, resolution, resolution), boundary included.

    Li, Kovachki et al.: "Fourier Neural Operator for Parametric Partial Differential Equations", ICLR 2021, arXiv
    2010.08895, appendix A.3: a is 12 where a random field of covariance (9 - Laplacian) ** -2 is positive and 3
    elsewhere.

    Args:
        samples: how many.
        resolution: points of each axis, at least 4.
        seed: the same seed gives the same media at each resolution.
        medium: ``two_phases`` as above, or ``lognormal``, the exponential of a smooth random field.
    """
    fields = gaussian_field(
        samples, 2, np.random.default_rng(seed), scale=1, shift=9, power=2, boundary="neumann", modes=32
    )
    places = np.linspace(0, 1, resolution)
    field = fields.on(places, places)
    permeability = np.where(field > 0, 12.0, 3.0) if medium == "two_phases" else np.exp(20 * field)
    ones = np.ones((resolution, resolution))
    pressure = np.stack([solve_darcy(one, ones) for one in permeability])
    return FieldPairs(permeability[:, None], pressure[:, None])
