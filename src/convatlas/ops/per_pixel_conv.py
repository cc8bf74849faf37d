"""Depthwise convolution with its own kernel at every position, the same for all samples.

Chen, He, Zhuo, Ma, Ha, Chan: "TVConv: Efficient Translation Variant Convolution for Layout-aware Visual Processing",
CVPR 2022, arXiv 2203.10489, equation 2.
"""

from __future__ import annotations

import importlib.util
import os

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.errors import Unsupported
from convatlas.ops.backend import Backends

__all__ = ["translation_variant_conv2d"]


def _auto(x: Tensor, *_: object) -> str:
    on_gpu = x.device.type == "cuda" and not torch.compiler.is_compiling()
    return "triton" if on_gpu and "triton" in _backends.names else "shifts"


_backends = Backends("translation_variant_conv2d", auto=_auto)


def translation_variant_conv2d(
    x: Tensor,
    weight_maps: Tensor,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    *,
    backend: str = "auto",
) -> Tensor:
    """y[b, c, p] = sum over taps t of V[c, t, p] x[b, c, stride p + dilation t - padding], zero outside.

    Half precision is summed in float32.

    Args:
        x: input (B, C, H, W).
        weight_maps: V (C, k, k, h, w), a kernel for each channel and position of the output.
        stride, padding, dilation: in pixels, on both axes.
        backend: ``auto``; ``naive`` (all patches at once, as the authors do); ``shifts`` (a multiply-add of the whole
            map for each tap); ``triton`` (kernels kept in registers for all samples, on a GPU).

    Returns:
        (B, C, h, w).

    Raises:
        ValueError: shapes do not fit, or the output would have another size than h x w.
    """
    if x.dim() != 4 or weight_maps.dim() != 5 or weight_maps.shape[0] != x.shape[1]:
        raise ValueError(
            f"x and weight_maps must be (B, C, H, W) and (C, k, k, h, w), got {tuple(x.shape)} and "
            f"{tuple(weight_maps.shape)}"
        )
    if stride < 1 or padding < 0 or dilation < 1:
        raise ValueError(f"stride and dilation must be at least 1, padding 0, got {stride}, {dilation}, {padding}")
    size = tuple(
        (side + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
        for side, taps in zip(x.shape[2:], weight_maps.shape[1:3], strict=True)
    )
    if size != tuple(weight_maps.shape[3:]):
        wanted, got = (" x ".join(map(str, sides)) for sides in (weight_maps.shape[3:], size))
        raise ValueError(f"weight_maps are for an output of {wanted}, got one of {got} from x {tuple(x.shape)}")
    if backend == "triton" and backend not in _backends.names:
        raise Unsupported("backend 'triton' of translation_variant_conv2d needs the triton package")
    return _backends.run(backend, x, weight_maps, stride, padding, dilation)


@_backends.register("naive")
def _naive(x: Tensor, weight_maps: Tensor, stride: int, padding: int, dilation: int) -> Tensor:
    channels, rows, columns, height, width = weight_maps.shape
    patches = F.unfold(x, (rows, columns), dilation, padding, stride).reshape(x.shape[0], channels, -1, height, width)
    return (weight_maps.flatten(1, 2).to(x.dtype) * patches).sum(2)


@_backends.register("shifts")
def _shifts(x: Tensor, weight_maps: Tensor, stride: int, padding: int, dilation: int) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide = F.pad(x.to(dtype), (padding,) * 4) if padding else x.to(dtype)
    height, width = weight_maps.shape[3:]
    y = wide.new_zeros(*x.shape[:2], height, width)
    for row in range(weight_maps.shape[1]):
        for column in range(weight_maps.shape[2]):
            rows = slice(dilation * row, dilation * row + stride * (height - 1) + 1, stride)
            columns = slice(dilation * column, dilation * column + stride * (width - 1) + 1, stride)
            y.addcmul_(wide[:, :, rows, columns], weight_maps[:, row, column].to(dtype))
    return y.to(x.dtype)


def _refuses_triton(x: Tensor, *_: object) -> str | None:
    if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"x must be on a CUDA device (or TRITON_INTERPRET=1 be set to interpret it), got {x.device.type}"
    return None


if importlib.util.find_spec("triton") is not None:

    @_backends.register("triton", refuses=_refuses_triton)
    def _triton(x: Tensor, weight_maps: Tensor, stride: int, padding: int, dilation: int) -> Tensor:
        # Imported where it runs, so that nothing depends on the package.
        from convatlas.ops.kernels.per_pixel_conv import per_pixel_conv

        y: Tensor = per_pixel_conv(x, weight_maps, stride, padding, dilation)
        return y
