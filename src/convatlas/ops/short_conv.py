"""Depthwise convolution of signals with a few taps, with the channels before the positions or after them.

Fu, Kumbong, Nguyen, Re: "FlashFFTConv: Efficient Convolutions for Long Sequences with Tensor Cores", ICLR 2024,
arXiv 2311.05908: the short convolution that stands beside the long one in Hyena and its relatives. Tokens (B, L, D) are
convolved where they lie: on a CPU they are a map of height one with channels last, whose convolution is several times
as fast as one between two transpositions.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.errors import Unsupported
from convatlas.ops.backend import Backends
from convatlas.ops.precision import without_autocast

__all__ = ["short_conv1d"]

#: Numbers of a piece of a signal that stay in the cache of a CPU: 128 KiB in float32.
_CACHED = 2**15


def _auto(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding: int = 0,
    channels_last: bool = False,
) -> str:
    if x.device.type == "cuda" and "triton" in _backends.names and not torch.compiler.is_compiling():
        return "triton"
    return "view" if channels_last else "torch"


_backends = Backends("short_conv1d", auto=_auto)


def short_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding: int = 0,
    channels_last: bool = False,
    *,
    backend: str = "auto",
) -> Tensor:
    """Convolve each channel with its own few taps: `torch.nn.functional.conv1d` with as many groups as channels.

    y[d, t] = bias[d] + sum_j weight[d, j] x[d, t + j - padding], zero outside. With padding K - 1, the first L
    positions are causal. In half precision sums are in float32.

    Args:
        x: signals (B, D, L), or (B, L, D) if ``channels_last``.
        weight: (D, K) or (D, 1, K).
        bias: (D,) or None.
        padding: zeros on either side.
        channels_last: whether the channels come after the positions.
        backend: ``auto``; ``naive`` (a sum over the taps); ``torch`` (torch's Conv1d, between transpositions for
            channels last); ``view`` (torch's Conv2d on x as a map, without a copy, for channels last); ``triton`` (on a
            GPU; checked through the interpreter only).

    Returns:
        As x, with L + 2 padding - K + 1 positions.

    Raises:
        ValueError: shapes do not fit, padding is negative, or nothing would be left.
        Unsupported: the backend cannot serve the call.
    """
    if weight.dim() == 3 and weight.shape[1] == 1:
        weight = weight.squeeze(1)
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[0] != x.shape[2 if channels_last else 1]:
        form = "(B, L, D)" if channels_last else "(B, D, L)"
        raise ValueError(f"x and weight must be {form} and (D, K), got {tuple(x.shape)} and {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
    if padding < 0:
        raise ValueError(f"padding must not be negative, got {padding}")
    length = x.shape[1 if channels_last else 2]
    if length + 2 * padding < weight.shape[1] or weight.shape[1] < 1:
        raise ValueError(f"kernels must have from 1 to {length + 2 * padding} taps, got {weight.shape[1]}")
    if backend == "triton" and backend not in _backends.names:
        raise Unsupported("backend 'triton' of short_conv1d needs the triton package")
    return _backends.run(backend, x, weight, bias, padding, channels_last)


@_backends.register("naive")
def _naive(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, channels_last: bool) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide = F.pad(x.mT.to(dtype) if channels_last else x.to(dtype), (padding, padding))
    length = wide.shape[-1] - weight.shape[1] + 1
    y = wide.new_zeros(1) if bias is None else bias.to(dtype)[:, None]
    for tap, column in enumerate(weight.to(dtype).unbind(1)):
        y = y + column[:, None] * wide[..., tap : tap + length]
    return (y.mT if channels_last else y).to(x.dtype)


def _work_type(x: Tensor) -> torch.dtype:
    # A CPU without instructions for half precision is many times slower in it.
    half = x.device.type == "cpu" and x.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if half else x.dtype


@_backends.register("torch")
def _torch(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, channels_last: bool) -> Tensor:
    dtype = _work_type(x)
    signal, kernel = (x.mT if channels_last else x).to(dtype), weight.unsqueeze(1).to(dtype)
    with without_autocast(x):
        y = F.conv1d(signal, kernel, None if bias is None else bias.to(dtype), padding=padding, groups=len(weight))
    return (y.mT if channels_last else y).to(x.dtype)


@_backends.register(
    "view",
    refuses=lambda x, weight, bias=None, padding=0, channels_last=False: (
        None if channels_last else "it takes (B, L, D), got (B, D, L)"
    ),
)
def _view(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, channels_last: bool) -> Tensor:
    # A captured graph may run elsewhere, and must serve every length.
    if x.device.type != "cpu" or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _as_map(x, weight, bias, padding)
    y: Tensor = _Tokens.apply(x, weight, bias, padding)  # type: ignore[no-untyped-call]
    return y


def _as_map(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    # (B, L, D) in memory is (B, D, 1, L) with channels last.
    dtype = _work_type(x)
    maps, kernel = x.to(dtype).unsqueeze(1).permute(0, 3, 1, 2), weight[:, None, None].to(dtype)
    offset = None if bias is None else bias.to(dtype)
    with without_autocast(x):
        y = F.conv2d(maps, kernel, offset, padding=(0, padding), groups=len(weight))
    return y.permute(0, 2, 3, 1).squeeze(1).to(x.dtype)


class _Tokens(torch.autograd.Function):
    """`_as_map` with a gradient for the taps that is several times as fast as torch's, and keeps its inputs only."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
        return _as_map(x, weight, bias, padding)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, ctx.padding = inputs
        ctx.save_for_backward(x, weight)
        ctx.bias_type = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dx = dw = db = None
        if needs_x:
            # The taps in reverse; with more padding than they reach, the ends of g saw nothing of x.
            unseen = max(0, ctx.padding - weight.shape[1] + 1)
            seen = g.narrow(1, unseen, g.shape[1] - 2 * unseen)
            dx = _view(seen, weight.flip(1), None, max(0, weight.shape[1] - 1 - ctx.padding), True)
        if needs_weight:
            dw = _weight_gradient(x, g, weight.shape[1], ctx.padding).to(weight.dtype)
        if needs_bias:
            db = g.to(torch.promote_types(g.dtype, torch.float32)).sum((0, 1)).to(ctx.bias_type)
        return dx, dw, db, None


