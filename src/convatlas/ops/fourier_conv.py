"""Convolution of short signals by a kernel that is given by its spectrum and mixes all channels.

The convolution of a Fourier neural operator on one axis: Li et al.: "Fourier Neural Operator for Parametric Partial
Differential Equations", ICLR 2021, arXiv 2010.08895, equation 4; for time series of
fields Shi et al., arXiv 2306.17207.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from convatlas.ops.backend import Backends
from convatlas.ops.precision import without_autocast

__all__ = ["fourier_conv1d"]

#: Up to this length products with the matrices of the transforms are faster than fast transforms, if there are few
#: channels, or if the length has a prime factor that transforms are slow for.
_SHORT, _FEW, _FAST_FACTORS = 80, 128, (2, 3, 5, 7)


def _auto(x: Tensor, weight: Tensor, *_: object) -> str:
    length = x.shape[-1]
    if length > _SHORT:
        return "naive"
    few = weight.shape[0] * weight.shape[1] <= _FEW
    return "matmul" if few or not _transforms_fast(length) else "naive"


def _transforms_fast(length: int) -> bool:
    for factor in _FAST_FACTORS:
        while length % factor == 0:
            length //= factor
    return length == 1


_backends = Backends("fourier_conv1d", auto=_auto)


def fourier_conv1d(x: Tensor, weight: Tensor, first: int = 0, *, backend: str = "auto") -> Tensor:
    """y = irfft(Y), Y[o, f] = sum over i of rfft(x)[i, f] W[o, i, f - first], 0 where there is no weight.

    With all frequencies it is the circular convolution with the kernels irfft(W). Frequencies that a signal of this
    length does not have are left out. Half precision is computed in float32.

    Args:
        x: signals (B, I, T).
        weight: W (O, I, m, 2), real and imaginary parts, for frequencies in cycles per signal.
        first: the lowest of them.
        backend: ``auto``; ``naive`` (fast Fourier transforms); ``matmul`` (products with the matrices of the
            transforms at these frequencies).

    Returns:
        (B, O, T) in the type of x.

    Raises:
        ValueError: shapes do not fit.
    """
    if x.dim() != 3 or weight.dim() != 4 or weight.shape[3] != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x and weight must be (B, I, T) and (O, I, m, 2), got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if x.shape[2] < 1 or not 0 <= first <= x.shape[2] // 2 or weight.shape[2] < 1:
        raise ValueError(
            f"there must be a frequency from first up to T / 2, got first {first}, T {x.shape[2]} and "
            f"{weight.shape[2]} frequencies"
        )
    with without_autocast(x):
        return _backends.run(backend, x, weight, first)


@_backends.register("naive")
def _naive(x: Tensor, weight: Tensor, first: int) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    length = x.shape[-1]
    end = min(first + weight.shape[2], length // 2 + 1)
    spectrum = torch.fft.rfft(x.to(dtype))[..., first:end]
    mixed = torch.einsum(
        "bif,oif->bof", spectrum, torch.view_as_complex(weight[:, :, : end - first].to(dtype).contiguous())
    )
    return torch.fft.irfft(torch.nn.functional.pad(mixed, (first, length // 2 + 1 - end)), n=length).to(x.dtype)


@_backends.register("matmul")
def _matmul(x: Tensor, weight: Tensor, first: int) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    batch, channels, length = x.shape
    outputs = weight.shape[0]
    modes = min(weight.shape[2], length // 2 + 1 - first)
    cosine, sine, count = _waves(length, first, modes, dtype, x.device)
    # Real and imaginary parts side by side: (f, B, 2 I) times (f, 2 I, 2 O).
    parts = (x.to(dtype).reshape(-1, length) @ torch.cat([cosine, -sine], 1)).view(batch, channels, 2, modes)
    real, imaginary = weight[:, :, :modes].to(dtype).permute(2, 1, 0, 3).unbind(-1)
    mixing = torch.cat([torch.cat([real, imaginary], 2), torch.cat([-imaginary, real], 2)], 1)
    mixed = parts.permute(3, 0, 2, 1).reshape(modes, batch, 2 * channels) @ mixing
    # irfft: frequencies between 0 and T / 2 stand for two.
    back = torch.cat([cosine * count, -sine * count], 1).T / length
    y = mixed.view(modes, batch, 2, outputs).permute(1, 3, 2, 0).reshape(batch * outputs, 2 * modes) @ back
    return y.view(batch, outputs, length).to(x.dtype)


def _waves(
    length: int, first: int, modes: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines and sines (T, m) of the frequencies, and how many of the whole spectrum each stands for, (m)."""
    frequencies = torch.arange(first, first + modes, device=device)
    steps = torch.arange(length, device=device)
    turns = torch.outer(steps, frequencies) % length  # so that angles keep their digits
    angles = steps.double() * (2 * math.pi / length)
    count = torch.where((frequencies == 0) | (2 * frequencies == length), 1.0, 2.0)
    return angles.cos().to(dtype)[turns], angles.sin().to(dtype)[turns], count.to(dtype)
