"""Errors of forecasts of fields, for each sample, beside the relative one of `convatlas.ops.relative_error`.

As in Poli et al.: "Transform Once: Efficient Operator Learning in Frequency Domain", NeurIPS 2022, arXiv 2211.14453:
in the space of modes for training, in that of fields at chosen steps of a rollout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from convatlas.ops.dct import dct
from convatlas.ops.relative_error import relative_l2

__all__ = [
    "mean_absolute_error",
    "normalised_mse",
    "spectral_mse",
    "spectral_relative_l2",
    "symmetric_percentage_error",
]


def mean_absolute_error(prediction: Tensor, truth: Tensor) -> Tensor:
    """Mean of |prediction - truth| of each sample, (B,).

    Args:
        prediction, truth: (B, C, *grid).

    Raises:
        ValueError: the shapes differ.
    """
    _check(prediction, truth)
    return (prediction - truth).abs().flatten(1).mean(1)


def symmetric_percentage_error(prediction: Tensor, truth: Tensor) -> Tensor:
    """sMAPE, the mean of 2 |prediction - truth| / (|prediction| + |truth|) of each sample, from 0 to 2, (B,).

    Points at which both are zero count as right.

    Args:
        prediction, truth: (B, C, *grid).

    Raises:
        ValueError: the shapes differ.
    """
    _check(prediction, truth)
    size = prediction.abs() + truth.abs()
    ratio = 2 * (prediction - truth).abs() / torch.where(size > 0, size, 1)
    return ratio.flatten(1).mean(1)


def normalised_mse(prediction: Tensor, truth: Tensor) -> Tensor:
    """N-MSE, the sum of squared errors over that of the squared truth of each sample, (B,).

    Args:
        prediction, truth: (B, C, *grid).

    Raises:
        ValueError: the shapes differ.
    """
    _check(prediction, truth)
    return (prediction - truth).square().flatten(1).sum(1) / truth.square().flatten(1).sum(1)


def spectral_mse(modes: Tensor, truth: Tensor) -> Tensor:
    """Mean squared error of all modes of a cosine transform, which is that of the fields, for each sample, (B,).

    Args:
        modes: predicted modes (B, C, *grid).
        truth: the true field (B, C, *grid).

    Raises:
        ValueError: the shapes differ.
    """
    return (modes - _true_modes(modes, truth)).square().flatten(1).mean(1)


def spectral_relative_l2(modes: Tensor, truth: Tensor) -> Tensor:
    """Relative L2 error of all modes of a cosine transform, which is that of the fields, for each sample, (B,).

    Args:
        modes: predicted modes (B, C, *grid).
        truth: the true field (B, C, *grid).

    Raises:
        ValueError: the shapes differ.
    """
    return relative_l2(modes, _true_modes(modes, truth))


def _true_modes(modes: Tensor, truth: Tensor) -> Tensor:
    _check(modes, truth)
    return dct(truth, tuple(range(2, truth.dim())))


def _check(prediction: Tensor, truth: Tensor) -> None:
    if prediction.shape != truth.shape:
        raise ValueError(
            f"prediction and truth must have one shape, got {tuple(prediction.shape)} and {tuple(truth.shape)}"
        )
