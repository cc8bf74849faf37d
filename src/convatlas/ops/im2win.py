"""Two-dimensional convolution by window tensors: less scratch memory than im2col, the same products.

Lu, Chu, Guo, Liu: "Im2win: An Efficient Convolution Paradigm on GPU", Euro-Par 2023, arXiv 2306.14316; "Im2win: Memory
Efficient Convolution On SIMD Architectures", HPEC 2022, arXiv 2306.14320; the layouts: "High Performance Im2win and
Direct Convolutions using Three Tensor Layouts on SIMD Architectures", 2024, arXiv 2408.00278. The papers know neither
padding nor dilation nor groups; here they are those of `torch.nn.functional.conv2d`.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.errors import Unsupported, unknown
from convatlas.ops.backend import Backends
from convatlas.ops.precision import without_autocast
from convatlas.ops.row_windows import (
    Geometry,
    Pair,
    im2win,
    im2win_filter,
    padded,
    window_gradients,
    window_product,
    window_rows,
)

__all__ = [
    "BENCHMARK_LAYERS",
    "ConvLayer",
    "conv2d_im2win",
    "conv_memory",
    "im2col_numel",
    "im2win",
    "im2win_filter",
    "im2win_numel",
]

Padding = tuple[int, int, int, int]
#: Filters that one program of the GPU kernel computes.
_FILTERS = 128


@dataclass(frozen=True)
class ConvLayer:
    """A layer of the papers' benchmark: a square image and a square kernel, without padding.

    Attributes:
        in_channels, size: of the image.
        out_channels, kernel_size, stride: of the layer.
    """

    in_channels: int
    size: int
    out_channels: int
    kernel_size: int
    stride: int

    @property
    def out_size(self) -> int:
        """Side of the output."""
        return (self.size - self.kernel_size) // self.stride + 1

    @property
    def flops(self) -> int:
        """Floating-point operations for one image, two for each multiply-add."""
        taps = self.in_channels * self.kernel_size**2
        return 2 * self.out_channels * taps * self.out_size**2

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of one image, (1, C, H, W)."""
        return (1, self.in_channels, self.size, self.size)


#: The twelve layers of the papers, which run them with 128 images.
BENCHMARK_LAYERS: dict[str, ConvLayer] = {
    "Conv1": ConvLayer(3, 227, 96, 11, 4),
    "Conv2": ConvLayer(3, 231, 96, 11, 4),
    "Conv3": ConvLayer(3, 227, 64, 7, 2),
    "Conv4": ConvLayer(32, 224, 64, 7, 2),
    "Conv5": ConvLayer(96, 24, 256, 5, 1),
    "Conv6": ConvLayer(256, 12, 512, 3, 1),
    "Conv7": ConvLayer(3, 224, 64, 3, 1),
    "Conv8": ConvLayer(64, 112, 128, 3, 1),
    "Conv9": ConvLayer(64, 56, 64, 3, 1),
    "Conv10": ConvLayer(128, 28, 128, 3, 1),
    "Conv11": ConvLayer(256, 14, 256, 3, 1),
    "Conv12": ConvLayer(512, 7, 512, 3, 1),
}


def im2win_numel(
    shape: Sequence[int],
    kernel_size: int | Pair,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
) -> int:
    """Elements of the window tensor, B C H' W K: about kernel height over stride times those of the image.

    Args:
        shape: of the image, (B, C, H, W).
        kernel_size, stride, padding, dilation: one number, or two for height and width.
    """
    batch, channels, width, (height, _), (taps, _) = _sizes(shape, kernel_size, stride, padding, dilation)
    return batch * channels * height * width * taps


def im2col_numel(
    shape: Sequence[int],
    kernel_size: int | Pair,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
) -> int:
    """Elements of the matrix of im2col, B C K L H' W': kernel area over stride squared times those of the image.

    Args:
        shape: of the image, (B, C, H, W).
        kernel_size, stride, padding, dilation: one number, or two for height and width.
    """
    batch, channels, _, (height, width), (taps, columns) = _sizes(shape, kernel_size, stride, padding, dilation)
    return batch * channels * taps * columns * height * width


