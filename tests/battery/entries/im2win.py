"""Im2win: the operator and the layer."""

from __future__ import annotations

import torch

from battery.subjects import Conv, Operator, random
from convatlas.nn.conv.im2win import Im2winConv2d
from convatlas.ops.im2win import conv2d_im2win

CONVS = [
    Conv(
        Im2winConv2d,
        2,
        geometries={
            "plain": {"kernel_size": 3},
            "strided": {"kernel_size": (3, 2), "stride": 2, "padding": 1, "padding_mode": "circular"},
            "dilated": {"kernel_size": 3, "padding": "same", "dilation": 2, "bias": False},
            "grouped": {"kernel_size": 3, "groups": 4},
        },
    ),
]

OPERATORS = [
    Operator(
        conv2d_im2win,
        examples={
            "plain": lambda: (random(2, 3, 7, 5), random(4, 3, 3, 2), random(4)),
            "strided": lambda: (random(1, 2, 8, 9), random(3, 2, 3, 4), None, (2, 3), (1, 2)),
            "dilated": lambda: (random(1, 4, 9, 8), random(6, 2, 2, 3), random(6), (1, 2), "valid", (3, 2), 2),
        },
        reaching={
            "nchw": lambda: (random(2, 3, 7, 5), random(4, 3, 3, 2)),
            "nhwc": lambda: (random(2, 3, 7, 5), random(4, 3, 3, 2), None, 2),
            "direct": lambda: (
                random(2, 3, 7, 5).contiguous(memory_format=torch.channels_last),
                random(4, 3, 1, 1),
            ),
        },
        reaching_on_gpu={
            "triton": lambda: (random(2, 3, 7, 5), random(4, 3, 3, 2)),
            "triton_explicit": lambda: (random(2, 1, 7, 5), random(130, 1, 3, 2)),
        },
    ),
]
