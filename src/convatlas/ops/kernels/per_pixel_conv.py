"""Convolution with a kernel at every position, in one Triton kernel: the kernels stay in registers for all samples.

Checked through Triton's interpreter only; not timed on a GPU.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

__all__ = ["per_pixel_conv"]

#: Pixels of the output that one program computes.
_PIXELS = 128

if importlib.util.find_spec("triton") is not None:
    import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _kernel(  # type: ignore[no-untyped-def]
        x, weights, y, batch, channels, in_height, in_width, height, width, stride, padding, dilation,
        k: tl.constexpr, taps: tl.constexpr, pixels: tl.constexpr, work: tl.constexpr,
    ):  # fmt: skip
        # One program computes a tile of one channel for every sample.
        channel = tl.program_id(0).to(tl.int64)
        pixel = tl.program_id(1) * pixels + tl.arange(0, pixels)
        tap = tl.arange(0, taps)
        valid = (tap < k * k)[:, None] & (pixel < height * width)[None, :]
        rows = (pixel // width * stride - padding)[None, :] + (tap // k * dilation)[:, None]
        columns = (pixel % width * stride - padding)[None, :] + (tap % k * dilation)[:, None]
        inside = valid & (rows >= 0) & (rows < in_height) & (columns >= 0) & (columns < in_width)
        seen = rows * in_width + columns
        place = (channel * k * k + tap[:, None]) * height * width + pixel[None, :]
        kernel = tl.load(weights + place, mask=valid, other=0).to(work)
        for sample in range(batch):
            plane = sample * channels + channel
            patch = tl.load(x + plane * in_height * in_width + seen, mask=inside, other=0).to(work)
            total = tl.sum(kernel * patch, axis=0)
            tl.store(y + plane * height * width + pixel, total.to(y.dtype.element_ty), mask=pixel < height * width)


@torch.library.custom_op("convatlas::per_pixel_conv", mutates_args=())
def per_pixel_conv(x: Tensor, weight_maps: Tensor, stride: int, padding: int, dilation: int) -> Tensor:
    """Convolve (B, C, H, W) with kernels (C, k, k, h, w) to (B, C, h, w), in the type of x."""
    batch, channels, in_height, in_width = x.shape
    k, _, height, width = weight_maps.shape[1:]
    y = x.new_empty(batch, channels, height, width)
    grid = (channels, triton.cdiv(height * width, _PIXELS))
    _kernel[grid](
        x.contiguous(), weight_maps.contiguous(), y, batch, channels, in_height, in_width, height, width,
        stride, padding, dilation, k=k, taps=triton.next_power_of_2(k * k), pixels=_PIXELS,
        work=tl.float64 if x.dtype == torch.float64 else tl.float32,
    )  # fmt: skip
    return y


@per_pixel_conv.register_fake
def _fake(x: Tensor, weight_maps: Tensor, stride: int, padding: int, dilation: int) -> Tensor:
    return x.new_empty(*x.shape[:2], *weight_maps.shape[3:])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight_maps, *ctx.geometry = inputs
    ctx.save_for_backward(x, weight_maps)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    """Tap by tap: dx where the tap looked, dV the sum over the samples of g times what it saw."""
    x, weight_maps = ctx.saved_tensors
    stride, padding, dilation = ctx.geometry
    dtype = torch.promote_types(x.dtype, torch.float32)
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    wide = F.pad(x.to(dtype), (padding,) * 4)
    dx, dv = torch.zeros_like(wide), torch.zeros_like(weight_maps, dtype=dtype)
    g = g.to(dtype)
    height, width = weight_maps.shape[3:]
    for row in range(weight_maps.shape[1]):
        for column in range(weight_maps.shape[2]):
            rows = slice(dilation * row, dilation * row + stride * (height - 1) + 1, stride)
            columns = slice(dilation * column, dilation * column + stride * (width - 1) + 1, stride)
            if needs_x:
                dx[:, :, rows, columns] += g * weight_maps[:, row, column].to(dtype)
            if needs_weight:
                dv[:, row, column] = (g * wide[:, :, rows, columns]).sum(0)
    dx = dx[:, :, padding : padding + x.shape[2], padding : padding + x.shape[3]].to(x.dtype)
    return dx if needs_x else None, dv.to(weight_maps.dtype) if needs_weight else None, None, None, None


per_pixel_conv.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.convatlas.per_pixel_conv)  # type: ignore[untyped-decorator, unused-ignore]
def _flops(x_shape: Any, weight_shape: Any, *_: Any, **__: Any) -> int:
    """Two for each multiply-add: one for each tap of each output."""
    channels, k, _width, height, width = weight_shape
    return int(2 * x_shape[0] * channels * k * k * height * width)
