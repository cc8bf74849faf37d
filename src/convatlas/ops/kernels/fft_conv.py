"""FFT convolution as matrix products: the Monarch decomposition in Triton kernels.

Fu, Kumbong, Nguyen, Re: "FlashFFTConv: Efficient Convolutions for Long Sequences with Tensor Cores", ICLR 2024,
arXiv 2311.05908, section 3.1. One kernel transforms, multiplies and transforms back, by order 2 to 4096 points and by
order 3 to 8192. Longer signals are cut by an outer transform into rows of that length, which the same kernel convolves
as the real and imaginary parts that they are. Checked through Triton's interpreter only; not timed on a GPU.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from convatlas.ops.fourier import work_type
from convatlas.ops.monarch import permute_kernel_spectrum, roots, unpermute_kernel_spectrum

__all__ = ["monarch_conv", "monarch_conv_gradients"]

#: A matrix product on a GPU sums over at least 16.
_LEAST = 16

#: Longest transform of one program, longest by order 2, longest of an outer transform.
_FUSED, _ORDER_2, _OUTER = 8192, 4096, 128
#: Bytes that the rows of an outer transform may take; channels beyond wait.
_WORKSPACE = 2**28
#: Programs that keep a GPU busy; with more, each takes several pairs of samples.
_PROGRAMS = 1024

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
    def _load(planes, at, size: tl.constexpr):  # type: ignore[no-untyped-def]
        # All real parts of a table come first, then all imaginary ones.
        return tl.load(planes + at), tl.load(planes + size + at)

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _exchange(x, a: tl.constexpr, b: tl.constexpr, c: tl.constexpr):  # type: ignore[no-untyped-def]
        # (a, b * c) -> (b, a * c)
        return tl.reshape(tl.permute(tl.reshape(x, (a, b, c)), (1, 0, 2)), (b, a * c))

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _load_pair(  # type: ignore[no-untyped-def]
        x, gate, sample, batch, channel, channels, length, at, gated: tl.constexpr, dtype: tl.constexpr,
    ):  # fmt: skip
        # Two samples are the real and the imaginary part of one signal: the kernel is real, so they never mix.
        first = (sample * channels + channel) * length + at
        second = ((sample + 1) * channels + channel) * length + at
        has_first = (at < length) & (sample < batch)
        has_second = (at < length) & (sample + 1 < batch)
        re = tl.load(x + first, mask=has_first, other=0).to(dtype)
        im = tl.load(x + second, mask=has_second, other=0).to(dtype)
        if gated:
            re *= tl.load(gate + first, mask=has_first, other=0).to(dtype)
            im *= tl.load(gate + second, mask=has_second, other=0).to(dtype)
        return re, im

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _store_pair(  # type: ignore[no-untyped-def]
        y, re, im, gate, sample, batch, channel, channels, length, at, gated: tl.constexpr, dtype: tl.constexpr,
    ):  # fmt: skip
        first = (sample * channels + channel) * length + at
        second = ((sample + 1) * channels + channel) * length + at
        has_first = (at < length) & (sample < batch)
        has_second = (at < length) & (sample + 1 < batch)
        if gated:
            re *= tl.load(gate + first, mask=has_first, other=0).to(dtype)
            im *= tl.load(gate + second, mask=has_second, other=0).to(dtype)
        tl.store(y + first, re.to(y.dtype.element_ty), mask=has_first)
        tl.store(y + second, im.to(y.dtype.element_ty), mask=has_second)

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _forward(  # type: ignore[no-untyped-def]
        re, im, tables, a: tl.constexpr, b: tl.constexpr, c: tl.constexpr, rows: tl.constexpr, precision: tl.constexpr,
    ):  # fmt: skip
        # The first rows of a signal (a, b * c), the others zero, to its spectrum (b * a, c).
        matrices: tl.constexpr = a * a + b * b + c * c
        size: tl.constexpr = matrices + a * b * c + b * c
        i_a, i_c, i_m = tl.arange(0, a), tl.arange(0, c), tl.arange(0, b * c)
        f_re, f_im = _load(tables, i_a[:, None] * a + tl.arange(0, rows)[None, :], size)
        re, im = _matmul(f_re, f_im, re, im, precision)
        w_re, w_im = _load(tables + matrices, i_a[:, None] * (b * c) + i_m[None, :], size)
        re, im = _times(re, im, w_re, w_im)
        if b > 1:
            i_b, i_ac = tl.arange(0, b), tl.arange(0, a * c)
            f_re, f_im = _load(tables + a * a, i_b[:, None] * b + i_b[None, :], size)
            re, im = _matmul(f_re, f_im, _exchange(re, a, b, c), _exchange(im, a, b, c), precision)
            w_re, w_im = _load(tables + matrices + a * b * c, i_b[:, None] * c + (i_ac % c)[None, :], size)
            re, im = _times(re, im, w_re, w_im)
            re, im = tl.reshape(re, (b * a, c)), tl.reshape(im, (b * a, c))
        f_re, f_im = _load(tables + a * a + b * b, i_c[:, None] * c + i_c[None, :], size)
        return _matmul(re, im, f_re, f_im, precision)

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _inverse(  # type: ignore[no-untyped-def]
        re, im, tables, a: tl.constexpr, b: tl.constexpr, c: tl.constexpr, rows: tl.constexpr, precision: tl.constexpr,
    ):  # fmt: skip
        # A spectrum (b * a, c) to the first rows of n times its signal.
        matrices: tl.constexpr = a * a + b * b + c * c
        size: tl.constexpr = matrices + a * b * c + b * c
        i_a, i_c, i_m = tl.arange(0, a), tl.arange(0, c), tl.arange(0, b * c)
        f_re, f_im = _load(tables + a * a + b * b, i_c[:, None] * c + i_c[None, :], size)
        re, im = _matmul(re, im, f_re, -f_im, precision)
        if b > 1:
            i_b, i_ac = tl.arange(0, b), tl.arange(0, a * c)
            w_re, w_im = _load(tables + matrices + a * b * c, i_b[:, None] * c + (i_ac % c)[None, :], size)
            re, im = _times(tl.reshape(re, (b, a * c)), tl.reshape(im, (b, a * c)), w_re, -w_im)
            f_re, f_im = _load(tables + a * a, i_b[:, None] * b + i_b[None, :], size)
            re, im = _matmul(f_re, -f_im, re, im, precision)
            re, im = _exchange(re, b, a, c), _exchange(im, b, a, c)
        w_re, w_im = _load(tables + matrices, i_a[:, None] * (b * c) + i_m[None, :], size)
        re, im = _times(re, im, w_re, -w_im)
        f_re, f_im = _load(tables, tl.arange(0, rows)[:, None] * a + i_a[None, :], size)
        return _matmul(f_re, -f_im, re, im, precision)

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _convolve_kernel(  # type: ignore[no-untyped-def]
        u, pregate, postgate, y, spectrum, tables, batch, channels, length, pairs,
        a: tl.constexpr, b: tl.constexpr, c: tl.constexpr, rows: tl.constexpr, gated: tl.constexpr,
        precision: tl.constexpr,
    ):  # fmt: skip
        # One program convolves one channel of several pairs of samples.
        channel = tl.program_id(0).to(tl.int64)
        dtype = tables.dtype.element_ty
        at = tl.arange(0, rows)[:, None] * (b * c) + tl.arange(0, b * c)[None, :]
        place = tl.arange(0, b * a)[:, None] * c + tl.arange(0, c)[None, :]
        k_re, k_im = _load(spectrum + channel * (2 * a * b * c), place, a * b * c)
        for pair in range(pairs):
            sample = 2 * (tl.program_id(1).to(tl.int64) * pairs + pair)
            re, im = _load_pair(u, pregate, sample, batch, channel, channels, length, at, gated, dtype)
            re, im = _forward(re, im, tables, a, b, c, rows, precision)
            re, im = _times(re, im, k_re, k_im)
            re, im = _inverse(re, im, tables, a, b, c, rows, precision)
            _store_pair(y, re, im, postgate, sample, batch, channel, channels, length, at, gated, dtype)

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _correlate_kernel(  # type: ignore[no-untyped-def]
        u, pregate, g, postgate, total, tables, batch, channels, length, pairs,
        a: tl.constexpr, b: tl.constexpr, c: tl.constexpr, rows: tl.constexpr, gated: tl.constexpr,
        precision: tl.constexpr,
    ):  # fmt: skip
        # The sum over several pairs of samples of the spectrum of g times the conjugate of that of u.
        channel = tl.program_id(0).to(tl.int64)
        dtype = tables.dtype.element_ty
        at = tl.arange(0, rows)[:, None] * (b * c) + tl.arange(0, b * c)[None, :]
        sum_re, sum_im = tl.zeros((b * a, c), dtype=dtype), tl.zeros((b * a, c), dtype=dtype)
        for pair in range(pairs):
            sample = 2 * (tl.program_id(1).to(tl.int64) * pairs + pair)
            u_re, u_im = _load_pair(u, pregate, sample, batch, channel, channels, length, at, gated, dtype)
            g_re, g_im = _load_pair(g, postgate, sample, batch, channel, channels, length, at, gated, dtype)
            u_re, u_im = _forward(u_re, u_im, tables, a, b, c, rows, precision)
            g_re, g_im = _forward(g_re, g_im, tables, a, b, c, rows, precision)
            re, im = _times(g_re, g_im, u_re, -u_im)
            sum_re += re
            sum_im += im
        place = tl.arange(0, b * a)[:, None] * c + tl.arange(0, c)[None, :]
        place += (tl.program_id(1).to(tl.int64) * channels + channel) * (2 * a * b * c)
        tl.store(total + place, sum_re)
        tl.store(total + a * b * c + place, sum_im)

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _outer_kernel(  # type: ignore[no-untyped-def]
        x, gate, z, tables, batch, channels, first, length, columns,
        d: tl.constexpr, rows: tl.constexpr, block: tl.constexpr, gated: tl.constexpr, back: tl.constexpr,
        precision: tl.constexpr,
    ):  # fmt: skip
        # One program transforms some columns of the signal x as (d, columns) of one channel and pair of samples to rows
        # of z, or transforms rows of z back.
        channel = tl.program_id(0).to(tl.int64) + first
        sample = 2 * tl.program_id(1).to(tl.int64)
        dtype = tables.dtype.element_ty
        size = d * d + d * columns
        i_d, i_rows = tl.arange(0, d), tl.arange(0, rows)
        column = tl.program_id(2) * block + tl.arange(0, block)
        at = i_rows[:, None] * columns + column[None, :]
        twiddle = d * d + i_d[:, None] * columns + column[None, :]
        w_re, w_im = tl.load(tables + twiddle), tl.load(tables + size + twiddle)
        row = (tl.program_id(0).to(tl.int64) * d + i_d[:, None]) * columns + column[None, :]
        real = z + sample * tl.num_programs(0) * d * columns + row
        imaginary = z + (sample + 1) * tl.num_programs(0) * d * columns + row
        if back:
            re, im = _times(tl.load(real).to(dtype), tl.load(imaginary).to(dtype), w_re, -w_im)
            matrix = i_rows[:, None] * d + i_d[None, :]
            f_re, f_im = tl.load(tables + matrix), tl.load(tables + size + matrix)
            re, im = _matmul(f_re, -f_im, re, im, precision)
            _store_pair(x, re, im, gate, sample, batch, channel, channels, length, at, gated, dtype)
        else:
            re, im = _load_pair(x, gate, sample, batch, channel, channels, length, at, gated, dtype)
            matrix = i_d[:, None] * d + i_rows[None, :]
            f_re, f_im = tl.load(tables + matrix), tl.load(tables + size + matrix)
            re, im = _matmul(f_re, f_im, re, im, precision)
            re, im = _times(re, im, w_re / d, w_im / d)  # half precision has no room for d times the signal
            tl.store(real, re.to(z.dtype.element_ty))
            tl.store(imaginary, im.to(z.dtype.element_ty))


@torch.library.custom_op("convatlas::monarch_conv", mutates_args=())
def monarch_conv(u: Tensor, k: Tensor, pregate: Tensor | None, postgate: Tensor | None, n: int) -> Tensor:
    """Gated circular convolution of period n, cropped to L.

    Args:
        u: signals (B, C, L), L <= n.
        k: kernels (C, K), K <= n.
        pregate, postgate: factors (B, C, L) before and after the convolution, or both None.
        n: a power of two, at least 256.

    Returns:
        (B, C, L) in the type of u.
    """
    u = u.contiguous()
    y = torch.empty_like(u)
    _convolve(u, _gate(pregate, u), _gate(postgate, u), y, _spectrum(u, k, n), pregate is not None)
    return y


@monarch_conv.register_fake
def _fake(u: Tensor, k: Tensor, pregate: Tensor | None, postgate: Tensor | None, n: int) -> Tensor:
    return torch.empty_like(u, memory_format=torch.contiguous_format)


@torch.library.custom_op("convatlas::monarch_conv_gradients", mutates_args=())
def monarch_conv_gradients(
    u: Tensor, k: Tensor, pregate: Tensor | None, postgate: Tensor | None, g: Tensor, n: int, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `monarch_conv` for u, k and the gates, given that of its result; empty where not needed."""
    u, g = u.contiguous(), g.contiguous()
    before, after, gated = _gate(pregate, u), _gate(postgate, u), pregate is not None
    spectrum = _spectrum(u, k, n)
    du = dk = d_pregate = d_postgate = None
    if needs[0] or needs[2]:
        x = g * after if gated else g
        dx = torch.empty_like(u)
        _convolve(x, x, x, dx, spectrum.conj().resolve_conj(), False)
        du = (dx * before if gated else dx) if needs[0] else None
        d_pregate = dx * u if needs[2] else None
    if needs[3]:
        x = u * before
        y = torch.empty_like(u)
        _convolve(x, x, x, y, spectrum, False)
        d_postgate = g * y
    if needs[1]:
        dk = torch.fft.ifft(_correlate(u, before, g, after, n, gated)).real[:, : k.shape[-1]].to(k.dtype).contiguous()
    found = (du, dk, d_pregate, d_postgate)
    du, dk, d_pregate, d_postgate = (u.new_empty(0) if gradient is None else gradient for gradient in found)
    return du, dk, d_pregate, d_postgate


