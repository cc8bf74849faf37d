"""Does the window tensor save memory and time over im2col, and give the same numbers?

Lu, Chu, Guo, Liu: "Im2win: An Efficient Convolution Paradigm on GPU", Euro-Par 2023, arXiv 2306.14316, and "Im2win:
Memory Efficient Convolution On SIMD Architectures", HPEC 2022, arXiv 2306.14320. They claim 41.6 % less memory and 3.6
times the speed of im2col on a CPU, 23.1 % less memory and 3.5 times the speed on a GPU. Their GPU times leave out the
making of the window tensor; here everything is counted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.allocator import keep_large_blocks
from convatlas.experiments.small_training import device, finished, one_thread, progress
from convatlas.ops.im2win import BENCHMARK_LAYERS, ConvLayer, conv2d_im2win, im2col_numel, im2win_numel
from convatlas.report import Bars, Cell, Claim, Note, Report, Section, Table
from convatlas.training.measure import peak_bytes

__all__ = ["full", "quick", "run"]

# Thresholds, fixed before anything was measured.

#: Elements of the window tensor over those of im2col, mean of the layers, at most: "41.6 % less memory".
MEMORY_SHARE = 1 - 0.416
#: Memory that a call takes beside its result over that of im2col, on the large layers, at most.
MEASURED_SHARE = 0.6
#: Time of unfold and matmul over ours, on the large layers, at least.
SPEED = 1.2
#: Largest difference from torch's convolution, over the largest value, in float32.
DIFFERENCE = 1e-5

#: Layers with enough work for the algorithm to matter.
LARGE = ("Conv3", "Conv4", "Conv8", "Conv9")
#: Layers that are measured, and half of their size where they take long.
QUICK = ("Conv1", "Conv3", "Conv4", "Conv5", "Conv7", "Conv8", "Conv9", "Conv10", "Conv12")
HALVED = ("Conv4", "Conv8")
PAIRS = 9
#: Images: of the quick test, and of the papers.
BATCH, FULL_BATCH = 1, 128


class _Measured(NamedTuple):
    """One layer: what its scratch memory takes of that of im2col, the times of the others over ours, the difference."""

    layer: ConvLayer
    formula: float
    scratch: float
    over_columns: float
    over_conv: float
    difference: float


def run(
    budget: Literal["quick", "full"], *, data: str | Path | None = None, folder: str | Path | None = None
) -> Report:
    """Test the claims of the papers.

    Args:
        budget: "quick" runs the layers of the papers with one image, the largest at half their size, on one thread;
            "full" all of them with 128 images on a GPU.
        data, folder: not used.

    Raises:
        ValueError: the budget is unknown.
    """
    if budget == "quick":
        return quick()
    if budget != "full":
        raise ValueError(f"budget must be 'quick' or 'full', got {budget!r}")
    return full()


def quick() -> Report:
    """One image, one thread of the CPU."""
    layers = {
        name: layer if name not in HALVED else ConvLayer(**{**vars(layer), "size": layer.size // 2})
        for name, layer in BENCHMARK_LAYERS.items()
        if name in QUICK
    }
    with one_thread(), progress(len(layers)) as advance:
        measured = _measured(layers, BATCH, torch.device("cpu"), advance)
    return _report("im2win: quick test of its claims", measured, scale_ok=True)


def full() -> Report:
    """The papers' setting: 128 images on a GPU. Without one, the times cannot be told."""
    on_gpu = device().type == "cuda"
    batch = FULL_BATCH if on_gpu else BATCH
    with progress(len(BENCHMARK_LAYERS)) as advance:
        measured = _measured(BENCHMARK_LAYERS, batch, device(), advance)
    return _report("im2win: full test of its claims", measured, scale_ok=on_gpu)


def _measured(
    layers: Mapping[str, ConvLayer], batch: int, where: torch.device, advance: Callable[[str], None]
) -> dict[str, _Measured]:
    keep_large_blocks()
    generator = torch.Generator().manual_seed(0)
    results = {}
    for name, layer in layers.items():
        x = torch.randn(batch, *layer.shape[1:], generator=generator).to(where)
        shape = (layer.out_channels, layer.in_channels, layer.kernel_size, layer.kernel_size)
        weight = torch.randn(shape, generator=generator).to(where)
        with torch.inference_mode():
            results[name] = _compared(layer, x, weight)
        advance(name)
    return results


