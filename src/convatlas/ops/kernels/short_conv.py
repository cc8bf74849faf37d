"""Depthwise convolution of signals with a few taps in one Triton kernel, with channels before or after positions.

Checked through Triton's interpreter only; not timed on a GPU.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

__all__ = ["short_conv"]

#: Positions and channels of a tile, for channels after the positions and before them: neighbours lie together.
_TILES = {True: (32, 64), False: (512, 4)}

if importlib.util.find_spec("triton") is not None:
    import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _kernel(  # type: ignore[no-untyped-def]
        x, weight, bias, y, channels, length, out_length, padding,
        taps: tl.constexpr, positions: tl.constexpr, block: tl.constexpr, has_bias: tl.constexpr,
        channels_last: tl.constexpr, work: tl.constexpr,
    ):  # fmt: skip
        # One program computes a tile of positions and channels of one sample.
        sample = tl.program_id(2).to(tl.int64)
        position = (tl.program_id(0) * positions + tl.arange(0, positions))[:, None]
        channel = (tl.program_id(1) * block + tl.arange(0, block))[None, :]
        has_channel = channel < channels
        total = tl.zeros((positions, block), dtype=work)
        if has_bias:
            total += tl.load(bias + channel, mask=has_channel, other=0).to(work)
        for tap in tl.static_range(taps):
            seen = position + tap - padding
            at = seen * channels + channel if channels_last else channel * length + seen
            mask = has_channel & (seen >= 0) & (seen < length)
            values = tl.load(x + sample * channels * length + at, mask=mask, other=0).to(work)
            total += values * tl.load(weight + channel * taps + tap, mask=has_channel, other=0).to(work)
        at = position * channels + channel if channels_last else channel * out_length + position
        mask = has_channel & (position < out_length)
        tl.store(y + sample * channels * out_length + at, total.to(y.dtype.element_ty), mask=mask)


@torch.library.custom_op("convatlas::short_conv", mutates_args=())
def short_conv(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, channels_last: bool) -> Tensor:
    """Convolve (B, D, L), or (B, L, D) with channels last, with kernels (D, K).

    Args:
        x: signals.
        weight: (D, K).
        bias: (D,) or None.
        padding: zeros on either side; samples are left out on either side if it is negative.
        channels_last: whether the channels come after the positions.

    Returns:
        As x, contiguous, with L + 2 padding - K + 1 positions.
    """
    x, y = x.contiguous(), _empty(x, weight, padding, channels_last)
    channels, taps = weight.shape
    axis = 1 if channels_last else 2
    positions, block = _TILES[channels_last]
    grid = (triton.cdiv(y.shape[axis], positions), triton.cdiv(channels, block), len(x))
    if y.numel():
        _kernel[grid](
            x, weight.contiguous(), x if bias is None else bias.contiguous(), y,
            channels, x.shape[axis], y.shape[axis], padding, taps=taps, positions=positions, block=block,
            has_bias=bias is not None, channels_last=channels_last,
            work=tl.float64 if x.dtype == torch.float64 else tl.float32,
        )  # fmt: skip
    return y


def _empty(x: Tensor, weight: Tensor, padding: int, channels_last: bool) -> Tensor:
    shape = list(x.shape)
    shape[1 if channels_last else 2] += 2 * padding - weight.shape[1] + 1
    return x.new_empty(shape)


@short_conv.register_fake
def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, channels_last: bool) -> Tensor:
    return _empty(x, weight, padding, channels_last)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.padding, ctx.channels_last = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    """dx is a convolution with the taps in reverse; dw a product for each tap, of g with what the tap saw."""
    x, weight = ctx.saved_tensors
    axis, taps, dtype = 1 if ctx.channels_last else 2, weight.shape[1], torch.promote_types(x.dtype, torch.float32)
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    dx = dw = db = None
    if needs_x:
        dx = short_conv(g.contiguous(), weight.flip(1), None, taps - 1 - ctx.padding, ctx.channels_last)
    summed = (0, 1) if ctx.channels_last else (0, 2)
    if needs_weight:
        columns = []
        for tap in range(taps):
            # g at t belongs to x at t + tap - padding
            first, last = max(0, ctx.padding - tap), min(g.shape[axis], x.shape[axis] + ctx.padding - tap)
            count = max(0, last - first)
            there = g.narrow(axis, min(first, g.shape[axis] - count), count)
            seen = x.narrow(axis, max(0, first + tap - ctx.padding) if count else 0, count)
            columns.append((there.to(dtype) * seen.to(dtype)).sum(summed))
        dw = torch.stack(columns, dim=1).to(weight.dtype)
    if needs_bias:
        db = g.to(dtype).sum(summed).to(weight.dtype)
    return dx, dw, db, None, None


short_conv.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.convatlas.short_conv)  # type: ignore[untyped-decorator, unused-ignore]
def _flops(x_shape: Any, weight_shape: Any, bias: Any, padding: int, channels_last: bool, **_: Any) -> int:
    """Two for each multiply-add: one for each tap of each output."""
    channels, taps = weight_shape
    out_length = x_shape[1 if channels_last else 2] + 2 * padding - taps + 1
    return int(2 * x_shape[0] * channels * taps * out_length)
