"""Labelled time series of pixels: tables with a row for each pixel and date, and their split by fields."""

from __future__ import annotations

import csv
import datetime
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from convatlas.data.images import Skipped
from convatlas.errors import DataError
from convatlas.files import write_text

__all__ = ["SeriesSet", "join_series", "read_series", "split_by_field", "write_series"]

Floats = npt.NDArray[np.float64]

#: Columns of a table that hold no measurement.
_KEYS = ("id", "date", "label", "field")


@dataclass(frozen=True, eq=False)
class SeriesSet:
    """Observations of pixels at their own dates.

    Attributes:
        names: of each pixel.
        fields: the field that each lies in.
        classes: names of the classes; empty for unlabelled pixels.
        labels: (N,) index into ``classes``, -1 where unknown.
        columns: what was measured, e.g. ``("B3", "B4")``.
        days: for each pixel the days of its observations, rising, counted from the start of its season.
        values: for each pixel (observations, columns); NaN where there is no value, as under clouds.
        skipped: pixels that could not be used, with the reasons.
    """

    names: tuple[str, ...]
    fields: tuple[str, ...]
    classes: tuple[str, ...]
    labels: npt.NDArray[np.int64]
    columns: tuple[str, ...]
    days: tuple[Floats, ...]
    values: tuple[Floats, ...]
    skipped: tuple[Skipped, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """Pixels of each class."""
        return np.bincount(self.labels[self.labels >= 0], minlength=len(self.classes)).astype(np.int64)

    def subset(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> SeriesSet:
        """The pixels at ``rows``, in that order."""
        places = [int(row) for row in rows]
        return SeriesSet(
            tuple(self.names[row] for row in places),
            tuple(self.fields[row] for row in places),
            self.classes,
            self.labels[np.asarray(places, np.int64)],
            self.columns,
            tuple(self.days[row] for row in places),
            tuple(self.values[row] for row in places),
            self.skipped,
        )

    def with_classes(self, classes: Sequence[str]) -> SeriesSet:
        """The same pixels labelled by position in ``classes``: those that a model was trained on.

        Raises:
            DataError: pixels are of a class that is not among ``classes``.
        """
        position = {name: index for index, name in enumerate(classes)}
        missing = [
            name for name, count in zip(self.classes, self.counts, strict=True) if count and name not in position
        ]
        if missing:
            raise DataError(f"there are labels {', '.join(missing)}, but the classes are {', '.join(classes)}")
        table = np.array([position.get(name, -1) for name in self.classes] + [-1], np.int64)
        return SeriesSet(
            self.names, self.fields, tuple(classes), table[self.labels], self.columns, self.days, self.values,
            self.skipped,
        )  # fmt: skip


def join_series(sets: Sequence[SeriesSet]) -> SeriesSet:
    """Several sets of the same columns and classes as one.

    Raises:
        DataError: their columns differ.
    """
    first = sets[0]
    for other in sets[1:]:
        if other.columns != first.columns:
            raise DataError(f"tables have different columns: {', '.join(first.columns)} and {', '.join(other.columns)}")
    classes = tuple(dict.fromkeys(name for each in sets for name in each.classes))
    sets = [each.with_classes(classes) for each in sets]
    return SeriesSet(
        tuple(name for each in sets for name in each.names),
        tuple(name for each in sets for name in each.fields),
        classes,
        np.concatenate([each.labels for each in sets]),
        first.columns,
        tuple(days for each in sets for days in each.days),
        tuple(values for each in sets for values in each.values),
        tuple(skipped for each in sets for skipped in each.skipped),
    )


def read_series(path: str | Path, *, season_start: str = "01-01") -> SeriesSet:
    """Read a table with the columns ``id`` and ``date``, one for each band, and ``label`` and ``field`` if there are.

    A row is one observation of a pixel. A date is YYYY-MM-DD, or a number of days. Empty cells are missing values.
    Pixels without a ``field`` are a field each.

    Args:
        path: a CSV file.
        season_start: month and day from which the days of a season are counted, e.g. ``"10-01"`` for winter wheat; a
            pixel's season is the one in which its first observation lies.

    Raises:
        DataError: there is no such file, or a column is missing, or a cell cannot be read; its line is named.
    """
    path = Path(path)
    start = _month_and_day(season_start)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = header
            missing = [name for name in ("id", "date") if name not in header]
            columns = tuple(name for name in header if name not in _KEYS and name)
            if missing or not columns:
                what = f"has no column {' and none '.join(missing)}" if missing else "has no column with measurements"
                raise DataError(f"{path} {what}; it has {', '.join(header) or 'none'}")
            rows: dict[str, list[tuple[float | datetime.date, list[float]]]] = {}
            told: dict[str, tuple[str, str]] = {}
            for row in reader:
                name = (row["id"] or "").strip()
                where = f"{path}, line {reader.line_num}"
                observed = _date(row["date"] or "", where), [_number(row[column], column, where) for column in columns]
                rows.setdefault(name, []).append(observed)
                label, field = (row.get("label") or "").strip(), (row.get("field") or "").strip() or name
                if told.setdefault(name, (label, field)) != (label, field):
                    raise DataError(f"{where}: {name} has the label and field {told[name]} above, {label, field} here")
    except UnicodeDecodeError:
        raise DataError(f"{path} is no text in UTF-8") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    if not rows:
        raise DataError(f"{path} holds no observation")
    classes = tuple(sorted({label for label, _ in told.values() if label}))
    days, values = zip(
        *(_in_season(observed, start, f"{path}: {name}") for name, observed in rows.items()), strict=True
    )
    labels = [classes.index(label) if label else -1 for label, _ in told.values()]
    fields = tuple(field for _, field in told.values())
    return SeriesSet(tuple(rows), fields, classes, np.array(labels, np.int64), columns, days, values)


def _month_and_day(text: str) -> tuple[int, int]:
    try:
        date = datetime.date.fromisoformat(f"2000-{text}")
    except ValueError:
        raise ValueError(f"season_start must be MM-DD, got {text!r}") from None
    return date.month, date.day


def _date(text: str, where: str) -> float | datetime.date:
    text = text.strip()
    try:
        return datetime.date.fromisoformat(text[:10]) if "-" in text[1:] else float(text)
    except ValueError:
        raise DataError(f"{where}: the date must be YYYY-MM-DD or a number of days, got {text!r}") from None


def _number(text: str | None, column: str, where: str) -> float:
    if text is None or not text.strip():
        return math.nan
    try:
        return float(text)
    except ValueError:
        raise DataError(f"{where}: {column} must be a number, got {text!r}") from None


def _in_season(
    observed: list[tuple[float | datetime.date, list[float]]], start: tuple[int, int], where: str
) -> tuple[Floats, Floats]:
    """Days since the start of the season and values, in the order of time."""
    kinds = {isinstance(date, datetime.date) for date, _ in observed}
    if len(kinds) > 1:
        raise DataError(f"{where} has both dates and numbers of days")
    days: list[float] = [date for date, _ in observed if isinstance(date, float)]
    if not days:
        dates = [date for date, _ in observed if isinstance(date, datetime.date)]
        first = min(dates)
        begin = datetime.date(first.year - ((first.month, first.day) < start), *start)
        days = [float((date - begin).days) for date in dates]
    order = np.argsort(days, kind="stable")
    return np.asarray(days, np.float64)[order], np.asarray([values for _, values in observed], np.float64)[order]


def write_series(series: SeriesSet, path: str | Path) -> None:
    """Write the table that `read_series` reads, with days as numbers."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "field", "date", *series.columns, "label"])
    for row, name in enumerate(series.names):
        label = series.classes[series.labels[row]] if series.labels[row] >= 0 else ""
        for day, values in zip(series.days[row], series.values[row], strict=True):
            cells = ["" if math.isnan(value) else f"{value:.6g}" for value in values]
            writer.writerow([name, series.fields[row], f"{day:g}", *cells, label])
    write_text(path, text.getvalue())


def split_by_field(series: SeriesSet, fractions: Mapping[str, float], seed: int) -> dict[str, SeriesSet]:
    """Split pixels so that no field lies in two parts, with every class in every part.

    Pixels of one field are alike: split at random, they would tell the answers of the test. A field counts as one of
    the class of most of its pixels.

    Args:
        series: labelled pixels.
        fractions: share of the fields of each part; they sum to 1.
        seed: of the order of the fields.

    Raises:
        DataError: a class has fewer fields than there are parts, or a pixel has no label.
    """
    if len(series) and series.labels.min(initial=0) < 0:
        raise DataError(f"{series.names[int(np.argmin(series.labels))]} has no label")
    fields = np.asarray(series.fields)
    names, of_pixel = np.unique(fields, return_inverse=True)
    votes = np.zeros((len(names), len(series.classes)), np.int64)
    np.add.at(votes, (of_pixel, series.labels), 1)
    majority = votes.argmax(1)
    part_of = np.empty(len(names), np.int64)
    random = np.random.default_rng(seed)
    parts = list(fractions)
    for label, name in enumerate(series.classes):
        members = random.permutation(np.flatnonzero(majority == label))
        if len(members) < len(parts):
            raise DataError(f"{name} needs a field for each of {', '.join(parts)}, it has {len(members)}")
        # Each part gets its share, at least one field.
        shares = np.array(list(fractions.values())) * len(members)
        counts = np.maximum(1, np.floor(shares + 1e-9).astype(int))
        while counts.sum() != len(members):
            off = shares - counts
            change = 1 if counts.sum() < len(members) else -1
            able = np.where(counts + change >= 1, change * off, -np.inf)
            counts[int(able.argmax())] += change
        part_of[members] = np.repeat(np.arange(len(parts)), counts)
    return {name: series.subset(np.flatnonzero(part_of[of_pixel] == part)) for part, name in enumerate(parts)}
