"""Analytic filters for images: Gabor, Gaussians and their derivatives, edges, texture banks, orthonormal bases.

"On filter design in deep convolutional neural network", 2024, and the textbook definitions that it surveys. Coordinates
are y (rows) and x (columns) in {-(k - 1) / 2, ..., (k - 1) / 2}; a bank is a tensor (m, k, k) in float64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from scipy.special import jn_zeros, jv
from torch import Tensor

from convatlas.errors import unknown

__all__ = [
    "EDGE_FILTERS",
    "dct_bank",
    "difference_of_gaussians",
    "expand_channels",
    "fourier_bessel_bank",
    "gabor",
    "gabor_bank",
    "gaussian",
    "gaussian_derivative",
    "haar_bank",
    "laplacian_of_gaussian",
    "lm_bank",
    "mr8",
    "rfs_bank",
    "schmid_bank",
    "steer",
    "steerable_basis",
    "walsh_hadamard_bank",
    "zero_mean_unit",
    "zigzag_order",
]


def _table(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


#: Small operators by name; those along x answer to vertical edges.
EDGE_FILTERS: dict[str, Tensor] = {
    "sobel_x": _table((-1, 0, 1), (-2, 0, 2), (-1, 0, 1)),
    "sobel_y": _table((-1, -2, -1), (0, 0, 0), (1, 2, 1)),
    "scharr_x": _table((-3, 0, 3), (-10, 0, 10), (-3, 0, 3)),
    "scharr_y": _table((-3, -10, -3), (0, 0, 0), (3, 10, 3)),
    "prewitt_x": _table((-1, 0, 1), (-1, 0, 1), (-1, 0, 1)),
    "prewitt_y": _table((-1, -1, -1), (0, 0, 0), (1, 1, 1)),
    "roberts_x": _table((1, 0), (0, -1)),
    "roberts_y": _table((0, 1), (-1, 0)),
    "laplacian4": _table((0, 1, 0), (1, -4, 1), (0, 1, 0)),
    "laplacian8": _table((1, 1, 1), (1, -8, 1), (1, 1, 1)),
}

#: sigma and tau of the filters of Schmid's bank.
_SCHMID = ((2, 1), (4, 1), (4, 2), (6, 1), (6, 2), (6, 3), (8, 1), (8, 2), (8, 3), (10, 1), (10, 2), (10, 3), (10, 4))


def _grid(k: int) -> tuple[Tensor, Tensor]:
    """y and x of each tap."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    places = torch.arange(k, dtype=torch.float64) - (k - 1) / 2
    y, x = torch.meshgrid(places, places, indexing="ij")
    return y, x


def _turned(k: int, theta: float) -> tuple[Tensor, Tensor]:
    """Coordinates along and across a direction: x' and y'."""
    y, x = _grid(k)
    return x * math.cos(theta) + y * math.sin(theta), y * math.cos(theta) - x * math.sin(theta)


def _positive(**sizes: float) -> None:
    for name, value in sizes.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive, got {value}")


def zero_mean_unit(filters: Tensor) -> Tensor:
    """Filters (..., k, k) with their means taken off and their sums of squares made 1."""
    centred = filters - filters.mean((-2, -1), keepdim=True)
    return centred / torch.linalg.vector_norm(centred, dim=(-2, -1), keepdim=True).clamp_min(1e-12)


def gabor(
    k: int, theta: float, wavelength: float, *, sigma: float | None = None, gamma: float = 0.5, psi: float = 0.0
) -> Tensor:
    """A wave along theta under a Gaussian, exp(-(x'^2 + gamma^2 y'^2) / 2 sigma^2) cos(2 pi x' / lambda + psi).

    Args:
        k: side of the filter.
        theta: direction of the wave in radians, from x to y.
        wavelength: lambda in pixels.
        sigma: of the Gaussian along the wave; 0.56 lambda when left out.
        gamma: how many times narrower the Gaussian is along than across.
        psi: phase.

    Raises:
        ValueError: a size is not positive.
    """
    sigma = 0.56 * wavelength if sigma is None else sigma
    _positive(wavelength=wavelength, sigma=sigma, gamma=gamma)
    along, across = _turned(k, theta)
    envelope = torch.exp(-(along**2 + gamma**2 * across**2) / (2 * sigma**2))
    return envelope * torch.cos(2 * math.pi * along / wavelength + psi)


