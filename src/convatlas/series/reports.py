"""Reports on forecasts: errors of models, also step by step, plots with intervals, calibration, stock, tests.

True values that were missing and filled are NaN: they are left out of every measure and test.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from convatlas.report import Cell, Heatmap, Lines, Note, Part, Section, Table
from convatlas.series.chaos import ChaosAnalysis
from convatlas.series.metrics import coverage, diebold_mariano, forecast_quality, holm, smape, t_test

__all__ = ["LEVELS", "SeriesResult", "chaos_section", "comparison_sections", "quality_sections", "stock_section"]

Array = npt.NDArray[np.float64]
Curve = tuple[Sequence[float], Sequence[float]]

#: Shares of the values that intervals are to hold, for the calibration.
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
#: Points by which the coverage may fall short before it is said.
_SHORT = 3
#: Times drawn before the first forecast, and times with forecasts drawn at most.
_HISTORY, _DRAWN = 30, 91


@dataclass(frozen=True, eq=False)
class SeriesResult:
    """Forecasts of the held-out part of one series.

    Attributes:
        name: of the series.
        history: values before the held-out part.
        actual: true values (origins, horizon), NaN where they are not known.
        forecasts: the like of each model by name, the trained one first.
        low, high: interval of the trained one.
        stride: positions between two origins.
        calibration: share of the values in % that intervals of each of `LEVELS` hold.
        stock: of each service level what was in stock (origins, horizon), where that was asked for.
        filled, imputed: how many values of the series, and of its held-out part, were missing and filled.
        negative: how many values are below 0.
        unused: how many values at the beginning were not learned from, because the series is long.
        analysis: chaos test of the training part, where one was made.
    """

    name: str
    history: Array
    actual: Array
    forecasts: Mapping[str, Array]
    low: Array
    high: Array
    stride: int
    calibration: Sequence[float] = ()
    stock: Mapping[float, Array] | None = None
    filled: int = 0
    imputed: int = 0
    negative: int = 0
    unused: int = 0
    analysis: ChaosAnalysis | None = None

    @property
    def model(self) -> str:
        """The trained model."""
        return next(iter(self.forecasts))

    def error(self, model: str) -> float:
        """SMAPE of one model in %."""
        return smape(self.actual, self.forecasts[model])

    def errors_ahead(self, model: str) -> list[float]:
        """SMAPE of one model in % for each step ahead; NaN where no true value is known."""
        pairs = zip(self.actual.T, self.forecasts[model].T, strict=True)
        return [smape(a, f) if not np.isnan(a).all() else float("nan") for a, f in pairs]


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.4g} ± {statistics.stdev(values) if len(values) > 1 else 0:.2g}"


def _mean(values: Sequence[float]) -> float | None:
    """Mean of those that are defined; None where none is."""
    known = [value for value in values if not np.isnan(value)]
    return statistics.fmean(known) if known else None


def _ahead(results: Sequence[SeriesResult], model: str) -> list[float]:
    """Mean SMAPE over the series for each step ahead."""
    steps = zip(*(result.errors_ahead(model) for result in results), strict=True)
    return [mean if (mean := _mean(step)) is not None else float("nan") for step in steps]


def _median(results: Sequence[SeriesResult]) -> SeriesResult:
    order = sorted(results, key=lambda result: result.error(result.model))
    return order[(len(order) - 1) // 2]


# -- one model ---------------------------------------------------------------------------------------------------------


def quality_sections(results: Sequence[SeriesResult], level: float) -> list[Section]:
    """Errors of every model, of each series, and of each step ahead; the median series; how well intervals hold."""
    models, horizon = list(results[0].forecasts), results[0].actual.shape[1]
    rows: list[list[Cell]] = []
    for model in models:
        measured = [forecast_quality(r.actual.ravel(), r.forecasts[model].ravel()) for r in results]
        if horizon > 1:  # Theil's U compares steps of one
            measured = [{**each, "Theil U": float("nan")} for each in measured]
        means = [_mean([each[key] for each in measured]) for key in measured[0]]
        rows.append([model, means[0], _spread([each["SMAPE [%]"] for each in measured]), *means[1:]])
    names = ["SMAPE [%]", "SMAPE, mean ± sd", "NRMSE", "MAE", "MAPE [%]", "Theil U"]
    origins = sorted({len(result.actual) for result in results})
    caption = (
        f"Means over {len(results)} series, {' to '.join(map(str, sorted({origins[0], origins[-1]})))} origins each, "
        f"{horizon} steps ahead; each forecast sees all values before its origin. MAPE is not defined where a value is "
        "0, Theil's U beyond one step."
    )
    if imputed := sum(result.imputed for result in results):
        caption += f" {imputed} held-out values were missing and are left out of all measures."
    highlight = dict.fromkeys(("SMAPE [%]", "NRMSE", "MAE"), "min")
    each = [_series_row(result) for result in results]
    columns = ["series", *(f"{model} [%]" for model in models), "in the interval [%]", "left out"]
    note = f"SMAPE of each series; {100 * level:g} % of the values should lie in their interval. "
    note += "Left out: held-out values that were missing."
    forecasts: list[Part] = [
        Table("Errors", ["model", *names], rows, caption, highlight),  # type: ignore[arg-type]
        _plot(_median(results), level),
        Table("Series", columns, each, note),
    ]
    sections = [Section("Forecasts", forecasts)]
    if horizon > 1:
        sections.append(_ahead_section({model: _ahead(results, model) for model in models}, results))
    return [*sections, _interval_section(results, level)]


def _series_row(result: SeriesResult) -> list[Cell]:
    covered = coverage(result.actual, result.low, result.high)
    return [result.name, *(result.error(model) for model in result.forecasts), covered, result.imputed]


def _ahead_section(errors: Mapping[str, Sequence[float]], results: Sequence[SeriesResult]) -> Section:
    steps = range(1, len(next(iter(errors.values()))) + 1)
    lines = Lines("Error by step", "steps ahead", "SMAPE [%]", {name: (steps, each) for name, each in errors.items()})
    covered = [
        _mean(
            [coverage(r.actual[:, k], r.low[:, k], r.high[:, k]) for r in results if np.isfinite(r.actual[:, k]).any()]
        )
        for k in range(len(steps))
    ]
    rows: list[list[Cell]] = [
        [step, *(None if np.isnan(each[step - 1]) else each[step - 1] for each in errors.values()), covered[step - 1]]
        for step in steps
    ]
    columns = ["steps ahead", *(f"{name} [%]" for name in errors), "in the interval [%]"]
    return Section("Steps ahead", [lines, Table("Errors by step", columns, rows, "SMAPE, means over the series.")])


def _interval_section(results: Sequence[SeriesResult], level: float) -> Section:
    """What share of the values intervals of several levels hold: on the diagonal they are calibrated."""
    wanted = [100 * share for share in LEVELS]
    held = [statistics.fmean(result.calibration[place] for result in results) for place in range(len(LEVELS))]
    curves: dict[str, Curve] = {"measured": (wanted, held), "calibrated": ([0, 100], [0, 100])}
    lines = Lines("Calibration", "share that an interval is to hold [%]", "share that it holds [%]", curves)
    rows: list[list[Cell]] = [list(pair) for pair in zip(wanted, held, strict=True)]
    width = statistics.fmean(float(np.mean(result.high - result.low)) for result in results)
    caption = (
        f"Held-out values of all series and steps. Intervals of {100 * level:g} % are {width:.4g} wide on average."
    )
    parts: list[Part] = [lines, Table("Coverage", ["to hold [%]", "holds [%]"], rows, caption)]
    covered = statistics.fmean(coverage(result.actual, result.low, result.high) for result in results)
    if covered < 100 * level - _SHORT:
        parts.append(
            Note(
                f"Intervals of {100 * level:g} % hold {covered:.1f} %: they are too narrow, as errors have grown since "
                "the validation part. Train on newer values, or ask for a higher level."
            )
        )
    return Section("Intervals", parts)


def _plot(result: SeriesResult, level: float) -> Lines:
    """The model's forecasts in its interval, and the true values."""
    curves, title = _curves(result, {result.model: result.forecasts[result.model]})
    bounds = _curves(result, {"low": result.low, "high": result.high})[0]
    band = (*bounds["low"], bounds["high"][1])
    caption = f"The area is to hold {100 * level:g} % of the values."
    return Lines(title, "position", "value", curves, caption=caption, bands={result.model: band})


