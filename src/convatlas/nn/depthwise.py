"""Depthwise convolutions that run in the memory layout in which the processor is fast."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.errors import Unsupported
from convatlas.nn.conv.geometry import geometry
from convatlas.ops.depthwise import depthwise_conv

__all__ = ["DepthwiseConv1d", "DepthwiseConv2d", "DepthwiseConv3d"]

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class _Depthwise(nn.modules.conv._ConvNd):
    """What the three classes share; see `DepthwiseConv2d`."""

    #: For `convatlas.surgery.merge`: the layer computes what torch's convolution with its parameters does.
    computes_convolution: ClassVar[bool] = True

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, ...) to (B, out_channels, ...)."""
        dims = len(self.kernel_size)
        if x.dim() != dims + 2 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must be (B, {self.in_channels}, ...) with {dims} position axes, got {tuple(x.shape)}")
        padding: Any = self.padding
        if self.padding_mode != "zeros" or isinstance(padding, str):
            # torch keeps the amounts for each side, from the last axis, also of "same" and "valid"
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=mode), 0
        return depthwise_conv(x, self.weight, self.bias, self.stride, padding, self.dilation)

    @classmethod
    def from_conv(cls, conv: nn.Module) -> Self:
        """Take the place of a plain convolution with as many groups as input channels; weights are shared with it.

        ``swap(model, nn.Conv2d, DepthwiseConv2d)`` makes the large depthwise kernels of any model fast on a CPU.

        Raises:
            Unsupported: it is no depthwise convolution.
        """
        dims = next(count for count, kind in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d), 1) if issubclass(cls, kind))
        arguments = geometry(conv, dims)
        groups, channels = arguments.pop("groups"), arguments["in_channels"]
        if groups != channels:
            raise Unsupported(f"it must have as many groups as input channels ({channels}), got {groups}")
        layer = cls(**{**arguments, "device": "meta"})
        layer.weight, layer.bias = conv.weight, conv.bias  # type: ignore[assignment]
        return layer.train(conv.training)


class DepthwiseConv1d(_Depthwise, nn.Conv1d):
    """`DepthwiseConv2d` for signals (B, C, L)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int],
        stride: int | tuple[int] = 1,
        padding: int | tuple[int] | str = 0,
        dilation: int | tuple[int] = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, in_channels, bias, padding_mode, device,
            dtype,
        )  # fmt: skip


class DepthwiseConv2d(_Depthwise, nn.Conv2d):
    """`torch.nn.Conv2d` with as many groups as input channels, in the fastest form for its size (`depthwise_conv`).

    Parameters, names and results are those of torch's layer.

    Args:
        in_channels: channels C of the input, and number of groups.
        out_channels: a multiple of C.
        kernel_size, stride, padding, dilation, bias, padding_mode, device, dtype: as torch takes them.

    Raises:
        ValueError: out_channels is no multiple of in_channels, or an argument is refused by torch.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, in_channels, bias, padding_mode, device,
            dtype,
        )  # fmt: skip


class DepthwiseConv3d(_Depthwise, nn.Conv3d):
    """`DepthwiseConv2d` for volumes (B, C, D, H, W)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int, int],
        stride: int | tuple[int, int, int] = 1,
        padding: int | tuple[int, int, int] | str = 0,
        dilation: int | tuple[int, int, int] = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, in_channels, bias, padding_mode, device,
            dtype,
        )  # fmt: skip
