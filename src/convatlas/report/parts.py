"""Claims, tables, figures and files, as data: what a report consists of."""

from __future__ import annotations

import math
import os
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

__all__ = [
    "Bars",
    "Cell",
    "Claim",
    "Column",
    "Files",
    "Heatmap",
    "Images",
    "Lines",
    "Note",
    "Part",
    "Scatter",
    "Section",
    "Sounds",
    "Table",
    "Verdict",
    "column_text",
    "printable",
]

Verdict: TypeAlias = Literal["holds", "does not hold", "cannot be told at this scale"]
Cell: TypeAlias = str | int | float | None

# Controls, lone surrogates and non-characters: names of a user's files can hold them, XML and UTF-8 cannot.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def printable(text: str) -> str:
    """``text`` with each character that no terminal, page or UTF-8 file should get replaced by U+FFFD."""
    return _UNPRINTABLE.sub("\ufffd", text)


def _freeze(part: object, **values: object) -> None:
    for name, value in values.items():
        object.__setattr__(part, name, value)


# -- numbers as text ---------------------------------------------------------------------------------------------------


def _number(value: float, digits: int = 4) -> str:
    """One number with ``digits`` significant digits: 0.9832, 25.56, 461,234, 1.5e-7."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    exponent = math.floor(math.log10(abs(value)))
    if not -5 < exponent < 15:
        mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
        return f"{_shorten(mantissa)}e{int(power)}"
    return _shorten(f"{value:,.{max(0, digits - 1 - exponent)}f}")


def _shorten(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text


def column_text(cells: Sequence[Cell]) -> list[str]:
    """The cells of one column as text; its fractions get the same number of decimals where four digits allow it."""
    sizes = [abs(cell) for cell in cells if isinstance(cell, float) and math.isfinite(cell) and cell != 0]
    decimals = max(0, 3 - math.floor(math.log10(max(sizes)))) if sizes else 1
    uniform = not sizes or (decimals < 9 and min(sizes) >= 10.0 ** (1 - decimals))

    def text(cell: Cell) -> str:
        match cell:
            case None:
                return "-"
            case float() if uniform and math.isfinite(cell):
                return f"{cell:,.{decimals}f}"
            case float():
                return _number(cell)
            case int():
                return f"{cell:,}"
        return cell

    texts = [text(cell) for cell in cells]
    fractions = [index for index, cell in enumerate(cells) if isinstance(cell, float) and "." in texts[index]]
    if uniform and fractions:
        zeros = min(len(texts[index]) - len(texts[index].rstrip("0")) for index in fractions)
        for index in fractions:
            texts[index] = texts[index][: len(texts[index]) - min(zeros, decimals - 1)]
    return texts


# -- the parts of a report ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """What a paper says beside what was measured. Use :meth:`judge`, which derives the verdict from the numbers.

    Attributes:
        statement: the claim in one sentence.
        published: what the paper says, with its numbers.
        measured: what was measured here, with its unit.
        threshold: the bound fixed before measuring.
        statistic: the quantity held against the threshold, fixed before measuring.
        seeds: number of random seeds; 0 where nothing is random.
        verdict: holds, does not hold, or cannot be told at this scale.
        values: the measured numbers, one per seed.
    """

    statement: str
    published: str
    measured: str
    threshold: str
    statistic: str
    seeds: int
    verdict: Verdict
    values: Sequence[float] = ()

    def __post_init__(self) -> None:
        if self.verdict not in get_args(Verdict):
            names = ", ".join(map(repr, get_args(Verdict)))
            raise ValueError(f"verdict must be one of {names}, got {self.verdict!r}")
        _freeze(self, values=tuple(float(value) for value in self.values))

    @property
    def seeds_text(self) -> str:
        """The number of seeds in words."""
        return "no randomness" if self.seeds == 0 else "1 seed" if self.seeds == 1 else f"{self.seeds} seeds"

    @classmethod
    def judge(
        cls,
        statement: str,
        *,
        published: str,
        statistic: str,
        value: float | Sequence[float],
        at_least: float | None = None,
        at_most: float | None = None,
        seeds: int,
        scale_ok: bool = True,
        unit: str = "",
    ) -> Claim:
        """Hold ``value`` against a threshold; of several values (one per seed) the mean is judged.

        Args:
            at_least: the claim holds if the value is this or more.
            at_most: the claim holds if the value is this or less. Exactly one of the two is given.
            seeds: number of random seeds; 0 where nothing is random.
            scale_ok: False if the experiment was too small to tell; the verdict then says so. So does a NaN.
            unit: of the value and the threshold, e.g. ``"%"`` or ``"ms"``.

        Raises:
            ValueError: both or neither threshold is given, a threshold is not finite, or the number of values is not
                the number of seeds.
        """
        name, bound = ("at_most", at_most) if at_least is None else ("at_least", at_least)
        if bound is None or (at_least is not None and at_most is not None):
            raise ValueError(f"give exactly one of at_least and at_most, got {at_least} and {at_most}")
        if not math.isfinite(bound):
            raise ValueError(f"{name} must be a finite number, got {bound}")
        if seeds < 0:
            raise ValueError(f"seeds must be 0 or more, got {seeds}")
        values = tuple(float(v) for v in value) if isinstance(value, Iterable) else (float(value),)
        if not values:
            raise ValueError("value must hold at least one number, got an empty sequence")
        if isinstance(value, Iterable) and len(values) != max(seeds, 1):
            raise ValueError(f"value must hold one number per seed, got {len(values)} for {seeds} seeds")

        mean = float(statistics.mean(values))  # exact: equal values at the threshold stay at the threshold
        verdict: Verdict
        if math.isnan(mean) or not scale_ok:
            verdict = "cannot be told at this scale"
        else:
            verdict = "holds" if (mean >= bound if name == "at_least" else mean <= bound) else "does not hold"
        suffix = f" {unit}" if unit else ""
        # A near miss must not read like the threshold itself.
        digits = next((n for n in range(4, 17) if mean == bound or _number(mean, n) != _number(bound, n)), 17)
        measured = _number(mean, digits) + suffix
        if len(values) > 1:
            measured += f" (mean of {seeds} seeds, {_number(min(values))} to {_number(max(values))})"
        return cls(
            statement=statement,
            published=published,
            measured=measured,
            threshold=f"{name.replace('_', ' ')} {_number(bound, 12)}{suffix}",
            statistic=statistic,
            seeds=seeds,
            verdict=verdict,
            values=values,
        )


class Column(NamedTuple):
    """One column of a table as text; ``best`` marks the cells to stress."""

    label: str
    unit: str
    texts: list[str]
    numeric: bool
    best: list[bool]


@dataclass(frozen=True)
class Table:
    """Rows and columns. A unit stands in brackets at the end of a column's name: ``"latency [ms]"``.

    Attributes:
        rows: each as long as ``columns``; None is shown as a dash.
        caption: a sentence below the title.
        highlight: for columns by name, which of its numbers to stress: the largest ("max") or the smallest ("min").

    Raises:
        ValueError: a row of another length, equal or no column names, an unknown column in ``highlight``.
        TypeError: a cell that is no text and no number.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    highlight: Mapping[str, Literal["max", "min"]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        columns = tuple(self.columns)
        if not columns:
            raise ValueError(f"table {self.title!r} must have at least one column")
        for name in columns:
            if columns.count(name) > 1:
                raise ValueError(f"column names of table {self.title!r} must differ, got {name!r} twice")
        for index, row in enumerate(self.rows):
            if len(row) != len(columns):
                raise ValueError(f"row {index} of table {self.title!r} must have {len(columns)} cells, got {len(row)}")
        for name, choice in self.highlight.items():
            if name not in columns:
                raise ValueError(f"highlight of table {self.title!r} names the unknown column {name!r}")
            if choice not in ("max", "min"):
                raise ValueError(f"highlight must be 'max' or 'min', got {choice!r}")
        rows = tuple(tuple(self._cell(*pair) for pair in zip(row, columns, strict=True)) for row in self.rows)
        _freeze(self, columns=columns, rows=rows, highlight=dict(self.highlight))

    def _cell(self, cell: object, column: str) -> Cell:
        match cell:
            case bool() | np.bool_():
                return "yes" if cell else "no"
            case None | str():
                return cell
            case int() | np.integer():
                return int(cell)
            case float() | np.floating():
                return float(cell)
        raise TypeError(
            f"cells of table {self.title!r} must be str, int, float or None, "
            f"got {type(cell).__name__} in column {column!r}"
        )

    def formatted(self) -> list[Column]:
        """The table as text, column by column: what each rendering shows."""
        shown = []
        for index, name in enumerate(self.columns):
            cells = [row[index] for row in self.rows]
            numbers = [cell for cell in cells if isinstance(cell, int | float) and not math.isnan(cell)]
            choice = self.highlight.get(name)
            best = (max if choice == "max" else min)(numbers, default=None) if choice else None
            label, unit = match.groups() if (match := re.fullmatch(r"(.*\S)\s*\[(.+)\]", name)) else (name, "")
            given = [cell for cell in cells if cell is not None]
            numeric = bool(given) and not any(isinstance(cell, str) for cell in given)
            marks = [best is not None and cell == best for cell in cells]
            shown.append(Column(label, unit, column_text(cells), numeric, marks))
        return shown


@dataclass(frozen=True)
class Lines:
    """Curves: ``series`` maps a name to its x values and its y values, equally many. NaN leaves a gap.

    Attributes:
        bands: names of series to x values, lower and upper bounds of an area in their colour; the drawing is then wide.
    """

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    log_y: bool = False
    caption: str = ""
    log_x: bool = False
    bands: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        series = {}
        for name, (x, y) in self.series.items():
            if len(x) != len(y):
                raise ValueError(f"series {name!r} must have as many x as y values, got {len(x)} and {len(y)}")
            series[name] = (tuple(float(value) for value in x), tuple(float(value) for value in y))
        for name, band in self.bands.items():
            if name not in series or len({len(values) for values in band}) != 1:
                raise ValueError(f"band {name!r} must belong to a series and have equally many x values and bounds")
        bands = {name: tuple(tuple(map(float, values)) for values in band) for name, band in self.bands.items()}
        _freeze(self, series=series, bands=bands)


@dataclass(frozen=True)
class Scatter:
    """Named points ``(x, y)``, e.g. accuracy against latency.

    Attributes:
        front: names of points to stress and to join by a line in this order; the others are drawn as circles.
    """

    title: str
    x_label: str
    y_label: str
    points: Mapping[str, tuple[float, float]]
    log_x: bool = False
    caption: str = ""
    front: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in self.front:
            if name not in self.points:
                raise ValueError(f"front of {self.title!r} must be names of its points, got {name!r}")
        points = {name: (float(x), float(y)) for name, (x, y) in self.points.items()}
        _freeze(self, points=points, front=tuple(self.front))


@dataclass(frozen=True)
class Bars:
    """One bar per name, drawn from zero; ``y_label`` says what the values are, with their unit."""

    title: str
    y_label: str
    values: Mapping[str, float]
    caption: str = ""

    def __post_init__(self) -> None:
        # Counts stay whole numbers, which are shown without a point.
        _freeze(self, values={name: v if isinstance(v, int) else float(v) for name, v in self.values.items()})


@dataclass(frozen=True, eq=False)
class Heatmap:
    """A matrix ``(rows, columns)`` as colours, e.g. a confusion matrix. Colours grow with the square root of the value.

    Labels and, with ``annotate``, the numbers themselves are drawn while there is room for them.

    Raises:
        ValueError: ``values`` is not 2-D or holds no real numbers, or there is not one label per row and per column.
    """

    title: str
    values: npt.NDArray[Any] | Sequence[Sequence[float]]
    row_labels: Sequence[str]
    column_labels: Sequence[str]
    x_label: str
    y_label: str
    annotate: bool = True
    caption: str = ""

    def __post_init__(self) -> None:
        values = np.array(self.values)
        if values.ndim != 2:
            raise ValueError(f"values of heatmap {self.title!r} must have 2 dimensions, got {values.ndim}")
        if values.dtype.kind not in "biuf":
            raise ValueError(f"values of heatmap {self.title!r} must be real numbers, got {values.dtype}")
        for name, labels, count in zip(
            ("row_labels", "column_labels"), (self.row_labels, self.column_labels), values.shape, strict=True
        ):
            if len(labels) != count:
                raise ValueError(f"{name} of heatmap {self.title!r} must be {count} names, got {len(labels)}")
        values.setflags(write=False)
        _freeze(self, values=values, row_labels=tuple(self.row_labels), column_labels=tuple(self.column_labels))


@dataclass(frozen=True, eq=False)
class Images:
    """Pictures with a caption each: uint8 arrays ``(H, W)`` or ``(H, W, 3)``, values 0 to 255.

    Small ones are enlarged without smoothing; those longer than 800 pixels are reduced.

    Raises:
        ValueError: an array of another type or shape, or without pixels.
    """

    title: str
    images: Sequence[tuple[npt.NDArray[np.uint8], str]]
    caption: str = ""

    def __post_init__(self) -> None:
        images = []
        for index, (given, caption) in enumerate(self.images):
            pixels = np.array(given)
            what = f"image {index} of {self.title!r}"
            if pixels.dtype != np.uint8:
                raise ValueError(f"{what} must be uint8, got {pixels.dtype}")
            if pixels.ndim != 2 and (pixels.ndim != 3 or pixels.shape[2] != 3):
                raise ValueError(f"{what} must be (H, W) or (H, W, 3), got {pixels.shape}")
            if not pixels.size:
                raise ValueError(f"{what} must have pixels, got {pixels.shape}")
            pixels.setflags(write=False)
            images.append((pixels, caption))
        _freeze(self, images=tuple(images))


@dataclass(frozen=True, eq=False)
class Sounds:
    """Sounds to listen to, with a caption each: ``(samples, sample_rate, caption)``.

    Samples are floats ``(T,)`` from -1 to 1, one channel; on the page they are kept with 16 bits, so a second at 8 kHz
    takes about 21 kB. Louder samples are clipped.

    Raises:
        ValueError: samples of another shape or type, empty or not finite, or a sample rate that is not positive.
    """

    title: str
    sounds: Sequence[tuple[npt.NDArray[np.floating[Any]], int, str]]
    caption: str = ""

    def __post_init__(self) -> None:
        sounds = []
        for index, (given, rate, caption) in enumerate(self.sounds):
            samples = np.array(given)
            what = f"sound {index} of {self.title!r}"
            if samples.dtype.kind != "f" or samples.ndim != 1:
                raise ValueError(f"{what} must be floats (T,), got {samples.dtype} {samples.shape}")
            if not samples.size or not np.isfinite(samples).all():
                raise ValueError(f"{what} must have samples, all of them finite")
            if rate < 1:
                raise ValueError(f"the sample rate of {what} must be positive, got {rate}")
            levels = (32767 * samples.clip(-1, 1)).round().astype("<i2")
            levels.setflags(write=False)
            sounds.append((levels, int(rate), caption))
        _freeze(self, sounds=tuple(sounds))


@dataclass(frozen=True)
class Files:
    """Files that lie beside the report: what they are, and their paths relative to the report's folder."""

    title: str
    paths: Mapping[str, str | os.PathLike[str]]

    def __post_init__(self) -> None:
        paths = {name: os.fspath(path) for name, path in self.paths.items()}
        for path in paths.values():
            if PurePath(path).is_absolute():
                raise ValueError(f"paths of {self.title!r} must be relative to the report's folder, got {path!r}")
        _freeze(self, paths=paths)


@dataclass(frozen=True)
class Note:
    """A paragraph."""

    text: str


Part: TypeAlias = Claim | Table | Lines | Scatter | Bars | Heatmap | Images | Sounds | Files | Note


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    parts: Sequence[Part]

    def __post_init__(self) -> None:
        if not self.title:
            raise ValueError("title of a section must not be empty")
        for part in self.parts:
            if not isinstance(part, Part):
                raise TypeError(
                    f"section {self.title!r} must hold report parts such as Table or Note, got {type(part).__name__}"
                )
        _freeze(self, parts=tuple(self.parts))