@monarch_conv_gradients.register_fake
def _fake_gradients(
    u: Tensor, k: Tensor, pregate: Tensor | None, postgate: Tensor | None, g: Tensor, n: int, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def like(tensor: Tensor, needed: bool) -> Tensor:
        return torch.empty_like(tensor, memory_format=torch.contiguous_format) if needed else u.new_empty(0)

    return like(u, needs[0]), like(k, needs[1]), like(u, needs[2]), like(u, needs[3])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.n = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:4])
    gradients = monarch_conv_gradients(*ctx.saved_tensors, g, ctx.n, needs)
    return *(gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)), None


monarch_conv.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.convatlas.monarch_conv)  # type: ignore[untyped-decorator, unused-ignore]
def _flops(u_shape: Any, k_shape: Any, pregate: Any, postgate: Any, n: int, **_: Any) -> int:
    """Two for each multiply-add: eight real products of a stage, there and back, for each pair of samples."""
    batch, channels, length = u_shape
    terms, points = 0, n
    while points > _FUSED:
        d = _outer(points)
        terms += _rows(length, points // d, d)
        points = length = points // d
    a, b, c = _factors(points)
    terms += _rows(length, points // a, a) + (b if b > 1 else 0) + c
    return 2 * ((batch + 1) // 2) * channels * 8 * n * terms


# -- passes ------------------------------------------------------------------------------------------------------------


def _convolve(u: Tensor, pregate: Tensor, postgate: Tensor, y: Tensor, spectrum: Tensor, gated: bool) -> None:
    """Write the convolution of u (B, C, L) to y, given kernel spectra (C, n) over n in natural order."""
    batch, channels, length = u.shape
    n = spectrum.shape[-1]
    if n <= _FUSED:
        factors = _factors(n)
        planes = torch.view_as_real(_stored(spectrum, factors)).movedim(-1, 1).contiguous()
        tables = _tables(factors, planes.dtype, u.device)
        grid, pairs = _grid(batch, channels)
        _convolve_kernel[grid](
            u, pregate, postgate, y, planes, tables, batch, channels, length, pairs,
            **_options(factors, length, u), gated=gated,
        )  # fmt: skip
        return
    d = _outer(n)
    tables = _outer_tables(d, n // d, spectrum.real.dtype, u.device)
    for first, last in _slabs(u, n, spectrum.real.dtype):
        z = _rows_of(u, pregate, tables, first, last, d, gated)
        inner = d * spectrum[first:last].unflatten(-1, (n // d, d)).transpose(1, 2).reshape(-1, n // d)
        _convolve(z, z, z, z, inner, False)
        _outer_kernel[(last - first, z.shape[0] // 2, n // d // _block(d))](
            y, postgate, z, tables, batch, channels, first, length, n // d,
            **_outer_options(d, n // d, u), gated=gated, back=True,
        )  # fmt: skip


def _correlate(u: Tensor, pregate: Tensor, g: Tensor, postgate: Tensor, n: int, gated: bool) -> Tensor:
    """The spectra (C, n) of the correlations of g with u, both (B, C, L), summed over the batch."""
    batch, channels, length = u.shape
    dtype = work_type(u)
    if n <= _FUSED:
        factors = _factors(n)
        grid, pairs = _grid(batch, channels)
        total = torch.empty(grid[1], channels, 2, n, dtype=dtype, device=u.device)
        _correlate_kernel[grid](
            u, pregate, g, postgate, total, _tables(factors, dtype, u.device), batch, channels, length, pairs,
            **_options(factors, length, u), gated=gated,
        )  # fmt: skip
        a, b, c = factors
        permuted = torch.complex(*total.sum(0).unbind(1)).unflatten(-1, (b, a, c)).transpose(1, 2)
        return unpermute_kernel_spectrum(permuted, factors)
    d = _outer(n)
    tables = _outer_tables(d, n // d, dtype, u.device)
    spectra = []
    for first, last in _slabs(u, n, dtype):
        z_u = _rows_of(u, pregate, tables, first, last, d, gated)
        z_g = _rows_of(g, postgate, tables, first, last, d, gated)
        rows = _correlate(z_u, z_u, z_g, z_g, n // d, False)
        spectra.append(d**2 * rows.unflatten(0, (-1, d)).transpose(1, 2).flatten(1))
    return torch.cat(spectra)


def _rows_of(x: Tensor, gate: Tensor, tables: Tensor, first: int, last: int, d: int, gated: bool) -> Tensor:
    """Some channels of x after the outer transform: (2 * pairs, channels * d, columns), real and imaginary in turn."""
    batch, channels, length = x.shape
    columns = tables.shape[-1] // d - d
    half = x.dtype in (torch.float16, torch.bfloat16)
    shape = 2 * ((batch + 1) // 2), (last - first) * d, columns
    z = torch.empty(shape, dtype=x.dtype if half else tables.dtype, device=x.device)
    _outer_kernel[(last - first, shape[0] // 2, columns // _block(d))](
        x, gate, z, tables, batch, channels, first, length, columns,
        **_outer_options(d, columns, x), gated=gated, back=False,
    )  # fmt: skip
    return z


# -- sizes and tables --------------------------------------------------------------------------------------------------


def _factors(n: int) -> tuple[int, int, int]:
    """The sizes (a, b, c) of the matrices of one program; b = 1 makes it of order 2."""
    if n <= _ORDER_2:
        a = 1 << (n.bit_length() - 1) // 2
        return a, 1, n // a
    return 2 * _LEAST, _LEAST, n // (2 * _LEAST**2)


def _outer(n: int) -> int:
    return min(_OUTER, max(_LEAST, n // _FUSED))


def _rows(length: int, columns: int, most: int) -> int:
    """Rows that hold samples of the signal: a power of two that a matrix product can sum over."""
    needed = -(-length // columns)
    return min(most, max(_LEAST, 1 << (needed - 1).bit_length()))


def _block(d: int) -> int:
    return _ORDER_2 // d


def _grid(batch: int, channels: int) -> tuple[tuple[int, int], int]:
    """Channels and groups of pairs of samples, and how many pairs a group has."""
    pairs = (batch + 1) // 2
    together = max(1, pairs * channels // _PROGRAMS)
    return (channels, -(-pairs // together)), together


def _precision(x: Tensor) -> str:
    return "tf32" if x.dtype in (torch.float16, torch.bfloat16) else "ieee"


def _options(factors: tuple[int, int, int], length: int, x: Tensor) -> dict[str, Any]:
    a, b, c = factors
    warps = 4 if a * b * c <= 1024 else 8 if b == 1 else 16
    return {"a": a, "b": b, "c": c, "rows": _rows(length, b * c, a), "precision": _precision(x), "num_warps": warps}


def _outer_options(d: int, columns: int, x: Tensor) -> dict[str, Any]:
    return {"d": d, "rows": _rows(x.shape[-1], columns, d), "block": _block(d), "precision": _precision(x)}


def _slabs(u: Tensor, n: int, dtype: torch.dtype) -> list[tuple[int, int]]:
    bytes_each = (u.shape[0] + 1) * n * min(u.dtype.itemsize, dtype.itemsize)
    together = max(1, _WORKSPACE // bytes_each)
    return [(first, min(first + together, u.shape[1])) for first in range(0, u.shape[1], together)]


def _gate(gate: Tensor | None, u: Tensor) -> Tensor:
    return u if gate is None else gate.contiguous()


def _spectrum(u: Tensor, k: Tensor, n: int) -> Tensor:
    """The kernels' spectra (C, n) over n, so that the inverse needs no division."""
    return torch.fft.fft(k.to(work_type(u, k)), n) / n


def _stored(spectrum: Tensor, factors: tuple[int, int, int]) -> Tensor:
    """Spectra (C, n) in the order (b, a, c) in which the stages leave those of the signals."""
    return permute_kernel_spectrum(spectrum, factors).transpose(1, 2).flatten(1)


@lru_cache(maxsize=32)
def _tables(factors: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    a, b, c = factors
    parts = roots(a, a, a), roots(b, b, b), roots(c, c, c), roots(a, b * c, a * b * c), roots(b, c, b * c)
    return _planes(parts, dtype, device)


@lru_cache(maxsize=8)
def _outer_tables(d: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _planes((roots(d, d, d), roots(d, columns, d * columns)), dtype, device)


def _planes(parts: tuple[Tensor, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    joined = torch.cat([part.flatten() for part in parts])
    return torch.stack([joined.real, joined.imag]).to(device, dtype)
