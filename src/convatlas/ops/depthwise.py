"""Depthwise convolution of any kernel size, in the memory layout in which the processor is fast.

Torch computes a depthwise convolution on a CPU by one of several kernels of oneDNN, chosen by layout and size. In the
usual layout (B, C, H, W) kernels whose row spans more than nine positions, its dilation included (13 with AVX-512),
fall to one that is an order of magnitude slower, and so does the backward pass of kernels from about five; with
channels last, or with the long side of the kernel upright, neither happens. The changes of layout cost far less than
they save. For large kernels with a dilation, zeros in the gaps of the kernel cost less than the dilation does.
A few taps far apart, as in temporal convolutional networks, are a sum of as many shifted signals.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.ops.backend import Backends

__all__ = ["depthwise_conv"]

_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
#: Longest row, in positions, that oneDNN's fast kernels for (B, C, H, W) take; it follows the vectors of the processor.
_LONGEST_ROW = 13 if _AVX512 else 9
#: Shortest kernel, in taps, whose backward pass is faster with zeros in its gaps; with AVX-512 none is.
_SHORTEST_FILLED = 7
#: Samples that few taps with a dilation may span before torch's kernels for signals leave their fast form, and most
#: taps for which a sum of shifted signals is faster then.
_LONGEST_SPAN, _MOST_SHIFTED = 9, 9
#: Shortest kernel, in positions, whose backward pass is faster with channels last.
_SHORTEST_TRAINED = 5
#: Largest kernel, over the width of the map, whose backward pass is with AVX-512; it is 3 to 10 times slower beyond.
_LARGEST_TRAINED = 1.2

_CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def _auto(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> str:
    # A captured graph must serve every size, and may run elsewhere.
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype != torch.float32 or x.dim() == 5:
        return "torch"
    trained = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if x.dim() == 3:
        taps = weight.shape[2]
        if dilation[0] > 1 and taps <= _MOST_SHIFTED and _refuses_shifted(x, weight, bias, stride) is None:
            # torch's backward pass of dilated signals is slow throughout.
            return "shifted" if trained or dilation[0] * (taps - 1) + 1 > _LONGEST_SPAN else "torch"
        return "turned" if taps > _LONGEST_ROW else "torch"
    if trained:
        return _auto_trained(x, weight, dilation)
    column, row = (gap * (taps - 1) + 1 for gap, taps in zip(dilation, weight.shape[2:], strict=True))
    if row <= _LONGEST_ROW:
        return "torch"
    if max(dilation) > 1 and column > 1:
        return "filled"
    return _auto_long(x, column)


def _auto_trained(x: Tensor, weight: Tensor, dilation: tuple[int, ...]) -> str:
    shortest = min(weight.shape[2:])
    column, row = (gap * (taps - 1) + 1 for gap, taps in zip(dilation, weight.shape[2:], strict=True))
    if column == 1:
        return _auto_long(x, column) if row > _LONGEST_ROW else "torch"
    if max(dilation) > 1 and not _AVX512:
        return "filled" if shortest >= _SHORTEST_FILLED else "torch"
    if min(column, row) < _SHORTEST_TRAINED or (_AVX512 and row > _LARGEST_TRAINED * x.shape[3]):
        return "torch"
    return _auto_long(x, column)


def _auto_long(x: Tensor, column: int) -> str:
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return "torch"
    return "turned" if column == 1 else "channels_last"


_backends = Backends("depthwise_conv", auto=_auto)


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    *,
    backend: str = "auto",
) -> Tensor:
    """Convolve each channel with kernels of its own: `torch.nn.functional.conv2d` with as many groups as channels.

    Args:
        x: input (B, C, L), (B, C, H, W) or (B, C, D, H, W).
        weight: kernels (m C, 1, *kernel_size); channel c makes the outputs m c to m c + m - 1.
        bias: (m C) or None.
        stride, padding, dilation: in positions, one number for all axes or one each; padding is with zeros.
        backend: ``auto``; ``naive`` (a sum over the taps); ``torch`` (torch's own call in the layout of x);
            ``channels_last`` (the same with channels last, for maps); ``filled`` (``channels_last`` with zeros in the
            gaps that a dilation makes, for maps); ``turned`` (torch's call with the last two axes exchanged, for
            signals and maps); ``shifted`` (a sum of shifted signals in place, for signals without stride and m = 1).

    Returns:
        (B, m C, *size) with size = floor((size + 2 padding - dilation (kernel_size - 1) - 1) / stride) + 1 on each
        axis, contiguous where x is.

    Raises:
        ValueError: shapes do not fit, or a stride, padding or dilation is out of range.
    """
    dims = x.dim() - 2
    if dims not in _CONVS:
        raise ValueError(f"x must be (B, C, L), (B, C, H, W) or (B, C, D, H, W), got {x.dim()} dimensions")
    if weight.dim() != x.dim() or weight.shape[1] != 1 or weight.shape[0] == 0 or weight.shape[0] % x.shape[1]:
        raise ValueError(
            f"weight must be (m C, 1, ...) with {dims} kernel axes and a multiple of the {x.shape[1]} channels of x, "
            f"got {tuple(weight.shape)}"
        )
    sizes = []
    for name, value, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        size = (value,) * dims if isinstance(value, int) else tuple(value)
        if len(size) != dims or min(size) < least:
            raise ValueError(f"{name} must be at least {least} on each of {dims} axes, got {value}")
        sizes.append(size)
    return _backends.run(backend, x, weight, bias, *sizes)


@_backends.register("naive")
def _naive(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:
    """y[c, p] = b[c] + sum over taps t of w[c, t] x[c, stride p + dilation t - padding], zero outside."""
    x = F.pad(x, [amount for each in reversed(padding) for amount in (each, each)])
    x = x.repeat_interleave(weight.shape[0] // x.shape[1], 1)
    taps = weight.shape[2:]
    out = [
        (size - gap * (count - 1) - 1) // step + 1
        for size, gap, count, step in zip(x.shape[2:], dilation, taps, stride, strict=True)
    ]
    y = x.new_zeros(*x.shape[:2], *out)
    for tap in itertools.product(*map(range, taps)):
        window: list[Any] = [
            slice(gap * at, gap * at + step * (count - 1) + 1, step)
            for gap, at, step, count in zip(dilation, tap, stride, out, strict=True)
        ]
        place: Any = (slice(None), 0, *tap)
        y = y + x[(..., *window)] * weight[place].reshape(-1, *[1] * len(taps))
    return y if bias is None else y + bias.reshape(-1, *[1] * len(taps))


@_backends.register("torch")
def _torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:
    return _CONVS[x.dim() - 2](x, weight, bias, stride, padding, dilation, x.shape[1])


@_backends.register(
    "channels_last", refuses=lambda x, *_: None if x.dim() == 4 else f"it takes (B, C, H, W), got {x.dim()} dimensions"
)
def _channels_last(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:
    moved = x.contiguous(memory_format=torch.channels_last)
    y = F.conv2d(moved, weight, bias, stride, padding, dilation, x.shape[1])
    return y.contiguous() if x.is_contiguous() else y


@_backends.register(
    "filled", refuses=lambda x, *_: None if x.dim() == 4 else f"it takes (B, C, H, W), got {x.dim()} dimensions"
)
def _filled(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:
    sides = [gap * (taps - 1) + 1 for gap, taps in zip(dilation, weight.shape[2:], strict=True)]
    filled = weight.new_zeros(*weight.shape[:2], *sides)
    filled[..., :: dilation[0], :: dilation[1]] = weight
    return _channels_last(x, filled, bias, stride, padding, (1, 1))


@_backends.register("turned", refuses=lambda x, *_: "it takes signals and maps, got a volume" if x.dim() == 5 else None)
def _turned(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:
    channels = x.shape[1]
    if x.dim() == 3:  # a signal upright is a map of width one: nothing moves
        sizes = (*stride, 1), (*padding, 0), (*dilation, 1)
        return F.conv2d(x.unsqueeze(-1), weight.unsqueeze(-1), bias, *sizes, channels).squeeze(-1)
    turned = x.transpose(2, 3).contiguous()
    y = F.conv2d(turned, weight.transpose(2, 3), bias, stride[::-1], padding[::-1], dilation[::-1], channels)
    return y.transpose(2, 3).contiguous()


def _refuses_shifted(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], *_: object) -> str | None:
    if x.dim() != 3:
        return f"it takes (B, C, L), got {x.dim()} dimensions"
    if stride[0] != 1 or weight.shape[0] != x.shape[1]:
        return f"it takes stride 1 and one kernel a channel, got {stride[0]} and {weight.shape[0]} for {x.shape[1]}"
    return None


@_backends.register("shifted", refuses=_refuses_shifted)
def _shifted(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:
    del stride
    if not torch.is_grad_enabled():
        return _shifted_sum(x, weight, bias, padding[0], dilation[0])
    y: Tensor = _Shifted.apply(x, weight, bias, padding[0], dilation[0])  # type: ignore[no-untyped-call]
    return y


def _seen(length: int, out: int, tap: int, padding: int, dilation: int) -> tuple[int, int, int]:
    """First and last output that a tap reaches within a signal, and what to add to get the sample that it sees."""
    offset = tap * dilation - padding
    return max(0, -offset), min(out, length - offset), offset


def _shifted_sum(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, dilation: int) -> Tensor:
    length, taps = x.shape[2], weight.shape[2]
    out = length + 2 * padding - dilation * (taps - 1)
    if out < 1:
        raise ValueError(f"the kernel spans {dilation * (taps - 1) + 1} of {length + 2 * padding} padded samples")
    seen = [_seen(length, out, tap, padding, dilation) for tap in range(taps)]
    # A tap that sees a sample everywhere makes the output; the others are added in place.
    whole = next((tap for tap, (first, last, _) in enumerate(seen) if (first, last) == (0, out)), None)
    if whole is None:
        y = x.new_zeros(*x.shape[:2], out) if bias is None else bias[:, None].expand(*x.shape[:2], out).contiguous()
    else:
        under = x[..., seen[whole][2] : seen[whole][2] + out]
        column = weight[:, :, whole]
        y = under * column if bias is None else torch.addcmul(bias[:, None], under, column)
    for tap, (first, last, offset) in enumerate(seen):
        if tap != whole and first < last:
            y[..., first:last].addcmul_(x[..., first + offset : last + offset], weight[:, :, tap])
    return y


class _Shifted(torch.autograd.Function):
    """`_shifted_sum`, with gradients that are sums of shifted signals, too."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, dilation: int) -> Tensor:
        return _shifted_sum(x, weight, bias, padding, dilation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, ctx.padding, ctx.dilation = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        padding, dilation, taps = ctx.padding, ctx.dilation, weight.shape[2]
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            # The taps in reverse; with more padding than they reach, the ends of g saw nothing of x.
            reach = dilation * (taps - 1)
            unseen = max(0, padding - reach)
            inner = g.narrow(2, unseen, g.shape[2] - 2 * unseen)
            dx = _shifted(inner, weight.flip(2), None, (1,), (max(0, reach - padding),), (dilation,))
        if ctx.needs_input_grad[1]:
            columns = []
            for tap in range(taps):
                first, last, offset = _seen(x.shape[2], g.shape[2], tap, padding, dilation)
                last = max(first, last)
                columns.append((g[..., first:last] * x[..., first + offset : last + offset]).sum((0, 2)))
            dw = torch.stack(columns, 1).unsqueeze(1)
        if ctx.needs_input_grad[2]:
            db = g.sum((0, 2))
        return dx, dw, db, None, None