def _curves(result: SeriesResult, forecasts: Mapping[str, Array]) -> tuple[dict[str, Curve], str]:
    """The last forecasts that follow each other, each of all steps."""
    horizon = result.actual.shape[1]
    every = -(-horizon // result.stride)
    shown = np.arange(0, len(result.actual), every)[-max(1, _DRAWN // horizon) :]
    start = len(result.history)
    places = (start + result.stride * shown[:, None] + np.arange(horizon)).ravel().tolist()
    past = range(max(0, start - _HISTORY), start) if shown[0] == 0 else range(0)
    actual = [*result.history[past.start : past.stop].tolist(), *result.actual[shown].ravel().tolist()]
    curves: dict[str, Curve] = {"actual": ([*past, *places], actual)}
    curves |= {name: (places, values[shown].ravel().tolist()) for name, values in forecasts.items()}
    return curves, f"Last forecasts of {result.name}, the median series"


def stock_section(results: Sequence[SeriesResult]) -> Section:
    """What a stock of forecast plus a quantile of the errors leaves over and lacks, by the share of times it serves."""
    services = list(results[0].stock or {})
    rows: list[list[Cell]] = []
    for service in services:
        spare, lack, met = [], [], []
        for result in results:
            left = ((result.stock or {})[service] - result.actual)[~np.isnan(result.actual)]
            spare.append(float(np.maximum(left, 0).mean()))
            lack.append(float(np.maximum(-left, 0).mean()))
            met.append(100 * float((left >= 0).mean()))
        rows.append([100 * service, *(statistics.fmean(values) for values in (met, spare, lack))])
    columns = ["service level [%]", "demand met [% of times]", "left over, mean", "lacking, mean"]
    caption = "Stock up to the forecast plus that quantile of its errors, at each time; means over the series."
    curve: Curve = ([float(row[2]) for row in rows], [float(row[3]) for row in rows])  # type: ignore[arg-type]
    lines = Lines("What safety costs", "left over, mean", "lacking, mean", {"service levels": curve})
    parts: list[Part] = [Table("Stock by service level", columns, rows, caption), lines]
    if negative := sum(result.negative for result in results):
        parts.append(Note(f"{negative} values are below 0: is this a demand?"))
    return Section("Stock", parts)


def chaos_section(results: Sequence[SeriesResult]) -> Section:
    """Gaps, lag, dimension and exponent of each series, and Cao's curves of the first one tested."""
    rows: list[list[Cell]] = []
    for result in results:
        found = result.analysis
        told = [found.tau, found.dim, found.exponent, found.chaotic, found.lags] if found else [None] * 5
        rows.append([result.name, result.filled, *told])
    columns = ["series", "values filled", "delay", "dimension", "Lyapunov exponent", "chaotic", "plain lags"]
    caption = "Of the training part. Chaotic: the exponent is positive and E2 tells the series from noise."
    if not any(result.analysis for result in results):
        rows, columns = [row[:2] for row in rows], columns[:2]
        caption = "No series was tested for chaos: the lags were given, or the model sees none."
    parts: list[Part] = [Table("Series and their state space", columns, rows, caption)]
    tested = next((result for result in results if result.analysis), None)
    if tested and tested.analysis:
        curves = tested.analysis.curves
        dims = range(1, 1 + len(curves.e1))
        e1, e2 = curves.e1.tolist(), curves.e2.tolist()
        parts.append(Lines(f"Cao's curves of {tested.name}", "d", "ratio", {"E1": (dims, e1), "E2": (dims, e2)}))
        parts += [Note(f"{tested.name}: {note}.") for note in tested.analysis.notes]
    if unused := max(result.unused for result in results):
        parts.append(Note(f"Up to {unused} values at the beginning of a series were not learned from: see max_points."))
    return Section("Chaos", parts)


# -- models against each other -----------------------------------------------------------------------------------------


def comparison_sections(results: Mapping[str, Sequence[SeriesResult]]) -> list[Section]:
    """Models of several runs and the seasonal naive one: ranks, wins, steps ahead, Diebold-Mariano and t-tests.

    Raises:
        ValueError: the runs were not tested on the same values.
    """
    first = next(iter(results.values()))
    for label, others in results.items():
        same = len(others) == len(first) and all(
            a.name == b.name and a.stride == b.stride and np.array_equal(a.actual, b.actual, equal_nan=True)
            for a, b in zip(first, others, strict=True)
        )
        if not same:
            raise ValueError(f"{label} was tested on other values: compare models on one held-out part")
    forecasts = {label: [r.forecasts[r.model] for r in each] for label, each in results.items()}
    if "seasonal_naive" not in forecasts:
        forecasts["seasonal_naive"] = [r.forecasts["seasonal_naive"] for r in first]
    actual = [result.actual for result in first]
    errors = {name: [smape(a, f) for a, f in zip(actual, each, strict=True)] for name, each in forecasts.items()}
    wins = dict.fromkeys(errors, 0)
    for values in zip(*errors.values(), strict=True):
        wins[min(zip(values, errors, strict=True))[1]] += 1
    ranked = sorted(errors, key=lambda name: statistics.fmean(errors[name]))
    held = {label: statistics.fmean(coverage(r.actual, r.low, r.high) for r in each) for label, each in results.items()}
    rows: list[list[Cell]] = [
        [name, statistics.fmean(errors[name]), _spread(errors[name]), wins[name], held.get(name)] for name in ranked
    ]
    columns = ["model", "SMAPE [%]", "mean ± sd", "best of series", "in the interval [%]"]
    caption = f"Over {len(first)} series."
    if imputed := sum(result.imputed for result in first):
        caption += f" {imputed} held-out values were missing and are left out of all measures and tests."
    parts: list[Part] = [Table("Models", columns, rows, caption, {"SMAPE [%]": "min"})]
    place = first.index(_median(first))
    curves, title = _curves(first[place], {name: forecasts[name][place] for name in ranked[:3]})
    parts.append(Lines(title, "position", "value", curves))
    sections = [Section("Errors", parts)]
    if actual[0].shape[1] > 1:
        sections.append(_steps_of_all(results, first))
    return [*sections, Section("Differences", _tests(ranked, errors, forecasts, first))]


def _steps_of_all(results: Mapping[str, Sequence[SeriesResult]], first: Sequence[SeriesResult]) -> Section:
    errors = {label: _ahead(each, each[0].model) for label, each in results.items()}
    errors.setdefault("seasonal_naive", _ahead(first, "seasonal_naive"))
    steps = range(1, len(errors["seasonal_naive"]) + 1)
    lines = Lines("Error by step", "steps ahead", "SMAPE [%]", {name: (steps, each) for name, each in errors.items()})
    rows: list[list[Cell]] = [
        [step, *(None if np.isnan(each[step - 1]) else each[step - 1] for each in errors.values())] for step in steps
    ]
    columns = ["steps ahead", *(f"{name} [%]" for name in errors)]
    return Section("Steps ahead", [lines, Table("Errors by step", columns, rows, "SMAPE, means over the series.")])


def _tests(
    names: Sequence[str],
    errors: Mapping[str, Sequence[float]],
    forecasts: Mapping[str, Sequence[Array]],
    results: Sequence[SeriesResult],
) -> list[Part]:
    pairs = list(itertools.combinations(names, 2))
    horizon = results[0].actual.shape[1]
    # Errors of the last step of two origins have steps in common if these lie closer than the horizon.
    common = -(-horizon // results[0].stride)

    def last(name: str) -> Array:
        """Errors of the last step of each origin, series after series, each over its deviation."""
        parts = [(f - r.actual)[:, -1] / _deviation(r) for f, r in zip(forecasts[name], results, strict=True)]
        return np.concatenate(parts)

    known = int((~np.isnan(last(names[0]))).sum())
    caption = (
        f"Diebold-Mariano: squared errors {horizon} steps ahead of {known} origins of all series, each over the "
        "standard deviation of its series; a negative statistic favours the first. t-test: SMAPE of the series, paired."
    )
    columns = ["first", "second", "Diebold-Mariano", "p, Holm", "p of the paired t-test"]
    if known < 3:
        return [Note(f"Too few origins for tests: {known}.")]
    tests = {pair: diebold_mariano(last(pair[0]), last(pair[1]), horizon=min(common, known - 1)) for pair in pairs}
    corrected = dict(zip(pairs, holm([test.p_corrected for test in tests.values()]), strict=True))
    matrix = np.ones((len(names), len(names)))
    rows: list[list[Cell]] = []
    for a, b in pairs:
        matrix[names.index(a), names.index(b)] = matrix[names.index(b), names.index(a)] = corrected[a, b]
        paired = t_test(errors[a], errors[b]).p if len(results) > 1 else None
        rows.append([a, b, tests[a, b].corrected, corrected[a, b], paired])
    return [
        Table("Tests", columns, rows, caption),
        Heatmap("p of Diebold-Mariano, Harvey's correction, Holm", matrix, names, names, "model", "model"),
    ]


def _deviation(result: SeriesResult) -> float:
    return float(np.nanstd(result.history)) or 1.0
