"""The Fourier transform of simplices beside the closed form in chunks of elements, as the authors' code has it.

The closed form is not defined where phases are equal, so the meshes are random and the zero frequency is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from convatlas.bench.ratio import Bar, Call, Case, backward, compare, forward, report
from convatlas.ops.simplex_fourier import as_real_pairs, simplex_fourier
from convatlas.report import Report

__all__ = ["run"]

CLOSED = "closed form"
# The smallest ratios that count.
BARS = [
    Bar(
        statement=f"{name} take at most the time of the closed form, which is inexact, {what}",
        published="no figure",
        theirs=CLOSED,
        at_least=at_least,
        what=what,
        group=group,
    )
    for group, name, what, at_least in (
        ("triangles", "Triangles", "forward", 1.0),
        ("points", "Points", "forward", 5.0),
        ("points", "Points", "forward and backward", 5.0),
    )
]

#: Number of elements, vertices of each, resolution.
TRIANGLES = ((1_000, 3, (32, 32, 32)), (2_000, 3, (64, 64)))
POINTS = ((5_000, 1, (32, 32, 32)), (5_000, 1, (64, 64)))
#: Elements at a time, as in the authors' code.
CHUNK = 100


def run(*, threads: Sequence[int] | None = None, quick: bool = False) -> Report:
    """Ratios of time and memory, for triangles and points in two and three dimensions, in float64.

    Args:
        threads: numbers of threads to measure with; by default 1 and 2.
        quick: images only.
    """
    cases = [
        Case(
            f"{count:,} {group}, {' x '.join(map(str, resolution))}",
            what,
            partial(_sides, what, count, corners, resolution),
            group=group,
        )
        for what in ("forward", "forward and backward")
        for group, sizes in (("triangles", TRIANGLES), ("points", POINTS))
        for count, corners, resolution in (sizes[1:] if quick else sizes)
    ]
    return report("simplex_fourier", compare(cases, threads=threads, quick=quick), BARS, quick=quick)


def _sides(what: str, count: int, corners: int, resolution: tuple[int, ...], device: torch.device) -> dict[str, Call]:
    vertices = torch.rand(count, len(resolution), dtype=torch.float64, device=device)
    elements = torch.randint(0, count, (count, corners), device=device)
    elements = (elements[:, :1] + torch.arange(corners, device=device)) % count  # no vertex twice
    weights = torch.rand(count, 1, dtype=torch.float64, device=device)
    measured = forward if what == "forward" else backward

    def ours(vertices: Tensor) -> Tensor:
        spectrum = simplex_fourier(vertices, elements, weights, resolution, mode="mass")
        return as_real_pairs(spectrum).flatten(0, -3)[1:]

    theirs: Callable[[Tensor], Tensor] = partial(_closed, elements=elements, weights=weights, resolution=resolution)
    return {"convatlas": measured(ours, vertices), CLOSED: measured(theirs, vertices)}


def _closed(vertices: Tensor, elements: Tensor, weights: Tensor, resolution: tuple[int, ...]) -> Tensor:
    axes = [torch.fft.fftfreq(n, 1 / n, dtype=vertices.dtype, device=vertices.device) for n in resolution]
    axes[-1] = axes[-1][: resolution[-1] // 2 + 1].abs()
    waves = 2 * math.pi * torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)[1:]
    total: Tensor | float = 0.0
    for part, density in zip(elements.split(CHUNK), weights.split(CHUNK), strict=True):
        corners = vertices[part]
        phases = corners @ waves.T
        edges = corners[:, 1:] - corners[:, :1]
        content = torch.linalg.det(edges @ edges.mT).sqrt() if part.shape[1] > 1 else corners.new_ones(len(corners))
        for a in range(part.shape[1]):
            others = [phases[:, a] - phases[:, b] for b in range(part.shape[1]) if b != a]
            product = torch.stack(others).prod(0) if others else 1.0
            term = torch.exp(-1j * phases[:, a]) / product
            total = total + (density.squeeze(1) * content).to(term.dtype) @ term
    return torch.view_as_real(torch.as_tensor(total) * 1j ** (elements.shape[1] - 1)).unsqueeze(1)
