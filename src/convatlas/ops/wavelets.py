"""Discrete wavelet transform and its inverse, of signals, images and volumes, over any number of levels.

Mallat: "A theory for multiresolution signal decomposition: the wavelet representation", IEEE PAMI 1989. Filters, signs,
boundary modes and the names of sub-bands are those of PyWavelets.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.errors import unknown
from convatlas.ops.backend import Backends
from convatlas.ops.boundary import extend
from convatlas.ops.precision import without_autocast
from convatlas.ops.wavelet_filters import Wavelet, find_wavelet

__all__ = ["Coefficients", "Mode", "dwt", "idwt", "max_level", "subbands", "wavedec", "waverec"]

#: What lies beyond the ends of a signal, see `convatlas.ops.boundary.Boundary`, or ``periodization``: periodic, with as
#: few coefficients as there are samples; a signal of odd length first repeats its last sample.
Mode = Literal[
    "zero", "constant", "symmetric", "reflect", "periodic", "smooth", "antisymmetric", "antireflect", "periodization"
]


class Coefficients(NamedTuple):
    """A transform over several levels.

    Attributes:
        low: (B, C, *coarsest positions).
        highs: for each level, finest first, the other sub-bands (B, C, 2^d - 1, *positions) in the order of `subbands`.
    """

    low: Tensor
    highs: tuple[Tensor, ...]


def _auto_dwt(x: Tensor, wavelet: str | Wavelet = "haar", *rest: object) -> str:
    return _auto(x, x.shape[2:], _bank(wavelet))


def _auto_idwt(y: Tensor, wavelet: str | Wavelet = "haar", *rest: object) -> str:
    return _auto(y, [2 * length for length in y.shape[3:]], _bank(wavelet))


def _auto(x: Tensor, size: Sequence[int], wavelet: Wavelet) -> str:
    # Compilers fuse the additions; a captured graph must serve every size.
    if torch.compiler.is_compiling():
        return "slices" if _is_haar(wavelet) else "conv"
    if _is_haar(wavelet):
        return "patches" if x.device.type == "cpu" else "slices"
    # A product with a banded matrix wastes most of its multiplications, but is up to ten times faster at each of them.
    return "matrix" if max(size) <= 64 + 12 * wavelet.length else "conv"


_analyses = Backends("dwt", auto=_auto_dwt)
_syntheses = Backends("idwt", auto=_auto_idwt)


def dwt(x: Tensor, wavelet: str | Wavelet = "haar", mode: Mode = "symmetric", *, backend: str = "auto") -> Tensor:
    """One level of the transform: low-pass and high-pass filter along every position axis, every other sample kept.

    Along an axis of N samples, with filters h of L taps, y[k] = sum_j h[j] x[2k + 1 - j] for
    k < floor((N + L - 1) / 2), where `Mode` tells what x is beyond its ends. With ``periodization``,
    y[k] = sum_j h[j] x[2k + L/2 - j] for k < ceil(N / 2).

    Args:
        x: (B, C, *positions), real, with one, two or three position axes.
        wavelet: name of a wavelet, or one of your own.
        mode: what lies beyond the ends. Haar on even sizes needs nothing beyond.
        backend: ``auto``, ``naive`` (the sums above), ``conv`` (strided convolutions), ``matrix`` (a product with a
            banded matrix for each axis; the boundary is part of it), and for Haar ``slices`` (sums and differences of
            neighbours) and ``patches`` (a product of each 2 x 2 patch with a matrix).

    Returns:
        (B, C, 2^d, *halved positions), the sub-bands in the order of `subbands`.

    Raises:
        ValueError: x has a wrong number of axes, no samples, or is not real.
        UnknownName: there is no such wavelet or mode.
        Unsupported: the backend cannot serve the call.
    """
    if not 3 <= x.dim() <= 5:
        raise ValueError(f"x must be (B, C, L), (B, C, H, W) or (B, C, D, H, W), got {x.dim()} dimensions")
    _check(x, x.shape[2:], mode)
    return _analyses.run(backend, x, _bank(wavelet), mode)


def idwt(
    y: Tensor,
    wavelet: str | Wavelet = "haar",
    mode: Mode = "symmetric",
    size: Sequence[int] | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """The inverse of `dwt`, which needs the mode only to tell ``periodization`` from the others.

    Along an axis of M coefficients of each kind: x[n] = sum_k (rec_lo[n + L - 2 - 2k] a[k] + rec_hi[...] d[k]) for
    n < 2M - L + 2; with ``periodization``, the same around a circle of 2M samples, with n + L/2 - 1 - 2k.

    Args:
        y: (B, C, 2^d, *positions), real, as `dwt` returns it.
        wavelet: name of a wavelet, or one of your own.
        mode: as for `dwt`.
        size: what to crop the result to; a signal of odd length gets one sample too many without it.
        backend: as for `dwt`.

    Returns:
        (B, C, *positions).

    Raises:
        ValueError: y has a wrong shape, is not real, or has too few coefficients for the wavelet, or size is not
            reached.
        UnknownName: there is no such wavelet or mode.
        Unsupported: the backend cannot serve the call.
    """
    dims = y.dim() - 3
    if not 1 <= dims <= 3 or y.shape[2] != 2**dims:
        raise ValueError(f"y must be (B, C, 2^d, *d positions) with d from 1 to 3, got {tuple(y.shape)}")
    _check(y, y.shape[3:], mode)
    bank = _bank(wavelet)
    least = 1 if mode == "periodization" else bank.length // 2
    if min(y.shape[3:]) < least:
        raise ValueError(f"y must have at least {least} positions along each axis, got {tuple(y.shape[3:])}")
    x = _syntheses.run(backend, y, bank, mode)
    return x if size is None else _cropped(x, size)


def wavedec(
    x: Tensor,
    wavelet: str | Wavelet = "haar",
    mode: Mode = "symmetric",
    levels: int = 1,
    *,
    backend: str = "auto",
) -> Coefficients:
    """Transform, and transform the low-pass band again, ``levels`` times in all.

    Args:
        x: (B, C, *positions), as `dwt` takes it.
        wavelet, mode, backend: as for `dwt`.
        levels: how often, at least 1; more than `max_level` adds nothing but the boundary.

    Raises:
        ValueError: levels is smaller than 1, or `dwt` refuses x.
    """
    if levels < 1:
        raise ValueError(f"levels must be at least 1, got {levels}")
    highs = []
    for _ in range(levels):
        bands = dwt(x, wavelet, mode, backend=backend)
        x = bands[:, :, 0]
        highs.append(bands[:, :, 1:])
    return Coefficients(x, tuple(highs))


def waverec(
    coefficients: Coefficients | tuple[Tensor, Sequence[Tensor]],
    wavelet: str | Wavelet = "haar",
    mode: Mode = "symmetric",
    size: Sequence[int] | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """The inverse of `wavedec`.

    Args:
        coefficients: the low-pass band and, finest first, the other bands of each level.
        wavelet, mode, backend: as for `wavedec`.
        size: of the signal; needed where it was odd.

    Raises:
        ValueError: there is no level, its bands do not fit together, or `idwt` refuses them.
    """
    low, highs = coefficients
    if not highs:
        raise ValueError("coefficients must have the bands of at least one level")
    for high in reversed(highs):
        positions = high.shape[3:]
        pairs = zip(low.shape[2:], positions, strict=False)
        if high.dim() != low.dim() + 1 or any(not 0 <= have - want <= 1 for have, want in pairs):
            raise ValueError(
                f"bands of shapes {tuple(low.shape)} and {tuple(high.shape)} are not of neighbouring levels"
            )
        low = idwt(torch.cat([_cropped(low, positions).unsqueeze(2), high], dim=2), wavelet, mode, backend=backend)
    return low if size is None else _cropped(low, size)


def subbands(dims: int) -> tuple[str, ...]:
    """Names of the 2^d sub-bands in order, a letter an axis: a where it is low-pass, d where it is high-pass.

    Images have aa, ad, da, dd: the second is smooth from top to bottom and has the differences from left to right.
    """
    return tuple("".join(letters) for letters in itertools.product("ad", repeat=dims))


def max_level(size: int | Sequence[int], wavelet: str | Wavelet) -> int:
    """How many levels have at least one coefficient that no boundary touches: floor(log2(N / (L - 1))), at least 0."""
    least = size if isinstance(size, int) else min(size)
    return max(0, int(math.log2(max(least, 1) / (_bank(wavelet).length - 1))))


# -- arguments ---------------------------------------------------------------------------------------------------------


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def _filters(name: str) -> tuple[tuple[float, ...], ...]:
    # A compiler cannot follow how they are computed, and need not.
    wavelet = find_wavelet(name)
    return wavelet.dec_lo, wavelet.dec_hi, wavelet.rec_lo, wavelet.rec_hi


def _bank(wavelet: str | Wavelet) -> Wavelet:
    if isinstance(wavelet, Wavelet):
        return wavelet
    return Wavelet(wavelet, *_filters(wavelet)) if torch.compiler.is_compiling() else find_wavelet(wavelet)


def _is_haar(wavelet: Wavelet) -> bool:
    root = math.sqrt(0.5)
    return wavelet.dec_lo == wavelet.rec_lo == (root, root) and wavelet.dec_hi == (-root, root)


def _check(tensor: Tensor, positions: Sequence[int], mode: str) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"the transform needs real floating point numbers, got {tensor.dtype}")
    if min(positions) < 1:
        raise ValueError(f"there must be at least one position along each axis, got {tuple(positions)}")
    if mode not in get_args(Mode):
        raise unknown("mode", mode, get_args(Mode))


def _cropped(x: Tensor, size: Sequence[int]) -> Tensor:
    if len(size) != x.dim() - 2 or any(want > have for want, have in zip(size, x.shape[2:], strict=True)):
        raise ValueError(f"size must be at most {tuple(x.shape[2:])}, got {tuple(size)}")
    for axis, want in enumerate(size, start=2):
        x = x.narrow(axis, 0, want)
    return x


# -- boundaries --------------------------------------------------------------------------------------------------------


def _surrounded(x: Tensor, axis: int, length: int, mode: Mode) -> Tensor:
    """x with the samples around it that the filters reach; what is left is to filter and keep every other result."""
    odd = x.shape[axis] % 2
    if mode == "periodization":
        even = extend(x, axis, 0, odd, "constant")
        return extend(even, axis, length // 2 - 1, length // 2 - 1, "periodic")
    return extend(x, axis, length - 2, length - 2 + odd, mode)


def _circular(y: Tensor, axis: int, length: int, mode: Mode) -> tuple[Tensor, int]:
    """Coefficients with the neighbours that synthesis needs, and how many samples to drop from both ends of it."""
    if mode != "periodization":
        return y, length - 2
    around = length // 4
    return extend(y, axis, around, around, "periodic"), length // 2 - 1 + 2 * around


# -- the literal sums --------------------------------------------------------------------------------------------------


@_analyses.register("naive")
def _dwt_naive(x: Tensor, wavelet: Wavelet, mode: Mode) -> Tensor:
    bands = [x]
    for axis in range(2, x.dim()):
        bands = [part for band in bands for part in _split(band, axis, wavelet, mode)]
    return torch.stack(bands, dim=2)


def _split(x: Tensor, axis: int, wavelet: Wavelet, mode: Mode) -> tuple[Tensor, Tensor]:
    around = _surrounded(x, axis, wavelet.length, mode)
    count = (around.shape[axis] - wavelet.length) // 2 + 1
    low = high = torch.zeros_like(around.narrow(axis, 0, count))
    for tap, (lo, hi) in enumerate(zip(reversed(wavelet.dec_lo), reversed(wavelet.dec_hi), strict=True)):
        samples = around.index_select(axis, torch.arange(tap, tap + 2 * count, 2, device=x.device))
        low, high = low + lo * samples, high + hi * samples
    return low, high


@_syntheses.register("naive")
def _idwt_naive(y: Tensor, wavelet: Wavelet, mode: Mode) -> Tensor:
    bands = list(y.unbind(2))
    for axis in reversed(range(2, y.dim() - 1)):
        pairs = zip(bands[::2], bands[1::2], strict=True)
        bands = [_join(low, high, axis, wavelet, mode) for low, high in pairs]
    return bands[0]


def _join(low: Tensor, high: Tensor, axis: int, wavelet: Wavelet, mode: Mode) -> Tensor:
    terms = []
    for band, taps in ((low, wavelet.rec_lo), (high, wavelet.rec_hi)):
        around, drop = _circular(band, axis, wavelet.length, mode)
        spread = torch.stack([around, torch.zeros_like(around)], dim=axis + 1).flatten(axis, axis + 1)
        later = [0, 0] * (spread.dim() - 1 - axis)
        terms += [tap * F.pad(spread, (*later, at, len(taps) - 2 - at)) for at, tap in enumerate(taps)]
    x = torch.stack(terms).sum(0)
    return x.narrow(axis, drop, x.shape[axis] - 2 * drop)


# -- strided convolutions ----------------------------------------------------------------------------------------------


@_analyses.register("conv")
def _dwt_conv(x: Tensor, wavelet: Wavelet, mode: Mode) -> Tensor:
    channels = x.shape[1]
    kernel = _kernel(x, wavelet.dec_lo[::-1], wavelet.dec_hi[::-1])
    for axis in range(2, x.dim()):
        x = _convolved(_surrounded(x, axis, wavelet.length, mode), axis, kernel)
    return x.unflatten(1, (channels, -1))


@_syntheses.register("conv")
def _idwt_conv(y: Tensor, wavelet: Wavelet, mode: Mode) -> Tensor:
    kernel = _kernel(y, wavelet.rec_lo, wavelet.rec_hi)
    x = y.flatten(1, 2)
    for axis in reversed(range(2, x.dim())):
        around, drop = _circular(x, axis, wavelet.length, mode)
        x = _convolved(around, axis, kernel, drop)
    return x


def _kernel(x: Tensor, low: Sequence[float], high: Sequence[float]) -> Tensor:
    return torch.tensor([low, high], dtype=x.dtype, device=x.device)


def _convolved(x: Tensor, axis: int, kernel: Tensor, drop: int | None = None) -> Tensor:
    """Filter one axis of all channels: each becomes two or, for synthesis, which drops samples at the ends, two one."""
    last = axis == x.dim() - 1
    front = x if last else x.movedim(axis, 2)
    size = (math.prod(x.shape[2:-1]), x.shape[-1]) if last else (x.shape[axis], math.prod(front.shape[3:]))
    planes = front.reshape(*x.shape[:2], *size)
    groups = x.shape[1] if drop is None else x.shape[1] // 2
    weight = kernel.repeat(groups, 1).view(2 * groups, 1, *((1, -1) if last else (-1, 1)))
    stride = (1, 2) if last else (2, 1)
    with without_autocast(x):
        if drop is None:
            y = F.conv2d(planes, weight, stride=stride, groups=groups)
        else:
            padding = (0, drop) if last else (drop, 0)
            y = F.conv_transpose2d(planes, weight, stride=stride, padding=padding, groups=groups)
    if last:
        return y.reshape(*y.shape[:2], *x.shape[2:-1], y.shape[-1])
    return y.reshape(*y.shape[:3], *front.shape[3:]).movedim(2, axis)


# -- banded matrices ---------------------------------------------------------------------------------------------------


@_analyses.register("matrix")
def _dwt_matrix(x: Tensor, wavelet: Wavelet, mode: Mode) -> Tensor:
    dims = x.dim() - 2
    for axis in range(2, x.dim()):
        unit, kernel = _units(x, x.shape[axis], wavelet.dec_lo[::-1], wavelet.dec_hi[::-1])
        around = _surrounded(unit, 0, wavelet.length, mode)
        columns = F.conv1d(around.T.unsqueeze(1), kernel.unsqueeze(1), stride=2)  # (N, 2, M)
        x = _product(columns.permute(1, 2, 0).flatten(0, 1).to(x.dtype), x, axis)
    for axis in range(2, 2 + 2 * dims, 2):
        x = x.unflatten(axis, (2, x.shape[axis] // 2))
    bands, positions = range(2, 2 + 2 * dims, 2), range(3, 3 + 2 * dims, 2)
    return x.permute(0, 1, *bands, *positions).flatten(2, 1 + dims)


@_syntheses.register("matrix")
def _idwt_matrix(y: Tensor, wavelet: Wavelet, mode: Mode) -> Tensor:
    dims = y.dim() - 3
    x = y.unflatten(2, (2,) * dims)
    x = x.permute(0, 1, *(part for axis in range(dims) for part in (2 + axis, 2 + dims + axis)))
    for axis in range(2, 2 + dims):
        x = x.flatten(axis, axis + 1)
    for axis in range(2, 2 + dims):
        unit, kernel = _units(y, y.shape[axis + 1], wavelet.rec_lo, wavelet.rec_hi)
        around, drop = _circular(unit, 0, wavelet.length, mode)
        rows = F.conv_transpose1d(around.T.unsqueeze(1), kernel.unsqueeze(0), stride=2, padding=drop)  # (M, 2, N)
        x = _product(rows.permute(2, 1, 0).flatten(1).to(y.dtype), x, axis)
    return x


def _units(x: Tensor, count: int, low: Sequence[float], high: Sequence[float]) -> tuple[Tensor, Tensor]:
    """A signal for each sample that is one there and zero elsewhere, and the filters to apply to it."""
    unit = torch.eye(count, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    return unit, _kernel(unit, low, high)


def _product(matrix: Tensor, x: Tensor, axis: int) -> Tensor:
    with without_autocast(x):
        if axis == x.dim() - 1:
            return x @ matrix.T
        return (matrix @ x.flatten(axis + 1)).unflatten(-1, x.shape[axis + 1 :])


# -- Haar --------------------------------------------------------------------------------------------------------------


def _refuses_others(x: Tensor, wavelet: str | Wavelet = "haar", *rest: object) -> str | None:
    bank = _bank(wavelet)
    return None if _is_haar(bank) else f"it computes Haar only, got {bank.name}"


def _halves(x: Tensor, mode: Mode) -> Tensor:
    """(B, C, N1, 2, N2, 2, ...): the samples of each axis in pairs."""
    dims = x.dim() - 2
    for axis in range(2, 2 + dims):
        x = _surrounded(x, axis, 2, mode)
    for axis in range(2, 2 + 2 * dims, 2):
        x = x.unflatten(axis, (x.shape[axis] // 2, 2))
    return x


def _sum_and_difference(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    return first + second, first - second


@_analyses.register("slices", refuses=_refuses_others)
def _dwt_slices(x: Tensor, wavelet: Wavelet, mode: Mode) -> Tensor:
    dims = x.dim() - 2
    bands = [_halves(x, mode)]
    for axis in range(3, 3 + dims):
        bands = [part for band in bands for part in _sum_and_difference(*band.unbind(axis))]
    return torch.stack(bands, dim=2) * 2 ** (-dims / 2)


@_syntheses.register("slices", refuses=_refuses_others)
def _idwt_slices(y: Tensor, wavelet: Wavelet, mode: Mode) -> Tensor:
    dims = y.dim() - 3
    bands = list((y * 2 ** (-dims / 2)).unbind(2))
    for axis in reversed(range(2, 2 + dims)):
        pairs = zip(bands[::2], bands[1::2], strict=True)
        bands = [torch.stack(_sum_and_difference(*pair), dim=axis + 1).flatten(axis, axis + 1) for pair in pairs]
    return bands[0]


@_analyses.register("patches", refuses=_refuses_others)
def _dwt_patches(x: Tensor, wavelet: Wavelet, mode: Mode) -> Tensor:
    dims = x.dim() - 2
    x = _halves(x, mode)
    places, positions = range(3, 3 + 2 * dims, 2), range(2, 2 + 2 * dims, 2)
    patches = x.permute(0, 1, *places, *positions).flatten(2, 1 + dims)
    with without_autocast(x):
        return (_haar_matrix(x, dims) @ patches.flatten(3)).unflatten(-1, patches.shape[3:])


@_syntheses.register("patches", refuses=_refuses_others)
def _idwt_patches(y: Tensor, wavelet: Wavelet, mode: Mode) -> Tensor:
    dims = y.dim() - 3
    with without_autocast(y):
        patches = (_haar_matrix(y, dims) @ y.flatten(3)).unflatten(-1, y.shape[3:]).unflatten(2, (2,) * dims)
    x = patches.permute(0, 1, *(part for axis in range(dims) for part in (2 + dims + axis, 2 + axis)))
    for axis in range(2, 2 + dims):
        x = x.flatten(axis, axis + 1)
    return x


def _haar_matrix(x: Tensor, dims: int) -> Tensor:
    """The orthogonal and symmetric matrix that maps the samples of a patch to its coefficients, and back."""
    signs = one = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=x.dtype, device=x.device)
    for _ in range(dims - 1):
        signs = torch.kron(signs, one)
    return signs * 2 ** (-dims / 2)
