"""Which output of a separator belongs to which source: the assignment of least loss, and losses that do not care.

Yu, Kolbaek, Tan, Jensen: "Permutation invariant training of deep models for speaker-independent multi-talker speech
separation", ICASSP 2017, arXiv 1607.00325; one assignment for the whole utterance (uPIT), Kolbaek et al., TASLP 2017.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["best_permutation", "permutation_invariant_loss", "reorder_sources"]

#: Up to so many sources every permutation is tried; more are assigned by the Hungarian method.
_MOST_ENUMERATED = 3


def best_permutation(losses: Tensor) -> tuple[Tensor, Tensor]:
    """The assignment of estimates to references whose mean loss is least.

    Up to three sources all permutations are compared in the order of `itertools.permutations`, the first of equal ones
    wins; more sources are assigned by the Hungarian method. The assignment itself has no gradient, the loss has.

    Args:
        losses: (B, C, C), losses[b, i, j] of estimate i and reference j.

    Returns:
        Least mean loss (B,), and the estimate of each reference (B, C): entry j is the number of the estimate that
        belongs to reference j.

    Raises:
        ValueError: losses is not (B, C, C), or is not finite where the Hungarian method is needed.
    """
    if losses.dim() != 3 or losses.shape[1] != losses.shape[2] or losses.shape[1] < 1:
        raise ValueError(f"losses must be (B, C, C), got {tuple(losses.shape)}")
    count = losses.shape[1]
    if count <= _MOST_ENUMERATED:
        table = torch.tensor(list(itertools.permutations(range(count))), device=losses.device)
        means = losses[:, table, torch.arange(count, device=losses.device)].mean(2)
        return means.min(1).values, table[means.argmin(1)]
    order = _hungarian(losses.detach())
    return losses.gather(1, order.unsqueeze(1)).squeeze(1).mean(1), order


def _hungarian(losses: Tensor) -> Tensor:
    from scipy.optimize import linear_sum_assignment

    if not bool(losses.isfinite().all()):
        raise ValueError("losses of more than three sources must be finite to be assigned")
    # A row of the transposed matrix is a reference, so the columns that are found are its estimates.
    found = [torch.from_numpy(linear_sum_assignment(each.double().cpu().numpy().T)[1]) for each in losses]
    return torch.stack(found).to(losses.device)


def reorder_sources(estimates: Tensor, order: Tensor) -> Tensor:
    """Bring estimates (B, C, ...) into the order of the references, by the (B, C) of `best_permutation`."""
    if order.shape != estimates.shape[:2]:
        raise ValueError(f"order must be {tuple(estimates.shape[:2])}, got {tuple(order.shape)}")
    batch = torch.arange(len(estimates), device=estimates.device)[:, None]
    return estimates[batch, order.to(estimates.device)]


def permutation_invariant_loss(
    pairwise: Callable[[Tensor, Tensor], Tensor], estimates: Tensor, references: Tensor
) -> tuple[Tensor, Tensor]:
    """A loss of the best assignment, averaged over the batch, and the estimates in the order of the references.

    Args:
        pairwise: losses (B, C, C) of estimate i and reference j, from estimates and references.
        estimates: (B, C, T).
        references: (B, C, T).

    Returns:
        The loss, a scalar, and estimates (B, C, T).

    Raises:
        ValueError: estimates and references are not (B, C, T) alike.
    """
    if estimates.dim() != 3 or estimates.shape != references.shape:
        raise ValueError(
            f"estimates and references must be (B, C, T) alike, got {tuple(estimates.shape)} and "
            f"{tuple(references.shape)}"
        )
    losses, order = best_permutation(pairwise(estimates, references))
    return losses.mean(), reorder_sources(estimates, order)
