"""Filters of wavelet scattering, as Fourier transforms: Morlet wavelets in 1-D and 2-D, solid harmonics in 3-D.

Mallat: "Group invariant scattering", 2012; Anden, Mallat: "Deep scattering spectrum", 2014; Eickenberg, Exarchakis,
Hirn, Mallat, Thiry: "Solid harmonic wavelet scattering for predictions of molecule properties", 2018, arXiv 1805.00571.
Every constant is that of Kymatio, so that features computed there and here are the same.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["Harmonics", "Morlet1D", "Morlet2D", "Wave1D", "Wave2D", "harmonics", "morlet_1d", "morlet_2d"]

_Array = npt.NDArray[np.float64]


# -- one dimension -----------------------------------------------------------------------------------------------------

_SIGMA_0 = 0.1
_ALPHA = 5.0
_R_PSI = math.sqrt(0.5)
_TAIL = 1e-3
_SEEN = 1e-18


@dataclass(frozen=True, eq=False)
class Wave1D:
    """A Morlet wavelet of a signal.

    Attributes:
        xi: its centre frequency, in cycles a sample.
        sigma: its bandwidth.
        j: the signal filtered by it can be subsampled by 2^j.
        levels: its Fourier transform (N / 2^r) for signals that were subsampled by 2^r.
        aliases: for each level, of the parts of the spectrum that fall onto each other when the filtered signal is
            subsampled, those in which there is anything of the wavelet.
    """

    xi: float
    sigma: float
    j: int
    levels: tuple[Tensor, ...]
    aliases: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class Morlet1D:
    """What scattering of a signal needs, made by `morlet_1d`.

    Attributes:
        length: of the signal.
        padded: of the signal with what is put around it.
        left: samples put before it.
        log2_stride: of the averaged output; None where the output is not averaged locally.
        average: ``local``, ``global`` (the sum over all samples) or ``none``.
        phi: Fourier transform of the low pass, (padded / 2^r) for level r.
        psi1, psi2: wavelets of the first and second order.
        paths: indices of the wavelets of every path: the empty one, those of order 1, those of order 2.
        short: whether the signal could not be padded as far as the low pass reaches.
    """

    length: int
    padded: int
    left: int
    log2_stride: int | None
    average: str
    phi: tuple[Tensor, ...]
    psi1: tuple[Wave1D, ...]
    psi2: tuple[Wave1D, ...]
    paths: tuple[tuple[int, ...], ...]
    short: bool

    def crop(self, level: int) -> slice:
        """Where the signal lies among the padded samples, after subsampling by 2^level."""
        first, last = self.left, self.left + self.length
        for _ in range(level):
            first, last = (first + 1) // 2, (last + 1) // 2
        return slice(first, last)

    def level(self, j: int) -> int:
        """log2 of the stride at which the modulus of a wavelet of scale j is kept."""
        return j if self.log2_stride is None else min(j, self.log2_stride)

    def lengths(self) -> tuple[int, ...]:
        """Samples of the output of every path."""
        if self.average == "global":
            return (1,) * len(self.paths)
        sizes = []
        for path in self.paths:
            last = (self.psi1, self.psi2)[len(path) - 1][path[-1]].j if path else 0
            crop = self.crop(last if self.log2_stride is None else self.log2_stride)
            sizes.append(crop.stop - crop.start)
        return tuple(sizes)


def morlet_1d(
    length: int,
    J: int,
    Q: tuple[int, int],
    T: float,
    *,
    average: str,
    log2_stride: int | None,
    max_order: int,
    legacy_energy: bool = False,
) -> Morlet1D:
    """The filters of scattering in one dimension.

    Args:
        length: of the signal.
        J: log2 of the largest scale.
        Q: wavelets an octave, of the first and the second order.
        T: samples that the low pass averages over.
        average: ``local``, ``global`` or ``none``.
        log2_stride: log2 of the stride of the output, for ``local``.
        max_order: 1 or 2.
        legacy_energy: divide the filters of subsampled signals by the factor, as Kymatio 0.3.0 did; it makes
            coefficients smaller by the strides of the moduli, 2^j1 in the first order and 2^(j1 + j2) in the second.
    """
    reach = 3 * _tail_length(_low_pass(length, _SIGMA_0 / T))
    # Reflection cannot put more than length - 1 samples on either side.
    wanted, most = math.ceil(math.log2(length + 2 * reach)), math.floor(math.log2(max(3 * length - 2, 1)))
    padded = 2 ** min(wanted, most)
    first, second = ([(xi, sigma, _scale(xi, sigma)) for xi, sigma in _constant_q(J, wavelets)] for wavelets in Q)

    def waves(parameters: Sequence[tuple[float, float, int]], deepest: int) -> tuple[Wave1D, ...]:
        found = []
        for xi, sigma, j in parameters:
            psi = _morlet(padded, xi, sigma)
            kept = j if log2_stride is None else min(j, log2_stride)
            levels = [_folded(psi, r, legacy_energy) for r in range(max(min(j - 1, deepest), 0) + 1)]
            aliases = tuple(_aliases(level, max(kept - r, 0)) for r, level in enumerate(levels))
            found.append(Wave1D(xi, sigma, j, tuple(_tensor(level) for level in levels), aliases))
        return tuple(found)

    highest = max((j for _, _, j in first), default=0)
    phi = _low_pass(padded, _SIGMA_0 / T)
    psi1, psi2 = waves(first, 0), waves(second, highest) if max_order == 2 else ()
    return Morlet1D(
        length=length,
        padded=padded,
        left=(padded - length) // 2,
        log2_stride=log2_stride,
        average=average,
        phi=tuple(_tensor(_folded(phi, r, legacy_energy)) for r in range((log2_stride or 0) + 1)),
        psi1=psi1,
        psi2=psi2,
        paths=_paths([wave.j for wave in psi1], [wave.j for wave in psi2]),
        short=wanted > most,
    )


def _paths(first: Sequence[int], second: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The empty path, those of order 1 and those of order 2, whose second wavelet has the larger scale."""
    pairs = itertools.product(range(len(first)), range(len(second)))
    return ((), *((n,) for n in range(len(first))), *((a, b) for a, b in pairs if second[b] > first[a]))


