"""Weighted convolution, and the networks that the papers give it to."""

from __future__ import annotations

from typing import Any

import torch

from battery.subjects import Conv, Network, image
from convatlas.nn.conv.weighted_conv import (
    WeightedConv1d,
    WeightedConv2d,
    WeightedConv3d,
    WeightedConvTranspose1d,
    WeightedConvTranspose2d,
    WeightedConvTranspose3d,
)

_SMALL = image(9, 7)
_PICKLES = {"pickles": "torch refuses to pickle parametrized modules; state dicts and copies work"}
_NAFNET = {"width": 4, "encoder_depths": (1, 1), "middle_depth": 1, "decoder_depths": (1, 1)}
_VGG = {"widths": ((4,), (6, 8)), "num_classes": 7}
_DENSITY = {1: (), 3: (0.7,), 5: (0.2, 0.8)}
_REFUSED: dict[str, dict[str, Any]] = {"even": {"kernel_size": 4}, "unnamed": {"kernel_size": 7}}


def _conv(kind: type[torch.nn.Module], dims: int, **more: Any) -> Conv:
    options = {"density": _DENSITY, **more.pop("options", {})}
    return Conv(kind, dims, options, refused=_REFUSED, **more)


NETWORKS = [
    Network("dncnn", {"depth": 4, "dim": 6}, _SMALL),
    Network("dncnn_weighted_k5", {"depth": 3, "dim": 6, "in_channels": 3}, _SMALL, _PICKLES),
    Network("dncnn_trained_density_k7", {"depth": 3, "dim": 6}, _SMALL, _PICKLES),
    Network("nafnet_width32", _NAFNET, _SMALL),
    Network("nafnet_weighted_width32", _NAFNET, _SMALL, _PICKLES),
    Network("vgg16_bn_small", _VGG, image(13, 18)),
    Network(
        "vgg16_bn_small_weighted",
        _VGG,
        image(13, 18),
        exempt={
            **_PICKLES,
            "named_modules_exist": "W of the stem is the original of a parametrization",
            "weights_of_another_task_are_adapted": "W of the stem is the original of a parametrization",
        },
    ),
]

CONVS = [
    _conv(WeightedConv1d, 1),
    _conv(WeightedConv2d, 2),
    _conv(
        WeightedConv2d,
        2,
        options={"trainable_density": True},
        geometries={"oblong": {"kernel_size": (3, 5), "groups": 2}},
    ),
    _conv(WeightedConv3d, 3),
    _conv(WeightedConvTranspose1d, 1, transposed=True),
    _conv(WeightedConvTranspose2d, 2, transposed=True),
    _conv(WeightedConvTranspose3d, 3, transposed=True),
]
