"""Sparse convolutions: regular, submanifold, transposed and inverse."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from convatlas.nn.conv.geometry import as_tuple
from convatlas.nn.conv.sparse.base import PlacedModule, Sizes
from convatlas.ops.sparse import (
    Kernel,
    Rulebook,
    SparseTensor,
    conv_rulebook,
    sparse_conv,
    submanifold_rulebook,
    transposed_rulebook,
)

__all__ = [
    "SparseConv1d",
    "SparseConv2d",
    "SparseConv3d",
    "SparseConv4d",
    "SparseConvTranspose1d",
    "SparseConvTranspose2d",
    "SparseConvTranspose3d",
    "SparseConvolution",
    "SparseInverseConv1d",
    "SparseInverseConv2d",
    "SparseInverseConv3d",
    "SubMConv1d",
    "SubMConv2d",
    "SubMConv3d",
    "SubMConv4d",
]


class SparseConvolution(PlacedModule):
    """What the convolutions share; see `SparseConv3d`, `SubMConv3d`, `SparseInverseConv3d`, `SparseConvTranspose3d`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        indice_key: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(kernel_size, stride, padding, dilation, indice_key)
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if groups != 1:
            raise ValueError(f"groups must be 1 in a sparse convolution, got {groups}")
        self.in_channels, self.out_channels = in_channels, out_channels
        shape = (out_channels, *self.kernel.size, in_channels)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias uniformly from +-1 / sqrt(C_in K), as torch and spconv do."""
        bound = 1 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Convolve; C_out features at the places of the output.

        Raises:
            ValueError: x has other axes or channels.
        """
        self._check(x, self.in_channels)
        rulebook = self.rulebook(x)
        return self._placed(x, sparse_conv(x.features, rulebook, self.weight, self.bias), rulebook)

    def extra_repr(self) -> str:
        """The geometry."""
        kernel = self.kernel
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={kernel.size}, stride={kernel.stride}"
        text += f", padding={kernel.padding}, dilation={kernel.dilation}, bias={self.bias is not None}"
        return text if self.indice_key is None else f"{text}, indice_key={self.indice_key!r}"


class _Regular(SparseConvolution):
    kind = "conv"

    def rulebook(self, x: SparseTensor) -> Rulebook:
        return self._known_or(x, lambda: conv_rulebook(x.indices, x.spatial_shape, x.batch_size, self.kernel))


class _Submanifold(SparseConvolution):
    kind = "submanifold"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        size, stride, padding, dilation = (
            getattr(self.kernel, name) for name in ("size", "stride", "padding", "dilation")
        )
        if any(taps % 2 == 0 for taps in size):
            raise ValueError(f"submanifold convolution needs odd kernel sizes, got {_shortest(size)}")
        if max(stride) > 1:
            raise ValueError(f"submanifold convolution keeps its places, so stride must be 1, got {_shortest(stride)}")
        centred = tuple(taps // 2 * step for taps, step in zip(size, dilation, strict=True))
        if max(padding) > 0 and padding != centred:
            raise ValueError(
                f"submanifold convolution is centred, so padding must be {_shortest(centred)} or left out, "
                f"got {_shortest(padding)}"
            )
        self.kernel = Kernel(size, stride, centred, dilation)

    def rulebook(self, x: SparseTensor) -> Rulebook:
        size, dilation = self.kernel.size, self.kernel.dilation
        return self._known_or(x, lambda: submanifold_rulebook(x.indices, x.spatial_shape, x.batch_size, size, dilation))


class _Transposed(SparseConvolution):
    kind = "transposed"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes = 0,
        output_padding: Sizes = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Sizes = 1,
        **options: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, **options)
        more = as_tuple(output_padding, self.dims, "output_padding")
        kernel = self.kernel
        largest = map(max, kernel.stride, kernel.dilation)
        if not all(0 <= extra < bound for extra, bound in zip(more, largest, strict=True)):
            raise ValueError(f"output_padding must be smaller than stride or dilation, got {output_padding}")
        self.kernel = Kernel(kernel.size, kernel.stride, kernel.padding, kernel.dilation, more)

    def rulebook(self, x: SparseTensor) -> Rulebook:
        return self._known_or(x, lambda: transposed_rulebook(x.indices, x.spatial_shape, x.batch_size, self.kernel))


