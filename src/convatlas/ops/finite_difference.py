"""Convolution that becomes a derivative when the grid is refined.

Liu-Schiaffini et al.: "Neural Operators with Localized Integral and Differential Kernels", ICML 2024, arXiv 2402.16845;
as in Berner et al., 2025, arXiv 2506.10973.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.errors import unknown
from convatlas.ops.backend import Backends

__all__ = ["Padding", "centred_kernel", "finite_difference"]

#: How a field goes on beyond its border.
Padding = Literal["periodic", "replicate", "reflect", "zeros"]

_CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_MODES = {"periodic": "circular", "replicate": "replicate", "reflect": "reflect", "zeros": "constant"}

_backends = Backends("finite_difference", auto=lambda *_: "single")


def finite_difference(
    x: Tensor,
    weight: Tensor,
    grid_width: float = 1.0,
    padding: Padding = "periodic",
    groups: int = 1,
    *,
    backend: str = "auto",
) -> Tensor:
    """y = (K * x - (sum of K) x) / h: a learnt combination of differences with the neighbours.

    Of a smooth field it tends to sum_j K_j (j . grad) x as the distance h of the points goes to 0.

    Args:
        x: (B, I, *grid) with one to three axes.
        weight: K (O, I / groups, *k), k odd.
        grid_width: distance h of the points, or its ratio to that of the grid on which K was trained.
        padding: how x goes on beyond its border.
        groups: of channels, as torch's convolution has them.
        backend: ``auto``; ``naive`` (two convolutions, the definition); ``single`` (one, whose kernel sums to zero).

    Returns:
        (B, O, *grid).

    Raises:
        ValueError: the shapes do not fit, a kernel is even, grid_width is not positive, or a border is wider than x.
        UnknownName: there is no such padding.
    """
    dims = x.dim() - 2
    if dims not in _CONVS or weight.dim() != x.dim() or x.shape[1] != groups * weight.shape[1]:
        raise ValueError(
            f"x must be (B, I, *grid) and weight (O, I / groups, *k), got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if any(size % 2 == 0 for size in weight.shape[2:]):
        raise ValueError(f"kernel size should be odd, got {tuple(weight.shape[2:])}")
    if not grid_width > 0:
        raise ValueError(f"grid_width must be positive, got {grid_width}")
    if padding not in _MODES:
        raise unknown("padding", padding, _MODES)
    return _backends.run(backend, x, weight, grid_width, padding, groups)


def _padded(x: Tensor, kernel: torch.Size, padding: Padding) -> Tensor:
    half = [size // 2 for size in kernel]
    short = [n for n, pad in zip(x.shape[2:], half, strict=True) if (n <= pad if padding == "reflect" else n < pad)]
    if short and padding in ("reflect", "periodic"):
        raise ValueError(f"x must be wider than half the kernel {tuple(kernel)} for this padding, got {x.shape[2:]}")
    return F.pad(x, [pad for pad in reversed(half) for _ in range(2)], mode=_MODES[padding])


@_backends.register("naive")
def _naive(x: Tensor, weight: Tensor, grid_width: float, padding: Padding, groups: int) -> Tensor:
    conv, axes = _CONVS[x.dim() - 2], tuple(range(2, x.dim()))
    around = conv(_padded(x, weight.shape[2:], padding), weight, groups=groups)
    return (around - conv(x, weight.sum(axes, keepdim=True), groups=groups)) / grid_width


@_backends.register("single")
def _single(x: Tensor, weight: Tensor, grid_width: float, padding: Padding, groups: int) -> Tensor:
    kernel = centred_kernel(weight) / grid_width
    return _CONVS[x.dim() - 2](_padded(x, weight.shape[2:], padding), kernel, groups=groups)


def centred_kernel(weight: Tensor) -> Tensor:
    """The kernel (O, I, *k), k odd, less its sum at the tap in the middle, so that it sums to zero."""
    half = [size // 2 for size in weight.shape[2:]]
    middle = weight.sum(tuple(range(2, weight.dim())), keepdim=True)
    return weight - F.pad(middle, [pad for pad in reversed(half) for _ in range(2)])
