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


_PROBABILITIES = dict.fromkeys(
    (
        *("linear_interpretation_is_exact", "linear_scope_runs_beside_the_network"),
        "tangent_interpretation_is_the_jacobian",
    ),
    "its answers are fused probabilities, no logits; its members are interpreted",
)

NETWORKS = [
    Network("skeleton_two_stream", _SHARED, _clips),
    Network("skeleton_attention", {**_SHARED, "dim": 2, "reduction": 2}, _clips),
    Network("ensem_nn", _SMALL, _clips, _PROBABILITIES),
]
