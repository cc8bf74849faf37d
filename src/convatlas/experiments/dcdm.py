"""Do search directions from a network solve Poisson systems in fewer iterations than conjugate gradients?

Kaneda, Akar, Chen, Kala, Hyde, Teran: "A Deep Conjugate Direction Method for Iteratively Solving Linear Systems", ICML
2023, arXiv 2205.10763. It claims about an order of magnitude fewer iterations than conjugate gradients on smoke
simulations of 128^3 and 256^3 cells, hardly more on larger grids than the network was trained on, domains with solids
that it has not seen, and less time.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from convatlas.data.linear_systems import GridSystem, find_systems, random_system
from convatlas.errors import DataError
from convatlas.experiments.small_training import finished, progress
from convatlas.networks.dcdm import DCDMNet, DCDMNetConfig
from convatlas.networks.registry import create_model
from convatlas.ops.poisson import PoissonOperator
from convatlas.physics.dcdm import dcdm, fit_directions, network_predictor, ritz_dataset, warm_cosine
from convatlas.physics.linear_operators import LinearOperator, system_operator
from convatlas.physics.linear_solvers import IncompleteCholesky, SolveResult, cg, deflated_pcg, jacobi, pcg
from convatlas.physics.poisson_reports import picture
from convatlas.report import Cell, Claim, Images, Lines, Report, Section, Table
from convatlas.training.task import seed_everything

__all__ = ["full", "quick", "run"]

# Thresholds, fixed before anything was measured.

#: Iterations of conjugate gradients over those of DCDM, at least.
FEWER = 3.0
#: Growth of the iterations from the small to the large grid, over that of conjugate gradients, at most.
GROWTH = 1.0
#: Iterations with a hole over those without, at most.
HOLE = 1.5
#: Of the paper's own setting, where it is about ten; and time of conjugate gradients over that of DCDM.
FULL_FEWER, FULL_FASTER = 5.0, 1.0

SEEDS = (0, 1, 2)
#: Cells along each axis: of the training, and the larger grid.
SMALL, LARGE = 64, 128
LANCZOS_STEPS, VECTORS = 1000, 1000
NETWORK = DCDMNetConfig(ndim=2, width=12)
STEPS, BATCH, LR, CLIP = 450, 10, 3e-3, 1.0
RIGHT_HAND_SIDES = (100, 101, 102, 103, 104)
TOL, MAX_ITER, MAX_PLAIN = 1e-4, 200, 5000


@dataclass(frozen=True, eq=False)
class _Solve:
    system: GridSystem
    solver: str
    result: SolveResult
    seconds: float


def run(
    budget: Literal["quick", "full"], *, data: str | Path | None = None, folder: str | Path | None = None
) -> Report:
    """Test the claims of the paper.

    Args:
        budget: "quick" trains small 2-D networks and solves random systems; "full" solves the published systems with
            the published networks.
        data: for "full": a folder with the authors' archives unpacked: ``model_N64...`` and ``model_N128...`` with
            ``model.h5`` in them, and folders of matrices and right-hand sides (``.bin``).
        folder: not used, because nothing is trained.

    Raises:
        ValueError: the budget is unknown, or "full" lacks data.
        DataError: the data have no networks or no systems.
    """
    if budget == "quick":
        return quick()
    if budget != "full":
        raise ValueError(f"budget must be 'quick' or 'full', got {budget!r}")
    if data is None:
        raise ValueError("budget 'full' needs data: the folder of the authors' networks and systems")
    return full(data)


def quick() -> Report:
    """Train on a box without solids; solve a box and one with a hole, on the grid of the training and a larger one."""
    systems = [
        random_system((side, side), seed, hole=hole)
        for side in (SMALL, LARGE)
        for hole in (False, True)
        for seed in RIGHT_HAND_SIDES
    ]
    plain: dict[str, Callable[..., SolveResult]] = {"CG": cg, "Jacobi CG": _jacobi}
    curves: dict[str, tuple[list[int], list[float]]] = {}
    solved: list[list[_Solve]] = []
    with progress(len(SEEDS) * (1 + STEPS // 50) + len(systems)) as advance:
        others = []
        for system in systems:
            others += [_timed(system, name, solver) for name, solver in plain.items()]
            advance("conjugate gradients")
        for seed in SEEDS:
            model, losses = _trained(seed, advance)
            curves[f"seed {seed}"] = (list(range(10, 1 + len(losses), 10)), _means_of(losses, 10))
            solved.append([_timed(system, "DCDM", _by(model, system)) for system in systems])
            advance("solves by the network")
    return finished("DCDM: quick test of its claims", _quick_sections(solved, others, curves))


def _trained(seed: int, advance: Callable[[str], None]) -> tuple[DCDMNet, list[float]]:
    seed_everything(seed)
    operator, generator = PoissonOperator((SMALL, SMALL)), torch.Generator().manual_seed(seed)
    vectors = ritz_dataset(operator, LANCZOS_STEPS, VECTORS, generator=generator)
    model = NETWORK.build()

    def tell(step: int, loss: float) -> None:
        if step % 50 == 0:
            advance(f"training, seed {seed}")

    options: dict[str, Any] = {"steps": STEPS, "batch_size": BATCH, "lr": LR, "schedule": warm_cosine, "clip": CLIP}
    return model, fit_directions(model, operator, vectors, generator=generator, callback=tell, **options)


def _means_of(values: Sequence[float], count: int) -> list[float]:
    return [statistics.mean(values[start : start + count]) for start in range(0, len(values) - count + 1, count)]


def _jacobi(A: LinearOperator, b: Tensor, **limits: Any) -> SolveResult:
    return pcg(A, b, jacobi(A), **limits)


def _incomplete(A: LinearOperator, b: Tensor, **limits: Any) -> SolveResult:
    return pcg(A, b, IncompleteCholesky(A), **limits)


def _by(model: DCDMNet, system: GridSystem) -> Callable[..., SolveResult]:
    predictor = network_predictor(model, system.shape, torch.from_numpy(system.fluid))
    return lambda A, b, **limits: dcdm(A, b, predictor, **{**limits, "max_iter": MAX_ITER})


def _timed(system: GridSystem, name: str, solver: Callable[..., SolveResult]) -> _Solve:
    A, b = system_operator(system), torch.from_numpy(system.b)
    started = time.perf_counter()
    result = solver(A, b, tol=TOL, max_iter=MAX_PLAIN)
    return _Solve(system, name, result, time.perf_counter() - started)


def _mean_iterations(solves: Sequence[_Solve], *, solver: str, side: int | None = None, kind: str = "") -> float:
    """Mean over the systems of one solver, of one size and kind; a solve that failed counts with all it made."""
    chosen = [
        each.result.iterations
        for each in solves
        if each.solver == solver and side in (None, each.system.shape[0]) and each.system.name.startswith(kind)
    ]
    return statistics.mean(chosen)


def _quick_sections(
    solved: Sequence[Sequence[_Solve]],
    others: Sequence[_Solve],
    curves: dict[str, tuple[list[int], list[float]]],
) -> list[Section]:
    def network(solves: Sequence[_Solve], **which: Any) -> float:
        return _mean_iterations(solves, solver="DCDM", **which)

    def plain(**which: Any) -> float:
        return _mean_iterations(others, solver="CG", **which)

    common: dict[str, Any] = {"seeds": len(SEEDS)}
    claims = [
        Claim.judge(
            "DCDM needs fewer iterations than conjugate gradients",
            published="about ten times fewer at 128^3 and 256^3",
            statistic=f"iterations of conjugate gradients over those of DCDM, means of boxes of {SMALL}^2 with and "
            f"without a hole, to {TOL:g} of the first residual",
            value=[plain(side=SMALL) / network(solves, side=SMALL) for solves in solved],
            at_least=FEWER,
            unit="times",
            **common,
        ),
        Claim.judge(
            "The count grows more slowly with the grid than that of conjugate gradients",
            published="one network serves 64^3 to 256^3; tens of iterations at each size",
            statistic=f"iterations at {LARGE}^2 over those at {SMALL}^2, over the same of conjugate gradients",
            value=[
                network(solves, side=LARGE) / network(solves, side=SMALL) / (plain(side=LARGE) / plain(side=SMALL))
                for solves in solved
            ],
            at_most=GROWTH,
            **common,
        ),
        Claim.judge(
            "It solves domains with solids that it was not trained on",
            published="trained without solids; smoke past a bunny and moving solids are solved alike",
            statistic=f"iterations with a hole over those without, at {SMALL}^2",
            value=[
                network(solves, side=SMALL, kind="hole") / network(solves, side=SMALL, kind="box") for solves in solved
            ],
            at_most=HOLE,
            **common,
        ),
    ]
    rows: list[list[Cell]] = []
    for side in (SMALL, LARGE):
        for kind in ("box", "hole"):
            counts: list[Cell] = [network(solves, side=side, kind=kind) for solves in solved]
            theirs = [_mean_iterations(others, solver=name, side=side, kind=kind) for name in ("CG", "Jacobi CG")]
            rows.append([f"{kind}, {side} x {side}", *counts, *theirs])
    failed = sum(not each.result.converged for solves in solved for each in solves)
    caption = (
        f"Means of {len(RIGHT_HAND_SIDES)} right-hand sides. {failed} of {sum(map(len, solved))} solves by networks "
        f"ended after {MAX_ITER} iterations without reaching the tolerance."
    )
    columns = ["system", *(f"DCDM, seed {seed}" for seed in SEEDS), "CG", "Jacobi CG"]
    spent: list[list[Cell]] = []
    for side in (SMALL, LARGE):
        some = [each for each in [*solved[0], *others] if each.system.shape[0] == side]
        named = {name: [each.seconds for each in some if each.solver == name] for name in ("DCDM", "CG", "Jacobi CG")}
        spent.append([f"{side} x {side}", *(1000 * statistics.mean(times) for times in named.values())])
    times = Table(
        "Time of a solve", ["grid", "DCDM [ms]", "CG [ms]", "Jacobi CG [ms]"], spent, "On this machine, in passing."
    )
    first = next(each for each in solved[0] if each.system.name.startswith(f"hole_{LARGE}x"))
    same = [first, *(each for each in others if each.system is first.system)]
    histories = {each.solver: _history(each.result) for each in same}
    return [
        Section("Iterations", [*claims, Table("Iterations to the tolerance", columns, rows, caption), times]),
        Section(
            "Convergence",
            [
                Lines(first.system.name, "iteration", "residual over that of the start", histories, log_y=True),
                Images("Right-hand side and solution", [(picture(first.system, first.result.x.numpy()), first.solver)]),
            ],
        ),
        Section("Training", [Lines("Loss", "step", "loss", curves, log_y=True)]),
    ]


def _history(result: SolveResult) -> tuple[list[int], list[float]]:
    return list(range(len(result.residuals))), [value / result.residuals[0] for value in result.residuals]


def full(data: str | Path) -> Report:
    """Solve the published systems with the published networks and with the usual solvers."""
    root = Path(data)
    networks = {path: found[1] for path in sorted(root.rglob("*.h5")) if (found := re.search(r"N(64|128)", str(path)))}
    places = sorted({path.parent for path in root.rglob("*.bin")})
    if not networks or not places:
        raise DataError(f"{data} must hold model_N64.../model.h5 or model_N128.../model.h5, and .bin systems")
    plain: dict[str, Callable[..., SolveResult]] = {"CG": cg, "IC CG": _incomplete, "deflated CG": deflated_pcg}
    solves: dict[str, list[_Solve]] = {name: [] for name in plain}
    models = {path.parent.name: create_model(f"dcdm_{side}", weights=str(path)) for path, side in networks.items()}
    for place in places:
        for system in find_systems([place]):
            for name, solver in plain.items():
                solves[name].append(_timed(system, name, solver))
            for name, model in models.items():
                solves.setdefault(name, []).append(_timed(system, name, _by(model, system)))  # type: ignore[arg-type]
    claims = []
    for name in models:
        pairs = list(zip(solves["CG"], solves[name], strict=True))
        claims += [
            Claim.judge(
                f"{name} needs about an order of magnitude fewer iterations than conjugate gradients",
                published="tens of iterations against hundreds",
                statistic="iterations of conjugate gradients over those of DCDM, mean over the systems",
                value=statistics.mean(a.result.iterations / b.result.iterations for a, b in pairs),
                at_least=FULL_FEWER,
                seeds=0,
                unit="times",
            ),
            Claim.judge(
                f"{name} takes less time than conjugate gradients",
                published="faster than CG, deflated and incomplete-Cholesky CG, on a GPU",
                statistic="time of conjugate gradients over that of DCDM, mean over the systems",
                value=statistics.mean(a.seconds / b.seconds for a, b in pairs),
                at_least=FULL_FASTER,
                seeds=0,
                scale_ok=torch.cuda.is_available(),
                unit="times",
            ),
        ]
    tables = []
    for title in ("Iterations", "Time [s]"):
        rows: list[list[Cell]] = []
        for row in zip(*solves.values(), strict=True):
            counts: list[Cell] = [each.result.iterations if title == "Iterations" else each.seconds for each in row]
            rows.append([row[0].system.name, *counts])
        tables.append(Table(title, ["system", *solves], rows))
    return finished("DCDM: full test of its claims", [Section("Solves", [*claims, *tables])], data=str(data))
