"""Time series from CSV files, public series that come with statsmodels, and a simulator of cash demand.

A file has a column of dates and one or many columns of values (wide), or a column that names the series of each row
(long). Times lie on a regular grid of seconds, days, working days, months or years; what is missing on it is reported,
not hidden.
"""

from __future__ import annotations

import csv
import gzip
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Literal, cast

import numpy as np
import numpy.typing as npt

from convatlas.errors import DataError, require, unknown

__all__ = ["BUILT_IN", "SeriesSet", "cash_demand", "next_times", "read_series"]

Array = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]
Times = npt.NDArray[np.datetime64]
Decimal = Literal[".", ","]

_MISSING = {"", "nan", "na", "n/a", "null", "none", "-"}
_SEPARATORS = ",;\t"
#: A number whose decimals follow a comma: points may part its thousands.
_DECIMAL_COMMA = re.compile(r"[+-]?(\d+|\d{1,3}(\.\d{3})+)?(,\d+)?(e[+-]?\d+)?", re.IGNORECASE)
_EPOCH = datetime(1970, 1, 1)
_DAY = 86_400
#: A grid of which fewer than this share of the times is there is none.
_REGULAR = 0.2
#: Effect of the weekday on simulated demand, Monday first.
_WEEKDAY = (25.0, 5.0, -5.0, 0.0, 10.0, 30.0, -40.0)


@dataclass(frozen=True, eq=False)
class SeriesSet:
    """Series on one grid of times.

    Attributes:
        times: of the grid (n), from the first to the last one known of any series.
        values: (series, n), NaN where nothing is known.
        names: of the series.
        step: of the grid: a number and a unit, e.g. ``"1 D"``; units are s, D, B (working days, Monday to Friday), M,
            ME (ends of months) and Y.
    """

    times: Times
    values: Array
    names: tuple[str, ...]
    step: str

    @property
    def period(self) -> int:
        """Length of the season that the grid suggests; 1 where it suggests none.

        A week of days (7) or working days (5), a year of weeks (52) or months (12), a day of hours (24) or of other
        steps of at least a minute.
        """
        number, unit = self.step.split()
        count = int(number)
        if unit == "s":
            return _DAY // count if count >= 60 and _DAY % count == 0 else 1
        if unit in ("M", "ME"):
            return 12 // count if 12 % count == 0 else 1
        return {"1 D": 7, "1 B": 5, "7 D": 52}.get(self.step, 1)

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
    places = np.arange(1, count + 1) * int(number)
    if unit in ("s", "D"):
        return _seconds(np.asarray(last).astype(f"datetime64[{unit}]") + places)  # type: ignore[arg-type]
    day = np.asarray(last).astype("datetime64[D]")
    if unit == "B":
        return _seconds(np.busday_offset(day, places))
    if unit == "ME":
        return _seconds((day.astype("datetime64[M]") + places + 1).astype("datetime64[D]") - 1)
    start = day.astype(f"datetime64[{unit}]")
    return _seconds((start + places).astype("datetime64[D]") + (day - start.astype("datetime64[D]")))


def _seconds(times: npt.NDArray[np.datetime64]) -> Times:
    return times.astype("datetime64[s]")


# -- files -------------------------------------------------------------------------------------------------------------


def read_series(
    source: str | Path,
    *,
    date_column: str = "",
    value_columns: Sequence[str] = (),
    id_column: str = "",
    date_format: str = "",
    decimal: Decimal = ".",
    series: int = 10,
    length: int = 700,
    seed: int = 0,
) -> SeriesSet:
    """Read a CSV file, also a gzipped one, or one of the `BUILT_IN` sets by its name.

    Rows are read one by one: memory is that of the numbers.

    Args:
        source: file, or ``cash_demand``, ``sunspots``, ``co2`` or ``elnino``.
        date_column: name of the column of dates; the first one when left out.
        value_columns: names of the columns of values; all others with numbers when left out.
        id_column: name of the column that tells the series of a row, of a long table.
        date_format: as for ``strptime``, e.g. ``%d/%m/%Y``; ISO 8601 when left out.
        decimal: mark before the decimals; with ``,`` points may part the thousands.
        series, length, seed: of the simulator ``cash_demand``.

    Raises:
        DataError: the file cannot be read or used; the message names line and column.
    """
    if str(source) == "cash_demand":
        return cash_demand(series, length, seed=seed)
    if str(source) in BUILT_IN:
        return BUILT_IN[str(source)]()
    if decimal not in (".", ","):
        raise unknown("decimal", str(decimal), (".", ","))
    path = Path(source)
    if not path.is_file():
        raise DataError(f"{source} is no file and none of the built-in series: {', '.join(BUILT_IN)}")
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            table = _Table(path, cast(IO[bytes], file), date_column, value_columns, id_column, date_format, decimal)
            return _on_grid(table.read(), str(path), table.hint)
    except (UnicodeDecodeError, OSError, EOFError) as error:
        raise DataError(f"{path} is no text in UTF-8: {error}") from None
    except csv.Error as error:
        raise DataError(f"{path} is no CSV file: {error}") from None


