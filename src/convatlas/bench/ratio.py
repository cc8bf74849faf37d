"""The measuring that every benchmark shares: two sides in turn, the ratio of their times, memory, and bars to reach.

A time belongs to one machine in one moment; what lasts is a ratio. So the sides of a case run in turn in one process,
the ratio of each pair is taken, and the median of these counts. One side also runs against itself: how far the median
of those ratios is from 1, and how far the ratios scatter, is the noise, and a bar nearer than the noise decides
nothing. One thread of a CPU is timed by the process's own processor time, which other work on the machine hardly
touches; several are timed by the clock, and where they had to wait for a processor the machine counts as busy.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.utils._pytree import tree_leaves

from convatlas.allocator import keep_large_blocks
from convatlas.report import Cell, Claim, Heatmap, Note, Part, Report, Section, Table
from convatlas.training.measure import kept_bytes, peak_bytes, provenance
from convatlas.training.progress import progress

__all__ = ["Bar", "Call", "Case", "Place", "Row", "backward", "compare", "forward", "judge", "places", "report"]

Call = Callable[[], Any]

#: Alternating pairs of a case.
PAIRS = 15
#: Where the noise is above this share, there are more pairs, until so many seconds are over, in a quick run and else.
QUIET = 0.02
SECONDS = (3.0, 6.0)
#: Least seconds of one measurement, in a quick run and else; short calls are repeated.
SAMPLE = (0.002, 0.005)
#: Seconds and calls of warm-up: plans of the transforms, caches, the allocator.
WARM_UP = (0.05, 4)
#: Share of their time that threads may wait for a processor before the machine counts as busy.
BUSY = 0.05
#: A median of n values is that of the population within this times the distance of the quartiles over the root of n,
#: in 19 of 20 samples (McGill, Tukey, Larsen: "Variations of box plots", 1978).
_NOTCH = 1.57


class Place(NamedTuple):
    """Where a case runs: ``cpu`` with so many threads, or ``cuda``."""

    device: str
    threads: int

    def __str__(self) -> str:
        if self.device == "cuda":
            return torch.cuda.get_device_name()
        return "1 thread" if self.threads == 1 else f"{self.threads} threads"


@dataclass(frozen=True)
class Case:
    """Sides that compute the same, on one input.

    Attributes:
        label: of the input, e.g. ``"4 x 64 x 1,024"``.
        what: what is computed; cases of one kind share a table, e.g. ``"forward"``.
        sides: given a device, makes the input and returns a call for each side. All give the same result.
        pairs: sides whose times are compared, (ours, theirs); by default the first with each of the others. Pairs that
            name a missing side are left out.
        group: of cases that a bar refers to.
        tolerance: how much two results may differ and count as equal, over the largest value.
    """

    label: str
    what: str
    sides: Callable[[torch.device], Mapping[str, Call]]
    pairs: Sequence[tuple[str, str]] = ()
    group: str = ""
    tolerance: float = 1e-5


@dataclass(frozen=True)
class Row:
    """Two sides of a case that were measured in turn.

    Attributes:
        case, place: what ran where.
        ours, theirs: names of the sides.
        ratio: time of theirs over time of ours, median of the pairs; above 1 ours is faster.
        spread: distance of the quartiles of the ratios, over their median.
        noise: how far the ratio may be off, over the ratio; from ours against itself and from the spread.
        busy: whether the threads had to wait for processors.
        seconds: of one call, medians (ours, theirs).
        difference: largest difference of the results, over the largest value.
        peak: most bytes taken during a call, its result included (ours, theirs).
        kept: bytes kept for the backward pass (ours, theirs).
    """

    case: Case
    place: Place
    ours: str
    theirs: str
    ratio: float
    spread: float
    noise: float
    busy: bool
    seconds: tuple[float, float]
    difference: float
    peak: tuple[int, int]
    kept: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Bar:
    """What a benchmark has to reach, fixed before measuring.

    Attributes:
        statement: the claim in one sentence.
        published: what is said elsewhere, with its numbers.
        theirs: the side that is compared with.
        ours: the side that is compared; any if it is left out.
        at_least: smallest ratio of the times.
        kept_at_most: largest share of the bytes kept for the backward pass. One of the two is given.
        what, group: the cases that it holds for.
        device: where it holds.
    """

    statement: str
    published: str
    theirs: str
    ours: str = ""
    at_least: float | None = None
    kept_at_most: float | None = None
    what: str
    group: str = ""
    device: Literal["cpu", "cuda"] = "cpu"


# -- sides -------------------------------------------------------------------------------------------------------------


def forward(function: Callable[..., Any], *inputs: Any) -> Call:
    """A call without gradients."""

    def call() -> Any:
        with torch.inference_mode():
            return function(*inputs)

    return call


def backward(function: Callable[..., Tensor], *inputs: Any) -> Call:
    """A call that computes a result and the gradients of all floating-point inputs, and returns these.

    The gradient of the result is random and the same for every function of the same inputs.
    """
    own = [
        x.detach().clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs
    ]
    leaves = [x for x in own if isinstance(x, Tensor) and x.requires_grad]
    result = function(*own)
    gradient = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(result)
    return lambda: torch.autograd.grad(function(*own), leaves, gradient)


# -- measuring ---------------------------------------------------------------------------------------------------------


def places(threads: Sequence[int] | None = None) -> list[Place]:
    """The CPU with each number of threads (by default 1, and 2 where there are as many cores), and the GPU if any.

    Raises:
        ValueError: a number of threads is smaller than 1.
    """
    numbers = tuple(threads) if threads is not None else (1, 2)[: os.cpu_count() or 1]
    if not numbers or min(numbers) < 1:
        raise ValueError(f"threads must be one number or several of at least 1, got {', '.join(map(str, numbers))}")
    cpu = [Place("cpu", number) for number in dict.fromkeys(numbers)]
    return [*cpu, Place("cuda", 0)] if torch.cuda.is_available() else cpu


def compare(cases: Sequence[Case], *, threads: Sequence[int] | None = None, quick: bool = False) -> list[Row]:
    """Measure every case in every place.

    Raises:
        ValueError: the results of two sides differ by more than the case allows.
    """
    keep_large_blocks()
    where = places(threads)
    rows: list[Row] = []
    with progress("preparing", len(where) * len(cases)) as advance:
        for place in where:
            with _settings(place):
                for case in cases:
                    rows += _measured(case, place, quick)
                    advance(f"{place}: {case.what}, {case.label}")
    return rows


@contextmanager
def _settings(place: Place) -> Iterator[None]:
    before = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    if place.device == "cpu":
        torch.set_num_threads(place.threads)
    else:
        torch.backends.cudnn.allow_tf32 = False  # results are compared as float32
    try:
        with threadpool_limits(place.threads or None, user_api="blas"):  # of NumPy and SciPy
            yield
    finally:
        torch.set_num_threads(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def _measured(case: Case, place: Place, quick: bool) -> list[Row]:
    torch.manual_seed(0)
    sides = dict(case.sides(torch.device(place.device)))
    first = next(iter(sides))
    pairs = [pair for pair in case.pairs if set(pair) <= set(sides)] or [
        (first, name) for name in sides if name != first
    ]
    differences = _differences(case, sides)
    peak = {name: peak_bytes(call, place.device) for name, call in sides.items()}
    kept = {name: kept_bytes(call) for name, call in sides.items()}
    for call in sides.values():
        _warm_up(call, place)
    times, busy = _in_turn(sides, first, pairs, place, quick)
    rows = []
    for ours, theirs in pairs:
        ratio, spread, noise = _ratio(times[theirs], times[ours], _ratios(times[first], times[""]))
        rows.append(
            Row(
                case=case,
                place=place,
                ours=ours,
                theirs=theirs,
                ratio=ratio,
                spread=spread,
                noise=noise,
                busy=busy,
                seconds=(statistics.median(times[ours]), statistics.median(times[theirs])),
                difference=max(differences[ours], differences[theirs]),
                peak=(peak[ours], peak[theirs]),
                kept=(kept[ours], kept[theirs]),
            )
        )
    return rows


def _differences(case: Case, sides: Mapping[str, Call]) -> dict[str, float]:
    """How far the result of each side is from that of the first, over the largest value."""
    first, *others = sides
    expected = _tensors(sides[first]())
    found = {first: 0.0}
    for name in others:
        actual = _tensors(sides[name]())
        if [tensor.shape for tensor in actual] != [tensor.shape for tensor in expected]:
            raise ValueError(f"{case.what} of {case.label}: {name} gives results of other shapes than {first}")
        found[name] = max(map(_difference, actual, expected), default=0.0)
        if not found[name] <= case.tolerance:
            raise ValueError(
                f"{case.what} of {case.label}: the results of {name} and {first} differ by {found[name]:.1e} of the "
                f"largest value, and {case.tolerance:.0e} is allowed"
            )
    return found


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def _difference(actual: Tensor, expected: Tensor) -> float:
    if not expected.numel():
        return 0.0
    largest = expected.abs().max().double()
    return float((actual.double() - expected.double()).abs().max() / largest.clamp(min=1e-30))


def _warm_up(call: Call, place: Place) -> None:
    seconds, calls = WARM_UP
    end = time.perf_counter() + seconds
    done = 0
    while done < calls or time.perf_counter() < end:
        call()
        done += 1
    if place.device == "cuda":
        torch.cuda.synchronize()


def _in_turn(
    sides: Mapping[str, Call], first: str, pairs: Sequence[tuple[str, str]], place: Place, quick: bool
) -> tuple[dict[str, list[float]], bool]:
    """Seconds of one call, for each side and under "" once more for the first, round by round; whether it was busy."""
    timer = _Timer(place)
    calls = {**sides, "": sides[first]}
    repeats = {name: max(1, math.ceil(SAMPLE[not quick] / max(timer(call, 1), 1e-7))) for name, call in sides.items()}
    repeats[""] = repeats[first]
    times: dict[str, list[float]] = {name: [] for name in calls}
    started, waited = time.perf_counter(), _waited()
    for turn in count():
        # Who comes first sees other caches than who comes next.
        for name in list(calls) if turn % 2 else reversed(calls):
            times[name].append(timer(calls[name], repeats[name]))
        if turn + 1 >= PAIRS:
            same = _ratios(times[first], times[""])
            quiet = all(_ratio(times[theirs], times[ours], same)[2] <= QUIET for ours, theirs in pairs)
            if quiet or time.perf_counter() - started > SECONDS[not quick]:
                break
    elapsed = (time.perf_counter() - started) * max(place.threads, 1)
    several = place.device == "cpu" and place.threads > 1
    return times, several and (_waited() - waited) / elapsed > BUSY


def _ratio(theirs: Sequence[float], ours: Sequence[float], same: Sequence[float]) -> tuple[float, float, float]:
    """Median of the ratios, the distance of their quartiles over it, and the noise, given those of ours with itself."""
    ratios = _ratios(theirs, ours)
    spread = _distance_of_quartiles(ratios)
    scatter = max(_distance_of_quartiles(same), spread)
    noise = abs(statistics.median(same) - 1) + _NOTCH * scatter / math.sqrt(len(ratios))
    return statistics.median(ratios), spread, noise


class _Timer:
    """Seconds of one call: by the process's processor time for one thread, by the clock for several, by GPU events."""

    def __init__(self, place: Place) -> None:
        self.place = place
        # More than the second-level cache of any GPU holds, so that a call finds it cold as in a network.
        self.flush = torch.empty(2**26, dtype=torch.int32, device="cuda") if place.device == "cuda" else None

    def __call__(self, call: Call, repeats: int) -> float:
        if self.flush is not None:
            return self._on_gpu(call, repeats, self.flush)
        clock = time.process_time if self.place.threads == 1 else time.perf_counter
        start = clock()
        for _ in range(repeats):
            call()
        return (clock() - start) / repeats

    def _on_gpu(self, call: Call, repeats: int, flush: Tensor) -> float:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in events:
            flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in events) / 1000 / repeats


