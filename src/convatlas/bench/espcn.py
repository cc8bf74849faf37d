"""ESPCN, which works at low resolution, beside networks that work on the enlarged image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch

from convatlas.bench.ratio import Bar, Call, Case, compare, forward, report
from convatlas.networks.registry import create_model
from convatlas.report import Report

__all__ = ["run"]

LARGE = "factor 3 and above"

# The smallest ratio that counts, fixed before anything was measured.
BARS = [
    Bar(
        statement="From factor 3 on ESPCN is at least 10 times as fast as a 9-5-5 network on the enlarged image",
        published="ESPCN (arXiv 1609.05158): more than an order of magnitude faster than earlier networks",
        theirs="SRCNN 9-5-5",
        at_least=10.0,
        what="forward",
        group=LARGE,
    )
]

FACTORS = (2, 3, 4)
#: Height and width of the image before it is enlarged.
SIZE = (120, 160)


def run(*, threads: Sequence[int] | None = None, quick: bool = False) -> Report:
    """Ratios of time and memory of whole networks on luma. Their results differ: they are other networks.

    Args:
        threads: numbers of threads to measure with; by default 1 and 2.
        quick: one factor only.
    """
    cases = [
        Case(
            f"1 x 1 x {SIZE[0]} x {SIZE[1]}, factor {factor}",
            "forward",
            partial(_sides, factor),
            group=LARGE if factor >= 3 else "",
            tolerance=math.inf,
        )
        for factor in (FACTORS[1:2] if quick else FACTORS)
    ]
    note = "The networks differ, so their results do; each enlarges the same image."
    return report("ESPCN", compare(cases, threads=threads, quick=quick), BARS, note, quick=quick)


def _sides(factor: int, device: torch.device) -> dict[str, Call]:
    x = torch.rand(1, 1, *SIZE, device=device)
    names = {
        "ESPCN": f"espcn_x{factor}",
        "SRCNN 9-5-5": f"srcnn_955_x{factor}",
        "SRCNN 9-1-5": f"srcnn_915_x{factor}",
        "transposed convolution": f"espcn_deconv_x{factor}",
    }
    networks = {name: create_model(model, in_channels=1).to(device).eval() for name, model in names.items()}
    return {name: forward(network, x) for name, network in networks.items()}