class _Inverse(SparseConvolution):
    kind = "inverse"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        indice_key: str,
        bias: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, bias=bias, indice_key=indice_key, **options)

    def rulebook(self, x: SparseTensor) -> Rulebook:
        known = x.rulebooks.get(self.indice_key)
        if known is None:
            names = ", ".join(repr(key) for key in x.rulebooks if isinstance(key, str)) or "none"
            raise ValueError(
                f"indice_key must be that of an earlier convolution, got {self.indice_key!r}; known are: {names}"
            )
        if known.kind == "submanifold":
            raise ValueError(
                f"indice_key {self.indice_key!r} belongs to a submanifold convolution, which has no inverse"
            )
        if known.kernel.size != self.kernel.size:
            raise ValueError(
                f"kernel_size must be that of the convolution {self.indice_key!r}, {_shortest(known.kernel.size)}, "
                f"got {_shortest(self.kernel.size)}"
            )
        if known.output_indices is not x.indices:
            raise ValueError(f"x must have the places that the convolution {self.indice_key!r} gave")
        inverse: Rulebook = known.inverse
        return inverse


class SparseConv1d(_Regular):
    """Convolution along one axis whose output has every place that an active input reaches."""

    dims = 1


class SparseConv2d(_Regular):
    """Convolution along two axes whose output has every place that an active input reaches."""

    dims = 2


class SparseConv3d(_Regular):
    """Convolution along three axes whose output has every place that an active input reaches.

    At those places it is the dense convolution of the grid; the places come in the order of their coordinates.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as of `torch.nn.Conv3d`; groups
            must be 1.
        indice_key: name by which an inverse convolution finds the way back.

    Raises:
        ValueError: a size is out of range.
    """

    dims = 3


class SparseConv4d(_Regular):
    """Convolution along four axes whose output has every place that an active input reaches."""

    dims = 4


class SubMConv1d(_Submanifold):
    """Submanifold convolution along one axis: the output has the places of the input."""

    dims = 1


class SubMConv2d(_Submanifold):
    """Submanifold convolution along two axes: the output has the places of the input."""

    dims = 2


class SubMConv3d(_Submanifold):
    """Submanifold convolution along three axes: the output has the places of the input, in the same order.

    There it is the dense convolution with a centred kernel.

    Args:
        in_channels, out_channels, kernel_size, dilation, bias: as of `torch.nn.Conv3d`; sizes must be odd.
        stride, padding, groups: must be 1, centred or left out, and 1.
        indice_key: name of the pairs; without one they are found by places and geometry.

    Raises:
        ValueError: a size is even or out of range.
    """

    dims = 3


class SubMConv4d(_Submanifold):
    """Submanifold convolution along four axes: the output has the places of the input."""

    dims = 4


class SparseConvTranspose1d(_Transposed):
    """Transposed convolution along one axis, to every place that an active input reaches."""

    dims = 1


class SparseConvTranspose2d(_Transposed):
    """Transposed convolution along two axes, to every place that an active input reaches."""

    dims = 2


class SparseConvTranspose3d(_Transposed):
    """Transposed convolution along three axes, to every place that an active input reaches.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation: as of
            `torch.nn.ConvTranspose3d`; groups must be 1. The weight is (C_out, *kernel_size, C_in) all the same.
        indice_key: name of the pairs.

    Raises:
        ValueError: a size is out of range.
    """

    dims = 3


class SparseInverseConv1d(_Inverse):
    """Back along one axis to the places and rows that an earlier convolution began with."""

    dims = 1


class SparseInverseConv2d(_Inverse):
    """Back along two axes to the places and rows that an earlier convolution began with."""

    dims = 2


class SparseInverseConv3d(_Inverse):
    """Back along three axes to the places, and the order of rows, that an earlier convolution began with.

    A place that had no pair on the way down gets the bias only.

    Args:
        in_channels, out_channels: of the features.
        kernel_size: that of the earlier convolution.
        indice_key: its name.
        bias: whether there is one.

    Raises:
        ValueError: a size is out of range; in `forward`, the name is unknown or of a submanifold convolution.
    """

    dims = 3


def _shortest(sizes: tuple[int, ...]) -> int | tuple[int, ...]:
    return sizes[0] if len(set(sizes)) == 1 else sizes
