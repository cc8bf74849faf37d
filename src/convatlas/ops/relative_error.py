"""Relative errors of fields, as neural operators are trained and judged by."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["relative_l2"]


def relative_l2(prediction: Tensor, truth: Tensor) -> Tensor:
    """||prediction - truth|| / ||truth|| of each sample, in the Euclidean norm over channels and positions.

    On a regular grid it is the relative error in L2: the volume of a cell stands above and below. A truth that is zero
    everywhere gives infinity, or NaN if the prediction is zero as well.

    Args:
        prediction, truth: (B, C, *grid), real or complex.

    Returns:
        (B,).

    Raises:
        ValueError: the shapes differ.
    """
    if prediction.shape != truth.shape:
        raise ValueError(
            f"prediction and truth must have one shape, got {tuple(prediction.shape)} and {tuple(truth.shape)}"
        )
    error, size = (torch.linalg.vector_norm(field.flatten(1), dim=1) for field in (prediction - truth, truth))
    return error / size
