"""Test-time augmentation: the mean of what a classifier says of several random versions of an image."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["tta_predict"]


@torch.inference_mode()
def tta_predict(model: nn.Module, images: Tensor, augment: Callable[[Tensor], Tensor], n: int = 100) -> Tensor:
    """Class probabilities (B, classes), averaged over ``n`` random augmentations.

    A run of the recognition task does the same with its own augmentation by the setting ``test_augmentations``.

    Args:
        model: gives class scores; it is used in evaluation mode and left in its own.
        images: (B, ...).
        augment: changes a batch at random.
        n: number of augmentations.

    Raises:
        ValueError: n is smaller than 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        total = torch.zeros((), device=images.device)
        for _ in range(n):
            total = total + model(augment(images)).float().softmax(1)
    finally:
        for module, mode in modes:
            module.training = mode
    return total / n
