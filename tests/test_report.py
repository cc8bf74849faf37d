from __future__ import annotations

import base64
import io
import json
import math
import re
import subprocess
import sys
import wave
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from convatlas.report import (
    Bars,
    Claim,
    Files,
    Heatmap,
    Images,
    Lines,
    Note,
    Part,
    Report,
    Scatter,
    Section,
    Sounds,
    Table,
)
from convatlas.report.figures import draw

NAN = math.nan
VOID = {"meta", "img", "br", "hr", "link", "input", "source", "col", "wbr"}
FIGURE = r'<svg\b(?=[^>]*role="img").*?</svg>'
HOSTILE = '<script>alert("&1")</script>'


class Page(HTMLParser):
    """Reads a page, checks that every tag is closed in order, and keeps what the tests ask about."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1:] == [tag], f"</{tag}> closes {self.open}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    def having(self, css_class: str) -> list[dict[str, str | None]]:
        return [attrs for _, attrs in self.tags if css_class in (attrs.get("class") or "").split()]


def report(*parts: Part, **options: Any) -> Report:
    return Report("Title", "Summary.", [Section("Section", parts)], **options)


def page(*parts: Part) -> Page:
    return Page(report(*parts).to_html())


def svgs(*parts: Part) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(text) for text in re.findall(FIGURE, report(*parts).to_html(), re.S)]


def svg_text(root: ElementTree.Element) -> list[str]:
    return ["".join(node.itertext()) for node in root.iter() if node.tag.rpartition("}")[2] == "text"]


def part_json(part: Part) -> dict[str, Any]:
    return json.loads(report(part).to_json())["sections"][0]["parts"][0]  # type: ignore[no-any-return]


def terminal(item: Report, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    item.to_terminal(console)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def judge(value: float | Sequence[float], **options: Any) -> Claim:
    if "at_least" not in options and "at_most" not in options:
        options["at_least"] = 0.9
    options.setdefault("seeds", len(value) if isinstance(value, Sequence) else 1)
    return Claim.judge("It works", published="it works", statistic="test accuracy", value=value, **options)


def parts() -> list[Part]:
    rng = np.random.default_rng(0)
    return [
        judge([0.91, 0.93, 0.95]),
        Table("Models", ["model", "latency [ms]"], [["a", 1.25], ["b", None]]),
        Lines("Loss", "epoch", "loss", {"train": ([1, 2, 3], [2.0, 1.0, 0.5]), "val": ([1, 3], [2.0, 0.9])}),
        Lines("Accuracy", "epoch", "accuracy", {"train": ([1, 2, 3], [0.5, 0.7, 0.9])}),
        Scatter("Trade-off", "latency [ms]", "accuracy", {"a": (1.0, 0.9), "b": (10.0, 0.95)}, log_x=True, front=["a"]),
        Bars("Speed", "images per second", {"a": 100.0, "b": 250.0}),
        Heatmap("Confusion", np.arange(9).reshape(3, 3), ["x", "y", "z"], ["x", "y", "z"], "predicted", "true"),
        Images("Mistakes", [(rng.integers(0, 256, (8, 8), dtype=np.uint8), "a 3 taken for an 8")]),
        Sounds("Voices", [(np.sin(np.arange(80.0)), 8000, "a voice")]),
        Files("Files", {"metrics": "metrics.csv"}),
        Note("A note."),
    ]


# -- claims ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "bound", "verdict"),
    [
        (0.9, {"at_least": 0.9}, "holds"),
        (math.nextafter(0.9, 0), {"at_least": 0.9}, "does not hold"),
        (math.nextafter(0.9, 1), {"at_least": 0.9}, "holds"),
        (5.0, {"at_most": 5.0}, "holds"),
        (math.nextafter(5.0, 9), {"at_most": 5.0}, "does not hold"),
        (math.inf, {"at_least": 30.0}, "holds"),
        (math.inf, {"at_most": 30.0}, "does not hold"),
        (0.0, {"at_least": 0.0}, "holds"),
        (NAN, {"at_least": 0.9}, "cannot be told at this scale"),
        (NAN, {"at_most": 0.9}, "cannot be told at this scale"),
        ([0.8, 0.9, 1.0], {"at_least": 0.9}, "holds"),
        ([0.1, 0.1, 0.1], {"at_least": 0.1}, "holds"),
        ([0.8, 0.9, 0.99], {"at_least": 0.9}, "does not hold"),
        ([0.95, NAN, 0.95], {"at_least": 0.9}, "cannot be told at this scale"),
    ],
)
def test_verdict_follows_from_the_value(value: float | list[float], bound: dict[str, float], verdict: str) -> None:
    assert judge(value, **bound).verdict == verdict


def test_too_small_a_scale_leaves_the_verdict_open_either_way() -> None:
    assert judge(0.99, scale_ok=False).verdict == "cannot be told at this scale"
    assert judge(0.10, scale_ok=False).verdict == "cannot be told at this scale"


def test_judge_tells_what_was_measured_and_the_threshold() -> None:
    claim = judge([97.5, 98.0, 98.8], at_least=98.0, unit="%")
    assert claim.measured == "98.1 % (mean of 3 seeds, 97.5 to 98.8)"
    assert claim.threshold == "at least 98 %"
    assert (claim.seeds, claim.values) == (3, (97.5, 98.0, 98.8))
    assert judge(1.52, at_most=2.0, unit="ms").measured == "1.52 ms"
    assert judge(1.52, at_most=2.0, unit="ms").threshold == "at most 2 ms"


def test_a_near_miss_is_written_with_the_digits_that_tell_it_from_the_threshold() -> None:
    assert judge(0.97999999, at_least=0.98).measured == "0.97999999"


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        (1.0, {"at_least": 1.0, "at_most": 2.0}, "exactly one of at_least and at_most"),
        (1.0, {"at_least": None}, "exactly one of at_least and at_most"),
        (1.0, {"at_least": NAN}, "at_least must be a finite number, got nan"),
        (1.0, {"seeds": -1}, "seeds must be 0 or more, got -1"),
        ([1.0, 2.0], {"seeds": 3}, "value must hold one number per seed, got 2 for 3 seeds"),
        ([], {"seeds": 0}, "value must hold at least one number"),
    ],
)
def test_judge_refuses(value: float | list[float], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judge(value, **options)


def test_a_claim_knows_only_three_verdicts() -> None:
    with pytest.raises(ValueError, match=r"verdict must be one of 'holds', .*, got 'maybe'"):
        Claim("s", "p", "m", "t", "s", 3, "maybe")  # type: ignore[arg-type]


def test_report_lists_its_claims_in_order() -> None:
    first, second, third = judge(0.95), judge(0.5), judge(NAN)
    item = Report("T", "S", [Section("A", [Note("n"), first, second]), Section("B", [third])])
    assert item.claims == (first, second, third)


# -- tables ------------------------------------------------------------------------------------------------------------


def column(*values: Any, **options: Any) -> list[str]:
    table = Table("T", ["name", "x"], [[f"row{i}", value] for i, value in enumerate(values)], **options)
    lines = [line for line in terminal(report(table)).splitlines() if "row" in line]
    return [line.strip(" │|┃").split()[-1] for line in lines]


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([0.98317, 0.5], ["0.9832", "0.5000"]),
        ([461234, 25557032], ["461,234", "25,557,032"]),
        ([12.3456, 1.2], ["12.35", "1.20"]),
        ([0.5, 0.25], ["0.50", "0.25"]),
        ([1.0, 2.0], ["1.0", "2.0"]),
        ([123456.789, 2345.5], ["123,457", "2,346"]),
        ([1e-7, 2.5, 1e7], ["1e-7", "2.5", "10,000,000"]),
        ([0.0, 0.001234], ["0.000000", "0.001234"]),
        ([NAN, math.inf, -math.inf], ["nan", "inf", "-inf"]),
        ([None, 3], ["-", "3"]),
        ([np.float32(0.5), np.int64(1200)], ["0.5", "1,200"]),
        ([True, False], ["yes", "no"]),
        ([-0.25, 7.5], ["-0.25", "7.50"]),
    ],
)
def test_numbers_of_a_column_share_sensible_digits(values: list[Any], shown: list[str]) -> None:
    assert column(*values) == shown


def test_numbers_are_right_aligned_and_units_stand_apart() -> None:
    read = page(Table("Models", ["model", "latency [ms]", "parameters"], [["a", 1.25, 1000], ["b", None, 5]]))
    assert [th.get("class") for th in read.all("th")[:3]] == [None, "number", "number"]
    assert len(read.all("th")) == 5  # three column heads and two row heads
    assert [td.get("class") for td in read.all("td")] == ["number"] * 4
    assert "latency ms" in read.text
    assert "1,000" in read.text
    assert [span.get("class") for span in read.all("span")].count("unit") == 1


def test_a_table_marks_the_best_of_a_column() -> None:
    rows = [["a", 0.9, 3.0], ["b", 0.95, 2.0], ["c", 0.95, None]]
    table = Table(
        "T", ["model", "accuracy", "latency [ms]"], rows, highlight={"accuracy": "max", "latency [ms]": "min"}
    )
    html = report(table).to_html()
    assert re.findall(r'<td class="number best">([^<]*)<', html) == ["0.95", "2.0", "0.95"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((["a", "b"], [[1, 2], [1]]), ValueError, r"row 1 of table 'T' must have 2 cells, got 1"),
        ((["a", "b"], [[1, 2, 3]]), ValueError, r"row 0 of table 'T' must have 2 cells, got 3"),
        (([], []), ValueError, "table 'T' must have at least one column"),
        ((["a", "a"], []), ValueError, "column names of table 'T' must differ, got 'a' twice"),
        ((["a"], [[1j]]), TypeError, "cells of table 'T' must be str, int, float or None, got complex in column 'a'"),
        ((["a"], [[1]], "", {"b": "max"}), ValueError, "highlight of table 'T' names the unknown column 'b'"),
        ((["a"], [[1]], "", {"a": "best"}), ValueError, "highlight must be 'max' or 'min', got 'best'"),
    ],
)
def test_table_refuses(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Table("T", *arguments)


def test_an_empty_table_is_shown() -> None:
    assert "model" in page(Table("T", ["model"], [])).text
    assert "model" in terminal(report(Table("T", ["model"], [])))


# -- the page ----------------------------------------------------------------------------------------------------------


def test_page_is_one_valid_self_contained_file() -> None:
    html = report(*parts()).to_html()
    read = Page(html)
    assert html.startswith("<!doctype html>")
    assert read.all("html")[0]["lang"] == "en"
    assert any(meta.get("name") == "viewport" for meta in read.all("meta"))
    assert not read.all("link")
    assert not read.all("script")
    assert not read.all("iframe")
    assert "@import" not in html
    assert "@font-face" not in html
    for tag, attrs in read.tags:
        for name in ("src", "href", "xlink:href", "action", "srcset", "data"):
            value = attrs.get(name) or ""
            assert not re.match(r"\s*(\w+:)?//|\s*(http|javascript)", value), (tag, value)
            assert not value.startswith("data:") or value.startswith(
                ("data:image/png;base64,", "data:audio/wav;base64,")
            )
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    assert "prefers-color-scheme" in html


def test_no_id_stands_twice_and_every_reference_is_met() -> None:
    html = report(*parts(), *parts()).to_html()
    ids = [attrs["id"] for _, attrs in Page(html).tags if attrs.get("id")]
    assert len(ids) == len(set(ids))
    assert len(ids) > 8
    used = re.findall(r"url\(#([^)]+)\)", html) + re.findall(r'href="#([^"]+)"', html)
    assert used
    assert set(used) <= set(ids)


def test_headings_come_in_order() -> None:
    levels = [int(tag[1]) for tag, _ in page(*parts()).tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))


def test_figures_are_named_for_those_who_cannot_see_them() -> None:
    read = page(*parts())
    pictures = [svg for svg in read.all("svg") if svg.get("role") == "img"]
    assert len(pictures) == 5
    assert pictures[0]["aria-label"] == "Loss: loss against epoch, for train, val"
    assert pictures[3]["aria-label"] == "Speed: images per second: a 100.0, b 250.0"
    assert pictures[4]["aria-label"] == "Confusion: true (3) against predicted (3)"
    assert read.all("img")[0]["alt"] == "a 3 taken for an 8"


def test_page_is_the_same_each_time() -> None:
    assert report(*parts()).to_html() == report(*parts()).to_html()


def test_hostile_text_is_harmless_everywhere() -> None:
    h = HOSTILE
    item = Report(
        h,
        h,
        [
            Section(
                h,
                [
                    Claim.judge(h, published=h, statistic=h, value=1.0, at_least=0.0, seeds=1, unit=h),
                    Table(h, [h, "x [<b>]"], [[h, 1]], caption=h),
                    Lines(h, h, h, {h: ([1, 2], [1, 2]), "_hidden $x": ([1, 2], [2, 1])}),
                    Scatter(h, h, h, {h: (1, 2), "$\\broken{": (2, 2)}),
                    Bars(h, h, {h: 1}),
                    Heatmap(h, [[1, 2], [3, 4]], [h, "b"], [h, "b"], h, h),
                    Images(h, [(np.zeros((2, 2), np.uint8), h)], caption=h),
                    Files(h, {h: 'x" onclick="alert(1)', "script": "javascript:alert(1)"}),
                    Note(h),
                ],
            )
        ],
        provenance={h: h},
    )
    html = item.to_html()
    read = Page(html)
    assert not read.all("script")
    assert not read.all("b")
    assert not [attrs for _, attrs in read.tags if any(name.startswith("on") for name in attrs)]
    assert read.text.count("<script>") >= 15
    assert HOSTILE in terminal(item, width=300)
    assert json.loads(item.to_json())["title"] == h


def test_control_characters_and_broken_unicode_do_not_break_the_page() -> None:
    bad = "a\x00b\x1b[31mc\udcffd"
    item = Report(bad, bad, [Section(bad, [Bars(bad, bad, {bad: 1.0}), Table(bad, [bad], [[bad]]), Note(bad)])])
    html = item.to_html()
    html.encode()
    Page(html)
    assert "\x00" not in html
    assert "\x1b" not in html
    assert "\x1b" not in terminal(item)
    assert json.loads(item.to_json())["title"] == bad


# -- figures -----------------------------------------------------------------------------------------------------------


def test_svgs_keep_text_as_text_and_take_the_pages_colours() -> None:
    (root, *_) = svgs(Bars("Speed", "images per second", {"resnet": 100.0, "hornet": 250.0}))
    assert {"resnet", "hornet", "images per second"} <= set(svg_text(root))
    xml = ElementTree.tostring(root, encoding="unicode")
    assert "var(--ink" in xml
    assert "var(--c1" in xml
    assert re.findall(r"(?<!, )#[0-9a-f]{6}", xml) == []  # each colour is a fallback behind a variable of the page
    assert "metadata" not in xml


def test_lines_show_each_series_and_name_it() -> None:
    figure = parts()[2]
    read = page(figure)
    assert len(read.having("swatch")) == 2
    assert "train" in read.text
    assert "val" in read.text
    assert {"epoch", "loss"} <= set(svg_text(svgs(figure)[0]))


def test_more_series_than_colours_stay_apart() -> None:
    figure = Lines("L", "x", "y", {f"s{i}": ([0, 1], [i, i + 1]) for i in range(20)})
    html = report(figure).to_html()
    swatches = re.findall(r'<svg class="swatch".*?</svg>', html, re.S)
    assert len(set(swatches)) == 20


@pytest.mark.parametrize(
    "figure",
    [
        Lines("L", "x", "y", {}),
        Lines("L", "x", "y", {"a": ([], [])}),
        Lines("L", "x", "y", {"a": ([1], [NAN])}),
        Lines("L", "x", "y", {"a": ([1, 2], [0.0, -1.0])}, log_y=True),
        Scatter("S", "x", "y", {}),
        Scatter("S", "x", "y", {"a": (NAN, 1.0)}),
        Scatter("S", "x", "y", {"a": (0.0, 1.0)}, log_x=True),
        Bars("B", "y", {}),
        Bars("B", "y", {"a": NAN}),
        Heatmap("H", np.zeros((0, 0)), [], [], "x", "y"),
        Images("I", []),
        Files("F", {}),
    ],
    ids=lambda part: type(part).__name__,
)
def test_nothing_to_draw_is_said(figure: Part) -> None:
    assert "Nothing to show" in page(figure).text
    terminal(report(figure))
    json.loads(report(figure).to_json())


def test_one_point_and_gaps_are_drawn() -> None:
    figure = Lines("L", "x", "y", {"one": ([1], [2.0]), "gap": ([1, 2, 3], [1.0, NAN, math.inf])})
    assert "Nothing to show" not in page(figure).text


def test_bands_are_areas_in_the_colour_of_their_series() -> None:
    band = ([1, 2, 3], [0, 1, 0], [2, 3, 2])
    figure = Lines("L", "x", "y", {"a": ([1, 2, 3], [1, 2, 1]), "b": ([1, 3], [5, 5])}, bands={"b": band})
    assert part_json(figure)["bands"] == {"b": {"x": [1, 2, 3], "low": [0, 1, 0], "high": [2, 3, 2]}}
    assert 'class="card wide"' in report(figure).to_html()
    styles = [node.get("style", "") for node in svgs(figure)[0].iter()]
    assert any("var(--c2, #d55e00)" in style and "opacity: 0.2" in style for style in styles)
    with pytest.raises(ValueError, match="band 'c' must belong to a series"):
        Lines("L", "x", "y", {"a": ([1], [1])}, bands={"c": band})
    with pytest.raises(ValueError, match="equally many x values and bounds"):
        Lines("L", "x", "y", {"a": ([1], [1])}, bands={"a": ([1], [1, 2], [3])})


def test_log_axis_leaves_out_what_it_cannot_show() -> None:
    root = svgs(Lines("L", "x", "y", {"a": ([1, 2, 3], [0.0, 0.01, 10.0])}, log_y=True))[0]
    assert {"0.01", "1", "10"} <= set(svg_text(root))


@pytest.mark.parametrize("classes", [2, 10, 200, 1000])
def test_confusion_matrix_stays_legible(classes: int) -> None:
    values = np.eye(classes, dtype=int) * 7
    names = [f"class{i}" for i in range(classes)]
    html = report(Heatmap("Confusion", values, names, names, "predicted", "true")).to_html()
    root = ElementTree.fromstring(re.findall(FIGURE, html, re.S)[0])
    texts = svg_text(root)
    assert texts.count("7") == (classes if classes <= 10 else 1)  # one on the colour scale
    assert ("class1" in texts) == (classes <= 10)
    assert len(texts) < 150
    assert {"predicted", "true"} <= set(texts)
    assert len(html) < 200_000


def test_heatmap_of_fractions_has_short_numbers() -> None:
    texts = svg_text(svgs(Heatmap("H", [[0.98333, 0.01667], [NAN, 1.0]], ["a", "b"], ["a", "b"], "x", "y"))[0])
    assert {"0.98", "0.02", "1.00"} <= set(texts)


def test_a_long_heatmap_is_reduced_along_its_long_side_only() -> None:
    values = np.zeros((700, 2))
    values[699, 1] = 5.0
    html = report(Heatmap("H", values, [""] * 700, ["a", "b"], "x", "y")).to_html()
    assert "Each dot shows the largest of 3 \u00d7 1 values." in Page(html).text
    data = re.findall(r'href="data:image/png;base64,([^"]+)"', html)[0]
    strength = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))[..., 3]
    assert strength.shape == (234, 2)
    assert np.argwhere(strength).tolist() == [[233, 1]]


def test_heatmap_without_annotation() -> None:
    texts = svg_text(svgs(Heatmap("H", [[31, 47]], ["a"], ["b", "c"], "x", "y", annotate=False))[0])
    assert "31" not in texts
    assert {"a", "b", "c"} <= set(texts)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Lines("L", "x", "y", {"a": ([1, 2], [1])}), "series 'a' must have as many x as y values, got 2 and 1"),
        (lambda: Heatmap("H", [1, 2], ["a"], ["b"], "x", "y"), "values of heatmap 'H' must have 2 dimensions, got 1"),
        (lambda: Heatmap("H", [["1"]], ["a"], ["b"], "x", "y"), "values of heatmap 'H' must be real numbers, got <U1"),
        (lambda: Heatmap("H", [[1, 2]], ["a", "b"], ["a", "b"], "x", "y"), "row_labels .* must be 1 name.*, got 2"),
        (lambda: Heatmap("H", [[1, 2]], ["a"], ["b"], "x", "y"), "column_labels .* must be 2 name.*, got 1"),
        (lambda: Images("I", [(np.zeros((2, 2)), "a")]), "image 0 of 'I' must be uint8, got float64"),
        (
            lambda: Images("I", [(np.zeros((3, 8, 8), np.uint8), "a")]),
            r"must be \(H, W\) or \(H, W, 3\), got \(3, 8, 8\)",
        ),
        (lambda: Images("I", [(np.zeros((0, 8), np.uint8), "a")]), r"must have pixels, got \(0, 8\)"),
        (
            lambda: Sounds("S", [(np.zeros((1, 8)), 8, "a")]),
            r"sound 0 of 'S' must be floats \(T,\), got float64 \(1, 8\)",
        ),
        (lambda: Sounds("S", [(np.full(8, NAN), 8, "a")]), "sound 0 of 'S' must have samples, all of them finite"),
        (lambda: Sounds("S", [(np.zeros(8), 0, "a")]), "sample rate of sound 0 of 'S' must be positive, got 0"),
        (lambda: Files("F", {"a": "/etc/passwd"}), "must be relative to the report's folder, got '/etc/passwd'"),
        (lambda: Section("", []), "title of a section must not be empty"),
        (lambda: Report("", "s", []), "title of a report must not be empty"),
    ],
)
def test_bad_parts_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_a_section_holds_only_parts() -> None:
    with pytest.raises(TypeError, match="section 'A' must hold report parts such as Table or Note, got str"):
        Section("A", ["text"])  # type: ignore[list-item]


@pytest.mark.parametrize("shape", [(8, 8), (32, 32, 3)])
def test_images_come_back_pixel_for_pixel(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    image = page(Images("I", [(pixels, "caption")])).all("img")[0]
    data = (image["src"] or "").removeprefix("data:image/png;base64,")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), pixels)
    assert "pixelated" in (image["class"] or "").split()


def test_photographs_are_made_smaller_and_smooth() -> None:
    image = page(Images("I", [(np.zeros((1200, 2400, 3), np.uint8), "caption")])).all("img")[0]
    data = (image["src"] or "").removeprefix("data:image/png;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (800, 400)
    assert "pixelated" not in (image.get("class") or "")


def test_sounds_come_back_sample_for_sample() -> None:
    levels = np.array([0, 1, -1, 32767, -32767, 1234])
    read = page(Sounds("S", [(np.append(levels / 32767, 3.0), 11025, "one")]))
    (player,) = read.all("audio")
    data = base64.b64decode((player["src"] or "").removeprefix("data:audio/wav;base64,"))
    with wave.open(io.BytesIO(data)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (11025, 1, 2)
        np.testing.assert_array_equal(np.frombuffer(file.readframes(99), "<i2"), [*levels, 32767])
    assert "one" in read.text


def test_parts_keep_their_own_copy_of_the_data() -> None:
    pixels, values, xs = np.zeros((2, 2), np.uint8), np.zeros((1, 1)), [1.0]
    images, heatmap = Images("I", [(pixels, "a")]), Heatmap("H", values, ["a"], ["b"], "x", "y")
    lines = Lines("L", "x", "y", {"a": (xs, [2.0])})
    pixels[:], values[:], xs[0] = 9, 9, 9
    assert images.images[0][0].max() == 0
    assert heatmap.values.max() == 0
    assert part_json(lines)["series"]["a"] == {"x": [1.0], "y": [2.0]}


# -- JSON and files ----------------------------------------------------------------------------------------------------


def test_json_holds_everything_but_pixels_and_samples() -> None:
    item = report(*parts(), provenance={"device": "cpu"})
    data = json.loads(item.to_json())
    assert set(data) == {"format", "title", "summary", "sections", "claims", "provenance"}
    assert data["provenance"] == {"device": "cpu"}
    kinds = [part["kind"] for part in data["sections"][0]["parts"]]
    assert kinds[:9] == ["claim", "table", "lines", "lines", "scatter", "bars", "heatmap", "images", "sounds"]
    assert kinds[9:] == ["files", "note"]
    by_kind = {part["kind"]: part for part in data["sections"][0]["parts"]}
    assert by_kind["images"]["images"] == [{"caption": "a 3 taken for an 8", "shape": [8, 8]}]
    assert by_kind["sounds"]["sounds"] == [{"caption": "a voice", "sample_rate": 8000, "seconds": 0.01}]
    assert by_kind["heatmap"]["values"] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert by_kind["scatter"]["points"]["b"] == {"x": 10.0, "y": 0.95}
    assert by_kind["bars"]["values"] == {"a": 100.0, "b": 250.0}
    assert by_kind["table"]["rows"] == [["a", 1.25], ["b", None]]
    assert data["claims"] == [{key: value for key, value in by_kind["claim"].items() if key != "kind"}]
    assert data["claims"][0]["values"] == [0.91, 0.93, 0.95]


def test_json_has_null_for_what_is_no_number() -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    item = report(
        judge(NAN),
        Table("T", ["a"], [[NAN], [math.inf]]),
        Lines("L", "x", "y", {"a": ([1, 2], [NAN, -math.inf])}),
        Bars("B", "y", {"a": NAN}),
        Heatmap("H", [[NAN, 1.0]], ["a"], ["b", "c"], "x", "y"),
        Scatter("S", "x", "y", {"a": (NAN, 1.0)}),
    )
    found = json.loads(item.to_json(), parse_constant=refuse)["sections"][0]["parts"]
    assert found[0]["values"] == [None]
    assert found[1]["rows"] == [[None], [None]]
    assert found[2]["series"]["a"]["y"] == [None, None]
    assert found[3]["values"] == {"a": None}
    assert found[4]["values"] == [[None, 1.0]]
    assert found[5]["points"]["a"] == {"x": None, "y": 1.0}


def test_save_writes_both_files_whole(tmp_path: Path) -> None:
    item = report(*parts())
    path = item.save(tmp_path / "new" / "run")
    assert path == tmp_path / "new" / "run" / "report.html"
    assert sorted(file.name for file in path.parent.iterdir()) == ["report.html", "report.json"]
    assert path.read_text(encoding="utf-8") == item.to_html()
    assert json.loads((path.parent / "report.json").read_text()) == json.loads(item.to_json())


def test_a_save_that_fails_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report(Note("old")).save(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("convatlas.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        report(Note("new")).save(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_files_are_relative_links() -> None:
    read = page(Files("Files", {"metrics": "a folder/metrics #1.csv", "checkpoint": Path("checkpoints/best.pt")}))
    assert [a["href"] for a in read.all("a")][-2:] == ["a%20folder/metrics%20%231.csv", "checkpoints/best.pt"]


# -- terminal ----------------------------------------------------------------------------------------------------------


def test_terminal_shows_every_part() -> None:
    shown = terminal(report(*parts(), provenance={"device": "cpu"}))
    for words in ("Title", "Summary.", "holds", "It works", "latency", "1.25", "figure: Loss (see report.html)"):
        assert words in shown
    for words in (
        "figure: Confusion",
        "figure: Mistakes",
        "1 sound: Voices",
        "metrics.csv",
        "A note.",
        "250",
        "device: cpu",
    ):
        assert words in shown


def test_terminal_cuts_a_wide_table_into_readable_ones() -> None:
    names = [f"column {i} [ms]" for i in range(9)]
    table = Table("T", ["model", *names], [["some_model_name", *range(1000, 1009)]], caption="The caption.")
    lines = terminal(report(table), width=60).splitlines()
    assert max(map(len, lines)) <= 60
    assert sum("some_model_name" in line for line in lines) > 1
    for i in range(9):
        assert sum(f"column {i}" in line for line in lines) == 1
        assert sum(f"1,00{i}" in line for line in lines) == 1
    assert sum("The caption." in line for line in lines) == 1


def test_terminal_leaves_markup_of_the_user_alone() -> None:
    shown = terminal(report(Table("[red]T", ["[bold]x"], [["[/]"]]), Note("[link=x]")))
    assert "[red]T" in shown
    assert "[/]" in shown
    assert "[link=x]" in shown


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_terminal_works_in_a_pipe_without_colour(encoding: str) -> None:
    code = (
        "from convatlas.report import *\n"
        "parts = [Bars('B', 'y', {'caf\\u00e9': 1.5, 'b': float('nan'), 'c': -1.0}), Table('T', ['a'], [[None]]),\n"
        "  Claim.judge('s', published='p', statistic='t', value=1.0, at_least=0.0, seeds=0)]\n"
        "Report('T', 'S \\u2713', [Section('A', parts)]).to_terminal()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path), "PYTHONIOENCODING": encoding, "NO_COLOR": "1", "TERM": "dumb"},
    )
    shown = done.stdout.decode(encoding)
    assert "holds" in shown
    assert "1.5" in shown
    assert "\x1b" not in shown


def test_importing_the_report_is_light() -> None:
    code = (
        "import sys, convatlas.report as r\n"
        "heavy = {'torch', 'matplotlib', 'jinja2', 'rich', 'PIL'}\n"
        "r.Report('T', 'S', [r.Section('A', [r.Bars('B', 'y', {'a': 1.0})])]).to_json()\n"
        "print(sorted(heavy & set(sys.modules)))\n"
        "r.Report('T', 'S', [r.Section('A', [r.Bars('B', 'y', {'a': 1.0})])]).to_html()\n"
        "print(sorted({'torch', 'matplotlib.pyplot'} & set(sys.modules)))\n"
    )
    path = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=path)
    assert done.stdout.splitlines() == ["[]", "[]"]


def test_drawing_leaves_the_users_matplotlib_settings_alone() -> None:
    import matplotlib

    with matplotlib.rc_context({"font.size": 37.0, "text.parse_math": True}):
        before = dict(matplotlib.rcParams)
        first = report(*parts()).to_html()
        assert dict(matplotlib.rcParams) == before
    assert first == report(*parts()).to_html()


def test_the_front_of_a_scatter_is_filled_and_joined():
    points = {"a": (1.0, 1.0), "b": (2.0, 2.0), "c": (2.0, 0.5)}
    drawings = [draw(Scatter("S", "x", "y", points, front=front), "p-") for front in ((), ("a", "b"))]
    plain, marked = (drawing.svg for drawing in drawings if drawing is not None)
    assert plain.count("fill: none") < marked.count("fill: none")
    assert marked.count("<path") == plain.count("<path") + 1
    assert Scatter("S", "x", "y", points, front=["b"]).front == ("b",)
    with pytest.raises(ValueError, match="front of 'S' must be names of its points, got 'd'"):
        Scatter("S", "x", "y", points, front=["d"])


def test_both_axes_of_lines_can_be_logarithmic():
    lines = Lines("Gap", "latency [ms]", "accuracy [%]", {"a": ((0.1, 100.0), (70.0, 70.0))}, log_x=True)
    drawn = draw(lines, "f1-")
    assert drawn is not None
    assert all(f">{tick}<" in drawn.svg for tick in ("0.1", "1", "10", "100"))
    assert draw(Lines("Gap", "x", "y", {"a": ((0.0, -1.0), (1.0, 1.0))}, log_x=True), "f2-") is None
