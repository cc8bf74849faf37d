"""Sentinel-2 pixels over a season: bands, vegetation indices, and series on a regular grid of days.

Indices: leaf area from WDVI (Clevers, Remote Sensing of Environment 1989); chlorophyll from TCARI / OSAVI (Haboudane et
al., Remote Sensing of Environment 2002); both as inputs of Shi et al., arXiv 2306.17207.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from convatlas.data.images import Skipped
from convatlas.data.series import SeriesSet
from convatlas.errors import DataError

__all__ = ["BANDS", "GridSeries", "SentinelTimeSeries", "fill_gaps", "vegetation_indices"]

Floats = npt.NDArray[np.float64]

#: Central wavelength of each band in nm.
BANDS = {
    "B2": 490, "B3": 560, "B4": 665, "B5": 705, "B6": 740, "B7": 783, "B8": 842, "B8A": 865, "B11": 1610, "B12": 2190,
}  # fmt: skip
#: Bands that the indices need.
_NEEDED = ("B3", "B4", "B5", "B8")
#: Below this OSAVI there is bare soil, and the ratio says nothing.
_BARE = 0.05
#: Reflectance above which it is most likely given in ten thousandths.
_SCALED = 2.0
#: Steps that a series must have at least, and observations.
_LEAST_STEPS, _LEAST_OBSERVATIONS = 8, 2


def vegetation_indices(
    bands: Mapping[str, npt.ArrayLike],
    soil_slope: float = 1.5,
    extinction: float = 0.5,
    wdvi_inf: float = 1.0,
    clamp: float = 1e-3,
) -> dict[str, npt.NDArray[Any]]:
    """Indices of canopy and chlorophyll from reflectances in [0, 1], of any shape.

    WDVI = B8 - a B4; LAI = -ln(1 - WDVI / WDVI_inf) / kappa; TCARI = 3 ((B5 - B4) - 0.2 (B5 - B3) B5 / B4);
    OSAVI = 1.16 (B8 - B4) / (B8 + B4 + 0.16); their ratio falls as chlorophyll rises. Where B4 or OSAVI is 0, ratios
    are infinite or NaN; on bare soil, where OSAVI is small, they say nothing.

    Args:
        bands: reflectances under ``B3``, ``B4``, ``B5`` and ``B8``.
        soil_slope: a, near infrared over red of bare soil.
        extinction: kappa, 0.3 to 0.6 in the literature.
        wdvi_inf: WDVI of a closed canopy, 0.6 to 1 in the literature.
        clamp: least argument of the logarithm; the largest is 1, so that LAI is not negative.

    Returns:
        ``wdvi``, ``lai``, ``tcari``, ``osavi`` and ``tcari_osavi``.

    Raises:
        DataError: bands are missing (they are listed), or reflectances are above 2.
        ValueError: a parameter is out of range.
    """
    missing = [name for name in _NEEDED if name not in bands]
    if missing:
        raise DataError(f"the indices need the bands {', '.join(_NEEDED)}; missing: {', '.join(missing)}")
    if min(extinction, wdvi_inf, clamp) <= 0 or clamp > 1:
        raise ValueError(
            f"extinction, wdvi_inf and clamp must be positive, clamp at most 1, got {extinction}, {wdvi_inf}, {clamp}"
        )
    green, red, edge, near = (np.asarray(bands[name]) for name in _NEEDED)
    for name, band in zip(_NEEDED, (green, red, edge, near), strict=True):
        _check_scale(name, band)
    with np.errstate(divide="ignore", invalid="ignore"):
        wdvi = near - soil_slope * red
        lai = -np.log(np.clip(1 - wdvi / wdvi_inf, clamp, 1)) / extinction
        tcari = 3 * ((edge - red) - 0.2 * (edge - green) * (edge / red))
        osavi = 1.16 * (near - red) / (near + red + 0.16)
        ratio = tcari / osavi
    return {"wdvi": wdvi, "lai": lai, "tcari": tcari, "osavi": osavi, "tcari_osavi": ratio}


def _check_scale(name: str, band: npt.NDArray[Any]) -> None:
    largest = np.nanmax(band, initial=0.0)
    if largest > _SCALED:
        raise DataError(f"{name} must be a reflectance in [0, 1], got up to {largest:g}: divide by 10000")


def fill_gaps(days: Floats, values: Floats, grid: Floats) -> Floats:
    """Values (observations, columns) linearly interpolated to the days of a grid; NaN values are left out.

    Before the first and after the last observation the nearest value stands.

    Raises:
        DataError: a column has fewer than two finite values.
    """
    filled = np.empty((len(grid), values.shape[1]))
    for column in range(values.shape[1]):
        there = np.isfinite(values[:, column])
        if there.sum() < _LEAST_OBSERVATIONS:
            raise DataError(
                f"only {there.sum()} observations without clouds, at least {_LEAST_OBSERVATIONS} are needed"
            )
        filled[:, column] = np.interp(grid, days[there], values[there, column])
    return filled


@dataclass(frozen=True, eq=False)
class GridSeries:
    """Series of pixels on one grid of days.

    Attributes:
        features: names of the channels.
        days: (T,).
        values: (N, C, T) float32.
        rows: index of each in the `SeriesSet` that they were made from.
        skipped: pixels that could not be used, with the reasons.
    """

    features: tuple[str, ...]
    days: Floats
    values: npt.NDArray[np.float32]
    rows: npt.NDArray[np.int64]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True, kw_only=True)
class SentinelTimeSeries:
    """From observations at any dates to series of features on a regular grid of days.

    Attributes:
        features: ``indices`` (LAI and TCARI / OSAVI of each observation), or ``columns`` (what was measured).
        start, end: first and last day of the grid; `fitted` chooses them from data where they are left out.
        step: days between two steps; frequencies mean something on a regular grid only.
        smooth: window of a Savitzky-Golay filter of second order, odd, in steps; 0 for none.
        soil_slope, extinction, wdvi_inf: of `vegetation_indices`.
        chlorophyll: alpha and beta with which alpha + beta ln(TCARI / OSAVI) takes the place of the ratio, or None.

    Raises:
        ValueError: a value is out of range, or the grid has fewer than 8 steps.
    """

    features: Literal["indices", "columns"] = "indices"
    start: float | None = None
    end: float | None = None
    step: float = 5.0
    smooth: int = 0
    soil_slope: float = 1.5
    extinction: float = 0.5
    wdvi_inf: float = 1.0
    chlorophyll: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.features not in ("indices", "columns"):
            raise ValueError(f"features must be 'indices' or 'columns', got {self.features!r}")
        if self.step <= 0:
            raise ValueError(f"step must be positive, got {self.step}")
        if self.smooth and (self.smooth < 3 or self.smooth % 2 == 0):
            raise ValueError(f"smooth must be 0, or odd and at least 3, got {self.smooth}")
        if self.start is not None and self.end is not None:
            steps = len(self.grid)
            if steps < max(_LEAST_STEPS, self.smooth):
                raise ValueError(
                    f"a series must have at least {max(_LEAST_STEPS, self.smooth)} steps, got {steps} from day "
                    f"{self.start:g} to {self.end:g} every {self.step:g} days"
                )

    def fitted(self, series: SeriesSet) -> SentinelTimeSeries:
        """The same with a grid from the median first to the median last day of the observations, where it is not given.

        Raises:
            ValueError: the grid would have fewer than 8 steps.
        """
        observed = [days for days in series.days if len(days)]
        start = float(np.floor(np.median([days[0] for days in observed]))) if self.start is None else self.start
        end = float(np.ceil(np.median([days[-1] for days in observed]))) if self.end is None else self.end
        return dataclasses.replace(self, start=start, end=end)

    @property
    def grid(self) -> Floats:
        """The days of the steps.

        Raises:
            ValueError: the first or the last day is not chosen yet.
        """
        if self.start is None or self.end is None:
            raise ValueError(f"start and end must be given, or chosen by fitted(), got {self.start} and {self.end}")
        return np.arange(self.start, self.end + 1e-9, self.step)

    def __call__(self, series: SeriesSet) -> GridSeries:
        """Series on the grid of every pixel with enough observations.

        Raises:
            DataError: bands are missing, reflectances are too large, or no pixel can be used.
        """
        kept, rows, skipped = [], [], []
        names = self._check(series)
        for row, name in enumerate(series.names):
            try:
                kept.append(self._smoothed(fill_gaps(series.days[row], self._measured(series, row), self.grid)))
            except DataError as error:
                skipped.append(Skipped(name, str(error)))
            else:
                rows.append(row)
        if not kept:
            first = skipped[0] if skipped else Skipped("the table", "it is empty")
            raise DataError(f"none of the series can be used; first: {first.path}: {first.reason}")
        values = np.stack(kept).transpose(0, 2, 1).astype(np.float32)
        return GridSeries(names, self.grid, values, np.array(rows, np.int64), tuple(skipped))

    def _check(self, series: SeriesSet) -> tuple[str, ...]:
        for column, name in enumerate(series.columns):
            if name in BANDS:
                for values in series.values:
                    _check_scale(name, values[:, column])
        if self.features == "columns":
            return series.columns
        vegetation_indices({name: np.empty(0) for name in series.columns})  # tells what is missing
        return "LAI", "LCC"

    def _measured(self, series: SeriesSet, row: int) -> Floats:
        values = series.values[row]
        if self.features == "columns":
            return values
        bands = {name: values[:, index] for index, name in enumerate(series.columns)}
        found = vegetation_indices(bands, self.soil_slope, self.extinction, self.wdvi_inf)
        ratio = np.where((found["osavi"] < _BARE) | (bands["B4"] <= 0), np.nan, found["tcari_osavi"])
        if self.chlorophyll is not None:
            alpha, beta = self.chlorophyll
            with np.errstate(divide="ignore", invalid="ignore"):
                ratio = alpha + beta * np.log(ratio)
        return np.stack([found["lai"], ratio], 1)

    def _smoothed(self, values: Floats) -> Floats:
        if not self.smooth:
            return values
        from scipy.signal import savgol_filter

        smoothed: Floats = savgol_filter(values, self.smooth, 2, axis=0)
        return smoothed
