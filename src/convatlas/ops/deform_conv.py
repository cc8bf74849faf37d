"""Deformable convolution: every tap of the kernel reads at a position of its own, between the pixels.

Dai, Qi, Xiong, Li, Zhang, Hu, Wei: "Deformable Convolutional Networks", ICCV 2017, arXiv 1703.06211, equations 2 to 4;
Zhu, Hu, Lin, Dai: "Deformable ConvNets v2: More Deformable, Better Results", CVPR 2019, arXiv 1811.11168, equation 1.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from convatlas.errors import Unsupported
from convatlas.ops.backend import Backends
from convatlas.ops.bilinear import bilinear_corners, index_type, weighted_rows

__all__ = ["deform_conv2d", "deform_output_size"]

_Pair = tuple[int, int]


def _auto(x: Tensor, *_: object) -> str:
    if torch.compiler.is_exporting():
        return "naive"  # plain gathers, which every runtime knows
    on_gpu = x.device.type == "cuda" and not torch.compiler.is_compiling()
    return "triton" if on_gpu and "triton" in _backends.names else "rows"


_backends = Backends("deform_conv2d", auto=_auto)


def deform_conv2d(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | _Pair = 1,
    padding: int | _Pair = 0,
    dilation: int | _Pair = 1,
    mask: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """y(p) = sum over taps k of w_k m_k(p) x(stride p - padding + dilation k + offset_k(p)), bilinear, zero outside.

    Arguments, order of the channels and numbers are those of torchvision and mmcv. Each of the four pixels around a
    position counts only if it lies inside. On the centre of a pixel, as with all offsets zero, the derivative by the
    offset is the one to the right and down. Half precision is interpolated in float32. There are first derivatives;
    ``naive`` has all of them.

    Args:
        x: input (B, C, H, W).
        offset: in pixels, (B, offset_groups * 2 * kh * kw, h, w): for each group of channels and each tap, in rows,
            first down and then right. The number of groups follows from the shape.
        weight: (O, C / groups, kh, kw).
        bias: (O,) or None.
        stride, padding, dilation: in pixels, for both axes or each.
        mask: m (B, offset_groups * kh * kw, h, w), as in the second version, or None for ones.
        backend: ``auto``; ``naive`` (patches of four gathers); ``rows`` (the taps of all positions as weighted sums of
            pixels, in one fused gather, and a matrix product); ``triton`` (sampling within the product, on a GPU).

    Returns:
        (B, O, h, w) in the type of x.

    Raises:
        ValueError: shapes do not fit.
    """
    geometry = _checked(x, offset, weight, bias, stride, padding, dilation, mask)
    if backend == "triton" and backend not in _backends.names:
        raise Unsupported("backend 'triton' of deform_conv2d needs the triton package")
    y = _backends.run(backend, x, offset, weight, *geometry, mask)
    return y if bias is None else y + bias[:, None, None].to(y.dtype)


def deform_output_size(
    size: tuple[int, int], kernel_size: _Pair, stride: _Pair, padding: _Pair, dilation: _Pair
) -> tuple[int, int]:
    """Height and width of the result, which offsets must have."""
    height, width = (
        (side + 2 * around - step * (taps - 1) - 1) // jump + 1
        for side, taps, jump, around, step in zip(size, kernel_size, stride, padding, dilation, strict=True)
    )
    return height, width


def _checked(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | _Pair,
    padding: int | _Pair,
    dilation: int | _Pair,
    mask: Tensor | None,
) -> tuple[_Pair, _Pair, _Pair]:
    """Stride, padding and dilation of each axis, if everything fits."""
    if x.dim() != 4 or weight.dim() != 4 or offset.dim() != 4:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (x, offset, weight))
        raise ValueError(
            f"x, offset and weight must be (B, C, H, W), (B, 2n, h, w) and (O, C / groups, kh, kw), got {shapes}"
        )
    channels, (outputs, inner, *kernel_size) = x.shape[1], weight.shape
    if not inner or channels % inner or outputs % (channels // inner):
        raise ValueError(
            f"weight must be (O, C / groups, kh, kw) for C = {channels} and a number of groups that divides both, "
            f"got {tuple(weight.shape)}"
        )
    places = [(value, value) if isinstance(value, int) else value for value in (stride, padding, dilation)]
    (down, right), around, step = places
    if min(down, right, *step) < 1 or min(around) < 0:
        raise ValueError(f"stride and dilation must be at least 1, padding 0, got {stride}, {dilation}, {padding}")
    size = deform_output_size((x.shape[2], x.shape[3]), (kernel_size[0], kernel_size[1]), *places)
    taps = kernel_size[0] * kernel_size[1]
    groups = offset.shape[1] // (2 * taps)
    if not groups or offset.shape[1] != 2 * taps * groups or channels % groups:
        raise ValueError(
            f"offset must have 2 * {taps} channels for each of a number of groups that divides {channels}, "
            f"got {offset.shape[1]}"
        )
    if offset.shape[0] != x.shape[0] or tuple(offset.shape[2:]) != size:
        raise ValueError(f"offset must be ({x.shape[0]}, n, {size[0]}, {size[1]}), got {tuple(offset.shape)}")
    if mask is not None and mask.shape != (x.shape[0], groups * taps, *size):
        raise ValueError(f"mask must be {(x.shape[0], groups * taps, *size)}, got {tuple(mask.shape)}")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias must be ({outputs},), got {tuple(bias.shape)}")
    return places[0], places[1], places[2]


def _parted(
    offset: Tensor, kernel_size: tuple[int, ...], stride: _Pair, padding: _Pair, dilation: _Pair, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Positions (B, groups, taps, h, w) in pixels, down and right."""
    taps_down, taps_right = kernel_size
    moved = offset.to(dtype).unflatten(1, (-1, taps_down * taps_right, 2))
    height, width = offset.shape[2:]
    tap = torch.arange(taps_down * taps_right, device=offset.device)[:, None, None]
    rows = torch.arange(height, device=offset.device)[:, None] * stride[0] - padding[0]
    columns = torch.arange(width, device=offset.device) * stride[1] - padding[1]
    y = rows + tap // taps_right * dilation[0]
    x = columns + tap % taps_right * dilation[1]
    return y + moved[:, :, :, 0], x + moved[:, :, :, 1]


