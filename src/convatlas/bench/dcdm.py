"""Solves by DCDM beside conjugate gradients, and the matrix-free Poisson operator beside sparse matrices."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convatlas.bench.ratio import Bar, Call, Case, compare, forward, report
from convatlas.data.linear_systems import GridSystem, random_system
from convatlas.networks.dcdm import DCDMNet, DCDMNetConfig
from convatlas.ops.poisson import PoissonOperator
from convatlas.physics.dcdm import dcdm, fit_directions, network_predictor, ritz_dataset, warm_cosine
from convatlas.physics.linear_operators import system_operator
from convatlas.physics.linear_solvers import IncompleteCholesky, SolveResult, cg, pcg
from convatlas.report import Cell, Report, Section, Table
from convatlas.training.task import seed_everything

__all__ = ["run"]

_FASTER = "faster than conjugate gradients and incomplete Cholesky at 128^3 and 256^3 on a GPU (arXiv 2205.10763)"
# Fixed before anything was measured. Stencil: a row of a sparse matrix takes seven values with their columns, which is
# about three times the bytes.
BARS = [
    Bar(
        statement="The stencil is faster than a sparse matrix in 3-D",
        published="no figure; the matrix has about three times the bytes",
        theirs="scipy CSR",
        at_least=2.0,
        what="product",
        group="3-D",
    ),
    *(
        Bar(
            statement="DCDM takes less time than conjugate gradients",
            published=_FASTER,
            theirs="CG",
            at_least=1.0,
            what="solve",
            group="grid of the training",
            device=device,
        )
        for device in ("cpu", "cuda")
    ),
]

#: Grids of the products; the first is that of a quick run.
GRIDS = ((64, 64, 64), (128, 128, 128), (1024, 1024))
#: Of the solves: cells of a side, those of the training first, right-hand side, tolerance.
SIDES, SEED, TOL = (64, 128), 100, 1e-4
#: Of the network, which is trained here for a moment.
NETWORK = DCDMNetConfig(ndim=2, width=12)
LANCZOS_STEPS, VECTORS, STEPS, BATCH, LR = 1000, 1000, 450, 10, 3e-3


def run(*, threads: Sequence[int] | None = None, quick: bool = False) -> Report:
    """Ratios of the time of products and of solves to 1e-4 of the first residual, and iterations.

    Args:
        threads: numbers of threads to measure with; by default 1 and 2.
        quick: one grid of each kind only.
    """
    cases = [
        Case(
            " x ".join(map(str, shape)),
            "product",
            partial(_products, shape),
            group=f"{len(shape)}-D",
            tolerance=1e-5,
        )
        for shape in (GRIDS[:1] if quick else GRIDS)
    ]
    sides = SIDES[:1] if quick else SIDES
    # What is solved to a residual of 1e-4 differs by more than that.
    cases += [
        Case(
            f"{side} x {side}, {'hole' if hole else 'box'}",
            "solve",
            partial(_solves, side, hole),
            group="grid of the training" if side == SIDES[0] else "larger grid",
            tolerance=0.1,
        )
        for side in sides
        for hole in (False, True)
    ]
    note = (
        f"The network ({NETWORK.width} channels) is trained here for {STEPS} steps on a box of side {SIDES[0]}. "
        "Both sides stop at 1e-4 of the first residual, computed anew in each iteration. The factor of incomplete "
        "Cholesky is made before the time is taken."
    )
    made = report("dcdm", compare(cases, threads=threads, quick=quick), BARS, note, quick=quick)
    bars, *others = made.sections
    return dataclasses.replace(made, sections=[bars, Section("Iterations", [_iterations(sides)]), *others])


def _products(shape: tuple[int, ...], device: torch.device) -> dict[str, Call]:
    operator, x = PoissonOperator(shape).to(device), torch.randn(shape, device=device)
    csr = operator.to_csr().astype(np.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support", UserWarning)
        starts, columns, values = (torch.from_numpy(part) for part in (csr.indptr, csr.indices, csr.data))
        settings: Any = {"size": csr.shape, "device": device, "check_invariants": False}
        matrix = torch.sparse_csr_tensor(starts, columns, values, **settings)

    def by_torch(x: Tensor) -> Tensor:
        return (matrix @ x.reshape(-1)).reshape(x.shape)

    def by_scipy(x: Tensor) -> Tensor:
        return torch.from_numpy(csr @ x.reshape(-1).numpy()).reshape(x.shape)

    sides: dict[str, Callable[[Tensor], Tensor]] = {"stencil": operator, "torch CSR": by_torch}
    if device.type == "cpu":
        sides["scipy CSR"] = by_scipy
    return {name: forward(side, x) for name, side in sides.items()}


def _solves(side: int, hole: bool, device: torch.device) -> dict[str, Call]:
    solvers = _solvers(random_system((side, side), SEED, hole=hole), device)
    return {name: forward(lambda solve: solve().x, solve) for name, solve in solvers.items()}


def _solvers(system: GridSystem, device: torch.device) -> dict[str, Callable[[], SolveResult]]:
    operator: Any = system_operator(system)
    operator = operator.to(device)
    b, fluid = torch.from_numpy(system.b).to(device), torch.from_numpy(system.fluid).to(device)
    predictor = network_predictor(_network().to(device), system.shape, fluid)
    factor = IncompleteCholesky(operator)
    return {
        "DCDM": lambda: dcdm(operator, b, predictor, tol=TOL, max_iter=1000),
        "CG": lambda: cg(operator, b, tol=TOL),
        "IC CG": lambda: pcg(operator, b, factor, tol=TOL),
    }


@cache
def _network() -> DCDMNet:
    seed_everything(0)
    operator, generator = PoissonOperator((SIDES[0], SIDES[0])), torch.Generator().manual_seed(0)
    model = NETWORK.build()
    vectors = ritz_dataset(operator, LANCZOS_STEPS, VECTORS, generator=generator)
    options: dict[str, Any] = {"steps": STEPS, "batch_size": BATCH, "lr": LR, "clip": 1.0, "generator": generator}
    with torch.inference_mode(False):
        fit_directions(
            model,
            operator,
            vectors,
            schedule=warm_cosine,
            **options,
        )
    return model


def _iterations(sides: Sequence[int]) -> Table:
    rows: list[list[Cell]] = []
    for side in sides:
        for hole in (False, True):
            found = _solvers(random_system((side, side), SEED, hole=hole), torch.device("cpu"))
            counts = [solve().iterations for solve in found.values()]
            rows.append([f"{side} x {side}, {'hole' if hole else 'box'}", *counts])
    return Table("Iterations to 1e-4 of the first residual", ["system", "DCDM", "CG", "IC CG"], rows)
