"""Depthwise convolution of a part of the channels: the Inception form and the partial form.

Yu, Zhou, Yan, Wang: "InceptionNeXt: When Inception Meets ConvNeXt", CVPR 2024, arXiv 2303.16900.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from convatlas.ops.inception import inception_dwconv2d, inception_kernel

__all__ = ["InceptionDWConv2d", "PartialDWConv2d"]


class InceptionDWConv2d(nn.Module):
    """Inception depthwise convolution: a square, a row and a column kernel on g channels each, identity on the rest.

    g = int(in_channels * branch_ratio); the convolved channels are the last 3g (paper, section 3.2). A cheap stand-in
    for a large depthwise kernel.

    Args:
        in_channels: channels C of input and output.
        square_kernel_size: side of the square kernel, odd.
        band_kernel_size: length of the two band kernels, odd.
        branch_ratio: share of the channels that each of the three branches convolves.
        dilation: distance between kernel taps, in pixels.
        device, dtype: of the parameters.

    Raises:
        ValueError: a kernel size is even, dilation is smaller than 1, or the branches get no channel or more than there
            are.
    """

    def __init__(
        self,
        in_channels: int,
        square_kernel_size: int = 3,
        band_kernel_size: int = 11,
        branch_ratio: float = 0.125,
        dilation: int = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        groups = int(in_channels * branch_ratio)
        if square_kernel_size % 2 == 0 or band_kernel_size % 2 == 0:
            raise ValueError(
                "kernel sizes must be odd to keep the resolution, "
                f"got square_kernel_size {square_kernel_size} and band_kernel_size {band_kernel_size}"
            )
        if groups < 1:
            raise ValueError(f"branch_ratio * in_channels must be at least 1, got {branch_ratio} * {in_channels}")
        if 3 * groups > in_channels:
            raise ValueError(
                "three branches need 3 * int(in_channels * branch_ratio) <= in_channels, "
                f"got 3 * {groups} > {in_channels}"
            )
        if dilation < 1:
            raise ValueError(f"dilation must be at least 1, got {dilation}")
        self.in_channels = in_channels
        self.dilation = dilation

        def depthwise(height: int, width: int) -> nn.Conv2d:
            padding = (dilation * (height // 2), dilation * (width // 2))
            options: dict[str, Any] = {"device": device, "dtype": dtype}
            return nn.Conv2d(
                groups, groups, (height, width), padding=padding, dilation=dilation, groups=groups, **options
            )

        self.dwconv_hw = depthwise(square_kernel_size, square_kernel_size)
        self.dwconv_w = depthwise(1, band_kernel_size)
        self.dwconv_h = depthwise(band_kernel_size, 1)

    def _weights(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor, Tensor | None]:
        hw, w, h = self.dwconv_hw, self.dwconv_w, self.dwconv_h
        return hw.weight, hw.bias, w.weight, w.bias, h.weight, h.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must be (B, {self.in_channels}, H, W), got {tuple(x.shape)}")
        return inception_dwconv2d(x, *self._weights(), self.dilation)

    def to_conv(self) -> nn.Conv2d:
        """The same map as one dense depthwise convolution, for deployment where a single kernel is wanted."""
        with torch.no_grad():
            kernel, bias = inception_kernel(self.in_channels, *self._weights())
            size = kernel.shape[-1]
            conv = nn.Conv2d(
                self.in_channels,
                self.in_channels,
                size,
                padding=self.dilation * (size // 2),
                dilation=self.dilation,
                groups=self.in_channels,
                device=kernel.device,
                dtype=kernel.dtype,
            )
            conv.weight.copy_(kernel)
            conv.bias.copy_(bias)  # type: ignore[union-attr]
        return conv

    def extra_repr(self) -> str:
        """Show the number of channels."""
        return f"{self.in_channels}"


class PartialDWConv2d(nn.Module):
    """Depthwise convolution of the last int(ratio * channels) channels; the first ones pass unchanged.

    The pilot study of the paper (section 3.1): with a 3x3 kernel, down to a quarter of the channels loses almost
    nothing.

    Args:
        channels: channels C of input and output.
        kernel_size: side of the kernel, odd.
        ratio: share of the channels that is convolved, in (0, 1].
        device, dtype: of the parameters.

    Raises:
        ValueError: kernel_size is even, or ratio leaves no channel to convolve.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 3,
        ratio: float = 0.25,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        groups = int(channels * ratio)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd to keep the resolution, got {kernel_size}")
        if not 1 <= groups <= channels:
            raise ValueError(f"ratio * channels must be between 1 and {channels}, got {ratio} * {channels}")
        self.channels = channels
        self.conv = nn.Conv2d(
            groups, groups, kernel_size, padding=kernel_size // 2, groups=groups, device=device, dtype=dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(f"x must be (B, {self.channels}, H, W), got {tuple(x.shape)}")
        groups = self.conv.in_channels
        identity, convolved = x.split([self.channels - groups, groups], dim=1)
        return torch.cat([identity, self.conv(convolved)], dim=1)

    def extra_repr(self) -> str:
        """Show the number of channels."""
        return f"{self.channels}"
