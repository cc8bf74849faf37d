"""Tables of pixels: how they are read, written, split and brought to a grid, and how they can be bad."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from convatlas.data.sentinel2 import SentinelTimeSeries, fill_gaps, vegetation_indices
from convatlas.data.series import SeriesSet, join_series, read_series, split_by_field, write_series
from convatlas.data.wheat_seasons import CLASSES, simulate_wheat_season
from convatlas.errors import DataError

TABLE = """id,field,date,B4,B8,label
p1,north,2023-11-20,0.1,0.3,healthy
p1,north,2024-02-01,,0.4,healthy
p1,north,2023-10-05,0.2,0.2,healthy
p2,south,2022-09-30,0.1,0.5,rust
p2,south,2022-12-01,0.3,0.6,rust
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_table_becomes_series_in_the_order_of_time(tmp_path: Path):
    series = read_series(write(tmp_path / "pixels.csv", TABLE), season_start="10-01")
    assert series.names == ("p1", "p2")
    assert series.fields == ("north", "south")
    assert series.classes == ("healthy", "rust")
    assert series.columns == ("B4", "B8")
    assert series.days[0].tolist() == [4, 50, 123]
    # The season of an observation in September began in October of the year before.
    assert series.days[1].tolist() == [364, 426]
    np.testing.assert_array_equal(series.values[0], [[0.2, 0.2], [0.1, 0.3], [np.nan, 0.4]])
    write_series(series, tmp_path / "again.csv")
    again = read_series(tmp_path / "again.csv")
    assert again.days[1].tolist() == [364, 426]
    np.testing.assert_array_equal(again.values[0], series.values[0])
    assert again.labels.tolist() == [0, 1]
    both = join_series([series, again.subset([1])])
    assert both.names == ("p1", "p2", "p2")
    assert both.labels.tolist() == [0, 1, 1]


def test_labels_and_fields_are_not_needed(tmp_path: Path):
    series = read_series(write(tmp_path / "new.csv", "id,date,ndvi\na,1,0.5\na,9,0.6\nb,3,0.1\n"))
    assert series.labels.tolist() == [-1, -1]
    assert series.fields == ("a", "b")
    assert series.columns == ("ndvi",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("date,B4\n1,0.1\n", "has no column id; it has date, B4"),
        ("id,date,label\na,1,x\n", "has no column with measurements; it has id, date, label"),
        ("id,date,B4\n", "holds no observation"),
        ("id,date,B4\na,yesterday,0.1\n", "line 2: the date must be YYYY-MM-DD or a number of days, got 'yesterday'"),
        ("id,date,B4\na,1,0.1\na,2,high\n", "line 3: B4 must be a number, got 'high'"),
        ("id,date,B4\na,1,0.1\na,2023-01-01,0.1\n", "a has both dates and numbers of days"),
        ("id,date,B4,label\na,1,0.1,x\na,2,0.1,y\n", r"line 3: a has the label and field \('x', 'a'\) above, \('y'"),
    ],
)
def test_bad_tables_are_named(text: str, message: str, tmp_path: Path):
    with pytest.raises(DataError, match=message):
        read_series(write(tmp_path / "bad.csv", text))


def test_a_missing_file_and_a_wrong_season_are_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"none\.csv cannot be read: No such file"):
        read_series(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="season_start must be MM-DD, got 'October'"):
        read_series(tmp_path / "none.csv", season_start="October")


def labelled(fields: list[str], labels: list[int], classes: tuple[str, ...] = ("a", "b")) -> SeriesSet:
    count = len(fields)
    empty = tuple(np.zeros(0) for _ in range(count))
    names = tuple(str(number) for number in range(count))
    return SeriesSet(
        names, tuple(fields), classes, np.array(labels), ("x",), empty, tuple(np.zeros((0, 1)) for _ in empty)
    )


