"""Errors of forecasts and the tests of their difference."""

from __future__ import annotations

import math

import numpy as np
import pytest

from convatlas.series.metrics import coverage, diebold_mariano, holm, mape, nrmse, smape, t_test, theil_u

A = np.array([1.0, 2.0, 4.0, 0.0])
F = np.array([2.0, 2.0, 2.0, 0.0])


def test_errors_by_hand():
    assert smape(A, F) == smape(F, A) == pytest.approx(100 * (1 / 1.5 + 2 / 3) / 4)
    assert nrmse(A, F) == pytest.approx(math.sqrt(5 / 4) / 4)
    assert theil_u(A, F) == pytest.approx(math.sqrt(4 / 21))
    assert math.isnan(mape(A, F))
    assert smape([1.0], [-1.0]) == 200
    assert coverage(A, A - 1, [3.0, 1.0, 9.0, 1.0]) == 75


def test_diebold_mariano():
    random = np.random.default_rng(0)
    small, large = random.standard_normal(60), 3 * random.standard_normal(60)
    same = diebold_mariano(small, small)
    assert (same.statistic, same.p) == (0, 1)
    better = diebold_mariano(small, large)
    assert better.statistic == -diebold_mariano(large, small).statistic < -3
    assert better.p < better.p_corrected < 0.01
    alternating = np.tile([1.0, 2.0], 20)
    with pytest.warns(RuntimeWarning, match="that of 1 is used"):
        assert math.isfinite(diebold_mariano(alternating, np.full(40, 1.4), horizon=2).statistic)
    with pytest.raises(ValueError, match="of the same times"):
        diebold_mariano(small, large[1:])


def test_holm_and_t_tests():
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert t_test([1.0, 2.0], [1.0, 2.0]) == (0, 1)
    assert t_test([1.0, 2.0, 3.0], [2.0, 3.1, 4.0]).p < 0.01 < t_test([1, 2, 3], [2, 3.1, 4], paired=False).p


def test_unlike_arguments_are_refused():
    with pytest.raises(ValueError, match="must have one shape"):
        smape([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="forecast must be finite"):
        smape([1.0], [math.nan])
