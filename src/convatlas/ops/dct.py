"""Discrete cosine transform (DCT-II) and its inverse along any axes, of any length, whole or of the lowest modes only.

Ahmed, Natarajan, Rao: "Discrete Cosine Transform", IEEE Transactions on Computers 1974; by a Fourier transform of the
same length as in Makhoul: "A fast cosine transform in one and two dimensions", IEEE TASSP 1980.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.ops.backend import Backends
from convatlas.ops.precision import without_autocast

__all__ = ["Norm", "dct", "idct"]

#: ``ortho`` keeps norms: the inverse is the transpose. None is twice the sum of cosines, as SciPy defines it.
Norm = Literal["ortho"] | None
Axes = int | Sequence[int]

# With more modes of an axis than this, the Fourier transform is faster than a product with a matrix.
_MOST_BY_MATMUL = 128


def _auto_dct(x: Tensor, axes: Axes = -1, low_modes: Axes | None = None, norm: Norm = "ortho") -> str:
    return _auto(_each(low_modes, axes, x))


def _auto_idct(z: Tensor, axes: Axes = -1, size: Axes | None = None, norm: Norm = "ortho") -> str:
    return _auto([z.shape[axis] for axis in _axes(axes)])


def _auto(modes: Sequence[int]) -> str:
    return "matmul" if max(modes) <= _MOST_BY_MATMUL else "fft"


_transforms = Backends("dct", auto=_auto_dct)
_inverses = Backends("idct", auto=_auto_idct)


def dct(
    x: Tensor, axes: Axes = -1, low_modes: Axes | None = None, norm: Norm = "ortho", *, backend: str = "auto"
) -> Tensor:
    """z[k] = c[k] sum_n x[n] cos(pi k (2n + 1) / (2N)) along each axis, c[0] = sqrt(1/N), c[k] = sqrt(2/N).

    Half precision is computed in float32, also under autocast.

    Args:
        x: real, of any shape.
        axes: one or several.
        low_modes: keep only so many of the lowest modes, one number or one for each axis; all when left out.
        norm: ``ortho`` as above; None for c[k] = 2.
        backend: ``auto``; ``naive`` (the sum above); ``matmul`` (products with matrices of cosines, best for few
            modes); ``fft``.

    Returns:
        The type of x, its axes as long as there are modes.

    Raises:
        ValueError: x is not real, an axis comes twice or is empty, or low_modes is out of range.
    """
    _check("x", x, axes, norm)
    for axis, modes in zip(_axes(axes), _each(low_modes, axes, x), strict=True):
        if not 1 <= modes <= x.shape[axis]:
            raise ValueError(f"low_modes must be from 1 to the {x.shape[axis]} points of axis {axis}, got {modes}")
    return _transforms.run(backend, x, axes, low_modes, norm)


def idct(
    z: Tensor, axes: Axes = -1, size: Axes | None = None, norm: Norm = "ortho", *, backend: str = "auto"
) -> Tensor:
    """The inverse of `dct`: x[n] = sum_k c[k] z[k] cos(pi k (2n + 1) / (2N)) along each axis (a DCT-III).

    Args:
        z: modes, real, of any shape.
        axes: one or several.
        size: N of each axis, or one number for all. Modes beyond those given are zero; as many points as modes when
            left out.
        norm: that of the transform.
        backend: as for `dct`.

    Returns:
        The type of z, its axes as long as size.

    Raises:
        ValueError: z is not real, an axis comes twice or is empty, or size is smaller than the number of modes.
    """
    _check("z", z, axes, norm)
    for axis, points in zip(_axes(axes), _each(size, axes, z), strict=True):
        if points < z.shape[axis]:
            raise ValueError(f"size must be at least the {z.shape[axis]} modes of axis {axis}, got {points}")
    return _inverses.run(backend, z, axes, size, norm)


def _check(name: str, x: Tensor, axes: Axes, norm: Norm) -> None:
    if not x.is_floating_point():
        raise ValueError(f"{name} must be real floating point, got {x.dtype}")
    places = _axes(axes)
    if not places or any(not -x.dim() <= axis < x.dim() for axis in places):
        raise ValueError(f"axes must name axes of a tensor with {x.dim()}, got {axes}")
    if len({axis % x.dim() for axis in places}) != len(places):
        raise ValueError(f"axes must be different, got {axes}")
    if any(x.shape[axis] < 1 for axis in places):
        raise ValueError(f"{name} must not be empty along axes {axes}, got {tuple(x.shape)}")
    if norm not in ("ortho", None):
        raise ValueError(f"norm must be 'ortho' or None, got {norm!r}")


def _axes(axes: Axes) -> tuple[int, ...]:
    return (axes,) if isinstance(axes, int) else tuple(axes)


def _each(value: Axes | None, axes: Axes, x: Tensor) -> list[int]:
    """A value for each axis; the length of the axis where none is given."""
    places = _axes(axes)
    if value is None:
        return [x.shape[axis] for axis in places]
    values = [value] * len(places) if isinstance(value, int) else list(value)
    if len(values) != len(places):
        raise ValueError(f"low_modes and size must have one number for each of the {len(places)} axes, got {value}")
    return values


def _along(x: Tensor, axes: Axes, lengths: Axes | None, transform: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Transform one axis after the other, the last first, in float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    with without_autocast(x):
        for axis, length in sorted(zip(_axes(axes), _each(lengths, axes, x), strict=True), key=lambda pair: -pair[0]):
            wide = transform(wide.movedim(axis, -1), length).movedim(-1, axis)
    return wide.to(x.dtype)


def _cosines(modes: int, points: int, like: Tensor) -> Tensor:
    """cos(pi k (2n + 1) / (2N)), (modes, points)."""
    # Whole numbers reduced to one turn, so that the angles are exact in single precision as well.
    turns = torch.outer(
        torch.arange(modes, device=like.device), 2 * torch.arange(points, device=like.device) + 1
    ).remainder(4 * points)
    return torch.cos(turns.to(like.dtype) * (math.pi / (2 * points)))


def _scales(modes: int, points: int, norm: Norm, like: Tensor) -> Tensor:
    """c[k] of the transform, (modes,)."""
    lowest, others = (math.sqrt(1 / points), math.sqrt(2 / points)) if norm == "ortho" else (2.0, 2.0)
    return _first_and_others(lowest, others, modes, like)


def _inverse_scales(modes: int, points: int, norm: Norm, like: Tensor) -> Tensor:
    """c[k] of the inverse, (modes,)."""
    if norm == "ortho":
        return _scales(modes, points, norm, like)
    return _first_and_others(0.5 / points, 1 / points, modes, like)


def _first_and_others(first: float, others: float, count: int, like: Tensor) -> Tensor:
    return torch.cat([like.new_full((1,), first), like.new_full((count - 1,), others)])


@_transforms.register("naive")
def _naive_dct(x: Tensor, axes: Axes = -1, low_modes: Axes | None = None, norm: Norm = "ortho") -> Tensor:
    def transform(x: Tensor, modes: int) -> Tensor:
        points = x.shape[-1]
        return (x.unsqueeze(-2) * _cosines(modes, points, x)).sum(-1) * _scales(modes, points, norm, x)

    return _along(x, axes, low_modes, transform)


@_inverses.register("naive")
def _naive_idct(z: Tensor, axes: Axes = -1, size: Axes | None = None, norm: Norm = "ortho") -> Tensor:
    def transform(z: Tensor, points: int) -> Tensor:
        modes = z.shape[-1]
        scaled = z * _inverse_scales(modes, points, norm, z)
        return (scaled.unsqueeze(-1) * _cosines(modes, points, z)).sum(-2)

    return _along(z, axes, size, transform)


@_transforms.register("matmul")
def _matmul_dct(x: Tensor, axes: Axes = -1, low_modes: Axes | None = None, norm: Norm = "ortho") -> Tensor:
    def transform(x: Tensor, modes: int) -> Tensor:
        points = x.shape[-1]
        return x @ (_cosines(modes, points, x) * _scales(modes, points, norm, x)[:, None]).T

    return _along(x, axes, low_modes, transform)


@_inverses.register("matmul")
def _matmul_idct(z: Tensor, axes: Axes = -1, size: Axes | None = None, norm: Norm = "ortho") -> Tensor:
    def transform(z: Tensor, points: int) -> Tensor:
        modes = z.shape[-1]
        return z @ (_cosines(modes, points, z) * _inverse_scales(modes, points, norm, z)[:, None])

    return _along(z, axes, size, transform)


def _twist(points: int, sign: int, like: Tensor) -> Tensor:
    """exp(sign i pi k / (2N)) for k up to N / 2."""
    angles = torch.arange(points // 2 + 1, device=like.device, dtype=like.dtype) * (math.pi / (2 * points))
    return torch.polar(torch.ones_like(angles), sign * angles)


@_transforms.register("fft")
def _fft_dct(x: Tensor, axes: Axes = -1, low_modes: Axes | None = None, norm: Norm = "ortho") -> Tensor:
    def transform(x: Tensor, modes: int) -> Tensor:
        points = x.shape[-1]
        if not x.numel():  # MKL refuses it
            return x[..., :modes]
        folded = torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], -1)
        twisted = torch.fft.rfft(folded) * _twist(points, -1, x)
        # The upper half follows from the lower one, because the signal is real.
        upper = -twisted.imag[..., 1 : (points + 1) // 2].flip(-1)
        return torch.cat([twisted.real, upper], -1)[..., :modes] * _scales(modes, points, norm, x)

    return _along(x, axes, low_modes, transform)


@_inverses.register("fft")
def _fft_idct(z: Tensor, axes: Axes = -1, size: Axes | None = None, norm: Norm = "ortho") -> Tensor:
    def transform(z: Tensor, points: int) -> Tensor:
        modes = z.shape[-1]
        if not z.numel():
            return F.pad(z, (0, points - modes))
        scaled = F.pad(z * (_inverse_scales(modes, points, norm, z) * (points / 2)), (0, points - modes))
        # z[k] - i z[N - k] for k up to N / 2; the constant mode has no partner and counts twice.
        lower = torch.cat([2 * scaled[..., :1], scaled[..., 1 : points // 2 + 1]], -1)
        upper = F.pad(scaled.flip(-1)[..., : points // 2], (1, 0))
        folded = torch.fft.irfft(torch.complex(lower, -upper) * _twist(points, 1, z), points)
        even = folded[..., : (points + 1) // 2]
        odd = F.pad(folded[..., (points + 1) // 2 :].flip(-1), (0, points % 2))
        return torch.stack([even, odd], -1).flatten(-2)[..., :points]

    return _along(z, axes, size, transform)
