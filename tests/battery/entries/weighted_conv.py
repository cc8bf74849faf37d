"""Weighted convolution, and the networks that the papers give it to."""

from __future__ import annotations

from typing import Any

import torch

from battery.subjects import Conv
from convatlas.nn.conv.weighted_conv import (
    WeightedConv1d,
    WeightedConv2d,
    WeightedConv3d,
    WeightedConvTranspose1d,
    WeightedConvTranspose2d,
    WeightedConvTranspose3d,
)

_DENSITY = {1: (), 3: (0.7,), 5: (0.2, 0.8)}
_REFUSED: dict[str, dict[str, Any]] = {"even": {"kernel_size": 4}, "unnamed": {"kernel_size": 7}}


def _conv(kind: type[torch.nn.Module], dims: int, **more: Any) -> Conv:
    options = {"density": _DENSITY, **more.pop("options", {})}
    return Conv(kind, dims, options, refused=_REFUSED, **more)


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
