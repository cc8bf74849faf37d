"""Models of one series by name: naive ones, ARIMA, regressors on the table of delays, networks.

Every model learns from values and calendar features, and answers rolling origins: for each origin it sees all true
values before it and foretells the next ``horizon``.
"""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from convatlas.errors import DataError, require, unknown
from convatlas.networks.registry import create_model
from convatlas.series.regressors import GRIDS, GMDHRegressor, make_regressor, tuned
from convatlas.series.state_space import Scaler, StateSpaceFeatures

__all__ = ["MODELS", "Forecaster", "make_forecaster"]

Array = npt.NDArray[np.float64]
Index = npt.NDArray[np.int64]

#: Lags and calendar features per batch, epochs and patience of the networks.
_EPOCHS, _BATCH, _PATIENCE, _RATE = 200, 32, 20, 1e-3


class Forecaster(ABC):
    """A model of one series.

    Args:
        features: lags that the model sees, where it sees a table.
        horizon: steps that are asked for at most.
        period: length of the season.
        seed: of all randomness.
        options: of the model itself.
    """

    #: Whether the model is fitted once more on all known values after the validation part has served.
    refits: ClassVar[bool] = True

    def __init__(
        self, features: StateSpaceFeatures, horizon: int, period: int, seed: int, options: Mapping[str, Any]
    ) -> None:
        self.features, self.horizon, self.period, self.seed, self.options = features, horizon, period, seed, options

    @property
    def reach(self) -> int:
        """How many values an origin must have before it."""
        return self.features.reach

    @abstractmethod
    def fit(self, values: Array, calendar: Array, cut: int) -> None:
        """Learn from values (n) and calendar (n, features); those from ``cut`` on serve for validation, if any."""

    @abstractmethod
    def rolling(self, values: Array, calendar: Array, origins: Index) -> Array:
        """Forecasts (origins, horizon); the calendar reaches ``horizon`` beyond the last origin."""


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


class _Arima(Forecaster):
    """Orders by AIC, differences by the augmented Dickey-Fuller test; the parameters stay fixed while origins roll.

    Of the options, ``order`` sets (p, d, q), ``max_order`` the largest p and q, 5 by default.
    """

    @property
    def reach(self) -> int:
        return 1

    def fit(self, values: Array, calendar: Array, cut: int) -> None:
        model = require("statsmodels.tsa.arima.model", extra="series", purpose="ARIMA").ARIMA
        if left := set(self.options) - {"order", "max_order"}:
            raise TypeError(f"arima takes the options order and max_order, got {', '.join(sorted(left))}")
        # One column of a one-hot calendar is the sum of the others: the constant stands for it.
        self.columns = [c for c in range(calendar.shape[1]) if np.ptp(calendar[:, c]) > 0]
        ones = np.ones((len(calendar), 1))
        while self.columns and np.linalg.matrix_rank(np.c_[ones, calendar[:, self.columns]]) <= len(self.columns):
            self.columns = self.columns[1:]
        exogenous = self._exogenous(calendar)
        if "order" in self.options:
            orders = [tuple(self.options["order"])]
        else:
            largest = int(self.options.get("max_order", 5))
            differences = _differences(values)
            orders = [(p, differences, q) for p in range(largest + 1) for q in range(largest + 1)]
        found = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # orders that do not converge lose by their AIC
            for order in orders:
                try:
                    found.append(model(values, exogenous, order=order, trend="n" if order[1] else "c").fit())
                except (np.linalg.LinAlgError, ValueError) as error:
                    if len(orders) == 1:
                        raise DataError(f"ARIMA{order} cannot be fitted: {error}") from None
        self.fitted = min(found, key=lambda fitted: float(fitted.aic))

    def _exogenous(self, calendar: Array) -> Array | None:
        return calendar[:, self.columns] if self.columns else None

    def rolling(self, values: Array, calendar: Array, origins: Index) -> Array:
        exogenous = self._exogenous(calendar)
        last = int(origins.max())
        if self.horizon == 1:
            known = values[: last + 1] if last < len(values) else values
            applied = self.fitted.apply(known, None if exogenous is None else exogenous[: len(known)])
            future = None if exogenous is None or last < len(known) else exogenous[last : last + 1]
            return np.asarray(applied.predict(0, last, exog=future))[origins][:, None]
        rows = []
        for origin in origins:
            applied = self.fitted.apply(values[:origin], None if exogenous is None else exogenous[:origin])
            future = None if exogenous is None else exogenous[origin : origin + self.horizon]
            rows.append(np.asarray(applied.forecast(self.horizon, exog=future)))
        return np.stack(rows)


