"""InceptionNeXt and the ConvNeXt that it is compared with."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from battery.subjects import Arguments, Layer, Network, Operator, random
from convatlas.nn.mixers.inception import InceptionDWConv2d, PartialDWConv2d
from convatlas.ops.inception import inception_dwconv2d


def _inception(
    size: tuple[int, int], channels: int = 7, groups: int = 2, square: int = 3, band: int = 5, dilation: int = 1
) -> Arguments:
    def arguments() -> tuple[Any, ...]:
        shapes = [(groups, 1, square, square), (groups, 1, 1, band), (groups, 1, band, 1)]
        weights = [tensor for shape in shapes for tensor in (random(*shape), random(groups))]
        return random(2, channels, *size), *weights, dilation

    return arguments


def _inception_large() -> tuple[Any, ...]:
    x, *rest = (part.float() if isinstance(part, Tensor) else part for part in _inception((29, 31))())
    return x.requires_grad_(), *rest


NETWORKS = [
    Network("inceptionnext_tiny", {"depths": (1, 2), "dims": (16, 24), "num_classes": 7}),
    Network("convnext_tiny", {"depths": (1, 2), "dims": (8, 12), "num_classes": 7}),
    Network("convnext_tiny_k3_par1_4", {"depths": (1, 2), "dims": (8, 12), "num_classes": 7}),
]

LAYERS = [
    Layer(InceptionDWConv2d, 17),
    Layer(InceptionDWConv2d, 12, {"square_kernel_size": 5, "band_kernel_size": 3, "branch_ratio": 0.25, "dilation": 2}),
    Layer(PartialDWConv2d, 9, {"ratio": 0.5}),
]

OPERATORS = [
    Operator(
        inception_dwconv2d,
        examples={
            "odd": _inception((5, 7)),
            "row": _inception((1, 7)),
            "column": _inception((5, 1)),
            "pixel": _inception((1, 1)),
            "all_channels": _inception((3, 5), channels=6),
            "dilated": _inception((7, 5), square=5, band=3, dilation=2),
        },
        reaching={"turned": _inception_large},
    ),
]
