"""Conv-TasNet: live separation beside running again on the latest second and a half, and its parts beside torch's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.bench.ratio import Bar, Call, Case, Row, backward, compare, forward, report
from convatlas.networks.conv_tasnet.network import ConvTasNet
from convatlas.networks.registry import create_model
from convatlas.ops.depthwise import depthwise_conv
from convatlas.report import Cell, Report, Section, Table

__all__ = ["run"]

STREAM, FORWARD, TRAINING = "streaming", "forward", "forward and backward"
FAR, NETWORK, TEN_MS = "taps far apart", "network", "blocks of 10 ms"

# Fixed before anything was measured.
BARS = [
    Bar(
        statement="Streaming in blocks of 10 ms is faster than running again on all that the block depends on",
        published="no figure",
        theirs="the window again",
        at_least=5.0,
        what=STREAM,
        group=TEN_MS,
    ),
    Bar(
        statement="Depthwise convolutions whose taps are 8 frames apart and more are faster than torch's",
        published="no figure",
        theirs="Conv1d",
        at_least=2.0,
        what=FORWARD,
        group=FAR,
    ),
    Bar(
        statement="They are faster in training, too",
        published="no figure",
        theirs="Conv1d",
        at_least=1.5,
        what=TRAINING,
        group=FAR,
    ),
    Bar(
        statement="The network is not slower than its literal composition of torch's layers",
        published="no figure",
        theirs="literal layers",
        at_least=0.97,
        what=FORWARD,
        group=NETWORK,
    ),
    Bar(
        statement="The network trains faster than its literal composition of torch's layers",
        published="no figure",
        theirs="literal layers",
        at_least=1.15,
        what=TRAINING,
        group=NETWORK,
    ),
]
#: Seconds of a block, and of the mixtures of the network.
BLOCKS, SECONDS = (0.001, 0.01, 0.1), 1.0
#: Batch, channels and frames of the depthwise convolutions, and distances of their three taps in frames.
SIZE, DILATIONS = (1, 512, 1000), (1, 8, 32, 128)


def run(*, threads: Sequence[int] | None = None, quick: bool = False) -> Report:
    """Ratios of time and memory of the published sizes at 8 kHz, and the real-time factor of streaming.

    Args:
        threads: numbers of threads to measure with; by default 1 and 2.
        quick: fewer sizes.
    """
    blocks = BLOCKS[1:] if quick else BLOCKS
    cases = [
        Case(_block_label(seconds), STREAM, partial(_stream, seconds), group=TEN_MS if seconds == 0.01 else "")
        for seconds in blocks
    ]
    for what in (FORWARD, TRAINING):
        cases += [
            Case(
                f"3 taps, {dilation} frames apart",
                what,
                partial(_depthwise, what, dilation),
                group=FAR if dilation >= 8 else "",
                tolerance=1e-4,
            )
            for dilation in (DILATIONS[2:3] if quick else DILATIONS)
        ]
        cases.append(Case(f"network, {SECONDS:g} s", what, partial(_network, what), group=NETWORK, tolerance=1e-3))
    rows = compare(cases, threads=threads, quick=quick)
    made = report("conv_tasnet", rows, BARS, _NOTE, quick=quick)
    return dataclasses.replace(made, sections=[*made.sections[:1], _real_time(rows), *made.sections[1:]])


_NOTE = (
    "Streaming: the causal network of 5.1 million weights with frame-wise norms, by `step`, and the alternative, which "
    "runs it on the 1,531 frames that the new samples depend on; their outputs are compared once, before the stream "
    "goes on. Literal layers: Conv1d, PReLU and GroupNorm as in published codes, with the same weights. Depthwise "
    f"convolutions of {SIZE[1]} channels and {SIZE[2]:,} frames."
)


def _block_label(seconds: float) -> str:
    return f"blocks of {1000 * seconds:g} ms"


def _real_time(rows: Sequence[Row]) -> Section:
    """Seconds of computing for a second of sound."""
    blocks = {_block_label(seconds): seconds for seconds in BLOCKS}
    streamed = [row for row in rows if row.case.what == STREAM]
    cells: list[list[Cell]] = [
        [row.case.label, str(row.place), *(taken / blocks[row.case.label] for taken in row.seconds)] for row in streamed
    ]
    table = Table("Real-time factor", ["block", "where", "step", "the window again"], cells, caption=_FACTOR)
    return Section("Live", [table])


_FACTOR = "Seconds of computing for a second of sound; below 1 it keeps up. Its latency is a block and 2 ms."


def _shape_of(function: Callable[[], Tensor]) -> Tensor:
    return torch.tensor(function().shape)


def _stream(seconds: float, device: torch.device) -> dict[str, Call]:
    model: Any = create_model("conv_tasnet_causal", norm="frame", ends="trimmed").to(device).eval()
    config = model.config
    size = round(seconds * config.sample_rate)
    # What the frames that end in the block depend on.
    past = (config.receptive_field - 1) * config.hop + config.kernel_size - config.hop
    x = torch.randn(1, past + size, device=device)
    state = model.initial_state()
    _, state = model.step(x[:, :past], state)

    def again() -> Tensor:
        # The last samples still lack the frames that begin in them.
        y: Tensor = model(x)
        return y[..., -(config.kernel_size - config.hop) - size : -(config.kernel_size - config.hop)]

    with torch.inference_mode():
        block, state = model.step(x[:, past:], state)
        torch.testing.assert_close(block, again(), rtol=1e-3, atol=1e-4)

    def step() -> Tensor:
        nonlocal state
        y, state = model.step(x[:, past:], state)
        return y

    return {"step": forward(_shape_of, step), "the window again": forward(_shape_of, again)}


def _depthwise(what: str, dilation: int, device: torch.device) -> dict[str, Call]:
    batch, channels, frames = SIZE
    x = torch.randn(batch, channels, frames, device=device)
    weight, bias = torch.randn(channels, 1, 3, device=device), torch.randn(channels, device=device)
    make = forward if what == FORWARD else backward
    ours = partial(depthwise_conv, padding=dilation, dilation=dilation)
    theirs = partial(F.conv1d, padding=dilation, dilation=dilation, groups=channels)
    return {"depthwise_conv": make(ours, x, weight, bias), "Conv1d": make(theirs, x, weight, bias)}


def _network(what: str, device: torch.device) -> dict[str, Call]:
    model: Any = create_model("conv_tasnet").to(device)
    x = torch.randn(1, round(SECONDS * model.sample_rate), device=device)
    sides = {"ours": partial(model, x), "literal layers": partial(_literal, model, x)}
    if what == FORWARD:
        return {name: forward(call) for name, call in sides.items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradient = torch.randn(model(x).shape, device=device)

    def gradients(call: Callable[[], Tensor]) -> Tensor:
        # Compared as one vector: single slopes are small sums of large terms, which float32 does not tell.
        return torch.cat([part.flatten() for part in torch.autograd.grad(call(), trained, gradient)])

    return {name: partial(gradients, call) for name, call in sides.items()}


def _literal(model: ConvTasNet, x: Tensor) -> Tensor:
    """The network as published codes write it, with the weights of ours."""
    w = F.conv1d(x.unsqueeze(1), model.encoder.filterbank(), stride=model.config.hop)
    separator: Any = model.separator
    u = separator.bottleneck(separator.input_norm(w))
    skips: Any = 0
    for block in separator.blocks:
        h = block.norm(F.prelu(block.conv(u), block.act.weight))
        depthwise = block.depthwise
        h = F.conv1d(
            h,
            depthwise.weight,
            depthwise.bias,
            padding=depthwise.padding,
            dilation=depthwise.dilation,
            groups=depthwise.groups,
        )
        h = block.depthwise_norm(F.prelu(h, block.depthwise_act.weight))
        u, skips = u + block.residual(h), skips + block.skip(h)
    masks = separator.mask(F.prelu(skips, separator.mask_prelu.weight)).unflatten(1, (model.num_sources, -1)).sigmoid()
    masked = (w.unsqueeze(1) * masks).flatten(0, 1)
    y = F.conv_transpose1d(masked, model.decoder.filterbank(), stride=model.config.hop)
    return y.view(len(x), model.num_sources, -1)