def gabor_bank(
    k: int,
    wavelengths: Sequence[float] = (3.0, 5.0),
    phases: Sequence[float] = (0.0, math.pi / 2),
    orientations: int | Sequence[float] = 4,
    *,
    gamma: float = 0.5,
    normalised: bool = True,
) -> Tensor:
    """Gabor filters of all wavelengths, phases and orientations; the orientation changes fastest.

    Args:
        k: side of the filters.
        wavelengths, phases: in pixels and radians.
        orientations: how many, evenly spread over half a turn, or the angles themselves.
        gamma: as `gabor` takes it.
        normalised: whether filters have mean 0 and norm 1.
    """
    angles = (
        [i * math.pi / orientations for i in range(orientations)] if isinstance(orientations, int) else orientations
    )
    bank = torch.stack(
        [gabor(k, theta, length, gamma=gamma, psi=psi) for length in wavelengths for psi in phases for theta in angles]
    )
    return zero_mean_unit(bank) if normalised else bank


def gaussian(k: int, sigma: float) -> Tensor:
    """A Gaussian with the sum 1."""
    _positive(sigma=sigma)
    y, x = _grid(k)
    values = torch.exp(-(x**2 + y**2) / (2 * sigma**2))
    return values / values.sum()


def difference_of_gaussians(k: int, sigma: float, other: float) -> Tensor:
    """The Gaussian of sigma less the other, each with the sum 1."""
    return gaussian(k, sigma) - gaussian(k, other)


def laplacian_of_gaussian(k: int, sigma: float) -> Tensor:
    """-(1 - q) exp(-q) / (pi sigma^4) with q = (x^2 + y^2) / 2 sigma^2, less its mean."""
    _positive(sigma=sigma)
    y, x = _grid(k)
    q = (x**2 + y**2) / (2 * sigma**2)
    values = -(1 - q) * torch.exp(-q) / (math.pi * sigma**4)
    return values - values.mean()


def gaussian_derivative(k: int, sigma: float, order: int, theta: float = 0.0, *, across: float | None = None) -> Tensor:
    """Derivative of a Gaussian along a direction, not normalised.

    Args:
        k: side of the filter.
        sigma: along the direction.
        order: 0, 1 or 2.
        theta: direction in radians, from x to y.
        across: sigma across the direction; the same when left out.

    Raises:
        ValueError: the order is none of them, or a sigma is not positive.
    """
    across = sigma if across is None else across
    _positive(sigma=sigma, across=across)
    u, v = _turned(k, theta)
    base = torch.exp(-(u**2) / (2 * sigma**2) - v**2 / (2 * across**2)) / (2 * math.pi * sigma * across)
    factors = {0: torch.ones_like(u), 1: -u / sigma**2, 2: (u**2 - sigma**2) / sigma**4}
    if order not in factors:
        raise ValueError(f"order must be 0, 1 or 2, got {order}")
    return factors[order] * base


def steerable_basis(k: int, sigma: float, order: Literal[1, 2] = 1) -> Tensor:
    """Filters of which sums are the derivative of a Gaussian in any direction: Gx, Gy, or Gxx, Gxy, Gyy."""
    y, x = _grid(k)
    base = gaussian_derivative(k, sigma, 0)
    if order == 1:
        return torch.stack([-x / sigma**2 * base, -y / sigma**2 * base])
    if order == 2:
        second = [(x**2 - sigma**2) / sigma**4, x * y / sigma**4, (y**2 - sigma**2) / sigma**4]
        return torch.stack([factor * base for factor in second])
    raise ValueError(f"order must be 1 or 2, got {order}")


