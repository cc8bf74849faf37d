"""Layers of neural operators on finer and finer grids: spectral, local, graph and attention integrals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.bench.ratio import Bar, Call, Case, backward, compare, forward, report
from convatlas.nn.attention_integral import AttentionKernelIntegral
from convatlas.nn.graph_integral import GNOBlock
from convatlas.ops.disco import equidistant_basis, equidistant_disco
from convatlas.ops.neighbours import radius_neighbors
from convatlas.ops.spectral_conv import spectral_conv
from convatlas.report import Report

__all__ = ["run"]

# Fixed before anything was measured.
BARS = [
    Bar(
        statement="Spectral convolution is faster with spectra that are cut axis by axis",
        published="no figure; arXiv 2506.10973 compares errors",
        theirs="whole spectra",
        at_least=1.2,
        what="forward",
        group="spectral",
    ),
    Bar(
        statement="A local integral takes no longer than the convolution that it is",
        published="one convolution on a regular grid",
        theirs="conv2d",
        at_least=0.8,
        what="forward",
        group="local integral",
    ),
    Bar(
        statement="A graph integral is faster with the kernel of a fixed mesh kept",
        published="no figure",
        theirs="kernel anew",
        at_least=3.0,
        what="forward",
        group="graph integral",
    ),
    Bar(
        statement="Attention without softmax takes linear time",
        published="linear complexity",
        theirs="whole matrix",
        at_least=3.0,
        what="forward",
        group="attention integral",
    ),
]

#: Points of an axis, channels and modes of the spectral convolution.
SPECTRAL: tuple[tuple[int, int, int], ...] = ((64, 32, 12), (128, 32, 12), (256, 32, 12))
#: Points of an axis, channels, radius in a square of side 2.
LOCAL: tuple[tuple[int, int, float], ...] = ((64, 16, 0.0625), (128, 16, 0.0625))
#: Points and channels of the graph, points and channels of the attention.
GRAPH, ATTENTION = ((2000, 16),), ((4096, 16),)


def run(*, threads: Sequence[int] | None = None, quick: bool = False) -> Report:
    """Ratios of time and memory of layers that see functions.

    Args:
        threads: numbers of threads to measure with; by default 1 and 2.
        quick: one size of each only.
    """
    some = slice(0, 1 if quick else None)
    spectral = {f"{n} x {n}, {c} channels, {m} modes": (n, c, m) for n, c, m in SPECTRAL[some]}
    local = {f"{n} x {n}, {c} channels, radius {r}": (n, c, r) for n, c, r in LOCAL[some]}
    graph, attention = ({f"{n} points, {c} channels": (n, c) for n, c in sizes} for sizes in (GRAPH, ATTENTION))
    near = {"tolerance": 1e-4}
    cases = [
        *_cases("forward", "spectral", partial(_spectral, forward), spectral, **near),
        *_cases("forward and backward", "spectral", partial(_spectral, backward), spectral, **near),
        *_cases("forward", "local integral", _local, local, **near),
        *_cases("forward", "graph integral", _graph, graph, **near),
        *_cases("forward", "attention integral", _attention, attention, **near),
        *_cases("beside a convolution of 3 x 3", "beside", _beside, spectral, tolerance=math.inf),
    ]
    note = "The convolution of 3 x 3 computes something else than the spectral one beside it; only their times compare."
    return report("neural operators", compare(cases, threads=threads, quick=quick), BARS, note, quick=quick)


def _cases(
    what: str, group: str, sides: Callable[..., Any], sizes: Mapping[str, tuple[Any, ...]], *, tolerance: float
) -> list[Case]:
    return [Case(label, what, partial(sides, *size), group=group, tolerance=tolerance) for label, size in sizes.items()]


def _spectral(form: Callable[..., Call], n: int, channels: int, modes: int, device: torch.device) -> dict[str, Call]:
    x = torch.randn(4, channels, n, n, device=device)
    weight = torch.randn(modes, modes // 2 + 1, channels, channels, 2, device=device).permute(2, 3, 0, 1, 4)
    return {"axis by axis": form(spectral_conv, x, weight), "whole spectra": form(_whole, x, weight)}


def _whole(x: Tensor, weight: Tensor) -> Tensor:
    """As it is usually written."""
    height, width = x.shape[2:]
    m, last = weight.shape[2], weight.shape[3]
    spectrum = torch.fft.fftshift(torch.fft.rfft2(x, norm="forward"), dim=-2)
    rows = slice(height // 2 - m // 2, height // 2 + (m + 1) // 2)
    out = torch.zeros(x.shape[0], weight.shape[1], *spectrum.shape[2:], dtype=spectrum.dtype, device=x.device)
    matrices = torch.view_as_complex(weight.contiguous())
    out[:, :, rows, :last] = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, rows, :last], matrices)
    return torch.fft.irfft2(torch.fft.ifftshift(out, dim=-2), s=(height, width), norm="forward")


def _local(n: int, channels: int, radius: float, device: torch.device) -> dict[str, Call]:
    x = torch.randn(4, channels, n, n, device=device)
    options = {"kernel_shape": (2, 4), "radius": radius, "domain": (2.0, 2.0)}
    weight = torch.randn(channels, channels, 4, device=device)
    basis = equidistant_basis((n, n), (2.0, 2.0), (2, 4), radius).to(weight)
    kernel = torch.einsum("kxy,oik->oiyx", basis, weight).flip(-1, -2) * (4 / n**2)
    return {
        "local integral": forward(partial(equidistant_disco, **options), x, weight),  # type: ignore[arg-type]
        "conv2d": forward(partial(F.conv2d, padding=kernel.shape[-1] // 2), x, kernel.contiguous()),
    }


def _graph(n: int, channels: int, device: torch.device) -> dict[str, Call]:
    block = GNOBlock(channels, channels, 2, 0.1).to(device).eval()
    points, f = torch.rand(n, 2, device=device), torch.randn(n, channels, device=device)
    neighbours = radius_neighbors(points, points, 0.1)
    with torch.no_grad():
        kernel = block.integral_transform.kernel_values(points, points, neighbours)
    return {
        "kernel kept": forward(partial(block, neighbours=neighbours, kernel=kernel), points, points, f),
        "kernel anew": forward(partial(block, neighbours=neighbours), points, points, f),
    }


def _attention(n: int, channels: int, device: torch.device) -> dict[str, Call]:
    layer = AttentionKernelIntegral(channels, channels, 4, channels // 2).to(device).eval()
    u = torch.randn(1, n, channels, device=device)
    return {"linear": forward(layer, u), "whole matrix": forward(partial(layer, associative=False), u)}


def _beside(n: int, channels: int, modes: int, device: torch.device) -> dict[str, Call]:
    x, kernel = torch.randn(4, channels, n, n, device=device), torch.randn(channels, channels, 3, 3, device=device)
    weight = torch.randn(modes, modes // 2 + 1, channels, channels, 2, device=device).permute(2, 3, 0, 1, 4)
    return {
        "spectral": forward(spectral_conv, x, weight),
        "conv 3 x 3": forward(partial(F.conv2d, padding=1), x, kernel),
    }
