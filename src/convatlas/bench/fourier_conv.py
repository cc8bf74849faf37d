"""Fourier convolution of short series by products with matrices, beside fast Fourier transforms."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from convatlas.bench.ratio import Bar, Call, Case, backward, compare, forward, report
from convatlas.ops.fourier_conv import fourier_conv1d
from convatlas.report import Report

__all__ = ["run"]

# No paper gives a ratio of the operator, so nothing has to be reached.
BARS: list[Bar] = []

#: Batch, input and output channels and length: layers of a classifier of seasons with 5 and with 3 days a step.
SIZES = ((64, 2, 8, 43), (64, 8, 8, 43), (64, 2, 16, 73), (64, 16, 32, 73), (64, 16, 32, 40))


def run(*, threads: Sequence[int] | None = None, quick: bool = False) -> Report:
    """Ratios of time and memory with all frequencies.

    Args:
        threads: numbers of threads to measure with; by default 1 and 2.
        quick: one size only.
    """
    cases = [
        Case(
            f"{batch} x {inputs} to {outputs} channels, {length} steps",
            what,
            partial(_sides, what, batch, inputs, outputs, length),
        )
        for what in ("forward", "forward and backward")
        for batch, inputs, outputs, length in (SIZES[1:2] if quick else SIZES)
    ]
    return report("fourier_conv", compare(cases, threads=threads, quick=quick), BARS, quick=quick)


def _sides(what: str, batch: int, inputs: int, outputs: int, length: int, device: torch.device) -> dict[str, Call]:
    x = torch.randn(batch, inputs, length, device=device)
    weight = torch.randn(outputs, inputs, length // 2 + 1, 2, device=device)
    measured = forward if what == "forward" else backward
    return {
        "auto": measured(fourier_conv1d, x, weight),
        "rfft": measured(partial(fourier_conv1d, backend="naive"), x, weight),
    }
