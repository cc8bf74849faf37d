"""Forecasts of many origins by one pass of the filter, beside statsmodels origin by origin."""

from __future__ import annotations

import numpy as np
import pytest

from convatlas.data.time_series import cash_demand
from convatlas.errors import DataError
from convatlas.series.arima import ArimaForecaster
from convatlas.series.state_space import StateSpaceFeatures, calendar_features

pytest.importorskip("statsmodels")

DATA = cash_demand(1, 150)
TIMES, VALUES = DATA.one(0)


def forecaster(**options):
    how = {"horizon": 4, "period": 7, "direct": False, "seed": 0}
    return ArimaForecaster("arima", StateSpaceFeatures(), options=options, **how)


@pytest.mark.parametrize("order", [[1, 0, 1], [2, 1, 0], [0, 2, 1]])
@pytest.mark.parametrize("kinds", [("dow", "month_start"), ()])
def test_origins_equal_those_of_statsmodels(order, kinds):
    calendar = calendar_features(TIMES, kinds)
    model = forecaster(order=order)
    model.fit(VALUES, calendar, 120)
    origins = np.array([121, 122, 130, 146])
    found = model.rolling(VALUES, calendar, origins)
    for origin, steps in zip(origins, found, strict=True):
        known, ahead = (calendar[part][:, model.columns] for part in (slice(origin), slice(origin, origin + 4)))
        exogenous = {"exog": ahead} if kinds else {}
        applied = model.fitted.apply(VALUES[:origin], known if kinds else None)
        np.testing.assert_allclose(steps, applied.forecast(4, **exogenous), rtol=1e-6)
    # Times that have no value yet.
    np.testing.assert_allclose(model.rolling(VALUES[:146], calendar, origins), found, rtol=1e-9)


def test_the_order_is_chosen_once():
    walk = np.cumsum(np.random.default_rng(0).standard_normal(150))
    model = forecaster(max_order=1)
    model.fit(walk, calendar_features(TIMES, ()), 150)
    p, d, q = model.options["order"]
    assert d == 1
    assert max(p, q) <= 1
    again = forecaster(**model.options)
    again.fit(walk, calendar_features(TIMES, ()), 150)
    np.testing.assert_array_equal(again.fitted.params, model.fitted.params)


def test_options_and_failures_are_named():
    with pytest.raises(TypeError, match="takes the options order and max_order, got q"):
        forecaster(q=1).fit(VALUES, calendar_features(TIMES, ()), 120)
    with pytest.raises(DataError, match=r"ARIMA\(-1, 0, 0\) cannot be fitted"):
        forecaster(order=[-1, 0, 0]).fit(VALUES, calendar_features(TIMES, ()), 120)
