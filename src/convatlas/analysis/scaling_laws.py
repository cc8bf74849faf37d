"""Scaling laws: how error falls with compute, and how compute is best shared out between parameters and samples.

Works on any table of training runs. The forms are those of Bachmann, Anagnostidis, Hofmann: "Scaling MLPs: A Tale of
Inductive Bias", NeurIPS 2023, arXiv 2306.13575, section 4, after Hoffmann et al., 2022, arXiv 2203.15556, and Zhai et
al., 2022, arXiv 2106.04560: E(C) = a (b + C)^(-alpha) + E_inf on the Pareto front, N*(C) and D*(C) as powers of C.
"""

from __future__ import annotations

import csv
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from convatlas.errors import DataError
from convatlas.report import Cell, Lines, Note, Report, Scatter, Section, Table

__all__ = [
    "Allocation",
    "Interval",
    "PowerLaw",
    "ScalingLaw",
    "allocation_parts",
    "compute_optimal",
    "fit_power_law",
    "fit_scaling_law",
    "law_parts",
    "pareto_front",
    "read_runs",
    "study",
    "training_compute",
]

Numbers = Sequence[float] | npt.NDArray[Any]

#: Where the curves that fits start from level off, as shares of the smallest error, and bend, in units of the middle of
#: the computes.
_FLOORS, _BENDS = (0.0, 0.5, 0.95), (1e-6, 1.0)
#: A constant that is added to the compute beyond this, in units of the middle of the computes, does not show.
_LARGEST_BEND, _LARGEST_ALPHA = 1e3, 10.0
#: With more runs than these a figure shows the front alone.
_MOST_POINTS = 40


class Interval(NamedTuple):
    """Bounds of the middle 95 % of what resampled runs give."""

    low: float
    high: float


@dataclass(frozen=True)
class PowerLaw:
    """y = factor * x^exponent.

    Attributes:
        factor: y at x = 1.
        exponent: slope on logarithmic axes.
        r_squared: share of the variance of log y that it explains.
        exponent_interval: of the exponent, by bootstrap.
    """

    factor: float
    exponent: float
    r_squared: float
    exponent_interval: Interval

    def __call__(self, x: Numbers) -> npt.NDArray[np.float64]:
        """The law at x."""
        return self.factor * np.asarray(x, float) ** self.exponent


@dataclass(frozen=True)
class ScalingLaw:
    """E(C) = a (b + C)^(-alpha) + error_inf.

    Attributes:
        a, b: scale and bend; b is in units of compute.
        alpha: exponent.
        error_inf: error that no compute removes (E_inf).
        r_squared: share of the variance of log E that it explains.
        alpha_interval, error_inf_interval: by bootstrap.
    """

    a: float
    b: float
    alpha: float
    error_inf: float
    r_squared: float
    alpha_interval: Interval
    error_inf_interval: Interval

    def __call__(self, compute: Numbers) -> npt.NDArray[np.float64]:
        """The error at a compute."""
        return self.a * (self.b + np.asarray(compute, float)) ** -self.alpha + self.error_inf

    def compute_for(self, error: float) -> float:
        """The compute that the law asks for to reach an error; infinite at or below ``error_inf``."""
        if error <= self.error_inf:
            return float("inf")
        return float(max(((error - self.error_inf) / self.a) ** (-1 / self.alpha) - self.b, 0.0))


@dataclass(frozen=True)
class Allocation:
    """What the best runs for their compute have in common: N*(C) and D*(C)."""

    front: tuple[int, ...]
    parameters: PowerLaw
    samples: PowerLaw


def training_compute(macs: float, samples: float, epochs: float = 1.0) -> float:
    """Compute of a training: three times the multiply-adds of a forward pass (one of them, two for the gradients).

    Args:
        macs: multiply-adds of a forward pass on one sample, as `convatlas.cost.cost` counts them; each counts once.
        samples: of an epoch.
        epochs: passes over them.
    """
    return 3.0 * macs * samples * epochs


def pareto_front(compute: Numbers, error: Numbers) -> list[int]:
    """Indices of the runs that no run with as little compute matches in error, by rising compute.

    Raises:
        ValueError: there are not equally many numbers, or one is not finite.
    """
    x, y = _checked({"compute": compute, "error": error}, least=1, positive=False)
    front: list[int] = []
    for index in np.lexsort((y, x)):
        if not front or y[index] < y[front[-1]]:
            front.append(int(index))
    return front


