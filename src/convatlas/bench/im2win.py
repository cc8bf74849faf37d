"""Convolution by window tensors beside im2col and torch's own, on the twelve layers of the papers: time and memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.bench.ratio import Bar, Call, Case, backward, compare, forward, report
from convatlas.ops.im2win import BENCHMARK_LAYERS, conv2d_im2win, im2col_numel, im2win_numel
from convatlas.report import Cell, Report, Section, Table

__all__ = ["run"]

#: Layers with enough work for the algorithm to matter; the images of the others fit into a cache.
LARGE = ("Conv3", "Conv4", "Conv8", "Conv9")

# Fixed before anything was measured. The map with which the head-room was found: 1.2 to 2.3 times.
BARS = [
    Bar(
        statement="Window tensors are faster than im2col on large layers",
        published="3.6 times on average on a CPU (arXiv 2306.14320), 3.5 times on a GPU without the transformation",
        theirs="unfold and matmul",
        at_least=1.2,
        what="forward",
        group="large",
    ),
]

BATCH = 1
QUICK_LAYERS = ("Conv3", "Conv9", "Conv12")


def run(*, threads: Sequence[int] | None = None, quick: bool = False) -> Report:
    """Ratios of time and memory of the twelve layers, and the scratch memory that the formulas give.

    Args:
        threads: numbers of threads to measure with; by default 1 and 2.
        quick: three layers only.
    """
    names = QUICK_LAYERS if quick else tuple(BENCHMARK_LAYERS)
    cases = [
        Case(
            f"{name}: {BATCH} x {layer.in_channels} x {layer.size} x {layer.size}, {layer.out_channels} filters of "
            f"{layer.kernel_size}, stride {layer.stride}",
            what,
            partial(_sides, what, name),
            pairs=(("windows", "unfold and matmul"), ("windows", "conv2d"), ("windows", "direct")),
            group="large" if name in LARGE else "small",
            tolerance=1e-4,
        )
        for what in ("forward", "forward and backward")
        for name, layer in BENCHMARK_LAYERS.items()
        if name in names and (what == "forward" or name in ("Conv9", "Conv12"))
    ]
    rows = compare(cases, threads=threads, quick=quick)
    done = report("im2win", rows, BARS, _NOTE, quick=quick)
    *first, memory, method = done.sections
    return Report(done.title, done.summary, [*first, _scratch(), memory, method], done.provenance)


_NOTE = (
    "Everything is counted: the window tensor is built in every call. torch's convolution is faster on most layers; it "
    "is the ceiling, not the side of a bar. Direct: a product for each tap, without window tensor."
)


def _sides(what: str, name: str, device: torch.device) -> dict[str, Call]:
    layer = BENCHMARK_LAYERS[name]
    x = torch.randn(BATCH, *layer.shape[1:], device=device)
    weight = torch.randn(layer.out_channels, layer.in_channels, layer.kernel_size, layer.kernel_size, device=device)
    ours = partial(conv2d_im2win, stride=layer.stride)
    columns = partial(_im2col, stride=layer.stride)
    if what != "forward":
        return {"windows": backward(ours, x, weight), "unfold and matmul": backward(columns, x, weight)}
    return {
        "windows": forward(ours, x, weight),
        "unfold and matmul": forward(columns, x, weight),
        "conv2d": forward(partial(F.conv2d, stride=layer.stride), x, weight),
        "direct": forward(partial(ours, backend="direct"), x, weight),
    }


def _im2col(x: Tensor, weight: Tensor, *, stride: int) -> Tensor:
    """Every window copied into a matrix, times the filters."""
    side = (x.shape[2] - weight.shape[2]) // stride + 1
    columns = F.unfold(x, (weight.shape[2], weight.shape[3]), stride=stride)
    return (weight.flatten(1) @ columns).unflatten(2, (side, -1))


def _scratch() -> Section:
    rows: list[list[Cell]] = []
    for name, layer in BENCHMARK_LAYERS.items():
        place = (layer.shape, layer.kernel_size, layer.stride)
        image, windows, columns = layer.in_channels * layer.size**2, im2win_numel(*place), im2col_numel(*place)
        share: list[Cell] = [windows / image, columns / image, columns / windows]
        rows.append([name, 4 * windows / 2**20, 4 * columns / 2**20, *share])
    names = ["layer", "window tensor [MiB]", "im2col [MiB]", "over the image", "im2col over it", "im2col / windows"]
    return Section("Scratch memory", [Table("Of one image", names, rows, "Float32, by the formulas.")])