class _Table:
    """A CSV file, read row by row into an array of times and one of values for each series."""

    def __init__(
        self,
        path: Path,
        file: IO[bytes],
        date_column: str,
        value_columns: Sequence[str],
        id_column: str,
        date_format: str,
        decimal: Decimal,
    ) -> None:
        self.path, self.date_format, self.decimal = path, date_format, decimal
        lines = _text_lines(path, file)
        self.above, first = next(((number, line) for number, line in enumerate(lines, 1) if line.strip()), (0, ""))
        if not first:
            raise DataError(f"{path} is empty")
        separator = max(_SEPARATORS, key=first.count)
        self.header = [cell.strip() for cell in next(csv.reader([first], delimiter=separator))]
        if len(set(self.header)) != len(self.header) or len(self.header) < 2:
            raise DataError(
                f"{path} must begin with a line of at least two different column names between commas, semicolons or "
                f"tabs, got {first.strip()[:80]!r}"
            )
        self.rows = csv.reader(lines, delimiter=separator)
        date_column = date_column or self.header[0]
        for name in (date_column, *value_columns, *([id_column] if id_column else [])):
            if name not in self.header:
                raise DataError(f"{path}: {unknown('column', name, self.header)}")
        self.date, self.id = self.header.index(date_column), self.header.index(id_column) if id_column else None
        others = [c for c in range(len(self.header)) if c not in (self.date, self.id)]
        # Whether a column holds numbers; None until its first known cell tells.
        self.numeric: dict[int, bool | None] = (
            {self.header.index(name): True for name in value_columns} if value_columns else dict.fromkeys(others)
        )
        self.hint = "" if id_column else "; if the file holds several series below each other, set id_column"

    def read(self) -> dict[str, tuple[Times, Array]]:
        """Times and values of each series by name."""
        times: dict[str, array[int]] = {}
        values: dict[tuple[str, int], array[float]] = {}
        for row in self.rows:
            line = self.above + self.rows.line_num
            if not any(map(str.strip, row)):
                continue
            if len(row) != len(self.header):
                raise DataError(f"{self.path}, line {line}: expected {len(self.header)} cells, got {len(row)}")
            group = "" if self.id is None else row[self.id].strip()
            times.setdefault(group, array("q")).append(self._time(row[self.date].strip(), line))
            for column, numeric in self.numeric.items():
                if numeric is not False:
                    values.setdefault((group, column), array("d")).append(
                        self._value(row[column].strip(), line, column)
                    )
        if not times:
            raise DataError(f"{self.path} has no rows below its column names")
        columns = [column for column, numeric in self.numeric.items() if numeric]
        if not columns:
            hint = " (set decimal to ',' if that is the mark of the decimals)" if self.decimal == "." else ""
            raise DataError(f"{self.path} has no column of numbers beside the dates{hint}")
        found = {}
        for group, moments in times.items():
            every = np.array(moments, np.int64).astype("datetime64[s]")
            for column in columns:
                alone = group and len(columns) == 1
                name = " ".join(filter(None, (group, "" if alone else self.header[column])))
                found[name] = every, np.array(values[group, column], np.float64)
        return found

    def _time(self, text: str, line: int) -> int:
        try:
            form = self.date_format
            moment = datetime.strptime(text, form) if form else datetime.fromisoformat(text)
        except ValueError:
            form = f"a date as {form}" if form else "a date like 2026-11-27 (set date_format for others)"
            raise DataError(f"{self._place(line, self.date)}: expected {form}, got {text!r}") from None
        since = moment.replace(tzinfo=None) - _EPOCH
        if since.microseconds:
            raise DataError(f"{self._place(line, self.date)}: expected a time in whole seconds, got {text!r}")
        return since.days * _DAY + since.seconds

    def _value(self, text: str, line: int, column: int) -> float:
        if text.lower() in _MISSING:
            return float("nan")
        try:
            value = self._number(text)
        except ValueError:
            if self.numeric[column] is None:
                self.numeric[column] = False
                return float("nan")
            hint = " (set decimal to ',' if that is the mark of the decimals)"
            comma = hint if self.decimal == "." and _DECIMAL_COMMA.fullmatch(text) else ""
            raise DataError(f"{self._place(line, column)}: expected a number, got {text!r}{comma}") from None
        self.numeric[column] = True
        if not np.isfinite(value):
            raise DataError(f"{self._place(line, column)}: values must be finite, got {text}")
        return value

    def _number(self, text: str) -> float:
        if self.decimal == "." or not any(map(str.isdigit, text)):
            return float(text)
        if not _DECIMAL_COMMA.fullmatch(text):
            raise ValueError(text)
        return float(text.replace(".", "").replace(",", "."))

    def _place(self, line: int, column: int) -> str:
        return f"{self.path}, line {line}, column {self.header[column]}"


