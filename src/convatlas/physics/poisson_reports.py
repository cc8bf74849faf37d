"""What a user wants to see of a learned solver: iterations and time beside the usual ones, convergence, solutions."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from convatlas.data.images import Skipped
from convatlas.data.linear_systems import GridSystem
from convatlas.errors import DataError
from convatlas.files import atomic_path
from convatlas.physics.linear_operators import LinearOperator, system_operator
from convatlas.physics.linear_solvers import IncompleteCholesky, SolveResult, cg, deflated_pcg, jacobi, pcg
from convatlas.report import Cell, Files, Images, Lines, Note, Part, Report, Section, Table
from convatlas.training.comparison import cost_table
from convatlas.training.left_out import skipped_sections, tell_skipped
from convatlas.training.measure import provenance
from convatlas.training.progress import progress
from convatlas.training.run import Run

if TYPE_CHECKING:
    from convatlas.physics.poisson import Poisson

__all__ = [
    "SOLVERS",
    "Solve",
    "Solved",
    "evaluation_report",
    "means",
    "measure",
    "picture",
    "prediction_report",
    "solve_files",
    "training_report",
]

Array = npt.NDArray[Any]

_MOST_ITERATIONS = 5000
_MOST_ROWS = 100
_MOST_PICTURES = 8
_NETWORK = "DCDM"


def _jacobi(A: LinearOperator, b: Tensor, **limits: Any) -> SolveResult:
    return pcg(A, b, jacobi(A), **limits)


def _incomplete(A: LinearOperator, b: Tensor, **limits: Any) -> SolveResult:
    return pcg(A, b, IncompleteCholesky(A), **limits)


#: What the network is compared with. Times include the factor of incomplete Cholesky and the vectors of deflation.
SOLVERS: dict[str, Callable[..., SolveResult]] = {
    "CG": cg,
    "Jacobi CG": _jacobi,
    "IC CG": _incomplete,
    "deflated CG": deflated_pcg,
}


@dataclass(frozen=True, eq=False)
class Solve:
    """One solve of a system.

    Attributes:
        system: what was solved.
        solver: by what.
        result: what came out.
        seconds: from the operator to the solution.
        network_seconds: of these, those of the network.
    """

    system: GridSystem
    solver: str
    result: SolveResult
    seconds: float
    network_seconds: float = 0.0


def measure(task: Poisson, systems: Iterable[GridSystem], *, few: bool = False) -> list[Solve]:
    """Solve systems by the network and by the usual solvers, or with ``few`` by conjugate gradients alone.

    Raises:
        DataError: the network is for none of the grids.
    """
    solves: list[Solve] = []
    skipped: list[Skipped] = []
    others = {"CG": cg} if few else SOLVERS
    with progress("solving", None) as advance:
        for system in systems:
            if reason := task.refusal(system):
                skipped.append(Skipped(system.name, reason))
                continue
            solves.append(_by_network(task, system))
            A, b = system_operator(system), torch.from_numpy(system.b)
            for name, solver in others.items():
                started = time.perf_counter()
                result = solver(A, b, tol=task.tol, max_iter=_MOST_ITERATIONS)
                solves.append(Solve(system, name, result, time.perf_counter() - started))
            advance()
    tell_skipped(skipped)
    if not solves:
        first = skipped[0] if skipped else Skipped("the set", "is empty")
        raise DataError(f"no system can be solved; first: {first.path} {first.reason}")
    return solves


def _by_network(task: Poisson, system: GridSystem) -> Solve:
    spent = 0.0

    def before(*_: Any) -> None:
        nonlocal spent
        spent -= time.perf_counter()

    def after(*_: Any) -> None:
        nonlocal spent
        spent += time.perf_counter()

    hooks = [task.network.register_forward_pre_hook(before), task.network.register_forward_hook(after)]
    started = time.perf_counter()
    try:
        result = task.solve(system)
    finally:
        for hook in hooks:
            hook.remove()
    return Solve(system, _NETWORK, result, time.perf_counter() - started, spent)


def means(solves: Sequence[Solve]) -> dict[str, float]:
    """Mean iterations of the network, and the mean of their ratios to those of conjugate gradients."""
    network = [each.result.iterations for each in solves if each.solver == _NETWORK]
    plain = [each.result.iterations for each in solves if each.solver == "CG"]
    ratios = [ours / max(theirs, 1) for ours, theirs in zip(network, plain, strict=True)]
    return {"iterations": statistics.mean(network), "against CG": statistics.mean(ratios)}


# Reports


def evaluation_report(task: Poisson, solves: Sequence[Solve]) -> Report:
    """Iterations and time of the network beside those of the usual solvers."""
    sections = [
        Section("Solves", _tables(task, solves)),
        Section("Convergence", _convergence(solves)),
        Section("Solutions", [_solutions(solves)]),
    ]
    return Report(f"Evaluation of {task.model}", _summary(task, solves), sections, provenance())


def training_report(task: Poisson, run: Run) -> Report:
    """Solves of held-out systems, convergence, solutions, curves of the training and cost."""
    solves = measure(task, task.held_out())
    rows = run.read_metrics()
    for number, each in enumerate(_first_of_each_kind(solves)):
        _write_picture(run.samples / f"{number:02d}_{each.system.name}.png", each.system, each.result.x.numpy())
    curves: list[Part] = [
        Lines("Loss", "epoch", "loss", {name: _series(rows, f"{name}_loss") for name in ("train", "val")}, log_y=True),
        Lines(
            "Solves",
            "epoch",
            "log10 of the relative residual after ten iterations",
            {"validation": _series(rows, "val_residual")},
        ),
    ]
    origin = [Note(f"Started from {task.started_from}")] if task.started_from else []
    learned = Note(
        f"Learned from {len(task.train_set):,} mixtures of the Ritz vectors of {task.lanczos_steps:,} Lanczos steps on "
        f"a grid of {_sizes(task.shape)}; the best epoch is chosen by solves of {len(task.val_set):,} held-out ones."
    )
    files = {
        "settings": "config.yaml",
        "weights of the best epoch": "checkpoints/best.safetensors",
        "one row an epoch": "metrics.csv",
    }
    sections = [
        Section("Solves of held-out systems", _tables(task, solves)),
        Section("Convergence", _convergence(solves)),
        Section("Solutions", [_solutions(solves)]),
        Section("Training", [learned, *origin, *curves]),
        Section("Cost", [cost_table({task.model: task}, {task.model: run})]),
        Section("Files", [Files("In the folder of the run", files)]),
    ]
    return Report(f"Poisson systems with {task.model}", _summary(task, solves), sections, provenance(data=task.data))


def _series(rows: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    return [row["epoch"] for row in rows], [row.get(key, float("nan")) for row in rows]


def _of_network(solves: Sequence[Solve]) -> list[Solve]:
    return [each for each in solves if each.solver == _NETWORK]


def _summary(task: Poisson, solves: Sequence[Solve]) -> str:
    network, mean = _of_network(solves), means(solves)
    reached = sum(each.result.converged for each in network)
    count = "1 system" if len(network) == 1 else f"{len(network)} systems"
    return (
        f"{task.model} reduces the residual of {reached} of {count} to {task.tol:g} of the first, in "
        f"{mean['iterations']:.1f} iterations on average, {mean['against CG']:.2f} times those of conjugate gradients."
    )


def _tables(task: Poisson, solves: Sequence[Solve]) -> list[Part]:
    solvers = list(dict.fromkeys(each.solver for each in solves))
    groups: dict[str, list[Solve]] = {}
    for each in solves:
        groups.setdefault(_kind(each), []).append(each)
    parts: list[Part] = []
    for title, unit, value in (
        ("Iterations", "", lambda each: float(each.result.iterations)),
        ("Time", " [s]", lambda each: each.seconds),
    ):
        rows: list[list[Cell]] = []
        for name, some in groups.items():
            found = [statistics.mean(value(each) for each in some if each.solver == solver) for solver in solvers]
            rows.append([name, len(some) // len(solvers), *found])
        columns = ["systems", "number", *(f"{solver}{unit}" for solver in solvers)]
        caption = f"Means until the residual is {task.tol:g} of the first." if not unit else _split_of_time(solves)
        parts.append(Table(title, columns, rows, caption))
    failed = [f"{each.system.name} by {each.solver}" for each in solves if not each.result.converged]
    if failed:
        parts.append(Note(f"Not reached: {', '.join(failed[:12])}{', ...' if len(failed) > 12 else ''}."))
    return parts


def _split_of_time(solves: Sequence[Solve]) -> str:
    network = _of_network(solves)
    share = sum(each.network_seconds for each in network) / max(sum(each.seconds for each in network), 1e-9)
    return f"Of the time of {_NETWORK}, {share:.0%} is the network's. Factors and deflation vectors are included."


def _convergence(solves: Sequence[Solve]) -> list[Part]:
    """A figure for the first system of the first and the last kind."""
    figures: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    shown: dict[str, str] = {}
    for each in solves:
        kind = _kind(each)
        if shown.setdefault(kind, each.system.name) == each.system.name:
            figures.setdefault(kind, {})[each.solver] = _history(each.result)
    return [
        Lines(shown[kind], "iteration", "residual over that of the start", series, log_y=True, log_x=False)
        for kind, series in figures.items()
        if kind in (next(iter(figures)), next(reversed(figures)))
    ]


def _history(result: SolveResult) -> tuple[list[float], list[float]]:
    first = result.residuals[0] or 1.0
    values = [value / first if value > 0 else float("nan") for value in result.residuals]
    return list(map(float, range(len(values)))), values


def _solutions(solves: Sequence[Solve]) -> Images:
    shown = _first_of_each_kind(solves)
    return Images(
        "Solutions", [(picture(each.system, each.result.x.numpy()), each.system.name) for each in shown], _LEGEND
    )


def _first_of_each_kind(solves: Sequence[Solve]) -> list[Solve]:
    shown: dict[str, Solve] = {}
    for each in _of_network(solves):
        shown.setdefault(_kind(each), each)
    return list(shown.values())[:_MOST_PICTURES]


def _kind(solve: Solve) -> str:
    """What stands before the number at the end of a system's name."""
    return solve.system.name.rpartition("_")[0] or solve.system.name


