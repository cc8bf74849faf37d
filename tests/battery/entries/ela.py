"""Efficient local attention and coordinate attention."""

from __future__ import annotations

from battery.subjects import Layer
from convatlas.nn.mixers.ela import ELA, CoordinateAttention

LAYERS = [
    Layer(ELA, 16, dims=(1, 2, 3)),
    Layer(ELA, 16, {"variant": "S", "num_groups": 4}, dims=(1, 2, 3)),
    Layer(ELA, 9, {"variant": "T", "num_groups": "auto", "shared": False}, dims=(2,)),
    Layer(CoordinateAttention, 9),
]
