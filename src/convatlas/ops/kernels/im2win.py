"""Convolution by windows as one Triton kernel: a matrix product whose left side is read through the window tensor.

Lu, Chu, Guo, Liu: "Im2win: An Efficient Convolution Paradigm on GPU", Euro-Par 2023, arXiv 2306.14316, section 4.
Checked through Triton's interpreter only; not timed on a GPU.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from convatlas.ops.row_windows import im2win_filter, padded, window_gradients, window_rows

__all__ = ["window_conv"]

#: Positions of the output and values of a window that one program takes at a time.
_POSITIONS, _VALUES = 128, 32

if importlib.util.find_spec("triton") is not None:
    import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _kernel(  # type: ignore[no-untyped-def]
        x, filters, y, positions, height, width, rows, columns, step_row, step_tap, step_column, spread, above, left,
        first, at_image, at_row, at_tap, at_column, at_channel, channels, outputs, groups,
        kernel_height: tl.constexpr, kernel_width: tl.constexpr,
        block_positions: tl.constexpr, block_outputs: tl.constexpr, block_values: tl.constexpr,
        work: tl.constexpr, precision: tl.constexpr,
    ):  # fmt: skip
        # One program computes a tile of positions (image, row, column of the output) times filters of one group.
        group = tl.program_id(2)
        position = tl.program_id(0) * block_positions + tl.arange(0, block_positions)
        output = tl.program_id(1) * block_outputs + tl.arange(0, block_outputs)
        exists = position < positions
        wanted = output < outputs
        image = (position // (height * width)).to(tl.int64)
        i = position // width % height
        j = position % width
        values = kernel_height * channels
        total = tl.zeros((block_positions, block_outputs), dtype=work)
        for w in tl.static_range(kernel_width):
            column = j * step_column + w * spread - left
            in_row = exists & (column >= 0) & (column < columns)
            base = first + image * at_image + i * at_row + column * at_column
            for start in range(0, values, block_values):
                # The order of a window: the height of the kernel runs before its width, channels before both.
                value = start + tl.arange(0, block_values)
                h = value // channels
                c = value % channels
                row = (i * step_row - above)[:, None] + (h * step_tap)[None, :]
                real = (value < values)[None, :]
                inside = in_row[:, None] & real & (row >= 0) & (row < rows)
                seen = base[:, None] + (h * at_tap + (group * channels + c) * at_channel)[None, :]
                a = tl.load(x + seen, mask=inside, other=0).to(work)
                there = ((group * outputs + output) * kernel_width + w)[None, :] * values + value[:, None]
                b = tl.load(filters + there, mask=(value < values)[:, None] & wanted[None, :], other=0).to(work)
                total += tl.dot(a, b, input_precision=precision, out_dtype=work)
        place = position.to(tl.int64)[:, None] * (groups * outputs) + (group * outputs + output)[None, :]
        tl.store(y + place, total.to(y.dtype.element_ty), mask=exists[:, None] & wanted[None, :])


@torch.library.custom_op("convatlas::window_conv", mutates_args=())
def window_conv(
    x: Tensor,
    weight: Tensor,
    padding: list[int],
    stride: list[int],
    dilation: list[int],
    groups: int,
    explicit: bool,
) -> Tensor:
    """Convolve (B, C, H, W) with (O, C / groups, K, L), in the type of x; channels are last in memory.

    Args:
        x: image.
        weight: filters.
        padding: left, right, above, below.
        stride, dilation: for height and width.
        groups: of the channels.
        explicit: whether the window tensor is written first, or read from the image as if it were there.
    """
    y = _empty(x, weight, padding, stride, dilation)
    if not y.numel():
        return y
    taps, columns = weight.shape[2:]
    height, width = y.shape[2:]
    channels = x.shape[1]
    if explicit:
        source = window_rows(padded(x, (padding[0], padding[1], padding[2], padding[3])), taps, stride[0], dilation[0])
        across = source.shape[1]
        strides = [0, height * across * taps * channels, across * taps * channels, channels, taps * channels, 1]
        # Every row of a band is inside, and the zeros around the image stand in it.
        limits, steps, above, left = (1, across), (0, 0), 0, 0
    else:
        source = x
        image, plane, line, one = x.stride()
        left, _, above, _ = padding
        strides = [-above * line, image, stride[0] * line, dilation[0] * line, one, plane]
        limits, steps = (x.shape[2], x.shape[3]), (stride[0], dilation[0])
    outputs = weight.shape[0] // groups
    positions = y.shape[0] * height * width
    block = min(128, max(16, triton.next_power_of_2(outputs)))
    grid = (triton.cdiv(positions, _POSITIONS), triton.cdiv(outputs, block), groups)
    _kernel[grid](
        source, im2win_filter(weight, "nhwc"), y, positions, height, width, *limits, *steps, stride[1], dilation[1],
        above, left, *strides, channels // groups, outputs, groups, kernel_height=taps, kernel_width=columns,
        block_positions=_POSITIONS, block_outputs=block, block_values=_VALUES,
        work=tl.float64 if x.dtype == torch.float64 else tl.float32,
        precision="tf32" if x.dtype in (torch.float16, torch.bfloat16) else "ieee",
    )  # fmt: skip
    return y


def _empty(x: Tensor, weight: Tensor, padding: list[int], stride: list[int], dilation: list[int]) -> Tensor:
    sides = (x.shape[2] + padding[2] + padding[3], x.shape[3] + padding[0] + padding[1])
    size = [
        (side - d * (taps - 1) - 1) // step + 1
        for side, taps, step, d in zip(sides, weight.shape[2:], stride, dilation, strict=True)
    ]
    return x.new_empty(x.shape[0], *size, weight.shape[0]).permute(0, 3, 1, 2)


@window_conv.register_fake
def _fake(
    x: Tensor, weight: Tensor, padding: list[int], stride: list[int], dilation: list[int], groups: int, explicit: bool
) -> Tensor:
    return _empty(x, weight, padding, stride, dilation)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.padding, ctx.stride, ctx.dilation, ctx.groups, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    dtype = torch.promote_types(x.dtype, torch.float32)
    geometry = (tuple(ctx.stride), tuple(ctx.dilation))
    dx, dw = window_gradients(
        x.to(dtype), weight.to(dtype), g.to(dtype), tuple(ctx.padding), geometry, ctx.groups, ctx.needs_input_grad[:2]
    )
    dx = None if dx is None else dx.to(x.dtype)
    return dx, None if dw is None else dw.to(weight.dtype), None, None, None, None, None


window_conv.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.convatlas.window_conv)  # type: ignore[untyped-decorator, unused-ignore]
def _flops(x_shape: Any, weight_shape: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Two for each multiply-add: one for each value of each window and each filter."""
    outputs, channels, taps, columns = weight_shape
    batch, _, height, width = out_shape
    return int(2 * batch * height * width * outputs * channels * taps * columns)