def _constant_q(J: int, wavelets: int) -> list[tuple[float, float]]:
    """Centre frequencies and bandwidths: geometric down to the smallest bandwidth, then at equal distances."""
    ratio = 2 ** (1 / wavelets)
    xi = max(1 / (1 + 2 ** (3 / wavelets)), 0.35)
    sigma = xi * (1 - 1 / ratio) / (1 + 1 / ratio) / math.sqrt(2 * math.log(1 / _R_PSI))
    least = _SIGMA_0 / 2**J
    found = []
    if sigma <= least:
        elbow = sigma
    else:
        found.append((xi, sigma))
        while sigma > least * ratio:
            xi, sigma = xi / ratio, sigma / ratio
            found.append((xi, sigma))
        elbow = xi
    return found + [(elbow * (1 - q / wavelets), least) for q in range(1, wavelets)]


def _scale(xi: float, sigma: float) -> int:
    return math.floor(-math.log2(min(abs(xi) + _ALPHA * sigma, 0.5))) - 1


def _gaussian(length: int, xi: float, sigma: float) -> _Array:
    """A Gaussian around xi on the circle of frequencies, of as many turns as it can be seen on."""
    turns = int(min(math.ceil(1 + math.sqrt(-2 * sigma**2 * math.log(1e-7))), 5))
    if turns == 1:
        return np.asarray(np.exp(-((np.fft.fftfreq(length) - xi) ** 2) / (2 * sigma**2)))
    frequencies = np.arange((1 - turns) * length, turns * length) / length
    return np.exp(-((frequencies - xi) ** 2) / (2 * sigma**2)).reshape(2 * turns - 1, length).mean(axis=0)


