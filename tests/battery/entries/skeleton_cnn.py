"""Ensem-NN: networks for moving skeletons."""

from __future__ import annotations

import torch

from battery.subjects import Network

_SMALL = {
    **{"joints": 5, "frames": 13, "num_classes": 7, "widths": (6, 8), "depths": (1, 1), "dropout": 0.0},
    "reduction": 2,
    "parts": ((0, 1), (1, 3, 4)),
}
_SHARED = {name: value for name, value in _SMALL.items() if name not in ("reduction", "parts")}


def _clips(model: torch.nn.Module, batch: int) -> tuple[torch.Tensor, ...]:
    return (torch.randn(batch, model.config.coordinates, model.config.frames),)


NETWORKS = [
    Network("ensem_nn", _SMALL, _clips),
    Network("skeleton_difference", {**_SHARED, "dim": 2}, _clips),
]