def _text_lines(path: Path, file: IO[bytes]) -> Iterator[str]:
    encoding = "utf-8-sig"
    for raw in cast(Iterable[bytes], file):
        text = raw.decode(encoding)
        encoding = "utf-8"
        if "\0" in text:
            raise DataError(f"{path} is no text")
        yield text


# -- the grid ----------------------------------------------------------------------------------------------------------


def _on_grid(parts: dict[str, tuple[Times, Array]], source: str, hint: str = "") -> SeriesSet:
    """Series whose rows are in order, on the grid that their times share."""
    for name, (times, values) in parts.items():
        backwards = np.flatnonzero(np.diff(times) <= np.timedelta64(0, "s"))
        if len(backwards):
            place = _shown(times[backwards[0] + 1])
            same = times[backwards[0]] == times[backwards[0] + 1]
            what = f"comes twice{hint}" if same else "is not in order: sort the rows by date"
            raise DataError(f"{source}, series {name}: {place} {what}")
        if np.isnan(values).all():
            raise DataError(f"{source}, series {name}: there is no value")
    every = np.unique(np.concatenate([times for times, _ in parts.values()]))
    if len(every) < 2:
        raise DataError(f"{source}: a series needs at least 2 times, got {len(every)}")
    step, places = _grid(every, source)
    span = int(places[-1]) + 1
    if len(every) < _REGULAR * span:
        raise DataError(
            f"{source}: the times are not regular: of the {span} steps of {step} from {_shown(every[0])} to "
            f"{_shown(every[-1])} only {len(every)} are there; bring them to a regular step first"
        )
    rows = np.full((len(parts), span), np.nan)
    for row, (times, values) in zip(rows, parts.values(), strict=True):
        row[places[np.searchsorted(every, times)]] = values
    grid = np.concatenate([every[:1], next_times(every[0], step, span - 1)])
    return SeriesSet(grid, rows, tuple(parts), step)


def _shown(time: np.datetime64) -> str:
    """A time without a clock if that shows midnight."""
    return str(time).replace("T00:00:00", "").replace("T", " ")


def _grid(times: Times, source: str) -> tuple[str, Places]:
    """The step of a grid that holds all times, and their places on it."""
    days = times.astype("datetime64[D]")
    whole = bool((times == days).all())
    if whole:
        for unit in ("Y", "M"):
            coarse = days.astype(f"datetime64[{unit}]")
            offset = days - coarse.astype("datetime64[D]")
            if not np.diff(coarse).all():
                continue
            ends = unit == "M" and bool((days + 1 == (coarse + 1).astype("datetime64[D]")).all())
            if ends or len(np.unique(offset)) == 1:
                places = (coarse - coarse[0]).astype(np.int64)
                common = _most_common(np.diff(places))
                if not (places % common).any():
                    return f"{common} {unit}{'E' if ends else ''}", places // common
    fine, unit = (days, "D") if whole else (times, "s")
    places = (fine - fine[0]).astype(np.int64)
    common = _most_common(np.diff(places))
    if whole and common == 1 and len(days) >= 10 and np.is_busday(days).all():
        return "1 B", np.busday_count(days[0], days).astype(np.int64)
    off = np.flatnonzero(places % common)
    if len(off):
        raise DataError(
            f"{source}: times must be multiples of the step of {common} {unit} from {_shown(times[0])} on, "
            f"{_shown(times[off[0]])} is not; bring them to a regular step first"
        )
    return f"{common} {unit}", places // common


def _most_common(steps: Places) -> int:
    values, counts = np.unique(steps, return_counts=True)
    return int(values[np.argmax(counts)])


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
