"""Networks with one transform beside networks with two in every layer, and the matrix products of spectral layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import scipy.fft
import torch
from torch import Tensor

from convatlas.bench.ratio import Bar, Call, Case, compare, forward, report
from convatlas.networks.base import FieldNetwork
from convatlas.networks.registry import create_model
from convatlas.ops.dct import dct
from convatlas.ops.mode_mixing import mix_modes, mode_major
from convatlas.ops.relative_error import relative_l2
from convatlas.report import Report

__all__ = ["run"]

MIXING, STEP, COSINES = "mixing of channels at each mode", "training step", "cosine transform of few modes"

# Fixed before anything was measured.
BARS = [
    Bar(
        statement="Mixing by matrix products is 4 times as fast as the sum over contiguous weights",
        published="5.7 times with the head-room of this size (batch 4, 32 channels, 12 x 12 modes)",
        theirs="einsum",
        at_least=4.0,
        what=MIXING,
        group="mixing",
    ),
    Bar(
        statement="A training step of T1 is twice as fast as that of FNO",
        published="3 to 10 times (arXiv 2211.14453), growing with resolution and model",
        theirs="FNO",
        at_least=2.0,
        what=STEP,
        group="step",
    ),
    Bar(
        statement="A training step of T1 is 3 times as fast as that of FNO, as published",
        published="3 to 10 times (arXiv 2211.14453), growing with resolution and model",
        theirs="FNO",
        at_least=3.0,
        what=STEP,
        group="step",
    ),
]

#: Batch, channels and modes of an axis; the first is that of the bar.
SPECTRA: Sequence[tuple[int, int, int]] = ((4, 32, 12), (16, 48, 24))
#: Batch, points of an axis, modes of an axis, width and depth; the first is that of the bar.
NETWORKS: Sequence[tuple[int, int, int, int, int]] = ((8, 64, 12, 32, 4), (8, 32, 12, 32, 4), (4, 128, 24, 32, 4))
#: Batch, channels, points and kept modes of an axis.
GRIDS: Sequence[tuple[int, int, int, int]] = ((4, 32, 64, 24), (1, 8, 256, 48))


def run(*, threads: Sequence[int] | None = None, quick: bool = False) -> Report:
    """Ratios of time and memory.

    Args:
        threads: numbers of threads to measure with; by default 1 and 2.
        quick: one size of each kind.
    """
    some = slice(1) if quick else slice(None)
    cases = [
        Case(
            f"{batch} x {channels}, {modes} x {modes} modes",
            MIXING,
            partial(_mixing, batch, channels, modes),
            group="mixing" if (batch, channels, modes) == SPECTRA[0] else "",
        )
        for batch, channels, modes in SPECTRA[some]
    ]
    cases += [
        Case(
            f"{batch} x {points} x {points}, {modes} modes, width {width}, {depth} layers",
            STEP,
            partial(_step, batch, points, modes, width, depth),
            group="step" if (batch, points, modes, width, depth) == NETWORKS[0] else "",
        )
        for batch, points, modes, width, depth in NETWORKS[some]
    ]
    cases += [
        Case(
            f"{batch} x {channels} x {points} x {points}, {modes} x {modes} modes",
            COSINES,
            partial(_cosines, batch, channels, points, modes),
        )
        for batch, channels, points, modes in GRIDS[some]
    ]
    return report("transform_once", compare(cases, threads=threads, quick=quick), BARS, quick=quick)


def _mixing(batch: int, channels: int, modes: int, device: torch.device) -> dict[str, Call]:
    x = torch.randn(batch, channels, modes, modes, dtype=torch.complex64, device=device)
    weight = torch.randn(channels, channels, modes, modes, dtype=torch.complex64, device=device) / math.sqrt(channels)
    laid_out = mode_major(weight)
    return {
        "matrix products": forward(lambda: torch.view_as_real(mix_modes(x, laid_out))),
        "einsum": forward(lambda: torch.view_as_real(torch.einsum("bixy,ioxy->boxy", x, weight))),
    }


def _step(batch: int, points: int, modes: int, width: int, depth: int, device: torch.device) -> dict[str, Call]:
    x, y = torch.randn(2, batch, 1, points, points, device=device)
    sides: dict[str, Call] = {}
    for name, model in (("T1", "t1_navier_stokes"), ("FNO", "t1_fno_navier_stokes")):
        network: Any = create_model(model, modes=modes, width=width, depth=depth, resolution=points).to(device)
        sides[name] = _training_step(network, x, y)
    return sides


def _training_step(network: FieldNetwork, x: Tensor, y: Tensor) -> Call:
    """Forward, loss, gradients and a step of SGD with rate 0. Two networks have no result in common to compare."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)

    def call() -> None:
        optimizer.zero_grad()
        relative_l2(network(x), network.as_answer(y)).mean().backward()
        optimizer.step()

    return call


def _cosines(batch: int, channels: int, points: int, modes: int, device: torch.device) -> dict[str, Call]:
    x = torch.randn(batch, channels, points, points, device=device)
    sides: dict[str, Call] = {
        backend: forward(partial(dct, axes=(-2, -1), low_modes=modes, backend=backend), x)
        for backend in ("matmul", "fft")
    }
    if device.type == "cpu":
        sides["SciPy"] = forward(_scipy, x, modes)
    return sides


def _scipy(x: Tensor, modes: int) -> Tensor:
    whole = scipy.fft.dctn(x.numpy(), axes=(-2, -1), norm="ortho")
    return torch.from_numpy(whole[..., :modes, :modes].copy())
