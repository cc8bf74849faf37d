"""Equations of physics solved for random inputs: data to learn operators from, each the same at every resolution."""

from collections.abc import Callable

from convatlas.data.fields import FieldPairs
from convatlas.data.simulators.burgers import burgers
from convatlas.data.simulators.darcy import darcy
from convatlas.data.simulators.navier_stokes import navier_stokes, navier_stokes_forcing
from convatlas.data.simulators.poisson import poisson

__all__ = ["SIMULATORS", "burgers", "darcy", "navier_stokes", "navier_stokes_forcing", "poisson"]

#: Simulator by name: ``simulate(samples, resolution, seed)`` gives pairs of fields.
SIMULATORS: dict[str, Callable[[int, int, int], FieldPairs]] = {
    "burgers": burgers,
    "darcy": darcy,
    "navier_stokes": navier_stokes,
    "navier_stokes_forcing": navier_stokes_forcing,
    "poisson": poisson,
}
