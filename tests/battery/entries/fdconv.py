"""FDConv: the layer, the networks with it, and convolution with a weight for each sample."""

from __future__ import annotations

from battery.subjects import Conv, Network
from convatlas.nn.conv.fdconv import FDConv2d

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
