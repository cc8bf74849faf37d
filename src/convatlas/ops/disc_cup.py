"""Optic disc and cup from probabilities, and how well two masks agree.

The post-processing of TVConv (arXiv 2203.10489, section 4.2) and of the works on fundus images that it follows.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dice", "disc_and_cup", "largest_region"]


def largest_region(mask: Tensor) -> Tensor:
    """The largest connected region of a mask (H, W), neighbours by edges, with its holes filled; bool, on the CPU."""
    if mask.dim() != 2:
        raise ValueError(f"mask must be (H, W), got {tuple(mask.shape)}")
    # Imported where it is used, because it takes long.
    from scipy import ndimage

    labels, count = ndimage.label(mask.cpu().numpy())
    regions = torch.from_numpy(labels)
    if count == 0:
        return regions.bool()
    largest = regions.flatten().bincount()[1:].argmax() + 1
    return torch.from_numpy(ndimage.binary_fill_holes((regions == largest).numpy()))


def disc_and_cup(probabilities: Tensor, *, cup: float = 0.75, disc: float = 0.75) -> Tensor:
    """Masks of probabilities (B, 2, H, W), cup first: thresholds, the largest region of each, holes filled.

    Args:
        probabilities: after the sigmoid.
        cup, disc: thresholds; for the images of Drishti-GS they are 0.1 and 0.5.

    Raises:
        ValueError: there are not two channels.
    """
    if probabilities.dim() != 4 or probabilities.shape[1] != 2:
        raise ValueError(f"probabilities must be (B, 2, H, W), got {tuple(probabilities.shape)}")
    above = probabilities > probabilities.new_tensor([cup, disc])[:, None, None]
    masks = [torch.stack([largest_region(mask) for mask in image]) for image in above]
    return torch.stack(masks).to(probabilities.device)


def dice(first: Tensor, second: Tensor) -> Tensor:
    """2 |A and B| / (|A| + |B|) of masks (..., H, W), in float64; 1 where both are empty."""
    if first.shape != second.shape or first.dim() < 2:
        raise ValueError(f"masks must be of one shape (..., H, W), got {tuple(first.shape)} and {tuple(second.shape)}")
    first, second = first.bool(), second.bool()
    both, sizes = ((first & second).sum((-2, -1)), first.sum((-2, -1)) + second.sum((-2, -1)))
    return torch.where(sizes > 0, 2 * both.double() / sizes.clamp(min=1), 1.0)
