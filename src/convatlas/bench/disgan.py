"""DISGAN's dense blocks in one buffer beside concatenations, its wavelet units beside grouped convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from convatlas.bench.ratio import Bar, Call, Case, backward, compare, forward, report
from convatlas.nn.wavelets import DWTConv
from convatlas.ops.dense_conv import dense_conv
from convatlas.ops.wavelet_filters import find_wavelet
from convatlas.ops.wavelets import dwt
from convatlas.report import Report

__all__ = ["run"]

_FORWARD, _TRAINING = "forward", "forward and backward"
_CAT, _GROUPED = "torch.cat", "three grouped convolutions"
_PUBLISHED = "no figure; the authors' code (arXiv 2308.12084) runs "

# The bars, fixed before anything was measured. Convolutions take most of the time of a dense block, so that fewer
# copies can only help a little; what they keep for the backward pass is what counts. The transform is memory traffic.
BARS = [
    Bar(
        statement="A dense block in one buffer keeps at most a third of the bytes for the backward pass",
        published=_PUBLISHED + "concatenations",
        theirs=_CAT,
        kept_at_most=1 / 3,
        what=_TRAINING,
        group="dense",
    ),
    Bar(
        statement="A dense block in one buffer is no slower, forward",
        published=_PUBLISHED + "concatenations",
        theirs=_CAT,
        at_least=1.0,
        what=_FORWARD,
        group="dense",
    ),
    Bar(
        statement="A dense block in one buffer takes at most 10 % more time to train",
        published=_PUBLISHED + "concatenations",
        theirs=_CAT,
        at_least=1 / 1.1,
        what=_TRAINING,
        group="dense",
    ),
    Bar(
        statement="The transform of a volume is at least 5 times as fast, forward",
        published=_PUBLISHED + "a convolution for each axis",
        theirs=_GROUPED,
        at_least=5.0,
        what=_FORWARD,
        group="transform",
    ),
    *(
        Bar(
            statement=f"A wavelet unit is at least {at_least:g} times as fast, {what}",
            published=_PUBLISHED + "a convolution for each axis, then two of 1 x 1 x 1",
            theirs=_GROUPED,
            at_least=at_least,
            what=what,
            group="unit",
        )
        for what, at_least in ((_FORWARD, 3.0), (_TRAINING, 2.0))
    ),
]

#: Batch, channels and side.
DENSE_SIZES = ((1, 16, 16), (4, 16, 16), (1, 64, 32))
#: Batch, channels, results and side of the units at the first levels of the discriminator.
UNIT_SIZES = ((4, 16, 2, 32), (4, 1, 1, 64), (4, 64, 8, 8))


def run(*, threads: Sequence[int] | None = None, quick: bool = False) -> Report:
    """Ratios of time and memory.

    Args:
        threads: numbers of threads to measure with; by default 1 and 2.
        quick: one size each.
    """
    cases = []
    for what in (_FORWARD, _TRAINING):
        for batch, channels, side in DENSE_SIZES[:1] if quick else DENSE_SIZES:
            label = f"dense block, {batch} x {channels} x {side}^3"
            cases.append(Case(label, what, partial(_dense, what, batch, channels, side), group="dense"))
        for batch, channels, results, side in UNIT_SIZES[:1] if quick else UNIT_SIZES:
            size = f"{batch} x {channels} x {side}^3"
            unit = partial(_unit, what, batch, channels, results, side)
            cases.append(Case(f"unit to {results} channels, {size}", what, unit, group="unit"))
            transform = partial(_transform, what, batch, channels, side)
            cases.append(Case(f"transform, {size}", what, transform, group="transform"))
    return report("disgan", compare(cases, threads=threads, quick=quick), BARS, quick=quick)


def _dense(what: str, batch: int, channels: int, side: int, device: torch.device) -> dict[str, Call]:
    x = torch.randn(batch, channels, side, side, side, device=device)
    parameters = []
    for number in range(1, 6):
        weight = torch.randn(channels, number * channels, 3, 3, 3, device=device)
        parameters += [weight / (27 * number * channels) ** 0.5, torch.randn(channels, device=device)]
    measured = forward if what == _FORWARD else backward
    sides = (("one buffer", "buffer"), (_CAT, "naive"))
    return {name: measured(partial(_block, backend=backend), x, *parameters) for name, backend in sides}


def _block(x: Tensor, *parameters: Tensor, backend: str) -> Tensor:
    return dense_conv(x, 0.01, *parameters, backend=backend)


def _transform(what: str, batch: int, channels: int, side: int, device: torch.device) -> dict[str, Call]:
    x = torch.randn(batch, channels, side, side, side, device=device)
    measured = forward if what == _FORWARD else backward
    ours = measured(lambda x: dwt(x, "haar", "zero").transpose(1, 2).flatten(1, 2), x)
    return {"dwt": ours, _GROUPED: measured(_grouped, x)}


def _unit(what: str, batch: int, channels: int, results: int, side: int, device: torch.device) -> dict[str, Call]:
    x = torch.randn(batch, channels, side, side, side, device=device)
    unit = DWTConv(channels, results).to(device)
    names = [name for name, _ in unit.named_parameters()]
    weights = [weight.detach() for weight in unit.parameters()]

    def ours(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.cat(functional_call(unit, dict(zip(names, weights, strict=True)), (x,)), 1)

    def theirs(x: Tensor, low: Tensor, low_bias: Tensor, high: Tensor, high_bias: Tensor) -> Tensor:
        bands = _grouped(x)
        return torch.cat(
            [F.conv3d(bands[:, :channels], low, low_bias), F.conv3d(bands[:, channels:], high, high_bias)], 1
        )

    measured = forward if what == _FORWARD else backward
    return {"DWTConv": measured(ours, x, *weights), _GROUPED: measured(theirs, x, *weights)}


def _grouped(x: Tensor) -> Tensor:
    """Columns, rows, slices, each by a convolution with a group for every channel; sub-band by sub-band."""
    wavelet, channels = find_wavelet("haar"), x.shape[1]
    taps = x.new_tensor([wavelet.dec_lo[::-1], wavelet.dec_hi[::-1]])
    for axis, groups in ((2, channels), (1, 2 * channels), (0, 4 * channels)):
        size, stride = [1, 1, 1], [1, 1, 1]
        size[axis] = stride[axis] = 2
        x = F.conv3d(x, taps.repeat(groups, 1).view(-1, 1, *size), stride=stride, groups=groups)
    return x.unflatten(1, (channels, 2, 2, 2)).permute(0, 4, 3, 2, 1, 5, 6, 7).flatten(1, 4)
