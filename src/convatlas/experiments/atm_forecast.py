"""Do the state space and the day of the week improve forecasts of cash demand, and do networks equal a forest?

Vangala, Ravi: "ATM Cash demand forecasting in an Indian Bank with chaos and deep learning", arXiv 2008.10365. Its data
are private: quick simulates machines whose demand has a weekday profile, a bump at the beginning of a month, a chaotic
component and noise.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from convatlas.data.time_series import SeriesSet, cash_demand, read_series
from convatlas.experiments.small_training import finished, one_thread, progress
from convatlas.report import Cell, Claim, Lines, Note, Report, Section, Table
from convatlas.series.chaos import analyse_chaos
from convatlas.series.metrics import diebold_mariano, holm, smape, t_test
from convatlas.series.pipeline import ForecastPipeline

__all__ = ["full", "quick", "run"]

# Seeds and thresholds, fixed before anything was measured.

#: Machines, each simulated by a seed of its own, and days; the last ones are held out.
MACHINES = 6
DAYS = 500
HELD_OUT = 100
#: Of the embedding in the simulated series.
TAU, M = 1, 4
#: What the four settings see: lags, and whether the weekday.
SETTINGS = {
    "last value": (1, False),
    "last value + weekday": (1, True),
    "embedding": (M, False),
    "embedding + weekday": (M, True),
}
#: Models of the 2 x 2 comparison.
MODELS: dict[str, dict[str, Any]] = {
    "rf": {"n_estimators": 100},
    "grnn": {},
    "cnn": {"epochs": 60, "patience": 10},
    "lstm": {"epochs": 60, "patience": 10},
}
#: Largest p of a difference that counts, and least p of two models that count as equal.
ALPHA = 0.05

Array = npt.NDArray[np.float64]


class _Tested(NamedTuple):
    """Forecasts (days) of a machine and its true values."""

    forecast: Array
    actual: Array

    @property
    def error(self) -> float:
        return smape(self.actual, self.forecast)


#: Results by model and setting, a machine each.
Results = Mapping[str, Mapping[str, Sequence[_Tested]]]


def run(
    budget: Literal["quick", "full"], *, data: str | Path | None = None, folder: str | Path | None = None
) -> Report:
    """Test the claims of the paper.

    Args:
        budget: "quick" simulates six machines; "full" takes the user's, with 500 trees, long trainings and an embedding
            found for each machine.
        data: for "full": a CSV file of id, date and amount, in this order.
        folder: not used: nothing is kept.

    Raises:
        ValueError: the budget is unknown, or "full" lacks data.
    """
    if budget == "quick":
        return quick()
    if budget != "full":
        raise ValueError(f"budget must be 'quick' or 'full', got {budget!r}")
    if data is None:
        raise ValueError(f"budget 'full' needs data, got {data}")
    return full(data)


def quick() -> Report:
    """Six simulated machines."""
    data = cash_demand(MACHINES, DAYS)
    results = _measured(data, MODELS, HELD_OUT, (TAU, M))
    return finished("Cash demand: quick test of the claims", _sections(results, data, HELD_OUT))


def full(data: str | Path) -> Report:
    """The user's machines."""
    path = Path(data)
    with path.open(encoding="utf-8-sig") as file:
        header = [name.strip() for name in file.readline().split(",")]
    if len(header) < 3:
        raise ValueError(f"data must have the columns id, date and amount, got {', '.join(header)}")
    machines = read_series(path, id_column=header[0], date_column=header[1], value_columns=header[2:3])
    models: dict[str, dict[str, Any]] = {"rf": {}, "grnn": {}, "cnn": {"seeds": 5}, "lstm": {"seeds": 5}}
    models |= {name: {} for name in ("svr", "mlp", "gmdh", "arima")}
    held_out = 30
    return finished(
        "Cash demand: the claims on your machines",
        _sections(_measured(machines, models, held_out, None), machines, held_out),
    )


def _measured(
    data: SeriesSet, models: Mapping[str, Mapping[str, Any]], held_out: int, embedding: tuple[int, int] | None
) -> Results:
    """One-step forecasts of the held-out days by each model in each setting, and by the seasonal naive one."""
    with progress(len(data.names) * len(models) * len(SETTINGS)) as advance, one_thread():
        results: dict[str, dict[str, list[_Tested]]] = {}
        for model, options in models.items():
            results[model] = {
                setting: [
                    _tested(data, index, model, options, setting, held_out, embedding, advance)
                    for index in range(len(data.names))
                ]
                for setting in SETTINGS
            }
        naive = [
            _tested(data, index, "seasonal_naive", {}, "last value", held_out, (1, 1), lambda _: None)
            for index in range(len(data.names))
        ]
    return {**results, "seasonal_naive": dict.fromkeys(SETTINGS, naive)}


def _tested(
    data: SeriesSet,
    index: int,
    model: str,
    options: Mapping[str, Any],
    setting: str,
    held_out: int,
    embedding: tuple[int, int] | None,
    advance: Callable[[str], None],
) -> _Tested:
    times, values = data.one(index)
    lags, weekday = SETTINGS[setting]
    first = len(values) - held_out
    tau, m = (1, 1) if lags == 1 else embedding or (None, None)
    if model == "cnn" and lags == 1 and not weekday:
        m = 3  # the least that the network takes: the plain setting then has two lags more
    pipeline = ForecastPipeline(
        model, calendar=("dow",) if weekday else (), embedding="chaos", tau=tau, m=m, options=options, seed=index
    )
    pipeline.fit(values[:first], times[:first], data.step)
    forecast, actual = pipeline.rolling(values, times, first)
    advance(f"{model}, {setting}")
    return _Tested(forecast[:, 0], actual[:, 0])


