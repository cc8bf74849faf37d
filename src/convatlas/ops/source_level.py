"""The loudness of separated sources, which training by a scale-invariant ratio leaves open."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from convatlas.errors import unknown
from convatlas.ops.precision import without_autocast

__all__ = ["Level", "match_level", "mixture_consistent"]

#: What is made equal: the largest magnitude, or the root of the mean square.
Level = Literal["peak", "rms"]


def match_level(estimates: Tensor, mixture: Tensor, kind: Level = "peak") -> Tensor:
    """Scale each estimate such that it is as loud as the mixture: fit to be written to a file, signs kept.

    Args:
        estimates: (..., C, T).
        mixture: (..., T).
        kind: ``peak`` or ``rms``.

    Returns:
        (..., C, T); silent estimates stay silent.

    Raises:
        UnknownName: there is no such kind.
        ValueError: shapes do not fit.
    """
    if kind not in get_args(Level):
        raise unknown("level", str(kind), get_args(Level))
    _check(estimates, mixture)

    def level(x: Tensor) -> Tensor:
        return x.abs().amax(-1, keepdim=True) if kind == "peak" else x.square().mean(-1, keepdim=True).sqrt()

    wanted, given = level(mixture).unsqueeze(-2), level(estimates)
    return estimates * torch.where(given > 0, wanted / given, torch.ones_like(given))


def mixture_consistent(estimates: Tensor, mixture: Tensor) -> Tensor:
    """Scale the estimates such that their sum comes nearest to the mixture: one least-squares gain for each source.

    Args:
        estimates: (..., C, T).
        mixture: (..., T).

    Returns:
        (..., C, T). Gains may be negative, as the sign of an estimate is open, too.

    Raises:
        ValueError: shapes do not fit.
    """
    _check(estimates, mixture)
    with without_autocast(estimates):
        e, x = estimates.double(), mixture.double()
        # The least gains where estimates depend on each other or are silent.
        gains = torch.linalg.pinv(e @ e.mT, hermitian=True) @ (e @ x.unsqueeze(-1))
        return (gains * e).to(estimates.dtype)


def _check(estimates: Tensor, mixture: Tensor) -> None:
    if estimates.dim() < 2 or mixture.shape != (*estimates.shape[:-2], estimates.shape[-1]):
        raise ValueError(
            f"estimates and mixture must be (..., C, T) and (..., T), got {tuple(estimates.shape)} and "
            f"{tuple(mixture.shape)}"
        )