def conv_memory(
    shape: Sequence[int],
    kernel_size: int | Pair,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    *,
    algorithm: Literal["im2win", "im2col", "direct"] = "im2win",
    dtype: torch.dtype = torch.float32,
) -> int:
    """Bytes of scratch memory that a convolution takes beside its image, filters and output.

    Args:
        shape: of the image, (B, C, H, W).
        kernel_size, stride, padding, dilation: one number, or two for height and width.
        algorithm: ``im2win``, ``im2col`` or ``direct``, which takes none.
        dtype: of the image.

    Raises:
        UnknownName: there is no such algorithm.
    """
    counts = {"im2win": im2win_numel, "im2col": im2col_numel, "direct": lambda *_: 0}
    if algorithm not in counts:
        raise unknown("algorithm", algorithm, counts)
    return counts[algorithm](shape, kernel_size, stride, padding, dilation) * dtype.itemsize


def _pair(value: int | Sequence[int], name: str) -> Pair:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2:
        raise ValueError(f"{name} must be one number or two, got {value}")
    return pair[0], pair[1]


def _sizes(
    shape: Sequence[int], kernel_size: int | Pair, stride: int | Pair, padding: int | Pair, dilation: int | Pair
) -> tuple[int, int, int, Pair, Pair]:
    """Batch, channels, padded width, size of the output and kernel size."""
    if len(shape) != 4:
        raise ValueError(f"shape must be (B, C, H, W), got {tuple(shape)}")
    kernel, pads = _pair(kernel_size, "kernel_size"), _pair(padding, "padding")
    around = (pads[1], pads[1], pads[0], pads[0])
    size = _output_size(shape, kernel, around, (_pair(stride, "stride"), _pair(dilation, "dilation")))
    return shape[0], shape[1], shape[3] + 2 * pads[1], size, kernel


def _output_size(shape: Sequence[int], kernel: Pair, padding: Padding, geometry: Geometry) -> Pair:
    strides, dilations = geometry
    if min(*kernel, *strides, *dilations) < 1 or min(padding) < 0:
        raise ValueError(
            f"kernel_size, stride and dilation must be at least 1, padding 0, got {kernel}, {strides}, {dilations} and "
            f"{padding}"
        )
    sizes = (shape[2] + padding[2] + padding[3], shape[3] + padding[0] + padding[1])
    reach = tuple(dilation * (taps - 1) + 1 for taps, dilation in zip(kernel, dilations, strict=True))
    if reach[0] > sizes[0] or reach[1] > sizes[1]:
        raise ValueError(f"kernel size {reach} can't be greater than padded input {sizes}")
    return (sizes[0] - reach[0]) // strides[0] + 1, (sizes[1] - reach[1]) // strides[1] + 1


def _auto(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: Any = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    recompute: bool = True,
) -> str:
    if torch.compiler.is_compiling() or not recompute:
        return "nhwc"
    if x.device.type == "cuda" and "triton" in _backends.names:
        # Windows formed on the chip are formed again for every tile of filters.
        return "triton" if weight.shape[0] // groups <= _FILTERS else "triton_explicit"
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    if last and weight.shape[2:].numel() == 1:
        return "direct"
    # Columns of stride 1 are read where they lie, others and channels that lie last in the other layout.
    return "nhwc" if last or _pair(stride, "stride")[1] > 1 else "nchw"


_backends = Backends("conv2d_im2win", auto=_auto)


