"""Hypercomplex convolutions beside plain ones with the same weights: layers, training steps, evaluation when merged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.bench.ratio import Bar, Call, Case, compare, forward, report
from convatlas.networks.registry import create_model
from convatlas.nn.conv.hypercomplex import PHConv2d
from convatlas.report import Report
from convatlas.surgery import merge, swap

__all__ = ["run"]

LAYER, STEP, BUILT, MERGED = "layer, forward and backward", "training step", "evaluation as built", "evaluation, merged"
PLAIN = "plain convolution"
_NO_FIGURE = "no figure; the weight is computed at every step, and is as large as a plain one (arXiv 2110.04176)"

# The smallest ratios that count, fixed before anything was measured: 5 % more time for computing the weight. Merged
# networks consist of the same layers as plain ones; "not slower" leaves room for the noise.
BARS = [
    Bar(
        statement="Forward and backward of a layer take at most 5 % more time",
        published=_NO_FIGURE,
        theirs=PLAIN,
        at_least=1 / 1.05,
        what=LAYER,
    ),
    Bar(
        statement="A training step of PHResNet18 takes at most 5 % more time",
        published=_NO_FIGURE,
        theirs=PLAIN,
        at_least=1 / 1.05,
        what=STEP,
    ),
    Bar(
        statement="A merged PHResNet18 is not slower than the plain network",
        published=_NO_FIGURE,
        theirs=PLAIN,
        at_least=0.95,
        what=MERGED,
    ),
]

#: Channels and side of the maps in the stages of PHResNet18, and n.
STAGES = ((64, 32), (128, 16), (256, 8), (512, 4))
DIMENSIONS = (2, 4)
LAYER_BATCH = 128
MODEL = "phresnet18_large"
MODEL_DIMENSIONS = (3, 4)
STEP_BATCH = 32
SIDE = 32


def run(*, threads: Sequence[int] | None = None, quick: bool = False) -> Report:
    """Ratios of time and memory of layers and of PHResNet18.

    Args:
        threads: numbers of threads to measure with; by default 1 and 2.
        quick: the first and the last stage and n = 4 only.
    """
    note = (
        "A training step is forward, backward and SGD with momentum, in training mode. Both sides have the same "
        "weights: ours are computed from fewer parameters, and the optimizer has only these to go through."
    )
    return report("hypercomplex", compare(list(_cases(quick)), threads=threads, quick=quick), BARS, note, quick=quick)


def _cases(quick: bool) -> Iterator[Case]:
    for channels, side in STAGES[:: len(STAGES) - 1] if quick else STAGES:
        for n in DIMENSIONS[-1:] if quick else DIMENSIONS:
            label = f"{LAYER_BATCH} x {channels} x {side} x {side}, n = {n}"
            yield Case(label, LAYER, partial(_layers, channels, side, n), tolerance=1e-4)
    for n in MODEL_DIMENSIONS[-1:] if quick else MODEL_DIMENSIONS:
        yield Case(f"{MODEL}, batch {STEP_BATCH}, n = {n}", STEP, partial(_steps, n), tolerance=1e-4)
        for what, batch in ((BUILT, 1), (BUILT, STEP_BATCH), (MERGED, 1), (MERGED, STEP_BATCH)):
            sides = partial(_evaluations, n, batch, what == MERGED)
            yield Case(f"{MODEL}, batch {batch}, n = {n}", what, sides, tolerance=1e-3)


def _layers(channels: int, side: int, n: int, device: torch.device) -> dict[str, Call]:
    ours = PHConv2d(channels, channels, 3, padding=1, bias=False, n=n, device=device)
    x = torch.randn(LAYER_BATCH, channels, side, side, device=device, requires_grad=True)
    gradient = torch.randn_like(x)

    def call(layer: nn.Module) -> Callable[[], Tensor]:
        return lambda: torch.autograd.grad(layer(x), (x, *layer.parameters()), gradient)[0]

    return {"hypercomplex": call(ours), PLAIN: call(ours.to_conv())}


def _networks(n: int, device: torch.device) -> dict[str, nn.Module]:
    """PHResNet18, and the network of plain convolutions that computes the same."""
    ours = create_model(MODEL, n=n).to(device)
    return {"hypercomplex": ours, PLAIN: swap(ours, PHConv2d, lambda conv: conv.to_conv()).model}


def _steps(n: int, device: torch.device) -> dict[str, Call]:
    x, labels = torch.randn(STEP_BATCH, 3, SIDE, SIDE, device=device), torch.arange(STEP_BATCH, device=device) % 10

    def call(network: nn.Module) -> Callable[[], Tensor]:
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, 1e-3, momentum=0.9, weight_decay=5e-4)

        def step() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(network(x), labels)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    return {name: call(network.train()) for name, network in _networks(n, device).items()}


def _evaluations(n: int, batch: int, merged: bool, device: torch.device) -> dict[str, Call]:
    x = torch.randn(batch, 3, SIDE, SIDE, device=device)
    networks = {name: network.eval() for name, network in _networks(n, device).items()}
    if merged:
        networks = {name: merge(network, x[:1]).model for name, network in networks.items()}
    return {name: forward(network, x) for name, network in networks.items()}
