"""The Monarch decomposition: a Fourier transform as products with small matrices, of order 2, 3, 4 or any other.

Fu, Kumbong, Nguyen, Re: "FlashFFTConv: Efficient Convolutions for Long Sequences with Tensor Cores", ICLR 2024,
arXiv 2311.05908, section 3.1 and equation 2. In plain torch, with the order of operations of the kernels for GPUs:
their oracle and documentation. On a CPU `torch.fft` is several times as fast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.ops.fourier import work_type

__all__ = [
    "Machine",
    "choose_factors",
    "choose_order",
    "monarch_cost",
    "monarch_dft",
    "monarch_fft_conv",
    "monarch_idft",
    "monarch_length",
    "permute_kernel_spectrum",
    "roots",
    "unpermute_kernel_spectrum",
]

Norm = Literal["backward", "forward"]
_ORDERS = (2, 3, 4)


# -- which factors -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the cost model knows of a GPU; by default an A100 with 40 GB.

    Attributes:
        matrix_flops: operations a second of its units for matrix products, for matrices of at least ``unit`` rows.
        unit: that number of rows.
        general_flops: operations a second for smaller matrices.
        fused_points: longest transform whose intermediate results stay on the chip.
        fast_bandwidth, bandwidth: bytes a second of the memory on the chip and beside it.
    """

    matrix_flops: float = 234e12
    unit: int = 16
    general_flops: float = 17.6e12
    fused_points: int = 32768
    fast_bandwidth: float = 9.5e12
    bandwidth: float = 1.35e12


def monarch_cost(factors: Sequence[int], machine: Machine | None = None) -> float:
    """Seconds of one convolution of one channel and sample, N = N_1 ... N_p points (equation 2).

    The sum over the stages of 16 N N_i / (operations a second) + 4 N / (bytes a second).

    Args:
        factors: N_1 to N_p, the outermost first.
        machine: what it runs on; an A100 by default.
    """
    machine = machine or Machine()
    left = n = math.prod(_checked(factors))
    seconds = 0.0
    for factor in factors:
        seconds += n * _stage(factor, left, machine)
        left //= factor
    return seconds


def choose_factors(n: int, order: int | None = None, machine: Machine | None = None) -> tuple[int, ...]:
    """The cheapest factors of a transform of exactly n points.

    Any n works; the fewer divisors it has, the larger are the matrices, up to n itself when it is a prime.

    Args:
        n: number of points.
        order: number of factors; 2, 3 or 4, whichever is cheapest, when left out.
        machine: what it runs on; an A100 by default.

    Raises:
        ValueError: n or order is smaller than 1.
    """
    if n < 1 or (order is not None and order < 1):
        raise ValueError(f"n and order must be at least 1, got {n} and {order}")
    machine = machine or Machine()
    return min(_cheapest(n, each, machine) for each in ((order,) if order else _ORDERS))[1]


def choose_order(n: int, machine: Machine | None = None) -> int:
    """The cheapest order of a transform of n points: 2, 3 or 4."""
    return len(choose_factors(n, None, machine))


def monarch_length(n: int, order: int | None = None, machine: Machine | None = None) -> tuple[int, tuple[int, ...]]:
    """A length of at least n that is cheap to transform, and its factors: up to an eighth longer, or a power of two."""
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    shift = max(0, (n - 1).bit_length() - 4)
    lengths = [odd << shift for odd in range(8, 17) if odd << shift >= n] if n > 16 else [n]
    found = [choose_factors(length, order, machine) for length in lengths]
    factors = min(found, key=lambda each: monarch_cost(each, machine))
    return math.prod(factors), factors


def _stage(factor: int, points: int, machine: Machine) -> float:
    flops = machine.matrix_flops if factor >= machine.unit else machine.general_flops
    fused = points <= machine.fused_points
    return 16 * factor / flops + 4 / (machine.fast_bandwidth if fused else machine.bandwidth)


