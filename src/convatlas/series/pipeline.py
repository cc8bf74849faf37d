"""From one series with its dates to forecasts with intervals: chaos test, features, model, residuals.

Vangala, Ravi: "ATM Cash demand forecasting in an Indian Bank with chaos and deep learning", arXiv 2008.10365. All that
is estimated (delay, dimension, exponent, scales, widths) comes from the values that `ForecastPipeline.fit` is given.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self, cast, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from convatlas.data.time_series import next_times
from convatlas.errors import CheckpointError, DataError, unknown
from convatlas.series.chaos import ChaosAnalysis, analyse_chaos, check_series
from convatlas.series.forecaster import Forecaster
from convatlas.series.models import MODELS, make_forecaster
from convatlas.series.neural import NetworkFit, NetworkForecaster, train_networks
from convatlas.series.state_space import Calendar, StateSpaceFeatures, calendar_features, clean
from convatlas.training.progress import progress

__all__ = ["Embedding", "ForecastPipeline", "MultiStep", "Prediction", "fit_all"]

Array = npt.NDArray[np.float64]
Times = npt.NDArray[np.datetime64]
Embedding = Literal["auto", "chaos", "lags", "none"]
MultiStep = Literal["recursive", "direct"]

#: Plain lags that are tried at least, and season up to which they reach back over it.
_ORDER, _LONGEST_SEASON = 14, 60
#: Positions of a series that are answered at once: memory does not grow with its length.
_BLOCK = 20_000


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
        horizon: steps ahead.
        multi_step: how models on a table of lags foretell more than one step: ``recursive``, with forecasts in the
            place of values that are not known yet, or ``direct``, by a model for each step. The other models have one
            way of their own.
        period: length of the season.
        calendar: features of the target's time, of `calendar_features`.
        holidays: days, for the feature ``holidays``.
        embedding: which lags: those of the state space if the series is found chaotic and plain ones by AIC if not
            (``auto``), always the state space (``chaos``), always plain ones (``lags``), or the last value (``none``).
        tau, m: delay and number of lags, instead of what is found.
        zeros: whether zeros are ``impute``-d like missing values, or ``keep``-t.
        max_points: of a longer series the last values are learned from, so that time and memory are bounded.
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
        multi_step: MultiStep = "recursive",
        period: int = 7,
        calendar: Sequence[Calendar] = ("dow",),
        holidays: Sequence[str] = (),
        embedding: Embedding = "auto",
        tau: int | None = None,
        m: int | None = None,
        zeros: Literal["impute", "keep"] = "impute",
        max_points: int = 10_000,
        val_fraction: float = 0.2,
        level: float = 0.9,
        seed: int = 0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if model not in MODELS:
            raise unknown("forecasting model", model, MODELS)
        if embedding not in get_args(Embedding):
            raise unknown("embedding", str(embedding), get_args(Embedding))
        if multi_step not in get_args(MultiStep):
            raise unknown("multi_step", str(multi_step), get_args(MultiStep))
        for kind in calendar:
            if kind not in get_args(Calendar):
                raise unknown("calendar feature", str(kind), get_args(Calendar))
        for name, share in (("val_fraction", val_fraction), ("level", level)):
            if not 0 < share < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {share}")
        numbers = {"horizon": horizon, "period": period, "tau": tau, "m": m, "max_points": max_points}
        for name, number in numbers.items():
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        self.model, self.horizon, self.multi_step, self.period, self.seed = model, horizon, multi_step, period, seed
        self.calendar, self.holidays, self.embedding = tuple(calendar), tuple(holidays), embedding
        self.tau, self.m, self.zeros, self.max_points = tau, m, zeros, max_points
        self.val_fraction, self.level = val_fraction, level
        self.options = dict(options or {})
        self.analysis: ChaosAnalysis | None = None

    # -- fit and use ---------------------------------------------------------------------------------------------------

    def fit(self, series: npt.ArrayLike, dates: npt.ArrayLike, step: str = "1 D") -> Self:
        """Learn from values (n) at dates (n) that are ``step`` apart; missing values are NaN.

        Raises:
            DataError: the series cannot be used: too short, constant, dates out of order or of another number.
        """
        self._read(series, dates, step)
        self.forecaster.fit(self.values, self._calendar(self.times), self._cut)
        return self._finish()

    def _read(self, series: npt.ArrayLike, dates: npt.ArrayLike, step: str) -> None:
        """The first part of `fit`: clean the series and find its lags."""
        self.step = step
        values, times, filled = self._cleaned(series, dates)
        last = slice(max(0, len(values) - self.max_points), None)
        self.values, self.times, self._filled = values[last], times[last], filled[last]
        self.features = self._lags()
        self.forecaster = self._forecaster()
        if self._cut < self.forecaster.reach + 8:
            raise DataError(f"the series is too short: {len(self.values)} points leave {self._cut} to learn from")

    def _prepare(self, series: npt.ArrayLike, dates: npt.ArrayLike, step: str) -> list[NetworkFit]:
        """The first part of `fit` of a model of small networks: what is to be trained before `_finish`."""
        self._read(series, dates, step)
        forecaster = cast(NetworkForecaster, self.forecaster)
        return forecaster.prepare(self.values, self._calendar(self.times), self._cut)

    def _finish(self) -> Self:
        """The last part of `fit`: errors of the validation part for the intervals, then a fit to all values."""
        origins = np.arange(self._cut, len(self.values) - self.horizon + 1)
        forecasts = self._forecasts(self.values, self.times, origins)
        self.residuals: Array = _ahead(self.values, self._filled, origins, self.horizon) - forecasts
        if np.isnan(self.residuals).all(0).any():
            raise DataError(f"none of the last {len(self.values) - self._cut} values is known: there are no intervals")
        self.options = dict(self.forecaster.options)
        if self.forecaster.refits:
            self._refit()
        return self

    def _refit(self) -> None:
        self.forecaster = self._forecaster()
        self.forecaster.fit(self.values, self._calendar(self.times), len(self.values))

    @property
    def _cut(self) -> int:
        """Where the validation part begins."""
        return len(self.values) - max(self.horizon, round(self.val_fraction * len(self.values)))

    def rolling(self, series: npt.ArrayLike, dates: npt.ArrayLike, first: int, stride: int = 1) -> tuple[Array, Array]:
        """Forecasts from rolling origins, each from all values before it, and the true values, (origins, horizon).

        A true value that is missing is NaN, as it is to be left out of all measures; later origins see it filled.

        Args:
            series, dates: values and dates (n), known ones included.
            first: position of the first origin.
            stride: positions from one origin to the next.
        """
        values, times, filled = self._cleaned(series, dates)
        origins = np.arange(first, len(values) - self.horizon + 1, stride)
        if first < self.forecaster.reach or not len(origins):
            raise DataError(
                f"no origin from position {first} on has {self.forecaster.reach} values before it and {self.horizon} "
                f"after it in a series of {len(values)}"
            )
        return self._forecasts(values, times, origins), _ahead(values, filled, origins, self.horizon)

    def naive(
        self, name: str, series: npt.ArrayLike, dates: npt.ArrayLike, first: int, stride: int = 1
    ) -> npt.NDArray[np.float64]:
        """The like of `rolling` by ``naive`` or ``seasonal_naive``, for comparison."""
        values = self._cleaned(series, dates)[0]
        forecaster = make_forecaster(name, self.features, horizon=self.horizon, period=self.period)
        if first < forecaster.reach:
            raise DataError(f"{first} values before the first origin are fewer than the season of {self.period}")
        origins = np.arange(first, len(values) - self.horizon + 1, stride)
        return forecaster.rolling(values, np.zeros((0, 0)), origins)

    def _forecasts(self, values: Array, times: Times, origins: npt.NDArray[np.int64]) -> Array:
        """Forecasts (origins, horizon), block by block; the times reach ``horizon`` beyond the last origin."""
        found = []
        for block in np.split(origins, np.flatnonzero(np.diff(origins // _BLOCK)) + 1):
            part = slice(max(0, int(block[0]) - self.forecaster.memory), int(block[-1]) + self.horizon)
            found.append(self.forecaster.rolling(values[part], self._calendar(times[part]), block - part.start))
        return np.concatenate(found)

    def predict(
        self, h: int | None = None, *, series: npt.ArrayLike | None = None, dates: npt.ArrayLike | None = None
    ) -> Prediction:
        """The next ``h`` values, at most ``horizon``, after the training series or after another history of it."""
        steps = self.horizon if h is None else h
        if not 1 <= steps <= self.horizon:
            raise ValueError(f"h must be from 1 to the horizon {self.horizon}, got {h}")
        values, times = (self.values, self.times) if series is None else self._cleaned(series, dates)[:2]
        if len(values) < self.forecaster.reach:
            raise DataError(f"a forecast needs the last {self.forecaster.reach} values, got {len(values)}")
        future = next_times(times[-1], self.step, self.horizon)
        forecast = self._forecasts(values, np.concatenate([times, future]), np.array([len(values)]))[0]
        low, high = self.interval(forecast)
        return Prediction(future[:steps], forecast[:steps], low[:steps], high[:steps])

    def interval(self, forecast: Array, level: float | None = None) -> tuple[Array, Array]:
        """Bounds of forecasts (..., horizon): quantiles of the errors on the validation part, step by step."""
        tail = (1 - (self.level if level is None else level)) / 2
        return forecast + self.quantile(tail), forecast + self.quantile(1 - tail)

    def quantile(self, share: float) -> Array:
        """Quantile (horizon) of the errors: forecast + quantile(0.95) is the stock that meets 95 % of the days."""
        if not 0 <= share <= 1:
            raise ValueError(f"share must be from 0 to 1, got {share}")
        found = np.empty(self.horizon)
        for step, errors in enumerate(self.residuals.T):
            known = errors[~np.isnan(errors)]
            # Of n errors the (n + 1)-th share: the next value is one more of their kind.
            place = (share * (len(known) + 1) - 1) / max(len(known) - 1, 1)
            found[step] = np.quantile(known, min(1.0, max(0.0, place)))
        return found

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _forecaster(self, **changes: Any) -> Forecaster:
        options = {**self.options, **changes}
        how = {"horizon": self.horizon, "period": self.period, "direct": self.multi_step == "direct", "seed": self.seed}
        return make_forecaster(self.model, self.features, options=options, **how)  # type: ignore[arg-type]

    def _cleaned(
        self, series: npt.ArrayLike, dates: npt.ArrayLike | None
    ) -> tuple[Array, Times, npt.NDArray[np.bool_]]:
        """Values without gaps, their times, and which of them were filled."""
        times = np.asarray(dates, dtype="datetime64[s]")
        given = np.asarray(series, np.float64)
        if times.ndim != 1 or times.shape != given.shape:
            raise DataError(f"there must be one date for each value, got {times.shape} for {given.shape}")
        if (np.diff(times) <= np.timedelta64(0, "s")).any():
            raise DataError("dates must grow: some come twice or are not in order")
        cleaned = clean(given, period=self.period, zeros=self.zeros)
        filled = np.zeros(len(given), np.bool_)
        filled[cleaned.filled] = True
        return cleaned.values, times, filled

    def _calendar(self, times: Times) -> Array:
        return calendar_features(times, self.calendar, self.holidays)

    def _lags(self) -> StateSpaceFeatures:
        series = check_series(self.values)
        if self.embedding == "none" or not MODELS[self.model].lagged:
            return StateSpaceFeatures()
        if self.tau is None or self.m is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # the notes stand in the analysis
                # Plain lags reach back over a season, unless it is a very long one.
                order = max(_ORDER, self.period + 1) if self.period <= _LONGEST_SEASON else _ORDER
                self.analysis = analyse_chaos(series, tau=self.tau, dim=self.m, max_order=order)
            chaos = self.embedding == "chaos" or (self.embedding == "auto" and self.analysis.chaotic)
            found = (self.analysis.tau, self.analysis.dim) if chaos else (1, self.analysis.lags)
        else:
            found = (self.tau, self.m)
        return StateSpaceFeatures(self.tau or found[0], self.m or found[1])

    # -- save and load -------------------------------------------------------------------------------------------------

    def described(self) -> dict[str, Any]:
        """What `restore` needs beside the tensors, as plain data."""
        analysis = None if self.analysis is None else self.analysis.as_plain()
        names = ("model", "horizon", "multi_step", "period", "calendar", "holidays", "embedding", "zeros", "max_points")
        held = {name: getattr(self, name) for name in (*names, "val_fraction", "level", "seed", "options")}
        return {**held, "tau": self.features.tau, "m": self.features.m, "step": self.step, "analysis": analysis}

    def tensors(self) -> dict[str, Tensor]:
        """The training series, and weights of networks under ``network.INDEX.``; other models are fitted again."""
        held = {"values": torch.from_numpy(self.values), "times": torch.from_numpy(self.times.astype(np.int64))}
        held["residuals"] = torch.from_numpy(np.ascontiguousarray(self.residuals))
        for index, network in enumerate(self.forecaster.networks):
            held |= {f"network.{index}.{name}": tensor for name, tensor in network.state_dict().items()}
        return held

    @classmethod
    def restore(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ForecastPipeline:
        """The pipeline that `described` and `tensors` came from: models without weights are fitted again, by seed.

        Raises:
            CheckpointError: the parts do not belong together.
        """
        settings = {name: value for name, value in described.items() if name not in ("step", "analysis")}
        try:
            pipeline = cls(**settings)
            pipeline.step = described["step"]
            if described["analysis"] is not None:
                pipeline.analysis = ChaosAnalysis.from_plain(described["analysis"])
            pipeline.values = tensors["values"].double().numpy()
            pipeline.times = tensors["times"].numpy().astype("datetime64[s]")
            pipeline.features = StateSpaceFeatures(settings["tau"], settings["m"])
            pipeline.residuals = tensors["residuals"].double().numpy()
            pipeline._restore_model(tensors)
        except (KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"this is no saved forecasting pipeline: {error}") from None
        return pipeline

    def _restore_model(self, tensors: Mapping[str, Tensor]) -> None:
        trained = any(name.startswith("network.") for name in tensors)
        self.forecaster = self._forecaster(**({"epochs": 0} if trained else {}))
        if self.forecaster.refits:
            self._refit()
            return
        self.forecaster.fit(self.values, self._calendar(self.times), self._cut)
        for index, network in enumerate(self.forecaster.networks):
            start = f"network.{index}."
            own = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
            network.load_state_dict(own)


def _ahead(values: Array, filled: npt.NDArray[np.bool_], origins: npt.NDArray[np.int64], horizon: int) -> Array:
    """The values (origins, horizon) from each origin on, NaN where they were filled."""
    places = origins[:, None] + np.arange(horizon)
    return np.where(filled[places], np.nan, values[places])


def fit_all(
    pipelines: Mapping[str, ForecastPipeline], data: Mapping[str, tuple[Array, Times]], step: str, jobs: int = 1
) -> dict[str, ForecastPipeline | DataError]:
    """Fit a pipeline to each of several series; small networks of one kind train as one, many times as fast.

    Args:
        pipelines: by the name of their series.
        data: values and dates by name.
        step: between the dates.
        jobs: processes that fit other models than networks.

    Returns:
        The fitted pipelines, and why a series cannot be used.
    """
    if all(MODELS[pipeline.model] is NetworkForecaster for pipeline in pipelines.values()):
        return _fit_networks(pipelines, data, step)
    from sklearn.utils.parallel import Parallel, delayed

    work = (delayed(_fitted)(pipeline, *data[name], step) for name, pipeline in pipelines.items())
    found = {}
    with progress("fitting", len(pipelines)) as advance:
        results = Parallel(n_jobs=jobs, return_as="generator")(work)
        for name, result in zip(pipelines, results, strict=True):
            found[name] = result
            advance()
    return found


def _fitted(pipeline: ForecastPipeline, values: Array, times: Times, step: str) -> ForecastPipeline | DataError:
    try:
        return pipeline.fit(values, times, step)
    except DataError as error:
        return error


def _fit_networks(
    pipelines: Mapping[str, ForecastPipeline], data: Mapping[str, tuple[Array, Times]], step: str
) -> dict[str, ForecastPipeline | DataError]:
    found: dict[str, ForecastPipeline | DataError] = {}
    fits: list[NetworkFit] = []
    for name, pipeline in pipelines.items():
        try:
            fits += pipeline._prepare(*data[name], step)
        except DataError as error:
            found[name] = error
    train_networks(fits)
    for name, pipeline in pipelines.items():
        if name not in found:
            try:
                found[name] = pipeline._finish()
            except DataError as error:
                found[name] = error
    return {name: found[name] for name in pipelines}
