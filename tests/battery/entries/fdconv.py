"""FDConv: the layer, the networks with it, and convolution with a weight for each sample."""

from __future__ import annotations

from battery.subjects import Conv, Network, Operator, random
from convatlas.nn.conv.fdconv import FDConv2d
from convatlas.ops.per_sample_conv import per_sample_conv2d

NETWORKS = [
    Network(
        "resnet50_fdconv",
        # One block: with random weights the factors of several layers grow without bound.
        {
            "block": "basic",
            "depths": (1,),
            "widths": (20,),
            "stem_width": 20,
            "fdconv_kernels": 4,
            "num_classes": 7,
        },
    ),
]

CONVS = [
    Conv(
        FDConv2d,
        2,
        options,
        refused={
            "grouped": {"kernel_size": 3, "groups": 2},
            "oblong": {"kernel_size": (3, 1)},
            "mirrored": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
        },
    )
    for options in ({"kernel_num": 4}, {"kernel_num": 2, "param_ratio": 2, "act": "tanh", "ksm_local": False})
]

OPERATORS = [
    Operator(
        per_sample_conv2d,
        examples={
            "padded": lambda: (random(2, 3, 7, 5), random(2, 4, 3, 3, 3), 1, 1),
            "strided": lambda: (random(3, 3, 8, 5), random(3, 2, 3, 3, 3), 2, 1, 2),
            "pointwise": lambda: (random(2, 3, 4, 5), random(2, 4, 3, 1, 1), 2),
            "one": lambda: (random(1, 2, 3, 3), random(1, 2, 2, 3, 3)),
        },
        reaching={
            "grouped": lambda: (random(2, 3, 7, 5), random(2, 4, 3, 3, 3), 1, 1),
            "matmul": lambda: (random(2, 3, 4, 5), random(2, 4, 3, 1, 1)),
        },
    ),
]
