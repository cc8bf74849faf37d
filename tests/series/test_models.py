"""The table, the regressors and every model of one series."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from convatlas.data.time_series import cash_demand
from convatlas.errors import DataError, UnknownName
from convatlas.networks.registry import create_model
from convatlas.series.models import MODELS
from convatlas.series.pipeline import ForecastPipeline
from convatlas.series.regressors import GMDHRegressor, GRNNRegressor, make_regressor
from convatlas.series.state_space import (
    StateSpaceFeatures,
    calendar_features,
    clean,
    natural_calendar,
    one_hot,
    weekdays,
)
from convatlas.training.measure import count_parameters

DATA = cash_demand(1, 160)
TIMES, VALUES = DATA.one(0)
QUICK = {
    "arima": {"order": [1, 0, 0]},
    "rf": {"n_estimators": 10},
    "lstm": {"epochs": 3},
    "cnn": {"epochs": 3},
    "cnn_lstm": {"epochs": 3},
    "unireplknet": {"epochs": 1, "length": 8, "dim": 32},
}


def test_row_holds_the_past_and_the_weekday_of_the_target():
    x, y = StateSpaceFeatures(tau=2, m=3).table(VALUES, one_hot(weekdays(TIMES), 7))
    assert len(x) == len(y) == len(VALUES) - (3 - 1) * 2 - 1
    np.testing.assert_array_equal(x[4, :3], VALUES[[8, 6, 4]])
    assert y[4] == VALUES[9]
    assert x[4, 3:].argmax() == 9 % 7


def test_calendar_is_that_of_the_date():
    dates = np.array(["2026-11-27", "2026-12-01"], dtype="datetime64[s]")
    features = calendar_features(dates, ("dow", "month", "month_start", "holidays"), ["2026-12-01"])
    assert features[0].nonzero()[0].tolist() == [4, 7 + 10]  # a Friday
    assert features[1].nonzero()[0].tolist() == [1, 7 + 11, 19, 20]
    hours = calendar_features(np.array(["2026-11-27T23:10"], dtype="datetime64[s]"), ("hour",))
    assert hours.nonzero()[1].tolist() == [23]


@pytest.mark.parametrize(
    ("step", "kinds"),
    [
        ("1 D", ("dow",)),
        ("1 B", ("dow",)),
        ("900 s", ("dow", "hour")),
        ("7 D", ("month",)),
        ("1 ME", ("month",)),
        ("12 ME", ()),
        ("1 Y", ()),
    ],
)
def test_the_calendar_suits_the_step(step, kinds):
    assert natural_calendar(step) == kinds


def test_gaps_are_filled_from_the_past_alone():
    values = np.arange(40.0) + 1
    values[[30, 35]] = np.nan, 0
    cleaned = clean(values)
    assert cleaned.filled.tolist() == [30, 35]
    assert cleaned.values[30] == np.mean([3, 10, 17, 24])
    values[36:] = 999
    assert clean(values).values[30] == cleaned.values[30]
    assert clean(values, zeros="keep").values[35] == 0


def test_grnn_lies_between_the_nearest_value_and_the_mean():
    x, y = np.random.default_rng(0).standard_normal((40, 3)), np.arange(40.0)
    np.testing.assert_allclose(GRNNRegressor(1e-4).fit(x, y).predict(x + 1e-3), y)
    np.testing.assert_allclose(GRNNRegressor(1e5).fit(x, y).predict(x), y.mean())
    assert 0.05 <= GRNNRegressor().fit(x, x[:, 0]).sigma_ < 2


def test_gmdh_finds_a_quadratic_of_two_inputs():
    x = np.random.default_rng(0).standard_normal((120, 4))
    y = 1 + x[:, 1] - 2 * x[:, 1] * x[:, 3] + 0.5 * x[:, 3] ** 2
    model = GMDHRegressor().fit(x, y)
    assert model.criteria_[0][0] < 1e-20
    np.testing.assert_allclose(model.predict(x), y, atol=1e-8)


@pytest.mark.parametrize(("name", "count"), [("lstm", 5409), ("cnn", 16293), ("cnn_lstm", 13665)])
def test_parameters_of_the_networks(name, count):
    assert count_parameters(create_model(f"forecast_{name}")) == count


@pytest.mark.parametrize("model", MODELS)
def test_every_model_forecasts_from_the_past_and_comes_back(model):
    if model == "arima":
        pytest.importorskip("statsmodels")
    how = {"horizon": 3, "tau": 1, "m": 4, "options": QUICK.get(model)}
    pipeline = ForecastPipeline(model, **how).fit(VALUES[:120], TIMES[:120])
    forecast, actual = pipeline.rolling(VALUES, TIMES, 120, 7)
    assert forecast.shape == actual.shape == (6, 3)
    np.testing.assert_array_equal(actual[1], VALUES[127:130])
    changed = VALUES.copy()
    changed[127:] += 50  # what comes after the second origin cannot change its forecast
    np.testing.assert_allclose(pipeline.rolling(changed, TIMES, 120, 7)[0][:2], forecast[:2], rtol=1e-6)
    foretold = pipeline.predict(series=VALUES[:120], dates=TIMES[:120])
    np.testing.assert_allclose(foretold.values, forecast[0], rtol=1e-6)
    assert (foretold.low <= foretold.high).all()
    np.testing.assert_array_equal(foretold.times, TIMES[120:123])
    again = ForecastPipeline.restore(pipeline.described(), pipeline.tensors())
    np.testing.assert_allclose(again.rolling(VALUES, TIMES, 120, 7)[0], forecast, rtol=1e-6)


def test_the_grid_is_searched_on_the_validation_part():
    pipeline = ForecastPipeline("grnn", tau=1, m=4, options={"tune": True}).fit(VALUES, TIMES)
    assert 0.05 <= pipeline.options["sigma"] <= 5


def test_what_cannot_be_forecast_is_refused():
    with pytest.raises(UnknownName, match="did you mean grnn"):
        ForecastPipeline("grn")
    with pytest.raises(DataError, match="dates must grow"):
        ForecastPipeline("rf").fit(VALUES, TIMES[::-1])
    with pytest.raises(DataError, match="one date for each value"):
        ForecastPipeline("rf").fit(VALUES, TIMES[1:])
    with pytest.raises(DataError, match="need at least"):
        ForecastPipeline("svr", m=4, tau=1).fit(VALUES[:20], TIMES[:20])
    with pytest.raises(ValueError, match="rows must be"):
        create_model("forecast_cnn")(torch.zeros(2, 3))
    with pytest.raises(UnknownName, match="regressor"):
        make_regressor("forest")
    with pytest.warns(RuntimeWarning, match="1 values are negative"):
        clean([1.0, -2.0, 3.0])