_LEGEND = "Right-hand side and solution, red above zero and blue below; grey is solid. Of a volume, the middle slice."


def picture(system: GridSystem, x: Array) -> npt.NDArray[np.uint8]:
    """Right-hand side and solution (*shape) side by side, (H, 2 W + gap, 3); of a volume the middle slice."""
    middle = len(x) // 2
    panels = []
    for values in (system.b, x):
        plane, fluid = (values, system.fluid) if values.ndim == 2 else (values[middle], system.fluid[middle])
        largest = float(np.abs(plane[fluid]).max(initial=0.0)) or 1.0
        colours = colormaps["RdBu_r"](0.5 + 0.5 * plane / largest, bytes=True)[..., :3].copy()
        colours[~fluid] = 128
        panels += [colours, np.full((len(plane), max(2, plane.shape[1] // 16), 3), 255, np.uint8)]
    return np.concatenate(panels[:-1], 1)


def _write_picture(path: Path, system: GridSystem, x: Array) -> None:
    with atomic_path(path) as part:
        Image.fromarray(picture(system, x)).save(part, format="PNG")


# A user's files


@dataclass(frozen=True, eq=False)
class Solved:
    """A system that was solved and written.

    Attributes:
        solve: how.
        path: of the solution, relative to the output folder.
    """

    solve: Solve
    path: str


def solve_files(task: Poisson, systems: Sequence[GridSystem], folder: Path) -> tuple[list[Solved], list[Skipped]]:
    """Solve systems and write ``NAME_solution.npz`` and ``NAME_solution.png`` of each.

    Raises:
        DataError: the network is for none of the grids.
        OSError: a file cannot be written.
    """
    solved: list[Solved] = []
    skipped: list[Skipped] = []
    taken: set[str] = set()
    with progress("solving", len(systems)) as advance:
        for system in systems:
            if reason := task.refusal(system):
                skipped.append(Skipped(system.name, reason))
                continue
            solve = _by_network(task, system)
            stem = f"{system.name}_solution"
            while stem in taken:
                stem += "_"
            taken.add(stem)
            x = solve.result.x.numpy()
            with atomic_path(folder / f"{stem}.npz") as part, open(part, "wb") as file:
                np.savez_compressed(file, x=x, residuals=np.array(solve.result.residuals))
            _write_picture(folder / f"{stem}.png", system, x)
            solved.append(Solved(solve, f"{stem}.npz"))
            advance()
    tell_skipped(skipped)
    if not solved:
        raise DataError(f"{skipped[0].path} {skipped[0].reason}")
    return solved, skipped


def prediction_report(task: Poisson, solved: Sequence[Solved], skipped: Sequence[Skipped]) -> Report:
    """What was solved: iterations, convergence and pictures."""
    rows: list[list[Cell]] = []
    for each in solved[:_MOST_ROWS]:
        result = each.solve.result
        last = result.residuals[-1] / (result.residuals[0] or 1.0)
        sizes, seconds = _sizes(each.solve.system.shape), each.solve.seconds
        rows.append([each.solve.system.name, sizes, result.iterations, last, result.converged, seconds, each.path])
    columns = ["system", "grid", "iterations", "relative residual", "converged", "time [s]", "written"]
    caption = f"The first {_MOST_ROWS} of {len(solved)}." if len(solved) > _MOST_ROWS else ""
    series = {each.solve.system.name: _history(each.solve.result) for each in solved[:_MOST_PICTURES]}
    pictures = [
        (picture(each.solve.system, each.solve.result.x.numpy()), each.solve.system.name)
        for each in solved[:_MOST_PICTURES]
    ]
    reached = sum(each.solve.result.converged for each in solved)
    sections = [
        Section("Solved", [Table("Systems", columns, rows, caption)]),
        Section(
            "Convergence", [Lines("Residuals", "iteration", "residual over that of the start", series, log_y=True)]
        ),
        Section("Solutions", [Images("Solutions", pictures, _LEGEND)]),
        Section(
            "Files", [Files("In this folder", {each.solve.system.name: each.path for each in solved[:_MOST_ROWS]})]
        ),
        *skipped_sections({each.path: each.reason for each in skipped}),
    ]
    count = "1 system" if len(solved) == 1 else f"{len(solved)} systems"
    summary = f"{task.model} reduced the residual of {reached} of {count} to {task.tol:g} of the first."
    return Report(f"Solutions of {task.model}", summary, sections, provenance())


def _sizes(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
