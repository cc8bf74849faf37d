"""UniRepLKNet, its networks for other modalities and the Dilated Reparam Block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from battery.subjects import Layer, Network
from convatlas.nn.mixers.dilated_reparam import DilatedReparamBlock

TINY = {"depths": (1, 2), "dims": (8, 12), "kernel_sizes": ((3,), (7, 0)), "num_classes": 7}
#: Behind a front end, which is what an entry is about.
SMALL = {"depths": (1,), "dims": (8,), "kernel_sizes": ((3,),)}
ONE_CHANNEL = {**SMALL, "in_channels": 1}
_DECISIONS = "rounding changes which {}, and with them the result"


def clip(model: nn.Module, batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, model.in_channels, 4, 21, 19),)


def waveform(model: nn.Module, batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 1700),)


def points(model: nn.Module, batch: int) -> tuple[Tensor, ...]:
    return (torch.rand(batch, 19, 3),)


def series(model: nn.Module, batch: int) -> tuple[Tensor, ...]:
    return torch.randn(batch, 8, 8), torch.rand(batch, 8, 4), torch.rand(batch, 3, 4)


NETWORKS = [
    Network("unireplknet_t", TINY),
    Network(
        "unireplknet_b_video",
        TINY,
        clip,
        exempt={
            "features_are_as_described": "the map of a clip holds several frames beside each other",
            "memory_layout_does_not_matter": "torch has no layout for volumes of a model whose weights are of images",
        },
    ),
    Network(
        "unireplknet_s_speech_commands",
        {"network": {**ONE_CHANNEL, "num_classes": 7}, "num_filters": 24, "target_length": 9},
        waveform,
    ),
    Network(
        "unireplknet_s_points",
        {
            "network": {**SMALL, "num_classes": 0},
            "num_classes": 5,
            "num_views": 2,
            "grid_size": 20,
            "image_size": 21,
            "neighbours": 4,
            "edge_channels": 8,
            "channels": 8,
        },
        points,
        exempt={"half_precision": _DECISIONS.format("points are neighbours")},
    ),
    Network(
        "unireplknet_s_weather",
        {
            "network": {**ONE_CHANNEL, "num_classes": 0},
            "tree": (2, 2),
            "node_series": 2,
            "length": 8,
            "label_length": 5,
            "horizon": 3,
            "dim": 8,
            "num_heads": 2,
            "hidden_channels": 8,
            "window": 3,
            "num_layers": 1,
        },
        series,
        exempt={
            "half_precision": _DECISIONS.format("lags agree best"),
            "pickles": "torch pickles no layer with weight normalisation",
        },
    ),
]

LAYERS = [
    Layer(DilatedReparamBlock, 6, {"kernel_size": 7}),
    Layer(DilatedReparamBlock, 4, {"kernel_size": 5, "dims": 1}, dims=(1,)),
    Layer(DilatedReparamBlock, 3, {"kernel_size": 5, "kernel_sizes": (3,), "dilations": (2,), "dims": 3}, dims=(3,)),
]
