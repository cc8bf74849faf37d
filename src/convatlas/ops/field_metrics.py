"""How far a predicted field is from the true one."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["radial_spectrum", "relative_l2", "spectrum_error"]


def relative_l2(prediction: Tensor, truth: Tensor, dims: int = 2) -> Tensor:
    """||prediction - truth|| / ||truth|| over the last axes.

    Args:
        prediction, truth: of one shape.
        dims: how many axes, for instance 2 for each field of (B, T, H, W) and 3 for each sequence.
    """
    distance = (prediction - truth).flatten(-dims).norm(dim=-1)
    return distance / truth.flatten(-dims).norm(dim=-1).clamp_min(torch.finfo(truth.dtype).tiny)


def radial_spectrum(fields: Tensor) -> Tensor:
    """Root of the energy of fields (..., H, W) at each wave number 0, 1, ..., min(H, W) // 2, over all directions.

    Wave numbers count waves along a side and are rounded to the nearest whole one; the unit square is meant, so that
    along a longer side as many waves are as long.
    """
    height, width = fields.shape[-2:]
    power = torch.fft.fft2(fields, norm="ortho").abs().square()
    y, x = (torch.fft.fftfreq(n, 1 / n, dtype=power.dtype, device=fields.device) for n in (height, width))
    ring = (y[:, None].square() + x.square()).sqrt().round().long().flatten()
    most = min(height, width) // 2
    inner = ring <= most
    rings = power.flatten(-2)[..., inner]
    total = power.new_zeros(*power.shape[:-2], most + 1)
    return total.index_add(-1, ring[inner], rings).sqrt()


def spectrum_error(prediction: Tensor, truth: Tensor) -> Tensor:
    """Relative L2 distance of the `radial_spectrum` of fields (..., H, W): (...); phases and places do not count."""
    return relative_l2(radial_spectrum(prediction), radial_spectrum(truth), dims=1)
