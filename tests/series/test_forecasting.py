"""The task on files, by the command line, and files that cannot be used."""

from __future__ import annotations

import csv
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from convatlas.cli.main import main
from convatlas.data.time_series import cash_demand, read_series
from convatlas.errors import DataError, Unsupported
from convatlas.series.forecasting import Forecasting
from convatlas.training.settings import Training

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "forecasting.md"


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
    assert len(lines) == 4
    for line in lines:
        assert main(shlex.split(line)[1:]) == 0, line
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
    for mine, other in zip(task.results, again.results, strict=True):
        np.testing.assert_allclose(other.forecasts["lstm"], mine.forecasts["lstm"], rtol=1e-6)
    with pytest.raises(Unsupported, match="no use for the settings optimizer"):
        task.fit(tmp_path / "other", Training(optimizer="sgd"))


def test_long_tables_and_grids(tmp_path):
    path = tmp_path / "long.csv"
    path.write_text("atm;day;sum\n" + "".join(f"{a};{d:02}/03/2026;{d}\n" for a in "xy" for d in (1, 2, 4)))
    found = read_series(path, id_column="atm", date_column="day", date_format="%d/%m/%Y")
    assert found.names == ("x", "y")
    assert found.gaps() == {"x": 1, "y": 1}
    months = tmp_path / "months.csv"
    months.write_text("t,v\n" + "".join(f"2026-{m:02}-15,{m}\n" for m in (1, 2, 3, 5)))
    found = read_series(months)
    assert (found.step, found.period, str(found.times[3])) == ("1 M", 12, "2026-04-15T00:00:00")


@pytest.mark.parametrize("name", ["sunspots", "co2", "elnino"])
def test_public_series(name):
    pytest.importorskip("statsmodels")
    found = read_series(name)
    assert found.step == ("1 Y" if name == "sunspots" else "1 M")
    assert np.nanstd(found.values) > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("date,v\n", "no rows below"),
        ("date,v\n2026-01-01,1\n2026-01-02\n", "line 3: expected 2 cells, got 1"),
        ("date,v\n2026-01-01,1\n2026-01-02,x\n", "line 3, column v: expected a number, got 'x'"),
        ("date,v\n2026-01-01,1\n02.01.2026,2\n", "expected a date like"),
        ("date,v\n2026-01-01,1\n2026-01-01,2\n", "2026-01-01 comes twice"),
        ("date,v\n2026-01-02,1\n2026-01-01,2\n", "2026-01-01 is not in order"),
        ("date,v\n2026-01-01,inf\n2026-01-02,2\n", "values must be finite, got inf"),
        ("date,v\n2026-01-01,\n2026-01-02,\n", "no column of numbers"),
        ("date\n2026-01-01\n", "at least two different column names"),
    ],
)
def test_broken_files_are_named(tmp_path, text, message):
    path = tmp_path / "broken.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_series(path)


def test_binary_files_are_refused(tmp_path):
    path = tmp_path / "binary.csv"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(DataError, match="is no text in UTF-8"):
        read_series(path)
    with pytest.raises(DataError, match="none of the built-in series"):
        read_series(tmp_path / "missing.csv")
