"""Convolution in which every sample of a batch has a kernel of its own, for conditional and dynamic convolutions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.ops.backend import Backends

__all__ = ["per_sample_conv"]

_CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
#: Most taps times channels of a group for which lowering to a matrix product is taken on a GPU: what it copies.
_LARGEST_LOWERED = 4608

_Sizes = tuple[int, ...]


def _auto(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: _Sizes, padding: _Sizes, dilation: _Sizes, groups: int
) -> str:
    # The groups of an exported graph cannot follow its batch; on a GPU a convolution of many groups is slow. Pointwise
    # kernels are matrix products as they are.
    batch: object = x.shape[0]
    lowered = (
        isinstance(batch, torch.SymInt)
        or math.prod(weight.shape[3:]) == 1
        or (x.device.type == "cuda" and math.prod(weight.shape[2:]) <= _LARGEST_LOWERED)
    )
    return "matmul" if x.dim() == 4 and lowered else "grouped"


_backends = Backends("per_sample_conv", auto=_auto)


def per_sample_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    backend: str = "auto",
) -> Tensor:
    """Convolve each sample with its own kernel: y[b] = conv(x[b], weight[b]) + bias.

    Args:
        x: input (B, C, L), (B, C, H, W) or (B, C, D, H, W).
        weight: kernels (B, out, C / groups, *kernel_size).
        bias: (out), the same for all samples, or None.
        stride, padding, dilation: in positions, one number for all axes or one each; padding is with zeros.
        groups: of channels, as torch's convolution takes it.
        backend: ``auto``; ``naive`` (a convolution a sample); ``grouped`` (one convolution with the samples as groups);
            ``matmul`` (images only: the windows of x times the kernels, which copies x once for each tap).

    Returns:
        (B, out, *size) as torch's convolution makes it.

    Raises:
        ValueError: shapes do not fit.
        Unsupported: the backend does not serve the call.
    """
    dims = x.dim() - 2
    if dims not in _CONVS:
        raise ValueError(f"x must be (B, C, L), (B, C, H, W) or (B, C, D, H, W), got {x.dim()} dimensions")
    if weight.dim() != dims + 3 or weight.shape[1] % groups or weight.shape[2] * groups != x.shape[1]:
        raise ValueError(
            f"weight must be (B, out, {x.shape[1]} / {groups}, ...) with {dims} kernel axes for x with {x.shape[1]} "
            f"channels and {groups} groups, got {tuple(weight.shape)}"
        )
    if weight.shape[0] != x.shape[0]:
        raise ValueError(f"weight must hold kernels for {x.shape[0]} samples, got {weight.shape[0]}")
    sizes = []
    for name, value in (("stride", stride), ("padding", padding), ("dilation", dilation)):
        size = (value,) * dims if isinstance(value, int) else tuple(value)
        if len(size) != dims:
            raise ValueError(f"{name} must be one number or {dims}, got {value}")
        sizes.append(size)
    return _backends.run(backend, x, weight, bias, *sizes, groups)


@_backends.register("naive")
def _naive(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: _Sizes, padding: _Sizes, dilation: _Sizes, groups: int
) -> Tensor:
    conv = _CONVS[x.dim() - 2]
    samples = zip(x.split(1), weight, strict=True)
    return torch.cat([conv(one, kernel, bias, stride, padding, dilation, groups) for one, kernel in samples])


@_backends.register("grouped")
def _grouped(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: _Sizes, padding: _Sizes, dilation: _Sizes, groups: int
) -> Tensor:
    batch, out = weight.shape[:2]
    joined = x.reshape(1, batch * x.shape[1], *x.shape[2:])
    biases = None if bias is None else bias.repeat(batch)
    y = _CONVS[x.dim() - 2](joined, weight.flatten(0, 1), biases, stride, padding, dilation, batch * groups)
    return y.view(batch, out, *y.shape[2:])


def _refuses_matmul(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: _Sizes, padding: _Sizes, dilation: _Sizes, groups: int
) -> str | None:
    return None if x.dim() == 4 else "the windows of torch are those of images (B, C, H, W)"


@_backends.register("matmul", refuses=_refuses_matmul)
def _matmul(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: _Sizes, padding: _Sizes, dilation: _Sizes, groups: int
) -> Tensor:
    batch, out = weight.shape[:2]
    kernel = (weight.shape[3], weight.shape[4])
    places = zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
    height, width = ((size + 2 * pad - step * (taps - 1) - 1) // jump + 1 for size, taps, jump, pad, step in places)
    if kernel == (1, 1) and not any(padding):
        windows = x[..., :: stride[0], :: stride[1]].reshape(batch, groups, -1, height * width)
    else:
        windows = F.unfold(x, kernel, dilation, padding, stride).unflatten(1, (groups, -1))
    y = weight.reshape(batch, groups, out // groups, -1) @ windows
    y = y.reshape(batch, out, height, width)
    return y if bias is None else y + bias.view(-1, 1, 1).to(y.dtype)
