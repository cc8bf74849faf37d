"""Lag, dimension and exponent on systems whose answers are known."""

from __future__ import annotations

import json

import numpy as np
import pytest

from convatlas.errors import DataError
from convatlas.series.chaos import (
    ChaosAnalysis,
    acf_lag,
    analyse_chaos,
    autocorrelation,
    autoregressive_order,
    cao_embedding,
    minimum_dimension,
    nearest_neighbours,
    rosenstein_lyapunov,
)


def logistic(length: int = 500, r: float = 3.9) -> np.ndarray:
    values = [0.3]
    for _ in range(length + 99):
        values.append(r * values[-1] * (1 - values[-1]))
    return np.array(values[100:])


NOISE = np.random.default_rng(0).standard_normal(1000)


def test_logistic_map_is_chaotic():
    found = analyse_chaos(logistic(), tau=1)
    assert found.chaotic
    assert found.dim in (2, 3)
    exact = np.log(np.abs(3.9 * (1 - 2 * logistic()))).mean()  # of this stretch; 0.496 of an endless one
    assert rosenstein_lyapunov(logistic(), 4, 1) == pytest.approx(exact, abs=0.02)
    assert abs(found.curves.e2[0] - 1) > 0.3


def test_noise_is_told_by_e2():
    curves = cao_embedding(NOISE, 1, 7)
    assert np.abs(curves.e2[1:] - 1).max() < 0.1
    with pytest.warns(RuntimeWarning, match="E1 does not saturate"):
        assert not analyse_chaos(NOISE, max_dim=7).chaotic


def test_autocorrelation_equals_statsmodels():
    acf = pytest.importorskip("statsmodels.tsa.stattools").acf
    np.testing.assert_allclose(autocorrelation(NOISE, 40), acf(NOISE, nlags=40, fft=False), atol=1e-12)


@pytest.mark.parametrize("metric", ["chebyshev", "euclidean"])
@pytest.mark.parametrize("window", [0, 3, 300])
def test_tree_finds_the_neighbours_of_all_pairs(metric, window):
    # Rounded values tie and coincide, so that the rules for both decide.
    points = np.round(np.random.default_rng(1).standard_normal((301, 2)), 1)
    naive = nearest_neighbours(points, metric=metric, window=window, backend="naive")
    tree = nearest_neighbours(points, metric=metric, window=window, backend="tree")
    np.testing.assert_array_equal(tree[1], naive[1])
    if metric == "chebyshev":  # square roots of rounded sums tie by chance of rounding
        np.testing.assert_array_equal(tree[0], naive[0])


def test_lag_rules_on_a_cosine():
    wave = np.cos(2 * np.pi * np.arange(400) / 40)
    assert acf_lag(wave, "zero") == 10
    assert acf_lag(wave, "inv_e") in (7, 8)
    assert acf_lag(wave, "first_min") == 20
    assert acf_lag(wave, "zero", max_lag=5) is None


def test_order_of_an_autoregression_is_found():
    values, noise = [0.0, 0.0, 0.0], np.random.default_rng(2).standard_normal(800)
    for value in noise:
        values.append(0.3 * values[-1] + 0.6 * values[-3] + value)
    assert autoregressive_order(values) == 3


def test_dimension_waits_for_a_steady_curve():
    assert minimum_dimension(np.array([0.5, 0.95, 0.7, 0.92, 0.95])) == 5
    assert minimum_dimension(np.array([0.1, 0.2])) is None


def test_of_a_long_series_the_end_is_tested():
    series = np.concatenate([NOISE, logistic()])
    with pytest.warns(RuntimeWarning, match="of 1500 values the last 500 were tested"):
        found = analyse_chaos(series, tau=1, max_points=500)
    assert found.exponent == analyse_chaos(logistic(), tau=1).exponent
    again = ChaosAnalysis.from_plain(json.loads(json.dumps(found.as_plain())))
    np.testing.assert_array_equal(again.curves.e1, found.curves.e1)
    assert (again.chaotic, again.notes, again.dim) == (found.chaotic, found.notes, found.dim)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, np.nan, 2.0], "values must be finite, got nan at position 1"),
        ([2.0] * 50, "the series is constant at 2"),
        ([], "needs at least 2 points, got 0"),
        (np.zeros((2, 2)), "one axis"),
        (np.arange(20.0) % 3, "need at least"),
    ],
)
def test_unfit_series_are_refused(values, message):
    with pytest.raises(DataError, match=message):
        analyse_chaos(values)
