"""A series as a table: values imputed without looking ahead, delays rebuilt from the past, the calendar of the target.

Vangala, Ravi: "ATM Cash demand forecasting in an Indian Bank with chaos and deep learning", arXiv 2008.10365.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from convatlas.errors import DataError, unknown
from convatlas.series.chaos import check_series

__all__ = [
    "Calendar",
    "Cleaned",
    "Scaler",
    "StateSpaceFeatures",
    "calendar_features",
    "clean",
    "natural_calendar",
    "one_hot",
    "weekdays",
]

Array = npt.NDArray[np.float64]
Calendar = Literal["dow", "hour", "month", "month_start", "holidays"]

#: Seasons back over which a missing value is averaged.
_SEASONS = 4
#: Days at the beginning of a month that are told apart.
_MONTH_START = 6


class Cleaned(NamedTuple):
    """A series without gaps, and the positions that were filled."""

    values: Array
    filled: npt.NDArray[np.int64]


def clean(values: npt.ArrayLike, *, period: int = 7, zeros: Literal["impute", "keep"] = "impute") -> Cleaned:
    """Fill missing values (NaN) by the mean of the same place of the season in the 4 seasons before.

    Where these hold nothing, the last known value stands in. Nothing that comes later is looked at.

    Args:
        values: series (n); it must begin with a value.
        period: length of the season: 7 for daily data.
        zeros: whether zeros count as missing, as of a machine out of service.

    Raises:
        DataError: the series is empty, begins with a gap or holds an infinity.
    """
    series = np.array(values, dtype=np.float64)
    if series.ndim != 1 or not len(series):
        raise DataError(f"a series must have one axis with values, got shape {series.shape}")
    if np.isinf(series).any():
        raise DataError("values must be finite, got infinity")
    if zeros not in ("impute", "keep"):
        raise unknown("zeros", str(zeros), ("impute", "keep"))
    if period < 1:
        raise ValueError(f"period must be at least 1, got {period}")
    if (series < 0).any():
        warnings.warn(f"{int((series < 0).sum())} values are negative", RuntimeWarning, stacklevel=2)
    missing = np.isnan(series) | ((series == 0) if zeros == "impute" else False)
    if missing[0]:
        raise DataError("the series must begin with a known value")
    known = np.where(missing, np.nan, series)
    for place in np.flatnonzero(missing):
        before = [known[place - k * period] for k in range(1, _SEASONS + 1) if place >= k * period]
        before = [value for value in before if not np.isnan(value)]
        series[place] = float(np.mean(before)) if before else series[place - 1]
    return Cleaned(series, np.flatnonzero(missing))


def weekdays(dates: npt.NDArray[np.datetime64]) -> npt.NDArray[np.int64]:
    """Day of the week of dates (n), 0 for Monday."""
    return (dates.astype("datetime64[D]").astype(np.int64) + 3) % 7


def one_hot(values: npt.ArrayLike, classes: int) -> Array:
    """Whole numbers (n) from 0 to classes - 1 as rows (n, classes) with a single 1.

    Raises:
        ValueError: a number is out of range.
    """
    numbers = np.asarray(values)
    if numbers.size and not (0 <= numbers.min() and numbers.max() < classes):
        raise ValueError(f"values must be from 0 to {classes - 1}, got {numbers.min()} to {numbers.max()}")
    return np.eye(classes)[numbers.astype(np.int64)]


def calendar_features(
    dates: npt.NDArray[np.datetime64], kinds: Sequence[Calendar], holidays: Sequence[str] = ()
) -> Array:
    """What the calendar tells of dates (n), as columns (n, features).

    Args:
        dates: of the targets.
        kinds: ``dow`` (7 columns, Monday first), ``hour`` (24), ``month`` (12), ``month_start`` (1: the first 6 days),
            ``holidays`` (1).
        holidays: days, e.g. ``2026-11-08``.

    Raises:
        UnknownName: there is no such kind.
    """
    day, month = dates.astype("datetime64[D]"), dates.astype("datetime64[M]")
    columns = [np.zeros((len(dates), 0))]
    for kind in kinds:
        if kind not in get_args(Calendar):
            raise unknown("calendar feature", str(kind), get_args(Calendar))
        if kind == "dow":
            columns.append(one_hot(weekdays(dates), 7))
        elif kind == "hour":
            columns.append(one_hot((dates.astype("datetime64[h]") - day).astype(np.int64), 24))
        elif kind == "month":
            columns.append(one_hot(month.astype(np.int64) % 12, 12))
        elif kind == "month_start":
            columns.append(((day - month).astype(np.int64) < _MONTH_START).astype(np.float64)[:, None])
        else:
            listed = np.array(list(holidays), dtype="datetime64[D]")
            columns.append(np.isin(day, listed).astype(np.float64)[:, None])
    return np.concatenate(columns, 1)


def natural_calendar(step: str) -> tuple[Calendar, ...]:
    """What matters on a grid, e.g. ``"1 D"``: the weekday of days, the hour too of less, the month of more."""
    number, unit = step.split()
    if unit == "s":
        return ("dow", "hour")
    if step in ("1 D", "1 B"):
        return ("dow",)
    return () if unit == "Y" or (unit in ("M", "ME") and int(number) % 12 == 0) else ("month",)


class Scaler(NamedTuple):
    """Mean and population standard deviation of columns, a constant column's taken as 1."""

    mean: Array
    scale: Array

    @classmethod
    def fit(cls, rows: Array) -> Scaler:
        """Of the training rows (n, columns) or values (n)."""
        deviation = np.std(rows, 0)
        return cls(np.mean(rows, 0), np.where(deviation > 0, deviation, 1.0))

    def apply(self, rows: Array) -> Array:
        """Standardise rows or values."""
        return (rows - self.mean) / self.scale

    def inverse(self, rows: Array) -> Array:
        """Undo the standardisation."""
        return rows * self.scale + self.mean


