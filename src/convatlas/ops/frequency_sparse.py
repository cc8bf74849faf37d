"""Frequency-sparse long convolution: parts of the kernel's spectrum are zero, and their share of the work falls away.

Fu, Kumbong, Nguyen, Re: "FlashFFTConv: Efficient Convolutions for Long Sequences with Tensor Cores", ICLR 2024,
arXiv 2311.05908, section 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.ops.backend import Backends
from convatlas.ops.fft_conv import fft_conv
from convatlas.ops.fourier import work_type
from convatlas.ops.monarch import monarch_dft, monarch_idft, permute_kernel_spectrum, unpermute_kernel_spectrum

__all__ = ["frequency_mask", "frequency_sparse_conv", "frequency_sparse_kernel", "sparsity"]

Keep = int | Sequence[int]

#: Share of the spectrum that must be left out for products without it to pay.
_SPARSE = 0.75


def frequency_mask(
    n: int,
    keep: Keep,
    factors: Sequence[int] | None = None,
    *,
    symmetrize: bool = False,
    device: torch.device | str | None = None,
) -> Tensor:
    """Which of n frequencies are kept, in their natural order.

    Args:
        n: length of the transform.
        keep: a number m keeps the frequencies below m, positive and negative, which is a low-pass; the authors' plain
            form with N_partial has m = N_partial // 2. A number for each factor keeps the block [:a, :b, ...] of the
            spectrum in the order of `convatlas.ops.monarch.permute_kernel_spectrum`.
        factors: of the Monarch decomposition, with the product n; for blocks.
        symmetrize: the mean of the mask and its mirror image. Blocks are not symmetric, so that the filter is complex;
            the symmetric mask has the real part of its results, and only with it may two real signals be the real and
            the imaginary part of one.

    Returns:
        (n,) with the values 0 and 1, and 0.5 where a symmetric mask keeps one of a pair.

    Raises:
        ValueError: keep or factors do not fit n.
    """
    sizes, block = _checked(n, keep, factors)
    if isinstance(keep, int):
        frequency = torch.arange(n, device=device)
        mask = (torch.minimum(frequency, n - frequency) < keep).double()
    else:
        kept = torch.ones(block, dtype=torch.float64, device=device)
        padding = [pad for k, size in zip(block[::-1], sizes[::-1], strict=True) for pad in (0, size - k)]
        mask = unpermute_kernel_spectrum(F.pad(kept, padding), sizes)
    return (mask + mask.flip(0).roll(1)) / 2 if symmetrize else mask


def sparsity(factors: Sequence[int], keep: Sequence[int]) -> float:
    """The share S of the spectrum that a block leaves out: 1 - (a b ...) / (N_1 N_2 ...)."""
    _checked(math.prod(factors), keep, factors)
    return 1 - math.prod(keep) / math.prod(factors)


def frequency_sparse_kernel(k: Tensor, fft_size: int, keep: Keep, factors: Sequence[int] | None = None) -> Tensor:
    """The real kernel of all fft_size taps that computes the same with the full spectrum.

    Its spectrum is that of k times the symmetric mask: ``fft_conv(u, frequency_sparse_kernel(k, N, ...), N)`` equals
    `frequency_sparse_conv`. What was trained with all frequencies becomes sparse by it, and goes on as it was.

    Args:
        k: kernels (C, K), K <= fft_size.
        fft_size: period N.
        keep, factors: as `frequency_mask` takes them.

    Returns:
        (C, N) in float32, or float64 where k has it.

    Raises:
        ValueError: keep or factors do not fit, or the kernel is longer than fft_size.
    """
    if k.shape[-1] > fft_size:
        raise ValueError(f"fft_size must not be smaller than the kernel ({k.shape[-1]}), got {fft_size}")
    mask = frequency_mask(fft_size, keep, factors, symmetrize=True, device=k.device)[: fft_size // 2 + 1]
    k = k.to(work_type(k))
    return torch.fft.irfft(torch.fft.rfft(k, fft_size) * mask.to(k.dtype), fft_size)


def _auto(
    u: Tensor,
    k: Tensor,
    fft_size: int,
    keep: Keep,
    factors: Sequence[int] | None = None,
    pregate: Tensor | None = None,
    postgate: Tensor | None = None,
) -> str:
    # Products with matrices are fast on a GPU only, and gain by what is left out. Not timed on one.
    if u.device.type == "cpu" or factors is None or isinstance(keep, int):
        return "filtered"
    return "monarch" if sparsity(factors, keep) >= _SPARSE else "filtered"


_backends = Backends("frequency_sparse_conv", auto=_auto)


def frequency_sparse_conv(
    u: Tensor,
    k: Tensor,
    fft_size: int,
    keep: Keep,
    factors: Sequence[int] | None = None,
    pregate: Tensor | None = None,
    postgate: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """`convatlas.ops.fft_conv.fft_conv` with a kernel of which only some frequencies count.

    The real part of the inverse transform of mask * spectrum of k * spectrum of u.

    Args:
        u: signals (B, C, L), real.
        k: kernels (C, K) or (1, C, K), real.
        fft_size: period N of at least L and K; 2 L for causal convolution.
        keep, factors: as `frequency_mask` takes them.
        pregate, postgate: factors of the shape and type of u, both or none.
        backend: ``auto``; ``naive`` (complex transforms and the mask); ``filtered`` (`frequency_sparse_kernel`, then
            `fft_conv` with any of its backends, ``triton`` included: no work falls away); ``monarch`` (products with
            matrices without the rows and columns that are left out, for blocks).

    Returns:
        The shape and type of u.

    Raises:
        ValueError: a shape, fft_size, keep or factors do not fit, or only one gate is given.
        Unsupported: the backend cannot serve the call.
    """
    if k.dim() == 3 and k.shape[0] == 1:
        k = k.squeeze(0)
    if u.dim() != 3 or k.dim() != 2 or k.shape[0] != u.shape[1]:
        raise ValueError(f"u and k must be (B, C, L) and (C, K), got {tuple(u.shape)} and {tuple(k.shape)}")
    if fft_size < max(u.shape[-1], k.shape[-1]):
        raise ValueError(
            f"fft_size must not be smaller than the signal ({u.shape[-1]}) or kernel ({k.shape[-1]}), got {fft_size}"
        )
    if (pregate is None) != (postgate is None):
        raise ValueError("pregate and postgate must be given both or none")
    _checked(fft_size, keep, factors)
    return _backends.run(backend, u, k, fft_size, keep, factors, pregate, postgate)


def _checked(n: int, keep: Keep, factors: Sequence[int] | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Factors and how many of each are kept; of a low-pass n and its frequencies."""
    if isinstance(keep, int):
        if factors is not None:
            raise ValueError(f"with factors, keep must have a number for each of them, got {keep}")
        if n < 1 or keep < 1:
            raise ValueError(f"n and keep must be at least 1, got {n} and {keep}")
        return (n,), (keep,)
    factors, keep = tuple(factors or ()), tuple(keep)
    if not factors or math.prod(factors) != n:
        raise ValueError(f"factors must have the product {n}, got {factors or None}")
    if len(keep) != len(factors) or not all(0 < k <= factor for k, factor in zip(keep, factors, strict=True)):
        raise ValueError(f"keep must be from 1 to each of the factors {factors}, got {keep}")
    return factors, keep