def _morlet(length: int, xi: float, sigma: float) -> _Array:
    gabor, low = _gaussian(length, xi, sigma), _gaussian(length, 0.0, sigma)
    psi = gabor - gabor[0] / low[0] * low
    return np.asarray(psi / np.abs(np.fft.ifft(psi)).sum())


def _low_pass(length: int, sigma: float) -> _Array:
    phi = _gaussian(length, 0.0, sigma)
    return np.asarray(phi / np.abs(np.fft.ifft(phi)).sum())


def _tail_length(phi: _Array) -> int:
    """How far a filter reaches in time: until what is left has a sum of a thousandth."""
    response = np.abs(np.fft.ifft(phi))[: max(len(phi) // 2, 1)]
    left = response[::-1].cumsum()[::-1]
    small = np.flatnonzero(left <= _TAIL)
    return int(small[0]) + 1 if len(small) else len(response)


def _folded(spectrum: _Array, level: int, mean: bool) -> _Array:
    """The Fourier transform of a filter for signals that were subsampled by 2^level."""
    parts = spectrum.reshape(2**level, -1)
    return np.asarray(parts.mean(axis=0) if mean else parts.sum(axis=0))


def _aliases(spectrum: _Array, log2_step: int) -> tuple[int, ...]:
    """Which of 2^log2_step equal parts of a spectrum can be seen in float64."""
    largest = np.abs(spectrum).reshape(2**log2_step, -1).max(axis=1)
    return tuple(int(part) for part in np.flatnonzero(largest > _SEEN * largest.max()))


def _tensor(values: _Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))


# -- two dimensions ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Wave2D:
    """A Morlet wavelet of an image.

    Attributes:
        j: its scale.
        theta: index of its orientation.
        levels: its Fourier transform, real, (H / 2^r, W / 2^r) for maps that were subsampled by 2^r.
    """

    j: int
    theta: int
    levels: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Morlet2D:
    """What scattering of an image needs, made by `morlet_2d`.

    Attributes:
        shape: size of the image.
        padded: of the image with what is put around it; both sides are multiples of 2^J.
        margins: samples put (above, below) and (left, right).
        J: log2 of the stride of the output.
        max_order: 1 or 2.
        pre_pad: whether the image comes with its margins.
        phi: Fourier transform of the low pass, real, (H / 2^r, W / 2^r) for level r.
        low: for level r and each axis, the matrix (output, padded / 2^r) that averages, subsamples and crops.
        psi: the wavelets, scale by scale.
        paths: indices of the wavelets of every path: the empty one, those of order 1, those of order 2.
    """

    shape: tuple[int, int]
    padded: tuple[int, int]
    margins: tuple[tuple[int, int], tuple[int, int]]
    J: int
    max_order: int
    pre_pad: bool
    phi: tuple[Tensor, ...]
    low: tuple[tuple[Tensor, Tensor], ...]
    psi: tuple[Wave2D, ...]
    paths: tuple[tuple[int, ...], ...]

    @property
    def output(self) -> tuple[int, int]:
        """Size of the averaged maps."""
        return self.shape[0] // 2**self.J, self.shape[1] // 2**self.J


def morlet_2d(shape: tuple[int, int], J: int, L: int, *, max_order: int, pre_pad: bool = False) -> Morlet2D:
    """The filters of scattering in two dimensions.

    Args:
        shape: size of the image, without margins.
        J: log2 of the largest scale.
        L: number of orientations.
        max_order: 1 or 2.
        pre_pad: the image will come with its margins.
    """
    step = 2**J
    height, width = ((size + step) // step * step + step for size in shape)
    padded = height, width
    top, left = ((wide - size) // 2 for size, wide in zip(shape, padded, strict=True))
    margins = (top, height - shape[0] - top), (left, width - shape[1] - left)
    waves = []
    for j, index in itertools.product(range(J), range(L)):
        theta = (int(L - L / 2 - 1) - index) * math.pi / L
        psi = np.fft.fft2(_morlet_2d(padded, 0.8 * 2**j, theta, 0.75 * math.pi / 2**j, 4 / L)).real
        levels = range(min(j + 1, max(J - 1, 1)))
        waves.append(Wave2D(j, index, tuple(_tensor(_folded_2d(psi, r)) for r in levels)))
    phi = np.fft.fft2(_gabor(padded, 0.8 * 2 ** (J - 1), 0.0, 0.0, 1.0)).real
    lows = [_folded_2d(phi, r) for r in range(J)]
    return Morlet2D(
        shape=shape,
        padded=padded,
        margins=margins,
        J=J,
        max_order=max_order,
        pre_pad=pre_pad,
        phi=tuple(_tensor(low) for low in lows),
        low=tuple(_averaging(low, 2 ** (J - r)) for r, low in enumerate(lows)),
        psi=tuple(waves),
        paths=_paths([wave.j for wave in waves], [wave.j for wave in waves] if max_order == 2 else []),
    )


def _gabor(grid: tuple[int, int], sigma: float, theta: float, xi: float, slant: float) -> npt.NDArray[np.complex128]:
    """A plane wave under a Gaussian that begins at the corner of the grid, made periodic by its 25 nearest copies."""
    rotation = np.array([[math.cos(theta), -math.sin(theta)], [math.sin(theta), math.cos(theta)]])
    curvature = rotation @ np.diag([1.0, slant**2]) @ rotation.T / (2 * sigma**2)
    total = np.zeros(grid, dtype=np.complex128)
    for shifts in itertools.product(range(-2, 3), repeat=2):
        y, x = (
            np.arange(shift * size, (shift + 1) * size, dtype=np.float64).reshape(form)
            for shift, size, form in zip(shifts, grid, ((-1, 1), (1, -1)), strict=True)
        )
        envelope = curvature[0, 0] * y**2 + (curvature[0, 1] + curvature[1, 0]) * y * x + curvature[1, 1] * x**2
        total += np.exp(-envelope + 1j * xi * (y * math.cos(theta) + x * math.sin(theta)))
    return total / (2 * 3.1415 * sigma**2 / slant)  # not pi, as in the reference


def _morlet_2d(
    grid: tuple[int, int], sigma: float, theta: float, xi: float, slant: float
) -> npt.NDArray[np.complex128]:
    gabor, envelope = _gabor(grid, sigma, theta, xi, slant), _gabor(grid, sigma, theta, 0.0, slant)
    return np.asarray(gabor - gabor.sum() / envelope.sum() * envelope)


def _folded_2d(spectrum: _Array, level: int) -> _Array:
    """The Fourier transform of a filter for maps that were subsampled by 2^level, from its lower frequencies only."""
    step = 2**level
    kept = spectrum
    for axis, size in enumerate(spectrum.shape):
        first = int(size / (2 * step))
        inside = np.ones(size)
        inside[first : first + int(size * (1 - 1 / step))] = 0
        kept = kept * inside.reshape((-1, 1) if axis == 0 else (1, -1))
    height, width = (size // step for size in spectrum.shape)
    return np.asarray(kept.reshape(step, height, step, width).sum(axis=(0, 2)))


def _averaging(phi: _Array, step: int) -> tuple[Tensor, Tensor]:
    """The low pass that keeps every ``step``-th sample but the outermost, as a product of two matrices.

    It is one because its Gaussian is round.
    """
    matrices = []
    for spectrum in (phi[:, 0] / phi[0, 0], phi[0]):
        response = np.fft.ifft(spectrum).real
        kept = np.arange(step, len(response) - step, step)
        matrices.append(_tensor(response[(kept[:, None] - np.arange(len(response))) % len(response)]))
    return matrices[0], matrices[1]


# -- three dimensions --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Harmonics:
    """What solid harmonic scattering of a volume needs, made by `harmonics`.

    Attributes:
        shape: size of the volume.
        J: log2 of the largest scale over the smallest.
        L: largest degree.
        max_order: 1 or 2.
        rotation_covariant: whether all orders m of a degree are joined.
        powers: exponents of the integrals.
        psi: for degree l and scale j, complex, (2 l + 1, *shape); (1, *shape) if not rotation_covariant.
        paths: scales of every path: those of order 1, those of order 2.
    """

    shape: tuple[int, int, int]
    J: int
    L: int
    max_order: int
    rotation_covariant: bool
    powers: tuple[float, ...]
    psi: tuple[tuple[Tensor, ...], ...]
    paths: tuple[tuple[int, ...], ...]


def harmonics(
    shape: tuple[int, int, int],
    J: int,
    L: int,
    sigma_0: float,
    *,
    max_order: int,
    rotation_covariant: bool,
    powers: tuple[float, ...],
    legacy_grid: bool = False,
) -> Harmonics:
    """The filters (|w| s)^l exp(-(|w| s)^2 / 2) Y_lm(w) c_l of solid harmonic scattering, s = sigma_0 2^j.

    Args:
        shape: size of the volume.
        J: there are J + 1 scales.
        L: largest degree l.
        sigma_0: smallest width, in samples.
        max_order, rotation_covariant, powers: see `Harmonics`.
        legacy_grid: along axes of odd size, take every frequency one step too low, as Kymatio does.
    """
    shifts = [1 / size if legacy_grid and size % 2 else 0.0 for size in shape]
    axes = [2 * math.pi * (np.fft.fftfreq(size) - shift) for size, shift in zip(shape, shifts, strict=True)]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    radius = np.sqrt(x**2 + y**2 + z**2)
    azimuth, polar = np.arctan2(y, x), np.arctan2(z, np.hypot(x, y)) + math.pi / 2
    psi = []
    for degree in range(L + 1):
        angular = [np.ones_like(radius)] if degree == 0 else _spherical_harmonics(degree, polar, azimuth)
        if not rotation_covariant:
            angular = angular[:1]
        scales = []
        for j in range(J + 1):
            scaled = radius * sigma_0 * 2**j
            radial = _factor(degree) * scaled**degree * np.exp(-(scaled**2) / 2)
            scales.append(torch.from_numpy(np.stack([radial * part for part in angular]).astype(np.complex128)))
        psi.append(tuple(scales))
    scales_of = range(J + 1)
    paths = (*((j,) for j in scales_of), *(itertools.combinations(scales_of, 2) if max_order == 2 else ()))
    return Harmonics(shape, J, L, max_order, rotation_covariant, powers, tuple(psi), paths)


def _factor(degree: int) -> complex:
    """The constant c_l of a solid harmonic in the Fourier domain."""
    if degree == 0:
        return 1.0
    if degree % 2 == 0:
        norm = 2 * math.pi * math.sqrt(degree + 0.5) * math.prod(range(1, degree + 2, 2))
    else:
        norm = 2 ** ((degree + 3) / 2) * math.sqrt(math.pi * (2 * degree + 1)) * math.factorial((degree + 1) // 2)
    return (2 * math.pi) ** 1.5 * (-1j) ** degree / norm


def _spherical_harmonics(degree: int, polar: _Array, azimuth: _Array) -> list[npt.NDArray[np.complex128]]:
    """Y_lm for m = -l to l, orthonormal on the sphere, with the Condon-Shortley phase."""
    cosine, sine = np.cos(polar), np.sin(polar)
    found: dict[int, npt.NDArray[np.complex128]] = {}
    for order in range(degree + 1):
        # The associated Legendre function: its first, for the degree of the order, then by ascending degree.
        legendre = (-1.0) ** order * math.prod(range(1, 2 * order, 2)) * sine**order
        before = np.zeros_like(legendre)
        for current in range(order + 1, degree + 1):
            after = ((2 * current - 1) * cosine * legendre - (current + order - 1) * before) / (current - order)
            before, legendre = legendre, after
        norm = math.sqrt(
            (2 * degree + 1) / (4 * math.pi) * math.factorial(degree - order) / math.factorial(degree + order)
        )
        found[order] = norm * legendre * np.exp(1j * order * azimuth)
        found[-order] = (-1) ** order * found[order].conj()
    return [found[order] for order in range(-degree, degree + 1)]
