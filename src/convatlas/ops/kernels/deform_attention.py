"""Multi-scale deformable sampling in Triton: the points of a query are summed in registers.

Checked through Triton's interpreter only; not timed on a GPU.
"""

from __future__ import annotations

import importlib.util
import itertools
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

__all__ = ["sampled_attention"]

#: Queries that one program serves, for one head.
_QUERIES = 32

if importlib.util.find_spec("triton") is not None:
    import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

    from convatlas.ops.kernels.bilinear import interpolate, scatter

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _read_point(  # type: ignore[no-untyped-def]
        locations, weights, shapes, query, there, head, heads, level, levels, point, points, work: tl.constexpr,
    ):  # fmt: skip
        at = ((query * heads + head) * levels + level) * points + point
        height = tl.load(shapes + 3 * level)
        width = tl.load(shapes + 3 * level + 1)
        x = tl.load(locations + 2 * at, mask=there, other=0).to(work) * width - 0.5
        y = tl.load(locations + 2 * at + 1, mask=there, other=0).to(work) * height - 0.5
        weight = tl.load(weights + at, mask=there, other=0).to(work)
        return at, y, x, weight, height, width, tl.load(shapes + 3 * level + 2)

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _forward_kernel(  # type: ignore[no-untyped-def]
        value, locations, weights, shapes, y, count, queries, pixels, heads, size, levels, points,
        block: tl.constexpr, channels: tl.constexpr, work: tl.constexpr,
    ):  # fmt: skip
        query = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        there = query < count
        head = tl.program_id(1)
        run = tl.arange(0, channels)
        has_run = run < size
        total = tl.zeros((block, channels), dtype=work)
        for level in range(levels):
            for point in range(points):
                _at, at_y, at_x, weight, height, width, start = _read_point(
                    locations, weights, shapes, query, there, head, heads, level, levels, point, points, work
                )
                seen, _by_y, _by_x = interpolate(
                    value, query // queries * pixels + start, at_y, at_x, height, width, there, heads * size,
                    head * size + run, has_run, work,
                )  # fmt: skip
                total += weight[:, None] * seen
        place = ((query * heads + head) * size)[:, None] + run[None, :]
        tl.store(y + place, total.to(y.dtype.element_ty), mask=there[:, None] & has_run[None, :])

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _backward_kernel(  # type: ignore[no-untyped-def]
        value, locations, weights, shapes, g, d_value, d_locations, d_weights, count, queries, pixels, heads, size,
        levels, points, block: tl.constexpr, channels: tl.constexpr, work: tl.constexpr,
    ):  # fmt: skip
        query = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        there = query < count
        head = tl.program_id(1)
        run = tl.arange(0, channels)
        has_run = run < size
        place = ((query * heads + head) * size)[:, None] + run[None, :]
        grown = tl.load(g + place, mask=there[:, None] & has_run[None, :], other=0).to(work)
        for level in range(levels):
            for point in range(points):
                at, at_y, at_x, weight, height, width, start = _read_point(
                    locations, weights, shapes, query, there, head, heads, level, levels, point, points, work
                )
                first = query // queries * pixels + start
                seen, by_y, by_x = interpolate(
                    value, first, at_y, at_x, height, width, there, heads * size, head * size + run, has_run, work
                )
                tl.store(d_weights + at, tl.sum(grown * seen, axis=1), mask=there)
                back = grown * weight[:, None]
                tl.store(d_locations + 2 * at, tl.sum(back * by_x, axis=1) * width, mask=there)
                tl.store(d_locations + 2 * at + 1, tl.sum(back * by_y, axis=1) * height, mask=there)
                scatter(
                    d_value, back, first, at_y, at_x, height, width, there, heads * size, head * size + run, has_run
                )


def _launch(value: Tensor, sides: list[int], weights: Tensor) -> tuple[Tensor, tuple[int, ...], dict[str, Any]]:
    """Table of height, width and first pixel of each level; sizes; blocks."""
    batch, pixels, heads, size = value.shape
    queries, levels, points = weights.shape[1], weights.shape[3], weights.shape[4]
    shapes = list(zip(sides[::2], sides[1::2], strict=True))
    starts = itertools.accumulate((height * width for height, width in shapes), initial=0)
    table = torch.tensor([[*shape, start] for shape, start in zip(shapes, starts, strict=False)], device=value.device)
    work = tl.float64 if value.dtype == torch.float64 else tl.float32
    blocks = {"block": _QUERIES, "channels": triton.next_power_of_2(size), "work": work}
    return table, (batch * queries, queries, pixels, heads, size, levels, points), blocks


@torch.library.custom_op("convatlas::sampled_attention", mutates_args=())
def sampled_attention(value: Tensor, sides: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    """Sample as `convatlas.ops.deform_attention.deform_attention`; sides: height and width of each level in turn."""
    y = value.new_empty(*weights.shape[:2], value.shape[2] * value.shape[3])
    if y.numel():
        table, sizes, blocks = _launch(value, sides, weights)
        _forward_kernel[(triton.cdiv(sizes[0], _QUERIES), value.shape[2])](
            value.contiguous(), locations.contiguous(), weights.contiguous(), table, y, *sizes, **blocks
        )
    return y


@sampled_attention.register_fake
def _fake(value: Tensor, sides: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    return value.new_empty(*weights.shape[:2], value.shape[2] * value.shape[3])


@torch.library.custom_op("convatlas::sampled_attention_backward", mutates_args=())
def _gradients(
    value: Tensor, sides: list[int], locations: Tensor, weights: Tensor, g: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    work = torch.promote_types(value.dtype, torch.float32)
    found = [torch.zeros(part.shape, dtype=work, device=value.device) for part in (value, locations, weights)]
    if g.numel():
        table, sizes, blocks = _launch(value, sides, weights)
        _backward_kernel[(triton.cdiv(sizes[0], _QUERIES), value.shape[2])](
            value.contiguous(), locations.contiguous(), weights.contiguous(), table, g.contiguous(), *found, *sizes,
            **blocks,
        )  # fmt: skip
    d_value, d_locations, d_weights = found
    return d_value.to(value.dtype), d_locations.to(locations.dtype), d_weights.to(weights.dtype)


@_gradients.register_fake
def _fake_gradients(
    value: Tensor, sides: list[int], locations: Tensor, weights: Tensor, g: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    d_value, d_locations, d_weights = (part.new_empty(part.shape) for part in (value, locations, weights))
    return d_value, d_locations, d_weights


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.sides, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    value, locations, weights = ctx.saved_tensors
    d_value, d_locations, d_weights = _gradients(value, ctx.sides, locations, weights, g)
    return d_value, None, d_locations, d_weights


sampled_attention.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.convatlas.sampled_attention)  # type: ignore[untyped-decorator, unused-ignore]
def _flops(value_shape: Any, sides: Any, locations_shape: Any, weights_shape: Any, **_: Any) -> int:
    """Two for each multiply-add: four pixels of each point, in every channel of its head."""
    batch, queries, heads, levels, points = weights_shape
    return int(2 * 4 * batch * queries * heads * levels * points * value_shape[3])
