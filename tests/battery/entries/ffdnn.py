"""FFDNN: the network, the baselines for time series, and Fourier convolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from battery.subjects import Network, Operator, random
from convatlas.ops.fourier_conv import fourier_conv1d


def _series(model: Any, batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, model.in_channels, model.config.length),)


_SMALL: dict[str, Any] = {"length": 9, "widths": (8,), "num_classes": 4, "capsule_dim": 4, "class_dim": 3}

NETWORKS = [
    Network("ffdnn", {**_SMALL, "band": (1, 5), "padding": "linear", "in_channels": 3}, _series),
    Network("sequence_cnn", {"length": 9, "widths": (4, 8)}, _series),
    Network(
        "sequence_gru",
        {"length": 9, "hidden": 5},
        _series,
        exempt={"compiles_without_a_break": "torch's compiler takes no recurrent layer into a whole graph"},
    ),
]

OPERATORS = [
    Operator(
        fourier_conv1d,
        examples={
            "all": lambda: (random(2, 3, 12), random(4, 3, 7, 2)),
            "odd": lambda: (random(2, 2, 9), random(3, 2, 4, 2)),
            "band": lambda: (random(1, 2, 10), random(2, 2, 3, 2), 2),
            "too_many": lambda: (random(2, 1, 5), random(1, 1, 9, 2), 1),
            "one_step": lambda: (random(1, 1, 1), random(1, 1, 1, 2)),
        },
        reaching={"matmul": lambda: (random(2, 3, 12), random(4, 3, 7, 2))},
    ),
]
