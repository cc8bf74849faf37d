"""Time series from CSV files, public series that come with statsmodels, and a simulator of cash demand.

A file has a column of dates and one or many columns of values (wide), or a column that names the series of each row
(long). Times lie on a regular grid of seconds, days, months or years; what is missing on it is reported, not hidden.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from convatlas.errors import DataError, require, unknown

__all__ = ["BUILT_IN", "SeriesSet", "cash_demand", "next_times", "read_series"]

Array = npt.NDArray[np.float64]
Times = npt.NDArray[np.datetime64]

#: Length of the season for each unit of the grid; that of other grids is 1.
_PERIODS = {"1 D": 7, "1 M": 12, "7 D": 52, "3600 s": 24}
_MISSING = {"", "nan", "na", "n/a", "null", "none", "-"}
#: Effect of the weekday on simulated demand, Monday first.
_WEEKDAY = (25.0, 5.0, -5.0, 0.0, 10.0, 30.0, -40.0)


@dataclass(frozen=True, eq=False)
class SeriesSet:
    """Series on one grid of times.

    Attributes:
        times: of the grid (n), from the first to the last one known of any series.
        values: (series, n), NaN where nothing is known.
        names: of the series.
        step: of the grid: a number and a unit, e.g. ``"1 D"``; units are s, D, M and Y.
    """

    times: Times
    values: Array
    names: tuple[str, ...]
    step: str

    @property
    def period(self) -> int:
        """Length of the season that the grid suggests: 7 for days, 12 for months, 24 for hours, 1 where none does."""
        return _PERIODS.get(self.step, 1)

    def gaps(self) -> dict[str, int]:
        """How many values each series lacks between its first and its last one."""
        found = {}
        for name, row in zip(self.names, self.values, strict=True):
            known = np.flatnonzero(~np.isnan(row))
            found[name] = int(known[-1] - known[0] + 1 - len(known)) if len(known) else 0
        return found

    def one(self, index: int) -> tuple[Times, Array]:
        """Times and values of one series from its first to its last known value."""
        known = np.flatnonzero(~np.isnan(self.values[index]))
        part = slice(int(known[0]), int(known[-1]) + 1)
        return self.times[part], self.values[index, part]


def next_times(last: np.datetime64, step: str, count: int) -> Times:
    """The ``count`` times of the grid after ``last``."""
    number, unit = step.split()
    start = np.asarray(last).astype(f"datetime64[{unit}]")
    grid = start + np.arange(1, count + 1) * np.timedelta64(int(number), unit)  # type: ignore[call-overload]
    if unit in ("M", "Y"):
        day = np.asarray(last).astype("datetime64[D]") - start.astype("datetime64[D]")
        grid = grid.astype("datetime64[D]") + day
    times: Times = grid.astype("datetime64[s]")
    return times


def read_series(
    source: str | Path,
    *,
    date_column: str = "",
    value_columns: Sequence[str] = (),
    id_column: str = "",
    date_format: str = "",
    series: int = 10,
    length: int = 700,
    seed: int = 0,
) -> SeriesSet:
    """Read a CSV file, or one of the `BUILT_IN` sets by its name.

    Args:
        source: file, or ``cash_demand``, ``sunspots``, ``co2`` or ``elnino``.
        date_column: name of the column of dates; the first one when left out.
        value_columns: names of the columns of values; all others with numbers when left out.
        id_column: name of the column that tells the series of a row, of a long table.
        date_format: as for ``strptime``, e.g. ``%d/%m/%Y``; ISO 8601 when left out.
        series, length, seed: of the simulator ``cash_demand``.

    Raises:
        DataError: the file cannot be read or used; the message names line and column.
    """
    if str(source) == "cash_demand":
        return cash_demand(series, length, seed=seed)
    if str(source) in BUILT_IN:
        return BUILT_IN[str(source)]()
    path = Path(source)
    if not path.is_file():
        raise DataError(f"{source} is no file and none of the built-in series: {', '.join(BUILT_IN)}")
    header, rows = _read_csv(path)
    date_column = date_column or header[0]
    for name in (date_column, *value_columns, *([id_column] if id_column else [])):
        if name not in header:
            raise DataError(f"{path}: {unknown('column', name, header)}")
    columns = list(value_columns) or _numeric(header, rows, {date_column, id_column})
    if not columns:
        raise DataError(f"{path} has no column of numbers beside the dates")
    parts: dict[str, tuple[list[np.datetime64], list[float]]] = {}
    for line, row in rows:
        cells = dict(zip(header, row, strict=True))
        time = _date(cells[date_column], date_format, f"{path}, line {line}, column {date_column}")
        for column in columns:
            name = " ".join(
                filter(None, (cells[id_column] if id_column else "", "" if _alone(columns, id_column) else column))
            )
            times, values = parts.setdefault(name or column, ([], []))
            times.append(time)
            values.append(_value(cells[column], f"{path}, line {line}, column {column}"))
    return _on_grid({name: (np.array(times), np.array(values)) for name, (times, values) in parts.items()}, str(path))


def _alone(columns: Sequence[str], id_column: str) -> bool:
    return bool(id_column) and len(columns) == 1


def _read_csv(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path} is no text in UTF-8: {error}") from None
    lines = text.splitlines()
    if "\0" in text or not any(line.strip() for line in lines):
        raise DataError(f"{path} is {'no text' if text.strip() else 'empty'}")
    separator = max(",;\t", key=lines[0].count)
    reader = csv.reader(lines, delimiter=separator)
    try:
        header = [cell.strip() for cell in next(reader)]
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(map(str.strip, row))]
    except csv.Error as error:
        raise DataError(f"{path} is no CSV file: {error}") from None
    if len(set(header)) != len(header) or len(header) < 2:
        raise DataError(f"{path} must begin with a line of at least two different column names, got {lines[0][:80]!r}")
    for line, row in rows:
        if len(row) != len(header):
            raise DataError(f"{path}, line {line}: expected {len(header)} cells, got {len(row)}")
    if not rows:
        raise DataError(f"{path} has no rows below its column names")
    return header, rows


def _numeric(header: Sequence[str], rows: Sequence[tuple[int, list[str]]], others: set[str]) -> list[str]:
    """Columns whose first known cell is a number."""
    found = []
    for index, name in enumerate(header):
        first = next((row[index] for _, row in rows if row[index].lower() not in _MISSING), "")
        try:
            float(first)
        except ValueError:
            continue
        if name not in others:
            found.append(name)
    return found


def _date(text: str, form: str, where: str) -> np.datetime64:
    try:
        moment = datetime.strptime(text, form) if form else datetime.fromisoformat(text)
    except ValueError:
        expected = f"a date as {form}" if form else "a date like 2026-11-27 (set date_format for others)"
        raise DataError(f"{where}: expected {expected}, got {text!r}") from None
    return np.datetime64(moment.replace(tzinfo=None), "s")


def _value(text: str, where: str) -> float:
    if text.lower() in _MISSING:
        return float("nan")
    try:
        value = float(text)
    except ValueError:
        raise DataError(f"{where}: expected a number, got {text!r}") from None
    if not np.isfinite(value):
        raise DataError(f"{where}: values must be finite, got {text}")
    return value


def _on_grid(parts: dict[str, tuple[Times, Array]], source: str) -> SeriesSet:
    """Series whose rows are in order, on the grid that their times share."""
    for name, (times, values) in parts.items():
        backwards = np.flatnonzero(np.diff(times) <= np.timedelta64(0, "s"))
        if len(backwards):
            place = times[backwards[0] + 1].astype("datetime64[D]")
            same = times[backwards[0]] == times[backwards[0] + 1]
            raise DataError(f"{source}, series {name}: {place} {'comes twice' if same else 'is not in order'}")
        if np.isnan(values).all():
            raise DataError(f"{source}, series {name}: there is no value")
    every = np.unique(np.concatenate([times for times, _ in parts.values()]))
    if len(every) < 2:
        raise DataError(f"{source}: a series needs at least 2 times, got {len(every)}")
    step, places = _grid(every, source)
    span = int(places[-1]) + 1
    rows = np.full((len(parts), span), np.nan)
    for row, (times, values) in zip(rows, parts.values(), strict=True):
        row[places[np.searchsorted(every, times)]] = values
    grid = np.concatenate([every[:1], next_times(every[0], step, span - 1)])
    return SeriesSet(grid, rows, tuple(parts), step)


def _grid(times: Times, source: str) -> tuple[str, npt.NDArray[np.int64]]:
    """The step of a grid that holds all times, and their places on it."""
    days = times.astype("datetime64[D]")
    whole = bool((times == days.astype("datetime64[s]")).all())
    for unit in ("Y", "M"):
        coarse = days.astype(f"datetime64[{unit}]")
        offset = days - coarse.astype("datetime64[D]")
        if whole and len(np.unique(coarse)) == len(coarse) and len(np.unique(offset)) == 1:
            places = (coarse - coarse[0]).astype(np.int64)
            common = _most_common(np.diff(places))
            if not (places % common).any():
                return f"{common} {unit}", places // common
    fine, unit = (days, "D") if whole else (times.astype("datetime64[s]"), "s")
    places = (fine - fine[0]).astype(np.int64)
    common = _most_common(np.diff(places))
    off = np.flatnonzero(places % common)
    if len(off):
        raise DataError(f"{source}: times must be multiples of the step of {common} {unit}, {times[off[0]]} is not")
    return f"{common} {unit}", places // common


def _most_common(steps: npt.NDArray[np.int64]) -> int:
    return int(Counter(steps.tolist()).most_common(1)[0][0])


# -- built in ----------------------------------------------------------------------------------------------------------


def cash_demand(
    series: int = 10,
    length: int = 700,
    *,
    seed: int = 0,
    missing: float = 0.0,
    outages: float = 0.0,
    trend: float = 0.0,
    festivals: float = 0.0,
    dynamics: Literal["logistic", "mackey_glass"] = "logistic",
) -> SeriesSet:
    """Daily cash demand of machines: weekday, beginning of the month, a chaotic component and noise, not below 0.

    Each has 100 + w[weekday] + 25 (t mod 30 < 6) + 30 (c_t - 0.5) + 6 noise, c the logistic map with r = 3.82.

    Args:
        series, length: how many machines and days; the first day is a Monday.
        seed: of all randomness.
        missing, outages: share of the days that are NaN, and 0.
        trend: change over the whole length.
        festivals: share of the days with a demand 80 higher.
        dynamics: the chaotic component; ``mackey_glass`` is the delay equation of that name, scaled to 0 to 1.

    Raises:
        ValueError: an argument is out of range.
    """
    if series < 1 or length < 2:
        raise ValueError(f"series must be at least 1 and length at least 2, got {series} and {length}")
    if dynamics not in _DYNAMICS:
        raise unknown("dynamics", str(dynamics), _DYNAMICS)
    day, rows = np.arange(length), []
    for index in range(series):
        random = np.random.default_rng([seed, index])
        level = 100 + np.array(_WEEKDAY)[day % 7] + 25 * (day % 30 < 6) + trend * day / length
        chaos = _DYNAMICS[dynamics](length, random)
        row = level + 30 * (chaos - 0.5) + 6 * random.standard_normal(length)
        row = np.maximum(row + 80 * (random.random(length) < festivals), 0)
        row[random.random(length) < outages] = 0
        gone = random.random(length) < missing
        gone[[0, -1]] = False
        row[gone] = np.nan
        rows.append(row)
    times = np.datetime64("2024-01-01", "s") + day * np.timedelta64(86400, "s")
    return SeriesSet(times, np.stack(rows), tuple(f"atm{index + 1}" for index in range(series)), "1 D")


def _logistic(length: int, random: np.random.Generator) -> Array:
    values, value = np.empty(length), 0.1 + 0.8 * random.random()
    for index in range(-100, length):
        value = 3.82 * value * (1 - value)
        if index >= 0:
            values[index] = value
    return values


def _mackey_glass(length: int, random: np.random.Generator) -> Array:
    """dx/dt = 0.2 x(t - 17) / (1 + x(t - 17)^10) - 0.1 x by Euler steps of 1, every third value, scaled to 0 to 1."""
    values = list(1.2 + 0.1 * random.standard_normal(18))
    for _ in range(3 * (length + 100)):
        late = values[-18]
        values.append(values[-1] + 0.2 * late / (1 + late**10) - 0.1 * values[-1])
    chosen = np.array(values[18 + 300 :: 3][:length])
    return (chosen - chosen.min()) / max(float(np.ptp(chosen)), 1e-12)


_DYNAMICS: dict[str, Callable[[int, np.random.Generator], Array]] = {
    "logistic": _logistic,
    "mackey_glass": _mackey_glass,
}


def _public(name: str) -> tuple[npt.NDArray[np.generic], ...]:
    datasets = require("statsmodels.datasets", extra="series", purpose=f"the built-in series {name}")
    table = getattr(datasets, name).load_pandas().data
    return table.index.to_numpy(), table.to_numpy()


def _sunspots() -> SeriesSet:
    _, table = _public("sunspots")
    years = table[:, 0].astype(int).astype(str).astype("datetime64[Y]").astype("datetime64[s]")
    return _on_grid({"sunspots": (years, table[:, 1].astype(float))}, "sunspots")


def _co2() -> SeriesSet:
    """Weekly measurements as means of the months."""
    weeks, table = _public("co2")
    months = weeks.astype("datetime64[M]")
    every = np.unique(months)
    values = table[:, 0].astype(float)
    known = ~np.isnan(values)
    means = [
        float(values[known & (months == month)].mean()) if (known & (months == month)).any() else np.nan
        for month in every
    ]
    return _on_grid({"co2": (every.astype("datetime64[s]"), np.array(means))}, "co2")


def _elnino() -> SeriesSet:
    _, table = _public("elnino")
    first = np.datetime64(f"{int(table[0, 0])}-01", "M")
    values = table[:, 1:].astype(float).ravel()
    months = (first + np.arange(len(values))).astype("datetime64[s]")
    return _on_grid({"elnino": (months, values)}, "elnino")


#: Sets that need no file; all but the simulator come with statsmodels.
BUILT_IN: dict[str, Callable[[], SeriesSet]] = {
    "cash_demand": cash_demand,
    "co2": _co2,
    "elnino": _elnino,
    "sunspots": _sunspots,
}
