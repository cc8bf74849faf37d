"""Fourier transforms behind convolutions: lengths that transform fast, products of spectra and their gradients.

Signals are real and transformed over their last ``len(n)`` axes; ``n`` holds the lengths of the transforms.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "convolve",
    "convolve_blocks",
    "fast_length",
    "gated_convolve",
    "gated_gradients",
    "gradients",
    "gradients_blocks",
    "spectrum",
    "work_type",
]

#: Samples of the blocks that are transformed together on a CPU: 1 MiB in float32.
_CACHED = 2**18


def fast_length(n: int) -> int:
    """The smallest even length of at least n that has no prime factor above 7.

    Odd lengths are left out because transforms of real signals of odd length take up to three times as long.

    Raises:
        ValueError: n is smaller than 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if isinstance(n, torch.SymInt):  # type: ignore[unreachable]
        # An exported graph serves every length, so it cannot search for a good one, but has to know that it is even.
        return 2 * n  # type: ignore[unreachable]
    return 2 * _smooth((n + 1) // 2)


@lru_cache(maxsize=1024)
def _smooth(half: int) -> int:
    # The smallest number of at least half without prime factors above 7.
    best = 1 << (half - 1).bit_length()
    sevens = 1
    while sevens < best:
        fives = sevens
        while fives < best:
            threes = fives
            while threes < best:
                odd, length = threes, threes
                while length < half:
                    length *= 2
                best = min(best, length)
                threes = odd * 3
            fives *= 5
        sevens *= 7
    return best


def spectrum(x: Tensor, n: Sequence[int]) -> Tensor:
    """The non-redundant half of the spectrum of x (..., *L), padded with zeros to the lengths n."""
    if _empty(x):
        return torch.complex(*(x.new_zeros(*x.shape[: -len(n)], *n[:-1], n[-1] // 2 + 1) for _ in range(2)))
    return torch.fft.rfftn(x, s=tuple(n), dim=_axes(n))


def convolve(x: Tensor, kernel: Tensor, n: Sequence[int]) -> Tensor:
    """Circular convolution of period n, cropped to the size of x.

    Args:
        x: signals (B, C, *L).
        kernel: spectrum (C, *n of a real signal) of the kernels.
        n: lengths of the transforms, L <= n.

    Returns:
        (B, C, *L).
    """
    return _crop(_inverse(_times(spectrum(x, n), kernel), n), x.shape[2:])


def gradients(
    x: Tensor, k: Tensor, g: Tensor, n: Sequence[int], needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `convolve` for x (B, C, *L) and k (C, *K), given that of its result g (B, C, *L), and its result.

    ``needs`` tells which of the three are wanted; the others are None.
    """
    needs_x, needs_k, needs_y = needs
    g_f = spectrum(g, n)
    k_f = spectrum(k, n) if needs_x or needs_y else None
    x_f = spectrum(x, n) if needs_k or needs_y else None
    dx = dk = y = None
    if needs_y and x_f is not None and k_f is not None:
        y = _crop(_inverse(x_f * k_f, n), x.shape[2:])
    if needs_k and x_f is not None:
        dk = _crop(_inverse(_times(_conj(x_f), g_f).sum(0), n), k.shape[1:])
    if needs_x and k_f is not None:
        dx = _crop(_inverse(_times(g_f, _conj(k_f)), n), x.shape[2:])
    return dx, dk, y


def convolve_blocks(x: Tensor, kernel: Tensor, taps: int, n: int) -> Tensor:
    """Causal convolution of x (B, C, L) by overlap-save: blocks of length n, of which the last n - taps + 1 are kept.

    Args:
        x: signals (B, C, L).
        kernel: spectrum (C, n // 2 + 1) of the kernels.
        taps: length of the kernels, at most n.
        n: length of a block.

    Returns:
        (B, C, L).
    """
    kernel = kernel.unsqueeze(1)
    hop = n - taps + 1
    pieces = []
    for start, stop in _runs(x, hop, n):
        y = _inverse(_times(spectrum(_blocks(x, start, stop, hop, n, taps - 1), (n,)), kernel), (n,))
        pieces.append(y[..., taps - 1 :].flatten(-2)[..., : stop - start])
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)


def gradients_blocks(
    x: Tensor, k: Tensor, g: Tensor, n: int, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The same as `gradients` for `convolve_blocks`."""
    needs_x, needs_k, needs_y = needs
    taps = k.shape[-1]
    hop = n - taps + 1
    k_f = spectrum(k, (n,)) if needs_x or needs_y else None
    y = convolve_blocks(x, k_f, taps, n) if needs_y and k_f is not None else None
    dx: list[Tensor] = []
    dk: list[Tensor] = []
    # A correlation looks ahead: its blocks start where those of the convolution end, and keep their beginning.
    for start, stop in _runs(x, hop, n) if needs_x or needs_k else ():
        g_f = spectrum(_blocks(g, start, stop, hop, n, 0), (n,))
        if needs_k:
            x_f = spectrum(_blocks(x, start, stop, hop, hop, 0), (n,))
            dk.append(_times(_conj(x_f), g_f).sum((0, 2)))
        if needs_x and k_f is not None:
            ahead = _inverse(_times(g_f, k_f.conj().unsqueeze(1)), (n,))
            dx.append(ahead[..., :hop].flatten(-2)[..., : stop - start])
    return (
        torch.cat(dx, dim=-1) if dx else None,
        _inverse(torch.stack(dk).sum(0), (n,))[..., :taps] if dk else None,
        y,
    )


def work_type(*tensors: Tensor) -> torch.dtype:
    """The type in which tensors are transformed: float32, or float64 if one of them has it."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def gated_convolve(
    u: Tensor, k: Tensor, pregate: Tensor | None, postgate: Tensor | None, n: Sequence[int], blocks: bool
) -> Tensor:
    """postgate * ((pregate * u) convolved with k), in the type of u.

    Args:
        u: signals (B, C, *L).
        k: kernels (C, *K).
        pregate, postgate: factors of the shape of u, or both None.
        n: lengths of the transforms.
        blocks: by overlap-save, else circular of period n.
    """
    dtype = work_type(u, k)
    kernel = spectrum(k.to(dtype), n)
    x = _gated(u.to(dtype), pregate)
    y = convolve_blocks(x, kernel, k.shape[-1], n[0]) if blocks else convolve(x, kernel, n)
    return _gated(y, postgate).to(u.dtype)


def gated_gradients(
    u: Tensor,
    k: Tensor,
    pregate: Tensor | None,
    postgate: Tensor | None,
    g: Tensor,
    n: Sequence[int],
    blocks: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `gated_convolve` for u, k, pregate and postgate, given that of its result.

    Everything that the forward pass could have kept is computed again. ``needs`` tells which of the four are wanted.
    """
    dtype = work_type(u, k)
    x, k, g = _gated(u.to(dtype), pregate), k.to(dtype), g.to(dtype)
    wanted = (needs[0] or needs[2], needs[1], needs[3])
    if blocks:
        dx, dk, y = gradients_blocks(x, k, _gated(g, postgate), n[0], wanted)
    else:
        dx, dk, y = gradients(x, k, _gated(g, postgate), n, wanted)
    du = _gated(dx, pregate) if dx is not None and needs[0] else None
    d_pregate = dx * u if dx is not None and needs[2] else None
    d_postgate = g * y if y is not None else None
    # Each gradient has the type of its tensor; autograd casts it.
    return du, dk, d_pregate, d_postgate


def _gated(x: Tensor, gate: Tensor | None) -> Tensor:
    return x if gate is None else x * gate


def _axes(n: Sequence[int]) -> tuple[int, ...]:
    return tuple(range(-len(n), 0))


def _inverse(x: Tensor, n: Sequence[int]) -> Tensor:
    if _empty(x):
        return x.real.new_zeros(*x.shape[: -len(n)], *n)
    return torch.fft.irfftn(x, s=tuple(n), dim=_axes(n))


def _empty(x: Tensor) -> bool:
    # The library behind torch refuses to transform no signals. A captured graph is for some.
    return not torch.compiler.is_compiling() and 0 in x.shape


def _crop(x: Tensor, size: Sequence[int]) -> Tensor:
    index: tuple[Any, ...] = (..., *(slice(length) for length in size))
    return x[index]


def _times(a: Tensor, b: Tensor) -> Tensor:
    # Spectra are the largest tensors here: one is overwritten, unless the product is to be differentiated.
    return a * b if torch.is_grad_enabled() else a.mul_(b)


def _conj(a: Tensor) -> Tensor:
    return a.conj() if torch.is_grad_enabled() else a.conj_physical_()


def _runs(x: Tensor, hop: int, n: int) -> Iterator[tuple[int, int]]:
    """Where to start and stop in x (B, C, L) to transform some of its blocks at a time: as many as the cache holds."""
    length = x.shape[-1]
    together = max(1, _CACHED // max(1, x.shape[0] * x.shape[1] * n)) * hop if x.device.type == "cpu" else length
    starts = range(0, length, together)
    return ((start, min(start + together, length)) for start in starts)


def _blocks(x: Tensor, start: int, stop: int, hop: int, n: int, before: int) -> Tensor:
    # (..., L) -> (..., blocks, n): windows that start every `hop` samples from `start` to `stop`, but `before` earlier.
    first = start - before
    last = first + (stop - start - 1) // hop * hop + n
    piece = x[..., max(first, 0) : last]
    missing = max(-first, 0), max(last - x.shape[-1], 0)
    return (F.pad(piece, missing) if any(missing) else piece).unfold(-1, n, hop)
