"""Sparse convolution as implicit matrix products, in Triton: no atomics, every output row is written once.

A table holds the input row of each output row and offset. Rows are sorted by which offsets have one, so that a tile of
rows mostly agrees on what it can leave out (as in spconv 2). Checked through Triton's interpreter only; not timed on a
GPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

__all__ = ["implicit_conv"]

#: Rows and channels of a tile.
_ROWS, _CHANNELS = 64, 32
#: Offsets that fit into the bits of an int64.
_BITS = 62

if importlib.util.find_spec("triton") is not None:
    import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _conv_kernel(  # type: ignore[no-untyped-def]
        x, weight, table, order, y, rows, c_in, c_out, offsets,
        tile_rows: tl.constexpr, tile: tl.constexpr, work: tl.constexpr, precision: tl.constexpr,
    ):  # fmt: skip
        # One program computes a tile of output rows and channels; weight is (K, C_in, C_out).
        place = tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)
        valid = place < rows
        row = tl.load(order + place, mask=valid, other=0).to(tl.int64)
        column = tl.program_id(1) * tile + tl.arange(0, tile)
        total = tl.zeros((tile_rows, tile), dtype=work)
        entry = table + row
        for offset in range(offsets):
            source = tl.load(entry, mask=valid, other=-1).to(tl.int64)
            entry += rows
            if tl.max(source, axis=0) >= 0:
                for start in range(0, c_in, tile):
                    channel = start + tl.arange(0, tile)
                    seen = (source >= 0)[:, None] & (channel < c_in)[None, :]
                    a = tl.load(x + source[:, None] * c_in + channel[None, :], mask=seen, other=0).to(work)
                    known = (channel < c_in)[:, None] & (column < c_out)[None, :]
                    at = (offset * c_in + channel[:, None]) * c_out + column[None, :]
                    b = tl.load(weight + at, mask=known, other=0).to(work)
                    total += tl.dot(a, b, input_precision=precision, out_dtype=work)
        inside = valid[:, None] & (column < c_out)[None, :]
        tl.store(y + row[:, None] * c_out + column[None, :], total.to(y.dtype.element_ty), mask=inside)

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _weight_kernel(  # type: ignore[no-untyped-def]
        x, g, table, dweight, rows, c_in, c_out,
        tile_rows: tl.constexpr, tile: tl.constexpr, work: tl.constexpr, precision: tl.constexpr,
    ):  # fmt: skip
        # One program computes a tile of the (C_out, C_in) of one offset, over all rows; dweight is (K, C_out, C_in).
        offset = tl.program_id(0).to(tl.int64)
        out = tl.program_id(1) * tile + tl.arange(0, tile)
        channel = tl.program_id(2) * tile + tl.arange(0, tile)
        total = tl.zeros((tile, tile), dtype=work)
        for start in range(0, rows, tile_rows):
            row = start + tl.arange(0, tile_rows)
            source = tl.load(table + offset * rows + row, mask=row < rows, other=-1).to(tl.int64)
            if tl.max(source, axis=0) >= 0:
                met = source >= 0
                a = tl.load(g + row[None, :].to(tl.int64) * c_out + out[:, None],
                            mask=met[None, :] & (out < c_out)[:, None], other=0).to(work)  # fmt: skip
                b = tl.load(x + source[:, None] * c_in + channel[None, :],
                            mask=met[:, None] & (channel < c_in)[None, :], other=0).to(work)  # fmt: skip
                total += tl.dot(a, b, input_precision=precision, out_dtype=work)
        at = (offset * c_out + out[:, None]) * c_in + channel[None, :]
        tl.store(dweight + at, total, mask=(out < c_out)[:, None] & (channel < c_in)[None, :])


def _table(source: Tensor, target: Tensor, counts: Sequence[int], rows: int) -> Tensor:
    """(K, rows) int32: the source of each target and offset, or -1."""
    lengths = torch.tensor(counts, device=source.device)
    offset = torch.repeat_interleave(torch.arange(len(counts), device=source.device), lengths, output_size=len(source))
    table = torch.full((len(counts), rows), -1, dtype=torch.int32, device=source.device)
    table[offset, target.long()] = source
    return table


def _order(table: Tensor) -> Tensor:
    """Rows of the table, those that have a source at the same offsets beside each other."""
    bits = torch.arange(min(len(table), _BITS), device=table.device)
    return ((table[:_BITS] >= 0).long() << bits[:, None]).sum(0).argsort(stable=True).int()


def _types(x: Tensor) -> dict[str, Any]:
    precision = "tf32" if x.dtype in (torch.float16, torch.bfloat16) else "ieee"
    return {"work": tl.float64 if x.dtype == torch.float64 else tl.float32, "precision": precision}


def _run(x: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    """Rows (N, C_in) and weight (K, C_in, C_out) to (M, C_out) in the type of x."""
    _, c_in, c_out = weight.shape
    rows = table.shape[1]
    y = x.new_empty(rows, c_out)
    if rows:
        grid = (triton.cdiv(rows, _ROWS), triton.cdiv(c_out, _CHANNELS))
        _conv_kernel[grid](
            x.contiguous(), weight.contiguous(), table, _order(table), y, rows, c_in, c_out, len(table),
            tile_rows=_ROWS, tile=_CHANNELS, **_types(x),
        )  # fmt: skip
    return y


@torch.library.custom_op("convatlas::implicit_sparse_conv", mutates_args=())
def implicit_conv(
    x: Tensor, weight: Tensor, source: Tensor, target: Tensor, counts: Sequence[int], rows: int
) -> Tensor:
    """Convolve rows (N, C_in) with kernels (C_out, K, C_in) along pairs of rows to (rows, C_out), in the type of x."""
    return _run(x, weight.permute(1, 2, 0), _table(source, target, counts, rows))


@implicit_conv.register_fake
def _fake(x: Tensor, weight: Tensor, source: Tensor, target: Tensor, counts: Sequence[int], rows: int) -> Tensor:
    return x.new_empty(rows, weight.shape[0])


@torch.library.custom_op("convatlas::implicit_sparse_conv_weight", mutates_args=())
def _weight_gradient(x: Tensor, g: Tensor, source: Tensor, target: Tensor, counts: Sequence[int]) -> Tensor:
    """(C_out, K, C_in): of each offset the products of the rows that met, in float32 or float64."""
    table = _table(source, target, counts, len(g))
    c_in, c_out = x.shape[1], g.shape[1]
    dweight = x.new_zeros(len(counts), c_out, c_in, dtype=torch.promote_types(x.dtype, torch.float32))
    grid = (len(counts), triton.cdiv(c_out, _CHANNELS), triton.cdiv(c_in, _CHANNELS))
    if len(g):
        _weight_kernel[grid](
            x.contiguous(), g.contiguous(), table, dweight, len(g), c_in, c_out,
            tile_rows=_ROWS, tile=_CHANNELS, **_types(x),
        )  # fmt: skip
    return dweight.transpose(0, 1).contiguous()


@_weight_gradient.register_fake
def _weight_fake(x: Tensor, g: Tensor, source: Tensor, target: Tensor, counts: Sequence[int]) -> Tensor:
    return x.new_empty(g.shape[1], len(counts), x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, source, target, ctx.counts, _ = inputs
    ctx.save_for_backward(x, weight, source, target)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    """The input's gradient is the same convolution along the swapped pairs with transposed kernels."""
    x, weight, source, target = ctx.saved_tensors
    dx = dweight = None
    if ctx.needs_input_grad[0]:
        dx = implicit_conv(g.to(x.dtype), weight.transpose(0, 2), target, source, ctx.counts, len(x))
    if ctx.needs_input_grad[1]:
        dweight = _weight_gradient(x, g.to(x.dtype), source, target, ctx.counts).to(weight.dtype)
    return dx, dweight, None, None, None, None


implicit_conv.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.convatlas.implicit_sparse_conv)  # type: ignore[untyped-decorator, unused-ignore]
def _flops(x_shape: Any, weight_shape: Any, source: Any, target: Any, counts: Sequence[int], *_: Any, **__: Any) -> int:
    """Two for each multiply-add: C_in x C_out for each pair."""
    return int(2 * sum(counts) * weight_shape[0] * weight_shape[2])