def _differences(values: Array) -> int:
    """How often a series is differenced until the augmented Dickey-Fuller test finds no unit root, at most twice."""
    tools = require("statsmodels.tsa.stattools", extra="series", purpose="ARIMA")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the form of the result changes: its second entry does not
        unit_root = [tools.adfuller(np.diff(values, count))[1] > 0.05 for count in (0, 1)]
    return 0 if not unit_root[0] else 2 if unit_root[1] else 1


class _Table(Forecaster):
    """A model of one-step rows; further steps are recursive: forecasts stand where true values are not known yet."""

    def fit(self, values: Array, calendar: Array, cut: int) -> None:
        x, y = self.features.table(values, calendar)
        m, rows = self.features.m, cut - self.features.reach
        self.scaler, self.target = Scaler.fit(x[:rows, :m]), Scaler.fit(y[:rows])
        z, goal = self._standard(x), self.target.apply(y)
        self.learn((z[:rows], goal[:rows]), (z[rows:], goal[rows:]))

    def _standard(self, rows: Array) -> Array:
        m = self.features.m
        return np.concatenate([self.scaler.apply(rows[:, :m]), rows[:, m:]], 1)

    @abstractmethod
    def learn(self, train: tuple[Array, Array], validation: tuple[Array, Array]) -> None:
        """Learn from standardised rows and targets."""

    @abstractmethod
    def values(self, rows: Array) -> Array:
        """Standardised targets of standardised rows."""

    def rolling(self, values: Array, calendar: Array, origins: Index) -> Array:
        reach = self.features.reach
        window = values[origins[:, None] - reach + np.arange(reach)]
        steps = []
        for step in range(self.horizon):
            lags = window[:, ::-1][:, : reach : self.features.tau][:, : self.features.m]
            rows = self._standard(np.concatenate([lags, calendar[origins + step]], 1))
            steps.append(self.target.inverse(self.values(rows)))
            window = np.concatenate([window[:, 1:], steps[-1][:, None]], 1)
        return np.stack(steps, 1)


class _Regression(_Table):
    """A regressor by name; ``tune`` among the options chooses its others on the validation part."""

    name: ClassVar[str]

    def learn(self, train: tuple[Array, Array], validation: tuple[Array, Array]) -> None:
        options = dict(self.options)
        if options.pop("tune", False) and len(validation[1]):
            chosen = tuned(self.name, train, validation, self.seed, self.target.inverse)
            self.options = options = {**options, **chosen}
        self.regressor = make_regressor(self.name, self.seed, **options)
        if isinstance(self.regressor, GMDHRegressor) and len(validation[1]):
            self.regressor.fit(*train, selection=validation)
        else:
            self.regressor.fit(*train)

    def values(self, rows: Array) -> Array:
        return np.asarray(self.regressor.predict(rows))


class _Network(_Table):
    """A small network; options are fields of its config, ``epochs``, ``batch_size``, ``patience``, ``lr``, ``seeds``.

    Of several ``seeds`` (a number of repetitions) the one with the least validation loss stays.
    """

    refits = False
    model: ClassVar[str]

    def learn(self, train: tuple[Array, Array], validation: tuple[Array, Array]) -> None:
        options = dict(self.options)
        how = {name: options.pop(name) for name in ("epochs", "batch_size", "patience", "lr") if name in options}
        best = np.inf
        lags = self.features.m
        for seed in range(self.seed, self.seed + int(options.pop("seeds", 1))):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                network = create_model(self.model, lags=lags, calendar=train[0].shape[1] - lags, **options)
            tensors = [tuple(torch.from_numpy(part).float() for part in pair) for pair in (train, validation)]
            loss = _train(network, tensors[0], tensors[1], seed, **how)
            if loss < best or not hasattr(self, "network"):
                best, self.network = loss, network

    @torch.inference_mode()
    def values(self, rows: Array) -> Array:
        return self.network(torch.from_numpy(np.ascontiguousarray(rows)).float()).double().numpy()


