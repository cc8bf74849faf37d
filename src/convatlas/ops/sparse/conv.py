"""Convolution and pooling of sparse tensors, given the pairs of rows that meet.

Graham, Engelcke, van der Maaten: "3D Semantic Segmentation with Submanifold Sparse Convolutional Networks", CVPR 2018,
arXiv 1711.10275; with the conventions of spconv 2: out[o] = bias + sum over offsets q and pairs (x, o) of W[:, q] f[x],
a cross-correlation like that of torch. The bias is added at active places only.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from convatlas.errors import Unsupported
from convatlas.ops.backend import Backends
from convatlas.ops.precision import without_autocast
from convatlas.ops.sparse.rulebook import Rulebook
from convatlas.ops.sparse.tensor import SparseTensor

__all__ = ["sparse_conv", "sparse_max_pool", "sparse_mean"]

#: Share of active places from which the whole grid is convolved on a CPU, and most places of such a grid.
_DENSE_OCCUPANCY, _DENSE_PLACES = 0.5, 2**24
_DENSE: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_DENSE_TRANSPOSED: dict[int, Any] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def _auto(features: Tensor, rulebook: Rulebook, *_: object) -> str:
    if features.device.type == "cuda" and "triton" in _backends.names and features.dtype != torch.float64:
        return "triton"
    places = rulebook.batch_size * max(math.prod(rulebook.input_shape), math.prod(rulebook.output_shape))
    full = rulebook.num_inputs >= _DENSE_OCCUPANCY * rulebook.batch_size * math.prod(rulebook.input_shape)
    if (
        full
        and places <= _DENSE_PLACES
        and _refuses_dense(features, rulebook) is None
        and features.device.type == "cpu"
    ):
        return "dense"
    return "pairs"


_backends = Backends("sparse_conv", auto=_auto)


def sparse_conv(
    features: Tensor, rulebook: Rulebook, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Convolve the rows of a sparse tensor.

    Half precision is summed in float32.

    Args:
        features: (N, C_in), the rows of the input.
        rulebook: which rows meet; it decides whether the convolution is submanifold, strided, inverse or transposed.
        weight: (C_out, *kernel_size, C_in).
        bias: (C_out) or None.
        backend: ``auto``; ``naive`` (offset by offset, every product kept for the backward pass); ``pairs`` (the same,
            gathered again in the backward pass); ``dense`` (the whole grid, for few axes); ``triton`` (implicit matrix
            products without atomics, on a GPU).

    Returns:
        (M, C_out), the rows of the output, in the type of features.

    Raises:
        ValueError: shapes do not fit.
    """
    if features.dim() != 2 or len(features) != rulebook.num_inputs:
        raise ValueError(f"features must be ({rulebook.num_inputs}, C), got {tuple(features.shape)}")
    shape = (*rulebook.kernel.size, features.shape[1])
    if tuple(weight.shape[1:]) != shape:
        raise ValueError(f"weight must be (C_out, {', '.join(map(str, shape))}), got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
    if backend == "triton" and backend not in _backends.names:
        raise Unsupported("backend 'triton' of sparse_conv needs the triton package")
    return _backends.run(backend, features, rulebook, weight, bias)


def _finished(y: Tensor, bias: Tensor | None, like: Tensor) -> Tensor:
    return (y if bias is None else y + bias.to(y.dtype)).to(like.dtype)


@_backends.register("naive")
def _naive(features: Tensor, rulebook: Rulebook, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = torch.promote_types(features.dtype, torch.float32)
    with without_autocast(features):
        x, kernels = features.to(dtype), weight.flatten(1, -2).to(dtype)
        y = x.new_zeros(rulebook.num_outputs, weight.shape[0])
        sources, targets = rulebook.source.split(rulebook.counts), rulebook.target.split(rulebook.counts)
        for source, target, kernel in zip(sources, targets, kernels.unbind(1), strict=True):
            y = y.index_add(0, target, x.index_select(0, source) @ kernel.T)
        return _finished(y, bias, features)


# -- pairs -------------------------------------------------------------------------------------------------------------


@_backends.register("pairs")
def _pairs(features: Tensor, rulebook: Rulebook, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = torch.promote_types(features.dtype, torch.float32)
    with without_autocast(features):
        y: Tensor = _gather_matmul_scatter(
            features.to(dtype),
            weight.flatten(1, -2).to(dtype),
            rulebook.source,
            rulebook.target,
            rulebook.counts,
            rulebook.identity,
            rulebook.num_outputs,
        )
        return _finished(y, bias, features)


@torch.library.custom_op("convatlas::sparse_conv_pairs", mutates_args=())
def _gather_matmul_scatter(
    x: Tensor, weight: Tensor, source: Tensor, target: Tensor, counts: Sequence[int], identity: int, rows: int
) -> Tensor:
    """Rows (N, C_in), kernels (C_out, K, C_in) and pairs in, rows (M, C_out) out."""
    y = x.new_zeros(rows, weight.shape[0]) if identity < 0 else x @ weight[:, identity].T
    start = 0
    for offset, count in enumerate(counts):
        if count and offset != identity:
            pairs = slice(start, start + count)
            # Torch adds rows by int64 numbers twice as fast as by int32 ones.
            y.index_add_(0, target[pairs].long(), x.index_select(0, source[pairs]) @ weight[:, offset].T)
        start += count
    return y


@_gather_matmul_scatter.register_fake
def _fake(
    x: Tensor, weight: Tensor, source: Tensor, target: Tensor, counts: Sequence[int], identity: int, rows: int
) -> Tensor:
    return x.new_empty(rows, weight.shape[0])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, source, target, ctx.counts, ctx.identity, _ = inputs
    ctx.save_for_backward(x, weight, source, target)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, source, target = ctx.saved_tensors
    dx = dweight = None
    if ctx.needs_input_grad[0]:
        kernels = weight.transpose(0, 2)
        dx = _gather_matmul_scatter(g, kernels, target, source, ctx.counts, ctx.identity, len(x))
    if ctx.needs_input_grad[1]:
        dweight = _weight_gradient(x, g, source, target, ctx.counts)
    return dx, dweight, None, None, None, None, None


_gather_matmul_scatter.register_autograd(_backward, setup_context=_keep)


def _weight_gradient(x: Tensor, g: Tensor, source: Tensor, target: Tensor, counts: Sequence[int]) -> Tensor:
    """(C_out, K, C_in): of each offset the products of what met."""
    pairs = zip(source.split(tuple(counts)), target.split(tuple(counts)), strict=True)
    return torch.stack([g.index_select(0, to).T @ x.index_select(0, of) for of, to in pairs], 1)


@register_flop_formula(torch.ops.convatlas.sparse_conv_pairs)  # type: ignore[untyped-decorator, unused-ignore]
def _flops(x_shape: Any, weight_shape: Any, source: Any, target: Any, counts: Sequence[int], *_: Any, **__: Any) -> int:
    """Two for each multiply-add: C_in x C_out for each pair."""
    return int(2 * sum(counts) * weight_shape[0] * weight_shape[2])


# -- dense -------------------------------------------------------------------------------------------------------------


def _refuses_dense(features: Tensor, rulebook: Rulebook, *_: object) -> str | None:
    if len(rulebook.input_shape) > 3:
        return f"the grid must have at most 3 axes, got {len(rulebook.input_shape)}"
    return None


@_backends.register("dense", refuses=_refuses_dense)
def _dense(features: Tensor, rulebook: Rulebook, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = torch.promote_types(features.dtype, torch.float32)
    places, shape, kernel = rulebook.input_indices, rulebook.input_shape, rulebook.kernel
    dims = len(shape)
    with without_autocast(features):
        x = SparseTensor(features.to(dtype), places, shape, rulebook.batch_size, check=False).dense()
        kernels = weight.movedim(-1, 1).to(dtype)
        geometry = {"stride": kernel.stride, "padding": kernel.padding, "dilation": kernel.dilation}
        if rulebook.kind in ("submanifold", "conv"):
            y = _DENSE[dims](x, kernels, **geometry)
        else:
            plain = kernel.transposed_shape(shape) if not kernel.output_padding else None
            more = kernel.output_padding or tuple(
                whole - part for whole, part in zip(rulebook.output_shape, plain or (), strict=True)
            )
            y = _DENSE_TRANSPOSED[dims](x, kernels.transpose(0, 1), output_padding=more, **geometry)
        rows = y.movedim(1, -1)[tuple(rulebook.output_indices.long().unbind(1))]
        return _finished(rows, bias, features)


# -- triton ------------------------------------------------------------------------------------------------------------


def _refuses_triton(features: Tensor, *_: object) -> str | None:
    if features.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        where = features.device.type
        return f"features must be on a CUDA device (or TRITON_INTERPRET=1 be set to interpret it), got {where}"
    return None


if importlib.util.find_spec("triton") is not None:

    @_backends.register("triton", refuses=_refuses_triton)
    def _triton(features: Tensor, rulebook: Rulebook, weight: Tensor, bias: Tensor | None) -> Tensor:
        # Imported where it runs, so that nothing depends on the package.
        from convatlas.ops.kernels.sparse import implicit_conv

        y: Tensor = implicit_conv(
            features,
            weight.flatten(1, -2),
            rulebook.source,
            rulebook.target,
            rulebook.counts,
            rulebook.num_outputs,
        )
        return _finished(y, bias, features)


# -- pooling -----------------------------------------------------------------------------------------------------------


def sparse_max_pool(features: Tensor, rulebook: Rulebook) -> Tensor:
    """Largest feature (M, C) of the active inputs (N, C) below each output place.

    It is the true maximum: spconv begins at 0 on some of its paths, so that there negative values become 0. Equal
    largest values share the gradient.

    Raises:
        ValueError: shapes do not fit.
    """
    if features.dim() != 2 or len(features) != rulebook.num_inputs:
        raise ValueError(f"features must be ({rulebook.num_inputs}, C), got {tuple(features.shape)}")
    targets = rulebook.target.long()[:, None].expand(-1, features.shape[1])
    least = features.new_zeros(rulebook.num_outputs, features.shape[1])
    return least.scatter_reduce(0, targets, features.index_select(0, rulebook.source), "amax", include_self=False)


def sparse_mean(x: SparseTensor) -> Tensor:
    """Mean (B, C) of the active places of each sample; 0 where there is none."""
    dtype = torch.promote_types(x.features.dtype, torch.float32)
    sample = x.indices[:, 0]
    total = x.features.new_zeros(x.batch_size, x.channels, dtype=dtype).index_add(0, sample, x.features.to(dtype))
    count = total.new_zeros(x.batch_size).index_add(0, sample, total.new_ones(len(sample)))
    return (total / count.clamp(min=1)[:, None]).to(x.features.dtype)
