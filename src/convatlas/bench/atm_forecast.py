"""Chaos analysis, rolling origins and networks of many series beside loops over points, origins and series."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convatlas.bench.ratio import Bar, Call, Case, compare, report
from convatlas.data.time_series import cash_demand
from convatlas.networks.registry import create_model
from convatlas.report import Cell, Report, Section, Table
from convatlas.series.arima import ArimaForecaster
from convatlas.series.chaos import cao_embedding, divergence_curve
from convatlas.series.forecaster import Forecaster
from convatlas.series.models import MODELS, make_forecaster
from convatlas.series.neural import NetworkFit, train_networks
from convatlas.series.regressors import GRNNRegressor
from convatlas.series.state_space import StateSpaceFeatures, calendar_features

__all__ = ["run"]

CAO, LYAPUNOV, ORIGINS, STATES, KERNEL, NETWORKS = (
    "Cao's curves",
    "divergence of neighbours",
    "rolling origins of a table",
    "rolling origins of ARIMA",
    "general regression network",
    "networks of many series",
)
_PAPER = "no figure in the paper (arXiv 2008.10365)"

# Fixed before anything was measured.
BARS = [
    Bar(
        statement="Cao's curves are found at least 5 times as fast as by comparing all points",
        published=_PAPER,
        theirs="all pairs",
        at_least=5.0,
        what=CAO,
    ),
    Bar(
        statement="The divergence of neighbours is found at least 5 times as fast as by comparing all points",
        published=_PAPER,
        theirs="all pairs",
        at_least=5.0,
        what=LYAPUNOV,
    ),
    Bar(
        statement="Origins of a model on a table are answered at least 10 times as fast as one by one",
        published=_PAPER,
        theirs="loop over origins",
        at_least=10.0,
        what=ORIGINS,
    ),
    Bar(
        statement="Origins of ARIMA are answered at least 10 times as fast as by statsmodels one by one",
        published=_PAPER,
        theirs="statsmodels, loop over origins",
        at_least=10.0,
        what=STATES,
    ),
    Bar(
        statement="LSTMs of many series train at least 10 times as fast as one by one",
        published=_PAPER,
        theirs="loop over series",
        at_least=10.0,
        what=NETWORKS,
        group="lstm",
    ),
    Bar(
        statement="1-D CNNs of many series train at least 10 times as fast as one by one",
        published=_PAPER,
        theirs="loop over series",
        at_least=10.0,
        what=NETWORKS,
        group="cnn",
    ),
]

#: Points of the chaotic series, in a quick run and else.
POINTS = (2000, 5000)
#: Origins, and steps ahead.
ROLLED, HORIZON = (20, 60), 7
#: Series, rows of each, epochs.
SERIES, ROWS, EPOCHS = (20, 50), 256, 2
#: Days of the simulated demand.
DAYS = 500
#: What makes the fit of a model shorter in a quick run.
QUICK: dict[str, dict[str, Any]] = {
    "arima": {"max_order": 1},
    "rf": {"n_estimators": 100},
    "lstm": {"epochs": 20},
    "cnn": {"epochs": 20},
    "cnn_lstm": {"epochs": 20},
    "unireplknet": {"epochs": 3},
}

_FEATURES = StateSpaceFeatures(1, 4)


def run(*, threads: Sequence[int] | None = None, quick: bool = False) -> Report:
    """Ratios of time, and how long the fit of each model takes.

    Args:
        threads: numbers of threads to measure with; by default 1 and 2.
        quick: fewer points, origins and series, and shorter fits.
    """
    points, origins, series = (sizes[0 if quick else 1] for sizes in (POINTS, ROLLED, SERIES))
    cases = [
        Case(f"{points} points of a logistic map", CAO, partial(_cao, points), tolerance=1e-9),
        Case(f"{points} points of a logistic map", LYAPUNOV, partial(_lyapunov, points), tolerance=1e-9),
        Case(f"GRNN, {origins} origins x {HORIZON} steps", ORIGINS, partial(_table, origins), tolerance=1e-6),
        Case(f"{DAYS} days", KERNEL, _kernel, tolerance=1e-6),
    ]
    if find_spec("statsmodels") is not None:
        cases.append(Case(f"{origins} origins x {HORIZON} steps", STATES, partial(_arima, origins), tolerance=1e-4))
    cases += [
        Case(f"{kind}, {series} series", NETWORKS, partial(_networks, kind, series), group=kind, tolerance=1e-3)
        for kind in ("lstm", "cnn")
    ]
    note = "Series are simulated: a logistic map, and cash demand with weekdays. All sides start from the same weights."
    found = report("atm_forecast", compare(cases, threads=threads, quick=quick), BARS, note, quick=quick)
    *ratios, memory, how = found.sections
    return dataclasses.replace(found, sections=[*ratios, _fit_section(quick), memory, how])


def _logistic(points: int) -> np.ndarray:
    values = np.empty(points)
    value = 0.3
    for index in range(-100, points):
        value = 3.9 * value * (1 - value)
        if index >= 0:
            values[index] = value
    return values


def _cao(points: int, device: torch.device) -> dict[str, Call]:
    series = _logistic(points)

    def call(backend: Any) -> Tensor:
        return torch.from_numpy(np.concatenate(cao_embedding(series, 1, 4, window=1, backend=backend)))

    return {"k-d tree": partial(call, "tree"), "all pairs": partial(call, "naive")}


def _lyapunov(points: int, device: torch.device) -> dict[str, Call]:
    series = _logistic(points)

    def call(backend: Any) -> Tensor:
        return torch.from_numpy(divergence_curve(series, 4, 1, backend=backend))

    return {"k-d tree": partial(call, "tree"), "all pairs": partial(call, "naive")}


def _demand() -> tuple[np.ndarray, np.ndarray]:
    data = cash_demand(1, DAYS)
    times, values = data.one(0)
    return values, calendar_features(times, ("dow",))


def _loop(forecaster: Forecaster, values: np.ndarray, calendar: np.ndarray, origins: np.ndarray) -> Tensor:
    rows = [forecaster.rolling(values, calendar, origins[place : place + 1]) for place in range(len(origins))]
    return torch.from_numpy(np.concatenate(rows))


def _table(count: int, device: torch.device) -> dict[str, Call]:
    values, calendar = _demand()
    origins = len(values) - HORIZON - np.arange(count)[::-1]
    forecaster = make_forecaster("grnn", _FEATURES, horizon=HORIZON)
    forecaster.fit(values, calendar, int(origins[0]))
    return {
        "all origins": lambda: torch.from_numpy(forecaster.rolling(values, calendar, origins)),
        "loop over origins": lambda: _loop(forecaster, values, calendar, origins),
    }


def _arima(count: int, device: torch.device) -> dict[str, Call]:
    values, calendar = _demand()
    origins = len(values) - HORIZON - np.arange(count)[::-1]
    forecaster = ArimaForecaster(
        "arima", _FEATURES, horizon=HORIZON, period=7, direct=False, seed=0, options={"order": [1, 0, 1]}
    )
    forecaster.fit(values, calendar, int(origins[0]))
    exogenous = calendar[:, forecaster.columns]

    def loop() -> Tensor:
        rows = []
        for origin in origins:
            applied = forecaster.fitted.apply(values[:origin], exogenous[:origin])
            rows.append(np.asarray(applied.forecast(HORIZON, exog=exogenous[origin : origin + HORIZON])))
        return torch.from_numpy(np.stack(rows))

    return {
        "one filter pass": lambda: torch.from_numpy(forecaster.rolling(values, calendar, origins)),
        "statsmodels, loop over origins": loop,
    }


def _kernel(device: torch.device) -> dict[str, Call]:
    values, calendar = _demand()
    x, y = _FEATURES.table(values, calendar)
    model = GRNNRegressor(0.6).fit(x, y)

    def loop() -> Tensor:
        found = []
        for row in x:
            squared = ((x - row) ** 2).sum(1)
            weights = np.exp(-(squared - squared.min()) / (2 * 0.6**2))
            found.append(weights @ y / weights.sum())
        return torch.from_numpy(np.array(found))

    return {"one matrix product": lambda: torch.from_numpy(model.predict(x)), "loop over rows": loop}


def _networks(kind: str, count: int, device: torch.device) -> dict[str, Call]:
    rows, targets = torch.randn(count, ROWS, 11), torch.randn(count, ROWS)
    networks = [create_model(f"forecast_{kind}") for _ in range(count)]
    start = [{name: tensor.clone() for name, tensor in network.state_dict().items()} for network in networks]

    def call(size: int) -> Tensor:
        """Train groups of so many networks, and return all weights."""
        fits = []
        for network, weights, x, y in zip(networks, start, rows, targets, strict=True):
            network.load_state_dict(weights)
            fits.append(NetworkFit(network=network, train=(x, y), validation=(x[:32], y[:32]), epochs=EPOCHS))
        for first in range(0, count, size):
            train_networks(fits[first : first + size])
        return torch.stack([torch.cat([w.detach().flatten() for w in network.parameters()]) for network in networks])

    return {"as one": partial(call, count), "loop over series": partial(call, 1)}


def _fit_section(quick: bool) -> Section:
    """Seconds of one fit of each model, measured here, and over those of the GRNN."""
    values, calendar = _demand()
    seconds: dict[str, float] = {}
    options: Mapping[str, Any] = QUICK if quick else {}
    for name in MODELS:
        if name == "arima" and find_spec("statsmodels") is None:
            continue
        forecaster = make_forecaster(name, _FEATURES, options=options.get(name))
        start = time.process_time()
        forecaster.fit(values, calendar, round(0.8 * len(values)))
        seconds[name] = time.process_time() - start
    rows: list[list[Cell]] = [
        [name, taken, taken / max(seconds["grnn"], 1e-9)] for name, taken in sorted(seconds.items(), key=lambda e: e[1])
    ]
    caption = f"One series of {DAYS} days, processor time measured here"
    caption += ", shorter trainings and fewer orders than by default." if quick else ", by default settings."
    return Section("Fit", [Table("Time of a fit", ["model", "seconds", "over GRNN"], rows, caption)])