def _waited() -> float:
    """Seconds that the threads of this process have waited for a processor so far; 0 where the system does not tell."""
    waited = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            waited += int(path.read_text().split()[1])
        except (OSError, IndexError):  # the thread has ended
            continue
    return waited / 1e9


def _ratios(theirs: Sequence[float], ours: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(theirs, ours, strict=True)]


def _distance_of_quartiles(values: Sequence[float]) -> float:
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / middle


# -- verdicts ----------------------------------------------------------------------------------------------------------


def judge(rows: Sequence[Row], bars: Sequence[Bar]) -> list[Claim]:
    """A claim for each bar and place that was measured.

    The worst case decides. Where it is nearer to the bar than its noise, or the machine was busy, the claim cannot be
    told, unless another case misses the bar without doubt.
    """
    claims = []
    for bar in bars:
        meant = [row for row in rows if _meant(bar, row)]
        if bar.kept_at_most is not None:  # the same everywhere
            meant = [row for row in meant if row.place == meant[0].place]
        for place, group in groupby(meant, key=lambda row: row.place):
            claims.append(_claim(bar, place, list(group)))
    return claims


def _meant(bar: Bar, row: Row) -> bool:
    named = (row.theirs, row.case.what, row.case.group, row.place.device)
    return named == (bar.theirs, bar.what, bar.group, bar.device) and bar.ours in ("", row.ours)


