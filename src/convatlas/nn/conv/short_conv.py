"""Depthwise convolution of sequences with a few taps, for signals (B, D, L) and for tokens (B, L, D).

Fu, Kumbong, Nguyen, Re: "FlashFFTConv: Efficient Convolutions for Long Sequences with Tensor Cores", ICLR 2024,
arXiv 2311.05908.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from convatlas.errors import Unsupported
from convatlas.nn.conv.geometry import as_tuple, geometry, plain_conv
from convatlas.ops.short_conv import short_conv1d

__all__ = ["ShortConv1d"]


class ShortConv1d(nn.Conv1d):
    """A depthwise `torch.nn.Conv1d` of stride 1 in the fastest form for its layout (`short_conv1d`).

    Parameters, names and results are those of torch's layer. With padding K - 1, the first L positions are causal.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            torch's convolution takes them. Channels and groups are one number; stride and dilation are 1, and padding
            is a number of zeros.
        channels_last: whether it takes and gives tokens (B, L, D).

    Raises:
        ValueError: the convolution is not such a one.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int],
        stride: int | tuple[int] = 1,
        padding: str | int | tuple[int] = 0,
        dilation: int | tuple[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        channels_last: bool = False,
    ) -> None:
        if not in_channels == out_channels == groups:
            raise ValueError(
                f"ShortConv1d is depthwise: in_channels, out_channels and groups must be equal, got {in_channels}, "
                f"{out_channels} and {groups}"
            )
        for name, value in (("stride", stride), ("dilation", dilation)):
            if as_tuple(value, 1, name) != (1,):
                raise ValueError(f"{name} must be 1, got {value}")
        if isinstance(padding, str) or padding_mode != "zeros":
            raise ValueError(f"padding must be a number of zeros, got {padding!r} ({padding_mode})")
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            padding=padding,
            groups=groups,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.channels_last = channels_last

    @property
    def computes_convolution(self) -> bool:
        """For `convatlas.surgery.merge`: whether it computes what torch's convolution with its parameters does."""
        return not self.channels_last

    @classmethod
    def from_conv(cls, conv: nn.Module, *, channels_last: bool = False) -> Self:
        """Take the place of a depthwise convolution; weights are shared with it.

        Raises:
            Unsupported: it is something else, or has a stride, a dilation or another padding than zeros.
        """
        arguments = geometry(conv, 1)
        try:
            layer = cls(**{**arguments, "device": "meta"}, channels_last=channels_last)
        except ValueError as error:
            raise Unsupported(str(error)) from None
        layer.weight, layer.bias = conv.weight, conv.bias  # type: ignore[assignment]
        return layer.train(conv.training)

    def to_conv(self) -> Any:
        """The plain convolution that computes the same, for signals; None for tokens."""
        return None if self.channels_last else plain_conv(self)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, D, L), or (B, L, D) with channels last, to L + 2 padding - K + 1 positions."""
        if x.dim() != 3 or x.shape[2 if self.channels_last else 1] != self.in_channels:
            form = "(B, L, {})" if self.channels_last else "(B, {}, L)"
            raise ValueError(f"x must be {form.format(self.in_channels)}, got {tuple(x.shape)}")
        padding: Any = self.padding
        return short_conv1d(x, self.weight, self.bias, padding[0], self.channels_last)

    def extra_repr(self) -> str:
        """Show the geometry."""
        sizes = f"kernel_size={self.kernel_size[0]}, padding={self.padding[0]}, bias={self.bias is not None}"
        return f"{self.in_channels}, {sizes}, channels_last={self.channels_last}"
