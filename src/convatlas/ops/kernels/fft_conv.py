"""FFT convolution as matrix products: the Monarch decomposition of order 2 in one Triton kernel.

Fu, Kumbong, Nguyen, Re: "FlashFFTConv: Efficient Convolutions for Long Sequences with Tensor Cores", ICLR 2024,
arXiv 2311.05908, section 3.1. Checked through Triton's interpreter only; not timed on a GPU.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from convatlas.ops.fourier import gated_gradients, work_type

__all__ = ["monarch_conv"]


if importlib.util.find_spec("triton") is not None:
    import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _times(a_re, a_im, b_re, b_im):  # type: ignore[no-untyped-def]
        return a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _matmul(a_re, a_im, b_re, b_im, precision: tl.constexpr):  # type: ignore[no-untyped-def]
        re = tl.dot(a_re, b_re, input_precision=precision) - tl.dot(a_im, b_im, input_precision=precision)
        im = tl.dot(a_re, b_im, input_precision=precision) + tl.dot(a_im, b_re, input_precision=precision)
        return re, im

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _load(re, im, at):  # type: ignore[no-untyped-def]
        return tl.load(re + at), tl.load(im + at)

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _monarch_kernel(  # type: ignore[no-untyped-def]
        u, pregate, postgate, y, k_re, k_im, f1_re, f1_im, f2_re, f2_im, w_re, w_im, batch, channels, length,
        n1: tl.constexpr, n2: tl.constexpr, gated: tl.constexpr, precision: tl.constexpr,
    ):  # fmt: skip
        # One program transforms one channel of two samples, packed as the real and the imaginary part of one signal:
        # the kernel is real, so the two never mix.
        channel = tl.program_id(0).to(tl.int64)
        sample = 2 * tl.program_id(1).to(tl.int64)
        i1 = tl.arange(0, n1)
        i2 = tl.arange(0, n2)
        at = i1[:, None] * n2 + i2[None, :]
        first = (sample * channels + channel) * length + at
        second = first + channels * length
        has_first = at < length
        has_second = has_first & (sample + 1 < batch)
        dtype = k_re.dtype.element_ty

        x_re = tl.load(u + first, mask=has_first, other=0).to(dtype)
        x_im = tl.load(u + second, mask=has_second, other=0).to(dtype)
        if gated:
            x_re *= tl.load(pregate + first, mask=has_first, other=0).to(dtype)
            x_im *= tl.load(pregate + second, mask=has_second, other=0).to(dtype)

        a_re, a_im = _load(f1_re, f1_im, i1[:, None] * n1 + i1[None, :])
        b_re, b_im = _load(f2_re, f2_im, i2[:, None] * n2 + i2[None, :])
        t_re, t_im = _load(w_re, w_im, at)

        x_re, x_im = _matmul(a_re, a_im, x_re, x_im, precision)
        x_re, x_im = _times(x_re, x_im, t_re, t_im)
        x_re, x_im = _matmul(x_re, x_im, b_re, b_im, precision)
        kernel_re, kernel_im = _load(k_re, k_im, channel * n1 * n2 + at)
        x_re, x_im = _times(x_re, x_im, kernel_re, kernel_im)
        x_re, x_im = _matmul(x_re, x_im, b_re, -b_im, precision)
        x_re, x_im = _times(x_re, x_im, t_re, -t_im)
        x_re, x_im = _matmul(a_re, -a_im, x_re, x_im, precision)

        if gated:
            x_re *= tl.load(postgate + first, mask=has_first, other=0).to(dtype)
            x_im *= tl.load(postgate + second, mask=has_second, other=0).to(dtype)
        tl.store(y + first, x_re.to(y.dtype.element_ty), mask=has_first)
        tl.store(y + second, x_im.to(y.dtype.element_ty), mask=has_second)


@torch.library.custom_op("convatlas::monarch_conv", mutates_args=())
def monarch_conv(u: Tensor, k: Tensor, pregate: Tensor | None, postgate: Tensor | None, n: int) -> Tensor:
    """Gated circular convolution of period n, cropped to L.

    Args:
        u: signals (B, C, L), L <= n.
        k: kernels (C, K), K <= n.
        pregate, postgate: factors (B, C, L) before and after the convolution, or both None.
        n: a power of two from 256 to 4096.

    Returns:
        (B, C, L) in the type of u.
    """
    batch, channels, length = u.shape
    dtype = work_type(u, k)
    n1 = 1 << (n.bit_length() - 1) // 2
    n2 = n // n1
    u = u.contiguous()
    y = torch.empty_like(u)
    before = u if pregate is None else pregate.contiguous()
    after = u if postgate is None else postgate.contiguous()
    # The spectrum in the order in which the two stages leave that of the signal, with the 1 / n of the inverse.
    kernel = torch.fft.fft(k.to(dtype), n).reshape(channels, n2, n1).transpose(1, 2) / n
    f1 = _roots(n1, n1, n1, u.device)
    f2 = _roots(n2, n2, n2, u.device)
    twiddle = _roots(n1, n2, n, u.device)
    planes = [part.to(dtype).contiguous() for z in (kernel, f1, f2, twiddle) for part in (z.real, z.imag)]
    precision = "tf32" if u.dtype in (torch.float16, torch.bfloat16) else "ieee"
    _monarch_kernel[(channels, (batch + 1) // 2)](
        u, before, after, y, *planes, batch, channels, length,
        n1=n1, n2=n2, gated=pregate is not None, precision=precision,
    )  # fmt: skip
    return y


@monarch_conv.register_fake
def _fake(u: Tensor, k: Tensor, pregate: Tensor | None, postgate: Tensor | None, n: int) -> Tensor:
    return torch.empty_like(u, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.n = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    u, k, pregate, postgate = ctx.saved_tensors
    needs = ctx.needs_input_grad[:4]
    return *gated_gradients(u, k, pregate, postgate, g, (ctx.n,), False, needs), None


monarch_conv.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.convatlas.monarch_conv)  # type: ignore[untyped-decorator, unused-ignore]
def _flops(u_shape: Any, k_shape: Any, pregate: Any, postgate: Any, n: int, **_: Any) -> int:
    """Two for each multiply-add: four complex products of an n1 x n2 tile for each channel of a pair of samples."""
    batch, channels = u_shape[:2]
    n1 = 1 << (n.bit_length() - 1) // 2
    return 2 * ((batch + 1) // 2) * channels * 8 * n * (n1 + n // n1)


def _roots(rows: int, columns: int, n: int, device: torch.device) -> Tensor:
    # exp(-2 pi i r c / n), with the product reduced first so that the angle keeps all its digits.
    turns = torch.outer(torch.arange(rows, device=device), torch.arange(columns, device=device)) % n
    angles = turns.double() * (-2 * math.pi / n)
    return torch.polar(torch.ones_like(angles), angles)
