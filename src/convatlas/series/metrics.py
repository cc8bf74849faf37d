"""Errors of forecasts, and tests of whether two forecasts differ.

A true value that is not known is NaN and left out of every measure, an error that is not known of the test.

Diebold, Mariano: "Comparing predictive accuracy", JBES 13, 1995; Harvey, Leybourne, Newbold: "Testing the equality of
prediction mean squared errors", Int. J. Forecasting 13, 1997; Theil: "Applied economic forecasting", 1966.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

__all__ = [
    "DieboldMariano",
    "TTest",
    "coverage",
    "diebold_mariano",
    "forecast_quality",
    "holm",
    "mae",
    "mape",
    "nrmse",
    "smape",
    "t_test",
    "theil_u",
]

Array = npt.NDArray[np.float64]


def _pair(actual: npt.ArrayLike, forecast: npt.ArrayLike) -> tuple[Array, Array]:
    a, f = np.asarray(actual, np.float64), np.asarray(forecast, np.float64)
    if a.shape != f.shape or a.size == 0:
        raise ValueError(f"actual and forecast must have one shape and hold values, got {a.shape} and {f.shape}")
    if np.isinf(a).any():
        raise ValueError("actual must be finite, or NaN where it is not known, got infinity")
    if np.isnan(a).all():
        raise ValueError("actual must hold values, got NaN alone")
    if not np.isfinite(f).all():
        raise ValueError("forecast must be finite, got NaN or infinity")
    return a, f


def _known(actual: npt.ArrayLike, forecast: npt.ArrayLike) -> tuple[Array, Array]:
    """Those actual values (n) that are known, and their forecasts."""
    a, f = _pair(actual, forecast)
    known = ~np.isnan(a)
    return a[known], f[known]


def smape(actual: npt.ArrayLike, forecast: npt.ArrayLike) -> float:
    """Symmetric mean absolute percentage error, 0 to 200 %: |f - a| over (|a| + |f|) / 2; terms of 0 and 0 are 0."""
    a, f = _known(actual, forecast)
    scale = (np.abs(a) + np.abs(f)) / 2
    return float(100 * np.mean(np.divide(np.abs(f - a), scale, out=np.zeros_like(scale), where=scale > 0)))


def nrmse(actual: npt.ArrayLike, forecast: npt.ArrayLike) -> float:
    """Root mean squared error over the range of the actual values; NaN where these are all equal."""
    a, f = _known(actual, forecast)
    span = float(np.ptp(a))
    return math.sqrt(float(np.mean((f - a) ** 2))) / span if span else math.nan


def mae(actual: npt.ArrayLike, forecast: npt.ArrayLike) -> float:
    """Mean absolute error."""
    a, f = _known(actual, forecast)
    return float(np.mean(np.abs(f - a)))


def mape(actual: npt.ArrayLike, forecast: npt.ArrayLike) -> float:
    """Mean absolute percentage error in % of the actual values; NaN where one of them is 0."""
    a, f = _known(actual, forecast)
    return math.nan if (a == 0).any() else float(100 * np.mean(np.abs((f - a) / a)))


def theil_u(actual: npt.ArrayLike, forecast: npt.ArrayLike) -> float:
    """Theil's U of one-step forecasts (n): root of their squared errors over those of the last value, from t = 1 on."""
    a, f = _pair(actual, forecast)
    step, error = np.diff(a), f[1:] - a[1:]
    known = ~np.isnan(step)
    naive = float(np.sum(step[known] ** 2))
    return math.sqrt(float(np.sum(error[known] ** 2)) / naive) if naive else math.nan


def coverage(actual: npt.ArrayLike, low: npt.ArrayLike, high: npt.ArrayLike) -> float:
    """Share of the actual values within their intervals, in %."""
    a, lower = _known(actual, low)
    _, upper = _known(actual, high)
    return float(100 * np.mean((lower <= a) & (a <= upper)))


def forecast_quality(actual: npt.ArrayLike, forecast: npt.ArrayLike) -> dict[str, float]:
    """SMAPE [%], NRMSE, MAE, MAPE [%] and Theil's U of one-step forecasts."""
    measures = {"SMAPE [%]": smape, "NRMSE": nrmse, "MAE": mae, "MAPE [%]": mape, "Theil U": theil_u}
    return {name: measure(actual, forecast) for name, measure in measures.items()}


