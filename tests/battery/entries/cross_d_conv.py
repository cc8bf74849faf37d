"""Cross-D Conv: the layer, its operators and ResNet-18 of it, for images and for volumes."""

from __future__ import annotations

import torch

from battery.subjects import Conv, Network, Operator, random
from convatlas.data.volume_transforms import VolumePreprocess
from convatlas.nn.conv.cross_d_conv import CrossDConv2d
from convatlas.ops.fourier_shift import shifted_slices
from convatlas.ops.per_sample_conv import per_sample_conv

_TINY = {"depths": (1, 1), "widths": (8, 12), "stem_width": 8, "num_classes": 7}
_GEOMETRIES = {
    "plain": {"kernel_size": 3},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 2},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2, "bias": False},
    "even": {"kernel_size": 2, "padding": "same"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
}

NETWORKS = [
    Network(
        "cross_d_resnet18",
        _TINY,
        exempt={
            "memory_layout_does_not_matter": "torch moves no module with 3-D kernels to the channels-last of images",
            "named_modules_exist": "the kernels of the stem are 3-D, and its controller reads the channels as well",
            "weights_of_another_task_are_adapted": "the controller of the stem reads the channels as well",
        },
    ),
    Network(
        "cross_d_resnet18_3d",
        {**_TINY, "preprocess": VolumePreprocess(size=(9, 16, 16))},
        inputs=lambda model, batch: (torch.randn(batch, model.in_channels, 9, 17, 15),),
    ),
]

CONVS = [
    Conv(CrossDConv2d, 2, geometries=_GEOMETRIES, refused={"oblong": {"kernel_size": (3, 5)}}),
    Conv(CrossDConv2d, 2, {"centered": True}, geometries={"plain": {"kernel_size": 3}}),
]

OPERATORS = [
    Operator(
        shifted_slices,
        examples={
            "odd": lambda: (random(3, 2, 3, 3, 3), random(2, 3)),
            "even": lambda: (random(2, 1, 4, 4, 4), random(3, 3)),
            "five": lambda: (random(2, 3, 5, 5, 5), random(1, 3)),
            "one_tap": lambda: (random(3, 2, 1, 1, 1), random(2, 3)),
        },
        reaching={"dirichlet": lambda: (random(3, 2, 3, 3, 3), random(2, 3))},
    ),
    Operator(
        per_sample_conv,
        examples={
            "odd": lambda: (random(3, 4, 7, 5), random(3, 6, 4, 3, 3), random(6), (1, 1), (1, 1), (1, 1), 1),
            "strided": lambda: (random(2, 4, 8, 7), random(2, 6, 2, 3, 2), None, (2, 1), (1, 0), (1, 2), 2),
            "one": lambda: (random(1, 2, 3, 3), random(1, 2, 2, 1, 1), None, (1, 1), (0, 0), (1, 1), 1),
            "pointwise": lambda: (random(2, 4, 5, 4), random(2, 6, 2, 1, 1), random(6), (2, 1), (0, 0), (1, 1), 2),
            "signal": lambda: (random(2, 2, 9), random(2, 4, 1, 3), random(4), (2,), (1,), (1,), 2),
            "volume": lambda: (random(2, 1, 3, 4, 5), random(2, 2, 1, 3, 3, 3), None, (1,) * 3, (1,) * 3, (1,) * 3, 1),
        },
        reaching={
            "grouped": lambda: (random(3, 4, 7, 5), random(3, 6, 4, 3, 3), None, (1, 1), (1, 1), (1, 1), 1),
            "matmul": lambda: (random(3, 4, 7, 5), random(3, 6, 4, 1, 1), None, (1, 1), (0, 0), (1, 1), 1),
        },
        reaching_on_gpu={
            "matmul": lambda: (random(3, 4, 7, 5), random(3, 6, 4, 3, 3), None, (1, 1), (1, 1), (1, 1), 1),
        },
        refused={"matmul": lambda: (random(2, 2, 9), random(2, 4, 2, 3), None, (1,), (0,), (1,), 1)},
    ),
]
