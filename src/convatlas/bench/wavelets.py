"""The wavelet transform beside grouped convolutions, one for each axis, which is how it is usually written in torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.bench.ratio import Bar, Call, Case, backward, compare, forward, report
from convatlas.ops.wavelet_filters import Wavelet, find_wavelet
from convatlas.ops.wavelets import dwt, idwt
from convatlas.report import Report

__all__ = ["run"]

# The smallest ratio that counts, fixed before anything was measured. What grouped convolutions do in two passes over
# two filters, Haar does in one: at least twice as fast. Longer filters are faster as matrices on small maps only.
BARS = [
    *(
        Bar(
            statement=f"Haar is at least {at_least:g} times as fast as grouped convolutions, {what}",
            published="no figure; WaveMix (arXiv 2205.14375) runs the grouped convolutions of pytorch_wavelets",
            theirs="grouped convolutions",
            at_least=at_least,
            what=what,
            group="haar",
        )
        for what, at_least in (("forward", 1.7), ("inverse", 1.7), ("forward and backward", 1.7))
    ),
    Bar(
        statement="On maps of up to 56 x 56, longer filters are at least 1.5 times as fast, forward and backward",
        published="no figure",
        theirs="grouped convolutions",
        at_least=1.5,
        what="forward and backward",
        group="long",
    ),
]

#: Batch, channels and side.
SIZES = ((8, 64, 56), (16, 48, 28), (1, 16, 256), (1, 3, 512))
LONG_SIZES = SIZES[:2]
LONG = ("db2", "db4", "db10")
WHAT = ("forward", "inverse", "forward and backward")


def run(*, threads: Sequence[int] | None = None, quick: bool = False) -> Report:
    """Ratios of time and memory, for Haar and for Daubechies' filters of 4, 8 and 20 taps.

    Args:
        threads: numbers of threads to measure with; by default 1 and 2.
        quick: one size each.
    """
    chosen = [("haar", size, "haar") for size in (SIZES[1:2] if quick else SIZES)]
    chosen += [(name, size, "long") for name in LONG for size in (LONG_SIZES[1:] if quick else LONG_SIZES)]
    cases = [
        Case(
            f"{batch} x {channels} x {side} x {side}, {name}",
            what,
            partial(_sides, what, name, batch, channels, side),
            group=group,
        )
        for what in WHAT
        for name, (batch, channels, side), group in chosen
    ]
    return report("wavelets", compare(cases, threads=threads, quick=quick), BARS, quick=quick)


def _sides(what: str, name: str, batch: int, channels: int, side: int, device: torch.device) -> dict[str, Call]:
    wavelet, x = find_wavelet(name), torch.randn(batch, channels, side, side, device=device)
    if what == "inverse":
        y = dwt(x, wavelet, "zero")
        return {
            "idwt": forward(lambda y: idwt(y, wavelet, "zero"), y),
            "grouped convolutions": forward(partial(_grouped_inverse, wavelet=wavelet), y),
        }
    measured = forward if what == "forward" else backward
    return {
        "dwt": measured(lambda x: dwt(x, wavelet, "zero"), x),
        "grouped convolutions": measured(partial(_grouped, wavelet=wavelet), x),
    }


def _grouped(x: Tensor, wavelet: Wavelet) -> Tensor:
    """Zero padding, columns first, then rows."""
    taps = x.new_tensor([wavelet.dec_lo[::-1], wavelet.dec_hi[::-1]])
    pad, (channels, height, width) = wavelet.length - 2, x.shape[1:]
    y = F.pad(x, (pad, pad + width % 2, pad, pad + height % 2))
    y = F.conv2d(y, taps.repeat(channels, 1).view(-1, 1, 1, wavelet.length), stride=(1, 2), groups=channels)
    y = F.conv2d(y, taps.repeat(2 * channels, 1).view(-1, 1, wavelet.length, 1), stride=(2, 1), groups=2 * channels)
    return y.unflatten(1, (channels, 2, 2)).transpose(2, 3).flatten(2, 3)


def _grouped_inverse(y: Tensor, wavelet: Wavelet) -> Tensor:
    taps = y.new_tensor([wavelet.rec_lo, wavelet.rec_hi])
    channels, drop = y.shape[1], wavelet.length - 2
    x = y.unflatten(2, (2, 2)).transpose(2, 3).flatten(1, 3)
    kernel = taps.repeat(2 * channels, 1).view(-1, 1, wavelet.length, 1)
    x = F.conv_transpose2d(x, kernel, stride=(2, 1), padding=(drop, 0), groups=2 * channels)
    kernel = taps.repeat(channels, 1).view(-1, 1, 1, wavelet.length)
    return F.conv_transpose2d(x, kernel, stride=(1, 2), padding=(0, drop), groups=channels)
