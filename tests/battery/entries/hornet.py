"""HorNet and its token mixers."""

from __future__ import annotations

from battery.subjects import Layer, Network
from convatlas.nn.mixers.gnconv import GlobalLocalFilter, RecursiveGatedConv

TINY = {"depths": (1, 1, 2), "base_dim": 8, "orders": (1, 2, 3), "num_classes": 7}

NETWORKS = [
    Network("hornet_tiny_7x7", {**TINY, "filter_grids": (None, None, None)}),
    Network("hornet_tiny_gf", {**TINY, "filter_grids": (None, (4, 3), (3, 3))}),
]

LAYERS = [
    Layer(RecursiveGatedConv, 8, {"order": 3, "scale": 1 / 3}),
    Layer(RecursiveGatedConv, 6, {"order": 2, "kernel_size": 3, "dims": 1}, dims=(1,)),
    Layer(RecursiveGatedConv, 4, {"order": 1, "kernel_size": 3, "dims": 3}, dims=(3,)),
    Layer(GlobalLocalFilter, 6, {"grid": (7, 3)}),
]
