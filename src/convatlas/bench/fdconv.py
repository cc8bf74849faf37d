"""Frequency dynamic convolution beside the plain convolution of the same weight, and its form for inference."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from convatlas.bench.ratio import Bar, Call, Case, compare, forward, report
from convatlas.nn.conv.fdconv import FDConv2d, fix_kernels
from convatlas.report import Report

__all__ = ["run"]

# Fixed before anything was measured: without a transform the weight is a product with n kernels, which must pay.
BARS = [
    Bar(
        statement="With fixed kernels inference is faster than with a transform",
        published="no figure; the paper (arXiv 2503.18783) gives GFLOPs only",
        theirs="transform",
        at_least=1.1,
        what="forward",
        group="few kernels",
    ),
    Bar(
        statement="With fixed kernels, without local modulation, inference takes at most 1.3 times as long as a plain "
        "convolution",
        published="no figure; the paper (arXiv 2503.18783) gives GFLOPs only",
        theirs="Conv2d",
        ours="fixed kernels",
        at_least=1 / 1.3,
        what="forward",
        group="without local modulation",
    ),
]

#: Batch, channels, side of the map, and kernels; 64 kernels of 256 x 256 channels take 151 MB.
SIZES = (
    (1, 64, 28, 4),
    (8, 64, 28, 4),
    (1, 256, 14, 4),
    (8, 256, 14, 4),
    (1, 256, 14, 64),
    (8, 256, 14, 64),
)


def run(*, threads: Sequence[int] | None = None, quick: bool = False) -> Report:
    """Ratios of time and memory of 3 x 3 layers in evaluation, with attention that leaves the weight as it is.

    Args:
        threads: numbers of threads to measure with; by default 1 and 2.
        quick: the small layers only.
    """
    cases = [
        Case(
            f"{batch} x {channels} x {side} x {side}, n = {kernels}{'' if local else ', without local modulation'}",
            "forward",
            partial(_sides, batch, channels, side, kernels, local),
            pairs=(("fixed kernels", "transform"), ("fixed kernels", "Conv2d"), ("transform", "Conv2d")),
            group=("few kernels" if kernels < 16 else "many kernels") if local else "without local modulation",
            tolerance=1e-4,
        )
        for local in (True, False)
        for batch, channels, side, kernels in (SIZES[:2] if quick else SIZES)
        if local or kernels < 16
    ]
    return report("fdconv", compare(cases, threads=threads, quick=quick), BARS, quick=quick)


def _sides(batch: int, channels: int, side: int, kernels: int, local: bool, device: torch.device) -> dict[str, Call]:
    conv = nn.Conv2d(channels, channels, 3, padding=1)
    # Band modulation does the same work on both sides; without it the ratio is that of the weight.
    layer = FDConv2d.from_conv(conv, kernel_num=kernels, fbm=None, ksm_local=local)
    ksm = layer.ksm_global
    for part in (ksm.channel_fc, ksm.filter_fc, ksm.spatial_fc, ksm.kernel_fc):
        nn.init.zeros_(part.weight)  # type: ignore[union-attr]
    if layer.ksm_local is not None:
        nn.init.zeros_(layer.ksm_local.conv.weight)
    fixed = fix_kernels(nn.Sequential(copy.deepcopy(layer)), max_bytes=2**30).model
    x = torch.randn(batch, channels, side, side, device=device)
    modules = {"fixed kernels": fixed, "transform": layer, "Conv2d": conv}
    return {name: forward(module.to(device).eval(), x) for name, module in modules.items()}
