"""Reports on forecasts: errors of a model beside the naive ones, a plot with intervals, models against each other."""

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

__all__ = ["SeriesResult", "chaos_section", "comparison_sections", "quality_section"]

Array = npt.NDArray[np.float64]

#: Times drawn before the first forecast.
_HISTORY = 60


@dataclass(frozen=True, eq=False)
class SeriesResult:
    """Forecasts of the held-out part of one series.

    Attributes:
        name: of the series.
        history: values before the held-out part.
        actual: true values (origins, horizon).
        forecasts: the like of each model by name, the trained one first.
        low, high: interval of the trained one.
        stride: positions between two origins.
        analysis: chaos test of the training part, where one was made.
    """

    name: str
    history: Array
    actual: Array
    forecasts: Mapping[str, Array]
    low: Array
    high: Array
    stride: int
    analysis: ChaosAnalysis | None = None

    @property
    def model(self) -> str:
        """The trained model."""
        return next(iter(self.forecasts))

    def error(self, model: str) -> float:
        """SMAPE of one model in %."""
        return smape(self.actual, self.forecasts[model])


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.4g} ± {statistics.stdev(values) if len(values) > 1 else 0:.2g}"


def quality_section(results: Sequence[SeriesResult], level: float) -> Section:
    """Errors of every model, those of the trained one for each series, and a plot of the median series."""
    horizon = results[0].actual.shape[1]
    rows: list[list[Cell]] = []
    for model in results[0].forecasts:
        measured = [forecast_quality(r.actual.ravel(), r.forecasts[model].ravel()) for r in results]
        if horizon > 1:  # Theil's U compares steps of one
            measured = [{**each, "Theil U": float("nan")} for each in measured]
        means = [statistics.fmean(each[key] for each in measured) for key in measured[0]]
        spread = _spread([each["SMAPE [%]"] for each in measured])
        rows.append([model, means[0], spread, *(None if np.isnan(mean) else mean for mean in means[1:])])
    names = ["SMAPE [%]", "SMAPE, mean ± sd", "NRMSE", "MAE", "MAPE [%]", "Theil U"]
    caption = (
        f"Means over {len(results)} series, {len(results[0].actual)} origins each, {horizon} steps ahead; each "
        "forecast sees all true values before its origin."
    )
    highlight = dict.fromkeys(("SMAPE [%]", "NRMSE", "MAE"), "min")
    each: list[list[Cell]] = []
    for result in results:
        covered = coverage(result.actual, result.low, result.high)
        each.append([result.name, *(result.error(model) for model in result.forecasts), covered])
    columns = ["series", *(f"{model} [%]" for model in results[0].forecasts), "in the interval [%]"]
    note = f"SMAPE of each series; {100 * level:g} % of the values should lie in their interval."
    order = sorted(results, key=lambda result: result.error(result.model))
    parts: list[Part] = [
        Table("Errors", ["model", *names], rows, caption, highlight),  # type: ignore[arg-type]
        Table("Series", columns, each, note),
        _plot(order[(len(order) - 1) // 2], level),
    ]
    return Section("Forecasts", parts)


def _plot(result: SeriesResult, level: float) -> Lines:
    """Forecasts that follow each other: of origins one step apart the first step, else all steps."""
    together = result.stride >= result.actual.shape[1]
    first = result.actual.shape[1] if together else 1
    start = len(result.history)
    places = [start + k * result.stride + step for k in range(len(result.actual)) for step in range(first)]
    past = range(max(0, start - _HISTORY), start)

    def drawn(values: Array) -> tuple[Sequence[float], Sequence[float]]:
        return places, values[:, :first].ravel().tolist()

    actual = drawn(result.actual)
    curves = {
        "actual": ([*past, *actual[0]], [*result.history[past.start :].tolist(), *actual[1]]),
        result.model: drawn(result.forecasts[result.model]),
        f"lower bound, {100 * level:g} %": drawn(result.low),
        f"upper bound, {100 * level:g} %": drawn(result.high),
    }
    return Lines(f"Forecasts of {result.name}, the median series", "position", "value", curves)


def chaos_section(results: Sequence[SeriesResult], gaps: Mapping[str, int]) -> Section:
    """Gaps, lag, dimension and exponent of each series, and Cao's curves of the first one tested."""
    rows: list[list[Cell]] = []
    for result in results:
        found = result.analysis
        told = [found.tau, found.dim, found.exponent, found.chaotic, found.lags] if found else [None] * 5
        rows.append([result.name, gaps.get(result.name, 0), *told])
    columns = ["series", "gaps filled", "delay", "dimension", "Lyapunov exponent", "chaotic", "plain lags"]
    caption = "Of the training part. Chaotic: the exponent is positive and E2 tells the series from noise."
    parts: list[Part] = [Table("Series and their state space", columns, rows, caption)]
    tested = next((result for result in results if result.analysis), None)
    if tested and tested.analysis:
        curves = tested.analysis.curves
        dims = range(1, 1 + len(curves.e1))
        parts.append(
            Lines(
                f"Cao's curves of {tested.name}",
                "d",
                "ratio",
                {"E1": (dims, curves.e1.tolist()), "E2": (dims, curves.e2.tolist())},
            )
        )
        parts += [Note(f"{tested.name}: {note}.") for note in tested.analysis.notes]
    return Section("Chaos", parts)


def comparison_sections(results: Mapping[str, Sequence[SeriesResult]]) -> list[Section]:
    """Models of several runs and the seasonal naive one: ranks, wins, Diebold-Mariano and t-tests, Holm-corrected.

    Raises:
        ValueError: the runs were not tested on the same values.
    """
    first = next(iter(results.values()))
    for label, others in results.items():
        same = len(others) == len(first) and all(
            a.name == b.name and np.array_equal(a.actual, b.actual) for a, b in zip(first, others, strict=True)
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
    rows: list[list[Cell]] = [
        [name, statistics.fmean(errors[name]), _spread(errors[name]), wins[name]] for name in ranked
    ]
    columns = ["model", "SMAPE [%]", "mean ± sd", "best of series"]
    table = Table("Models", columns, rows, f"Over {len(first)} series.", {"SMAPE [%]": "min"})
    tests = _tests(ranked, errors, forecasts, actual)
    return [Section("Errors", [table]), Section("Differences", tests)]


def _tests(
    names: Sequence[str],
    errors: Mapping[str, Sequence[float]],
    forecasts: Mapping[str, Sequence[Array]],
    actual: Sequence[Array],
) -> list[Part]:
    pairs = list(itertools.combinations(names, 2))
    horizon = min(actual[0].shape[1], len(actual[0]) - 1)

    def of_days(name: str) -> Array:
        """Errors of the last step of each origin, series after series."""
        return np.concatenate([(f - a)[:, -1] for f, a in zip(forecasts[name], actual, strict=True)])

    tests = {pair: diebold_mariano(of_days(pair[0]), of_days(pair[1]), horizon=horizon) for pair in pairs}
    corrected = dict(zip(pairs, holm([test.p_corrected for test in tests.values()]), strict=True))
    matrix = np.ones((len(names), len(names)))
    rows: list[list[Cell]] = []
    for a, b in pairs:
        matrix[names.index(a), names.index(b)] = matrix[names.index(b), names.index(a)] = corrected[a, b]
        paired = t_test(errors[a], errors[b]).p if len(actual) > 1 else None
        rows.append([a, b, tests[a, b].corrected, corrected[a, b], paired])
    caption = (
        "Squared errors of all days; a negative statistic favours the first. t-test: SMAPE of the series in pairs."
    )
    columns = ["first", "second", "Diebold-Mariano", "p, Holm", "p of the paired t-test"]
    return [
        Table("Tests", columns, rows, caption),
        Heatmap("p of Diebold-Mariano, Harvey's correction, Holm", matrix, names, names, "model", "model"),
    ]
