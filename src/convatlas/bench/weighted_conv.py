"""Weighted convolutions beside plain ones of the same kernels: a training step, evaluation as built and when merged."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from convatlas.bench.ratio import Bar, Call, Case, compare, forward, report
from convatlas.networks.registry import create_model
from convatlas.nn.conv.weighted_conv import BEST_DENSITIES, WeightedConv2d, apply_weighted_conv, bake
from convatlas.report import Report
from convatlas.surgery import merge, swap

__all__ = ["run"]

LAYER, BUILT, MERGED = "layer, forward and backward", "evaluation as built", "evaluation, merged"
PLAIN = "plain convolution"

# Fixed before anything was measured. A merged network consists of the same layers as a plain one; "not slower" leaves
# room for the noise.
BARS = [
    Bar(
        statement="A merged network of weighted convolutions is not slower than the plain network",
        published="no cost at inference (arXiv 2505.24558)",
        theirs=PLAIN,
        at_least=0.95,
        what=MERGED,
    )
]

#: Batch, channels and side of a layer.
LAYERS = ((8, 64, 32), (8, 256, 8))
#: Networks, and the batch and side of their images.
NETWORKS = (("dncnn_weighted_k5", 1, 48), ("vgg16_bn_small", 8, 32), ("resnet18", 1, 224))


def run(*, threads: Sequence[int] | None = None, quick: bool = False) -> Report:
    """Ratios of time and memory of layers and of networks, plain ones among them, whose convolutions are weighted.

    Args:
        threads: numbers of threads to measure with; by default 1 and 2.
        quick: the first layer and the first two networks only.
    """
    cases = [
        Case(f"{batch} x {channels} x {side} x {side}", LAYER, partial(_layers, batch, channels, side), tolerance=1e-4)
        for batch, channels, side in (LAYERS[:1] if quick else LAYERS)
    ]
    cases += [
        Case(f"{name}, batch {batch}", what, partial(_networks, name, batch, side, what == MERGED), tolerance=1e-3)
        for name, batch, side in (NETWORKS[:2] if quick else NETWORKS)
        for what in (BUILT, MERGED)
    ]
    return report("weighted_conv", compare(cases, threads=threads, quick=quick), BARS, quick=quick)


def _layers(batch: int, channels: int, side: int, device: torch.device) -> dict[str, Call]:
    ours = WeightedConv2d(channels, channels, 3, padding=1, density=BEST_DENSITIES, device=device)
    x = torch.randn(batch, channels, side, side, device=device)
    return {"weighted": _with_weights(ours, x), PLAIN: _with_weights(bake(ours), x)}


def _with_weights(layer: nn.Module, x: Tensor) -> Call:
    """The gradient of the input; those of the weights, which differ, are computed too."""
    x = x.clone().requires_grad_()
    gradient = torch.randn(layer(x).shape, generator=torch.Generator().manual_seed(1)).to(x)
    return lambda: torch.autograd.grad(layer(x), (x, *layer.parameters()), gradient)[0]


def _networks(name: str, batch: int, side: int, merged: bool, device: torch.device) -> dict[str, Call]:
    network: Any = create_model(name)
    if not any(isinstance(part, WeightedConv2d) for part in network.modules()):
        network = apply_weighted_conv(network).model
    channels: int = network.in_channels
    ours = network.to(device).eval()
    networks = {"weighted": ours, PLAIN: swap(ours, WeightedConv2d, bake).model.eval()}
    x = torch.randn(batch, channels, side, side, device=device)
    if merged:
        networks = {key: merge(each, x[:1]).model for key, each in networks.items()}
    return {key: forward(each, x) for key, each in networks.items()}
