"""Is a series chaotic? Lag by the autocorrelation, embedding dimension by Cao, largest Lyapunov exponent by Rosenstein.

Vangala, Ravi: "ATM Cash demand forecasting in an Indian Bank with chaos and deep learning", arXiv 2008.10365, names the
three steps; they follow Cao: "Practical method for determining the minimum embedding dimension of a scalar time
series", Physica D 110, 1997, and Rosenstein, Collins, De Luca: "A practical method for calculating largest Lyapunov
exponents from small data sets", Physica D 65, 1993.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
from scipy.spatial import KDTree

from convatlas.errors import DataError, unknown

__all__ = [
    "CaoCurves",
    "ChaosAnalysis",
    "LagRule",
    "acf_lag",
    "analyse_chaos",
    "autocorrelation",
    "autoregressive_order",
    "cao_embedding",
    "check_series",
    "delay_embedding",
    "divergence_curve",
    "minimum_dimension",
    "nearest_neighbours",
    "rosenstein_lyapunov",
]

Array = npt.NDArray[np.float64]
Index = npt.NDArray[np.int64]
LagRule = Literal["inv_e", "zero", "conf95", "first_min"]
Metric = Literal["chebyshev", "euclidean"]
Backend = Literal["tree", "naive"]

#: E1 counts as saturated from this value on, if it changes by no more than the second number.
_SATURATED, _STEADY = 0.9, 0.1
#: Distance of E2 from 1 below which, at every dimension, a series counts as random.
_FLAT = 0.1


def check_series(values: npt.ArrayLike, least: int = 2) -> Array:
    """The values (n) of a series as float64.

    Raises:
        DataError: they are not one axis of finite numbers, are all equal, or are fewer than ``least``.
    """
    series = np.asarray(values, dtype=np.float64)
    if series.ndim != 1:
        raise DataError(f"a series must have one axis, got shape {series.shape}")
    if len(series) < least:
        raise DataError(f"the series is too short: it needs at least {least} points, got {len(series)}")
    if not np.isfinite(series).all():
        where = int(np.flatnonzero(~np.isfinite(series))[0])
        raise DataError(f"values must be finite, got {series[where]} at position {where}")
    if np.ptp(series) == 0:
        raise DataError(f"the series is constant at {series[0]:g}: its autocorrelation is not defined")
    return series


# -- lag ---------------------------------------------------------------------------------------------------------------


def autocorrelation(values: npt.ArrayLike, max_lag: int) -> Array:
    """Biased autocorrelation r_0, ..., r_max_lag of a series (n), every sum over the same n."""
    series = check_series(values, max_lag + 1)
    centred = series - series.mean()
    sums = [np.dot(centred[: len(centred) - lag], centred[lag:]) for lag in range(max_lag + 1)]
    return np.array(sums) / sums[0]


def acf_lag(values: npt.ArrayLike, rule: LagRule = "inv_e", max_lag: int = 40) -> int | None:
    """The delay of the embedding: the first lag from 1 on at which the autocorrelation has fallen; None if none has.

    Args:
        values: series (n).
        rule: ``inv_e`` to 1/e, ``zero`` to 0, ``conf95`` in magnitude to 1.96 / sqrt(n), ``first_min`` to a local
            minimum, which noise makes at once.
        max_lag: the largest lag that is tried; less where the series is shorter.
    """
    if rule not in get_args(LagRule):
        raise unknown("rule", str(rule), get_args(LagRule))
    if max_lag < 1:
        raise ValueError(f"max_lag must be at least 1, got {max_lag}")
    series = check_series(values)
    last = min(max_lag, len(series) - 1)
    r = autocorrelation(series, min(last + 1, len(series) - 1))
    if rule == "first_min":
        met = [k for k in range(1, min(last, len(r) - 2) + 1) if r[k] < r[k - 1] and r[k] <= r[k + 1]]
        return met[0] if met else None
    fallen = {"inv_e": r <= 1 / math.e, "zero": r <= 0, "conf95": np.abs(r) <= 1.96 / math.sqrt(len(series))}[rule]
    found = np.flatnonzero(fallen[1 : last + 1])
    return int(found[0]) + 1 if len(found) else None


def autoregressive_order(values: npt.ArrayLike, max_order: int = 14) -> int:
    """Number of plain lags: order of the autoregression with the least AIC, all fitted on the same rows."""
    series = check_series(values, 2 * max_order + 3)
    target = series[max_order:]
    lags = [series[max_order - lag : len(series) - lag] for lag in range(1, max_order + 1)]
    scores = []
    for order in range(1, max_order + 1):
        table = np.stack([np.ones_like(target), *lags[:order]], 1)
        residual = target - table @ np.linalg.lstsq(table, target, rcond=None)[0]
        variance = max(float(np.mean(residual**2)), np.finfo(float).tiny)
        scores.append(len(target) * math.log(variance) + 2 * (order + 1))
    return int(np.argmin(scores)) + 1


# -- embedding and neighbours ------------------------------------------------------------------------------------------


def delay_embedding(values: Array, tau: int, dim: int, rows: int | None = None) -> Array:
    """Delay vectors (x_i, x_{i+tau}, ..., x_{i+(dim-1)tau}) of a series as rows (rows, dim); all by default."""
    if tau < 1 or dim < 1:
        raise ValueError(f"tau and dim must be at least 1, got {tau} and {dim}")
    rows = len(values) - (dim - 1) * tau if rows is None else rows
    if rows < 1 or rows + (dim - 1) * tau > len(values):
        raise DataError(f"a series of {len(values)} points has no {rows} delay vectors of {dim} values {tau} apart")
    return np.stack([values[k * tau : k * tau + rows] for k in range(dim)], 1)


def nearest_neighbours(
    points: Array, *, metric: Metric, window: int = 0, backend: Backend = "tree"
) -> tuple[Index, Array]:
    """Nearest other point of each of the points (n, d), and its distance; ties go to the lowest index.

    Points at distance 0 are not taken, nor are those within ``window`` positions.

    Args:
        points: rows.
        metric: largest difference (``chebyshev``), or ``euclidean``.
        window: Theiler window: how near in time is too near.
        backend: ``naive`` compares all pairs, ``tree`` asks a k-d tree for ever more neighbours; both give the same.

    Returns:
        Indices (n), -1 where a point has no neighbour, and distances (n), infinite there.

    Raises:
        ValueError: an argument is out of range.
    """
    if metric not in get_args(Metric):
        raise unknown("metric", str(metric), get_args(Metric))
    if backend not in get_args(Backend):
        raise unknown("backend", str(backend), get_args(Backend))
    if window < 0:
        raise ValueError(f"window must be at least 0, got {window}")
    return (_tree if backend == "tree" else _naive)(points, metric, window)


def _naive(points: Array, metric: Metric, window: int) -> tuple[Index, Array]:
    index, distance = np.full(len(points), -1), np.full(len(points), np.inf)
    for i, point in enumerate(points):
        apart = np.abs(points - point)
        found = apart.max(1) if metric == "chebyshev" else np.sqrt((apart**2).sum(1))
        found[found == 0] = np.inf
        found[max(0, i - window) : i + window + 1] = np.inf
        if np.isfinite(found).any():
            index[i] = int(np.argmin(found))
            distance[i] = found[index[i]]
    return index, distance


def _tree(points: Array, metric: Metric, window: int) -> tuple[Index, Array]:
    count = len(points)
    tree, order = KDTree(points), np.inf if metric == "chebyshev" else 2
    index, distance = np.full(count, -1), np.full(count, np.inf)
    left, wanted = np.arange(count), min(count, 4)
    while len(left):
        distances, near = tree.query(points[left], k=wanted, p=order)
        distances, near = distances.reshape(len(left), -1), near.reshape(len(left), -1)
        allowed = (np.abs(near - left[:, None]) > window) & (distances > 0)
        least = np.where(allowed, distances, np.inf).min(1)
        # Only when a farther one has been seen are all that tie with the nearest among those seen.
        settled = (least < distances[:, -1]) | (wanted == count)
        found = settled & np.isfinite(least)
        tied = allowed & (distances == least[:, None])
        index[left[found]] = np.where(tied, near, count).min(1)[found]
        distance[left[found]] = least[found]
        left, wanted = left[~settled], min(count, 2 * wanted + window)
    return index, distance


# -- Cao ---------------------------------------------------------------------------------------------------------------


class CaoCurves(NamedTuple):
    """Cao's measures: E and E* for d = 1 ... max_dim + 1, their ratios E1 and E2 for d = 1 ... max_dim."""

    e: Array
    e_star: Array
    e1: Array
    e2: Array


