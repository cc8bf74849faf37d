"""Histograms of log-chroma beside the dense form of C5's code and beside NumPy's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convatlas.bench.ratio import Bar, Call, Case, compare, forward, report
from convatlas.ops.log_chroma import log_chroma_histogram, rgb_to_log_chroma, wrapped_log_chroma_histogram
from convatlas.report import Report

__all__ = ["run"]

# The smallest ratio that counts, fixed before anything was measured.
BARS = [
    Bar(
        statement="Histograms are at least 3 times as fast as pixels beside bins, as C5's code has them",
        published="no figure; the dense form takes pixels times bins, and a product of that",
        theirs="dense",
        at_least=3.0,
        what="C5's form",
    ),
    Bar(
        statement="Histograms on a torus are at least 2 times as fast as by NumPy's histogram2d",
        published="no figure",
        theirs="NumPy",
        at_least=2.0,
        what="FFCC's form",
    ),
]

#: Height and width of the images; the first is that of C5 and FFCC.
SIZES = ((256, 384), (1080, 1920))
BINS = (32, 64)
_BIN_SIZE, _START = 1 / 32, (-1.0, -1.0)


def run(*, threads: Sequence[int] | None = None, quick: bool = False) -> Report:
    """Ratios of time and memory.

    Args:
        threads: numbers of threads to measure with; by default 1 and 2.
        quick: the smaller size only.
    """
    cases = []
    for height, width in SIZES[:1] if quick else SIZES:
        for bins in BINS:
            label = f"{height} x {width}, {bins} bins"
            cases.append(Case(label, "C5's form", partial(_c5, height, width, bins), tolerance=1e-4))
        label = f"{height} x {width}, {BINS[-1]} bins"
        cases.append(Case(label, "FFCC's form", partial(_ffcc, height, width, BINS[-1]), tolerance=1e-3))
    return report("log_chroma", compare(cases, threads=threads, quick=quick), BARS, quick=quick)


def _picture(height: int, width: int, device: torch.device) -> Tensor:
    """Colours around a tint, so that most of them lie within the range."""
    generator = torch.Generator().manual_seed(0)
    tint = torch.tensor([0.6, 1.0, 0.5]).view(1, 3, 1, 1)
    return (tint * (0.02 + 0.9 * torch.rand(1, 3, height, width, generator=generator))).to(device)


def _c5(height: int, width: int, bins: int, device: torch.device) -> dict[str, Call]:
    x = _picture(height, width, device)
    return {
        "log_chroma_histogram": forward(log_chroma_histogram, x, bins),
        "dense": forward(partial(log_chroma_histogram, backend="naive"), x, bins),
    }


def _ffcc(height: int, width: int, bins: int, device: torch.device) -> dict[str, Call]:
    x = _picture(height, width, device)
    return {
        "wrapped_log_chroma_histogram": forward(wrapped_log_chroma_histogram, x, bins, _BIN_SIZE, _START),
        "NumPy": partial(_numpy, x.cpu().numpy(), bins),
    }


def _numpy(x: np.ndarray[Any, Any], bins: int) -> Tensor:
    """The shares of the four bins by four calls of histogram2d with weights."""
    pixels = x[0].reshape(3, -1).T
    pixels = pixels[(pixels >= 1 / 256).all(1)]
    place = (rgb_to_log_chroma(torch.from_numpy(pixels), 0.0).numpy() - np.array(_START, np.float32)) / np.float32(
        _BIN_SIZE
    )
    low = np.floor(place)
    after, edges = place - low, np.arange(bins + 1) - 0.5
    total = np.zeros((bins, bins))
    for down in (0, 1):
        for right in (0, 1):
            weight = np.abs(1 - down - after[:, 0]) * np.abs(1 - right - after[:, 1])
            u, v = np.mod(low[:, 0] + down, bins), np.mod(low[:, 1] + right, bins)
            total += np.histogram2d(u, v, (edges, edges), weights=weight)[0]
    return torch.from_numpy((total / len(pixels)).astype(np.float32))[None]
