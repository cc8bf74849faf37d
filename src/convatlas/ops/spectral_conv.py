"""Spectral convolution: each pair of channels is coupled by a number of its own at every low frequency.

Li et al.: "Fourier Neural Operator for Parametric Partial Differential Equations", ICLR 2021, arXiv 2010.08895; as in
Berner et al., 2025, arXiv 2506.10973, section 3. As an operator it maps functions on a torus, whatever the grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from convatlas.errors import unknown
from convatlas.ops.backend import Backends
from convatlas.ops.mode_mixing import mix_modes
from convatlas.ops.precision import without_autocast

__all__ = ["Precision", "kept_modes", "spectral_conv"]

#: Of the products with the spectrum.
Precision = Literal["full", "mixed", "half"]


_backends = Backends("spectral_conv", auto=lambda *_: "fft")


def spectral_conv(
    x: Tensor,
    weight: Tensor,
    size: Sequence[int] | None = None,
    modes: Sequence[int] | None = None,
    align: bool = False,
    precision: Precision = "full",
    *,
    backend: str = "auto",
) -> Tensor:
    """y = F^-1(R F(x)) on the lowest frequencies; the others become zero.

    F is the real transform divided by the number of points, so that its values do not depend on the grid. Half
    precision is computed in float32, also under autocast.

    Args:
        x: (B, I, *grid), real.
        weight: real and imaginary part of R, (I, O, *modes, 2), or (C, *modes, 2) where each channel is on its own. On
            all axes but the last the frequencies rise from -(m // 2); on the last they begin with 0. A grid that holds
            fewer takes the middle ones, and the first ones of the last axis.
        size: grid of the result; that of x when left out.
        modes: frequencies to use on each axis, in the numbers of ``weight``; all when left out.
        align: take the middle such that frequency 0 stays 0. The authors' code is one off where an even number of
            frequencies is cut to an odd one; that is the default, by which checkpoints compute what they did.
        precision: ``mixed`` rounds spectrum and R to float16 before they are multiplied, ``half`` also x, as the
            authors' options of these names do; the sums stay in float32, so it shows their accuracy, not their speed.
        backend: ``auto``; ``naive`` (the definition, with whole spectra); ``fft`` (axis by axis, each cut at once).

    Returns:
        (B, O, *size) in the type of x.

    Raises:
        ValueError: the shapes do not fit, or x is not real floating point.
        UnknownName: there is no such precision.
    """
    dims = x.dim() - 2
    if not x.is_floating_point():
        raise ValueError(f"x must be real and floating point, got {x.dtype}")
    if dims < 1 or weight.dim() not in (dims + 2, dims + 3) or weight.shape[-1] != 2 or weight.shape[0] != x.shape[1]:
        raise ValueError(
            f"x must be (B, I, *grid) and weight (I, O, *modes, 2) or (I, *modes, 2), got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    size = tuple(x.shape[2:]) if size is None else tuple(size)
    modes = None if modes is None else tuple(modes)
    for name, lengths in (("size", size), ("modes", modes)):
        if lengths is not None and (len(lengths) != dims or min(lengths) < 1):
            raise ValueError(f"{name} must hold a positive number for each of {dims} axes, got {lengths}")
    if precision not in get_args(Precision):
        raise unknown("precision", precision, get_args(Precision))
    return _backends.run(
        backend, x.half().to(x.dtype) if precision == "half" else x, weight, size, modes, align, precision
    )


def kept_modes(grid: Sequence[int], stored: Sequence[int], modes: Sequence[int] | None = None) -> tuple[int, ...]:
    """How many frequencies of each axis are used: those that are stored, asked for, and present on the grid."""
    present = (*grid[:-1], grid[-1] // 2 + 1)
    return tuple(map(min, zip(present, stored, modes or stored, strict=True)))


def _cut(weight: Tensor, kept: Sequence[int], align: bool) -> Tensor:
    """R on the frequencies that are used, complex: (I, O, *kept) or (C, *kept)."""
    first = weight.dim() - 1 - len(kept)
    for axis, count in enumerate(kept):
        stored, last = weight.shape[first + axis], axis == len(kept) - 1
        front = stored // 2 - count // 2 if align else (stored - count) // 2
        weight = weight.narrow(first + axis, 0 if last else front, count)
    # Strides of another memory format are no obstacle to anything but this view.
    paired = weight.stride(-1) == 1 and all(step % 2 == 0 for step in weight.stride()[:-1])
    return torch.view_as_complex(weight if paired else weight.contiguous())


def _mix(spectrum: Tensor, matrices: Tensor, precision: Precision) -> Tensor:
    if precision != "full":
        spectrum, matrices = _rounded(spectrum), _rounded(matrices)
    return mix_modes(spectrum, matrices) if matrices.dim() == spectrum.dim() else spectrum * matrices


def _rounded(x: Tensor) -> Tensor:
    return torch.view_as_complex(torch.view_as_real(x.contiguous()).half().to(x.real.dtype))


def _wide(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    return x.to(dtype), weight.to(dtype)


@_backends.register("naive")
def _naive(
    x: Tensor, weight: Tensor, size: tuple[int, ...], modes: tuple[int, ...] | None, align: bool, precision: Precision
) -> Tensor:
    axes = tuple(range(2, x.dim()))
    with without_autocast(x):
        wide, weight = _wide(x, weight)
        spectrum = torch.fft.rfftn(wide, dim=axes, norm="forward")
        if len(axes) > 1:
            spectrum = torch.fft.fftshift(spectrum, axes[:-1])
        kept = kept_modes(x.shape[2:], weight.shape[-1 - len(axes) : -1], modes)
        for axis, count in zip(axes[:-1], kept, strict=False):
            spectrum = spectrum.narrow(axis, spectrum.shape[axis] // 2 - count // 2, count)
        mixed = _mix(spectrum[..., : kept[-1]], _cut(weight, kept, align), precision)
        whole = mixed.new_zeros(*mixed.shape[:2], *size[:-1], size[-1] // 2 + 1)
        place, part = [slice(None)] * 2, [slice(None)] * 2
        for length, count in zip(size[:-1], kept, strict=False):
            zero, middle = length // 2, count // 2
            low, high = min(zero, middle), min(length - zero, count - middle)
            place.append(slice(zero - low, zero + high))
            part.append(slice(middle - low, middle + high))
        last = slice(min(kept[-1], whole.shape[-1]))
        whole[(*place, last)] = mixed[(*part, last)]
        if len(axes) > 1:
            whole = torch.fft.ifftn(torch.fft.ifftshift(whole, axes[:-1]), dim=axes[:-1], norm="forward")
        return torch.fft.irfft(_real_ends(whole, size[-1]), n=size[-1], norm="forward").to(x.dtype)


@_backends.register("fft")
def _fft(
    x: Tensor, weight: Tensor, size: tuple[int, ...], modes: tuple[int, ...] | None, align: bool, precision: Precision
) -> Tensor:
    axes = range(2, x.dim() - 1)
    with without_autocast(x):
        wide, weight = _wide(x, weight)
        kept = kept_modes(x.shape[2:], weight.shape[-2 - len(axes) : -1], modes)
        spectrum = torch.fft.rfft(wide, norm="forward")[..., : kept[-1]]
        for axis, count in zip(axes, kept, strict=False):
            spectrum = _low(torch.fft.fft(spectrum, dim=axis, norm="forward"), axis, count)
        mixed = _mix(spectrum, _cut(weight, kept, align), precision)
        mixed = mixed[..., : size[-1] // 2 + 1]
        for axis, length in zip(axes, size, strict=False):
            mixed = torch.fft.ifft(_spread(mixed, axis, length), dim=axis, norm="forward")
        if mixed.device.type != "cpu":  # whose transform does not read them
            mixed = _real_ends(mixed, size[-1])
        return torch.fft.irfft(mixed, n=size[-1], norm="forward").to(x.dtype)


def _low(spectrum: Tensor, axis: int, count: int) -> Tensor:
    """The lowest frequencies of one axis, rising from -(count // 2)."""
    negative = count // 2
    parts = spectrum.narrow(axis, spectrum.shape[axis] - negative, negative), spectrum.narrow(axis, 0, count - negative)
    return torch.cat(parts, axis)


def _spread(mixed: Tensor, axis: int, length: int) -> Tensor:
    """Rising frequencies at their places in a spectrum of another length, zeros between."""
    count = mixed.shape[axis]
    negative, positive = min(count // 2, length // 2), min(count - count // 2, length - length // 2)
    gap = list(mixed.shape)
    gap[axis] = length - negative - positive
    parts = mixed.narrow(axis, count // 2, positive), mixed.narrow(axis, count // 2 - negative, negative)
    return torch.cat([parts[0], mixed.new_zeros(gap), parts[1]], axis)


def _real_ends(lines: Tensor, length: int) -> Tensor:
    """The same half spectrum of a real field, without what its mean and highest frequency cannot have."""
    real = torch.zeros(lines.shape[-1], dtype=torch.bool, device=lines.device)
    real[0] = True
    if length % 2 == 0 and lines.shape[-1] == length // 2 + 1:
        real[-1] = True
    return torch.complex(lines.real, torch.where(real, 0.0, lines.imag))
