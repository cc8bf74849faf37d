"""Deformable convolution: the operator and the layer."""

from __future__ import annotations

from battery.subjects import Conv, Operator, random
from convatlas.nn.conv.deform_conv import DeformConv2d
from convatlas.ops.deform_conv import deform_conv2d

CONVS = [
    Conv(
        DeformConv2d,
        2,
        options,
        geometries={
            "plain": {"kernel_size": 3},
            "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
            "dilated": {"kernel_size": 3, "padding": "same", "dilation": 2, "bias": False},
            "grouped": {"kernel_size": (2, 3), "padding": (1, 0), "stride": (2, 1), "groups": 4},
        },
        refused={
            "mirrored": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
            "even": {"kernel_size": 2, "padding": "same"},
        },
    )
    for options in ({}, {"offset_groups": 2, "modulated": True})
]

OPERATORS = [
    Operator(
        deform_conv2d,
        examples={
            "shared": lambda: (random(2, 3, 5, 4), 1.5 * random(2, 8, 4, 3), random(4, 3, 2, 2)),
            # Groups of the weight and of the offsets that cross: three and two of six channels.
            "grouped": lambda: (
                *(random(1, 6, 5, 4), 2 * random(1, 8, 4, 4), random(3, 2, 1, 2), random(3), (2, 1), (1, 1), (1, 2)),
                random(1, 4, 4, 4),
            ),
            "one_pixel": lambda: (random(2, 1, 1, 1), random(2, 4, 1, 2), random(1, 1, 1, 2), None, 1, (0, 1)),
        },
        reaching={"rows": lambda: (random(1, 2, 5, 4), random(1, 2, 5, 4), random(2, 2, 1, 1))},
        reaching_on_gpu={"triton": lambda: (random(1, 2, 5, 4), random(1, 2, 5, 4), random(2, 2, 1, 1))},
    ),
]
