"""Singular values of convolutions on signals of a given size, for circular padding.

Sedghi, Gupta, Long: "The Singular Values of Convolutional Layers", ICLR 2019, arXiv 1805.10408. The matrix of a
circular convolution is block diagonal in the Fourier basis: each frequency has a matrix between the channels.
With a stride of S those frequencies that fall on one another when every S-th sample is taken share a block, so that it
has S times as many columns for each axis.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from convatlas.ops.precision import without_autocast

__all__ = ["conv_spectrum"]


def conv_spectrum(weight: Tensor, size: int | tuple[int, ...], stride: int | tuple[int, ...] = 1) -> Tensor:
    """Singular values of a circular convolution, at each frequency of its output.

    Frequencies f and -f have the same ones, which are computed once. It runs in float32 at least.

    Args:
        weight: kernels (out, in, *kernel_size) of one group.
        size: samples of the input along each axis, or one number for all: a multiple of the stride, and not less than
            the kernel.
        stride: along each axis, or one number for all.

    Returns:
        (*size / stride, r) with r = min(out, in * S) of a total stride S, the largest first at each frequency.

    Raises:
        ValueError: the size is smaller than the kernel or no multiple of the stride.
    """
    dims = weight.dim() - 2
    sizes = (size,) * dims if isinstance(size, int) else tuple(size)
    strides = (stride,) * dims if isinstance(stride, int) else tuple(stride)
    if dims < 1 or len(sizes) != dims or len(strides) != dims:
        raise ValueError(f"size and stride must have one number for each of {dims} axes, got {size} and {stride}")
    for samples, step, taps in zip(sizes, strides, weight.shape[2:], strict=True):
        if step < 1 or samples % step or samples < taps:
            raise ValueError(f"size must be a multiple of the stride {stride} and at least {taps}, got {size}")
    axes = tuple(range(2, dims + 2))
    outputs = tuple(samples // step for samples, step in zip(sizes, strides, strict=True))
    with without_autocast(weight):
        spectrum = torch.fft.fftn(weight.to(torch.promote_types(weight.dtype, torch.float32)), s=sizes, dim=axes)
        half = outputs[-1] // 2 + 1
        blocks = []
        for corner in itertools.product(*map(range, strides)):
            block = spectrum
            for axis, (place, length) in enumerate(zip(corner, outputs, strict=True), 2):
                block = block.narrow(axis, place * length, half if axis == dims + 1 else length)
            blocks.append(block)
        matrices = torch.cat(blocks, 1).movedim((0, 1), (-2, -1)) / math.prod(strides) ** 0.5
        values = torch.linalg.svdvals(matrices)
    # The rest is at the opposite frequencies: -f along every axis.
    mirrored = values.narrow(dims - 1, 1, (outputs[-1] - 1) // 2)
    for axis, length in enumerate(outputs):
        order = torch.arange(mirrored.shape[axis], device=values.device)
        order = order.flip(0) if axis == dims - 1 else -order % length
        mirrored = mirrored.index_select(axis, order)
    return torch.cat([values, mirrored], dims - 1)
