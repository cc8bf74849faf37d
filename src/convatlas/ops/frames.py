"""Semi-discrete frames on a periodic grid: wavelets, Weyl-Heisenberg, curvelets, shearlets, ridgelets, learned filters.

Wiatowski, Boelcskei: "A Mathematical Theory of Deep Convolutional Neural Networks for Feature Extraction", IEEE Trans.
Information Theory 2018, arXiv 1512.06293. A frame {T_b I g_l} is given by the Fourier transforms of its atoms g_l on
the grid of the discrete Fourier transform; one of them, which gives the output of a layer, stands apart. The
constructions are tight: their Littlewood-Paley sum is 1 at every frequency. Frequencies xi = k / N run from -1/2 to
1/2, the Nyquist frequency is -1/2, as in numpy and torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from convatlas.ops.wavelet_filters import find_wavelet

__all__ = [
    "Frame",
    "atrous",
    "cone",
    "learned",
    "meyer",
    "polar",
    "tensor_atrous",
    "weyl_heisenberg",
]


@dataclass(frozen=True, eq=False)
class Frame:
    """Fourier transforms of the atoms of a frame, on one grid.

    Attributes:
        atom: (*grid), the output-generating atom chi; real or complex.
        filters: (n, *grid), the others.
    """

    atom: Tensor
    filters: Tensor

    def __post_init__(self) -> None:
        if self.filters.shape[1:] != self.atom.shape or not self.filters.shape[0]:
            raise ValueError(
                f"filters must be (n, *{tuple(self.atom.shape)}) with at least one, got {tuple(self.filters.shape)}"
            )

    @property
    def grid(self) -> tuple[int, ...]:
        """Size of the signals."""
        return tuple(self.atom.shape)

    def lp_sum(self) -> Tensor:
        """The Littlewood-Paley sum: the sum of the squared absolute values of all atoms, at every frequency."""
        return self.atom.abs().square() + self.filters.abs().square().sum(0)

    def bounds(self) -> tuple[float, float]:
        """The frame bounds A and B: A ||f||^2 <= sum_l ||f * g_l||^2 <= B ||f||^2 for every signal f on the grid."""
        total = self.lp_sum()
        return float(total.min()), float(total.max())

    def is_parseval(self, tolerance: float = 1e-10) -> bool:
        """Whether A = B = 1, so that the energy of the signal is that of all its convolutions."""
        lower, upper = self.bounds()
        return abs(lower - 1) <= tolerance and abs(upper - 1) <= tolerance

    @property
    def is_real(self) -> bool:
        """Whether the atoms are real in space, so that they keep real signals real."""
        largest = max(float(part.abs().max()) for part in (self.atom, self.filters))
        parts = (self.atom.unsqueeze(0), self.filters)
        return all(float((part - _mirrored(part).conj()).abs().max()) <= 1e-10 * largest for part in parts)

    def scaled(self, c: float) -> Frame:
        """The frame of the atoms times c^(-1/2); with c = B the upper bound becomes 1.

        Raises:
            ValueError: c is not positive.
        """
        if not c > 0:
            raise ValueError(f"c must be positive, got {c}")
        return Frame(self.atom / math.sqrt(c), self.filters / math.sqrt(c))

    def decay_constant(self) -> float:
        """K, the largest |chi(xi)| |xi| of the output-generating atom, in the bound on vertical invariance."""
        squares = [xi.square() for xi in _frequencies(self.grid)]
        return float((self.atom.abs() * sum(squares, torch.zeros(self.grid, dtype=torch.float64)).sqrt()).max())


def meyer(shape: int | Sequence[int], J: int, analytic: bool = True) -> Frame:
    """Meyer wavelets of a signal: bands of one octave, the finest first, and the low pass that is left.

    Args:
        shape: length of the signal.
        J: number of octaves.
        analytic: split each band into its positive and its negative frequencies, in this order.
    """
    (length,) = _grid(shape, 1)
    _at_least("J", J, 1)
    (xi,) = _frequencies((length,))
    r = xi.abs()
    filters = []
    for j in range(J):
        band = _band(r, j)
        filters += [band * (xi > 0), band * (xi < 0)] if analytic else [band]
    return Frame(_low(r, J), torch.stack(filters))


def weyl_heisenberg(shape: int | Sequence[int], M: int) -> Frame:
    """M windows of equal width on the circle of frequencies, and their products on two axes; the first is the atom.

    Args:
        shape: size of the signal or image.
        M: number of windows along each axis, at least 2.
    """
    grid = _grid(shape, 1, 2)
    _at_least("M", M, 2)
    windows = [
        torch.stack([torch.cos(math.pi / 2 * _step(M * _wrapped(xi.flatten() - m / M).abs())) for m in range(M)])
        for xi in _frequencies(grid)
    ]
    atoms = windows[0] if len(grid) == 1 else torch.einsum("ax,by->abxy", *windows).flatten(0, 1)
    return Frame(atoms[0], atoms[1:])


def atrous(shape: int | Sequence[int], J: int, wavelet: str = "haar") -> Frame:
    """The undecimated transform of a signal by an orthogonal wavelet: high passes of J levels, the finest first.

    Args:
        shape: length of the signal.
        J: number of levels.
        wavelet: name of an orthogonal wavelet, see `convatlas.ops.wavelet_filters`.
    """
    (length,) = _grid(shape, 1)
    _at_least("J", J, 1)
    (xi,) = _frequencies((length,))
    low, filters = torch.ones(length, dtype=torch.complex128), []
    for j in range(J):
        lowpass, highpass = _responses(2**j * xi, wavelet)
        filters.append(low * highpass)
        low = low * lowpass
    return Frame(low, torch.stack(filters))


def tensor_atrous(shape: Sequence[int], J: int, wavelet: str = "haar") -> Frame:
    """The same for images, as products along the axes: of each level low-high, high-low and high-high.

    Args:
        shape: size of the image.
        J: number of levels.
        wavelet: name of an orthogonal wavelet.
    """
    grid = _grid(shape, 2)
    _at_least("J", J, 1)
    first, second = _frequencies(grid)
    low, filters = torch.ones(grid, dtype=torch.complex128), []
    for j in range(J):
        (low_a, high_a), (low_b, high_b) = (_responses(2**j * xi, wavelet) for xi in (first, second))
        filters += [low * low_a * high_b, low * high_a * low_b, low * high_a * high_b]
        low = low * low_a * low_b
    return Frame(low, torch.stack(filters))


def polar(shape: Sequence[int], J: int, K0: int = 8, alpha: float = 0.5, real: bool = False) -> Frame:
    """Rings of one octave, cut into sectors: directional wavelets, curvelets or ridgelets.

    Band j, from the finest 0 to J - 1, has K0 2^floor((1 - alpha) (J - 1 - j)) sectors.

    Args:
        shape: size of the image.
        J: number of octaves.
        K0: number of sectors of the coarsest band.
        alpha: 1 for directional wavelets, 1/2 for curvelets, 0 for ridgelets.
        real: join opposite sectors, so that the atoms are real in space; then K0 is even and at least 4.
    """
    first, second = _frequencies(_grid(shape, 2))
    turn = (torch.atan2(second, first.expand_as(first + second)) / (2 * math.pi)) % 1
    return _directional(torch.hypot(first, second), turn, J, K0, alpha, real)


def cone(shape: Sequence[int], J: int, K0: int = 8, alpha: float = 0.5, real: bool = False) -> Frame:
    """Square rings of one octave, cut into sectors by slope: shearlets, with the seams between the two cones.

    Args:
        shape, J, K0, alpha, real: as for `polar`; alpha = 1/2 for shearlets.
    """
    first, second = torch.broadcast_tensors(*_frequencies(_grid(shape, 2)))
    flat = second.abs() <= first.abs()
    slope = torch.where(flat, second, first) / torch.where(flat, first, second)
    slope = torch.where((first == 0) & (second == 0), 0.0, slope)
    turn = torch.where(
        flat,
        torch.where(first >= 0, slope, 4 + slope),
        torch.where(second > 0, 2 - slope, 6 - slope),
    )
    return _directional(torch.maximum(first.abs(), second.abs()), (turn / 8) % 1, J, K0, alpha, real)


def learned(shape: int | Sequence[int], weight: Tensor, atom: int | Tensor = 0) -> Frame:
    """The kernels of a convolution as a frame; in general it is not tight, and its bounds have to be measured.

    Args:
        shape: size of the signal, image or volume.
        weight: (n, 1, *kernel) or (n, *kernel), no longer than the grid; padded with zeros behind.
        atom: which kernel gives the output, or the Fourier transform (*grid) of a low pass that does.

    Raises:
        ValueError: the weight has another number of axes, is larger than the grid, or has no kernel left.
    """
    grid = _grid(shape, 1, 2, 3)
    kernels = weight.detach().to(torch.float64)
    if kernels.dim() == len(grid) + 2 and kernels.shape[1] == 1:
        kernels = kernels.squeeze(1)
    if kernels.dim() != len(grid) + 1 or any(k > n for k, n in zip(kernels.shape[1:], grid, strict=True)):
        raise ValueError(f"weight must be (n, 1, *kernel), no larger than {grid}, got {tuple(weight.shape)}")
    filters = torch.fft.fftn(kernels, s=grid, dim=tuple(range(1, 1 + len(grid))))
    if isinstance(atom, Tensor):
        return Frame(atom, filters)
    index = range(len(filters))[atom]
    return Frame(filters[index], torch.cat([filters[:index], filters[index + 1 :]]))


# -- parts -------------------------------------------------------------------------------------------------------------


def _grid(shape: int | Sequence[int], *dims: int) -> tuple[int, ...]:
    grid = (shape,) if isinstance(shape, int) else tuple(shape)
    if len(grid) not in dims or min(grid) < 1:
        raise ValueError(f"shape must be {' or '.join(map(str, dims))} positive sizes, got {shape}")
    return grid


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _frequencies(grid: Sequence[int]) -> list[Tensor]:
    """The frequencies along each axis, shaped so that they spread over the grid."""
    dims = len(grid)
    return [
        torch.fft.fftfreq(n, dtype=torch.float64).view(*[1] * axis, -1, *[1] * (dims - 1 - axis))
        for axis, n in enumerate(grid)
    ]


def _step(x: Tensor) -> Tensor:
    """Meyer's smooth step nu from 0 to 1, with nu(x) + nu(1 - x) = 1."""
    x = x.clamp(0, 1)
    return x**4 * (35 - 84 * x + 70 * x**2 - 20 * x**3)


