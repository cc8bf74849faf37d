"""ARIMA with the calendar: orders by AIC, forecasts of many steps from any number of origins by one filter pass.

Models and their fit are those of statsmodels. The parameters stay fixed while origins roll: to fit them again at each
step is slow and changes what is compared.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from convatlas.errors import DataError, require
from convatlas.series.forecaster import Array, Forecaster, Index

__all__ = ["ArimaForecaster"]

Order = tuple[int, int, int]

#: Values, the last ones, on which orders are compared: a fit takes a time that grows with them, and there are 36.
_COMPARED = 2000
#: Values before an origin that the filter runs over at most: it has forgotten what came before.
_FILTERED = 20_000


class ArimaForecaster(Forecaster):
    """Orders by AIC over p, q up to 5, differences by the augmented Dickey-Fuller test.

    Of the options, ``order`` sets (p, d, q), ``max_order`` the largest p and q.
    """

    @property
    def reach(self) -> int:
        """One value: the filter starts from the model's own mean."""
        return 1

    @property
    def memory(self) -> int:
        """So many values that the filter has forgotten what came before."""
        return _FILTERED

    def fit(self, values: Array, calendar: Array, cut: int) -> None:
        """Choose the order where none is given, and fit the parameters."""
        if left := set(self.options) - {"order", "max_order"}:
            raise TypeError(f"arima takes the options order and max_order, got {', '.join(sorted(left))}")
        values, calendar = values[:cut], calendar[:cut]
        # One column of a one-hot calendar is the sum of the others: the constant stands for it.
        self.columns = [c for c in range(calendar.shape[1]) if np.ptp(calendar[:, c]) > 0]
        ones = np.ones((len(calendar), 1))
        while self.columns and np.linalg.matrix_rank(np.c_[ones, calendar[:, self.columns]]) <= len(self.columns):
            self.columns = self.columns[1:]
        if "order" not in self.options:
            self.options["order"] = list(self._order(values[-_COMPARED:], calendar[-_COMPARED:]))
        p, d, q = self.options["order"]
        try:
            self.fitted = self._fitted(values, calendar, (p, d, q))
        except (np.linalg.LinAlgError, ValueError) as error:
            raise DataError(f"ARIMA{(p, d, q)} cannot be fitted: {error}") from None

    def _order(self, values: Array, calendar: Array) -> Order:
        largest, found = int(self.options.get("max_order", 5)), {}
        differences = _differences(values)
        for order in [(p, differences, q) for p in range(largest + 1) for q in range(largest + 1)]:
            try:
                found[order] = float(self._fitted(values, calendar, order).aic)
            except (np.linalg.LinAlgError, ValueError):
                continue
        if not found:
            raise DataError(f"no ARIMA up to order {largest} can be fitted to the series")
        return min(found, key=lambda order: found[order])

    def _fitted(self, values: Array, calendar: Array, order: Order) -> Any:
        model = require("statsmodels.tsa.arima.model", extra="series", purpose="ARIMA").ARIMA
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # orders that do not converge lose by their AIC
            return model(values, self._exogenous(calendar), order=order, trend="n" if order[1] else "c").fit()

    def _exogenous(self, calendar: Array) -> Array | None:
        return calendar[:, self.columns] if self.columns else None

    def rolling(self, values: Array, calendar: Array, origins: Index) -> Array:
        """Forecasts (origins, horizon): the state before each origin is carried on by the transition."""
        known = min(int(origins.max()), len(values))
        exogenous = self._exogenous(calendar)
        applied = self.fitted.apply(values[:known], None if exogenous is None else exogenous[:known])
        space = applied.filter_results
        state = space.predicted_state[:, origins]
        transition, design = space.transition[..., 0], space.design[0, :, 0]
        level = self._level(calendar)
        steps = []
        for ahead in range(self.horizon):
            steps.append(design @ state + level[origins + ahead])
            state = transition @ state
        return np.stack(steps, 1)

    def _level(self, calendar: Array) -> Array:
        """What the constant and the calendar add at each time (n)."""
        constant = int(self.options["order"][1] == 0)
        weights: npt.NDArray[np.float64] = np.asarray(self.fitted.params)[: constant + len(self.columns)]
        return weights[:constant].sum() + calendar[:, self.columns] @ weights[constant:]


def _differences(values: Array) -> int:
    """How often a series is differenced until the augmented Dickey-Fuller test finds no unit root, at most twice."""
    tools = require("statsmodels.tsa.stattools", extra="series", purpose="ARIMA")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the form of the result changes: its second entry does not
        unit_root = [tools.adfuller(np.diff(values, count))[1] > 0.05 for count in (0, 1)]
    return 0 if not unit_root[0] else 2 if unit_root[1] else 1