def conv2d_im2win(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair | Literal["same", "valid"] = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    recompute: bool = True,
    *,
    backend: str = "auto",
) -> Tensor:
    """What `torch.nn.functional.conv2d` computes, by way of the window tensor.

    On a CPU torch's own convolution is faster for most sizes; this one is beside im2col what the papers compare. Half
    precision is summed in float32, also under autocast.

    Args:
        x: images (B, C, H, W).
        weight: filters (O, C / groups, K, L).
        bias: (O), or None.
        stride, padding, dilation, groups: as torch takes them.
        recompute: whether the backward pass builds the window tensor again, or it is kept (``nhwc``, one group).
        backend: ``auto``; ``naive`` (every window as a slice); ``nchw`` and ``nhwc`` (a matrix product for each column
            of the kernel, the window tensor with the columns or the channels last; the output of ``nhwc`` has its
            channels last in memory); ``direct`` (a product for each tap, no window tensor); ``triton`` (windows formed
            on the chip, no window tensor) and ``triton_explicit`` (with it, the papers' algorithm), on a GPU.

    Returns:
        (B, O, H', W').

    Raises:
        ValueError: shapes, types or numbers do not fit, or the kernel is larger than the padded image.
        Unsupported: the backend cannot serve the call.
    """
    _check(x, weight, bias, stride, padding, dilation, groups)
    if backend.startswith("triton") and backend not in _backends.names:
        raise Unsupported(f"backend {backend!r} of conv2d_im2win needs the triton package")
    with without_autocast(x):
        return _backends.run(backend, x, weight, bias, stride, padding, dilation, groups, recompute)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Pair,
    padding: int | Pair | str,
    dilation: int | Pair,
    groups: int,
) -> None:
    if x.dim() != 4 or weight.dim() != 4:
        raise ValueError(
            f"x and weight must be (B, C, H, W) and (O, C / groups, K, L), got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if not x.is_floating_point() or x.dtype != weight.dtype:
        raise ValueError(f"x and weight must have one floating-point type, got {x.dtype} and {weight.dtype}")
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"groups must be at least 1 and divide the {weight.shape[0]} filters, got {groups}")
    if x.shape[1] != weight.shape[1] * groups:
        raise ValueError(
            f"x must have {weight.shape[1] * groups} channels for weight {tuple(weight.shape)} and groups {groups}, "
            f"got {x.shape[1]}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]}), got {tuple(bias.shape)}")
    _output_size(x.shape, (weight.shape[2], weight.shape[3]), *_place(weight, stride, padding, dilation))