def steer(basis: Tensor, theta: float) -> Tensor:
    """The derivative along theta of a `steerable_basis`, (k, k)."""
    cos, sin = math.cos(theta), math.sin(theta)
    weights = (cos, sin) if len(basis) == 2 else (cos**2, 2 * cos * sin, sin**2)
    return torch.einsum("m,mij->ij", torch.tensor(weights, dtype=basis.dtype), basis)


# -- texture banks -----------------------------------------------------------------------------------------------------


def schmid_bank(k: int = 49) -> Tensor:
    """Schmid's 13 filters that do not depend on the direction, cos(pi tau r / sigma) exp(-r^2 / 2 sigma^2).

    Each has mean 0 and a sum of magnitudes of 1.
    """
    y, x = _grid(k)
    radius = torch.hypot(x, y)
    bank = []
    for sigma, tau in _SCHMID:
        values = torch.cos(math.pi * tau * radius / sigma) * torch.exp(-(radius**2) / (2 * sigma**2))
        bank.append(_zero_mean_l1(values))
    return torch.stack(bank)


def lm_bank(k: int = 49) -> Tensor:
    """The 48 filters of Leung and Malik: edges and bars at 3 scales and 6 directions, 8 Laplacians, 4 Gaussians."""
    scales = [math.sqrt(2) ** power for power in (1, 2, 3)]
    oriented = [
        _zero_mean_l1(gaussian_derivative(k, sigma, order, math.pi / 2 + step * math.pi / 6, across=3 * sigma))
        for order in (1, 2)
        for sigma in scales
        for step in range(6)
    ]
    rounds = [math.sqrt(2) ** power for power in (1, 2, 3, 4)]
    spots = [_zero_mean_l1(laplacian_of_gaussian(k, times * sigma)) for times in (1, 3) for sigma in rounds]
    return torch.stack([*oriented, *spots, *(gaussian(k, sigma) for sigma in rounds)])


def rfs_bank(k: int = 49) -> Tensor:
    """The 38 filters behind `mr8`: edges, then bars, at 3 scales and 6 directions; a Gaussian and a Laplacian of 10."""
    oriented = [
        _zero_mean_l1(gaussian_derivative(k, sigma, order, math.pi / 2 + step * math.pi / 6, across=3 * sigma))
        for order in (1, 2)
        for sigma in (1, 2, 4)
        for step in range(6)
    ]
    return torch.stack([*oriented, gaussian(k, 10), _zero_mean_l1(laplacian_of_gaussian(k, 10))])


def mr8(responses: Tensor) -> Tensor:
    """The 8 maximum responses (B, 8, H, W) of those of `rfs_bank` (B, 38, H, W): over the directions of each scale.

    Raises:
        ValueError: there are not 38 channels.
    """
    if responses.dim() != 4 or responses.shape[1] != 38:
        raise ValueError(f"responses must be (B, 38, H, W), got {tuple(responses.shape)}")
    oriented = responses[:, :36].unflatten(1, (6, 6)).amax(2)
    return torch.cat([oriented, responses[:, 36:]], 1)


def _zero_mean_l1(values: Tensor) -> Tensor:
    centred = values - values.mean()
    return centred / centred.abs().sum()


# -- orthonormal bases -------------------------------------------------------------------------------------------------


def dct_bank(k: int, order: Literal["rows", "zigzag"] = "rows") -> Tensor:
    """The k^2 filters of the orthonormal DCT-II, B_uv[i, j] = c_u c_v cos(pi (2i+1) u / 2k) cos(pi (2j+1) v / 2k).

    Args:
        k: side of the filters.
        order: by rows of (u, v), or from low to high frequencies; see `zigzag_order`.
    """
    places = torch.arange(_side(k), dtype=torch.float64)
    basis = torch.cos(math.pi * (2 * places + 1) * places[:, None] / (2 * k)) * math.sqrt(2 / k)
    basis[0] = math.sqrt(1 / k)
    bank = _separable(basis)
    if order == "rows":
        return bank
    if order != "zigzag":
        raise unknown("order", order, ("rows", "zigzag"))
    ranks = zigzag_order(k)
    return bank[ranks[:, 0] * k + ranks[:, 1]]


