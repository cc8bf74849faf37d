"""A ConvFirst block in one Triton kernel: from input to output, its features stay in registers and shared memory.

Lavin: "On the Efficiency of Convolutional Neural Networks", 2024, arXiv 2404.03617. Checked through Triton's
interpreter only; not timed on a GPU.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

__all__ = ["convfirst_block"]

#: Pixels and expanded channels of a step; a matrix product on a GPU sums over at least 16.
_PIXELS, _CHUNK, _LEAST = 64, 64, 16

if importlib.util.find_spec("triton") is not None:
    import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _convfirst_kernel(  # type: ignore[no-untyped-def]
        x, wg, bg, w2, b2, w3, b3, y, pixels, height, width, out_height, out_width, channels, out_channels, hidden,
        stride: tl.constexpr, size: tl.constexpr, residual: tl.constexpr, blocks: tl.constexpr, block: tl.constexpr,
        outputs: tl.constexpr, pixel_count: tl.constexpr, chunk: tl.constexpr, exact: tl.constexpr,
        operand: tl.constexpr,
    ):  # fmt: skip
        # One program makes all channels of some pixels. x and y lie with channels last, and weights are padded.
        pixel = tl.program_id(0).to(tl.int64) * pixel_count + tl.arange(0, pixel_count)
        there = pixel < pixels
        column = pixel % out_width
        row = pixel // out_width % out_height
        sample = pixel // (out_width * out_height)

        # Spatial convolution: blocks of channels that hold whole groups, one product a tap and block.
        number = tl.arange(0, blocks)
        inner = tl.arange(0, block)
        channel = (number[:, None] * block + inner[None, :])[:, None, :]
        t = tl.zeros((blocks, pixel_count, block), dtype=exact)
        for tap in range(size * size):
            at_row = row * stride + tap // size - size // 2
            at_column = column * stride + tap % size - size // 2
            seen = there & (at_row >= 0) & (at_row < height) & (at_column >= 0) & (at_column < width)
            at = ((sample * height + at_row) * width + at_column) * channels
            mask = seen[None, :, None] & (channel < channels)
            values = tl.load(x + at[None, :, None] + channel, mask=mask, other=0).to(exact)
            kernel = ((tap * blocks + number)[:, None, None] * block + inner[None, :, None]) * block
            taps = tl.load(wg + kernel + inner[None, None, :]).to(exact)
            t += tl.dot(values.to(operand), taps.to(operand), out_dtype=exact, input_precision="ieee")
        features = tl.arange(0, blocks * block)
        t = tl.reshape(tl.permute(t, (1, 0, 2)), (pixel_count, blocks * block))
        t = (t + tl.load(bg + features).to(exact)[None, :]).to(operand)

        # Expansion, SiLU and projection, some expanded channels at a time.
        out = tl.arange(0, outputs)
        part = tl.arange(0, chunk)
        total = tl.zeros((pixel_count, outputs), dtype=exact) + tl.load(b3 + out).to(exact)[None, :]
        for first in range(0, hidden, chunk):
            expansion = tl.load(w2 + features[:, None] * hidden + (first + part)[None, :]).to(exact).to(operand)
            h = tl.dot(t, expansion, out_dtype=exact, input_precision="ieee")
            h += tl.load(b2 + first + part).to(exact)[None, :]
            h = h / (1 + tl.exp(-h))
            projection = tl.load(w3 + (first + part)[:, None] * outputs + out[None, :]).to(exact).to(operand)
            total += tl.dot(h.to(operand), projection, out_dtype=exact, input_precision="ieee")

        at = pixel[:, None] * out_channels + out[None, :]
        mask = there[:, None] & (out < out_channels)[None, :]
        if residual:
            total += tl.load(x + at, mask=mask, other=0).to(exact)
        tl.store(y + at, total.to(y.dtype.element_ty), mask=mask)


@torch.library.custom_op("convatlas::convfirst_block", mutates_args=())
def convfirst_block(
    x: Tensor,
    wg: Tensor,
    bg: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    stride: int,
    groups: int,
    residual: bool,
) -> Tensor:
    """The block of `convatlas.ops.block_fusion.fused_convfirst`; all tensors have one type.

    Returns:
        (B, K, ceil(H / stride), ceil(W / stride)), channels last.
    """
    samples, channels, height, width = x.shape
    out_channels, hidden = w3.shape[:2]
    y = _empty(x, out_channels, stride)
    out_height, out_width = y.shape[2:]
    block = max(_LEAST, wg.shape[1])
    padded = max(block, _power(channels))
    outputs, expanded = max(_LEAST, _power(out_channels)), -(-hidden // _CHUNK) * _CHUNK
    pixels = samples * out_height * out_width
    if pixels == 0:
        return y
    half = x.dtype in (torch.float16, torch.bfloat16)
    exact = tl.float64 if x.dtype == torch.float64 else tl.float32
    # The interpreter computes products of bfloat16 wrongly; a GPU has units for products of half precision.
    short = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    operand = short[x.dtype] if half and os.environ.get("TRITON_INTERPRET") != "1" else exact
    _convfirst_kernel[(triton.cdiv(pixels, _PIXELS),)](
        x.permute(0, 2, 3, 1).contiguous(),
        _blocks(wg, padded // block, block),
        _padded(bg, padded),
        _padded(w2.flatten(1).t(), padded, expanded),
        _padded(b2, expanded),
        _padded(w3.flatten(1).t(), expanded, outputs),
        _padded(b3, outputs),
        y.permute(0, 2, 3, 1),
        pixels, height, width, out_height, out_width, channels, out_channels, expanded,
        stride=stride, size=wg.shape[-1], residual=residual, blocks=padded // block, block=block, outputs=outputs,
        pixel_count=_PIXELS, chunk=_CHUNK, exact=exact, operand=operand,
    )  # fmt: skip
    return y


def _empty(x: Tensor, out_channels: int, stride: int) -> Tensor:
    height, width = (-(-size // stride) for size in x.shape[2:])
    shape = (x.shape[0], out_channels, height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _power(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _padded(values: Tensor, *sizes: int) -> Tensor:
    pads = [pad for size, have in zip(sizes[::-1], values.shape[::-1], strict=True) for pad in (0, size - have)]
    return F.pad(values, pads).contiguous()


def _blocks(wg: Tensor, blocks: int, block: int) -> Tensor:
    """Kernels (C, width, R, R) as (R * R, blocks, block, block): a block holds some groups along its diagonal."""
    channels, width, size, _ = wg.shape
    to = torch.arange(channels, device=wg.device)
    across = torch.arange(width, device=wg.device)
    source = (to // width * width % block)[:, None] + across
    dense = wg.new_zeros(blocks, block, block, size * size)
    dense[(to // block)[:, None], source, (to % block)[:, None]] = wg.flatten(2)
    return dense.permute(3, 0, 1, 2).contiguous()


@convfirst_block.register_fake
def _fake(
    x: Tensor,
    wg: Tensor,
    bg: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    stride: int,
    groups: int,
    residual: bool,
) -> Tensor:
    return _empty(x, w3.shape[0], stride)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, wg, bg, w2, b2, w3, _, ctx.stride, ctx.groups, ctx.residual = inputs
    ctx.save_for_backward(x, wg, bg, w2, b2, w3)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    """Layer by layer, from features that are computed again."""
    x, wg, bg, w2, b2, w3 = ctx.saved_tensors
    stride, padding, groups = [ctx.stride] * 2, [wg.shape[-1] // 2] * 2, ctx.groups
    t = F.conv2d(x, wg, bg, stride, padding, 1, groups)
    u = F.conv2d(t, w2, b2)
    g_h, g_w3, g_b3 = _convolution_backward(g, F.silu(u), w3, [1, 1], [0, 0], 1)
    g_t, g_w2, g_b2 = _convolution_backward(torch.ops.aten.silu_backward(g_h, u), t, w2, [1, 1], [0, 0], 1)
    g_x, g_wg, g_bg = _convolution_backward(g_t, x, wg, stride, padding, groups)
    return g_x + g if ctx.residual else g_x, g_wg, g_bg, g_w2, g_b2, g_w3, g_b3, None, None, None


def _convolution_backward(
    g: Tensor, x: Tensor, weight: Tensor, stride: list[int], padding: list[int], groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        g, x, weight, [len(weight)], stride, padding, [1, 1], False, [0, 0], groups, [True, True, True]
    )
    return result


convfirst_block.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.convatlas.convfirst_block)  # type: ignore[untyped-decorator, unused-ignore]
def _flops(x_shape: Any, wg_shape: Any, bg: Any, w2_shape: Any, b2: Any, w3_shape: Any, *_: Any, **named: Any) -> int:
    """Two for each multiply-add of the three convolutions, at every pixel of the output."""
    samples, _, height, width = named["out_shape"]
    weights = sum(shape[0] * shape[1] * shape[2] * shape[3] for shape in (wg_shape, w2_shape, w3_shape))
    return 2 * int(samples * height * width * weights)
