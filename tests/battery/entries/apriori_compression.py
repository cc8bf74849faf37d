"""One-way convolutions and the surrogates of wave solvers that are made of them."""

from __future__ import annotations

from typing import Any

import torch

from battery.subjects import Conv, Network
from convatlas.nn.conv.one_way import (
    OneWayConv1d,
    OneWayConv2d,
    OneWayConv3d,
    OneWayConvTranspose1d,
    OneWayConvTranspose2d,
    OneWayConvTranspose3d,
)

_PICKLES = {"pickles": "torch refuses to pickle parametrized modules; state dicts and copies work"}
_SMALL = {"widths": (4, 8), "depth": 1}
_GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "grouped": {"kernel_size": 2, "padding": 2, "dilation": 2, "groups": 4, "bias": False},
}
_POINTWISE = {**_GEOMETRIES, "pointwise": {"kernel_size": 1}}


def _conv(kind: type[torch.nn.Module], dims: int, options: dict[str, Any] | None = None, **more: Any) -> Conv:
    return Conv(kind, dims, options or {}, **{"geometries": _POINTWISE, **more})


def _fields(model: torch.nn.Module, batch: int) -> tuple[torch.Tensor, ...]:
    return (torch.randn(batch, model.config.in_channels, 9, 11),)


def _parameters(model: torch.nn.Module, batch: int) -> tuple[torch.Tensor, ...]:
    return (torch.rand(batch, model.config.parameters),)


NETWORKS = [
    Network("wave_surrogate", _SMALL, _fields),
    Network("wave_surrogate_oneway_rank2", _SMALL, _fields, _PICKLES),
    Network("wave_field_oneway", {"size": 9, "hidden": 6, "widths": (8, 4)}, _parameters, _PICKLES),
]

CONVS = [
    _conv(OneWayConv1d, 1),
    _conv(OneWayConv2d, 2),
    _conv(OneWayConv2d, 2, {"rank": 2, "evaluation": "sequential"}, geometries=_GEOMETRIES),
    _conv(OneWayConv3d, 3),
    _conv(OneWayConvTranspose1d, 1, transposed=True),
    _conv(OneWayConvTranspose2d, 2, {"evaluation": "sequential"}, transposed=True),
    _conv(OneWayConvTranspose3d, 3, transposed=True),
]