def _claim(bar: Bar, place: Place, rows: list[Row]) -> Claim:
    cases = "the case" if len(rows) == 1 else f"the worst of {len(rows)} cases"
    if bar.kept_at_most is not None:
        return Claim.judge(
            bar.statement,
            published=bar.published,
            statistic=f"bytes kept for the backward pass over those of {bar.theirs}, {cases}",
            value=max(row.kept[0] / row.kept[1] for row in rows),
            at_most=bar.kept_at_most,
            seeds=0,
        )
    least = bar.at_least or 0.0
    sure = [row for row in rows if not row.busy and row.noise <= abs(row.ratio / least - 1)]
    missed = [row for row in sure if row.ratio < least]
    worst = min(missed or rows, key=lambda row: row.ratio)
    busy = "; the machine was busy" if any(row.busy for row in rows) else ""
    return Claim.judge(
        f"{bar.statement} ({place})",
        published=bar.published,
        statistic=f"time of {bar.theirs} over ours, median of alternating pairs, {cases}: {worst.case.label}; "
        f"noise {worst.noise:.1%}, which must be less than the distance to the bar{busy}",
        value=worst.ratio,
        at_least=least,
        seeds=0,
        scale_ok=bool(missed) or len(sure) == len(rows),
        unit="times",
    )


