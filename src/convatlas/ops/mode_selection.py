"""How many low modes of a cosine transform the fields of a data set need.

Poli et al.: "Transform Once: Efficient Operator Learning in Frequency Domain", NeurIPS 2022, arXiv 2211.14453: a
network that answers in few modes cannot do better than the truth cut off at them, which is known before any training.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from convatlas.ops.dct import dct
from convatlas.ops.mode_boxes import lowest, with_zeros
from convatlas.ops.relative_error import relative_l2

__all__ = ["select_modes", "truncation_error"]


def select_modes(targets: Tensor, energy: float = 0.99) -> tuple[int, ...]:
    """The smallest box of low modes that holds a share of the mean energy of the targets.

    Args:
        targets: fields (N, C, *grid), real.
        energy: the share, above 0 and at most 1.

    Returns:
        Modes of each axis. Of several boxes of one size it is the one with the most energy.

    Raises:
        ValueError: targets or energy are out of range.
    """
    axes = _axes(targets)
    if not 0 < energy <= 1:
        raise ValueError(f"energy must be above 0 and at most 1, got {energy}")
    if not targets.shape[0]:
        raise ValueError("targets must hold a field, got none")
    held = dct(targets.double(), axes).square().mean((0, 1))
    for axis in range(held.dim()):
        held = held.cumsum(axis)
    # The whole box always holds enough, whatever the rounding of the sums.
    enough = held >= min(energy, 1 - 1e-12) * held.max()
    sizes = torch.ones_like(held)
    for axis, size in enumerate(held.shape):
        sizes *= torch.arange(1, size + 1, device=held.device).view(-1, *[1] * (held.dim() - 1 - axis))
    sizes = sizes.where(enough, torch.inf)
    best = torch.where(sizes == sizes.min(), held, -1).argmax()
    return tuple(int(place) + 1 for place in torch.unravel_index(best, held.shape))


def truncation_error(targets: Tensor, modes: Sequence[int]) -> Tensor:
    """Relative L2 error of the fields that are left when only low modes are kept, (N,).

    No network whose answers are so limited has a smaller one.

    Args:
        targets: fields (N, C, *grid), real.
        modes: how many are kept of each axis.

    Raises:
        ValueError: targets have no axes of position, or modes are out of range.
    """
    axes = _axes(targets)
    if len(modes) != len(axes) or any(not 1 <= kept <= targets.shape[axis] for axis, kept in enumerate(modes, 2)):
        raise ValueError(f"modes must be from 1 to {tuple(targets.shape[2:])}, got {tuple(modes)}")
    whole = dct(targets, axes)
    return relative_l2(with_zeros(lowest(whole, modes), whole.shape[2:]), whole)


def _axes(targets: Tensor) -> tuple[int, ...]:
    if not 3 <= targets.dim() <= 5:
        raise ValueError(f"targets must be (N, C, *grid) with one, two or three axes, got {tuple(targets.shape)}")
    return tuple(range(2, targets.dim()))
