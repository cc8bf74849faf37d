"""Efficient local attention, coordinate attention, and networks with the former."""

from __future__ import annotations

from battery.subjects import Layer, Network
from convatlas.nn.mixers.ela import ELA, CoordinateAttention

NETWORKS = [
    Network("ela_b_resnet18", {"depths": (1, 1), "widths": (16, 32), "stem_width": 8, "num_classes": 7}),
    Network(
        "ela_t_mobilenet_v2",
        {"stages": ((1, 8, 1, 1), (6, 12, 2, 2)), "stem_width": 8, "head_width": 24, "num_classes": 7},
    ),
]

LAYERS = [
    Layer(ELA, 16, dims=(1, 2, 3)),
    Layer(ELA, 16, {"variant": "S", "num_groups": 4}, dims=(1, 2, 3)),
    Layer(ELA, 9, {"variant": "T", "num_groups": "auto", "shared": False}, dims=(2,)),
    Layer(CoordinateAttention, 9),
]