def _gated(x: Tensor, gate: Tensor | None) -> Tensor:
    return x if gate is None else x * gate


@_backends.register("naive")
def _naive(
    u: Tensor,
    k: Tensor,
    fft_size: int,
    keep: Keep,
    factors: Sequence[int] | None,
    pregate: Tensor | None,
    postgate: Tensor | None,
) -> Tensor:
    if 0 in u.shape:
        return u.clone()
    dtype = work_type(u, k)
    mask = frequency_mask(fft_size, keep, factors, device=u.device).to(dtype)
    x_f = torch.fft.fft(_gated(u.to(dtype), pregate), fft_size)
    y = torch.fft.ifft(x_f * (mask * torch.fft.fft(k.to(dtype), fft_size))).real[..., : u.shape[-1]]
    return _gated(y, postgate).to(u.dtype)


@_backends.register("filtered")
def _filtered(
    u: Tensor,
    k: Tensor,
    fft_size: int,
    keep: Keep,
    factors: Sequence[int] | None,
    pregate: Tensor | None,
    postgate: Tensor | None,
) -> Tensor:
    return fft_conv(u, frequency_sparse_kernel(k, fft_size, keep, factors), fft_size, pregate, postgate)


def _refuses_low_pass(u: Tensor, k: Tensor, fft_size: int, keep: Keep, *rest: object) -> str | None:
    return "it leaves out blocks, got a low-pass" if isinstance(keep, int) else None


@_backends.register("monarch", refuses=_refuses_low_pass)
def _monarch(
    u: Tensor,
    k: Tensor,
    fft_size: int,
    keep: Sequence[int],
    factors: Sequence[int],
    pregate: Tensor | None,
    postgate: Tensor | None,
) -> Tensor:
    dtype = work_type(u, k)
    block: tuple[Any, ...] = (..., *(slice(kept) for kept in keep))
    k_f = permute_kernel_spectrum(torch.fft.fft(k.to(dtype), fft_size), factors)[block]
    z = monarch_dft(_gated(u.to(dtype), pregate), factors, keep, norm="forward")
    y = monarch_idft(z * k_f, factors, u.shape[-1], norm="forward").real
    return _gated(y, postgate).to(u.dtype)