def fit_power_law(x: Numbers, y: Numbers, *, resamples: int = 500, seed: int = 0) -> PowerLaw:
    """Fit y = factor * x^exponent by least squares of the logarithms.

    Args:
        x, y: positive numbers.
        resamples: draws of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ValueError: there are fewer than two different x, or a number is not positive and finite.
    """
    u, v = (np.log(values) for values in _checked({"x": x, "y": y}, least=2))
    if len(set(u.tolist())) < 2:
        raise ValueError("x must hold at least two different numbers")

    def fit(rows: npt.NDArray[np.int64]) -> tuple[float, ...] | None:
        if np.ptp(u[rows]) == 0:
            return None
        slope, intercept = np.polyfit(u[rows], v[rows], 1)
        return float(slope), float(intercept)

    whole = fit(np.arange(len(u)))
    slope, intercept = whole if whole is not None else (0.0, 0.0)
    (interval, _) = _bootstrap(fit, len(u), resamples, seed)
    return PowerLaw(float(np.exp(intercept)), slope, _r_squared(v, slope * u + intercept), interval)


def fit_scaling_law(compute: Numbers, error: Numbers, *, resamples: int = 100, seed: int = 0) -> ScalingLaw:
    """Fit E(C) = a (b + C)^(-alpha) + E_inf by least squares of the logarithms.

    Args:
        compute, error: positive numbers, e.g. of the runs on the `pareto_front`; the error as a share or in %.
        resamples: draws of the bootstrap; each fits anew.
        seed: of the bootstrap.

    Raises:
        ValueError: there are fewer than five different computes, or a number is not positive and finite.
    """
    x, y = _checked({"compute": compute, "error": error}, least=5)
    if len(set(x.tolist())) < 5:
        raise ValueError(f"compute must hold at least five different numbers, got {len(set(x.tolist()))}")
    middle = float(np.exp(np.log(x).mean()))
    scaled = x / middle

    def fit(rows: npt.NDArray[np.int64]) -> tuple[float, ...] | None:
        return _fit_curve(scaled[rows], y[rows])

    whole = fit(np.arange(len(x)))
    if whole is None:
        raise ValueError("no curve of this form could be fitted to compute and error")
    alpha, floor, scale, bend = whole
    alphas, floors, *_ = _bootstrap(fit, len(x), resamples, seed)
    predicted = np.log(scale * (bend + scaled) ** -alpha + floor)
    factor = scale * middle**alpha
    return ScalingLaw(factor, bend * middle, alpha, floor, _r_squared(np.log(y), predicted), alphas, floors)


