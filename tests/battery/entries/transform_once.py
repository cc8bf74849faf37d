"""Transform Once: the cosine transform, mixing of channels and of modes, the networks and their baselines."""

from __future__ import annotations

import torch

from battery.subjects import Inputs, Network, Operator, random
from convatlas.ops.dct import dct, idct
from convatlas.ops.mode_mixing import channel_major, mix_axis, mix_modes, mode_major


def field(*grid: int) -> Inputs:
    """Input of a network on fields; another grid than that of its config on purpose."""
    return lambda model, batch: (torch.randn(batch, model.config.in_channels, *grid),)


SMALL = {"modes": (4, 3), "width": 5, "depth": 2, "resolution": (9, 8), "in_channels": 2}

LAYOUT = {"memory_layout_does_not_matter": "torch moves no module with weights of five axes to the layout of images"}

NETWORKS = [
    Network("t1_navier_stokes", {**SMALL, "keep_high": True, "padding": 2, "output_space": "grid"}, field(7, 10)),
    Network("t1u_navier_stokes", {"channel_exponent": 1, "resolution": 25, "in_channels": 2}, field(26, 25)),
    Network("t1_fno_navier_stokes", SMALL, field(5, 7), exempt=LAYOUT),
]

OPERATORS = [
    Operator(
        dct,
        examples={
            "line": lambda: (random(2, 3, 7),),
            "plane": lambda: (random(2, 3, 6, 5), (-2, -1), (4, 5)),
            "unnormalised": lambda: (random(3, 4, 2), 1, 3, None),
            "one_point": lambda: (random(2, 1),),
            "volume": lambda: (random(1, 4, 3, 2), (1, 2, 3)),
        },
        reaching={"matmul": lambda: (random(2, 300), -1, 20), "fft": lambda: (random(2, 300),)},
    ),
    Operator(
        idct,
        examples={
            "line": lambda: (random(2, 3, 7),),
            "plane": lambda: (random(2, 3, 4, 5), (-2, -1), (7, 6)),
            "unnormalised": lambda: (random(3, 4, 2), 1, 5, None),
            "one_point": lambda: (random(2, 1),),
            "volume": lambda: (random(1, 4, 3, 2), (1, 2, 3)),
        },
        reaching={"matmul": lambda: (random(2, 20), -1, 300), "fft": lambda: (random(2, 300),)},
    ),
    Operator(
        mix_axis,
        examples={
            "plane": lambda: (random(2, 3, 5, 4), random(5, 5, 3), -2),
            "channel_major": lambda: (random(1, 3, 2, 5), channel_major(random(5, 2, 3))),
            "volume": lambda: (random(2, 1, 3, 1, 2), random(3, 4, 1), 2),
            "one_mode": lambda: (random(1, 2, 1), random(1, 1, 2)),
        },
        reaching={"matmul": lambda: (random(2, 3, 5), random(5, 5, 3))},
    ),
    Operator(
        mix_modes,
        examples={
            "plane": lambda: (random(2, 3, 5, 4), random(3, 2, 5, 4)),
            "mode_major": lambda: (random(1, 3, 5, 3, 2), mode_major(random(3, 2, 5, 3, 2))),
            "line": lambda: (random(3, 1, 7), random(1, 4, 7)),
            "one_mode": lambda: (random(1, 2, 1), random(2, 2, 1)),
        },
        reaching={"matmul": lambda: (random(2, 3, 5), random(3, 2, 5))},
    ),
]
