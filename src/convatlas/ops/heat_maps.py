"""Heat maps of log-chroma: how smooth filters are, where the mass lies, how sure that is, and targets to learn them by.

Barron, Tsai: "Fast Fourier Color Constancy", CVPR 2017, arXiv 1611.07596, sections 3 to 5 and the supplement (read-out
by a bivariate von Mises distribution, both losses, preconditioned weights, smoothing over frames). Afifi et al.,
"Cross-Camera Convolutional Color Constancy", ICCV 2021, arXiv 2011.11890 (smoothness by Sobel filters).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.ops.precision import without_autocast

__all__ = [
    "Gaussian",
    "bilinear_target",
    "bivariate_von_mises",
    "circular_convolution",
    "confidence",
    "dealias",
    "expected_log_chroma",
    "gaussian_loss",
    "histogram_start",
    "kalman_smooth",
    "kalman_step",
    "precondition",
    "smoothness",
]

_SOBEL = ((1.0, 0.0, -1.0), (2.0, 0.0, -2.0), (1.0, 0.0, -1.0))


class Gaussian(NamedTuple):
    """Where something lies and how sure that is: mean (..., 2) and covariance (..., 2, 2)."""

    mean: Tensor
    covariance: Tensor


def circular_convolution(maps: Tensor, filters: Tensor) -> Tensor:
    """Maps (..., C, n, n) convolved on a torus with filters (C, n, n) and added up, (..., n, n).

    The filters' origin is their first element. Computed in float32 at least, through the Fourier transform.

    Raises:
        ValueError: the shapes do not fit.
    """
    if filters.dim() != 3 or maps.dim() < 3 or maps.shape[-3:] != filters.shape:
        raise ValueError(
            f"maps must be (..., C, n, n) and filters (C, n, n), got {tuple(maps.shape)} and {tuple(filters.shape)}"
        )
    with without_autocast(maps):
        dtype = torch.promote_types(torch.promote_types(maps.dtype, filters.dtype), torch.float32)
        product = torch.fft.rfft2(maps.to(dtype)) * torch.fft.rfft2(filters.to(dtype))
        return torch.fft.irfft2(product.sum(-3), s=filters.shape[-2:])


def smoothness(maps: Tensor) -> Tensor:
    """How rough maps (..., n, n) are: mean square of their derivatives by Sobel filters, those along both axes added.

    Only whole windows count.

    Returns:
        (...).

    Raises:
        ValueError: the maps are smaller than 3 x 3.
    """
    if maps.dim() < 2 or min(maps.shape[-2:]) < 3:
        raise ValueError(f"maps must be (..., n, n) of at least 3 x 3, got {tuple(maps.shape)}")
    sobel = maps.new_tensor(_SOBEL)
    edges = F.conv2d(maps.reshape(-1, 1, *maps.shape[-2:]), torch.stack([sobel, sobel.T])[:, None])
    return edges.square().mean((2, 3)).sum(1).reshape(maps.shape[:-2])


def expected_log_chroma(heat: Tensor, boundary: float) -> Tensor:
    """The expectation (u, v), (..., 2), of heat maps (..., n, n) that sum up to 1, u along columns, v against rows.

    Bins count from -(n - 1) / 2 to (n - 1) / 2 and are 2 boundary / n apart, though the bins of the histograms, which
    end at the boundary, are 2 boundary / (n - 1) apart: C5 is trained so.
    """
    bins = heat.shape[-1]
    place = torch.arange(bins, dtype=heat.dtype, device=heat.device) - (bins - 1) / 2
    u, v = (heat.sum(-2) * place).sum(-1), (heat.sum(-1) * place.flip(0)).sum(-1)
    return torch.stack([u, v], -1) * (2 * boundary / bins)


# -- FFCC --------------------------------------------------------------------------------------------------------------


def bivariate_von_mises(heat: Tensor, epsilon: float = 1.0) -> Gaussian:
    """Where the mass of heat maps lies on a torus, by circular means, and its covariance around there.

    Args:
        heat: (..., n, n), sums up to 1.
        epsilon: added to both variances, in square bins.

    Returns:
        Mean (row, column) from 0 to below n, in bins, (..., 2); covariance in square bins, (..., 2, 2).

    Raises:
        ValueError: epsilon is negative, or heat is not square.
    """
    if heat.dim() < 2 or heat.shape[-1] != heat.shape[-2]:
        raise ValueError(f"heat must be (..., n, n), got {tuple(heat.shape)}")
    if epsilon < 0:
        raise ValueError(f"epsilon must not be negative, got {epsilon}")
    bins = heat.shape[-1]
    number = torch.arange(bins, dtype=heat.dtype, device=heat.device)
    angle = 2 * math.pi / bins * number
    along = torch.stack([heat.sum(-1), heat.sum(-2)], -2)
    sine, cosine = (along * angle.sin()).sum(-1), (along * angle.cos()).sum(-1)
    mean = torch.atan2(sine, cosine).remainder(2 * math.pi) * (bins / (2 * math.pi))
    # Offsets count from 1 to n, with about n / 2 at the mean.
    offset = (number - mean.detach().round()[..., None] + bins // 2 - 1).remainder(bins) + 1
    first, second = (along * offset).sum(-1), (along * offset.square()).sum(-1)
    variance = second - first.square() + epsilon
    mixed = (offset[..., 0, :, None] * offset[..., 1, None, :] * heat).sum((-2, -1)) - first.prod(-1)
    rows = [torch.stack([variance[..., 0], mixed], -1), torch.stack([mixed, variance[..., 1]], -1)]
    return Gaussian(mean, torch.stack(rows, -2))


def confidence(covariance: Tensor, epsilon: float = 1.0) -> Tensor:
    """How sure an estimate is, from 0 to 1, (...): exp of the least entropy minus the entropy of a covariance in bins.

    The entropy is ln det / 2; the least is that of ``epsilon`` alone.
    """
    return (math.log(epsilon) - 0.5 * _determinant(covariance).log()).exp()


def histogram_start(uv: Tensor, bins: int, bin_size: float) -> tuple[float, float]:
    """u and v of the first bins such that lights (N, 2) lie in the middle of the range, in whole bins."""
    middle = (uv.double().mean(0) / bin_size).round() * bin_size
    u, v = (middle - bins / 2 * bin_size).tolist()
    return u, v


def dealias(uv: Tensor, bins: int, bin_size: float, around: Tensor | None = None) -> Tensor:
    """That of the places uv (..., 2), all the same on the torus, which is nearest to some colour.

    Args:
        uv: log-chroma.
        bins, bin_size: of the histogram.
        around: (..., 2); neutral grey, (0, 0), when left out. `gray_world` of the image is the other choice of FFCC.
    """
    period = bins * bin_size
    middle = torch.zeros_like(uv) if around is None else around
    return middle + (uv - middle + period / 2).remainder(period) - period / 2


def bilinear_target(uv: Tensor, bins: int, bin_size: float, start: tuple[float, float]) -> Tensor:
    """Heat maps (B, n, n) with all mass at lights uv (B, 2): shared out among the four nearest bins, wrapped."""
    place = (uv - uv.new_tensor(start)) / bin_size
    number = torch.arange(bins, dtype=uv.dtype, device=uv.device)
    away = (place[..., None] - number + bins / 2).remainder(bins) - bins / 2
    share = (1 - away.abs()).clamp(min=0)
    return share[:, 0, :, None] * share[:, 1, None, :]


def gaussian_loss(uv: Tensor, mean: Tensor, covariance: Tensor, least_variance: float) -> Tensor:
    """Minus the log-likelihood of lights uv (..., 2), less what it is at best: 0 where all is right and sure, (...).

    Args:
        uv, mean: log-chroma.
        covariance: in u and v, (..., 2, 2).
        least_variance: the smallest that a covariance can have: epsilon of `bivariate_von_mises` times the square of
            the bin.
    """
    away = uv - mean
    determinant = _determinant(covariance)
    weighted = (
        covariance[..., 1, 1] * away[..., 0].square()
        - 2 * covariance[..., 0, 1] * away[..., 0] * away[..., 1]
        + covariance[..., 0, 0] * away[..., 1].square()
    )
    return 0.5 * (weighted / determinant + determinant.log()) - math.log(least_variance)


def precondition(maps: Tensor, rough: float, large: float) -> Tensor:
    """Maps (..., n, n) whose frequencies are divided by the root of what they cost.

    With Z = precondition(X), half the sum of squares of X is half of rough * (squares of the circular differences of Z
    along both axes) + large * (squares of Z). Descending in X is therefore well conditioned (FFCC, section 4).

    Raises:
        ValueError: rough is negative or large is not positive.
    """
    if rough < 0 or large <= 0:
        raise ValueError(f"rough must not be negative and large must be positive, got {rough} and {large}")
    rows, columns = maps.shape[-2:]
    down = torch.arange(rows, dtype=maps.dtype, device=maps.device) / rows
    right = torch.arange(columns // 2 + 1, dtype=maps.dtype, device=maps.device) / columns
    cost = large + rough * 4 * ((math.pi * down).sin().square()[:, None] + (math.pi * right).sin().square())
    return torch.fft.irfft2(torch.fft.rfft2(maps) / cost.sqrt(), s=(rows, columns))


def _determinant(covariance: Tensor) -> Tensor:
    return covariance[..., 0, 0] * covariance[..., 1, 1] - covariance[..., 0, 1].square()


# -- frames ------------------------------------------------------------------------------------------------------------


def kalman_step(state: Gaussian | None, seen: Gaussian, drift: float) -> Gaussian:
    """What is known of the light after one more frame.

    Args:
        state: what was known before; None at the first frame.
        seen: the estimate of this frame alone.
        drift: variance, in u and v, by which the light may change from frame to frame.

    Raises:
        ValueError: drift is negative.
    """
    if drift < 0:
        raise ValueError(f"drift must not be negative, got {drift}")
    if state is None:
        return seen
    eye = torch.eye(2, dtype=seen.covariance.dtype, device=seen.covariance.device)
    before = state.covariance + drift * eye
    gain = torch.linalg.solve(before + seen.covariance, before).mT
    mean = state.mean + (gain @ (seen.mean - state.mean)[..., None])[..., 0]
    covariance = (eye - gain) @ before
    return Gaussian(mean, (covariance + covariance.mT) / 2)


def kalman_smooth(seen: Gaussian, drift: float) -> Gaussian:
    """Estimates of consecutive frames, each with what the frames before it tell: mean (T, 2), covariance (T, 2, 2).

    Raises:
        ValueError: drift is negative.
    """
    states: list[Gaussian] = []
    for frame in zip(*seen, strict=True):
        states.append(kalman_step(states[-1] if states else None, Gaussian(*frame), drift))
    return Gaussian(torch.stack([each.mean for each in states]), torch.stack([each.covariance for each in states]))
