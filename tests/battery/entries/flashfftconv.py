"""Frequency-sparse convolution, short convolution of signals, and the long-convolution network."""

from __future__ import annotations

from battery.subjects import Conv, Layer, Network, Operator, image, random
from convatlas.nn.conv.short_conv import ShortConv1d
from convatlas.nn.mixers.long_conv import LongConv
from convatlas.ops.frequency_sparse import frequency_sparse_conv
from convatlas.ops.short_conv import short_conv1d

OPERATORS = [
    Operator(
        frequency_sparse_conv,
        examples={
            "blocks": lambda: (random(2, 2, 7), random(2, 7), 24, (3, 1, 2), (4, 2, 3)),
            "low_pass": lambda: (random(2, 2, 7), random(2, 9), 15, 3),
            "gated": lambda: (random(1, 2, 5), random(2, 3), 15, (3, 2), (5, 3), random(1, 2, 5), random(1, 2, 5)),
        },
        reaching={"filtered": lambda: (random(2, 2, 7), random(2, 7), 24, (3, 1, 2), (4, 2, 3))},
        reaching_on_gpu={"monarch": lambda: (random(2, 2, 7), random(2, 7), 24, (3, 1, 2), (4, 2, 3))},
        refused={"monarch": lambda: (random(2, 2, 7), random(2, 7), 14, 3)},
    ),
    Operator(
        short_conv1d,
        examples={
            "channels_first": lambda: (random(2, 3, 7), random(3, 5), random(3), 4),
            "tokens": lambda: (random(2, 7, 3), random(3, 1, 4), random(3), 3, True),
            "unpadded": lambda: (random(1, 3, 2), random(2, 3), None, 0, True),
            "one_sample": lambda: (random(3, 1, 1), random(1, 1)),
            "wide_padding": lambda: (random(1, 2, 3), random(2, 2), None, 5),
        },
        reaching={
            "torch": lambda: (random(2, 3, 7), random(3, 5), random(3), 4),
            "view": lambda: (random(2, 7, 3), random(3, 4), None, 3, True),
        },
        reaching_on_gpu={"triton": lambda: (random(2, 7, 3), random(3, 4), None, 3, True)},
        refused={"view": lambda: (random(2, 3, 7), random(3, 5), random(3), 4)},
    ),
]

NETWORKS = [
    Network("long_conv", {"channels": 8, "depth": 3, "num_classes": 7, "length": 50, "lam": 0.001}, image(9, 7)),
]

CONVS = [
    Conv(
        ShortConv1d,
        1,
        channels=(6, 6),
        geometries={
            "causal": {"kernel_size": 4, "padding": 3, "groups": 6},
            "without_bias": {"kernel_size": 5, "padding": 2, "groups": 6, "bias": False},
            "unpadded": {"kernel_size": 3, "groups": 6},
        },
        refused={
            "dense": {"kernel_size": 3, "padding": 1},
            "strided": {"kernel_size": 3, "stride": 2, "groups": 6},
            "dilated": {"kernel_size": 3, "dilation": 2, "groups": 6},
            "reflected": {"kernel_size": 3, "padding": 1, "groups": 6, "padding_mode": "reflect"},
        },
    ),
]

LAYERS = [
    Layer(LongConv, 6, {"length": 7, "heads": 2, "lam": 0.0}, dims=(1,)),
]