def _low(r: Tensor, j: int) -> Tensor:
    """1 up to a frequency of 1 / (3 2^j), 0 from twice that; 1 everywhere for j = 0."""
    return torch.cos(math.pi / 2 * _step(3 * 2**j * r - 1)) if j else torch.ones_like(r)


def _band(r: Tensor, j: int) -> Tensor:
    return (_low(r, j).square() - _low(r, j + 1).square()).clamp(min=0).sqrt()


def _wrapped(x: Tensor) -> Tensor:
    return x - torch.round(x)


def _mirrored(atoms: Tensor) -> Tensor:
    """(n, *grid) at the negative frequencies."""
    axes = tuple(range(1, atoms.dim()))
    return atoms.flip(axes).roll([1] * len(axes), axes)


def _responses(xi: Tensor, wavelet: str) -> tuple[Tensor, Tensor]:
    """Frequency responses of the scaling filter h and of g[n] = (-1)^n h[L - 1 - n], over sqrt(2)."""
    found = find_wavelet(wavelet)
    if not found.orthogonal:
        raise ValueError(f"wavelet must be orthogonal, got {wavelet}")
    h = torch.tensor(found.rec_lo, dtype=torch.complex128)
    taps = torch.arange(found.length)
    g = h.flip(0) * (1 - 2 * (taps % 2))
    phases = torch.exp(-2j * math.pi * xi.unsqueeze(-1) * taps)
    return phases @ h / math.sqrt(2), phases @ g / math.sqrt(2)


def _directional(r: Tensor, turn: Tensor, J: int, K0: int, alpha: float, real: bool) -> Frame:
    _at_least("J", J, 1)
    _at_least("K0", K0, 4 if real else 2)
    if real and K0 % 2:
        raise ValueError(f"K0 must be even for real atoms, got {K0}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 to 1, got {alpha}")
    filters = []
    for j in range(J):
        sectors = K0 * 2 ** math.floor((1 - alpha) * (J - 1 - j))
        windows = [torch.cos(math.pi / 2 * _step(sectors * _wrapped(turn - k / sectors).abs())) for k in range(sectors)]
        if real:
            windows = [windows[k] + windows[k + sectors // 2] for k in range(sectors // 2)]
        filters += [_band(r, j) * window for window in windows]
    atoms = torch.stack([_low(r, J), *filters])
    if real:
        # On the Nyquist lines of even grids a frequency and its negative are the same.
        atoms = ((atoms.square() + _mirrored(atoms).square()) / 2).sqrt()
    return Frame(atoms[0], atoms[1:])