# -- report ------------------------------------------------------------------------------------------------------------


def report(title: str, rows: Sequence[Row], bars: Sequence[Bar], *notes: str, quick: bool = False) -> Report:
    """Claims, ratios with their noise, memory, and how it was measured."""
    claims = judge(rows, bars)
    sections = [Section("Bars", claims)] if claims else []
    for place, group in groupby(rows, key=lambda row: row.place):
        kinds: dict[str, list[Row]] = {}
        for row in group:
            kinds.setdefault(row.case.what, []).append(row)
        parts: list[Part] = []
        for what, some in kinds.items():
            parts += [_ratio_table(what, some), _figure(what, some)]
        sections.append(Section(f"Ratios, {place}", parts))
    first = [row for row in rows if row.place == rows[0].place]
    sections.append(Section("Memory", [_memory_table(first)]))
    sections.append(Section("How it was measured", [Note(text) for text in (*notes, _method(quick), _accuracy(rows))]))
    met = [claim.verdict for claim in claims].count("holds")
    devices = ", ".join(dict.fromkeys(str(row.place) for row in rows))
    summary = f"{met} of {len(claims)} bars are met" if claims else "Ratios, held against no bar"
    return Report(f"Benchmark: {title}", f"{summary} ({devices}).", sections, provenance())


