"""Efficient local attention: gates along each axis from the means over the others.

Xu, Wan: "ELA: Efficient Local Attention for Deep Convolutional Neural Networks", 2024, arXiv 2403.01123, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.ops.depthwise import depthwise_conv
from convatlas.ops.precision import without_autocast

__all__ = ["axis_means", "ela", "scale_axes"]


def axis_means(x: Tensor) -> list[Tensor]:
    """The mean of a map (B, C, *positions) over all position axes but one, (B, C, n), for each of them in turn."""
    axes = range(2, x.dim())
    return [x.mean([other for other in axes if other != axis]) if x.dim() > 3 else x for axis in axes]


def scale_axes(x: Tensor, gates: Sequence[Tensor]) -> Tensor:
    """Multiply a map (B, C, *positions) by a gate (B, C, n) along each of its position axes."""
    for axis, gate in enumerate(gates):
        x = x * gate.reshape(*gate.shape[:2], *[-1 if other == axis else 1 for other in range(len(gates))])
    return x


def ela(
    x: Tensor,
    conv_weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    groups: int,
    num_groups: int,
    eps: float = 1e-5,
) -> Tensor:
    """x times a gate along each axis: sigmoid(GroupNorm(Conv1d(y))) of the means y over the other axes (equations 1-8).

    Half precision is computed in float32 up to the gates, also under autocast.

    Args:
        x: input (B, C, *positions) with one, two or three position axes.
        conv_weights: kernels (C, C / groups, k) with odd k: one for all axes, or one for each.
        norm_weights, norm_biases: (C), as many as there are kernels.
        groups: of the convolution.
        num_groups: of the normalisation.
        eps: added to the variance.

    Returns:
        The shape and type of x.

    Raises:
        ValueError: the number of kernels is neither one nor that of the axes.
    """
    dims = x.dim() - 2
    if dims not in (1, 2, 3):
        raise ValueError(f"x must be (B, C, ...) with one to three position axes, got {tuple(x.shape)}")
    if len(conv_weights) not in (1, dims):
        raise ValueError(f"there must be 1 kernel or one for each of {dims} axes, got {len(conv_weights)}")
    dtype = torch.promote_types(x.dtype, torch.float32)
    with without_autocast(x):
        means = [y.to(dtype) for y in axis_means(x)]
        shared = len(conv_weights) == 1

        def gate(y: Tensor, index: int) -> Tensor:
            weight = conv_weights[index].to(dtype)
            z = _conv(y, weight, groups)
            scale, shift = norm_weights[index].to(dtype), norm_biases[index].to(dtype)
            return torch.group_norm(z, num_groups, scale, shift, eps).sigmoid()

        alike = not torch.compiler.is_compiling() and all(y.shape == means[0].shape for y in means)
        if shared and alike:
            # Normalisation is per sample, so strips of one length can run as one batch. A graph serves all sizes.
            gates = list(gate(torch.cat(means), 0).chunk(dims))
        else:
            gates = [gate(y, 0 if shared else index) for index, y in enumerate(means)]
        return scale_axes(x, [each.to(x.dtype) for each in gates])


def _conv(y: Tensor, weight: Tensor, groups: int) -> Tensor:
    padding = weight.shape[2] // 2
    if groups == y.shape[1]:
        return depthwise_conv(y, weight, padding=padding)
    return F.conv1d(y, weight, padding=padding, groups=groups)