def cao_embedding(
    values: npt.ArrayLike,
    tau: int,
    max_dim: int = 10,
    *,
    window: int = 0,
    metric: Metric = "chebyshev",
    jitter: float = 0.0,
    backend: Backend = "tree",
) -> CaoCurves:
    """Cao's E1 and E2: how much neighbours move apart when the embedding gains a dimension.

    E1 saturates near 1 for deterministic data; E2 near 1 at every dimension means noise.

    Args:
        values: series (n).
        tau: delay.
        max_dim: the largest dimension of E1 and E2.
        window: Theiler window; 1 removes most ties.
        metric: of the neighbours.
        jitter: standard deviation of noise that is added first, over that of the series: breaks the ties of rounded
            data, whose E depends on which neighbour is taken.
        backend: of `nearest_neighbours`.

    Raises:
        DataError: the series cannot be used or is too short.
        ValueError: an argument is out of range.
    """
    if tau < 1 or max_dim < 1:
        raise ValueError(f"tau and max_dim must be at least 1, got {tau} and {max_dim}")
    if jitter < 0:
        raise ValueError(f"jitter must be at least 0, got {jitter}")
    series = check_series(values, (max_dim + 1) * tau + 3 + window)
    if jitter:
        series = series + jitter * series.std() * np.random.default_rng(0).standard_normal(len(series))
    e, e_star = [], []
    for dim in range(1, max_dim + 2):
        rows = len(series) - dim * tau
        longer = delay_embedding(series, tau, dim + 1, rows)
        index, distance = nearest_neighbours(longer[:, :dim], metric=metric, window=window, backend=backend)
        known = index >= 0
        if not known.any():
            raise DataError(f"no point has a neighbour at another place in {dim} dimensions: are the values rounded?")
        apart = np.abs(longer[known] - longer[index[known]])
        grown = apart.max(1) if metric == "chebyshev" else np.sqrt((apart**2).sum(1))
        e.append(float(np.mean(grown / distance[known])))
        e_star.append(float(np.mean(apart[:, -1])))
    e_all, star_all = np.array(e), np.array(e_star)
    with np.errstate(divide="ignore", invalid="ignore"):
        return CaoCurves(e_all, star_all, e_all[1:] / e_all[:-1], star_all[1:] / star_all[:-1])


