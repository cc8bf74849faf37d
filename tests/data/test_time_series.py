"""CSV files as people have them, the grids of their times, and files that cannot be used."""

from __future__ import annotations

import gzip

import numpy as np
import pytest

from convatlas.data.time_series import SeriesSet, cash_demand, next_times, read_series
from convatlas.errors import DataError, UnknownName


def written(folder, text, name="file.csv"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def rows(dates, start="t,v\n"):
    return start + "".join(f"{date},{index + 1}\n" for index, date in enumerate(dates))


def test_long_tables(tmp_path):
    text = "atm;day;sum\n" + "".join(f"{a};{d:02}/03/2026;{d}\n" for a in "xy" for d in (1, 2, 4))
    path = written(tmp_path, text)
    found = read_series(path, id_column="atm", date_column="day", date_format="%d/%m/%Y")
    assert found.names == ("x", "y")
    assert found.gaps() == {"x": 1, "y": 1}
    np.testing.assert_array_equal(found.values, [[1, 2, np.nan, 4]] * 2)
    with pytest.raises(DataError, match="2026-03-01 is not in order: sort the rows by date"):
        read_series(path, date_column="day", value_columns=("sum",), date_format="%d/%m/%Y")
    twice = written(tmp_path, "day,atm,sum\n2026-03-01,x,1\n2026-03-01,y,2\n")
    with pytest.raises(DataError, match=r"2026-03-01 comes twice; if the file holds several series .* set id_column"):
        read_series(twice, value_columns=("sum",))


def test_words_beside_numbers_are_no_series(tmp_path):
    found = read_series(written(tmp_path, "t,place,v,w\n2026-01-01,x,,1\n2026-01-02,y,2,\n2026-01-03,z,n/a,3\n"))
    assert found.names == ("v", "w")
    np.testing.assert_array_equal(found.values, [[np.nan, 2, np.nan], [1, np.nan, 3]])
    np.testing.assert_array_equal(found.one(0)[1], [2])


def test_decimal_commas(tmp_path):
    text = "Datum;Betrag\n01.03.2026;1.234,50\n02.03.2026;-7,25\n03.03.2026;12\n"
    path = written(tmp_path, text)
    found = read_series(path, date_format="%d.%m.%Y", decimal=",")
    np.testing.assert_array_equal(found.values, [[1234.5, -7.25, 12]])
    with pytest.raises(DataError, match=r"no column of numbers beside the dates .set decimal to ','"):
        read_series(path, date_format="%d.%m.%Y")
    with pytest.raises(DataError, match=r"line 2, column Betrag: expected a number, got '1.234,50' .set decimal"):
        read_series(path, date_format="%d.%m.%Y", value_columns=("Betrag",))
    points = written(tmp_path, "t;v\n2026-01-01;2,5\n2026-01-02;1.5\n")
    with pytest.raises(DataError, match=r"line 3, column v: expected a number, got '1.5'"):
        read_series(points, decimal=",")
    with pytest.raises(UnknownName, match="unknown decimal ';'"):
        read_series(path, decimal=";")


def test_compressed_files_and_other_separators(tmp_path):
    path = tmp_path / "file.csv.gz"
    path.write_bytes(gzip.compress("\ufefft\tv\n2026-01-01\t1\n\n2026-01-02\t2\n".encode()))
    found = read_series(path)
    assert (found.names, found.values.tolist()) == (("v",), [[1, 2]])
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="is no text in UTF-8"):
        read_series(path)


GRIDS = {
    "1 D": (np.arange("2026-01-01", "2026-01-15", dtype="datetime64[D]"), 7),
    "7 D": (np.arange("2026-01-01", "2026-03-15", 7, dtype="datetime64[D]"), 52),
    "1 B": ([d for d in np.arange("2026-01-01", "2026-01-30", dtype="datetime64[D]") if np.is_busday(d)], 5),
    "1 M": ([f"2026-{m:02}-15" for m in range(1, 9)], 12),
    "3 M": ([f"{y}-{m:02}-01" for y in (2025, 2026) for m in (1, 4, 7, 10)], 4),
    "1 ME": (["2025-11-30", "2025-12-31", "2026-01-31", "2026-02-28", "2026-03-31"], 12),
    "1 Y": (["2021-01-01", "2022-01-01", "2023-01-01", "2024-01-01"], 1),
    "3600 s": ([f"2026-01-01 {h:02}:30" for h in range(9)], 24),
    "900 s": ([f"2026-01-01T00:{m:02}:00+02:00" for m in (0, 15, 30, 45)], 96),
    "1 s": ([f"2026-01-01T00:00:{s:02}" for s in range(9)], 1),
}


