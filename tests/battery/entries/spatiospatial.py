"""Video ResNets for volumes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from battery.subjects import Network

TINY = {"depths": (1, 2), "widths": (6, 8), "num_classes": 5}


def volume(model: nn.Module, batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, model.in_channels, 5, 19, 17),)


NETWORKS = [
    Network("r3d_18", {**TINY, "convolutions": ("3d", "3d")}, volume),
    Network("mc3_18", {**TINY, "convolutions": ("3d", "no_depth")}, volume),
    Network("r2plus1d_18", {**TINY, "convolutions": ("2plus1d", "2plus1d"), "stem_mid": 4}, volume),
]
