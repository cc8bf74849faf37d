"""Models of one series by name: naive ones, ARIMA, regressors on the table of lags, networks.

Vangala, Ravi: "ATM Cash demand forecasting in an Indian Bank with chaos and deep learning", arXiv 2008.10365.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from convatlas.errors import unknown
from convatlas.series.arima import ArimaForecaster
from convatlas.series.forecaster import Array, Forecaster, Index, Rows, TableForecaster
from convatlas.series.neural import NetworkForecaster, UniRepLKNetForecaster
from convatlas.series.regressors import GRIDS, GMDHRegressor, Regressor, make_regressor, tuned
from convatlas.series.state_space import Scaler, StateSpaceFeatures

__all__ = ["MODELS", "make_forecaster"]


class _Naive(Forecaster):
    """The value one season ago; of a season of 1, the last value."""

    @property
    def reach(self) -> int:
        return self.period

    def fit(self, values: Array, calendar: Array, cut: int) -> None:
        if self.options:
            raise TypeError(f"the naive models take no options, got {', '.join(self.options)}")

    def rolling(self, values: Array, calendar: Array, origins: Index) -> Array:
        return values[origins[:, None] - self.period + np.arange(self.horizon) % self.period]


class _Regression(TableForecaster):
    """A regressor by name; ``tune`` among the options chooses its others on the validation part of the first step."""

    @property
    def refits(self) -> bool:
        return self.name != "gmdh"  # it chooses its nodes on the validation part

    def learn(self, train: Rows, validation: Rows, target: Scaler) -> Regressor:
        if self.options.pop("tune", False) and len(validation[1]):
            self.options |= tuned(self.name, train, validation, self.seed, target.inverse)
        regressor = make_regressor(self.name, self.seed, **self.options)
        if isinstance(regressor, GMDHRegressor) and len(validation[1]):
            regressor.fit(*train, selection=validation)
        else:
            regressor.fit(*train)
        return regressor

    def apply(self, model: Regressor, rows: Array) -> Array:
        return np.asarray(model.predict(rows))


#: Every model by name.
MODELS: dict[str, type[Forecaster]] = {
    "naive": _Naive,
    "seasonal_naive": _Naive,
    "arima": ArimaForecaster,
    **dict.fromkeys(GRIDS, _Regression),
    **dict.fromkeys(("lstm", "cnn", "cnn_lstm"), NetworkForecaster),
    "unireplknet": UniRepLKNetForecaster,
}


def make_forecaster(
    name: str,
    features: StateSpaceFeatures,
    *,
    horizon: int = 1,
    period: int = 7,
    direct: bool = False,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> Forecaster:
    """A model of one series by its name in `MODELS`.

    Raises:
        UnknownName: there is no such model.
        ValueError: horizon or period is below 1.
    """
    if name not in MODELS:
        raise unknown("forecasting model", name, MODELS)
    if horizon < 1 or period < 1:
        raise ValueError(f"horizon and period must be at least 1, got {horizon} and {period}")
    season = 1 if name == "naive" else period
    return MODELS[name](
        name, features, horizon=horizon, period=season, direct=direct, seed=seed, options=dict(options or {})
    )
