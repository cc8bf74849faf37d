"""Histograms of log-chroma, and the networks that find the colour of the light."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from battery.subjects import Network, Operator
from convatlas.ops.log_chroma import log_chroma_histogram, wrapped_log_chroma_histogram


def _described(model: nn.Module, batch: int) -> tuple[Tensor, ...]:
    return model.example_inputs(batch)


def _picture(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return 0.05 + 0.9 * torch.rand(shape, dtype=torch.float64, generator=generator)


def _mask(*shape: int) -> Tensor:
    return torch.arange(shape[-2] * shape[-1]).view(shape) % 3 > 0


_SMALL = {"bins": 8}
_EXPECTATION = dict.fromkeys(
    ("linear_interpretation_is_exact", "linear_scope_runs_beside_the_network"),
    "the colour is an expectation under a softmax, which is not interpreted",
)

NETWORKS = [
    Network("emlp", {"hidden": (5, 4)}, _described),
    Network("emlp_matrix", {"hidden": (6,)}, _described),
    Network("eccc", _SMALL, _described, _EXPECTATION),
    Network("eccc_ffcc", {**_SMALL, "around": "gray_world", "frames": "both"}, _described, _EXPECTATION),
    Network("ccc", _SMALL, _described, _EXPECTATION),
    Network("emlp_eccc", {"eccc": _SMALL}, _described),
]

OPERATORS = [
    Operator(
        log_chroma_histogram,
        examples={
            "odd": lambda: (_picture(2, 3, 7, 5), 8),
            "one_pixel": lambda: (_picture(1, 3, 1, 1), 4, 1.0),
            "masked": lambda: (_picture(2, 3, 6, 4), 6, 2.85, _mask(1, 1, 6, 4)),
        },
        reaching={"scatter": lambda: (_picture(1, 3, 9, 8), 16)},
    ),
    Operator(
        wrapped_log_chroma_histogram,
        examples={
            "odd": lambda: (_picture(2, 3, 7, 5), 8, 0.25),
            "wraps": lambda: (_picture(1, 3, 5, 5), 4, 0.125, (-0.1, -0.2)),
            "masked": lambda: (_picture(2, 3, 6, 4), 8, 0.25, (-1.0, -1.0), _mask(1, 1, 6, 4)),
        },
        reaching={"scatter": lambda: (_picture(1, 3, 9, 8), 8, 0.25)},
    ),
]
