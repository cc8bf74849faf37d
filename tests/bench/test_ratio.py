"""Ratios are right, noise is seen, bars are judged by both, and no time stands alone."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from convatlas.bench import ratio
from convatlas.bench.ratio import Bar, Case, Place, Row, backward, compare, forward, judge, places, report


def spin(seconds: float) -> Callable[[], Tensor]:
    """Keep the processor busy for so long, and return one."""

    def call() -> Tensor:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass
        return torch.ones(1)

    return call


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    monkeypatch.setattr(ratio, "WARM_UP", (0.0, 1))
    monkeypatch.setattr(ratio, "SECONDS", (0.0, 0.0))
    monkeypatch.setattr(ratio, "SAMPLE", (0.0, 0.0))


def case(sides: dict[str, Callable[[], object]], **options: object) -> Case:
    return Case("made up", "forward", lambda device: sides, **options)  # type: ignore[arg-type]


# -- measuring ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_short")
def test_a_ratio_is_that_of_the_times():
    sides = {"ours": spin(0.001), "slow": spin(0.003), "fast": spin(0.0005)}
    slow, fast = compare([case(sides)], threads=[1], quick=True)
    assert (slow.ours, slow.theirs, fast.theirs) == ("ours", "slow", "fast")
    assert slow.ratio == pytest.approx(3, rel=0.15)
    assert fast.ratio == pytest.approx(0.5, rel=0.15)
    assert slow.seconds == pytest.approx((0.001, 0.003), rel=0.2)
    assert not slow.busy


@pytest.mark.usefixtures("_short")
def test_chosen_pairs_are_compared_and_those_of_a_missing_side_left_out():
    sides = {"a": spin(0.001), "b": spin(0.002), "c": spin(0.004)}
    rows = compare([case(sides, pairs=[("b", "c"), ("b", "timm")])], threads=[1], quick=True)
    assert [(row.ours, row.theirs) for row in rows] == [("b", "c")]
    assert rows[0].ratio == pytest.approx(2, rel=0.15)


@pytest.mark.usefixtures("_short")
def test_noise_of_one_side_against_itself_is_seen():
    pauses = iter([0.0005, 0.002] * 1000)
    unsteady = {"ours": lambda: spin(next(pauses))(), "theirs": spin(0.001)}
    steady = {"ours": spin(0.001), "theirs": spin(0.001)}
    (noisy,) = compare([case(unsteady)], threads=[1], quick=True)
    (quiet,) = compare([case(steady)], threads=[1], quick=True)
    assert noisy.noise > 0.3
    assert quiet.noise < noisy.noise / 3


@pytest.mark.usefixtures("_short")
def test_both_sides_run_in_turn_at_least_fifteen_times():
    order: list[str] = []
    sides = {name: lambda name=name: (order.append(name), torch.ones(1))[1] for name in ("a", "b")}
    compare([case(sides)], threads=[1], quick=True)
    assert ratio.PAIRS >= 15
    assert min(order.count("a"), order.count("b")) > 15
    timed = "".join(order[-3 * ratio.PAIRS :])  # a, a again and b
    assert "aaaaa" not in timed
    assert "bbb" not in timed


@pytest.mark.usefixtures("_short")
def test_rounds_go_on_while_it_is_noisy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ratio, "SECONDS", (1e9, 1e9))
    monkeypatch.setattr(ratio, "_ratio", lambda theirs, *others: (1.0, 0.0, 1.0 if len(theirs) < 40 else 0.0))
    calls: list[int] = []
    sides = {"ours": lambda: torch.ones(1), "theirs": lambda: (calls.append(1), torch.ones(1))[1]}
    compare([case(sides)], threads=[1], quick=True)
    assert 40 <= len(calls) < 50


@pytest.mark.usefixtures("_short")
def test_results_that_differ_are_refused_before_timing():
    expected = torch.tensor([1.0, -4.0])
    sides = {"ours": lambda: expected, "theirs": lambda: expected + 4e-4}
    with pytest.raises(ValueError, match=r"the results of theirs and ours differ by 1\.0e-04 of the largest value"):
        compare([case(sides)], threads=[1], quick=True)
    (row,) = compare([case(sides, tolerance=1e-3)], threads=[1], quick=True)
    assert row.difference == pytest.approx(1e-4, rel=1e-3)
    for wrong in (torch.ones(3), torch.tensor([float("nan"), -4.0])):
        with pytest.raises(ValueError, match="forward of made up"):
            compare([case({"ours": lambda: expected, "theirs": lambda wrong=wrong: wrong})], threads=[1], quick=True)


@pytest.mark.usefixtures("_short")
def test_memory_stands_beside_time():
    x = torch.randn(1000)

    def lean(x: Tensor) -> Tensor:
        return x.square()

    def wasteful(x: Tensor) -> Tensor:
        return (x.repeat(4).reshape(4, -1) ** 2).mean(0)

    (row,) = compare([case({"lean": forward(lean, x), "wasteful": forward(wasteful, x)})], threads=[1], quick=True)
    assert row.peak[0] == 4000
    assert row.peak[1] >= 4 * 4000
    assert row.kept == (0, 0)
    (row,) = compare([case({"lean": backward(lean, x), "wasteful": backward(wasteful, x)})], threads=[1], quick=True)
    assert row.kept == (4000, 16000)


def test_backward_gives_the_gradients_of_all_inputs():
    x, y = torch.randn(3, 2), torch.randn(2, 4)
    one, two = backward(torch.mm, x, y)(), backward(torch.mm, x, y)()
    assert [gradient.shape for gradient in one] == [(3, 2), (2, 4)]
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    index = torch.tensor([0, 2])
    (gradient,) = backward(torch.index_select, x, 0, index)()
    assert gradient[1].eq(0).all()


def test_places_are_numbers_of_threads_and_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert places([2, 1, 2]) == [Place("cpu", 2), Place("cpu", 1)]
    assert [str(place) for place in places([1, 2])] == ["1 thread", "2 threads"]
    for wrong in ([], [0], [1, -1]):
        with pytest.raises(ValueError, match="threads must be one number or several of at least 1"):
            places(wrong)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert places([1])[-1].device == "cuda"


@pytest.mark.usefixtures("_short")
def test_threads_are_set_and_put_back():
    seen: list[int] = []

    def call() -> Tensor:
        seen.append(torch.get_num_threads())
        return torch.ones(1)

    before = torch.get_num_threads()
    rows = compare([case({"a": call, "b": call})], threads=[3, 1], quick=True)
    assert [row.place.threads for row in rows] == [3, 1]
    assert set(seen) == {1, 3}
    assert torch.get_num_threads() == before


@pytest.mark.usefixtures("_short")
@pytest.mark.parametrize(("threads", "busy"), [(2, True), (1, False)])
def test_waiting_for_a_processor_counts_where_the_clock_is_used(
    monkeypatch: pytest.MonkeyPatch, threads: int, busy: bool
):
    waited = iter([0.0, 1.0])
    monkeypatch.setattr(ratio, "_waited", lambda: next(waited))
    (row,) = compare([case({"a": spin(0.0001), "b": spin(0.0001)})], threads=[threads], quick=True)
    assert row.busy is busy


# -- verdicts ----------------------------------------------------------------------------------------------------------

BAR = Bar(statement="Twice as fast", published="2.5 times", theirs="torch", at_least=2.0, what="forward")


def row(value: float, noise: float = 0.01, **changes: object) -> Row:
    made = Row(
        case=Case(f"case of {value}", "forward", dict),  # type: ignore[arg-type]
        place=Place("cpu", 1),
        ours="ours",
        theirs="torch",
        ratio=value,
        spread=0.1,
        noise=noise,
        busy=False,
        seconds=(1.0, value),
        difference=0.0,
        peak=(1, 1),
        kept=(1, 4),
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rows", "verdict"),
    [
        ([row(2.2)], "holds"),
        ([row(1.9)], "does not hold"),
        ([row(2.2, noise=0.2)], "cannot be told at this scale"),
        ([row(1.9, noise=0.2)], "cannot be told at this scale"),
        ([row(2.2, busy=True)], "cannot be told at this scale"),
        ([row(2.5), row(2.2), row(3.0)], "holds"),
        ([row(2.5), row(1.5)], "does not hold"),
        ([row(2.5), row(2.1, noise=0.3)], "cannot be told at this scale"),
        ([row(1.9, noise=0.3), row(1.95)], "does not hold"),
        ([row(1.2, busy=True), row(2.5)], "cannot be told at this scale"),
    ],
)
def test_a_bar_is_judged_by_the_worst_case_and_its_noise(rows: list[Row], verdict: str):
    (claim,) = judge(rows, [BAR])
    assert claim.verdict == verdict
    assert claim.statement == "Twice as fast (1 thread)"
    decisive = [entry for entry in rows if entry.ratio == claim.values[0]]
    assert decisive[0].case.label in claim.statistic


def test_a_bar_has_a_claim_for_each_place_and_only_the_cases_it_means():
    two = Place("cpu", 2)
    rows = [row(2.5), row(1.0, theirs="timm"), row(2.5, place=two), row(9.0, place=Place("cuda", 0))]
    rows.append(row(1.0, case=Case("x", "backward", dict)))  # type: ignore[arg-type]
    rows.append(row(1.0, case=Case("x", "forward", dict, group="large")))  # type: ignore[arg-type]
    assert [claim.statement for claim in judge(rows, [BAR])] == [
        "Twice as fast (1 thread)",
        "Twice as fast (2 threads)",
    ]
    assert judge([row(2.5, theirs="timm")], [BAR]) == []


def test_kept_bytes_are_judged_once():
    bar = Bar(statement="A quarter", published="-", theirs="torch", kept_at_most=0.26, what="forward")
    rows = [row(1.0), row(1.0, kept=(1, 4)), row(1.0, place=Place("cpu", 2))]
    (claim,) = judge(rows, [bar])
    assert (claim.verdict, claim.values) == ("holds", (0.25,))
    assert judge([row(1.0), row(1.0, kept=(1, 2))], [bar])[0].verdict == "does not hold"


# -- report ------------------------------------------------------------------------------------------------------------


def test_no_time_stands_without_a_ratio():
    rows = [row(2.5), row(1.5, place=Place("cpu", 2))]
    document = json.loads(report("made up", rows, [BAR], "a note").to_json())
    assert document["summary"] == "1 of 2 bars are met (1 thread, 2 threads)."
    tables = [part for section in document["sections"] for part in section["parts"] if part["kind"] == "table"]
    for table in tables:
        times = [column for column in table["columns"] if "[ms]" in column]
        assert not times or {"ratio", "spread [%]", "noise [%]"} < set(table["columns"])
    (first, *_) = tables
    assert first["rows"][0] == ["case of 2.5", "torch", 2.5, 10.0, 1.0, 1000.0, 2500.0]
    assert "GPU" not in " ".join(section["title"] for section in document["sections"])
    assert document["provenance"]["allocator"]
    assert "a note" in str(document["sections"][-1])


def test_busy_rows_are_told():
    text = report("made up", [row(2.5, busy=True)], [BAR]).to_json()
    assert "The machine was busy in some of these cases" in text
    assert "the machine was busy" in text
    assert "busy" not in report("made up", [row(2.5)], [BAR]).to_json()


def test_a_page_shows_ratios_of_several_pairs():
    rows = [row(2.5), row(1.5, ours="other")]
    page = report("made up", rows, []).to_html()
    assert "ours over torch" in page
    assert "other over torch" in page


def test_noise_shrinks_with_the_rounds():
    generator = torch.Generator().manual_seed(0)

    def times(count: int) -> list[float]:
        return (1 + 0.1 * torch.randn(count, generator=generator)).tolist()

    few, many = (
        statistics.mean(ratio._ratio(times(n), times(n), ratio._ratios(times(n), times(n)))[2] for _ in range(20))
        for n in (15, 240)
    )
    assert many < few / 2.5
