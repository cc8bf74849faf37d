"""Sparse convolution beside the dense one on the same grid, and beside spconv's own on a CPU where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.bench.ratio import Bar, Call, Case, backward, compare, forward, report
from convatlas.ops.sparse import sparse_conv, submanifold_rulebook
from convatlas.report import Report

__all__ = ["run"]

# Fixed before anything was measured.
BARS = [
    Bar(
        statement="Sparse convolution is faster than the dense one at 7 % of a grid",
        published="no figure of the operator; the paper (arXiv 2412.07360) counts operations",
        theirs="dense",
        at_least=15.0,
        what="forward",
        group="7 %",
    ),
    Bar(
        statement="So it is with gradients",
        published="no figure",
        theirs="dense",
        at_least=15.0,
        what="forward and backward",
        group="7 %",
    ),
]
#: Where it is installed.
SPCONV_BARS = [
    Bar(
        statement="Finding the pairs and convolving takes less time than spconv's forward on a CPU",
        published="no figure",
        theirs="spconv",
        at_least=1.3,
        what="pairs and forward",
        group="7 %",
    ),
]

#: Side of the grid, channels, share of active places; the first is that of the bars.
SIZES = ((64, 32, 0.0735), (64, 32, 0.02), (64, 64, 0.02), (128, 32, 0.01))


def run(*, threads: Sequence[int] | None = None, quick: bool = False) -> Report:
    """Ratios of time and memory of 3 x 3 x 3 submanifold convolutions.

    Args:
        threads: numbers of threads to measure with; by default 1 and 2.
        quick: one size only.
    """
    sizes = SIZES[:1] if quick else SIZES
    cases = [
        Case(
            f"{share:.0%} of {side}^3, {channels} channels",
            what,
            partial(_sides, what, side, channels, share),
            group="7 %" if (side, channels, share) == SIZES[0] else "less",
            tolerance=1e-4,
        )
        for what in ("pairs and forward", "forward", "forward and backward")
        for side, channels, share in sizes
        if what != "pairs and forward" or _has_spconv() or (side, channels, share) == SIZES[0]
    ]
    notes = [] if _has_spconv() else ["spconv is not installed here, so it is not compared with."]
    bars = [*BARS, *(SPCONV_BARS if _has_spconv() else [])]
    return report("sparse", compare(cases, threads=threads, quick=quick), bars, *notes, quick=quick)


def _has_spconv() -> bool:
    return importlib.util.find_spec("spconv") is not None


def _sides(what: str, side: int, channels: int, share: float, device: torch.device) -> dict[str, Call]:
    places = (torch.rand(1, side, side, side) < share).nonzero().int()
    places = places[torch.randperm(len(places))].to(device)
    features = torch.randn(len(places), channels, device=device)
    weight = torch.randn(channels, 3, 3, 3, channels, device=device)
    shape = (side,) * 3

    def found() -> Any:
        return submanifold_rulebook(places, shape, 1, (3, 3, 3), (1, 1, 1))

    if what == "pairs and forward":
        sides = {
            "sparse": forward(lambda x, w: sparse_conv(x, found(), w), features, weight),
            "dense": forward(partial(_dense, places=places, shape=shape), features, weight),
        }
        if _has_spconv() and device.type == "cpu":
            sides["spconv"] = forward(_spconv(places, shape, weight), features)
        return sides
    rulebook = found()
    way: Callable[..., Call] = forward if what == "forward" else backward
    return {
        "sparse": way(lambda x, w: sparse_conv(x, rulebook, w), features, weight),
        "dense": way(partial(_dense, places=places, shape=shape), features, weight),
    }


def _dense(features: Tensor, weight: Tensor, *, places: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The whole grid, and its rows at the active places."""
    at = tuple(places.long().unbind(1))
    grid = features.new_zeros(1, *shape, features.shape[1]).index_put(at, features).movedim(-1, 1)
    return F.conv3d(grid, weight.movedim(-1, 1), padding=1).movedim(1, -1)[at]


def _spconv(places: Tensor, shape: tuple[int, ...], weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Spconv's layer; on a CPU it has the native algorithm only, and no gradients."""
    spconv = importlib.import_module("spconv.pytorch")
    algorithms = importlib.import_module("spconv.core")
    channels = weight.shape[0]
    layer = spconv.SubMConv3d(channels, channels, 3, bias=False, algo=algorithms.ConvAlgo.Native)
    with torch.no_grad():
        layer.weight.copy_(weight)

    def call(features: Tensor) -> Tensor:
        result: Tensor = layer(spconv.SparseConvTensor(features, places, list(shape), 1)).features
        return result

    return call