@lru_cache(maxsize=4096)
def _cheapest(n: int, order: int, machine: Machine) -> tuple[float, tuple[int, ...]]:
    if order == 1:
        return _stage(n, n, machine), (n,)
    divisors = {d for small in range(1, math.isqrt(n) + 1) if n % small == 0 for d in (small, n // small)}
    options = []
    for factor in divisors:
        seconds, inner = _cheapest(n // factor, order - 1, machine)
        options.append((_stage(factor, n, machine) + seconds, (factor, *inner)))
    return min(options)


# -- layout ------------------------------------------------------------------------------------------------------------


def permute_kernel_spectrum(k_f: Tensor, factors: Sequence[int]) -> Tensor:
    """Frequencies (..., N) in the order (..., N_1, ..., N_p) in which the stages leave those of a signal.

    The frequency i_1 + N_1 (i_2 + N_2 (i_3 + ...)) stands at [i_1, i_2, i_3, ...], so that signals never need to be
    put in order.

    Raises:
        ValueError: N is not the product of the factors.
    """
    factors = _checked(factors)
    if k_f.shape[-1] != math.prod(factors):
        raise ValueError(f"factors must multiply to the {k_f.shape[-1]} frequencies of k_f, got {factors}")
    return k_f.unflatten(-1, factors[::-1]).permute(*range(k_f.dim() - 1), *_reversed_axes(k_f.dim() - 1, factors))


def unpermute_kernel_spectrum(permuted: Tensor, factors: Sequence[int]) -> Tensor:
    """The inverse of `permute_kernel_spectrum`: (..., N_1, ..., N_p) to (..., N)."""
    factors = _checked(factors)
    if tuple(permuted.shape[-len(factors) :]) != factors:
        raise ValueError(f"permuted must be (..., {', '.join(map(str, factors))}), got {tuple(permuted.shape)}")
    before = permuted.dim() - len(factors)
    return permuted.permute(*range(before), *_reversed_axes(before, factors)).flatten(before)


def _reversed_axes(before: int, factors: tuple[int, ...]) -> range:
    return range(before + len(factors) - 1, before - 1, -1)


def _checked(factors: Sequence[int]) -> tuple[int, ...]:
    if not factors or min(factors) < 1:
        raise ValueError(f"factors must be numbers of at least 1, got {tuple(factors)}")
    return tuple(factors)


# -- transforms --------------------------------------------------------------------------------------------------------


def roots(rows: int, columns: int, n: int, device: torch.device | str | None = None) -> Tensor:
    """exp(-2 pi i r c / n) as (rows, columns) in complex128: a Fourier matrix, or the twiddle factors between two."""
    # The product is reduced first, so that the angle keeps all its digits.
    turns = torch.outer(torch.arange(rows, device=device), torch.arange(columns, device=device)) % n
    angles = turns.double() * (-2 * math.pi / n)
    return torch.polar(torch.ones_like(angles), angles)


def monarch_dft(
    x: Tensor,
    factors: Sequence[int],
    keep: Sequence[int] | None = None,
    *,
    norm: Norm = "backward",
    operand: torch.dtype | None = None,
) -> Tensor:
    """Fourier transform of signals by products with matrices of N_1 to N_p rows (section 3.1).

    X = reshape(x, N_1, M); X = (F_{N_1} X) W_{N_1, M}; then the rows of X likewise, with the other factors.

    Args:
        x: signals (..., L), L <= N; zero from L to N. Rows of X that are zero are not multiplied.
        factors: N_1 to N_p with the product N.
        keep: for each factor, how many of its frequencies are wanted; all by default. Others are not computed.
        norm: ``backward`` scales nothing, ``forward`` divides by N, before any result could grow beyond x.
        operand: type to which the factors of every product are rounded, as the kernels in half precision do.

    Returns:
        (..., N_1, ..., N_p), or what is kept of it, complex, in the order of `permute_kernel_spectrum`.

    Raises:
        ValueError: the signal is longer than N, or keep does not fit.
    """
    factors = _checked(factors)
    keep = _kept(factors, keep)
    n = math.prod(factors)
    if not 0 < x.shape[-1] <= n:
        raise ValueError(f"x must have from 1 to {n} samples, the product of factors, got {x.shape[-1]}")
    return _dft(_complex(x), factors, keep, 1 / n if norm == "forward" else 1.0, operand)


def monarch_idft(
    spectrum: Tensor,
    factors: Sequence[int],
    length: int | None = None,
    *,
    norm: Norm = "backward",
    operand: torch.dtype | None = None,
) -> Tensor:
    """The inverse of `monarch_dft`.

    Args:
        spectrum: (..., K_1, ..., K_p) with K_i <= N_i; frequencies beyond are zero and take no time.
        factors: N_1 to N_p with the product N.
        length: how many samples are wanted; all N by default. Rows without any are not computed.
        norm: ``backward`` divides by N, ``forward`` scales nothing.
        operand: as `monarch_dft` takes it.

    Returns:
        (..., length), complex.

    Raises:
        ValueError: spectrum or length does not fit the factors.
    """
    factors = _checked(factors)
    _kept(factors, spectrum.shape[-len(factors) :])
    n = math.prod(factors)
    length = n if length is None else length
    if not 0 < length <= n:
        raise ValueError(f"length must be from 1 to {n}, the product of factors, got {length}")
    signal = _idft(_complex(spectrum), factors, length, operand)
    return signal / n if norm == "backward" else signal


def _kept(factors: tuple[int, ...], keep: Sequence[int] | None) -> tuple[int, ...]:
    kept = factors if keep is None else tuple(keep)
    if len(kept) != len(factors) or not all(0 < k <= factor for k, factor in zip(kept, factors, strict=True)):
        raise ValueError(f"from 1 to all of each of the factors {factors} can be kept, got {kept}")
    return kept


def _complex(x: Tensor) -> Tensor:
    if x.is_complex():
        return x
    dtype = work_type(x)
    return torch.complex(x.to(dtype), torch.zeros_like(x, dtype=dtype))


def _dft(
    x: Tensor, factors: tuple[int, ...], keep: tuple[int, ...], scale: float, operand: torch.dtype | None
) -> Tensor:
    factor, columns = factors[0], math.prod(factors[1:])
    rows = -(-x.shape[-1] // columns)
    x = F.pad(x, (0, rows * columns - x.shape[-1])).unflatten(-1, (rows, columns))
    x = _product(roots(keep[0], rows, factor, x.device), x, operand)
    if len(factors) == 1:
        return scale * x.squeeze(-1)
    x = x * (scale * roots(keep[0], columns, factor * columns, x.device)).to(x.dtype)
    return _dft(x, factors[1:], keep[1:], 1.0, operand)


def _idft(spectrum: Tensor, factors: tuple[int, ...], length: int, operand: torch.dtype | None) -> Tensor:
    factor, columns = factors[0], math.prod(factors[1:])
    kept, rows = spectrum.shape[-len(factors)], -(-length // columns)
    if len(factors) == 1:
        x = spectrum.unsqueeze(-1)
    else:
        x = _idft(spectrum, factors[1:], columns, operand)
        x = x * roots(kept, columns, factor * columns, x.device).conj().to(x.dtype)
    x = _product(roots(rows, kept, factor, x.device).conj(), x, operand)
    return x.flatten(-2)[..., :length]


def _product(matrix: Tensor, x: Tensor, operand: torch.dtype | None) -> Tensor:
    matrix = matrix.to(x.dtype)
    return matrix @ x if operand is None else _rounded(matrix, operand) @ _rounded(x, operand)


def _rounded(z: Tensor, dtype: torch.dtype) -> Tensor:
    parts = torch.view_as_real(z.resolve_conj())
    return torch.view_as_complex(parts.to(dtype).to(parts.dtype))


# -- convolution -------------------------------------------------------------------------------------------------------


def monarch_fft_conv(
    u: Tensor,
    k: Tensor,
    fft_size: int | None = None,
    pregate: Tensor | None = None,
    postgate: Tensor | None = None,
    *,
    factors: Sequence[int] | None = None,
    operand: torch.dtype | None = None,
) -> Tensor:
    """What `convatlas.ops.fft_conv.fft_conv` computes, by the Monarch decomposition in plain torch.

    Two samples are the real and the imaginary part of one signal, rows of padding are left out, and the division by N
    comes with the first twiddle factors, all as in the kernels for GPUs.

    Args:
        u: signals (B, C, L).
        k: kernels (C, K).
        fft_size: the period N, any number of at least L and K; None where nothing is to wrap.
        pregate, postgate: factors (B, C, L) before and after the convolution.
        factors: with the product N, or at least L + K - 1 if fft_size is None; chosen by `monarch_cost` by default.
        operand: as `monarch_dft` takes it.

    Returns:
        The shape and type of u.

    Raises:
        ValueError: the shapes, fft_size and factors do not fit.
    """
    if u.dim() != 3 or k.dim() != 2 or k.shape[0] != u.shape[1]:
        raise ValueError(f"u and k must be (B, C, L) and (C, K), got {tuple(u.shape)} and {tuple(k.shape)}")
    length, needed = u.shape[-1], u.shape[-1] + k.shape[-1] - 1
    if factors is None:
        factors = monarch_length(needed)[1] if fft_size is None else choose_factors(fft_size)
    n = math.prod(factors)
    if n < max(length, k.shape[-1]) or n != (fft_size or n) or (fft_size is None and n < needed):
        wanted = f"at least {needed}" if fft_size is None else f"{fft_size}, at least {max(length, k.shape[-1])}"
        raise ValueError(f"factors must have the product {wanted}, got {tuple(factors)}")
    dtype = work_type(u, k)
    x = u.to(dtype) if pregate is None else u.to(dtype) * pregate
    x = F.pad(x, (0, 0, 0, 0, 0, len(u) % 2))
    z = monarch_dft(torch.complex(x[0::2], x[1::2]), factors, norm="forward", operand=operand)
    z = z * permute_kernel_spectrum(torch.fft.fft(k.to(dtype), n), factors)
    z = monarch_idft(z, factors, length, norm="forward", operand=operand)
    y = torch.stack([z.real, z.imag], dim=1).flatten(0, 1)[: len(u)]
    return (y if postgate is None else y * postgate).to(u.dtype)
