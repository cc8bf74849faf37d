"""Deformable convolution in Triton: pixels are interpolated within the matrix product, so patches are never stored.

Checked through Triton's interpreter only; not timed on a GPU.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

__all__ = ["deform_conv"]

#: Positions, input and output channels of a step; a matrix product on a GPU sums over at least 16.
_POSITIONS, _INNER, _OUTER, _LEAST = 64, 32, 64, 16
#: Positions that one program sums for the gradient of the weight.
_SPLIT = 4096

if importlib.util.find_spec("triton") is not None:
    import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

    from convatlas.ops.kernels.bilinear import interpolate, scatter

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _read_place(  # type: ignore[no-untyped-def]
        offset, mask, position, there, group, tap, groups, size_y, size_x, stride_y, stride_x, padding_y, padding_x,
        dilation_y, dilation_x, columns, taps, masked: tl.constexpr, work: tl.constexpr,
    ):  # fmt: skip
        # Where a tap reads at some positions of the output, and its modulation.
        area = size_y * size_x
        sample = position // area
        pixel = position % area
        at = ((sample * groups + group) * taps + tap) * area + pixel
        moved = at + ((sample * groups + group) * taps + tap) * area
        y = tl.load(offset + moved, mask=there, other=0).to(work)
        x = tl.load(offset + moved + area, mask=there, other=0).to(work)
        y += (pixel // size_x * stride_y - padding_y + tap // columns * dilation_y).to(work)
        x += (pixel % size_x * stride_x - padding_x + tap % columns * dilation_x).to(work)
        factor = tl.full(position.shape, 1.0, dtype=work)
        if masked:
            factor = tl.load(mask + at, mask=there, other=0).to(work)
        return sample, y, x, factor, moved, at

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _forward_kernel(  # type: ignore[no-untyped-def]
        x, offset, mask, weight, y, count, channels, outputs, inner, height, width, groups, size_y, size_x, stride_y,
        stride_x, padding_y, padding_x, dilation_y, dilation_x, columns, taps, part, parts,
        masked: tl.constexpr, positions: tl.constexpr, inners: tl.constexpr, outers: tl.constexpr, work: tl.constexpr,
        precision: tl.constexpr,
    ):  # fmt: skip
        # One program makes some output channels of one group at some positions. x and y lie with channels last, the
        # weight as (taps, inner, outputs). A part is a run of channels in one group of each kind.
        position = tl.program_id(0).to(tl.int64) * positions + tl.arange(0, positions)
        there = position < count
        conv_group = tl.program_id(1)
        of_group = outputs // (channels // inner)
        out = tl.program_id(2) * outers + tl.arange(0, outers)
        has_out = out < of_group
        out = conv_group * of_group + out
        total = tl.zeros((positions, outers), dtype=work)
        for number in range(parts):
            first = conv_group * inner + number * part
            group = first // (channels // groups)
            for tap in range(taps):
                sample, at_y, at_x, factor, _moved, _at = _read_place(
                    offset, mask, position, there, group, tap, groups, size_y, size_x, stride_y, stride_x, padding_y,
                    padding_x, dilation_y, dilation_x, columns, taps, masked, work,
                )  # fmt: skip
                for start in range(0, part, inners):
                    run = start + tl.arange(0, inners)
                    has_run = run < part
                    value, _by_y, _by_x = interpolate(
                        x,
                        sample * height * width,
                        at_y,
                        at_x,
                        height,
                        width,
                        there,
                        channels,
                        first + run,
                        has_run,
                        work,
                    )
                    kernel = ((tap * inner + number * part + run) * outputs)[:, None] + out[None, :]
                    w = tl.load(weight + kernel, mask=has_run[:, None] & has_out[None, :], other=0).to(work)
                    total += tl.dot(value * factor[:, None], w, out_dtype=work, input_precision=precision)
        place = position[:, None] * outputs + out[None, :]
        tl.store(y + place, total.to(y.dtype.element_ty), mask=there[:, None] & has_out[None, :])

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _input_kernel(  # type: ignore[no-untyped-def]
        x, offset, mask, weight, g, dx, d_offset, d_mask, count, channels, outputs, inner, height, width, groups,
        size_y, size_x, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x, columns, taps, part, parts,
        masked: tl.constexpr, positions: tl.constexpr, inners: tl.constexpr, outers: tl.constexpr, work: tl.constexpr,
        precision: tl.constexpr,
    ):  # fmt: skip
        # One program takes one tap and offset group back at some positions.
        position = tl.program_id(0).to(tl.int64) * positions + tl.arange(0, positions)
        there = position < count
        tap = tl.program_id(1)
        group = tl.program_id(2)
        of_group = outputs // (channels // inner)
        sample, at_y, at_x, factor, moved, at = _read_place(
            offset, mask, position, there, group, tap, groups, size_y, size_x, stride_y, stride_x, padding_y,
            padding_x, dilation_y, dilation_x, columns, taps, masked, work,
        )  # fmt: skip
        by_y = tl.zeros((positions,), dtype=work)
        by_x = tl.zeros((positions,), dtype=work)
        by_factor = tl.zeros((positions,), dtype=work)
        for number in range(channels // groups // part):
            first = group * (channels // groups) + number * part
            conv_group = first // inner
            for start in range(0, part, inners):
                run = start + tl.arange(0, inners)
                has_run = run < part
                back = tl.zeros((positions, inners), dtype=work)
                for begin in range(0, of_group, outers):
                    out = begin + tl.arange(0, outers)
                    has_out = out < of_group
                    out += conv_group * of_group
                    seen = there[:, None] & has_out[None, :]
                    grown = tl.load(g + position[:, None] * outputs + out[None, :], mask=seen, other=0).to(work)
                    kernel = ((tap * inner + first % inner + run) * outputs)[None, :] + out[:, None]
                    w = tl.load(weight + kernel, mask=has_run[None, :] & has_out[:, None], other=0).to(work)
                    back += tl.dot(grown, w, out_dtype=work, input_precision=precision)
                value, change_y, change_x = interpolate(
                    x, sample * height * width, at_y, at_x, height, width, there, channels, first + run, has_run, work
                )
                by_factor += tl.sum(back * value, axis=1)
                back *= factor[:, None]
                by_y += tl.sum(back * change_y, axis=1)
                by_x += tl.sum(back * change_x, axis=1)
                scatter(
                    dx, back, sample * height * width, at_y, at_x, height, width, there, channels, first + run, has_run
                )
        tl.store(d_offset + moved, by_y, mask=there)
        tl.store(d_offset + moved + size_y * size_x, by_x, mask=there)
        if masked:
            tl.store(d_mask + at, by_factor, mask=there)

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _weight_kernel(  # type: ignore[no-untyped-def]
        x, offset, mask, g, d_weight, count, channels, outputs, inner, height, width, groups, size_y, size_x,
        stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x, columns, taps, part, parts, blocks, split,
        masked: tl.constexpr, positions: tl.constexpr, inners: tl.constexpr, outers: tl.constexpr, work: tl.constexpr,
        precision: tl.constexpr,
    ):  # fmt: skip
        # One program sums the gradient of a tile of the weight of one tap over some positions.
        tap = tl.program_id(0) % taps
        chunk = tl.program_id(0) // taps
        run = tl.program_id(1) % blocks * inners + tl.arange(0, inners)
        has_run = run < part
        first = tl.program_id(1) // blocks * part
        group = first // (channels // groups)
        conv_group = first // inner
        of_group = outputs // (channels // inner)
        out = tl.program_id(2) * outers + tl.arange(0, outers)
        has_out = out < of_group
        out += conv_group * of_group
        total = tl.zeros((inners, outers), dtype=work)
        for step in range(0, split, positions):
            position = chunk.to(tl.int64) * split + step + tl.arange(0, positions)
            there = position < count
            sample, at_y, at_x, factor, _moved, _at = _read_place(
                offset, mask, position, there, group, tap, groups, size_y, size_x, stride_y, stride_x, padding_y,
                padding_x, dilation_y, dilation_x, columns, taps, masked, work,
            )  # fmt: skip
            value, _by_y, _by_x = interpolate(
                x, sample * height * width, at_y, at_x, height, width, there, channels, first + run, has_run, work
            )
            seen = there[:, None] & has_out[None, :]
            grown = tl.load(g + position[:, None] * outputs + out[None, :], mask=seen, other=0).to(work)
            total += tl.dot(tl.trans(value * factor[:, None]), grown, out_dtype=work, input_precision=precision)
        place = ((tap * inner + first % inner + run) * outputs)[:, None] + out[None, :]
        tl.atomic_add(d_weight + place, total, mask=has_run[:, None] & has_out[None, :])


def _geometry(x: Tensor, offset: Tensor, weight: Tensor, place: list[int]) -> tuple[int, ...]:
    """What all kernels take after their tensors, from the number of positions to the number of parts."""
    batch, channels, height, width = x.shape
    outputs, inner, rows, columns = weight.shape
    groups = offset.shape[1] // (2 * rows * columns)
    size = offset.shape[2:]
    part = math.gcd(inner, channels // groups)
    sizes = (batch * size[0] * size[1], channels, outputs, inner, height, width, groups, *size)
    return (*sizes, *place, columns, rows * columns, part, inner // part)


def _blocks(x: Tensor, weight: Tensor, part: int) -> dict[str, Any]:
    of_group = weight.shape[0] * weight.shape[1] // x.shape[1]
    double = x.dtype == torch.float64
    return {
        "positions": _POSITIONS // 2 if double else _POSITIONS,
        "inners": min(_INNER, max(_LEAST, triton.next_power_of_2(part))),
        "outers": min(_OUTER, max(_LEAST, triton.next_power_of_2(of_group))),
        "work": tl.float64 if double else tl.float32,
        "precision": "tf32" if x.dtype in (torch.float16, torch.bfloat16) else "ieee",
    }


@torch.library.custom_op("convatlas::deform_conv", mutates_args=())
def deform_conv(x: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, place: list[int]) -> Tensor:
    """Convolve as `convatlas.ops.deform_conv.deform_conv2d`; place: stride, padding and dilation, two each."""
    geometry = _geometry(x, offset, weight, place)
    count, channels, outputs, inner = geometry[:4]
    size = offset.shape[2:]
    y = x.new_empty(x.shape[0], *size, outputs)
    if y.numel():
        blocks = _blocks(x, weight, geometry[-2])
        groups = channels // inner
        grid = (triton.cdiv(count, blocks["positions"]), groups, triton.cdiv(outputs // groups, blocks["outers"]))
        _forward_kernel[grid](
            x.permute(0, 2, 3, 1).contiguous(), offset.contiguous(), offset if mask is None else mask.contiguous(),
            weight.permute(2, 3, 1, 0).contiguous(), y, *geometry, masked=mask is not None, **blocks,
        )  # fmt: skip
    return y.permute(0, 3, 1, 2)


@deform_conv.register_fake
def _fake(x: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, place: list[int]) -> Tensor:
    return x.new_empty(x.shape[0], *offset.shape[2:], weight.shape[0]).permute(0, 3, 1, 2)


@torch.library.custom_op("convatlas::deform_conv_backward", mutates_args=())
def _gradients(
    x: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, g: Tensor, place: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    geometry = _geometry(x, offset, weight, place)
    count, channels, outputs, inner, *_, taps, part, _parts = geometry
    groups, offset_groups = channels // inner, geometry[6]
    work = torch.promote_types(x.dtype, torch.float32)
    pixels, moves = x.permute(0, 2, 3, 1).contiguous(), offset.contiguous()
    factors = moves if mask is None else mask.contiguous()
    grown = g.permute(0, 2, 3, 1).contiguous()
    kernel = weight.permute(2, 3, 1, 0).contiguous()
    dx = torch.zeros_like(pixels, dtype=work)
    d_offset = torch.zeros_like(moves, dtype=work)
    d_mask = x.new_zeros((0,) if mask is None else mask.shape, dtype=work)
    d_weight = torch.zeros_like(kernel, dtype=work)
    if grown.numel():
        blocks = _blocks(x, weight, part)
        outers = triton.cdiv(outputs // groups, blocks["outers"])
        _input_kernel[(triton.cdiv(count, blocks["positions"]), taps, offset_groups)](
            pixels, moves, factors, kernel, grown, dx, d_offset, d_mask, *geometry, masked=mask is not None, **blocks,
        )  # fmt: skip
        inners = triton.cdiv(part, blocks["inners"])
        split = min(_SPLIT, triton.cdiv(count, _POSITIONS) * _POSITIONS)
        _weight_kernel[(taps * triton.cdiv(count, split), channels // part * inners, outers)](
            pixels, moves, factors, grown, d_weight, *geometry, inners, split, masked=mask is not None, **blocks,
        )  # fmt: skip
    return (
        dx.permute(0, 3, 1, 2).to(x.dtype),
        d_offset.to(offset.dtype),
        d_weight.permute(3, 2, 0, 1).to(weight.dtype),
        d_mask if mask is None else d_mask.to(mask.dtype),
    )


@_gradients.register_fake
def _fake_gradients(
    x: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, g: Tensor, place: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, d_weight = x.permute(0, 2, 3, 1), weight.permute(2, 3, 1, 0)
    dx, d_weight = dx.new_empty(dx.shape).permute(0, 3, 1, 2), d_weight.new_empty(d_weight.shape).permute(3, 2, 0, 1)
    work = torch.promote_types(x.dtype, torch.float32)
    d_mask = x.new_empty(0, dtype=work) if mask is None else mask.new_empty(mask.shape)
    return dx, offset.new_empty(offset.shape), d_weight, d_mask


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.place = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, offset, weight, mask = ctx.saved_tensors
    dx, d_offset, d_weight, d_mask = _gradients(x, offset, weight, mask, g, ctx.place)
    return dx, d_offset, d_weight, None if mask is None else d_mask, None


deform_conv.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.convatlas.deform_conv)  # type: ignore[untyped-decorator, unused-ignore]
def _flops(x_shape: Any, offset_shape: Any, weight_shape: Any, *_: Any, **__: Any) -> int:
    """Two for each multiply-add of the product; the interpolation is not counted, as in other implementations."""
    outputs, inner, rows, columns = weight_shape
    return int(2 * offset_shape[0] * offset_shape[2] * offset_shape[3] * outputs * inner * rows * columns)
