"""ECA-Net: layers, networks and the operator."""

from __future__ import annotations

from battery.subjects import Layer, Network, Operator, random
from convatlas.nn.mixers.eca import ECA, ChannelGate
from convatlas.nn.mixers.squeeze_excite import SqueezeExcite
from convatlas.ops.eca import eca

NETWORKS = [
    Network("resnet18", {"depths": (1, 2), "widths": (8, 12), "stem_width": 8, "num_classes": 7}),
    Network(
        "eca_resnet50",
        {"depths": (1, 1), "widths": (4, 6), "stem_width": 8, "eca_kernel_sizes": (3, 5), "num_classes": 7},
    ),
    Network(
        "eca_mobilenet_v2",
        {
            "stages": ((1, 8, 1, 1), (6, 12, 2, 2), (6, 16, 1, 2)),
            "stem_width": 8,
            "head_width": 24,
            "eca_kernel_sizes": (1, 3, 3),
            "num_classes": 7,
        },
    ),
]

LAYERS = [
    Layer(ECA, 9, dims=(1, 2, 3)),
    Layer(ECA, 9, {"shared": False, "padding": "circular"}, dims=(1, 2, 3)),
    Layer(ChannelGate, 9, {"groups": 3}, dims=(1, 2, 3)),
    Layer(SqueezeExcite, 9, {"reduction": 2}, dims=(1, 2, 3)),
]

OPERATORS = [
    Operator(
        eca,
        examples={
            "odd": lambda: (random(2, 7, 3, 5), random(1, 1, 3)),
            "signal": lambda: (random(2, 7, 5), random(1, 1, 5)),
            "volume": lambda: (random(1, 6, 1, 3, 2), random(1, 1, 3)),
            "pixel": lambda: (random(3, 5, 1, 1), random(1, 1, 3)),
            "fewer_channels_than_taps": lambda: (random(2, 2, 3, 3), random(1, 1, 7)),
            "one_tap": lambda: (random(2, 4, 3, 3), random(1, 1, 1)),
            "own_kernels": lambda: (random(2, 7, 3, 5), random(7, 1, 3)),
            "circular": lambda: (random(2, 7, 3, 5), random(1, 1, 5), "circular"),
        },
        reaching={
            "shifts": lambda: (random(2, 7, 3, 5), random(1, 1, 3)),
            "conv1d": lambda: (random(1, 7, 3, 5), random(1, 1, 3)),
        },
        refused={"conv1d": lambda: (random(2, 7, 3, 5), random(7, 1, 3))},
    ),
]
