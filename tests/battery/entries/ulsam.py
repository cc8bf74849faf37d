"""Subspace attention and networks with it."""

from __future__ import annotations

from battery.subjects import Layer, Network
from convatlas.nn.mixers.ulsam import ULSAM

NETWORKS = [
    Network(
        "mobilenet_v1_ulsam",
        {"layers": ((12, 2), (16, 1), (16, 2)), "ulsam_positions": (3,), "stem_width": 8, "num_classes": 7},
    ),
    Network(
        "mobilenet_v2_ulsam",
        {
            "stages": ((1, 8, 1, 1), (6, 12, 2, 2), (6, 16, 1, 2)),
            "ulsam_positions": (4,),
            "stem_width": 8,
            "head_width": 24,
            "num_classes": 7,
        },
    ),
]

LAYERS = [
    Layer(ULSAM, 8, dims=(1, 2, 3)),
    Layer(ULSAM, 9, {"num_splits": 3}, dims=(1, 2, 3)),
]
