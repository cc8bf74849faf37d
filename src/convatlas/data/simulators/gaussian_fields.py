"""Smooth random functions on the unit cube, which can be read on any grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

__all__ = ["GaussianField", "gaussian_field"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class GaussianField:
    """Random functions given by the coefficients of their series.

    Attributes:
        coefficients: (samples, *modes), complex for the periodic series, real for the cosines.
        boundary: which series.
    """

    coefficients: Array
    boundary: Literal["periodic", "neumann"]

    def on(self, *points: Array) -> Array:
        """Values (samples, *grid) at the grid of the points of each axis, in [0, 1]."""
        values = self.coefficients
        for axis, places in enumerate(points, 1):
            values = np.moveaxis(np.tensordot(values, self._series(places, values.shape[axis]), (axis, 0)), -1, axis)
        return values.real

    def _series(self, points: Array, modes: int) -> Array:
        if self.boundary == "periodic":
            frequencies = np.arange(modes) - modes // 2
            return np.exp(2j * np.pi * np.multiply.outer(frequencies, points))
        waves = np.sqrt(2) * np.cos(np.pi * np.multiply.outer(np.arange(modes), points))
        waves[0] = 1
        return waves


def gaussian_field(
    samples: int,
    dims: int,
    random: np.random.Generator,
    *,
    scale: float,
    shift: float,
    power: float,
    boundary: Literal["periodic", "neumann"] = "periodic",
    modes: int = 32,
) -> GaussianField:
    """Draw functions of mean 0 and covariance scale * (shift - Laplacian) ** -power on the unit cube.

    The same generator gives the same functions on whatever grid they are read later.

    Args:
        samples: how many.
        dims: axes of position.
        random: source of the coefficients.
        scale, shift, power: of the covariance; the larger the power, the smoother.
        boundary: ``periodic``, or ``neumann`` for functions whose slope is 0 at the boundary.
        modes: highest frequency along each axis.

    Returns:
        The functions; the mean over the cube of each is 0.
    """
    periodic = boundary == "periodic"
    frequencies = 2 * np.pi * np.arange(-modes, modes + 1) if periodic else np.pi * np.arange(modes + 1)
    squares = sum(np.meshgrid(*[frequencies**2] * dims, indexing="ij"))
    deviation = np.sqrt(scale) * (squares + shift) ** (-power / 2) * (squares > 0)
    noise = random.standard_normal((2 if periodic else 1, samples, *squares.shape))
    # The real part of a sum over all frequencies holds each wave twice, with halved amplitude: variance 1 in all.
    coefficients = noise[0] + 1j * noise[1] if periodic else noise[0]
    return GaussianField(coefficients * deviation, boundary)
