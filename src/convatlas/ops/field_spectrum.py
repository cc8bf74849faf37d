"""Spectra of fields over all directions, and how far two of them are apart."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["radial_spectrum", "spectrum_error"]


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
    ours, theirs = radial_spectrum(prediction), radial_spectrum(truth)
    return (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp_min(torch.finfo(theirs.dtype).tiny)
