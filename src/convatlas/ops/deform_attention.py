"""Multi-scale deformable sampling: every head of every query reads a few weighted places of every level of a pyramid.

Zhu, Su, Lu, Li, Wang, Dai: "Deformable DETR: Deformable Transformers for End-to-End Object Detection", ICLR 2021,
arXiv 2010.04159, equation 3.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.errors import Unsupported
from convatlas.ops.backend import Backends
from convatlas.ops.bilinear import bilinear_corners, index_type, weighted_rows

__all__ = ["deform_attention", "level_starts", "pixel_centres"]

_Shapes = tuple[tuple[int, int], ...]
#: Channels of a head from which whole rows are faster than single elements, forward and backward.
_LONG = 24


def _auto(value: Tensor, *_: object) -> str:
    if torch.compiler.is_exporting():
        return "naive"  # grid_sample, which every runtime knows
    if value.device.type == "cuda" and not torch.compiler.is_compiling() and "triton" in _backends.names:
        return "triton"
    return "rows" if value.shape[-1] >= _LONG else "naive"  # short rows cost more to find than to read


_backends = Backends("deform_attention", auto=_auto)


def deform_attention(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor, *, backend: str = "auto"
) -> Tensor:
    """y(q, m) = sum over levels l and points p of A(q, m, l, p) v_m,l(location(q, m, l, p)), bilinear, zero outside.

    A location (x, y) of 0 to 1 spans a level from border to border, with the centre of pixel i at (i + 0.5) / W, as
    `torch.nn.functional.grid_sample` reads without ``align_corners``. Half precision is summed in float32. There are
    first derivatives; ``naive`` has all of them.

    Args:
        value: (B, S, M, D), the pixels of all levels in rows, one level after the other, for M heads.
        shapes: height and width of each level; S pixels in all.
        locations: (B, Q, M, L, P, 2), x first.
        weights: A (B, Q, M, L, P).
        backend: ``auto``; ``naive`` (a level at a time by grid_sample, as in the authors' plain form); ``rows``
            (weighted sums of pixels in one fused gather: no value of a single point is stored); ``triton`` (the same
            in registers, on a GPU).

    Returns:
        (B, Q, M * D) in the type of value.

    Raises:
        ValueError: shapes do not fit.
    """
    sizes = tuple((int(height), int(width)) for height, width in shapes)
    if value.dim() != 4 or weights.dim() != 5 or locations.shape != (*weights.shape, 2):
        raise ValueError(
            "value, locations and weights must be (B, S, M, D), (B, Q, M, L, P, 2) and (B, Q, M, L, P), got "
            f"{tuple(value.shape)}, {tuple(locations.shape)} and {tuple(weights.shape)}"
        )
    if (value.shape[0], value.shape[2], len(sizes)) != (weights.shape[0], weights.shape[2], weights.shape[3]):
        raise ValueError(
            f"weights must be ({value.shape[0]}, Q, {value.shape[2]}, {len(sizes)}, P) for value "
            f"{tuple(value.shape)} and {len(sizes)} levels, got {tuple(weights.shape)}"
        )
    pixels = sum(height * width for height, width in sizes)
    if value.shape[1] != pixels:
        raise ValueError(f"value must have the {pixels} pixels of the levels {sizes}, got {value.shape[1]}")
    if backend == "triton" and backend not in _backends.names:
        raise Unsupported("backend 'triton' of deform_attention needs the triton package")
    return _backends.run(backend, value, sizes, locations, weights)


def level_starts(shapes: Sequence[tuple[int, int]]) -> list[int]:
    """Index of the first pixel of each level."""
    return [0, *itertools.accumulate(height * width for height, width in shapes)][:-1]


def pixel_centres(
    shapes: Sequence[tuple[int, int]], *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Centres (S, 2) of the pixels of all levels, x first, from 0 to 1: the reference points of tokens of a pyramid."""
    levels = []
    for height, width in shapes:
        y = (torch.arange(height, dtype=dtype or torch.float32, device=device) + 0.5) / height
        x = (torch.arange(width, dtype=dtype or torch.float32, device=device) + 0.5) / width
        levels.append(torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], -1).flatten(0, 1))
    return torch.cat(levels)


@_backends.register("naive")
def _naive(value: Tensor, shapes: _Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    batch, queries, heads = weights.shape[:3]
    dtype = torch.promote_types(value.dtype, torch.float32)
    levels = value.to(dtype).split([height * width for height, width in shapes], 1)
    y = value.new_zeros(batch * heads, value.shape[3], queries, dtype=dtype)
    for level, (height, width) in enumerate(shapes):
        maps = levels[level].permute(0, 2, 3, 1).reshape(batch * heads, value.shape[3], height, width)
        grid = (2 * locations[:, :, :, level].to(dtype) - 1).transpose(1, 2).flatten(0, 1)
        sampled = F.grid_sample(maps, grid, align_corners=False)
        y = y + (sampled * weights[:, :, :, level].to(dtype).transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)
    return y.unflatten(0, (batch, heads)).permute(0, 3, 1, 2).flatten(2).to(value.dtype)


@_backends.register("rows")
def _rows(value: Tensor, shapes: _Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    batch, pixels, heads, width = value.shape
    queries = weights.shape[1]
    dtype = torch.promote_types(value.dtype, torch.float32)
    kind = index_type(batch * pixels * heads)
    sizes = torch.tensor(shapes, device=value.device, dtype=torch.int32)
    places = locations.to(dtype) * sizes.flip(1)[:, None] - 0.5
    corners, shares = bilinear_corners(places[..., 1], places[..., 0], sizes[:, :1], sizes[:, 1:])
    # Rows of the table: sample, pixel of all levels, head.
    start = torch.tensor(level_starts(shapes), device=value.device, dtype=kind).view(-1, 1, 1)
    sample = torch.arange(batch, device=value.device, dtype=kind).view(-1, 1, 1, 1, 1, 1) * pixels
    head = torch.arange(heads, device=value.device, dtype=kind).view(-1, 1, 1, 1)
    indices = (sample + start + corners) * heads + head
    shares = shares * weights.to(dtype)[..., None]
    count = batch * queries * heads
    bag = 4 * weights.shape[3] * weights.shape[4]
    table = value.to(dtype).reshape(-1, width)
    y = weighted_rows(table, indices.reshape(count, bag), shares.reshape(count, bag))
    return y.view(batch, queries, heads * width).to(value.dtype)


def _refuses_triton(value: Tensor, *_: object) -> str | None:
    if value.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"value must be on a CUDA device (or TRITON_INTERPRET=1 be set to interpret it), got {value.device.type}"
    return None


if importlib.util.find_spec("triton") is not None:

    @_backends.register("triton", refuses=_refuses_triton)
    def _triton(value: Tensor, shapes: _Shapes, locations: Tensor, weights: Tensor) -> Tensor:
        # Imported where it runs, so that nothing depends on the package.
        from convatlas.ops.kernels.deform_attention import sampled_attention

        y: Tensor = sampled_attention(value, [side for size in shapes for side in size], locations, weights)
        return y