def _weight_gradient(x: Tensor, g: Tensor, taps: int, padding: int) -> Tensor:
    """(D, K), for each tap the sum of g times what the tap saw, over pieces that the cache holds."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    (batch, length, channels), out_length = x.shape, g.shape[1]
    positions = max(1, _CACHED // channels)
    samples = max(1, positions // out_length)
    columns = [g.new_zeros(channels, dtype=dtype) for _ in range(taps)]
    for sample, start in itertools.product(range(0, batch, samples), range(0, out_length, positions)):
        x_piece, g_piece = x[sample : sample + samples], g[sample : sample + samples]
        for tap in range(taps):
            first = max(start, padding - tap)
            last = min(start + positions, out_length, length + padding - tap)
            if first < last:
                seen = x_piece[:, first + tap - padding : last + tap - padding].to(dtype)
                columns[tap] = columns[tap] + (g_piece[:, first:last].to(dtype) * seen).sum((0, 1))
    return torch.stack(columns, dim=1)


def _refuses_triton(x: Tensor, *rest: object) -> str | None:
    if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"x must be on a CUDA device (or TRITON_INTERPRET=1 be set to interpret it), got {x.device.type}"
    return None


if importlib.util.find_spec("triton") is not None:

    @_backends.register("triton", refuses=_refuses_triton)
    def _triton(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, channels_last: bool) -> Tensor:
        from convatlas.ops.kernels.short_conv import short_conv

        y: Tensor = short_conv(x, weight, bias, padding, channels_last)
        return y
