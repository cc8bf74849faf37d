"""Short depthwise convolution of tokens and signals beside torch's Conv1d."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.bench.ratio import Bar, Call, Case, backward, compare, forward, report
from convatlas.ops.short_conv import short_conv1d
from convatlas.report import Report

__all__ = ["run"]

FORWARD, TRAINING = "forward", "forward and backward"
TOKEN_LAYOUT, SIGNAL_LAYOUT = "tokens (B, L, D)", "signals (B, D, L)"
_PUBLISHED = "FlashFFTConv (arXiv 2311.05908): 5.5 to 7.3 times over Conv1d for five taps and tokens, on an H100"

# Fixed before anything was measured.
BARS = [
    Bar(
        statement="Tokens are convolved at least 6 times as fast as by Conv1d between transpositions",
        published=_PUBLISHED,
        theirs="Conv1d, transposed",
        at_least=6.0,
        what=FORWARD,
        group=TOKEN_LAYOUT,
    ),
    Bar(
        statement="Training on tokens is at least twice as fast as by Conv1d between transpositions",
        published="no figure of its own",
        theirs="Conv1d, transposed",
        at_least=2.0,
        what=TRAINING,
        group=TOKEN_LAYOUT,
    ),
    Bar(
        statement="Signals are convolved as fast as by Conv1d",
        published=_PUBLISHED,
        theirs="Conv1d",
        at_least=0.95,
        what=FORWARD,
        group=SIGNAL_LAYOUT,
    ),
]

#: Batch, length, channels and taps.
TOKENS = ((4, 2048, 512, 4), (4, 2048, 512, 7), (1, 1024, 768, 5), (2, 4096, 1024, 3))
SIGNALS = ((4, 2048, 512, 4), (1, 1024, 768, 5))


def run(*, threads: Sequence[int] | None = None, quick: bool = False) -> Report:
    """Ratios of time and memory of causal convolutions with a bias.

    Args:
        threads: numbers of threads to measure with; by default 1 and 2.
        quick: one size of each layout.
    """
    cases = [
        Case(
            " x ".join(map(str, size[:3])) + f", {size[3]} taps",
            what,
            partial(_sides, what, size, tokens),
            group=TOKEN_LAYOUT if tokens else SIGNAL_LAYOUT,
        )
        for tokens, sizes in ((True, TOKENS), (False, SIGNALS))
        for size in (sizes[:1] if quick else sizes)
        for what in (FORWARD, TRAINING)
    ]
    note = "Sizes are batch x length x channels, whichever layout they are in. Padding is taps - 1 on either side."
    return report("short_conv", compare(cases, threads=threads, quick=quick), BARS, note, quick=quick)


def _sides(what: str, size: tuple[int, int, int, int], tokens: bool, device: torch.device) -> dict[str, Call]:
    batch, length, channels, taps = size
    shape = (batch, length, channels) if tokens else (batch, channels, length)
    x, weight = torch.randn(shape, device=device), torch.randn(channels, 1, taps, device=device)
    bias = torch.randn(channels, device=device)
    make = forward if what == FORWARD else backward
    ours = partial(short_conv1d, padding=taps - 1, channels_last=tokens)
    theirs = {"Conv1d, transposed": _transposed} if tokens else {"Conv1d": _plain}
    return {"short_conv1d": make(ours, x, weight, bias)} | {
        name: make(form, x, weight, bias) for name, form in theirs.items()
    }


def _plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv1d(x, weight, bias, padding=weight.shape[2] - 1, groups=len(weight))


def _transposed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As it is usually written: channels first and back, so that the next layer finds tokens in memory."""
    return _plain(x.mT, weight, bias).mT.contiguous()
