"""Structured global convolution beside what else mixes long sequences: making its kernel, and the whole layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.bench.ratio import Bar, Call, Case, compare, forward, report
from convatlas.nn.mixers.sgconv import SGConv1d
from convatlas.nn.sgconv_kernel import SGConvKernel
from convatlas.report import Report

__all__ = ["run"]

# Fixed before anything was measured.
BARS = [
    Bar(
        statement="The kernel is made faster than that of a diagonal state space model",
        published="faster than S4 (arXiv 2210.09298, section 4)",
        theirs="state space by products",
        at_least=2.0,
        what="making a kernel",
        group="long",
    ),
    Bar(
        statement="The layer is faster than self-attention on long sequences",
        published="no figure; attention grows with the square of the length",
        theirs="self-attention",
        at_least=2.0,
        what="layer",
        group="long",
    ),
]

CHANNELS, STATES, HEADS, BATCH, KERNEL_DIM = 128, 64, 4, 2, 32
KERNEL_LENGTHS = (1024, 4096, 16384)
LAYER_LENGTHS = (1024, 4096, 16384)
#: From here on a length counts as long.
LONG = 4096


def run(*, threads: Sequence[int] | None = None, quick: bool = False) -> Report:
    """Ratios of time and memory by the length of the sequence.

    Args:
        threads: numbers of threads to measure with; by default 1 and 2.
        quick: one length each.
    """
    kinds: list[tuple[str, tuple[int, ...], Callable[[int, torch.device], dict[str, Call]]]] = [
        ("making a kernel", KERNEL_LENGTHS, _kernels),
        ("layer", LAYER_LENGTHS, _layers),
    ]
    cases = [
        Case(f"{CHANNELS} channels, {length:,} positions", what, partial(sides, length), group=_group(length))
        for what, lengths, sides in kinds
        for length in (lengths[1:2] if quick else lengths)
    ]
    return report("sgconv", compare(cases, threads=threads, quick=quick), BARS, _NOTE, quick=quick)


_NOTE = (
    "The sides make kernels and outputs of other values, so that only their shapes are compared. State space: a kernel "
    f"of {STATES} diagonal states a channel from all their powers, as published, and by products of two short tables "
    f"of them, which is faster and what the bar is held against. Self-attention: {HEADS} heads, in torch's fused form, "
    f"with its projections. {BATCH} sequences."
)


def _group(length: int) -> str:
    return "long" if length >= LONG else "short"


def _shape_of(function: Callable[[], Tensor]) -> Tensor:
    return torch.tensor(function().shape)


def _kernels(length: int, device: torch.device) -> dict[str, Call]:
    kernel = SGConvKernel(CHANNELS, length, kernel_dim=KERNEL_DIM).to(device)
    half = STATES // 2
    rates = torch.complex(-0.5 * torch.ones(CHANNELS, half), math.pi * torch.arange(half).expand(CHANNELS, -1))
    steps = torch.logspace(-3, -1, CHANNELS)[:, None]
    weights = torch.randn(CHANNELS, half, dtype=torch.complex64)
    exponents, weights = (rates * steps).to(device), weights.to(device)
    positions = torch.arange(length, device=device)

    def state_space() -> Tensor:
        powers = torch.exp(exponents[..., None] * positions)
        return 2 * torch.einsum("hn,hnl->hl", weights, powers).real[None]

    def by_products() -> Tensor:
        # Powers of a sum of two numbers are products, so that two short tables and a matrix product give all of them.
        side = math.isqrt(length - 1) + 1
        short = torch.exp(exponents[..., None] * positions[:side])
        long = weights[..., None] * torch.exp(exponents[..., None] * (side * positions[:side]))
        whole = (long.transpose(1, 2) @ short).real.flatten(1)
        return 2 * whole[None, :, :length]

    return {
        "sgconv": forward(_shape_of, lambda: kernel(length)),
        "state space": forward(_shape_of, state_space),
        "state space by products": forward(_shape_of, by_products),
    }


def _layers(length: int, device: torch.device) -> dict[str, Call]:
    layer = SGConv1d(CHANNELS, length, kernel_dim=KERNEL_DIM, bidirectional=True, post_act="glu").to(device)
    x = torch.randn(BATCH, CHANNELS, length, device=device)
    tokens = x.transpose(1, 2).contiguous()
    into, out = (nn.Linear(CHANNELS, width).to(device) for width in (3 * CHANNELS, CHANNELS))

    def attention() -> Tensor:
        q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in into(tokens).chunk(3, dim=2))
        mixed: Tensor = out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return mixed.transpose(1, 2)

    return {
        "sgconv": forward(_shape_of, lambda: layer(x)),
        "self-attention": forward(_shape_of, attention),
    }