@_backends.register("naive")
def _naive(
    x: Tensor, offset: Tensor, weight: Tensor, stride: _Pair, padding: _Pair, dilation: _Pair, mask: Tensor | None
) -> Tensor:
    batch, channels, height, width = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    down, right = _parted(offset, tuple(weight.shape[2:]), stride, padding, dilation, dtype)
    offset_groups, taps, *size = down.shape[1:]
    maps = x.to(dtype).reshape(batch, offset_groups, channels // offset_groups, height * width)
    patches = _interpolated(maps, down.flatten(2), right.flatten(2), height, width)
    if mask is not None:
        patches = patches * mask.to(dtype).reshape(batch, offset_groups, 1, -1)
    inner = weight.shape[1]
    kernel = weight.flatten(2).unflatten(0, (channels // inner, -1)).to(dtype)
    patches = patches.reshape(batch, channels // inner, inner, taps, size[0] * size[1])
    y = torch.einsum("gock,bgckp->bgop", kernel, patches)
    return y.reshape(batch, weight.shape[0], *size).to(x.dtype)


def _interpolated(maps: Tensor, y: Tensor, x: Tensor, height: int, width: int) -> Tensor:
    """G(q, p) = max(0, 1 - |q_y - p_y|) max(0, 1 - |q_x - p_x|) summed over the pixels q, of which four count."""
    total = maps.new_zeros(())
    for row in (y.detach().floor(), y.detach().floor() + 1):
        for column in (x.detach().floor(), x.detach().floor() + 1):
            # |q - p|, whose derivative on a pixel's centre is that to the right.
            away = torch.where(row > y, row - y, y - row), torch.where(column > x, column - x, x - column)
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            pixel = torch.where(inside, row, 0.0).long() * width + torch.where(inside, column, 0.0).long()
            values = maps.gather(3, pixel[:, :, None].expand(-1, -1, maps.shape[2], -1))
            total = total + values * ((1 - away[0]) * (1 - away[1]) * inside)[:, :, None]
    return total


@_backends.register("rows")
def _rows(
    x: Tensor, offset: Tensor, weight: Tensor, stride: _Pair, padding: _Pair, dilation: _Pair, mask: Tensor | None
) -> Tensor:
    batch, channels, height, width = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    down, right = (
        part.permute(0, 3, 4, 2, 1)
        for part in _parted(offset, tuple(weight.shape[2:]), stride, padding, dilation, dtype)
    )
    rows, columns, taps, offset_groups = down.shape[1:]
    indices, shares = bilinear_corners(down, right, height, width)
    if mask is not None:
        shares = shares * mask.unflatten(1, (offset_groups, taps)).permute(0, 3, 4, 2, 1).to(dtype)[..., None]
    # Rows of the table: sample, pixel, group of channels.
    table = x.permute(0, 2, 3, 1).reshape(batch * height * width * offset_groups, channels // offset_groups)
    kind = index_type(table.shape[0])
    sample = torch.arange(batch, device=x.device, dtype=kind).view(-1, 1, 1, 1, 1, 1)
    group = torch.arange(offset_groups, device=x.device, dtype=kind).view(-1, 1)
    indices = (sample * (height * width) + indices) * offset_groups + group
    patches = weighted_rows(table.to(dtype), indices.reshape(-1, 4), shares.reshape(-1, 4)).to(x.dtype)
    positions, outputs, inner = batch * rows * columns, weight.shape[0], weight.shape[1]
    kernel = weight.to(x.dtype).permute(2, 3, 1, 0)
    if inner == channels:
        y = patches.view(positions, taps * channels) @ kernel.reshape(-1, outputs)
    else:
        groups = channels // inner
        parted = (
            patches.view(positions, taps, groups, inner).permute(2, 0, 1, 3).reshape(groups, positions, taps * inner)
        )
        parts = parted @ kernel.reshape(taps * inner, groups, outputs // groups).transpose(0, 1)
        y = parts.transpose(0, 1).reshape(positions, outputs)
    return y.view(batch, rows, columns, outputs).permute(0, 3, 1, 2).to(x.dtype)


def _refuses_triton(x: Tensor, *_: object) -> str | None:
    if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"x must be on a CUDA device (or TRITON_INTERPRET=1 be set to interpret it), got {x.device.type}"
    return None


if importlib.util.find_spec("triton") is not None:

    @_backends.register("triton", refuses=_refuses_triton)
    def _triton(
        x: Tensor, offset: Tensor, weight: Tensor, stride: _Pair, padding: _Pair, dilation: _Pair, mask: Tensor | None
    ) -> Tensor:
        # Imported where it runs, so that nothing depends on the package.
        from convatlas.ops.kernels.deform_conv import deform_conv

        y: Tensor = deform_conv(x, offset, weight, mask, [*stride, *padding, *dilation])
        return y