def zigzag_order(k: int) -> Tensor:
    """All (u, v) of a k x k table from one corner to the other, diagonal by diagonal in turning direction, (k^2, 2)."""
    places = [(u, v) for u in range(_side(k)) for v in range(k)]
    places.sort(key=lambda place: (sum(place), place[0] if sum(place) % 2 else place[1]))
    return torch.tensor(places)


def haar_bank(k: int) -> Tensor:
    """The k^2 separable Haar wavelets, orthonormal; k is a power of 2."""
    return _separable(_haar(_power_of_two(k)))


def walsh_hadamard_bank(k: int) -> Tensor:
    """The k^2 separable Walsh-Hadamard filters in Hadamard's order, orthonormal; k is a power of 2."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < _power_of_two(k):
        matrix = torch.kron(_table((1, 1), (1, -1)), matrix)
    return _separable(matrix / math.sqrt(k))


def fourier_bessel_bank(k: int, orders: int = 3, roots: int = 3) -> Tensor:
    """J_m(l_mn r / R) cos(m phi) and, for m > 0, sin(m phi) on the disc of radius R = k / 2, each with norm 1.

    Args:
        k: side of the filters.
        orders: m = 0, ..., orders - 1.
        roots: l_mn for n = 1, ..., roots, the roots of J_m.
    """
    _positive(orders=orders, roots=roots)
    y, x = (axis.numpy() for axis in _grid(k))
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    inside = radius <= k / 2
    bank = []
    for m in range(orders):
        for root in jn_zeros(m, roots):
            radial = jv(m, root * radius / (k / 2)) * inside
            waves = (np.cos(m * angle),) if m == 0 else (np.cos(m * angle), np.sin(m * angle))
            bank += [torch.from_numpy(radial * wave) for wave in waves]
    stacked = torch.stack(bank)
    return stacked / torch.linalg.vector_norm(stacked, dim=(1, 2), keepdim=True).clamp_min(1e-12)


def expand_channels(
    filters: Tensor,
    in_channels: int,
    how: Literal["mean", "depthwise", "signs"] = "mean",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Weights of a convolution of several channels from filters (m, k, k).

    Args:
        filters: of one channel.
        in_channels: of the convolution.
        how: ``mean``: each filter on all channels, divided by their number, (m, in_channels, k, k); ``depthwise``: each
            filter on each channel, for a convolution of as many groups, (m in_channels, 1, k, k); ``signs``: as
            ``mean``, with a random sign for each channel and divided by the root of their number.
        generator: of the signs.
    """
    _positive(in_channels=in_channels)
    if how == "depthwise":
        return filters.repeat(in_channels, 1, 1)[:, None]
    spread = filters[:, None].expand(-1, in_channels, -1, -1)
    if how == "mean":
        return spread / in_channels
    if how != "signs":
        raise unknown("how", str(how), ("mean", "depthwise", "signs"))
    signs = 2 * torch.randint(2, spread.shape[:2], generator=generator).to(filters.dtype) - 1
    return spread * signs[..., None, None] / math.sqrt(in_channels)


def _separable(basis: Tensor) -> Tensor:
    return torch.einsum("ui,vj->uvij", basis, basis).flatten(0, 1)


@functools.cache
def _haar(k: int) -> Tensor:
    if k == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    coarse, fine = _haar(k // 2), torch.eye(k // 2, dtype=torch.float64)
    return torch.cat([torch.kron(coarse, _table((1, 1))), torch.kron(fine, _table((1, -1)))]) / math.sqrt(2)


def _side(k: int) -> int:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    return k


def _power_of_two(k: int) -> int:
    if k < 1 or k & (k - 1):
        raise ValueError(f"k must be a power of 2, got {k}")
    return k
