"""The task on files, by the command line, and files that cannot be used."""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from joblib import parallel_config

from convatlas.cli.main import main
from convatlas.data.time_series import cash_demand, read_series
from convatlas.errors import DataError, Unsupported
from convatlas.series.forecasting import Forecasting
from convatlas.series.metrics import smape
from convatlas.training.settings import Training

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "guide" / "forecasting.md"


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = cash_demand(2, 150, missing=0.02)
    with open("cash.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["date", *data.names])
        for time, row in zip(data.times.astype("datetime64[D]"), data.values.T, strict=True):
            if not np.isnan(row).all():
                writer.writerow([time, *("" if np.isnan(value) else f"{value:.3f}" for value in row)])
    return data


def test_commands_of_the_guide(world):
    text = PAGE.read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    assert len(lines) == 5
    for line in lines:
        words = [
            str(ROOT / word) if word.startswith("examples/") else word for word in shlex.split(line, comments=True)
        ]
        if "--config" in words:  # as it stands there, on less
            words += ["--data", "cash.csv", "--epochs", "1"]
        assert main(words[1:]) == 0, line
    assert "seasonal_naive" in Path("run/report.json").read_text()
    rows = list(csv.DictReader(Path("ahead/cash_forecast.csv").read_text().splitlines()))
    assert len(rows) == 2 * 7
    assert rows[0]["time"] == "2024-05-30"
    assert float(rows[0]["low"]) < float(rows[0]["forecast"]) < float(rows[0]["high"])
    assert "Diebold-Mariano" in Path("models/report.html").read_text()


def test_file_is_read_as_it_was_simulated(world):
    found = read_series("cash.csv")
    np.testing.assert_allclose(found.values, world.values, atol=1e-3)
    assert found.step == "1 D"
    assert found.period == 7
    assert found.gaps() == world.gaps()


def test_loaded_run_gives_the_same(world, tmp_path):
    task = Forecasting(data="cash.csv", model="lstm", m=3, tau=1)
    task.fit(tmp_path / "run", Training(**{**Forecasting.defaults, "epochs": 2}))
    again = Forecasting.load(tmp_path / "run")
    again.evaluate()
    assert again.results[0].analysis is None  # tau and m were given
    for mine, other in zip(task.results, again.results, strict=True):
        np.testing.assert_allclose(other.forecasts["lstm"], mine.forecasts["lstm"], rtol=1e-6)
    with pytest.raises(Unsupported, match="no use for the settings optimizer"):
        task.fit(tmp_path / "other", Training(optimizer="sgd"))


def write(path, dates, columns):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["date", *columns])
        for date, *cells in zip(dates, *columns.values(), strict=True):
            writer.writerow([date, *("" if np.isnan(cell) else cell for cell in cells)])


DAYS = np.arange("2026-01-01", "2026-05-31", dtype="datetime64[D]")


def test_missing_held_out_values_count_in_no_measure(tmp_path):
    values = cash_demand(1, 150).values[0]
    values[[40, 125, 131]] = np.nan
    write(tmp_path / "a.csv", DAYS, {"v": values})
    task = Forecasting(data=str(tmp_path / "a.csv"), model="grnn", m=4, tau=1, horizon=2, stride=2)
    report = task.fit(tmp_path / "run")
    (result,) = task.results
    assert (result.filled, result.imputed) == (3, 2)
    assert "3 missing values were filled from the seasons before; 2 held-out ones of them" in report.summary
    assert np.argwhere(np.isnan(result.actual)).tolist() == [[2, 1], [5, 1]]  # of the origins at 120, 122, ...
    known = ~np.isnan(result.actual)
    assert known.sum() == 28
    assert result.error("grnn") == smape(result.actual[known], result.forecasts["grnn"][known])
    ahead = result.errors_ahead("naive")
    assert ahead[1] == smape(result.actual[known[:, 1], 1], result.forecasts["naive"][known[:, 1], 1])
    values[120:149] = np.nan
    values[149] = 0
    write(tmp_path / "zeros.csv", DAYS, {"v": values})
    with pytest.raises(DataError, match="series v: none of its held-out values is known"):
        Forecasting(data=str(tmp_path / "zeros.csv"), model="grnn", m=4, tau=1, zeros="impute").fit(tmp_path / "zero")


