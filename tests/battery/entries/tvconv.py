"""TVConv: the layer and the operator."""

from __future__ import annotations

from battery.subjects import Conv, Operator, random
from convatlas.nn.conv.tvconv import TVConv2d
from convatlas.ops.per_pixel_conv import translation_variant_conv2d

CONVS = [
    Conv(
        TVConv2d,
        2,
        {"output_size": (9, 7), "hidden_channels": 3, "hidden_layers": 1},
        channels=(6, 6),
        geometries={
            "plain": {"kernel_size": 3, "padding": 1, "groups": 6},
            "without_bias": {"kernel_size": 5, "padding": 2, "groups": 6, "bias": False},
            "dilated": {"kernel_size": 3, "padding": "same", "dilation": 2, "groups": 6},
        },
        refused={
            "dense": {"kernel_size": 3, "padding": 1},
            "even": {"kernel_size": 4, "padding": 2, "groups": 6},
            "unpadded": {"kernel_size": 3, "groups": 6},
        },
        exempt={
            "gives_back_a_plain_convolution_and_merges": "it becomes a convolution with a kernel at every position, "
            "which the test of the layer checks",
        },
    ),
]

OPERATORS = [
    Operator(
        translation_variant_conv2d,
        examples={
            "odd": lambda: (random(2, 3, 7, 5), random(3, 3, 3, 7, 5), 1, 1),
            "strided": lambda: (random(2, 2, 9, 8), random(2, 3, 3, 5, 4), 2, 1),
            "dilated": lambda: (random(1, 2, 9, 6), random(2, 3, 3, 9, 6), 1, 2, 2),
            "unpadded": lambda: (random(1, 2, 6, 5), random(2, 5, 5, 2, 1)),
            "one_tap": lambda: (random(3, 2, 4, 3), random(2, 1, 1, 4, 3)),
        },
        reaching={"shifts": lambda: (random(2, 3, 7, 5), random(3, 3, 3, 7, 5), 1, 1)},
        reaching_on_gpu={"triton": lambda: (random(2, 3, 7, 5), random(3, 3, 3, 7, 5), 1, 1)},
    ),
]
