"""Direct and recursive forecasts, what is masked, long series block by block, intervals, many series at once."""

from __future__ import annotations

import numpy as np
import pytest

from convatlas.data.time_series import cash_demand
from convatlas.errors import DataError, UnknownName
from convatlas.series import pipeline as module
from convatlas.series import regressors
from convatlas.series.metrics import coverage, diebold_mariano, mae, nrmse, smape, theil_u
from convatlas.series.pipeline import ForecastPipeline, fit_all
from convatlas.series.regressors import GRNNRegressor
from convatlas.series.state_space import Scaler, StateSpaceFeatures, calendar_features

DATA = cash_demand(3, 200)
TIMES, VALUES = DATA.one(0)


def test_a_direct_step_is_a_regression_of_its_own():
    how = {"horizon": 3, "tau": 2, "m": 3, "options": {"sigma": 0.7}}
    direct = ForecastPipeline("grnn", multi_step="direct", **how).fit(VALUES[:160], TIMES[:160])
    forecast, actual = direct.rolling(VALUES, TIMES, 160, 5)
    calendar = calendar_features(TIMES, ("dow",))
    # By hand: the value two steps after the lags, from lags 2 apart and the weekday of the target.
    targets = np.arange(5 + 2, 160)
    lags = np.stack([VALUES[targets - 3 - 2 * k] for k in range(3)], 1)
    scales, goal = Scaler.fit(lags), Scaler.fit(VALUES[targets])
    model = GRNNRegressor(0.7).fit(np.c_[scales.apply(lags), calendar[targets]], goal.apply(VALUES[targets]))
    origins = 160 + 5 * np.arange(len(forecast))
    rows = np.stack([VALUES[origins - 1 - 2 * k] for k in range(3)], 1)
    expected = goal.inverse(model.predict(np.c_[scales.apply(rows), calendar[origins + 2]]))
    np.testing.assert_allclose(forecast[:, 2], expected, rtol=1e-9)
    np.testing.assert_array_equal(actual[:, 2], VALUES[origins + 2])
    recursive = ForecastPipeline("grnn", **how).fit(VALUES[:160], TIMES[:160]).rolling(VALUES, TIMES, 160, 5)[0]
    np.testing.assert_allclose(recursive[:, 0], forecast[:, 0], rtol=1e-9)
    assert np.abs(recursive[:, 2] - forecast[:, 2]).max() > 0.1


@pytest.mark.parametrize("model", ["svr", "gmdh", "lstm"])
def test_direct_forecasts_see_the_past_alone_and_come_back(model):
    how = {"horizon": 2, "multi_step": "direct", "tau": 1, "m": 4}
    options = {"epochs": 2} if model == "lstm" else {}
    direct = ForecastPipeline(model, **how, options=options).fit(VALUES[:150], TIMES[:150])
    forecast = direct.rolling(VALUES, TIMES, 150, 9)[0]
    changed = VALUES.copy()
    changed[159:] += 50
    np.testing.assert_allclose(direct.rolling(changed, TIMES, 150, 9)[0][:2], forecast[:2], rtol=1e-6)
    again = ForecastPipeline.restore(direct.described(), direct.tensors())
    np.testing.assert_allclose(again.rolling(VALUES, TIMES, 150, 9)[0], forecast, rtol=1e-6)
    assert len(again.forecaster.networks) == (2 if model == "lstm" else 0)


def test_filled_values_are_no_true_values():
    gaps = VALUES.copy()
    gaps[[120, 170, 171]] = np.nan
    pipeline = ForecastPipeline("seasonal_naive", horizon=2).fit(gaps[:160], TIMES[:160])
    errors = pipeline.residuals  # of the origins from 128 on
    assert not np.isnan(errors).any()
    pipeline = ForecastPipeline("seasonal_naive", horizon=2, val_fraction=0.3).fit(gaps[:160], TIMES[:160])
    assert np.argwhere(np.isnan(pipeline.residuals)).tolist() == [[7, 1], [8, 0]]
    known = pipeline.residuals[~np.isnan(pipeline.residuals[:, 0]), 0]
    assert known.min() <= pipeline.quantile(0.01)[0] <= pipeline.quantile(0.5)[0] == pytest.approx(np.median(known))
    actual = pipeline.rolling(gaps, TIMES, 160)[1]
    assert np.isnan(actual).sum() == 4
    known = ~np.isnan(actual)
    forecast = pipeline.rolling(gaps, TIMES, 160)[0]
    for measure in (smape, mae, nrmse):
        assert measure(actual, forecast) == measure(actual[known], forecast[known])
    with pytest.raises(DataError, match="none of the last 32 values is known"):
        ForecastPipeline("naive").fit(np.where(np.arange(160) < 128, VALUES[:160], np.nan), TIMES[:160])