@pytest.mark.parametrize("step", GRIDS)
def test_grids_are_found_and_go_on(tmp_path, step):
    dates, period = GRIDS[step]
    found = read_series(written(tmp_path, rows(dates)))
    assert (found.step, found.period) == (step, period)
    assert found.gaps() == {"v": 0}
    expected = np.array([str(date).replace(" ", "T").partition("+")[0] for date in dates], dtype="datetime64[s]")
    np.testing.assert_array_equal(found.times, expected)
    # The grid goes on from the middle as the file does.
    np.testing.assert_array_equal(next_times(expected[1], step, len(expected) - 2), expected[2:])


def test_what_is_missing_on_a_grid_is_a_gap(tmp_path):
    found = read_series(written(tmp_path, rows(["2026-01-15", "2026-02-15", "2026-03-15", "2026-05-15"])))
    assert (found.step, found.gaps(), str(found.times[3])) == ("1 M", {"v": 1}, "2026-04-15T00:00:00")
    days = [d for d in np.arange("2026-01-01", "2026-01-30", dtype="datetime64[D]") if np.is_busday(d)]
    assert read_series(written(tmp_path, rows([*days[:4], *days[5:]]))).gaps() == {"v": 1}


@pytest.mark.parametrize("name", ["sunspots", "co2", "elnino"])
def test_public_series(name):
    pytest.importorskip("statsmodels")
    found = read_series(name)
    assert found.step == ("1 Y" if name == "sunspots" else "1 M")
    assert np.nanstd(found.values) > 0


IRREGULAR = ["2026-01-01 10:03:07", "2026-01-01 10:03:08", "2026-01-01 10:03:09", "2026-03-01 17:44:31"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        ("date,v\n", "no rows below"),
        ("date,v\n2026-01-01,1\n", "at least 2 times, got 1"),
        ("date,v\n2026-01-01,1\n2026-01-02\n", "line 3: expected 2 cells, got 1"),
        ("date,v\n2026-01-01,1\n2026-01-02,x\n", "line 3, column v: expected a number, got 'x'"),
        ("date,v\n2026-01-01,1\n02.01.2026,2\n", "expected a date like"),
        ("date,v\n2026-01-01,1\n2026-02-30,2\n", "expected a date like .* got '2026-02-30'"),
        ("date,v\n2026-01-01,1\n2026-01-02T00:00:00.5,2\n", "expected a time in whole seconds"),
        ("date,v\n2026-01-01,1\n2026-01-01,2\n", "2026-01-01 comes twice"),
        ("date,v\n2026-01-02,1\n2026-01-01,2\n", "2026-01-01 is not in order"),
        ("date,v\n2026-01-01,inf\n2026-01-02,2\n", "values must be finite, got inf"),
        ("date,v\n2026-01-01,\n2026-01-02,\n", "no column of numbers"),
        ("date\n2026-01-01\n", "at least two different column names"),
        ("date|v\n2026-01-01|1\n", "column names between commas, semicolons or tabs, got 'date|v'"),
        ("date,v,v\n2026-01-01,1,2\n", "at least two different column names"),
        ("1,2\n2,3\n", "expected a date like 2026-11-27"),
        (rows(IRREGULAR), r"are not regular: of the \d+ steps of 1 s from 2026-01-01 10:03:07 to .* only 4 are there"),
        (rows(["2026-01-01", "2026-01-03", "2026-01-05", "2026-01-06"]), "multiples of the step of 2 D .*2026-01-06"),
        (b"t,v\n2026-01-01,\xff\n", "is no text in UTF-8"),
        (b"t,v\n2026-01-01,\x00\n", "is no text"),
    ],
)
def test_broken_files_are_named(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read_series(written(tmp_path, text))


def test_wrong_names_are_answered(tmp_path):
    with pytest.raises(DataError, match="none of the built-in series"):
        read_series(tmp_path / "missing.csv")
    path = written(tmp_path, "date,value\n2026-01-01,1\n2026-01-02,2\n")
    with pytest.raises(DataError, match="unknown column 'valeu': did you mean value"):
        read_series(path, value_columns=("valeu",))


def test_simulated_demand_has_what_is_asked_for():
    plain, more = (cash_demand(2, 300, seed=3, **how) for how in ({}, {"missing": 0.1, "outages": 0.1, "trend": 50.0}))
    assert plain.gaps() == {"atm1": 0, "atm2": 0}
    assert all(10 < gaps < 60 for gaps in more.gaps().values())
    assert 20 < (more.values == 0).sum() < 100
    weekly = plain.values[0, : 7 * 42].reshape(-1, 7).mean(0)
    assert weekly.argmin() == 6
    assert weekly.argmax() == 5
    chaos = cash_demand(1, 200, dynamics="mackey_glass").values
    assert np.isfinite(chaos).all()
    assert isinstance(more, SeriesSet)
    with pytest.raises(UnknownName, match="dynamics"):
        cash_demand(dynamics="lorenz")
