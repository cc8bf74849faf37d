"""TVConv: the networks, the layer and the operator."""

from __future__ import annotations

from battery.subjects import Conv, Network, Operator, image, random
from convatlas.nn.conv.tvconv import TVConv2d
from convatlas.ops.per_pixel_conv import translation_variant_conv2d

_GENERATOR = {"position_channels": 2, "hidden_channels": 3, "hidden_layers": 1}
_FACE = {"embedding": 6, "num_classes": 5, "preprocess": {"size": (21, 18)}, **_GENERATOR}
_MOBILE = {**_FACE, "stages": ((1, 8, 1, 1), (2, 8, 2, 2), (2, 12, 1, 2)), "stem_width": 8, "head_width": 16}
_SHUFFLE = {**_FACE, "depths": (2, 1), "widths": (8, 8, 12, 16)}
_ONE_SIZE = {"features_are_as_described": "kernels belong to positions, so images have one size"}

NETWORKS = [
    Network("face_mobilenet_v2_x1_0", _MOBILE),
    Network("tvconv_mobilenet_v2_x1_0", _MOBILE, image(21, 18), exempt=_ONE_SIZE),
    Network("tvconv_shufflenet_v2_x1_0", _SHUFFLE, image(21, 18), exempt=_ONE_SIZE),
    Network(
        "tvconv_deeplab_v3_plus_mobilenet_v2",
        {
            "image_size": (33, 21),
            "stages": ((1, 8, 1, 1), (2, 8, 1, 2), (2, 8, 1, 2), (2, 12, 1, 2), (2, 12, 1, 2), (1, 12, 1, 1)),
            "stem_width": 8,
            "width": 8,
            "low_width": 4,
            "rates": (2,),
            "expand_ratio": 1,
            **_GENERATOR,
        },
        image(33, 21),
    ),
]

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
