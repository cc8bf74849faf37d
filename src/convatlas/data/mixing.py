"""Mixup and CutMix of a batch with itself, and the soft targets that go with them.

Mixup: Zhang et al., arXiv 1710.09412. CutMix: Yun et al., arXiv 1905.04899. As in timm's batch mode, one mixing ratio
holds for the whole batch and the partner of a sample is the one at its place in the flipped batch.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["cut_box", "mix", "mixing_ratio", "smooth_targets"]


def smooth_targets(targets: Tensor, num_classes: int, label_smoothing: float = 0.0) -> Tensor:
    """Class indices (B,) as distributions (B, num_classes), float32: s / C everywhere, and 1 - s more at the class.

    Args:
        targets: class indices from 0 to num_classes - 1.
        num_classes: C.
        label_smoothing: s, from 0 to 1.
    """
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be between 0 and 1, got {label_smoothing}")
    off = label_smoothing / num_classes
    return F.one_hot(targets, num_classes).float() * (1 - label_smoothing) + off


def mix(
    images: Tensor,
    targets: Tensor,
    num_classes: int,
    *,
    mixup: float,
    cutmix: float,
    switch_prob: float = 0.5,
    prob: float = 1.0,
    label_smoothing: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Mix a batch with its flipped self by mixup or CutMix.

    The ratio of a sample to its partner is drawn from Beta(alpha, alpha); for CutMix it is then corrected to the area
    that the pasted box really covers.

    Args:
        images: (B, C, H, W), or clips (B, C, T, H, W), floating point; they are not changed.
        targets: (B,) class indices.
        num_classes: number of classes.
        mixup: alpha of mixup; 0 turns it off.
        cutmix: alpha of CutMix; 0 turns it off.
        switch_prob: probability of CutMix where both are on.
        prob: probability that the batch is mixed at all.
        label_smoothing: smoothing of the targets, see :func:`smooth_targets`.
        generator: source of all randomness; None takes torch's default generator.

    Returns:
        The mixed images and the targets (B, num_classes), whose rows add up to 1.
    """
    if images.ndim not in (4, 5) or not images.is_floating_point():
        raise ValueError(
            f"images must be (B, C, H, W) or (B, C, T, H, W) floating point, got {tuple(images.shape)} {images.dtype}"
        )
    if min(mixup, cutmix) < 0:
        raise ValueError(f"mixup and cutmix must not be negative, got {mixup} and {cutmix}")
    soft = smooth_targets(targets, num_classes, label_smoothing)
    mixed, switched = torch.rand(2, generator=generator, device=_device(generator)).tolist()
    if mixed >= prob or not (mixup or cutmix):
        return images, soft
    use_cutmix = cutmix > 0 and (not mixup or switched < switch_prob)
    ratio = mixing_ratio(cutmix if use_cutmix else mixup, generator)
    partners = images.flip(0)
    if use_cutmix:
        top, bottom, left, right = cut_box(images.shape[-2], images.shape[-1], ratio, generator)
        images = images.clone()
        images[..., top:bottom, left:right] = partners[..., top:bottom, left:right]
        ratio = 1 - (bottom - top) * (right - left) / (images.shape[-2] * images.shape[-1])
    else:
        images = images * ratio + partners * (1 - ratio)
    return images, soft * ratio + soft.flip(0) * (1 - ratio)


def _device(generator: torch.Generator | None) -> torch.device | None:
    return None if generator is None else generator.device


def _integer(high: int, generator: torch.Generator | None) -> int:
    return int(torch.randint(high, (), generator=generator, device=_device(generator)).item())


def mixing_ratio(alpha: float, generator: torch.Generator | None = None) -> float:
    """A number drawn from Beta(alpha, alpha)."""
    # torch's Beta distribution takes no generator; numpy's, seeded from it, draws exactly.
    return float(np.random.default_rng(_integer(2**63 - 1, generator)).beta(alpha, alpha))


def cut_box(
    height: int, width: int, ratio: float, generator: torch.Generator | None = None
) -> tuple[int, int, int, int]:
    """A box of the share 1 - ratio around a random centre, clipped at the border: top, bottom, left, right."""
    side = math.sqrt(1 - ratio)
    half_height, half_width = int(height * side) // 2, int(width * side) // 2
    y, x = _integer(height, generator), _integer(width, generator)
    return (
        max(y - half_height, 0),
        min(y + half_height, height),
        max(x - half_width, 0),
        min(x + half_width, width),
    )
