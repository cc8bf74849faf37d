"""What reports on forecasts say of intervals that do not hold, of few origins and of unlike runs."""

from __future__ import annotations

import json

import numpy as np
import pytest

from convatlas.report import Report, Section
from convatlas.series.reports import LEVELS, SeriesResult, comparison_sections, quality_sections

ACTUAL = np.random.default_rng(0).standard_normal((30, 2)) + 9


def result(name="a", model="m", width=9.0, error=0.1, actual=ACTUAL, **more):
    signs = np.random.default_rng(len(name) + int(10 * error)).standard_normal(actual.shape)
    forecasts = {model: actual + error * signs, "seasonal_naive": actual - 0.5}
    bounds = actual - width, actual + width
    more = {"stride": 1, "calibration": [100 * level for level in LEVELS], **more}
    return SeriesResult(name, np.arange(40.0), actual, forecasts, *bounds, **more)


def parts(sections: list[Section]) -> dict[str, dict]:
    document = json.loads(Report("r", "", sections, {}).to_json())
    return {part.get("title") or part["text"]: part for section in document["sections"] for part in section["parts"]}


def test_intervals_that_do_not_hold_are_told():
    assert not any("too narrow" in title for title in parts(quality_sections([result()], 0.9)))
    narrow = SeriesResult(
        "a", np.arange(40.0), ACTUAL, {"m": ACTUAL, "naive": ACTUAL}, ACTUAL + 1, ACTUAL + 2, 1, [0.0] * len(LEVELS)
    )
    (note,) = (title for title in parts(quality_sections([narrow], 0.9)) if "too narrow" in title)
    assert note.startswith("Intervals of 90 % hold 0.0 %")


def test_forecasts_drawn_follow_each_other():
    shown = result()
    plot = next(part for part in parts(quality_sections([shown], 0.9)).values() if part["kind"] == "lines")
    assert plot["series"]["m"]["x"] == list(range(40, 70))  # every second origin of two steps
    np.testing.assert_allclose(plot["series"]["m"]["y"][:4], shown.forecasts["m"][[0, 0, 2, 2], [0, 1, 0, 1]])
    assert plot["series"]["actual"]["x"] == list(range(10, 70))


def test_models_are_tested_on_one_held_out_part():
    runs = {"good": [result(), result("b")], "bad": [result(error=1.0), result("b", error=2.0)]}
    found = parts(comparison_sections(runs))
    assert [row[0] for row in found["Models"]["rows"]] == ["good", "seasonal_naive", "bad"]
    assert found["Models"]["rows"][0][3] == 2
    assert found["Tests"]["rows"][0][2] < 0
    few = {label: [result(actual=ACTUAL[:2])] for label in ("one", "other")}
    assert "Too few origins for tests: 2." in parts(comparison_sections(few))
    with pytest.raises(ValueError, match="bad was tested on other values"):
        comparison_sections({"good": [result()], "bad": [result(stride=2)]})
    unknown = ACTUAL.copy()
    unknown[3] = np.nan
    masked = {label: [result(actual=unknown, error=0.1)] for label in ("one", "other")}
    for results in masked.values():
        results[0].forecasts["m"][3] = 1e9
        results[0].forecasts["seasonal_naive"][3] = 1e9
        results[0].low[3], results[0].high[3] = 0, 0
    assert max(row[1] for row in parts(comparison_sections(masked))["Models"]["rows"]) < 20
