"""Convolution of each sample of a batch with a weight of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.ops.backend import Backends

__all__ = ["per_sample_conv2d"]


def _auto(x: Tensor, weight: Tensor, *_: object) -> str:
    # The number of groups of an exported convolution is fixed, that of the products of a batch is not.
    pointwise = weight.shape[3] == weight.shape[4] == 1
    return "matmul" if pointwise or torch.compiler.is_compiling() else "grouped"


_backends = Backends("per_sample_conv2d", auto=_auto)


def per_sample_conv2d(
    x: Tensor, weight: Tensor, stride: int = 1, padding: int = 0, dilation: int = 1, *, backend: str = "auto"
) -> Tensor:
    """Convolve sample b of a batch with weight b.

    Args:
        x: input (B, C, H, W).
        weight: one for each sample, (B, C', C, k, k).
        stride, padding, dilation: as `torch.nn.functional.conv2d` takes them.
        backend: ``auto``; ``naive`` (one convolution after another); ``grouped`` (one convolution with a group for each
            sample); ``matmul`` (one product of matrices for each sample, of a batch at once).

    Returns:
        (B, C', H', W').

    Raises:
        ValueError: shapes do not fit.
    """
    if x.dim() != 4 or weight.dim() != 5 or weight.shape[0] != x.shape[0] or weight.shape[2] != x.shape[1]:
        raise ValueError(
            f"x and weight must be (B, C, H, W) and (B, C', C, k, k), got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    return _backends.run(backend, x, weight, stride, padding, dilation)


@_backends.register("naive")
def _naive(x: Tensor, weight: Tensor, stride: int, padding: int, dilation: int) -> Tensor:
    results = [F.conv2d(one[None], own, None, stride, padding, dilation) for one, own in zip(x, weight, strict=True)]
    return torch.cat(results)


@_backends.register("grouped")
def _grouped(x: Tensor, weight: Tensor, stride: int, padding: int, dilation: int) -> Tensor:
    batch, _, height, width = x.shape
    joined = x.reshape(1, -1, height, width)
    y = F.conv2d(joined, weight.flatten(0, 1), None, stride, padding, dilation, groups=batch)
    return y.reshape(batch, -1, *y.shape[2:])


@_backends.register("matmul")
def _matmul(x: Tensor, weight: Tensor, stride: int, padding: int, dilation: int) -> Tensor:
    taps = weight.shape[3:]
    if taps == (1, 1):
        x = F.pad(x, (padding,) * 4)[..., ::stride, ::stride] if padding else x[..., ::stride, ::stride]
        columns, size = x.flatten(2), x.shape[2:]
    else:
        columns = F.unfold(x, taps, dilation, padding, stride)
        reach = [dilation * (tap - 1) + 1 for tap in taps]
        sides = zip(x.shape[2:], reach, strict=True)
        size = torch.Size((side + 2 * padding - far) // stride + 1 for side, far in sides)
    return torch.bmm(weight.flatten(2), columns).unflatten(2, size)
