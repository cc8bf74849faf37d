"""One-way convolutions, dense and factor by factor, beside plain convolutions with the same kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from convatlas.bench.ratio import Bar, Call, Case, compare, forward, report
from convatlas.networks.registry import create_model
from convatlas.nn.conv.one_way import OneWayConv2d, OneWayConv3d
from convatlas.report import Report
from convatlas.surgery import merge

__all__ = ["run"]

FORWARD, TRAINING, STEP = "layer, forward", "layer, forward and backward", "surrogate, training step"
AUTO, DENSE, SEQUENTIAL, PLAIN = "one-way, auto", "one-way, dense", "one-way, factor by factor", "plain convolution"
_PUBLISHED = "shorter training and prediction time; no figure in the abstract (arXiv 2304.04964)"

# The smallest ratios that count, fixed before anything was measured.
BARS = [
    Bar(
        statement="Prediction with 64 channels and more is faster than by plain convolutions",
        published=_PUBLISHED,
        theirs=PLAIN,
        at_least=1.0,
        what=FORWARD,
        group="wide",
    ),
    Bar(
        statement="Training with 64 channels and more is faster than with plain convolutions",
        published=_PUBLISHED,
        theirs=PLAIN,
        at_least=1.0,
        what=TRAINING,
        group="wide",
    ),
    Bar(
        statement="A training step of the surrogate takes at most 10 % more time",
        published=_PUBLISHED,
        theirs=PLAIN,
        at_least=1 / 1.1,
        what=STEP,
    ),
]

#: Batch, channels, taps along an axis, side, position axes and rank.
SIZES = (
    (8, 16, 3, 32, 2, 1),
    (4, 64, 3, 64, 2, 1),
    (4, 64, 3, 64, 2, 2),
    (4, 64, 7, 32, 2, 1),
    (4, 256, 3, 16, 2, 1),
    (1, 64, 3, 16, 3, 1),
)
#: Channels from which a layer counts as wide.
WIDE = 64
SURROGATE_BATCH, SURROGATE_SIDE = 16, 32


def run(*, threads: Sequence[int] | None = None, quick: bool = False) -> Report:
    """Ratios of time and memory of layers and of the wave surrogate.

    Args:
        threads: numbers of threads to measure with; by default 1 and 2.
        quick: the first layer, a wide one, and the surrogate.
    """
    note = (
        "Dense makes the kernel of the factors and convolves once, factor by factor convolves with each of them, auto "
        "takes what it expects to be faster. Memory saved in weights and optimizer is not seen here: peaks are those "
        "of activations, of which factor by factor has more."
    )
    return report("one_way", compare(list(_cases(quick)), threads=threads, quick=quick), BARS, note, quick=quick)


def _cases(quick: bool) -> Iterator[Case]:
    for sizes in SIZES[:2] if quick else SIZES:
        batch, channels, taps, side, dims, rank = sizes
        grid = " x ".join([str(side)] * dims)
        label = f"{batch} x {channels} x {grid}, {taps} taps, R = {rank}"
        group = "wide" if channels >= WIDE else ""
        pairs = [(AUTO, PLAIN), (DENSE, PLAIN), (SEQUENTIAL, PLAIN)]
        for what, backward in ((FORWARD, False), (TRAINING, True)):
            yield Case(label, what, partial(_layers, sizes, backward), pairs, group, tolerance=1e-4)
    for rank in (1,) if quick else (1, 2):
        yield Case(f"wave_surrogate, R = {rank}", STEP, partial(_steps, rank), tolerance=1e-3)


def _layers(sizes: tuple[int, ...], backward: bool, device: torch.device) -> dict[str, Call]:
    batch, channels, taps, side, dims, rank = sizes
    kind: Any = {2: OneWayConv2d, 3: OneWayConv3d}[dims]
    layer = kind(channels, channels, taps, padding=taps // 2, rank=rank, device=device)
    x = torch.randn(batch, channels, *[side] * dims, device=device, requires_grad=backward)
    plain = layer.to_conv()

    def evaluated(evaluation: str) -> nn.Module:
        other: nn.Module = kind(
            channels, channels, taps, padding=taps // 2, rank=rank, evaluation=evaluation, device=device
        )
        other.load_state_dict(layer.state_dict())
        return other

    sides = {AUTO: layer, DENSE: evaluated("dense"), SEQUENTIAL: evaluated("sequential"), PLAIN: plain}
    if not backward:
        return {name: forward(module, x) for name, module in sides.items()}
    gradient = torch.randn_like(layer(x))

    def call(module: nn.Module) -> Callable[[], Tensor]:
        return lambda: torch.autograd.grad(module(x), (x, *module.parameters()), gradient)[0]

    return {name: call(module) for name, module in sides.items()}


def _steps(rank: int, device: torch.device) -> dict[str, Call]:
    ours = create_model("wave_surrogate", kernel="oneway", rank=rank).to(device)
    x = torch.randn(SURROGATE_BATCH, 5, SURROGATE_SIDE, SURROGATE_SIDE, device=device)
    plain = merge(ours, x[:1]).model

    def call(network: nn.Module) -> Callable[[], Tensor]:
        # So small a rate that the results of both sides stay comparable.
        optimizer = torch.optim.Adam(network.parameters(), 1e-9)

        def step() -> Tensor:
            optimizer.zero_grad()
            loss = network(x).square().mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    return {AUTO: call(ours.train()), PLAIN: call(plain.train())}
