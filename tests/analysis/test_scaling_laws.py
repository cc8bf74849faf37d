"""Scaling laws: known laws are found again, fronts, intervals, tables of runs, refusals."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convatlas.analysis.scaling_laws import (
    compute_optimal,
    fit_power_law,
    fit_scaling_law,
    pareto_front,
    read_runs,
    study,
    training_compute,
)
from convatlas.errors import DataError
from convatlas.report import Lines, Scatter, Table

C = np.geomspace(1e12, 1e18, 12)


def test_compute_of_a_training() -> None:
    assert training_compute(124_745_728, 11_801_680, 800) == 3 * 124_745_728 * 11_801_680 * 800


def test_front_falls_with_compute() -> None:
    compute, error = [3, 1, 2, 2, 5, 4], [0.3, 0.5, 0.6, 0.4, 0.3, 0.1]
    assert pareto_front(compute, error) == [1, 3, 0, 5]
    assert pareto_front([1, 1], [0.2, 0.1]) == [1]
    random = np.random.default_rng(0)
    x, y = random.random((2, 50))
    front = pareto_front(x, y)
    for index in range(50):
        beaten = any(x[k] <= x[index] and y[k] <= y[index] and k != index for k in range(50))
        assert (index in front) is not beaten


def test_power_law_is_found_again() -> None:
    law = fit_power_law(C, 3 * C**0.35, resamples=20)
    assert (law.factor, law.exponent, law.r_squared) == pytest.approx((3, 0.35, 1))
    assert tuple(law.exponent_interval) == pytest.approx((0.35, 0.35))
    np.testing.assert_allclose(law(C), 3 * C**0.35, rtol=1e-9)


@pytest.mark.parametrize(
    ("a", "b", "alpha", "floor"), [(500.0, 0.0, 0.2, 0.0), (40.0, 0.0, 0.12, 0.3), (2e4, 1e14, 0.3, 0.1)]
)
def test_scaling_law_is_found_again(a: float, b: float, alpha: float, floor: float) -> None:
    error = a * (b + C) ** -alpha + floor
    law = fit_scaling_law(C, error, resamples=2)
    np.testing.assert_allclose(law(C), error, rtol=2e-3)
    assert law.r_squared > 0.999
    assert law.alpha == pytest.approx(alpha, rel=0.03)
    assert law.error_inf == pytest.approx(floor, abs=0.02)
    between = float(np.sqrt(error[5] * error[6]))
    assert law([law.compute_for(between)])[0] == pytest.approx(between)
    assert law.compute_for(law.error_inf) == float("inf")


def test_intervals_hold_the_truth_and_shrink_with_the_noise() -> None:
    random = np.random.default_rng(1)
    widths = []
    for noise in (0.1, 0.01):
        y = 2 * C**-0.1 * np.exp(noise * random.standard_normal(len(C)))
        law = fit_power_law(C, y, resamples=200)
        low, high = law.exponent_interval
        assert low - 0.01 < -0.1 < high + 0.01
        widths.append(high - low)
        assert fit_power_law(C, y, resamples=200).exponent_interval == law.exponent_interval
    assert widths[1] < widths[0] / 3
    law = fit_scaling_law(C, 50 * C**-0.1 * np.exp(0.01 * random.standard_normal(len(C))), resamples=15)
    assert law.alpha_interval.low <= law.alpha_interval.high
    assert law.error_inf_interval.low >= 0


def grid_of_runs() -> dict[str, list[Any]]:
    """Runs whose error is n^-0.5 + d^-0.27 for a grid of sizes and numbers of samples."""
    columns: dict[str, list[Any]] = {name: [] for name in ("name", "compute", "error", "parameters", "samples")}
    for n in np.geomspace(1e3, 1e7, 9):
        for d in np.geomspace(1e3, 1e9, 13):
            values = (f"{n:.0f} x {d:.0f}", 3 * n * d, n**-0.5 + d**-0.27, n, d)
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
    return columns


def test_best_allocation_has_the_exponents_of_the_errors() -> None:
    runs = grid_of_runs()
    found = compute_optimal(*(runs[name] for name in ("compute", "error", "parameters", "samples")), resamples=50)
    # At a fixed product n d, n^-p + d^-q is least for n ~ C^(q / (p + q)).
    assert found.parameters.exponent == pytest.approx(0.27 / 0.77, abs=0.06)
    assert found.samples.exponent == pytest.approx(0.5 / 0.77, abs=0.06)
    assert found.parameters.exponent + found.samples.exponent == pytest.approx(1)
    assert list(found.front) == pareto_front(runs["compute"], runs["error"])


def test_study_of_a_table(tmp_path: Path) -> None:
    runs = grid_of_runs()
    path = tmp_path / "runs.csv"
    lines = [",".join(runs), *(",".join(map(str, row)) for row in zip(*runs.values(), strict=True))]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert read_runs(path) == runs
    report = study(read_runs(path), resamples=3)
    parts = [part for section in report.sections for part in section.parts]
    scatter = next(part for part in parts if isinstance(part, Scatter))
    assert len(scatter.points) == len(scatter.front)
    assert scatter.caption == f"The {117 - len(scatter.front)} runs beyond the front are left out."
    assert list(scatter.front) == [runs["name"][index] for index in pareto_front(runs["compute"], runs["error"])]
    law, best = (part for part in parts if isinstance(part, Table))
    assert law.rows[4][1] > 0.98
    assert best.rows[0][1] == pytest.approx(0.35, abs=0.06)
    assert [part.title for part in parts if isinstance(part, Lines)][1:] == [
        "Best number of parameters",
        "Best number of samples",
    ]
    assert "Best allocation" in report.to_html()
    short = study({"compute": runs["compute"], "error": runs["error"]}, resamples=2)
    assert len(short.sections) == 1


def test_wrong_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="compute and error must be equally long rows of numbers"):
        pareto_front([1, 2], [1])
    with pytest.raises(ValueError, match="error must be finite, got nan"):
        pareto_front([1, 2], [1, float("nan")])
    with pytest.raises(ValueError, match="error must be positive and finite, got 0"):
        fit_scaling_law(C, np.zeros(12))
    with pytest.raises(ValueError, match="must hold at least 5 runs, got 4"):
        fit_scaling_law(C[:4], C[:4])
    with pytest.raises(ValueError, match="at least five different numbers, got 1"):
        fit_scaling_law(np.ones(6), C[:6])
    with pytest.raises(ValueError, match="x must hold at least two different numbers"):
        fit_power_law([1, 1], [1, 2])
    with pytest.raises(ValueError, match="resamples must be at least 1, got 0"):
        fit_power_law([1, 2], [1, 2], resamples=0)
    with pytest.raises(ValueError, match="front must hold at least two runs"):
        compute_optimal([1, 2], [1, 2], [1, 1], [1, 1])
    with pytest.raises(ValueError, match="at least five runs must lie on the Pareto front, got 1 of 12"):
        study({"compute": C, "error": C})
    with pytest.raises(ValueError, match="runs must have a column 'error', got compute"):
        study({"compute": C})
    with pytest.raises(ValueError, match="one name for each of 12 runs, got 2"):
        study({"compute": C, "error": 1 / C, "name": ["a", "b"]}, resamples=1)
    path = tmp_path / "runs.csv"
    for text, message in (
        ("compute,loss\n1,2\n", "must have a column 'error', got compute, loss"),
        ("", "must have a column 'compute', got no rows"),
        ("compute,error\n1,x\n", "column 'error' of .* must hold numbers"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=message):
            read_runs(path)
    with pytest.raises(DataError, match=re.escape("none.csv cannot be read")):
        read_runs(tmp_path / "none.csv")
