"""Losses of the two players of a generative adversarial network, position by position.

Jolicoeur-Martineau: "The relativistic discriminator: a key element missing from standard GAN", ICLR 2019,
arXiv 1807.00734.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["relativistic_discriminator_loss", "relativistic_generator_loss"]


def relativistic_generator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """BCE(C_F - mean(C_R), 1): how little the fake looks more real than real ones do on average.

    The average runs over the batch only, so that a discriminator which judges each voxel keeps its map; with one logit
    a sample this is the relativistic average GAN of ESRGAN.

    Args:
        real: logits C_R of real samples (B, ...); no gradient goes there.
        fake: logits C_F of generated ones, of the same shape.

    Raises:
        ValueError: the shapes differ.
    """
    _check(real, fake)
    return _cross_entropy(fake - real.detach().mean(0, keepdim=True), 1.0)


def relativistic_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """(BCE(C_R - mean(C_F), 1) + BCE(C_F - mean(C_R), 0)) / 2, with means over the batch.

    Args:
        real: logits C_R of real samples (B, ...).
        fake: logits C_F of generated ones, of the same shape.

    Raises:
        ValueError: the shapes differ.
    """
    _check(real, fake)
    more_real = _cross_entropy(real - fake.mean(0, keepdim=True), 1.0)
    return (more_real + _cross_entropy(fake - real.mean(0, keepdim=True), 0.0)) / 2


def _cross_entropy(logits: Tensor, truth: float) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.binary_cross_entropy_with_logits(wide, torch.full_like(wide, truth))


def _check(real: Tensor, fake: Tensor) -> None:
    if real.shape != fake.shape or real.dim() < 1:
        raise ValueError(f"real and fake must have the same shape, got {tuple(real.shape)} and {tuple(fake.shape)}")
