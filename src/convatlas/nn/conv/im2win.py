"""Convolution layer that computes by window tensors, in place of torch's.

Lu, Chu, Guo, Liu: "Im2win: An Efficient Convolution Paradigm on GPU", Euro-Par 2023, arXiv 2306.14316.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.nn.conv.geometry import geometry, plain_conv
from convatlas.ops.im2win import conv2d_im2win

__all__ = ["Im2winConv2d"]


class Im2winConv2d(nn.Conv2d):
    """`torch.nn.Conv2d` computed by `conv2d_im2win`: the same parameters, names and results.

    ``swap(model, nn.Conv2d, Im2winConv2d)`` replaces every convolution of a model, and `merge` puts torch's back.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            torch's convolution takes them.
        recompute: whether the backward pass builds the window tensor again, or it is kept (one group).
        backend: of `conv2d_im2win`.

    Raises:
        ValueError: an argument is refused by torch.
    """

    #: For `convatlas.surgery.merge`: the layer computes what torch's convolution with its parameters does.
    computes_convolution: ClassVar[bool] = True

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
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: bool = True,
        backend: str = "auto",
    ) -> None:
        place = (stride, padding, dilation, groups, bias, padding_mode, device, dtype)
        super().__init__(in_channels, out_channels, kernel_size, *place)
        self.recompute, self.backend = recompute, backend

    @classmethod
    def from_conv(cls, conv: nn.Module, **options: Any) -> Self:
        """Take the place of a plain convolution; weights are shared with it.

        Args:
            conv: a `torch.nn.Conv2d`.
            **options: of the layer.

        Raises:
            Unsupported: it is something else.
        """
        layer = cls(**{**geometry(conv, 2), "device": "meta"}, **options)
        layer.weight, layer.bias = conv.weight, conv.bias  # type: ignore[assignment]
        return layer.train(conv.training)

    def to_conv(self) -> Any:
        """The plain convolution that computes the same."""
        return plain_conv(self)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, in_channels, H, W) to (B, out_channels, H', W')."""
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must be (B, {self.in_channels}, H, W), got {tuple(x.shape)}")
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        weight = self.weight
        if torch.is_autocast_enabled(x.device.type):
            # The operator computes in float32; its result has the type that torch's convolution would give.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        weight, bias = weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        place: Any = (self.stride, padding, self.dilation, self.groups, self.recompute)
        return conv2d_im2win(x, weight, bias, *place, backend=self.backend)
