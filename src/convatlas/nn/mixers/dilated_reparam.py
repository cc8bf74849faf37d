"""The Dilated Reparam Block: a large depthwise kernel trained beside small dilated ones, merged for use into one.

Ding, Zhang, Ge, Zhao, Song, Yue, Shan: "UniRepLKNet: A Universal Perception Large-Kernel ConvNet for Audio, Video,
Point Cloud, Time-Series and Image Recognition", CVPR 2024, arXiv 2311.15599, section 3.1; Zhang, Ding, Yue: "Scaling Up
Your Kernels", TPAMI 2025, arXiv 2410.08049.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from convatlas.nn.depthwise import DepthwiseConv1d, DepthwiseConv2d, DepthwiseConv3d
from convatlas.weights import Layout

__all__ = ["BRANCHES", "DilatedReparamBlock", "fold_norm", "merge_dilated_into_large_kernel"]

#: Size of the large kernel -> size and dilation of each kernel beside it (paper, section 3.1).
BRANCHES: dict[int, tuple[tuple[int, int], ...]] = {
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    7: ((5, 1), (3, 2), (3, 3)),
    5: ((3, 1), (3, 2)),
}

_DEPTHWISE: dict[int, Any] = {1: DepthwiseConv1d, 2: DepthwiseConv2d, 3: DepthwiseConv3d}
_NORMS: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class DilatedReparamBlock(nn.Module):
    """y = BN(DW_K(x)) + sum_j BN_j(DW_{k_j, r_j}(x)): depthwise, without activation, the size is kept.

    In evaluation all of it is one depthwise convolution with a K x K kernel and a bias: `merged` returns it, and
    `convatlas.surgery.merge` puts it in place.

    Args:
        channels: channels C.
        kernel_size: side K of the large kernel, odd.
        kernel_sizes: sides k_j of the kernels beside it; those of the paper when left out (`BRANCHES`).
        dilations: their dilations r_j, one for each of ``kernel_sizes``.
        dims: number of position axes, 1, 2 or 3.
        device, dtype: of the parameters.

    Raises:
        ValueError: kernel_size is even or has no default branches, the branches do not fit into the large kernel, or
            dims is out of range.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {
        "authors": Layout(
            renames=(
                (r"(^|\.)lk_origin\.", r"\1large.conv."),
                (r"(^|\.)origin_bn\.", r"\1large.norm."),
                (r"(^|\.)dil_conv_(k\d+_\d+)\.", r"\1dilated.\2.conv."),
                (r"(^|\.)dil_bn_(k\d+_\d+)\.", r"\1dilated.\2.norm."),
            )
        )
    }

    def __init__(
        self,
        channels: int,
        kernel_size: int = 13,
        *,
        kernel_sizes: Sequence[int] | None = None,
        dilations: Sequence[int] | None = None,
        dims: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dims not in _DEPTHWISE:
            raise ValueError(f"dims must be 1, 2 or 3, got {dims}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        self.channels, self.kernel_size, self.dims = channels, kernel_size, dims
        branches = _branches(kernel_size, kernel_sizes, dilations)
        self.large = _Branch(channels, kernel_size, 1, dims, device, dtype)
        self.dilated = nn.ModuleDict(
            {f"k{size}_{rate}": _Branch(channels, size, rate, dims, device, dtype) for size, rate in branches}
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, *positions) to the same shape."""
        if x.dim() != self.dims + 2 or x.shape[1] != self.channels:
            raise ValueError(
                f"x must be (B, {self.channels}, ...) with {self.dims} position axes, got {tuple(x.shape)}"
            )
        y: Tensor = self.large(x)
        for branch in self.dilated.values():
            y = y + branch(x)
        return y

    def merged(self) -> nn.Module | None:
        """The depthwise convolution that computes the same in evaluation; None if parts were exchanged for others.

        Its weights are computed in float64.
        """
        conv, norms = _DEPTHWISE[self.dims], (_NORMS[self.dims], nn.SyncBatchNorm)
        if not all(
            isinstance(branch, _Branch) and type(branch.conv) is conv and type(branch.norm) in norms
            for branch in (self.large, *self.dilated.values())
        ):
            return None
        if self.training and not self.large.norm.num_batches_tracked:
            warnings.warn("the block is merged before its batch norms have seen any data", stacklevel=2)
        kernel, bias = self.large.folded()
        for branch in self.dilated.values():
            small, shift = branch.folded()  # type: ignore[operator]
            kernel = merge_dilated_into_large_kernel(kernel, small, branch.conv.dilation[0])  # type: ignore[union-attr,index,arg-type]
            bias = bias + shift
        old = self.large.conv.weight
        size, padding = self.kernel_size, self.kernel_size // 2
        plain: nn.Module = conv(self.channels, self.channels, size, padding=padding, device="meta")
        plain.weight = nn.Parameter(kernel.to(old.dtype), old.requires_grad)
        plain.bias = nn.Parameter(bias.to(old.dtype), old.requires_grad)
        return plain.train(self.training)

    def extra_repr(self) -> str:
        """Show channels and kernel size."""
        return f"{self.channels}, kernel_size={self.kernel_size}"


class _Branch(nn.Module):
    """A depthwise convolution without bias that keeps the size, and its batch norm."""

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        dilation: int,
        dims: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        padding = dilation * (kernel_size - 1) // 2
        self.conv = _DEPTHWISE[dims](
            channels, channels, kernel_size, padding=padding, dilation=dilation, bias=False, device=device, dtype=dtype
        )
        self.norm = _NORMS[dims](channels, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))

    def folded(self) -> tuple[Tensor, Tensor]:
        return fold_norm(self.conv, self.norm)


def fold_norm(layer: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution or linear layer with the batch norm behind it, at its running statistics.

    Args:
        layer: with ``weight`` (out_channels, ...) and ``bias``, which may be None.
        norm: with weight, bias, running statistics and eps.

    Returns:
        Both in float64; in float32 on devices that have no float64.
    """
    wide = torch.float32 if layer.weight.device.type == "mps" else torch.float64
    scale = norm.weight.detach().to(wide) * (norm.running_var.to(wide) + norm.eps).rsqrt()
    weight = layer.weight.detach().to(wide)
    bias = -norm.running_mean.to(wide)
    if layer.bias is not None:
        bias = bias + layer.bias.detach()
    return weight * scale.reshape(-1, *[1] * (weight.dim() - 1)), norm.bias.detach().to(wide) + bias * scale


def merge_dilated_into_large_kernel(large: Tensor, dilated: Tensor, dilation: int) -> Tensor:
    """Add a kernel that is used with a dilation to a larger one that is used without (paper, equation 1).

    Args:
        large: (channels, 1, K, ...), K odd, the same on every axis.
        dilated: (channels, 1, k, ...), k odd with dilation (k - 1) + 1 at most K.
        dilation: distance r of its taps.

    Returns:
        The kernel, as large as ``large``, whose convolution is the sum of both.

    Raises:
        ValueError: the kernels do not fit into each other.
    """
    span = dilation * (dilated.shape[-1] - 1) + 1
    size = large.shape[-1]
    fits = large.dim() == dilated.dim() > 2 and large.shape[:2] == dilated.shape[:2] and dilation >= 1
    if not fits or span > size or (size - span) % 2:
        raise ValueError(
            f"the dilated kernel must lie in the middle of the large one, got {tuple(dilated.shape)} with dilation "
            f"{dilation} and {tuple(large.shape)}"
        )
    start = (size - span) // 2
    merged = large.clone()
    taps: Any = (..., *[slice(start, start + span, dilation)] * (large.dim() - 2))
    merged[taps] += dilated
    return merged


def _branches(
    kernel_size: int, kernel_sizes: Sequence[int] | None, dilations: Sequence[int] | None
) -> tuple[tuple[int, int], ...]:
    if kernel_sizes is None and dilations is None:
        if kernel_size not in BRANCHES:
            raise ValueError(
                f"no default dilated branches for kernel {kernel_size}; pass kernel_sizes and dilations "
                f"(there are some for {', '.join(map(str, sorted(BRANCHES)))})"
            )
        return BRANCHES[kernel_size]
    if kernel_sizes is None or dilations is None or len(kernel_sizes) != len(dilations):
        raise ValueError(f"kernel_sizes and dilations must have as many entries, got {kernel_sizes} and {dilations}")
    branches = tuple(zip(kernel_sizes, dilations, strict=True))
    for size, rate in branches:
        if size < 1 or size % 2 == 0 or rate < 1 or rate * (size - 1) + 1 > kernel_size:
            raise ValueError(
                f"each branch must have an odd kernel that spans at most kernel_size {kernel_size} with its dilation, "
                f"got kernel {size} with dilation {rate}"
            )
    if len(set(branches)) < len(branches):
        raise ValueError(f"branches must differ from each other, got {branches}")
    return branches
