"""From one series with its dates to forecasts with intervals: chaos test, features, model, residuals.

Vangala, Ravi: "ATM Cash demand forecasting in an Indian Bank with chaos and deep learning", arXiv 2008.10365. All that
is estimated (delay, dimension, exponent, scales, widths) comes from the values that `ForecastPipeline.fit` is given.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from convatlas.data.time_series import next_times
from convatlas.errors import CheckpointError, DataError, unknown
from convatlas.series.chaos import ChaosAnalysis, analyse_chaos, check_series
from convatlas.series.models import MODELS, make_forecaster
from convatlas.series.state_space import Calendar, StateSpaceFeatures, calendar_features, clean

__all__ = ["Embedding", "ForecastPipeline", "Prediction"]

Array = npt.NDArray[np.float64]
Times = npt.NDArray[np.datetime64]
Embedding = Literal["auto", "chaos", "lags", "none"]


class Prediction(NamedTuple):
    """Forecasts (n) at times (n), and the bounds between which a value lies with the pipeline's level."""

    times: Times
    values: Array
    low: Array
    high: Array


class ForecastPipeline:
    """Forecasts of one series by one model.

    Args:
        model: one of `convatlas.series.models.MODELS`.
        horizon: steps ahead; beyond 1 the models on tables use their own forecasts as lags.
        period: length of the season.
        calendar: features of the target's time, of `calendar_features`.
        holidays: days, for the feature ``holidays``.
        embedding: which lags: those of the state space if the series is found chaotic and plain ones by AIC if not
            (``auto``), always the state space (``chaos``), always plain ones (``lags``), or the last value (``none``).
        tau, m: delay and number of lags, instead of what is found.
        zeros: whether zeros are ``impute``-d like missing values, or ``keep``-t.
        val_fraction: share of the values, the last ones, for early stopping, selection and the intervals.
        level: share of the values that should lie in their interval.
        seed: of all randomness.
        options: of the model.

    Raises:
        UnknownName: there is no such model, embedding or feature.
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        model: str = "rf",
        *,
        horizon: int = 1,
        period: int = 7,
        calendar: Sequence[Calendar] = ("dow",),
        holidays: Sequence[str] = (),
        embedding: Embedding = "auto",
        tau: int | None = None,
        m: int | None = None,
        zeros: Literal["impute", "keep"] = "impute",
        val_fraction: float = 0.2,
        level: float = 0.9,
        seed: int = 0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if model not in MODELS:
            raise unknown("forecasting model", model, MODELS)
        if embedding not in get_args(Embedding):
            raise unknown("embedding", str(embedding), get_args(Embedding))
        for kind in calendar:
            if kind not in get_args(Calendar):
                raise unknown("calendar feature", str(kind), get_args(Calendar))
        for name, share in (("val_fraction", val_fraction), ("level", level)):
            if not 0 < share < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {share}")
        numbers = {"horizon": horizon, "period": period, "tau": tau, "m": m}
        for name, number in numbers.items():
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        self.model, self.horizon, self.period, self.seed = model, horizon, period, seed
        self.calendar, self.holidays, self.embedding = tuple(calendar), tuple(holidays), embedding
        self.tau, self.m, self.zeros, self.val_fraction, self.level = tau, m, zeros, val_fraction, level
        self.options = dict(options or {})
        self.analysis: ChaosAnalysis | None = None

    # -- fit and use ---------------------------------------------------------------------------------------------------

    def fit(self, series: npt.ArrayLike, dates: npt.ArrayLike, step: str = "1 D") -> Self:
        """Learn from values (n) at dates (n) that are ``step`` apart; missing values are NaN.

        Raises:
            DataError: the series cannot be used: too short, constant, dates out of order or of another number.
        """
        self.step = step
        self.values, self.times = self._cleaned(series, dates)
        self.features = self._lags()
        self.forecaster = self._fitted()
        return self

    def _fitted(self, **changes: Any) -> Any:
        values, calendar = self.values, self._calendar(self.times)
        cut = len(values) - max(self.horizon, round(self.val_fraction * len(values)))
        forecaster = self._forecaster(**changes)
        if cut < forecaster.reach + 8:
            raise DataError(f"the series is too short: {len(values)} points leave {cut} to learn from")
        if forecaster.refits and not self.options.get("tune"):
            forecaster.fit(values[:cut], calendar[:cut], cut)
        else:
            forecaster.fit(values, calendar, cut)
        origins = np.arange(cut, len(values) - self.horizon + 1)
        targets = values[origins[:, None] + np.arange(self.horizon)]
        self.residuals: Array = targets - forecaster.rolling(values, calendar, origins)
        self.options = dict(forecaster.options)
        if forecaster.refits:
            forecaster = self._forecaster(**changes)
            forecaster.fit(values, calendar, len(values))
        return forecaster

    def rolling(self, series: npt.ArrayLike, dates: npt.ArrayLike, first: int, stride: int = 1) -> tuple[Array, Array]:
        """Forecasts from rolling origins, each from all true values before it, and the true values, (origins, horizon).

        Args:
            series, dates: values and dates (n), known ones included.
            first: position of the first origin.
            stride: positions from one origin to the next.
        """
        values, times = self._cleaned(series, dates)
        origins = np.arange(first, len(values) - self.horizon + 1, stride)
        if first < self.forecaster.reach or not len(origins):
            raise DataError(
                f"no origin from position {first} on has {self.forecaster.reach} values before it and {self.horizon} "
                f"after it in a series of {len(values)}"
            )
        forecast = self.forecaster.rolling(values, self._calendar(times), origins)
        return forecast, values[origins[:, None] + np.arange(self.horizon)]

    def predict(
        self, h: int | None = None, *, series: npt.ArrayLike | None = None, dates: npt.ArrayLike | None = None
    ) -> Prediction:
        """The next ``h`` values, at most ``horizon``, after the training series or after another history of it."""
        steps = self.horizon if h is None else h
        if not 1 <= steps <= self.horizon:
            raise ValueError(f"h must be from 1 to the horizon {self.horizon}, got {h}")
        values, times = (self.values, self.times) if series is None else self._cleaned(series, dates)
        if len(values) < self.forecaster.reach:
            raise DataError(f"a forecast needs the last {self.forecaster.reach} values, got {len(values)}")
        future = next_times(times[-1], self.step, self.horizon)
        calendar = self._calendar(np.concatenate([times, future]))
        forecast = self.forecaster.rolling(values, calendar, np.array([len(values)]))[0]
        low, high = self.interval(forecast)
        return Prediction(future[:steps], forecast[:steps], low[:steps], high[:steps])

    def interval(self, forecast: Array) -> tuple[Array, Array]:
        """Bounds of forecasts (..., horizon): quantiles of the errors on the validation part, step by step."""
        tail = (1 - self.level) / 2
        return forecast + self.quantile(tail), forecast + self.quantile(1 - tail)

    def quantile(self, share: float) -> Array:
        """Quantile (horizon) of the errors: forecast + quantile(0.95) is the stock that meets 95 % of the days."""
        if not 0 <= share <= 1:
            raise ValueError(f"share must be from 0 to 1, got {share}")
        count = len(self.residuals)
        # Of n errors the (n + 1)-th share: the next value is one more of their kind.
        place = min(1.0, max(0.0, (share * (count + 1) - 1) / max(count - 1, 1)))
        return np.quantile(self.residuals, place, axis=0)

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _forecaster(self, **changes: Any) -> Any:
        options = {**self.options, **changes}
        common: dict[str, Any] = {"horizon": self.horizon, "period": self.period, "seed": self.seed}
        return make_forecaster(self.model, self.features, options=options, **common)

    def _cleaned(self, series: npt.ArrayLike, dates: npt.ArrayLike | None) -> tuple[Array, Times]:
        times = np.asarray(dates, dtype="datetime64[s]")
        given = np.asarray(series, np.float64)
        if times.ndim != 1 or times.shape != given.shape:
            raise DataError(f"there must be one date for each value, got {times.shape} for {given.shape}")
        if (np.diff(times) <= np.timedelta64(0, "s")).any():
            raise DataError("dates must grow: some come twice or are not in order")
        return clean(given, period=self.period, zeros=self.zeros).values, times

    def _calendar(self, times: Times) -> Array:
        return calendar_features(times, self.calendar, self.holidays)

    def _lags(self) -> StateSpaceFeatures:
        series = check_series(self.values)
        if self.embedding == "none" or MODELS[self.model].__name__ in ("_Naive", "_Last", "_Arima"):
            return StateSpaceFeatures()
        if self.tau is None or self.m is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # the notes stand in the analysis
                self.analysis = analyse_chaos(series, tau=self.tau, dim=self.m)
            chaos = self.embedding == "chaos" or (self.embedding == "auto" and self.analysis.chaotic)
            found = (self.analysis.tau, self.analysis.dim) if chaos else (1, self.analysis.lags)
        else:
            found = (self.tau, self.m)
        return StateSpaceFeatures(self.tau or found[0], self.m or found[1])

    # -- save and load -------------------------------------------------------------------------------------------------

    def described(self) -> dict[str, Any]:
        """What `restore` needs beside the tensors, as plain data."""
        names = ("model", "horizon", "period", "calendar", "holidays", "embedding", "zeros", "val_fraction", "level")
        held = {name: getattr(self, name) for name in (*names, "seed", "options")}
        return {**held, "tau": self.features.tau, "m": self.features.m, "step": self.step}

    def tensors(self) -> dict[str, Tensor]:
        """The training series, and the weights of a network under ``network.``; other models are fitted again."""
        held = {"values": torch.from_numpy(self.values), "times": torch.from_numpy(self.times.astype(np.int64))}
        held["residuals"] = torch.from_numpy(np.ascontiguousarray(self.residuals))
        network = getattr(self.forecaster, "network", None)
        weights = network.state_dict() if network is not None else {}
        return held | {f"network.{name}": tensor for name, tensor in weights.items()}

    @classmethod
    def restore(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ForecastPipeline:
        """The pipeline that `described` and `tensors` came from: models without weights are fitted again, by seed.

        Raises:
            CheckpointError: the parts do not belong together.
        """
        settings = {name: value for name, value in described.items() if name != "step"}
        try:
            pipeline = cls(**settings)
            pipeline.step = described["step"]
            pipeline.values = tensors["values"].double().numpy()
            pipeline.times = tensors["times"].numpy().astype("datetime64[s]")
            pipeline.features = StateSpaceFeatures(settings["tau"], settings["m"])
            weights = {name[8:]: tensor for name, tensor in tensors.items() if name.startswith("network.")}
            pipeline.forecaster = pipeline._fitted(**({"epochs": 0} if weights else {}))
            pipeline.options = dict(described["options"])
            if weights:
                pipeline.forecaster.network.load_state_dict(weights)
            pipeline.residuals = tensors["residuals"].double().numpy()
        except (KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"this is no saved forecasting pipeline: {error}") from None
        return pipeline