def minimum_dimension(e1: Array, saturated: float = _SATURATED, steady: float = _STEADY) -> int | None:
    """The first d with E1(d) >= saturated and |E1(d+1) - E1(d)| <= steady, plus one; None where there is none."""
    met = [d for d in range(len(e1) - 1) if e1[d] >= saturated and abs(e1[d + 1] - e1[d]) <= steady]
    return met[0] + 2 if met else None


# -- Lyapunov ----------------------------------------------------------------------------------------------------------


def divergence_curve(
    values: npt.ArrayLike,
    dim: int,
    tau: int,
    *,
    window: int = 10,
    steps: int = 12,
    metric: Metric = "euclidean",
    backend: Backend = "tree",
) -> Array:
    """Rosenstein's L(k), k = 0 ... steps - 1: mean logarithm of the distance of neighbours k steps later.

    Pairs that run past the end or meet exactly are left out; a step that no pair reaches is NaN.
    """
    if steps < 2:
        raise ValueError(f"steps must be at least 2, got {steps}")
    points = delay_embedding(check_series(values), tau, dim)
    index, distance = nearest_neighbours(points, metric=metric, window=window, backend=backend)
    first = np.flatnonzero(index >= 0)
    if not len(first):
        raise DataError(f"no delay vector has a neighbour more than {window} steps away")
    second, curve = index[first], [float(np.mean(np.log(distance[first])))]
    for step in range(1, steps):
        inside = (first + step < len(points)) & (second + step < len(points))
        apart = np.abs(points[first[inside] + step] - points[second[inside] + step])
        later = apart.max(1) if metric == "chebyshev" else np.sqrt((apart**2).sum(1))
        later = later[later > 0]
        curve.append(float(np.mean(np.log(later))) if len(later) else math.nan)
    return np.array(curve)


