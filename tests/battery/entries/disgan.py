"""DISGAN: generator, discriminator, dense convolutions; MedicalNet's features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from battery.subjects import Network, Operator, random
from convatlas.ops.dense_conv import dense_conv


def _volume(*size: int):
    def inputs(model: nn.Module, batch: int) -> tuple[Tensor, ...]:
        return (torch.randn(batch, model.in_channels, *size),)

    return inputs


NETWORKS = [
    Network("disgan_x2", {"filters": 4, "num_blocks": 1}, _volume(5, 3, 4)),
    Network("disgan_x4", {"filters": 3, "num_blocks": 1, "norm": True, "in_channels": 2}, _volume(3, 2, 5)),
    Network("disgan_2d_x2", {"filters": 4, "num_blocks": 1}, _volume(7, 5)),
    Network(
        "disgan_discriminator",
        {"filters": 4, "levels": 3, "init_std": None},
        _volume(8, 16, 8),
        {"half_precision": "torch's bfloat16 gradient of a 3-D convolution of few positions is not always finite"},
    ),
    Network(
        "disgan_plain_discriminator", {"filters": 3, "levels": 2, "in_channels": 2, "init_std": None}, _volume(8, 4, 12)
    ),
    Network(
        "disgan_2d_discriminator", {"filters": 4, "levels": 3, "wavelet": "db2", "init_std": None}, _volume(16, 24)
    ),
    Network("med3d_resnet10", {"width": 4, "num_classes": 3}, _volume(19, 17, 21)),
    Network("med3d_resnet18", {"width": 4, "depths": (1, 2, 1, 1), "num_classes": 3}, _volume(17, 18, 9)),
]


def _layers(*sizes: int, dims: int, kernel: int = 3) -> list[Tensor]:
    """Weights and biases for an input of so many channels and results of the following numbers."""
    channels, parameters = sizes[0], []
    for results in sizes[1:]:
        parameters += [random(results, channels, *[kernel] * dims), random(results)]
        channels += results
    return parameters


OPERATORS = [
    Operator(
        dense_conv,
        examples={
            "volume": lambda: (random(2, 3, 3, 5, 4), 0.01, *_layers(3, 2, 2, 2, dims=3)),
            "image": lambda: (random(2, 2, 5, 7), 0.2, *_layers(2, 3, 1, dims=2)),
            "signal": lambda: (random(2, 2, 9), 0.1, *_layers(2, 1, 2, dims=1, kernel=5)),
            "one_layer": lambda: (random(1, 2, 1, 3), 0.0, *_layers(2, 2, dims=2)),
        },
        reaching={"buffer": lambda: (random(1, 2, 5, 7), 0.01, *_layers(2, 2, 2, dims=2))},
    ),
]