def _fit_curve(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> tuple[float, ...] | None:
    """alpha, E_inf, a and b of the best of several fits; None where there are too few different x."""
    from scipy.optimize import OptimizeWarning, curve_fit

    if len(set(x.tolist())) < 4:
        return None
    smallest = float(y.min())

    def law(x: Any, log_a: float, log_b: float, alpha: float, floor: float) -> Any:
        return np.log(np.exp(log_a) * (np.exp(log_b) + x) ** -alpha + floor * smallest)

    low = [-50.0, np.log(1e-9), 1e-4, 0.0]
    high = [50.0, np.log(_LARGEST_BEND), _LARGEST_ALPHA, 1.0]
    best, least = None, np.inf
    for floor, bend in itertools.product(_FLOORS, _BENDS):
        slope, intercept = np.polyfit(np.log(bend + x), np.log(np.maximum(y - floor * smallest, 0.01 * smallest)), 1)
        start = np.clip([intercept, np.log(bend), -slope, floor], np.add(low, 1e-6), np.subtract(high, 1e-6))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", OptimizeWarning)  # of the covariance, which is not used
                found, _ = curve_fit(law, x, np.log(y), start, bounds=(low, high), max_nfev=2000)
        except RuntimeError:  # it has not converged from here
            continue
        residual = float(np.square(law(x, *found) - np.log(y)).sum())
        if residual < least:
            best, least = found, residual
    if best is None:
        return None
    log_a, log_b, alpha, share = (float(value) for value in best)
    return alpha, share * smallest, float(np.exp(log_a)), float(np.exp(log_b))


def compute_optimal(
    compute: Numbers, error: Numbers, parameters: Numbers, samples: Numbers, *, resamples: int = 500, seed: int = 0
) -> Allocation:
    """Power laws N*(C) and D*(C) through the parameters and the seen samples of the runs on the Pareto front.

    Args:
        compute, error: of the runs.
        parameters: N, of the networks.
        samples: D, that were seen in training, repeated ones each time.
        resamples, seed: of the bootstrap.

    Raises:
        ValueError: the front holds fewer than two runs, or a number is not positive and finite.
    """
    columns = {"compute": compute, "error": error, "parameters": parameters, "samples": samples}
    x, y, n, d = _checked(columns, least=2)
    front = pareto_front(x, y)
    if len(front) < 2:
        raise ValueError("the Pareto front must hold at least two runs, got one run that is best at every compute")
    first, second = (fit_power_law(x[front], z[front], resamples=resamples, seed=seed) for z in (n, d))
    return Allocation(tuple(front), first, second)


def _checked(columns: Mapping[str, Numbers], *, least: int, positive: bool = True) -> list[npt.NDArray[np.float64]]:
    arrays = [np.asarray(values, float) for values in columns.values()]
    shapes = {name: array.shape for name, array in zip(columns, arrays, strict=True)}
    if any(array.ndim != 1 for array in arrays) or len({len(array) for array in arrays}) > 1:
        raise ValueError(f"{' and '.join(columns)} must be equally long rows of numbers, got {shapes}")
    if len(arrays[0]) < least:
        raise ValueError(f"{' and '.join(columns)} must hold at least {least} runs, got {len(arrays[0])}")
    for name, array in zip(columns, arrays, strict=True):
        wrong = ~np.isfinite(array) | ((array <= 0) if positive else False)
        if wrong.any():
            what = "positive and finite" if positive else "finite"
            raise ValueError(f"{name} must be {what}, got {array[wrong][0]:g}")
    return arrays


def _bootstrap(
    fit: Callable[[npt.NDArray[np.int64]], tuple[float, ...] | None], count: int, resamples: int, seed: int
) -> list[Interval]:
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    random = np.random.default_rng(seed)
    drawn = (fit(random.integers(0, count, count)) for _ in range(resamples))
    found = [values for values in drawn if values is not None]
    if not found:
        whole = fit(np.arange(count))
        return [Interval(float("nan"), float("nan")) for _ in whole or ()]
    return [Interval(*map(float, np.percentile(column, [2.5, 97.5]))) for column in zip(*found, strict=True)]


def _r_squared(y: npt.NDArray[np.float64], predicted: npt.NDArray[np.float64]) -> float:
    spread = float(np.square(y - y.mean()).sum())
    rest = float(np.square(y - predicted).sum())
    return 1 - rest / spread if spread > 0 else float(rest == 0)


# -- a table of runs ---------------------------------------------------------------------------------------------------


def read_runs(path: str | Path) -> dict[str, list[Any]]:
    """A CSV file of runs as columns: ``compute``, ``error``; ``name``, ``parameters``, ``samples`` where it has them.

    Raises:
        DataError: the file cannot be read, lacks a column, or holds something else than numbers.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    present = set(rows[0]) if rows else set()
    for name in ("compute", "error"):
        if name not in present:
            raise DataError(f"{path} must have a column {name!r}, got {', '.join(sorted(present)) or 'no rows'}")
    columns: dict[str, list[Any]] = {}
    for name in ("name", "compute", "error", "parameters", "samples"):
        if name in present:
            try:
                columns[name] = [row[name] if name == "name" else float(row[name]) for row in rows]
            except (TypeError, ValueError):
                raise DataError(f"column {name!r} of {path} must hold numbers") from None
    return columns


def study(runs: Mapping[str, Sequence[Any]], *, resamples: int = 100, seed: int = 0) -> Report:
    """Pareto front, scaling law and, where parameters and samples are known, the best allocation of compute.

    Args:
        runs: columns of equal length, see `read_runs`: ``compute`` and ``error``, and where they are known ``name``,
            ``parameters`` and ``samples`` (seen in training, repeated ones each time).
        resamples, seed: of the bootstrap.

    Raises:
        ValueError: a column is missing or holds wrong numbers, or fewer than five runs lie on the front.
    """
    for name in ("compute", "error"):
        if name not in runs:
            raise ValueError(f"runs must have a column {name!r}, got {', '.join(runs) or 'none'}")
    compute, error = _checked({"compute": runs["compute"], "error": runs["error"]}, least=5)
    front = pareto_front(compute, error)
    if len(front) < 5:
        raise ValueError(f"at least five runs must lie on the Pareto front, got {len(front)} of {len(compute)}")
    law = fit_scaling_law(compute[front], error[front], resamples=resamples, seed=seed)
    parts = [*law_parts(law, compute, error, front, list(runs.get("name", ())))]
    summary = f"Error falls as compute to the power of -{law.alpha:.3g}, to {law.error_inf:.3g} in the end."
    sections = [Section("Error and compute", parts)]
    if "parameters" in runs and "samples" in runs:
        allocation = compute_optimal(
            compute, error, runs["parameters"], runs["samples"], resamples=resamples, seed=seed
        )
        sections.append(Section("Allocation of compute", allocation_parts(allocation, compute, runs)))
    return Report("Scaling laws", summary, sections)


def law_parts(
    law: ScalingLaw, compute: Numbers, error: Numbers, front: Sequence[int], names: Sequence[str] = ()
) -> list[Scatter | Lines | Table]:
    """Report parts of a scaling law: the runs with their front, the law through it, its numbers."""
    x, y = np.asarray(compute, float), np.asarray(error, float)
    labels = _labels(names, len(x))
    shown = range(len(x)) if len(x) <= _MOST_POINTS else front
    points = {labels[index]: (float(x[index]), float(y[index])) for index in shown}
    caption = "" if len(points) == len(x) else f"The {len(x) - len(points)} runs beyond the front are left out."
    edge = [labels[index] for index in front]
    scatter = Scatter("Runs", "compute", "error", points, log_x=True, caption=caption, front=edge)
    grid = np.geomspace(x[list(front)].min(), x[list(front)].max(), 50)
    curves = {
        "front": (np.log10(x[list(front)]).tolist(), y[list(front)].tolist()),
        "law": (np.log10(grid).tolist(), law(grid).tolist()),
    }
    lines = Lines("The front and the law", "log10 of compute", "error", curves, log_y=True)
    rows: list[list[Cell]] = [
        ["alpha", law.alpha, *law.alpha_interval],
        ["error without end of compute", law.error_inf, *law.error_inf_interval],
        ["a", law.a, None, None],
        ["b", law.b, None, None],
        ["R^2 of log error", law.r_squared, None, None],
    ]
    caption = f"E(C) = a (b + C)^(-alpha) + E_inf through the {len(front)} runs of the front; 95 % of resampled fronts."
    return [scatter, lines, Table("Scaling law", ["quantity", "value", "from", "to"], rows, caption)]


def allocation_parts(
    allocation: Allocation, compute: Numbers, runs: Mapping[str, Sequence[Any]]
) -> list[Table | Lines | Note]:
    """Report parts of an allocation: exponents, and the best sizes and numbers of samples beside their laws."""
    laws = {"parameters": allocation.parameters, "samples": allocation.samples}
    rows: list[list[Cell]] = [[name, law.exponent, *law.exponent_interval, law.r_squared] for name, law in laws.items()]
    table = Table("Best allocation", ["of", "exponent of compute", "from", "to", "R^2"], rows)
    front = list(allocation.front)
    x = np.asarray(compute, float)[front]
    lines = []
    for name, law in laws.items():
        curves = {
            "runs of the front": (np.log10(x).tolist(), np.asarray(runs[name], float)[front].tolist()),
            "law": (np.log10(x).tolist(), law(x).tolist()),
        }
        lines.append(Lines(f"Best number of {name}", "log10 of compute", name, curves, log_y=True))
    note = Note("Published for MLPs: exponents of 0.35 and 0.65; for transformers of language about 0.5 each.")
    return [table, *lines, note]


def _labels(names: Sequence[str], count: int) -> list[str]:
    given = [str(name) for name in names] or [""] * count
    if len(given) != count:
        raise ValueError(f"name must hold one name for each of {count} runs, got {len(given)}")
    numbered = [f"{name} #{index + 1}".strip() for index, name in enumerate(given)]
    return given if len(set(given)) == count else numbered