def test_tests_and_steps_leave_unknown_values_out():
    random = np.random.default_rng(0)
    a, f = random.standard_normal((2, 40))
    a[[7, 20]] = np.nan
    known = ~np.isnan(a)
    steps = [t for t in range(1, 40) if known[t] and known[t - 1]]
    by_hand = np.sqrt(sum((f[t] - a[t]) ** 2 for t in steps) / sum((a[t] - a[t - 1]) ** 2 for t in steps))
    assert theil_u(a, f) == pytest.approx(by_hand)
    first, second = a - f, a - 0.5
    assert diebold_mariano(first, second) == pytest.approx(diebold_mariano(first[known], second[known]))
    gap, packed = diebold_mariano(first, second, horizon=3), diebold_mariano(first[known], second[known], horizon=3)
    assert gap.statistic != packed.statistic  # neighbours of a gap are no neighbours
    assert coverage(a, f - 9, f + 9) == 100
    with pytest.raises(ValueError, match="NaN at the same times"):
        diebold_mariano(first, np.nan_to_num(second))
    with pytest.raises(ValueError, match="got NaN alone"):
        smape([np.nan], [1.0])


@pytest.mark.parametrize("model", ["grnn", "arima", "seasonal_naive"])
def test_blocks_give_what_the_whole_gives(monkeypatch, model):
    if model == "arima":
        pytest.importorskip("statsmodels")
    options = {"order": [1, 0, 0]} if model == "arima" else {}
    pipeline = ForecastPipeline(model, horizon=2, tau=1, m=4, options=options).fit(VALUES[:120], TIMES[:120])
    whole = pipeline.rolling(VALUES, TIMES, 120)[0]
    monkeypatch.setattr(module, "_BLOCK", 16)
    monkeypatch.setattr(regressors, "_CHUNK", 500)
    np.testing.assert_allclose(pipeline.rolling(VALUES, TIMES, 120)[0], whole, rtol=1e-9)
    if model == "grnn":
        rows = np.random.default_rng(0).standard_normal((60, 2))
        assert GRNNRegressor().fit(rows, rows[:, 0]).sigma_ == pytest.approx(_sigma(rows, rows[:, 0]))


def _sigma(rows, values):
    """The width with the least error by leave-one-out, literally."""
    errors = []
    for sigma in GRNNRegressor().grid:
        left = [GRNNRegressor(sigma).fit(np.delete(rows, i, 0), np.delete(values, i)) for i in range(len(rows))]
        errors.append(sum((left[i].predict(rows[i : i + 1])[0] - values[i]) ** 2 for i in range(len(rows))))
    return GRNNRegressor().grid[int(np.argmin(errors))]


def test_long_series_are_learned_from_their_end():
    how = {"tau": 1, "m": 4, "options": {"sigma": 0.5}}
    long = ForecastPipeline("grnn", max_points=90, **how).fit(VALUES, TIMES)
    short = ForecastPipeline("grnn", **how).fit(VALUES[-90:], TIMES[-90:])
    np.testing.assert_array_equal(long.residuals, short.residuals)
    np.testing.assert_array_equal(long.predict().values, short.predict().values)
    assert len(long.tensors()["values"]) == 90


def test_intervals_hold_what_they_are_to_hold():
    random = np.random.default_rng(1)
    noise = 50 + 10 * random.standard_normal(1500)
    times = np.datetime64("2020-01-01", "s") + np.arange(1500) * np.timedelta64(86400, "s")
    pipeline = ForecastPipeline("seasonal_naive", horizon=2, val_fraction=0.5).fit(noise[:900], times[:900])
    forecast, actual = pipeline.rolling(noise, times, 900)
    for level in (0.5, 0.8, 0.95):
        assert coverage(actual, *pipeline.interval(forecast, level)) == pytest.approx(100 * level, abs=4)


@pytest.mark.parametrize(("model", "multi_step"), [("lstm", "direct"), ("cnn", "recursive"), ("cnn_lstm", "recursive")])
def test_series_that_train_as_one_are_as_if_alone(model, multi_step):
    data = {name: DATA.one(index)[::-1] for index, name in enumerate(DATA.names)}
    data["short"] = (VALUES[:50], TIMES[:50])
    data["odd"] = (np.full(100, 3.0), TIMES[:100])

    def fresh():
        options = {"epochs": 6, "patience": 2, "seeds": 2}
        how = {"horizon": 2, "multi_step": multi_step, "tau": 1, "m": 4, "options": options}
        return {name: ForecastPipeline(model, **how) for name in data}

    together = fit_all(fresh(), data, "1 D")
    assert list(together) == list(data)
    assert "the series is constant" in str(together.pop("odd"))
    for name, pipeline in together.items():
        alone = fresh()[name].fit(*data[name])
        np.testing.assert_allclose(pipeline.predict().values, alone.predict().values, rtol=1e-3)
        np.testing.assert_allclose(pipeline.residuals, alone.residuals, rtol=1e-2, atol=1e-2)


def test_arguments_are_checked():
    with pytest.raises(UnknownName, match="unknown multi_step 'both'"):
        ForecastPipeline(multi_step="both")
    with pytest.raises(ValueError, match="max_points must be at least 1, got 0"):
        ForecastPipeline(max_points=0)
    with pytest.raises(DataError, match=r"need at least \(m-1\)\*tau \+ 30 points and 40 steps ahead: 70, got 60"):
        StateSpaceFeatures().table(VALUES[:60], ahead=40)
