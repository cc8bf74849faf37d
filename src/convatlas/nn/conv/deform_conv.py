"""Deformable convolution as a layer: it finds the offsets of its taps by a convolution of its own, or is given them.

Dai et al.: "Deformable Convolutional Networks", ICCV 2017, arXiv 1703.06211; Zhu, Hu, Lin, Dai: "Deformable ConvNets
v2", CVPR 2019, arXiv 1811.11168. Parameters have the names of mmcv: ``weight``, ``bias`` and ``conv_offset``.
"""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor, nn

from convatlas.errors import Unsupported
from convatlas.nn.conv.geometry import as_tuple, geometry
from convatlas.ops.deform_conv import deform_conv2d

__all__ = ["DeformConv2d", "GivenOffsetConv2d"]


class GivenOffsetConv2d(nn.Module):
    """Deformable convolution whose offsets come from outside: from another layer, another level, another frame.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            `torch.nn.Conv2d` takes them; padding is of zeros.
        offset_groups: groups of input channels with offsets of their own.

    Raises:
        ValueError: groups or offset_groups do not divide the channels, a size is too small, or padding is no zeros.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        offset_groups: int = 1,
    ) -> None:
        super().__init__()
        if padding_mode != "zeros":
            raise ValueError(f"padding_mode must be 'zeros', got {padding_mode!r}")
        if min(in_channels, out_channels, groups, offset_groups) < 1 or (
            in_channels % groups or out_channels % groups or in_channels % offset_groups
        ):
            raise ValueError(
                f"groups must divide in_channels and out_channels, and offset_groups in_channels, got {groups} and "
                f"{offset_groups} for {in_channels} and {out_channels}"
            )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.offset_groups = offset_groups
        self.kernel_size = _pair(kernel_size, "kernel_size", 1)
        self.stride, self.dilation = _pair(stride, "stride", 1), _pair(dilation, "dilation", 1)
        self.padding = self._padding(padding)
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size, **place))
        self.bias = nn.Parameter(torch.empty(out_channels, **place)) if bias else None
        self.reset_parameters()

    def _padding(self, padding: str | int | tuple[int, int]) -> tuple[int, int]:
        if padding == "valid":
            return 0, 0
        if not isinstance(padding, str):
            return _pair(padding, "padding", 0)
        around = tuple(step * (taps - 1) for taps, step in zip(self.kernel_size, self.dilation, strict=True))
        if padding != "same" or self.stride != (1, 1) or around[0] % 2 or around[1] % 2:
            raise ValueError(f"padding must be a number, or 'same' with stride 1 and an odd kernel, got {padding!r}")
        return around[0] // 2, around[1] // 2

    def reset_parameters(self) -> None:
        """Draw the weight and the bias as a convolution of torch draws them."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(max(1, self.weight[0].numel()))
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """Convolve (B, in_channels, H, W); offset and mask as `convatlas.ops.deform_conv.deform_conv2d` takes them."""
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must be (B, {self.in_channels}, H, W), got {tuple(x.shape)}")
        return deform_conv2d(x, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask)

    def extra_repr(self) -> str:
        """Show the geometry."""
        place = f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}"
        groups = f"groups={self.groups}, offset_groups={self.offset_groups}, bias={self.bias is not None}"
        return f"{self.in_channels}, {self.out_channels}, {self.kernel_size}, {place}, {groups}"


class DeformConv2d(GivenOffsetConv2d):
    """Deformable convolution whose offsets are made from its own input by a convolution of the same geometry.

    That convolution starts at zero, so that a new layer computes a plain convolution: of its weight, or, if modulated,
    of half of it, since the modulation is a sigmoid. ``from_conv`` doubles the weight in that case.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            `torch.nn.Conv2d` takes them; padding is of zeros.
        offset_groups: groups of input channels with offsets of their own.
        modulated: whether every tap is weighted too, as in the second version of the paper.

    Raises:
        ValueError: groups or offset_groups do not divide the channels, a size is too small, or padding is no zeros.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        offset_groups: int = 1,
        modulated: bool = False,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device,
            dtype, offset_groups=offset_groups,
        )  # fmt: skip
        self.modulated = modulated
        taps = math.prod(self.kernel_size)
        self.conv_offset = nn.Conv2d(
            in_channels, (3 if modulated else 2) * taps * offset_groups, self.kernel_size, self.stride, self.padding,
            self.dilation, device=device, dtype=dtype,
        )  # fmt: skip
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)  # type: ignore[arg-type]

    @classmethod
    def from_conv(cls, conv: nn.Module, **options: Any) -> Self:
        """A layer with the geometry, weight and bias of a convolution, which at first it computes.

        Args:
            conv: a `torch.nn.Conv2d`.
            **options: of the layer.

        Raises:
            Unsupported: it is something else, or the layer cannot have its geometry.
        """
        try:
            layer = cls(**geometry(conv, 2), **options)
        except ValueError as error:
            raise Unsupported(str(error)) from None
        plain: Any = conv
        with torch.no_grad():
            layer.weight.copy_(2 * plain.weight if layer.modulated else plain.weight)
            if layer.bias is not None:
                layer.bias.copy_(plain.bias)
        layer.weight.requires_grad_(plain.weight.requires_grad)
        return layer.train(plain.training)

    def to_conv(self) -> None:
        """None: the taps move with the input."""
        return None

    def offsets(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Offset and mask, or None in its place, for an input (B, in_channels, H, W)."""
        found: Tensor = self.conv_offset(x)
        if not self.modulated:
            return found, None
        offset, mask = found.split([found.shape[1] // 3 * 2, found.shape[1] // 3], 1)
        return offset, mask.sigmoid()

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Convolve (B, in_channels, H, W)."""
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must be (B, {self.in_channels}, H, W), got {tuple(x.shape)}")
        return super().forward(x, *self.offsets(x))

    def extra_repr(self) -> str:
        """Show the geometry."""
        return f"{super().extra_repr()}, modulated={self.modulated}"


def _pair(value: int | tuple[int, ...], name: str, least: int) -> tuple[int, int]:
    down, right = as_tuple(value, 2, name)
    if min(down, right) < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return down, right