def _train(
    network: nn.Module,
    train: tuple[Tensor, ...],
    validation: tuple[Tensor, ...],
    seed: int,
    *,
    epochs: int = _EPOCHS,
    batch_size: int = _BATCH,
    patience: int = _PATIENCE,
    lr: float = _RATE,
) -> float:
    """Minimise the squared error by Adam, keep the epoch that is best on the validation rows and return its loss.

    The last of the tensors are the targets, the others go into the network.
    """
    optimizer = torch.optim.Adam(network.parameters(), lr)
    order = torch.Generator().manual_seed(seed)
    checked = validation if len(validation[-1]) else train
    best, best_state, waited = np.inf, copy.deepcopy(network.state_dict()), 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of dropout
        for _ in range(epochs):
            network.train()
            for batch in torch.randperm(len(train[-1]), generator=order).split(batch_size):
                *inputs, target = (part[batch] for part in train)
                optimizer.zero_grad()
                (network(*inputs) - target).square().mean().backward()
                optimizer.step()
            network.eval()
            with torch.inference_mode():
                loss = float((network(*checked[:-1]) - checked[-1]).square().mean())
            waited += 1
            if loss < best:
                best, best_state, waited = loss, copy.deepcopy(network.state_dict()), 0
            if waited >= patience:
                break
    network.load_state_dict(best_state)
    network.eval()
    return best


class _UniRepLKNet(Forecaster):
    """UniRepLKNet's path for time series: a window of values as an image, all steps at once (arXiv 2311.15599, 3.3).

    Of the options, ``length`` is that of the window and ``dim`` the width of the embedding: their product is a square.
    """

    refits = False

    @property
    def reach(self) -> int:
        return int(self.options.get("length", 32))

    def fit(self, values: Array, calendar: Array, cut: int) -> None:
        options = {"length": 32, "dim": 32, "epochs": 30, "patience": 5, **self.options}
        length, dim = options.pop("length"), options.pop("dim")
        how = {name: options.pop(name) for name in ("epochs", "batch_size", "patience", "lr") if name in options}
        if cut < length + self.horizon + 8:
            raise DataError(f"unireplknet needs {length + self.horizon + 8} training points, got {cut}")
        encoder = {"depths": (1, 1, 1, 1), "dims": (8, 16, 32, dim), "kernel_sizes": ((3,),) * 4, "drop_path": 0.0}
        config = {"network": encoder, "tree": (1,), "node_series": 1, "length": length, "label_length": length // 2}
        config |= {"horizon": self.horizon, "dim": dim, "num_heads": 4, "hidden_channels": 64, "num_layers": 1}
        config |= {"window": 7, "time_features": max(1, calendar.shape[1]), "dropout": 0.0}
        self.target = Scaler.fit(values[:cut])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.network: Any = create_model("unireplknet_s_weather", **{**config, **options})
        series = self.target.apply(values)
        last = len(series) - self.horizon
        train = self._windows(series, calendar, np.arange(length, cut - self.horizon + 1))
        validation = self._windows(series, calendar, np.arange(cut, last + 1) if cut <= last else np.arange(0))
        _train(self.network, train, validation, self.seed, **how)

    def _windows(self, series: Array, calendar: Array, origins: Index, targets: bool = True) -> tuple[Tensor, ...]:
        """Known values, their times, the times to come and, where wanted, the values to come."""
        times = calendar if calendar.shape[1] else np.zeros((len(calendar), 1))
        past, future = origins[:, None] - self.reach + np.arange(self.reach), origins[:, None] + np.arange(self.horizon)
        parts = [series[past][..., None], times[past], times[future]]
        parts += [series[future][..., None]] if targets else []
        return tuple(torch.from_numpy(part).float() for part in parts)

    @torch.inference_mode()
    def rolling(self, values: Array, calendar: Array, origins: Index) -> Array:
        inputs = self._windows(self.target.apply(values), calendar, origins, targets=False)
        parts = [self.network(*(part[rows] for part in inputs)) for rows in torch.arange(len(origins)).split(256)]
        return self.target.inverse(torch.cat(parts)[..., 0].double().numpy())


def _regression(regressor: str) -> type[Forecaster]:
    return type(f"_{regressor.upper()}", (_Regression,), {"name": regressor, "refits": regressor != "gmdh"})


def _network(name: str) -> type[Forecaster]:
    return type(f"_{name.title()}", (_Network,), {"model": name})


#: Every model by name.
MODELS: dict[str, type[Forecaster]] = {
    "naive": type("_Last", (_Naive,), {}),
    "seasonal_naive": _Naive,
    "arima": _Arima,
    **{name: _regression(name) for name in GRIDS},
    **{name: _network(f"forecast_{name}") for name in ("lstm", "cnn", "cnn_lstm")},
    "unireplknet": _UniRepLKNet,
}


def make_forecaster(
    name: str,
    features: StateSpaceFeatures,
    *,
    horizon: int = 1,
    period: int = 7,
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
    return MODELS[name](features, horizon, 1 if name == "naive" else period, seed, dict(options or {}))
