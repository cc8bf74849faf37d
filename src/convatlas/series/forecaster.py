"""What a model of one series is, and the template of those on a table of lags: forecasts of many steps, two ways.

Vangala, Ravi: "ATM Cash demand forecasting in an Indian Bank with chaos and deep learning", arXiv 2008.10365.

Every model learns from values and calendar features, and answers rolling origins: for each origin it sees all true
values before it and foretells the next ``horizon``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import nn

from convatlas.series.state_space import Scaler, StateSpaceFeatures

__all__ = ["Forecaster", "Rows", "TableForecaster"]

Array = npt.NDArray[np.float64]
Index = npt.NDArray[np.int64]
#: Standardised rows (n, m + features) and targets (n).
Rows = tuple[Array, Array]


class Forecaster(ABC):
    """A model of one series.

    Args:
        name: of the model.
        features: lags that the model sees, where it sees a table.
        horizon: steps that are asked for at most.
        period: length of the season.
        direct: whether a model on a table foretells each step by a regression of its own.
        seed: of all randomness.
        options: of the model itself; what is chosen in `fit` stands in them afterwards.
    """

    #: Whether it sees lags, and so needs to know which.
    lagged: ClassVar[bool] = False

    def __init__(
        self,
        name: str,
        features: StateSpaceFeatures,
        *,
        horizon: int,
        period: int,
        direct: bool,
        seed: int,
        options: Mapping[str, Any],
    ) -> None:
        self.name, self.features, self.horizon, self.period = name, features, horizon, period
        self.direct, self.seed, self.options = direct, seed, dict(options)

    @property
    def reach(self) -> int:
        """How many values an origin must have before it."""
        return self.features.reach

    @property
    def memory(self) -> int:
        """How many values before an origin are looked at, at most."""
        return self.reach

    @property
    def refits(self) -> bool:
        """Whether the model is fitted once more on all known values after the validation part has served."""
        return True

    @property
    def networks(self) -> list[nn.Module]:
        """Its networks, whose weights are saved; a model without any is fitted again when it is read."""
        return []

    @abstractmethod
    def fit(self, values: Array, calendar: Array, cut: int) -> None:
        """Learn from the values (n) and calendar (n, features) before ``cut``; the others serve for validation."""

    @abstractmethod
    def rolling(self, values: Array, calendar: Array, origins: Index) -> Array:
        """Forecasts (origins, horizon); the calendar reaches ``horizon`` beyond the last origin."""


class _Step(NamedTuple):
    """What foretells one step: the scales of its lags and of its target, and a model of standardised rows."""

    lags: Scaler
    target: Scaler
    model: Any


class TableForecaster(Forecaster):
    """A model of rows of lags and calendar.

    Recursive forecasts put forecasts where true values are not known yet; direct ones have a regression for each step,
    from the same lags to the target so many steps later.
    """

    lagged: ClassVar[bool] = True

    def fit(self, values: Array, calendar: Array, cut: int) -> None:
        """Learn one step, or each step of direct forecasts."""
        self.steps = [
            self._learned(values, calendar, cut, ahead) for ahead in range(self.horizon if self.direct else 1)
        ]

    def _learned(self, values: Array, calendar: Array, cut: int, ahead: int) -> _Step:
        x, y = self.features.table(values, calendar, ahead)
        m, rows = self.features.m, cut - self.features.reach - ahead
        lags, target = Scaler.fit(x[:rows, :m]), Scaler.fit(y[:rows])
        z, goal = self._standard(x, lags), target.apply(y)
        return _Step(lags, target, self.learn((z[:rows], goal[:rows]), (z[rows:], goal[rows:]), target))

    def _standard(self, rows: Array, lags: Scaler) -> Array:
        m = self.features.m
        return np.concatenate([lags.apply(rows[:, :m]), rows[:, m:]], 1)

    @abstractmethod
    def learn(self, train: Rows, validation: Rows, target: Scaler) -> Any:
        """A model that was fitted to standardised rows; ``target`` gives values in their own unit."""

    @abstractmethod
    def apply(self, model: Any, rows: Array) -> Array:
        """Standardised targets (n) of standardised rows."""

    def rolling(self, values: Array, calendar: Array, origins: Index) -> Array:
        """Forecasts (origins, horizon), all origins at once."""
        reach = self.features.reach
        window = values[origins[:, None] - reach + np.arange(reach)]
        found = []
        for ahead in range(self.horizon):
            step = self.steps[ahead if self.direct else 0]
            lags = window[:, ::-1][:, : reach : self.features.tau][:, : self.features.m]
            rows = self._standard(np.concatenate([lags, calendar[origins + ahead]], 1), step.lags)
            found.append(step.target.inverse(self.apply(step.model, rows)))
            if not self.direct:
                window = np.concatenate([window[:, 1:], found[-1][:, None]], 1)
        return np.stack(found, 1)
