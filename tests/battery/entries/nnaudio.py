"""The correlations behind spectrograms."""

from __future__ import annotations

import torch
from torch import Tensor

from battery.subjects import Operator, random
from convatlas.ops.stft import stft
from convatlas.ops.strided_correlation import bands, strided_correlation


def _narrow(size: int) -> Tensor:
    """Rows that are zero at both ends, each but the first less than half as wide as the one before."""
    kernels = random(4, size)
    for row, margin in enumerate((0, 0, size // 3, size // 2 - 1)):
        kernels[row, :margin] = kernels[row, size - margin :] = 0
    return kernels


_NARROW = _narrow(15)

OPERATORS = [
    Operator(
        strided_correlation,
        examples={
            "one_sample": lambda: (random(1, 1), random(1, 1), 1),
            "odd": lambda: (random(2, 29), random(3, 7), 3),
            "hop_beyond_kernel": lambda: (random(1, 23), random(2, 3), 5),
            "hop_of_a_kernel": lambda: (random(3, 24), random(2, 4), 4),
            "bands": lambda: (random(2, 41), _NARROW, 4, bands(_NARROW)),
        },
        reaching={
            "matmul": lambda: (random(2, 50), random(3, 20), 6),
            "polyphase": lambda: (random(2, 700), random(3, 200), 64),
            "conv": lambda: (random(1, 40), random(300, 8), 4),
        },
    ),
    Operator(
        stft,
        examples={
            "smallest": lambda: (random(1, 2), random(2), 1),
            "odd": lambda: (random(2, 40), random(9), 4),
            "even": lambda: (random(2, 33), random(8), 3),
            "warped": lambda: (random(1, 30), random(10), 5, torch.tensor([0.5, 1.25, 3.1], dtype=torch.float64)),
        },
        reaching={
            "fft": lambda: (random(2, 40), random(8), 4),
            "conv": lambda: (random(2, 40), random(8), 4, torch.tensor([0.5, 2.5], dtype=torch.float64)),
        },
        refused={"fft": lambda: (random(2, 40), random(8), 4, torch.tensor([0.5, 2.5], dtype=torch.float64))},
    ),
]