def _compared(layer: ConvLayer, x: Tensor, weight: Tensor) -> _Measured:
    stride = layer.stride
    calls: dict[str, Callable[[], Tensor]] = {
        "windows": lambda: conv2d_im2win(x, weight, None, stride),
        "columns": lambda: _im2col(x, weight, stride),
        "conv": lambda: F.conv2d(x, weight, stride=stride),
    }
    expected = calls["conv"]()
    difference = float((calls["windows"]() - expected).abs().max() / expected.abs().max())
    beside = {name: peak_bytes(call, x.device) - expected.nbytes for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(PAIRS):
        for name in calls if turn % 2 else reversed(list(calls)):
            times[name].append(_seconds(calls[name], x.device))
    ratios = {
        name: statistics.median(a / b for a, b in zip(times[name], times["windows"], strict=True))
        for name in ("columns", "conv")
    }
    place = (x.shape, layer.kernel_size, stride)
    formula = im2win_numel(*place) / im2col_numel(*place)
    scratch = beside["windows"] / max(beside["columns"], 1)
    return _Measured(layer, formula, scratch, ratios["columns"], ratios["conv"], difference)


def _im2col(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    side = (x.shape[2] - weight.shape[2]) // stride + 1
    return (weight.flatten(1) @ F.unfold(x, weight.shape[2:], stride=stride)).unflatten(2, (side, -1))


def _seconds(call: Callable[[], Tensor], where: torch.device) -> float:
    """Of one call: processor time on a CPU, which other work on the machine hardly touches."""
    if where.type == "cpu":
        start = time.process_time()
        call()
        return time.process_time() - start
    torch.cuda.synchronize(where)
    start = time.perf_counter()
    call()
    torch.cuda.synchronize(where)
    return time.perf_counter() - start


def _report(title: str, measured: Mapping[str, _Measured], *, scale_ok: bool) -> Report:
    large = [result for name, result in measured.items() if name in LARGE]
    claims = [
        Claim.judge(
            "The window tensor takes less memory than the matrix of im2col",
            published="41.6 % less memory than im2col on a CPU, 23.1 % on a GPU (of the whole process)",
            statistic="elements of the window tensor over those of im2col, mean of the layers",
            value=statistics.mean(result.formula for result in measured.values()),
            at_most=MEMORY_SHARE,
            seeds=0,
        ),
        Claim.judge(
            "What a call takes beside its result shrinks as much, on large layers",
            published="41.6 % less memory than im2col on a CPU",
            statistic="peak of our call beside its result over that of unfold and matmul, the worst large layer",
            value=max(result.scratch for result in large),
            at_most=MEASURED_SHARE,
            seeds=0,
        ),
        Claim.judge(
            "It is faster than im2col on large layers, with the window tensor made in every call",
            published="3.6 times on a CPU; 3.5 times on a GPU, without making the window tensor",
            statistic="time of unfold and matmul over ours, median of alternating pairs, the worst large layer",
            value=min(result.over_columns for result in large),
            at_least=SPEED,
            seeds=0,
            scale_ok=scale_ok,
            unit="times",
        ),
        Claim.judge(
            "It computes the same convolution",
            published="an exact algorithm",
            statistic="largest difference from torch's convolution over the largest value, in float32",
            value=max(result.difference for result in measured.values()),
            at_most=DIFFERENCE,
            seeds=0,
        ),
    ]
    rows: list[list[Cell]] = [
        [name, 1 / r.formula, 1 / r.scratch if r.scratch > 0 else None, r.over_columns, r.over_conv]
        for name, r in measured.items()
    ]
    columns = ["layer", "memory of im2col over ours, by size", "measured", "time of im2col over ours", "of conv2d"]
    table = Table("Layers of the papers", columns, rows, "Above 1 ours takes less. Float32.")
    bars = Bars("Time of unfold and matmul", "times ours", {name: r.over_columns for name, r in measured.items()})
    note = Note(
        "torch's own convolution on a CPU is near the peak of the machine and faster than either; window tensors are "
        "for those who would write im2col. 'convatlas bench im2win' measures with bars and noise."
    )
    return finished(title, [Section("Claims", claims), Section("Measured", [table, bars, note])])