class DieboldMariano(NamedTuple):
    """The statistic with its two-sided p of the normal, and with the correction of Harvey et al. and p of t(n - 1)."""

    statistic: float
    p: float
    corrected: float
    p_corrected: float


def diebold_mariano(
    first: npt.ArrayLike, second: npt.ArrayLike, *, horizon: int = 1, power: float = 2
) -> DieboldMariano:
    """Test whether two forecasts of the same values are equally good; a negative statistic favours the first.

    Args:
        first, second: their errors (n), at the same times; NaN where the true value is not known.
        horizon: steps ahead; autocovariances below it count.
        power: 1 compares absolute errors, 2 squared ones.

    Raises:
        ValueError: the errors are not of the same times, or an argument is out of range.
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"errors must be of the same times, one axis each, got shapes {a.shape} and {b.shape}")
    if np.isinf(a).any() or np.isinf(b).any() or (np.isnan(a) != np.isnan(b)).any():
        raise ValueError("errors must be finite, or NaN at the same times")
    known = ~np.isnan(a)
    n = int(known.sum())
    if not 1 <= horizon < n:
        raise ValueError(f"horizon must be from 1 to below the {n} errors, got {horizon}")
    if power <= 0:
        raise ValueError(f"power must be positive, got {power}")
    difference = np.abs(a) ** power - np.abs(b) ** power
    mean = float(difference[known].mean())
    if not difference[known].any():
        return DieboldMariano(0.0, 1.0, 0.0, 1.0)
    centred = np.where(known, difference - mean, 0.0)  # a pair of which one is not known adds nothing
    covariances = [float(np.dot(centred[: len(a) - k], centred[k:])) / n for k in range(horizon)]
    variance = covariances[0] + 2 * sum(covariances[1:])
    if variance <= 0 and horizon > 1:
        warnings.warn(f"the variance at horizon {horizon} is {variance:g}: that of 1 is used", RuntimeWarning, 2)
        variance, horizon = covariances[0], 1
    if variance <= 0:  # the same difference at all times
        endless = math.copysign(math.inf, mean)
        return DieboldMariano(endless, 0.0, endless, 0.0)
    statistic = mean / math.sqrt(variance / n)
    factor = math.sqrt((n + 1 - 2 * horizon + horizon * (horizon - 1) / n) / n)
    corrected = statistic * factor
    p = 2 * float(stats.norm.sf(abs(statistic)))
    return DieboldMariano(statistic, p, corrected, 2 * float(stats.t.sf(abs(corrected), n - 1)))


class TTest(NamedTuple):
    """Student's statistic and its two-sided p."""

    statistic: float
    p: float


def t_test(first: npt.ArrayLike, second: npt.ArrayLike, *, paired: bool = True) -> TTest:
    """Compare the means of two samples, in pairs (of one series, or of one day) or by Welch's test.

    Raises:
        ValueError: a sample has fewer than two values, or pairs are not of equal number.
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if min(a.size, b.size) < 2 or a.ndim != 1 or b.ndim != 1 or (paired and a.shape != b.shape):
        raise ValueError(f"samples must have at least two values, in pairs equally many, got {a.shape} and {b.shape}")
    if paired and np.ptp(a - b) == 0:
        mean = float((a - b).mean())
        return TTest(math.copysign(math.inf, mean), 0.0) if mean else TTest(0.0, 1.0)
    result = stats.ttest_rel(a, b) if paired else stats.ttest_ind(a, b, equal_var=False)
    return TTest(float(result.statistic), float(result.pvalue))


def holm(p_values: Mapping[str, float] | Sequence[float]) -> list[float]:
    """Holm's correction of several p, in their order."""
    given = list(p_values.values()) if isinstance(p_values, Mapping) else list(p_values)
    order = sorted(range(len(given)), key=lambda place: given[place])
    corrected, largest = [0.0] * len(given), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(given) - rank) * given[place]))
        corrected[place] = largest
    return corrected