def _ratio_table(what: str, rows: Sequence[Row]) -> Table:
    several = len({row.ours for row in rows}) > 1
    cells: list[list[Cell]] = []
    for row in rows:
        named = [row.case.label, row.ours, row.theirs] if several else [row.case.label, row.theirs]
        shares = [round(100 * share, 1) for share in (row.spread, row.noise)]
        cells.append([*named, round(row.ratio, 3), *shares, *(1000 * seconds for seconds in row.seconds)])
    columns = ["case", *(["ours"] if several else []), "against"]
    columns += ["ratio", "spread [%]", "noise [%]", "ours [ms]", "theirs [ms]"]
    caption = "Ratio: their time over ours; above 1 ours is faster. Float32."
    if any(row.busy for row in rows):
        caption += " The machine was busy in some of these cases: their ratios tell little."
    return Table(what.capitalize(), columns, cells, caption)


def _figure(what: str, rows: Sequence[Row]) -> Heatmap:
    several = len({row.ours for row in rows}) > 1
    columns = {(row.ours, row.theirs): f"{row.ours} over {row.theirs}" if several else row.theirs for row in rows}
    cases = list(dict.fromkeys(row.case.label for row in rows))
    values = np.full((len(cases), len(columns)), np.nan)
    for row in rows:
        values[cases.index(row.case.label), list(columns).index((row.ours, row.theirs))] = row.ratio
    return Heatmap(f"Ratios, {what}", values, cases, list(columns.values()), "against", "case")


def _memory_table(rows: Sequence[Row]) -> Table:
    several, trained = len({row.ours for row in rows}) > 1, any(max(row.kept) for row in rows)
    columns = ["what", "case", *(["ours"] if several else []), "against", "peak [MiB]", "their peak [MiB]"]
    columns += ["kept [MiB]", "theirs kept [MiB]", "kept, share"] if trained else []
    cells: list[list[Cell]] = []
    for row in rows:
        named = [row.case.what, row.case.label, *([row.ours] if several else []), row.theirs]
        sizes: list[Cell] = [size / 2**20 for size in row.peak]
        kept: list[Cell] = [size / 2**20 if size else None for size in row.kept]
        kept.append(row.kept[0] / row.kept[1] if row.kept[1] else None)
        cells.append([*named, *sizes, *(kept if trained else [])])
    caption = f"On {rows[0].place}. Peak: most that was taken during a call, its result included."
    caption += " Kept: for the backward pass, inputs included; share: ours over theirs." if trained else ""
    return Table("Memory", columns, cells, caption)


def _accuracy(rows: Sequence[Row]) -> str:
    worst = max(rows, key=lambda row: row.difference)
    where = f" ({worst.case.what} of {worst.case.label})" if worst.difference else ""
    return f"Results of all sides were compared before timing; the largest difference is {worst.difference:.1e}{where}."


def _method(quick: bool) -> str:
    return (
        "All sides run in turn in one process, on random numbers, with the same allocator, threads and layout: at "
        f"least {PAIRS} rounds after a warm-up, more where the noise is large. The ratio is the median of "
        "those of all rounds, the spread the distance of their quartiles over the median. The noise is how far the "
        "ratio may be off: ours against itself, and the uncertainty of a median. One thread is timed by processor "
        "time, several by the clock, a GPU by its events with a cold cache and without TF32."
        f"{' This was a quick run, with fewer sizes and rounds.' if quick else ''}"
    )
