"""ConvFirst: networks of its blocks, and the fused operators."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from battery.subjects import Arguments, Network, Operator, random
from convatlas.ops.block_fusion import fused_convfirst, fused_mbconv

TINY = {
    "depths": (1, 2),
    "dims": (8, 12),
    "stem_width": 8,
    "head_width": 16,
    "group_width": 4,
    "expansion": 2,
    "num_classes": 7,
}


def _weights(*shapes: tuple[int, ...]) -> list[Tensor]:
    """A kernel that keeps the variance and a bias for each shape."""
    return [part for shape in shapes for part in (random(*shape) / math.prod(shape[1:]) ** 0.5, random(shape[0]))]


def _convfirst(
    size: tuple[int, int],
    *,
    channels: int = 6,
    hidden: int = 10,
    out: int = 6,
    width: int = 3,
    kernel_size: int = 3,
    stride: int = 1,
    batch: int = 2,
    tile: tuple[int, int] | None = None,
) -> Arguments:
    def arguments() -> tuple[Any, ...]:
        spatial = _weights((channels, width, kernel_size, kernel_size)) if width else [None, None]
        weights = _weights((hidden, channels, 1, 1), (out, hidden, 1, 1))
        groups = channels // width if width else 1
        return random(batch, channels, *size), *spatial, *weights, stride, groups, tile

    return arguments


def _mbconv(
    size: tuple[int, int],
    *,
    channels: int = 4,
    hidden: int = 8,
    out: int = 4,
    width: int = 2,
    kernel_size: int = 3,
    stride: int = 1,
    expands: bool = True,
    tile: tuple[int, int] | None = None,
) -> Arguments:
    def arguments() -> tuple[Any, ...]:
        expansion = _weights((hidden, channels, 1, 1)) if expands else [None, None]
        inner = width if expands else channels
        weights = _weights((hidden, inner, kernel_size, kernel_size), (out, hidden, 1, 1))
        groups = hidden // width if expands else 1
        return random(2, channels, *size), *expansion, *weights, stride, groups, tile

    return arguments


def _float(arguments: Arguments) -> Arguments:
    return lambda: tuple(part.float() if isinstance(part, Tensor) else part for part in arguments())


def _half(arguments: Arguments) -> Arguments:
    return lambda: tuple(part.half() if isinstance(part, Tensor) else part for part in arguments())


NETWORKS = [
    Network("convfirst_tiny", {**TINY, "block_types": ("convfirst", "convfirst")}),
    Network("convfirst_mbconv_tiny", {**TINY, "block_types": ("mbconv", "fused_mbconv")}),
]

OPERATORS = [
    Operator(
        fused_convfirst,
        examples={
            "odd": _convfirst((5, 7)),
            "tiles": _convfirst((5, 3), tile=(2, 3)),
            "strided": _convfirst((5, 4), out=4, stride=2, kernel_size=5, tile=(1, 2)),
            "pixel": _convfirst((1, 1), batch=1),
            "mlp": _convfirst((3, 2), width=0),
            "two_groups": _convfirst((3, 2), channels=4, hidden=6, out=3, width=2, stride=2),
        },
        reaching={
            "chunks": _float(_convfirst((64, 64), channels=8, hidden=256, out=8, width=8)),
            "tiles": _convfirst((5, 3), tile=(2, 3)),
        },
        reaching_on_gpu={"triton": _half(_convfirst((8, 8), channels=64, hidden=128, out=64, width=8))},
        refused={"triton": _convfirst((3, 2))},
    ),
    Operator(
        fused_mbconv,
        examples={
            "odd": _mbconv((5, 7)),
            "depthwise": _mbconv((5, 3), width=1, out=3, tile=(2, 2)),
            "strided": _mbconv((5, 4), stride=2, kernel_size=5, tile=(1, 2)),
            "pixel": _mbconv((1, 1)),
            "fused": _mbconv((4, 3), expands=False, tile=(3, 2)),
        },
        reaching={
            "tiles": _mbconv((5, 4), stride=2, tile=(1, 2)),
        },
    ),
]