def test_no_field_lies_in_two_parts_and_every_class_in_every_part():
    fields = [f"f{number % 11}" for number in range(220)]
    series = labelled(fields, [number % 11 % 2 for number in range(220)])
    parts = split_by_field(series, {"train": 0.6, "val": 0.2, "test": 0.2}, 3)
    assert sum(len(part) for part in parts.values()) == 220
    owners = [set(part.fields) for part in parts.values()]
    assert not owners[0] & owners[1]
    assert not owners[1] & owners[2]
    assert [len(owner) for owner in owners] == [7, 2, 2]
    assert all(part.counts.min() > 0 for part in parts.values())
    other = split_by_field(series, {"train": 0.6, "val": 0.2, "test": 0.2}, 4)
    assert set(other["test"].fields) != owners[2]
    with pytest.raises(DataError, match="b needs a field for each of train, val, test, it has 2"):
        split_by_field(labelled(["1", "2", "3", "4", "5"], [0, 0, 0, 1, 1]), {"train": 0.5, "val": 0.2, "test": 0.3}, 0)
    with pytest.raises(DataError, match="1 has no label"):
        split_by_field(labelled(["1", "2"], [0, -1]), {"train": 0.5, "test": 0.5}, 0)
    with pytest.raises(DataError, match="there are labels b, but the classes are a, c"):
        series.with_classes(("a", "c"))


def test_indices_by_hand():
    found = vegetation_indices({"B3": 0.08, "B4": 0.05, "B5": 0.12, "B8": 0.45})
    assert found["wdvi"] == pytest.approx(0.375)
    assert found["lai"] == pytest.approx(-2 * np.log(0.625))
    assert found["tcari"] == pytest.approx(3 * (0.07 - 0.2 * 0.04 * 2.4))
    assert found["osavi"] == pytest.approx(1.16 * 0.40 / 0.66)
    assert found["tcari_osavi"] == pytest.approx(found["tcari"] / found["osavi"])
    bare = vegetation_indices({"B3": 0.1, "B4": 0.3, "B5": 0.2, "B8": 0.3}, soil_slope=1.5)
    assert bare["lai"] == 0  # not below 0, though WDVI is
    dense = vegetation_indices({"B3": 0.1, "B4": 0.0, "B5": 0.2, "B8": 0.9}, wdvi_inf=0.6)
    assert dense["lai"] == pytest.approx(-2 * np.log(1e-3))
    with pytest.raises(DataError, match="need the bands B3, B4, B5, B8; missing: B3, B5"):
        vegetation_indices({"B4": 0.1, "B8": 0.1})
    with pytest.raises(DataError, match=r"B8 must be a reflectance in \[0, 1\], got up to 4500: divide by 10000"):
        vegetation_indices({"B3": 800, "B4": 500, "B5": 1200, "B8": 4500} | {"B3": 0.1, "B4": 0.1, "B5": 0.1})
    with pytest.raises(ValueError, match=r"must be positive, clamp at most 1, got 0, 1.0, 0.001"):
        vegetation_indices({"B3": 0.1, "B4": 0.1, "B5": 0.1, "B8": 0.1}, extinction=0)


def test_gaps_are_filled_on_the_grid():
    days, values = np.array([0.0, 10.0, 20.0, 30.0]), np.array([[1.0], [np.nan], [3.0], [0.0]])
    np.testing.assert_allclose(fill_gaps(days, values, np.array([-5.0, 10.0, 25.0, 40.0]))[:, 0], [1, 2, 1.5, 0])
    with pytest.raises(DataError, match="only 1 observations without clouds, at least 2 are needed"):
        fill_gaps(days[:2], values[:2], days)


def season(count: int, *, columns: tuple[str, ...] = ("B3", "B4", "B5", "B8"), pixels: int = 2) -> SeriesSet:
    days = np.linspace(3, 87, count)
    values = np.tile([0.08, 0.05, 0.12, 0.45], (count, 1))[:, : len(columns)]
    names = tuple(f"p{number}" for number in range(pixels))
    whole = tuple(values.copy() for _ in names)
    return SeriesSet(names, names, (), np.full(pixels, -1), columns, tuple(days for _ in names), whole)