def _place(
    weight: Tensor, stride: int | Pair, padding: int | Pair | str, dilation: int | Pair
) -> tuple[Padding, Geometry]:
    """Zeros on each side, and the geometry."""
    strides, dilations = _pair(stride, "stride"), _pair(dilation, "dilation")
    if padding == "same":
        if strides != (1, 1):
            raise ValueError(f"padding 'same' needs a stride of 1, got {strides}")
        more = [step * (taps - 1) for taps, step in zip(weight.shape[2:], dilations, strict=True)]
        return (more[1] // 2, more[1] - more[1] // 2, more[0] // 2, more[0] - more[0] // 2), (strides, dilations)
    if isinstance(padding, str) and padding != "valid":
        raise unknown("padding", padding, ("same", "valid"))
    pads = (0, 0) if isinstance(padding, str) else _pair(padding, "padding")
    return (pads[1], pads[1], pads[0], pads[0]), (strides, dilations)


@_backends.register("naive")
def _naive(x: Tensor, weight: Tensor, bias: Tensor | None, *place: Any) -> Tensor:
    *shape, groups, _ = place
    around, geometry = _place(weight, *shape)
    (taps, columns), ((stride, step), (dilation, spread)) = weight.shape[2:], geometry
    dtype = torch.promote_types(x.dtype, torch.float32)
    _, width = _output_size(x.shape, (taps, columns), around, geometry)
    windows = im2win(padded(x.to(dtype), around), (taps, columns), (stride, step), 0, (dilation, spread))
    # Where the elements of window j lie in a flat row of the window tensor.
    first = torch.arange(width, device=x.device)[:, None, None] * step * taps
    column = torch.arange(columns, device=x.device)[None, :, None] * spread * taps
    elements = (first + column + torch.arange(taps, device=x.device)).flatten(1)
    seen = windows.flatten(3)[..., elements].unflatten(1, (groups, -1))
    filters = im2win_filter(weight.to(dtype)).flatten(2).unflatten(0, (groups, -1))
    y = torch.einsum("ngcijt,goct->ngoij", seen, filters).flatten(1, 2)
    return (y if bias is None else y + bias.to(dtype)[:, None, None]).to(x.dtype)


def _last(args: tuple[Any, ...]) -> tuple[int, bool]:
    """groups and recompute of the arguments of the operator, which may be left out."""
    return args[6] if len(args) > 6 else 1, args[7] if len(args) > 7 else True


def _refuses_kept(*args: Any) -> str | None:
    _, recompute = _last(args)
    return None if recompute else "it builds no window tensor that could be kept"


def _refuses_groups(*args: Any) -> str | None:
    groups, recompute = _last(args)
    return None if recompute or groups == 1 else f"windows are kept for one group only, got {groups} groups"


@_backends.register("nchw", refuses=_refuses_kept)
def _nchw(x: Tensor, weight: Tensor, bias: Tensor | None, *place: Any) -> Tensor:
    return _convolved(_columns_last, x, weight, bias, *place)


@_backends.register("nhwc", refuses=_refuses_groups)
def _nhwc(x: Tensor, weight: Tensor, bias: Tensor | None, *place: Any) -> Tensor:
    return _convolved(_channels_last, x, weight, bias, *place)


@_backends.register("direct", refuses=_refuses_kept)
def _direct(x: Tensor, weight: Tensor, bias: Tensor | None, *place: Any) -> Tensor:
    return _convolved(_tap_by_tap, x, weight, bias, *place)


def _channels_last(x: Tensor, weight: Tensor, geometry: Geometry, size: Pair) -> tuple[Tensor, Tensor]:
    rows = window_rows(x, weight.shape[2], geometry[0][0], geometry[1][0])
    y = window_product(rows, weight, size[1], geometry)
    return y.view(x.shape[0], *size, weight.shape[0]).permute(0, 3, 1, 2), rows


def _columns_last(x: Tensor, weight: Tensor, geometry: Geometry, size: Pair) -> tuple[Tensor, Tensor]:
    """The same window tensor as (C K, H' W) for each image: column w of all windows is a shift of it by w.

    Windows across the end of a row are computed too, and cut off. With a stride, the columns are taken apart by their
    remainder, so that those of neighbouring windows are neighbours.
    """
    (stride, step), (dilation, spread) = geometry
    batch, width = x.shape[0], x.shape[3]
    taps, columns = weight.shape[2:]
    bands = x.unfold(2, dilation * (taps - 1) + 1, stride)[..., ::dilation].permute(0, 1, 4, 2, 3)
    line = -(-width // step)
    phases = {}
    for phase in sorted({spread * tap % step for tap in range(columns)}):
        part = bands[..., phase::step]
        part = F.pad(part, (0, line - part.shape[-1])) if part.shape[-1] < line else part
        phases[phase] = part.reshape(batch, weight[0, ..., 0].numel(), size[0] * line)
    count = size[0] * line - spread * (columns - 1) // step
    y = x.new_zeros(batch, weight.shape[0], size[0] * line)
    for tap, filters in enumerate(weight.flatten(1, 2).unbind(2)):
        start = spread * tap // step
        seen = phases[spread * tap % step][..., start : start + count]
        y[..., :count].baddbmm_(filters.expand(batch, -1, -1), seen)
    return y.unflatten(2, (size[0], line))[..., : size[1]], x


def _tap_by_tap(x: Tensor, weight: Tensor, geometry: Geometry, size: Pair) -> tuple[Tensor, Tensor]:
    """One product for each tap of the kernel with the image itself, channels last."""
    (stride, step), (dilation, spread) = geometry
    image = x.permute(0, 2, 3, 1).contiguous()
    y = x.new_zeros(x.shape[0], *size, weight.shape[0])
    for tap in range(weight.shape[2]):
        band = image[:, dilation * tap : dilation * tap + stride * (size[0] - 1) + 1 : stride]
        for column in range(weight.shape[3]):
            seen = band[:, :, spread * column : spread * column + step * (size[1] - 1) + 1 : step]
            filters = weight[:, :, tap, column].t().expand(size[0], -1, -1)
            for total, rows in zip(y.unbind(0), seen.unbind(0), strict=True):
                total.baddbmm_(rows, filters)
    return y.permute(0, 3, 1, 2), x


class _Windows(torch.autograd.Function):
    """Keeps image and filters, and builds the window tensor again for the backward pass unless it is to be kept."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, padding: Padding, geometry: Geometry, groups: int, form: Any, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        return _forward(x, weight, padding, geometry, groups, form, keep)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        x, weight, ctx.padding, ctx.geometry, ctx.groups, _, _ = inputs
        rows = output[1]
        if rows is not None:
            ctx.mark_non_differentiable(rows)
        ctx.save_for_backward(x, weight, rows)

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, rows = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        gradients = window_gradients(x, weight, g, ctx.padding, ctx.geometry, ctx.groups, needs, rows)
        return *gradients, None, None, None, None, None


def _forward(
    x: Tensor, weight: Tensor, padding: Padding, geometry: Geometry, groups: int, form: Any, keep: bool
) -> tuple[Tensor, Tensor | None]:
    wide = padded(x, padding)
    size = _output_size(x.shape, (weight.shape[2], weight.shape[3]), padding, geometry)
    if groups == 1:
        y, rows = form(wide, weight, geometry, size)
        return y, rows if keep else None
    parts = zip(wide.chunk(groups, 1), weight.chunk(groups, 0), strict=True)
    return torch.cat([form(a, b, geometry, size)[0] for a, b in parts], dim=1), None


def _convolved(
    form: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Pair,
    padding: Any,
    dilation: int | Pair,
    groups: int,
    recompute: bool,
) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    around, geometry = _place(weight, stride, padding, dilation)
    args = x.to(dtype), weight.to(dtype), around, geometry, groups, form, not recompute
    y, _ = _Windows.apply(*args) if torch.is_grad_enabled() else _forward(*args)  # type: ignore[no-untyped-call]
    return (y if bias is None else y + bias.to(dtype)[:, None, None]).to(x.dtype)


def _refuses_triton(*args: Any) -> str | None:
    if reason := _refuses_kept(*args):
        return reason
    device = args[0].device.type
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"x must be on a CUDA device (or TRITON_INTERPRET=1 be set to interpret it), got {device}"
    return None


if importlib.util.find_spec("triton") is not None:

    @_backends.register("triton", refuses=_refuses_triton)
    def _triton(x: Tensor, weight: Tensor, bias: Tensor | None, *place: Any) -> Tensor:
        return _on_gpu(x, weight, bias, *place, explicit=False)

    @_backends.register("triton_explicit", refuses=_refuses_triton)
    def _triton_explicit(x: Tensor, weight: Tensor, bias: Tensor | None, *place: Any) -> Tensor:
        return _on_gpu(x, weight, bias, *place, explicit=True)

    def _on_gpu(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: int | Pair,
        padding: Any,
        dilation: int | Pair,
        groups: int,
        recompute: bool,
        *,
        explicit: bool,
    ) -> Tensor:
        # Imported where it runs, so that nothing depends on the package.
        from convatlas.ops.kernels.im2win import window_conv

        around, (strides, dilations) = _place(weight, stride, padding, dilation)
        y: Tensor = window_conv(x, weight, list(around), list(strides), list(dilations), groups, explicit)
        return y if bias is None else y + bias[:, None, None]
