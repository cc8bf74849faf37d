"""Inception depthwise convolution: identity, square and two band branches on a split of the channels.

Yu, Zhou, Yan, Wang: "InceptionNeXt: When Inception Meets ConvNeXt", CVPR 2024, arXiv 2303.16900, section 3.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.ops.backend import Backends

__all__ = ["inception_dwconv2d", "inception_kernel"]


def _auto(x: Tensor, w_hw: Tensor, b_hw: Tensor | None, w_w: Tensor, *rest: object) -> str:
    # A captured graph must serve every size, and may run elsewhere.
    if torch.compiler.is_compiling():
        return "naive"
    # Without AVX-512, torch's kernel for one-row filters is several times slower than its kernel for one-column
    # filters; with it only the backward pass is. On small maps and in channels_last the turn costs more than it saves.
    large = x.is_contiguous() and x.shape[2] * x.shape[3] >= 28 * 28
    if x.device.type != "cpu" or x.dtype != torch.float32 or not large:
        return "naive"
    backward = torch.is_grad_enabled() and (x.requires_grad or w_w.requires_grad)
    return "turned" if backward or torch.backends.cpu.get_cpu_capability() != "AVX512" else "naive"


_backends = Backends("inception_dwconv2d", auto=_auto)


def inception_dwconv2d(
    x: Tensor,
    w_hw: Tensor,
    b_hw: Tensor | None,
    w_w: Tensor,
    b_w: Tensor | None,
    w_h: Tensor,
    b_h: Tensor | None,
    dilation: int = 1,
    *,
    backend: str = "auto",
) -> Tensor:
    """Depthwise-convolve the last 3g channels with a square, a row and a column kernel; pass the others unchanged.

    The channels are split into identity (C - 3g), square (g), width band (g) and height band (g), in this order. All
    convolutions have stride 1 and keep the size by zero padding.

    Args:
        x: input (B, C, H, W).
        w_hw, b_hw: square kernel (g, 1, s, s) and bias (g) or None.
        w_w, b_w: kernel (g, 1, 1, k) that runs along the width, and bias (g) or None.
        w_h, b_h: kernel (g, 1, k, 1) that runs along the height, and bias (g) or None.
        dilation: distance between kernel taps, in pixels.
        backend: ``auto``, ``naive`` (split, three convolutions, concatenation) or ``turned`` (the width band runs as a
            height band of the transposed map).

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: x is not 4-D, a kernel is even or not of its branch's form, the branches do not fit the channels of
            x, or dilation is smaller than 1.
    """
    if x.dim() != 4:
        raise ValueError(f"x must be (B, C, H, W), got {x.dim()} dimensions")
    groups = w_hw.shape[0]
    if not w_w.shape[0] == w_h.shape[0] == groups or 3 * groups > x.shape[1]:
        raise ValueError(
            f"the three branches must have the same g channels with 3 g <= {x.shape[1]}, "
            f"got {groups}, {w_w.shape[0]} and {w_h.shape[0]}"
        )
    if any(size % 2 == 0 for weight in (w_hw, w_w, w_h) for size in weight.shape[2:]):
        raise ValueError(
            "kernel sizes must be odd to keep the resolution, "
            f"got {tuple(w_hw.shape[2:])}, {tuple(w_w.shape[2:])} and {tuple(w_h.shape[2:])}"
        )
    if w_w.shape[2] != 1 or w_h.shape[3] != 1:
        raise ValueError(
            f"w_w must be (g, 1, 1, k) and w_h (g, 1, k, 1), got {tuple(w_w.shape)} and {tuple(w_h.shape)}"
        )
    if dilation < 1:
        raise ValueError(f"dilation must be at least 1, got {dilation}")
    return _backends.run(backend, x, w_hw, b_hw, w_w, b_w, w_h, b_h, dilation)


def inception_kernel(
    in_channels: int,
    w_hw: Tensor,
    b_hw: Tensor | None,
    w_w: Tensor,
    b_w: Tensor | None,
    w_h: Tensor,
    b_h: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The same map as one depthwise convolution, whose kernel holds a one where a channel passes unchanged.

    Args:
        in_channels: channels C of the input.
        w_hw, b_hw, w_w, b_w, w_h, b_h: as `inception_dwconv2d` takes them.

    Returns:
        Kernel (C, 1, k, k) and bias (C), where k is the longest side of the branches' kernels.
    """
    groups = w_hw.shape[0]
    size = max(*w_hw.shape[2:], w_w.shape[3], w_h.shape[2])
    kernel = w_hw.new_zeros(in_channels, 1, size, size)
    bias = w_hw.new_zeros(in_channels)
    first = in_channels - 3 * groups
    kernel[:first, 0, size // 2, size // 2] = 1
    for index, (weight, offset) in enumerate([(w_hw, b_hw), (w_w, b_w), (w_h, b_h)]):
        height, width = weight.shape[2:]
        top, left = (size - height) // 2, (size - width) // 2
        channels = slice(first + index * groups, first + (index + 1) * groups)
        kernel[channels, :, top : top + height, left : left + width] = weight
        if offset is not None:
            bias[channels] = offset
    return kernel, bias


@_backends.register("naive")
def _naive(
    x: Tensor,
    w_hw: Tensor,
    b_hw: Tensor | None,
    w_w: Tensor,
    b_w: Tensor | None,
    w_h: Tensor,
    b_h: Tensor | None,
    dilation: int,
) -> Tensor:
    groups = w_hw.shape[0]
    x_id, x_hw, x_w, x_h = x.split([x.shape[1] - 3 * groups, groups, groups, groups], dim=1)
    y_hw = _depthwise(x_hw, w_hw, b_hw, dilation)
    y_w = _depthwise(x_w, w_w, b_w, dilation)
    y_h = _depthwise(x_h, w_h, b_h, dilation)
    return torch.cat([x_id, y_hw, y_w, y_h], dim=1)


@_backends.register("turned")
def _turned(
    x: Tensor,
    w_hw: Tensor,
    b_hw: Tensor | None,
    w_w: Tensor,
    b_w: Tensor | None,
    w_h: Tensor,
    b_h: Tensor | None,
    dilation: int,
) -> Tensor:
    groups = w_hw.shape[0]
    x_id, x_hw, x_w, x_h = x.split([x.shape[1] - 3 * groups, groups, groups, groups], dim=1)
    y_hw = _depthwise(x_hw, w_hw, b_hw, dilation)
    y_w = _depthwise(x_w.transpose(2, 3).contiguous(), w_w.transpose(2, 3), b_w, dilation).transpose(2, 3)
    y_h = _depthwise(x_h, w_h, b_h, dilation)
    return torch.cat([x_id, y_hw, y_w, y_h], dim=1)


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    height, width = weight.shape[2:]
    padding = (dilation * (height // 2), dilation * (width // 2))
    return F.conv2d(x, weight, bias, padding=padding, dilation=dilation, groups=weight.shape[0])