def rosenstein_lyapunov(
    values: npt.ArrayLike, dim: int, tau: int, *, window: int = 10, fit: tuple[int, int] = (0, 7), **options: Any
) -> float:
    """Largest Lyapunov exponent per step: slope of the divergence curve over the steps ``fit``, both included.

    Args:
        values: series (n).
        dim, tau: of the embedding.
        window: Theiler window; neighbours on the same stretch of the orbit pull the exponent to 0.
        fit: first and last step of the straight part.
        options: ``metric`` and ``backend`` of `divergence_curve`.
    """
    first, last = fit
    if not 0 <= first < last:
        raise ValueError(f"fit must be two growing steps from 0 on, got {fit}")
    curve = divergence_curve(values, dim, tau, window=window, steps=last + 1, **options)
    steps = np.arange(first, last + 1)
    return float(np.polyfit(steps, curve[first:], 1)[0])


# -- all three ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ChaosAnalysis:
    """What the three steps found.

    Attributes:
        tau, dim: delay and dimension of the embedding.
        exponent: largest Lyapunov exponent per step.
        curves: Cao's.
        random: whether E2 stays near 1 at every dimension.
        lags: order of an autoregression, for a series that is not chaotic.
        notes: where a rule found nothing and a default stands in.
    """

    tau: int
    dim: int
    exponent: float
    curves: CaoCurves
    random: bool
    lags: int
    notes: tuple[str, ...]

    @property
    def chaotic(self) -> bool:
        """Whether the exponent is positive and the series is not told to be random by E2."""
        return self.exponent > 0 and not self.random

    def as_plain(self) -> dict[str, Any]:
        """Numbers, strings and lists, for a file."""
        curves = {name: curve.tolist() for name, curve in self.curves._asdict().items()}
        return {**vars(self), "curves": curves, "notes": list(self.notes)}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> ChaosAnalysis:
        """What `as_plain` came from."""
        curves = CaoCurves(**{name: np.array(curve) for name, curve in plain["curves"].items()})
        return cls(**{**plain, "curves": curves, "notes": tuple(plain["notes"])})


def analyse_chaos(
    values: npt.ArrayLike,
    *,
    rule: LagRule = "inv_e",
    max_lag: int = 40,
    max_dim: int = 10,
    window: int = 10,
    tau: int | None = None,
    dim: int | None = None,
    saturated: float = _SATURATED,
    steady: float = _STEADY,
    max_order: int = 14,
    max_points: int = 5000,
) -> ChaosAnalysis:
    """Lag, dimension and exponent of the training part of a series.

    Args:
        values: series (n).
        rule, max_lag: of `acf_lag`.
        max_dim: the largest dimension of Cao's curves, and what is used, with a warning, where E1 does not saturate.
        window: Theiler window of the exponent; the mean period is a good choice.
        tau, dim: instead of what the rules find.
        saturated, steady: of `minimum_dimension`.
        max_order: the most plain lags, of `autoregressive_order`.
        max_points: of a longer series the last ones are tested: to search for neighbours of noise takes a time that
            grows as their square.

    Raises:
        DataError: the series cannot be used, or is shorter than (max_dim + 1) tau + 30 points.
    """
    series, notes = check_series(values), []
    if len(series) > max_points:
        notes.append(f"of {len(series)} values the last {max_points} were tested")
        series = check_series(series[-max_points:])
    found = acf_lag(series, rule, max_lag) if tau is None else tau
    if found is None:
        notes.append(f"the autocorrelation meets the rule {rule} at no lag up to {max_lag}: 1 is used")
    delay = found or 1
    most = max(dim or 1, min(max_dim, (len(series) - 30) // delay - 1))
    if len(series) < (most + 1) * delay + 30:
        raise DataError(f"need at least (m - 1) * tau + 30 points, got {len(series)} with tau = {delay}")
    curves = cao_embedding(series, delay, most)
    chosen = minimum_dimension(curves.e1, saturated, steady) if dim is None else dim
    if chosen is None:
        notes.append(f"E1 does not saturate up to dimension {most}: that is used")
    chosen = min(chosen or most, most)
    random = bool(np.all(np.abs(curves.e2[1:] - 1) <= _FLAT)) if len(curves.e2) > 1 else False
    exponent = rosenstein_lyapunov(series, chosen, delay, window=window)
    order = autoregressive_order(series, min(max_order, (len(series) - 3) // 2))
    for note in notes:
        warnings.warn(note, RuntimeWarning, stacklevel=2)
    return ChaosAnalysis(delay, chosen, exponent, curves, random, order, tuple(notes))