def test_observations_become_standing_series():
    series = season(12)
    series.values[1][3] = [0.2, 0.3, 0.25, 0.3]  # bare soil: its chlorophyll says nothing and is left out
    transform = SentinelTimeSeries(step=7).fitted(series)
    grid = transform(series)
    assert (transform.start, transform.end) == (3, 87)
    assert grid.days.tolist() == list(range(3, 88, 7))
    assert grid.features == ("LAI", "LCC")
    assert grid.values.dtype == np.float32
    np.testing.assert_allclose(grid.values[0, 0], -2 * np.log(0.625), rtol=1e-6)
    np.testing.assert_allclose(grid.values[1, 1], grid.values[0, 1], rtol=1e-6)
    assert grid.values[1, 0].min() < 0.3
    logs = SentinelTimeSeries(start=3, end=87, step=7, chlorophyll=(1.0, -2.0))(series).values[0, 1]
    np.testing.assert_allclose(logs, 1 - 2 * np.log(grid.values[0, 1]), rtol=1e-5)
    columns = SentinelTimeSeries(features="columns", start=3, end=87, step=7)(series)
    assert columns.features == ("B3", "B4", "B5", "B8")
    # A parabola passes the filter as it is.
    bent = season(12, columns=("x",), pixels=1)
    bent.values[0][:, 0] = (bent.days[0] / 10) ** 2
    fine = {"features": "columns", "start": 3, "end": 87, "step": 84 / 11}
    smooth = SentinelTimeSeries(**fine, smooth=5)(bent).values
    np.testing.assert_allclose(smooth, SentinelTimeSeries(**fine)(bent).values, rtol=1e-5)


def test_pixels_without_observations_are_left_out():
    series = season(12)
    series.values[0][1:] = np.nan
    grid = SentinelTimeSeries(start=0, end=80)(series)
    assert grid.rows.tolist() == [1]
    assert [(each.path, each.reason[:21]) for each in grid.skipped] == [("p0", "only 1 observations w")]
    series.values[1][:] = np.nan
    with pytest.raises(DataError, match="none of the series can be used; first: p0: only 1"):
        SentinelTimeSeries(start=0, end=80)(series)
    with pytest.raises(DataError, match="missing: B3, B5"):
        SentinelTimeSeries(start=0, end=80)(season(9, columns=("B4", "B8")))
    scaled = season(9)
    scaled.values[0][:, 3] = 4500
    with pytest.raises(DataError, match="B8 must be a reflectance"):
        SentinelTimeSeries(features="columns", start=0, end=80)(scaled)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 0, "end": 30}, "at least 8 steps, got 7 from day 0 to 30 every 5 days"),
        ({"step": 0}, "step must be positive, got 0"),
        ({"smooth": 4}, "smooth must be 0, or odd and at least 3, got 4"),
        ({"features": "bands"}, "features must be 'indices' or 'columns', got 'bands'"),
    ],
)
def test_impossible_grids_are_named(options: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        SentinelTimeSeries(**options)
    with pytest.raises(ValueError, match="start and end must be given, or chosen by fitted"):
        _ = SentinelTimeSeries().grid


def test_simulated_seasons_show_their_stress():
    seasons = simulate_wheat_season(90, 0, fields=9, field_effect=0.0)
    series = seasons.series
    assert series.counts.tolist() == [30, 30, 30]
    assert len(set(series.fields)) == 9
    rust = series.labels == CLASSES.index("yellow rust")
    assert np.isnan(seasons.onset[~rust]).all()
    assert seasons.onset[rust].min() >= 110
    grid = SentinelTimeSeries(start=0, end=200)(series)
    leaves, ratio = (
        np.stack([grid.values[series.labels == label, channel].mean(0) for label in range(3)]) for channel in (0, 1)
    )
    before, after = grid.days == 100, grid.days == 165
    healthy, hungry, rusty = range(3)
    assert leaves[hungry, before] < 0.9 * leaves[healthy, before]
    assert ratio[hungry, before] > 1.2 * ratio[healthy, before]
    assert abs(ratio[rusty, before] / ratio[healthy, before] - 1) < 0.05
    assert ratio[rusty, after] > 1.1 * ratio[healthy, after]
    again = simulate_wheat_season(90, 0, fields=9, field_effect=0.0).series
    np.testing.assert_array_equal(again.values[5], series.values[5])
    with pytest.raises(ValueError, match="at least 3 fields and a pixel in each, got 2 and 90"):
        simulate_wheat_season(90, fields=2)
