"""Long depthwise convolution by FFT beside what one writes with `torch.fft`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from convatlas.bench.ratio import Bar, Call, Case, backward, compare, forward, report
from convatlas.ops.fft_conv import fft_conv, kernel_spectrum
from convatlas.ops.fourier import fast_length
from convatlas.report import Report

__all__ = ["run"]

FORWARD, PREPARED, TRAINING = "forward", "forward, kernel transformed once", "forward and backward"
LONG, BLOCKS, MILLION = "kernel as long as the signal", "overlap-save", "kernel of 1,024, signal of 1,048,576"
GATED, CIRCULAR = "gated", "circular"
_PUBLISHED = "FlashFFTConv (arXiv 2311.05908): up to 7.93 times over the complex FFT form, on an H100 in half precision"
_FULL = "full transforms waste work on kernels much shorter than the signal (FlashFFTConv, section 3.3)"

# The smallest ratios that count, fixed before anything was measured.
BARS = [
    Bar(
        statement="A forward pass is at least twice as fast as by complex FFT",
        published=_PUBLISHED,
        theirs="complex FFT",
        at_least=2.0,
        what=FORWARD,
        group=LONG,
    ),
    Bar(
        statement="With a kernel that is transformed once, a forward pass is at least twice as fast as by complex FFT",
        published=_PUBLISHED,
        theirs="complex FFT",
        at_least=2.0,
        what=PREPARED,
        group=LONG,
    ),
    Bar(
        statement="Forward and backward are at least 1.7 times as fast as by complex FFT",
        published=_PUBLISHED,
        theirs="complex FFT",
        at_least=1.7,
        what=TRAINING,
        group=LONG,
    ),
    *(
        Bar(
            statement=f"{name} convolutions are at least {least:g} times as fast as by complex FFT, {what}",
            published=_PUBLISHED,
            theirs="complex FFT",
            at_least=least,
            what=what,
            group=group,
        )
        for name, group in (("Gated", GATED), ("Circular", CIRCULAR))
        for what, least in ((FORWARD, 2.0), (TRAINING, 1.7))
    ),
    *(
        Bar(
            statement=f"Not slower than by real FFT, {what}",
            published="no figure; a real transform does half the work of a complex one",
            theirs="real FFT",
            at_least=1.0,
            what=what,
            group=LONG,
        )
        for what in (FORWARD, PREPARED, TRAINING)
    ),
    Bar(
        statement="Kernels of 127 to 1,023 taps run at least 1.4 times as fast in blocks as in one transform",
        published=_FULL,
        theirs="real FFT",
        at_least=1.4,
        what=FORWARD,
        group=BLOCKS,
    ),
    Bar(
        statement="A kernel of 1,024 taps on a signal of a million runs at least 3 times as fast as in one transform",
        published=_FULL,
        theirs="real FFT",
        at_least=3.0,
        what=FORWARD,
        group=MILLION,
    ),
    Bar(
        statement="At most 0.26 of the bytes that the complex form keeps are kept for the backward pass",
        published="FlashFFTConv, section 3.1: intermediate results are computed again instead of kept",
        theirs="complex FFT",
        kept_at_most=0.26,
        what=TRAINING,
        group=LONG,
    ),
]

#: Batch, channels, length of the signal, taps of the kernel.
SIZES = {
    LONG: [*((4, 64, 2**power, 2**power) for power in range(10, 14)), *((2, 32, 2**p, 2**p) for p in range(14, 17))],
    BLOCKS: [(1, 64, 16384, taps) for taps in (127, 255, 511, 1023)],
    MILLION: [(1, 4, 2**20, 1024)],
    GATED: [(4, 64, 2**power, 2**power) for power in (10, 13)],
    CIRCULAR: [(4, 64, 2**power, 2**power) for power in (10, 13)],
    "short kernel": [(1, 64, 16384, taps) for taps in (7, 31, 63)],
}
QUICK_SIZES = {
    LONG: [(4, 64, 1024, 1024), (2, 32, 16384, 16384)],
    BLOCKS: [(1, 64, 16384, 255)],
    MILLION: [(1, 1, 2**20, 1024)],
    GATED: [(4, 64, 1024, 1024)],
    CIRCULAR: [(4, 64, 1024, 1024)],
}


def _complex_form(u: Tensor, k: Tensor, n: int | None = None, *gates: Tensor) -> Tensor:
    """As it is usually written: complex transforms, next power of two, gates by themselves."""
    n = n or 1 << (u.shape[-1] + k.shape[-1] - 2).bit_length()
    x = gates[0] * u if gates else u
    y = torch.fft.ifft(torch.fft.fft(x, n) * torch.fft.fft(k, n), n).real[..., : u.shape[-1]]
    return gates[1] * y if gates else y


def _real_form(u: Tensor, k: Tensor, n: int | None = None, *gates: Tensor) -> Tensor:
    """As one who takes care writes it: real transforms of a length that they are fast for."""
    n = n or fast_length(u.shape[-1] + k.shape[-1] - 1)
    x = gates[0] * u if gates else u
    y = torch.fft.irfft(torch.fft.rfft(x, n) * torch.fft.rfft(k, n), n)[..., : u.shape[-1]]
    return gates[1] * y if gates else y


FORMS: dict[str, Callable[..., Tensor]] = {"complex FFT": _complex_form, "real FFT": _real_form}


def run(*, threads: Sequence[int] | None = None, quick: bool = False) -> Report:
    """Ratios of time and memory, for kernels as long as the signal and shorter ones.

    Args:
        threads: numbers of threads to measure with; by default 1 and 2.
        quick: fewer sizes.
    """
    rows = compare(list(_cases(QUICK_SIZES if quick else SIZES)), threads=threads, quick=quick)
    note = "Sizes are batch x channels x length, then the taps of the kernel. Every channel has a kernel of its own."
    return report("fft_conv", rows, BARS, note, quick=quick)


def _cases(sizes: Mapping[str, Sequence[tuple[int, int, int, int]]]) -> Iterator[Case]:
    for group, several in sizes.items():
        special = group in (GATED, CIRCULAR)
        for batch, channels, length, taps in several:
            label = f"{batch} x {channels} x {length:,}, {taps:,}" + (f", {group}" if special else "")
            for what in (FORWARD, TRAINING) if special else (FORWARD, PREPARED, TRAINING):
                yield Case(label, what, partial(_sides, what, group, (batch, channels, length), taps), group=group)


def _sides(what: str, group: str, size: tuple[int, int, int], taps: int, device: torch.device) -> dict[str, Call]:
    u, k = torch.randn(size, device=device), torch.randn(size[1], taps, device=device)
    period = size[2] if group == CIRCULAR else None
    gates = [torch.randn(size, device=device) for _ in range(2)] if group == GATED else []
    if what == TRAINING:
        forms = {"fft_conv": fft_conv, **FORMS}
        return {name: backward(form, u, k, period, *gates) for name, form in forms.items()}
    ours = forward(fft_conv, u, kernel_spectrum(k, size[2]) if what == PREPARED else k, period, *gates)
    return {"fft_conv": ours} | {name: forward(form, u, k, period, *gates) for name, form in FORMS.items()}