@dataclass(frozen=True)
class StateSpaceFeatures:
    """The table of one-step forecasts: m lags tau apart, the most recent first, and the calendar of the target.

    Attributes:
        tau: delay; 1 for plain lags.
        m: number of lags.

    Raises:
        ValueError: a number is below 1.
    """

    tau: int = 1
    m: int = 1

    def __post_init__(self) -> None:
        if self.tau < 1 or self.m < 1:
            raise ValueError(f"tau and m must be at least 1, got {self.tau} and {self.m}")

    @property
    def reach(self) -> int:
        """How many values before the target the lags reach back."""
        return (self.m - 1) * self.tau + 1

    def table(
        self, values: npt.ArrayLike, calendar: npt.ArrayLike | None = None, ahead: int = 0
    ) -> tuple[Array, Array]:
        """Rows (n - reach - ahead, m + features) and targets (n - reach - ahead) of a series (n).

        Args:
            values: the series.
            calendar: features of the times of the series (n, features).
            ahead: steps between the lags and the target, for direct forecasts of more than one step.

        Raises:
            DataError: the series holds NaN or is too short, or the calendar is of another length.
        """
        series = check_series(values)
        if len(series) < self.reach + 29 + ahead:
            least = "(m-1)*tau + 30 points" + (f" and {ahead} steps ahead" if ahead else "")
            raise DataError(f"need at least {least}: {self.reach + 29 + ahead}, got {len(series)}")
        targets = np.arange(self.reach + ahead, len(series))
        features = np.zeros((len(series), 0)) if calendar is None else np.asarray(calendar, np.float64)
        if features.ndim != 2 or len(features) != len(series):
            raise DataError(f"calendar must be ({len(series)}, features) like the series, got {features.shape}")
        return np.concatenate([self.lags(series, targets - ahead), features[targets]], 1), series[targets]

    def lags(self, series: Array, targets: npt.NDArray[np.int64]) -> Array:
        """The lags (targets, m) of positions of a series, which may be one past its end."""
        return series[targets[:, None] - 1 - self.tau * np.arange(self.m)]
