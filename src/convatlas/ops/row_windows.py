"""Window tensors: every row of windows of an image once, its columns one behind another, and products with them.

Lu, Chu, Guo, Liu: "Im2win: An Efficient Convolution Paradigm on GPU", Euro-Par 2023, arXiv 2306.14316, section 3. For
row i of the output the window tensor holds the band of rows of the image that its windows see, column by column, so
that every window is one contiguous slice, and neighbouring windows overlap in memory.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Geometry", "im2win", "im2win_filter", "padded", "window_gradients", "window_product", "window_rows"]

Pair = tuple[int, int]
#: Stride and dilation, along the height and the width.
Geometry = tuple[Pair, Pair]


def _pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def padded(x: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
    """x with zeros around it: left, right, above, below."""
    return F.pad(x, padding) if any(padding) else x


def im2win(
    x: Tensor,
    kernel_size: int | Pair,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    layout: Literal["nchw", "nhwc"] = "nchw",
) -> Tensor:
    """The window tensor: I^[n, c, i, w, h] = I[n, c, stride i + dilation h, w], of the image padded with zeros.

    The window of output (i, j) is the slice of kernel width times kernel height values (and times the channels, in the
    layout ``nhwc``) that begins at column stride j; with a dilation, its columns are that far apart.

    Args:
        x: images (B, C, H, W).
        kernel_size, stride, padding, dilation: one number, or two for height and width.
        layout: ``nchw`` gives (B, C, H', W, K), ``nhwc`` (B, H', W, K, C), with K the kernel's height.

    Raises:
        ValueError: x is not (B, C, H, W), a number is out of range, or the kernel is larger than the padded image.
    """
    if layout not in ("nchw", "nhwc"):
        raise ValueError(f"layout must be 'nchw' or 'nhwc', got {layout!r}")
    kernel, strides, pads, dilations = (_pair(value) for value in (kernel_size, stride, padding, dilation))
    if min(*kernel, *strides, *dilations) < 1 or min(pads) < 0:
        raise ValueError(
            f"kernel_size, stride and dilation must be at least 1, padding 0, got {kernel}, {strides}, {dilations} and "
            f"{pads}"
        )
    if x.dim() != 4:
        raise ValueError(f"x must be (B, C, H, W), got {tuple(x.shape)}")
    reach = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True))
    size = tuple(side + 2 * pad for side, pad in zip(x.shape[2:], pads, strict=True))
    if reach[0] > size[0] or reach[1] > size[1]:
        raise ValueError(f"kernel size {reach} can't be greater than padded input {size}")
    x = padded(x, (pads[1], pads[1], pads[0], pads[0]))
    windows = _bands(x, kernel[0], strides[0], dilations[0])
    return (windows if layout == "nchw" else windows.permute(0, 2, 3, 4, 1)).contiguous()


def im2win_filter(weight: Tensor, layout: Literal["nchw", "nhwc"] = "nchw") -> Tensor:
    """The filters in the order of a window: F^[o, c, w, h] = F[o, c, h, w], or (o, w, h, c) with ``nhwc``.

    Args:
        weight: (O, C, K, L).
        layout: ``nchw`` gives (O, C, L, K), ``nhwc`` (O, L, K, C).
    """
    if weight.dim() != 4 or layout not in ("nchw", "nhwc"):
        raise ValueError(f"weight must be (O, C, K, L), layout 'nchw' or 'nhwc', got {tuple(weight.shape)}, {layout!r}")
    return weight.permute((0, 1, 3, 2) if layout == "nchw" else (0, 3, 2, 1)).contiguous()


def _bands(x: Tensor, taps: int, stride: int, dilation: int) -> Tensor:
    """View (B, C, H', W, K) of the bands of rows that the rows of the output see."""
    return x.unfold(2, dilation * (taps - 1) + 1, stride)[..., ::dilation]


def window_rows(x: Tensor, taps: int, stride: int, dilation: int) -> Tensor:
    """The window tensor of a padded image in the layout ``nhwc``, its rows as matrices (B H', W, K C)."""
    windows = _bands(x, taps, stride, dilation).permute(0, 2, 3, 4, 1)
    return windows.contiguous().view(x.shape[0] * windows.shape[1], x.shape[3], taps * x.shape[1])


def _column(rows: Tensor, tap: int, width: int, stride: int, dilation: int) -> Tensor:
    """View of what column ``tap`` of the kernel sees in every window, (rows, width, K C)."""
    start = dilation * tap
    return rows[:, start : start + stride * (width - 1) + 1 : stride]


def window_product(rows: Tensor, weight: Tensor, width: int, geometry: Geometry) -> Tensor:
    """Windows times filters, one matrix product for each column of the kernel.

    A single one over whole windows would need rows that overlap in memory, which no library of matrix products takes.

    Args:
        rows: as `window_rows` gives them.
        weight: (O, C, K, L).
        width: of the output.
        geometry: of the convolution.

    Returns:
        (B H', width, O).
    """
    (_, stride), (_, dilation) = geometry
    filters = weight.permute(3, 2, 1, 0).flatten(1, 2)
    y: Tensor | None = None
    for tap, column in enumerate(filters.unbind(0)):
        seen = _column(rows, tap, width, stride, dilation)
        matrices = column.expand(rows.shape[0], -1, -1)
        y = torch.bmm(seen, matrices) if y is None else y.baddbmm_(seen, matrices)
    return rows.new_zeros(rows.shape[0], width, weight.shape[0]) if y is None else y


def window_gradients(
    x: Tensor,
    weight: Tensor,
    g: Tensor,
    padding: tuple[int, int, int, int],
    geometry: Geometry,
    groups: int,
    needs: tuple[bool, bool],
    rows: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a convolution by its image and its filters, by way of the window tensor.

    dF^[o, (h, c), w] sums dy times what column w saw; dI^ sums dy times F^, and its bands are added back into the rows.

    Args:
        x: image (B, C, H, W), without the zeros around it.
        weight: (O, C / groups, K, L).
        g: gradient (B, O, H', W') of the output.
        padding: left, right, above, below.
        geometry, groups: of the convolution.
        needs: which of the two to compute.
        rows: the window tensor of `window_rows`, of one group, where it was kept; else it is built again.
    """
    wide = padded(x, padding)
    parts = [
        _group_gradients(a, b, c, geometry, needs, rows)
        for a, b, c in zip(wide.chunk(groups, 1), weight.chunk(groups, 0), g.chunk(groups, 1), strict=True)
    ]
    dx = dw = None
    if needs[0]:
        left, _, above, _ = padding
        dx = torch.cat([part[0] for part in parts if part[0] is not None], dim=1)
        dx = dx[:, :, above : above + x.shape[2], left : left + x.shape[3]]
    if needs[1]:
        dw = torch.cat([part[1] for part in parts if part[1] is not None])
    return dx, dw


def _group_gradients(
    x: Tensor, weight: Tensor, g: Tensor, geometry: Geometry, needs: tuple[bool, bool], rows: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    (stride, step), (dilation, spread) = geometry
    batch, channels = x.shape[:2]
    taps, columns = weight.shape[2:]
    height, width = g.shape[2:]
    gradient = g.permute(0, 2, 3, 1).flatten(0, 1)
    dx = dw = None
    if needs[1]:
        rows = window_rows(x, taps, stride, dilation) if rows is None else rows
        sums = [
            torch.addbmm(
                gradient.new_zeros(weight.shape[0], taps * channels),
                gradient.transpose(1, 2),
                _column(rows, tap, width, step, spread),
            )
            for tap in range(columns)
        ]
        dw = torch.stack(sums, dim=1).unflatten(2, (taps, channels)).permute(0, 3, 2, 1)
    if needs[0]:
        filters = weight.permute(3, 0, 2, 1).flatten(2, 3)
        back = g.new_zeros(batch * height, x.shape[3], taps * channels)
        for tap, column in enumerate(filters.unbind(0)):
            _column(back, tap, width, step, spread).baddbmm_(gradient, column.expand(len(gradient), -1, -1))
        bands = back.view(batch, height, x.shape[3], taps, channels).permute(0, 4, 1, 2, 3)
        dx = torch.zeros_like(x, memory_format=torch.contiguous_format)
        for tap in range(taps):
            _rows(dx, tap, height, stride, dilation).add_(bands[..., tap])
    return dx, dw


def _rows(x: Tensor, tap: int, height: int, stride: int, dilation: int) -> Tensor:
    start = dilation * tap
    return x[:, :, start : start + stride * (height - 1) + 1 : stride]
