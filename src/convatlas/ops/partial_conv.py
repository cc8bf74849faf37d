"""Partial convolution: kernels shorter than the signals, so that signals of any length can be convolved piece by piece.

Fu, Kumbong, Nguyen, Re: "FlashFFTConv: Efficient Convolutions for Long Sequences with Tensor Cores", ICLR 2024,
arXiv 2311.05908, section 3.3. A position sees only the last K samples: less memory for kernels and their optimizer
state, and a model goes on where its training sequences ended.
"""

from __future__ import annotations

import torch
from torch import Tensor

from convatlas.ops.fft_conv import fft_conv

__all__ = ["partial_conv", "stream_conv"]


def partial_conv(
    u: Tensor,
    k: Tensor,
    n_partial: int,
    pregate: Tensor | None = None,
    postgate: Tensor | None = None,
    *,
    skip: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal convolution with the first n_partial taps of a kernel, by overlap-save where that pays.

    Args:
        u: signals (B, C, L).
        k: kernels (C, K).
        n_partial: taps that count; with K or more all do.
        pregate, postgate, skip, backend: as `convatlas.ops.fft_conv.fft_conv` takes them.

    Returns:
        The shape and type of u.

    Raises:
        ValueError: n_partial is smaller than 1, or a shape does not fit.
    """
    if n_partial < 1:
        raise ValueError(f"n_partial must be at least 1, got {n_partial}")
    return fft_conv(u, k[..., :n_partial], None, pregate, postgate, skip=skip, backend=backend)


def stream_conv(
    u: Tensor,
    k: Tensor,
    state: Tensor | None = None,
    pregate: Tensor | None = None,
    postgate: Tensor | None = None,
    *,
    skip: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal convolution of the next piece of endless signals; one sample at a time works as well.

    Args:
        u: the next samples (B, C, T).
        k: kernels (C, K).
        state: what the call before returned, None for the first piece.
        pregate, postgate: factors of the shape of u, both or none.
        skip: (C,), added to the kernel at lag 0.

    Returns:
        The samples (B, C, T) of the result, and the state: the last K - 1 gated samples (B, C, K - 1).

    Raises:
        ValueError: a shape does not fit.
    """
    past = k.shape[-1] - 1
    if u.dim() != 3 or (state is not None and state.shape != (*u.shape[:2], past)):
        got = None if state is None else tuple(state.shape)
        raise ValueError(f"u must be (B, C, T) and state (B, C, {past}), got {tuple(u.shape)} and {got}")
    if (pregate is None) != (postgate is None):
        raise ValueError("pregate and postgate must be given both or none")
    x = u if pregate is None else u * pregate
    x = torch.cat([x.new_zeros(*x.shape[:2], past) if state is None else state, x], dim=-1)
    y = fft_conv(x, k, skip=skip)[..., past:]
    return y if postgate is None else y * postgate, x[..., x.shape[-1] - past :]