def test_series_that_cannot_be_forecast_are_named_or_left_out(tmp_path):
    good = cash_demand(1, 150).values[0]
    few = np.where(np.arange(150) < 12, good, np.nan)
    columns = {"good": good, "dead": np.full(150, 7.0), "few": few, "out": np.zeros(150)}
    write(tmp_path / "a.csv", DAYS, columns)
    how = {"data": str(tmp_path / "a.csv"), "model": "grnn", "zeros": "impute"}
    with pytest.raises(DataError, match=r"series few: .* do not fit horizon 3 \(unfit: leave_out"):
        Forecasting(**how, horizon=3).fit(tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    task = Forecasting(**how, unfit="leave_out")
    report = task.fit(tmp_path / "run")
    assert list(task.pipelines) == ["good"]
    assert task.unusable["dead"].startswith("the series is constant at 7")
    assert task.unusable["out"] == "all values are zero or missing"
    assert "1 series. 150 missing" in report.summary or "3 series were left out" in report.summary
    assert "the series is constant" in report.to_json()
    write(tmp_path / "b.csv", DAYS, {"dead": np.full(150, 7.0)})
    with pytest.raises(DataError, match=r"no series can be forecast; .*constant at 7"):
        Forecasting(data=str(tmp_path / "b.csv"), unfit="leave_out").fit(tmp_path / "none")


def test_jobs_give_what_one_gives(world, tmp_path):
    pipelines = []
    for jobs in (1, 2):
        task = Forecasting(data="cash.csv", model="svr", embedding="none", jobs=jobs, horizon=2, multi_step="direct")
        with parallel_config(backend="threading"):  # processes take seconds to start
            task.fit(tmp_path / str(jobs))
        pipelines.append(list(task.pipelines.values()))
    for one, other in zip(*pipelines, strict=True):
        np.testing.assert_array_equal(one.residuals, other.residuals)
    with pytest.raises(ValueError, match="jobs must be at least 1, or -1 for all cores, got 0"):
        Forecasting(data="cash.csv", jobs=0)


def test_other_data_are_measured_from_the_first_season_on(world, tmp_path):
    task = Forecasting(data="cash.csv", model="grnn", m=4, tau=1, horizon=3)
    task.fit(tmp_path / "run")
    other = cash_demand(2, 80, seed=5)
    write(tmp_path / "other.csv", DAYS[:80], dict(zip(other.names, other.values, strict=True)))
    assert main(["evaluate", "run", "--data", "other.csv", "--out", "other"]) == 0
    again = Forecasting.load(tmp_path / "run")
    again.evaluate("other.csv")
    for result, values in zip(again.results, other.values, strict=True):
        assert len(result.history) == 7
        assert result.actual.shape == (80 - 7 - 2, 3)
        np.testing.assert_array_equal(result.forecasts["naive"][5], [values[11]] * 3)
        np.testing.assert_array_equal(result.forecasts["seasonal_naive"][5], values[5:8])
    write(tmp_path / "weeks.csv", DAYS[::7], {"atm1": other.values[0, :22]})
    with pytest.raises(DataError, match="series atm1: the model was trained on steps of 1 D, got 7 D"):
        again.evaluate("weeks.csv")
    write(tmp_path / "more.csv", DAYS[:80], {"atm3": other.values[0], "atm1": other.values[1]})
    with pytest.raises(DataError, match="series atm3: no model was trained for it"):
        again.evaluate("more.csv")


def test_stock_serves_what_it_is_to_serve(world, tmp_path):
    task = Forecasting(data="cash.csv", model="seasonal_naive", service=0.97)
    report = task.fit(tmp_path / "run")
    document = json.loads(report.to_json())
    (table,) = (t for s in document["sections"] for t in s["parts"] if t.get("title") == "Stock by service level")
    services, met, spare, lack = zip(*table["rows"], strict=True)
    assert services == (50, 80, 90, 95, 97, 99)
    assert list(spare) == sorted(spare)
    assert list(lack) == sorted(lack, reverse=True)
    assert met[0] < 80 < met[-1]
    task.predict(["cash.csv"], tmp_path / "out")
    row = next(csv.DictReader((tmp_path / "out" / "cash_forecast.csv").read_text().splitlines()))
    assert float(row["forecast"]) < float(row["stock"])


def test_reports_show_each_step_and_the_intervals(world, tmp_path):
    models = "{one: {model: grnn}, other: {model: grnn, multi_step: direct}}"
    words = ["compare", "forecasting", "--data", "cash.csv", "--models", models, "--horizon", "3", "--out", "models"]
    assert main([*words, "--m", "4", "--tau", "1"]) == 0
    document = json.loads(Path("models/report.json").read_text())
    titles = {part["title"]: part for section in document["sections"] for part in section["parts"] if "title" in part}
    steps = titles["Error by step"]["series"]
    assert list(steps) == ["one", "other", "seasonal_naive"]
    # The first step is the same regression.
    assert steps["one"]["y"][0] == pytest.approx(steps["other"]["y"][0])
    assert steps["one"]["y"][2] != steps["other"]["y"][2]
    assert "1 held-out values were missing" in titles["Models"]["caption"]
    alone = json.loads(Path("models/other/report.json").read_text())
    titles = {part["title"]: part for section in alone["sections"] for part in section["parts"] if "title" in part}
    held = [row[1] for row in titles["Coverage"]["rows"]]
    assert held == sorted(held)
    (plot,) = (part for title, part in titles.items() if title.startswith("Last forecasts"))
    band = plot["bands"]["grnn"]
    assert all(low <= high for low, high in zip(band["low"], band["high"], strict=True))