# -- claims ------------------------------------------------------------------------------------------------------------


def _errors(results: Results, model: str, setting: str) -> list[float]:
    return [tested.error for tested in results[model][setting]]


def _sections(results: Results, data: SeriesSet, held_out: int) -> list[Section]:
    trained = [model for model in results if model != "seasonal_naive"]
    return [_chaos_section(data, held_out), _ablation_section(results, trained), _equality_section(results, trained)]


def _chaos_section(data: SeriesSet, held_out: int) -> Section:
    """Lag, dimension and exponent of the training part of each machine."""
    from convatlas.series.state_space import clean

    rows: list[list[Cell]] = []
    curves: dict[str, Any] = {}
    for index, name in enumerate(data.names):
        values = clean(data.one(index)[1], period=data.period).values[:-held_out]
        found = analyse_chaos(values, max_dim=8)
        rows.append([name, found.tau, found.dim, found.exponent, found.chaotic])
        curves = curves or {
            f"{kind} of {name}": (range(1, 9), curve)
            for kind, curve in zip(("E1", "E2"), found.curves[2:], strict=True)
        }
    columns = ["machine", "delay", "dimension", "Lyapunov exponent", "chaotic"]
    return Section("Chaos", [Table("State space", columns, rows), Lines("Cao's curves", "d", "ratio", curves)])


def _ablation_section(results: Results, models: Sequence[str]) -> Section:
    """The 2 x 2 comparison: what the embedding and the weekday each take off the error."""
    rows: list[list[Cell]] = []
    for model in [*models, "seasonal_naive"]:
        errors = [_errors(results, model, setting) for setting in SETTINGS]
        spread = statistics.stdev(errors[-1]) if len(errors[-1]) > 1 else None
        rows.append([model, *(statistics.fmean(each) for each in errors), spread])
    columns = ["model", *(f"{setting} [%]" for setting in SETTINGS), "sd of the last [%]"]
    count = len(results[models[0]]["embedding"])
    best = "embedding + weekday"
    claims = []
    for without, what, published in (
        ("last value + weekday", "the embedding", "chaos modelling improves every model"),
        ("embedding", "the day of the week", "the day of the week improves every model"),
    ):
        gains = {
            model: statistics.fmean(_errors(results, model, without)) - statistics.fmean(_errors(results, model, best))
            for model in models
        }
        worst = min(gains, key=lambda model: gains[model])
        p = t_test(_errors(results, worst, best), _errors(results, worst, without)).p if count > 1 else 1.0
        claims.append(
            Claim.judge(
                f"With {what} the forecasts of every model are better",
                published=published,
                statistic=f"least gain of SMAPE by {what} among {', '.join(models)}, means over {count} machines",
                value=gains[worst],
                at_least=0.0,
                seeds=count if count > 1 else 1,
                scale_ok=p <= ALPHA,
                unit="points",
            )
        )
    return Section(
        "State space and day of the week",
        [*claims, Table("SMAPE", columns, rows, highlight=dict.fromkeys(columns[1:5], "min"))],
    )


def _equality_section(results: Results, models: Sequence[str]) -> Section:
    """Networks against the forest, and which model is the best."""
    best = "embedding + weekday"
    errors = {model: _errors(results, model, best) for model in models}
    count = len(errors["rf"])
    p = {name: t_test(errors[name], errors["rf"]).p for name in ("lstm", "cnn")}
    others = [statistics.fmean(errors[name]) for name in models if name != "rf"]
    claims = [
        Claim.judge(
            "LSTM and 1-D CNN equal the random forest by a t-test",
            published="statistically equal to RF",
            statistic="smaller p of the paired t-tests of SMAPE over machines",
            value=min(p.values()),
            at_least=ALPHA,
            seeds=count,
            scale_ok=count >= 5,
        ),
        Claim.judge(
            "The random forest has the least SMAPE",
            published="RF has the best SMAPE",
            statistic="least mean SMAPE of the other models less that of the forest",
            value=min(others) - statistics.fmean(errors["rf"]),
            at_least=0.0,
            seeds=count,
            unit="points",
        ),
    ]
    pairs = [(a, b) for i, a in enumerate(models) for b in models[i + 1 :]]
    tests = [diebold_mariano(_all_errors(results[a][best]), _all_errors(results[b][best])) for a, b in pairs]
    corrected = holm([test.p_corrected for test in tests])
    rows: list[list[Cell]] = [
        [a, b, test.corrected, value] for (a, b), test, value in zip(pairs, tests, corrected, strict=True)
    ]
    table = Table("Diebold-Mariano, all machines", ["first", "second", "statistic", "p, Holm"], rows)
    note = Note(
        "Squared errors, one step ahead; a negative statistic favours the first. The days of all machines count as one "
        "series."
    )
    return Section("Models against each other", [*claims, table, note])


def _all_errors(tested: Sequence[_Tested]) -> Array:
    return np.concatenate([each.forecast - each.actual for each in tested])
