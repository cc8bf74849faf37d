"""PHNN: hypercomplex convolutions and the networks of them."""

from __future__ import annotations

from typing import Any

import torch

from battery.subjects import Conv, Network, Operator, random
from convatlas.nn.conv.hypercomplex import (
    PHConv1d,
    PHConv2d,
    PHConv3d,
    PHConvTranspose1d,
    PHConvTranspose2d,
    PHConvTranspose3d,
    QuaternionConv1d,
    QuaternionConv2d,
    QuaternionConv3d,
)
from convatlas.ops.hypercomplex import ph_weight

_PICKLES = {"pickles": "torch refuses to pickle parametrized modules; state dicts and copies work"}
_IMAGES = {
    **_PICKLES,
    "named_modules_exist": "the stem reads channels filled up to a multiple of n, so it has four for two",
    "weights_of_another_task_are_adapted": "filters of the stem have one shape for all channels up to n",
}
_GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2, "bias": False},
    "pointwise": {"kernel_size": 1},
    "grouped": {"kernel_size": 3, "groups": 2, "padding": 1},
}
_REFUSED = {"depthwise": {"kernel_size": 3, "groups": 4}}


def _conv(kind: type[torch.nn.Module], dims: int, n: int, **more: Any) -> Conv:
    options = {"n": n, **more.pop("options", {})}
    return Conv(kind, dims, options, geometries=_GEOMETRIES, refused=_REFUSED, **more)


def _quaternion(kind: type[torch.nn.Module], dims: int) -> Conv:
    geometries = {name: place for name, place in _GEOMETRIES.items() if name != "grouped"}
    return Conv(kind, dims, geometries=geometries, refused=_REFUSED)


NETWORKS = [
    Network("phresnet18", {"depths": (1, 2), "widths": (8, 12), "num_classes": 7}, exempt=_IMAGES),
    Network("phresnet50_large", {"depths": (1, 1), "widths": (6, 9), "n": 3, "num_classes": 7}, exempt=_IMAGES),
    Network("phvgg16", {"widths": ((8, 8), (8, 12)), "head_widths": (8, 12), "num_classes": 7}, exempt=_IMAGES),
    Network(
        "phsed_full",
        {
            "in_channels": 4,
            "frequencies": 12,
            "num_classes": 3,
            "overlaps": 2,
            "widths": (8, 12),
            "pools": ((3, 2), (2, 2)),
            "recurrent_width": 6,
            "recurrent_depth": 2,
            "head_width": 8,
        },
        inputs=lambda model, batch: (torch.rand(batch, 4, 12, 9),),
        exempt={**_PICKLES, "compiles_without_a_break": "the compiler of torch leaves recurrent layers out"},
    ),
]

CONVS = [
    _conv(PHConv1d, 1, 2),
    _conv(PHConv2d, 2, 2),
    _conv(PHConv3d, 3, 2),
    _conv(PHConvTranspose1d, 1, 2, transposed=True),
    _conv(PHConvTranspose2d, 2, 2, transposed=True),
    _conv(PHConvTranspose3d, 3, 2, transposed=True),
    _quaternion(QuaternionConv1d, 1),
    _quaternion(QuaternionConv2d, 2),
    _quaternion(QuaternionConv3d, 3),
]

OPERATORS = [
    Operator(
        ph_weight,
        examples={
            "image": lambda: (random(2, 2, 2), random(2, 3, 1, 3, 2)),
            "linear": lambda: (random(3, 3, 3), random(3, 2, 5)),
            "signal": lambda: (random(4, 4, 4), random(4, 1, 2, 3)),
            "groups": lambda: (random(2, 2, 2), random(2, 6, 2, 3), 3),
            "one_component": lambda: (random(1, 1, 1), random(1, 5, 3, 1)),
        },
        reaching={"matmul": lambda: (random(2, 2, 2), random(2, 3, 1, 3, 2))},
    ),
]
