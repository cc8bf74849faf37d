"""Fourier convolution."""

from __future__ import annotations

from battery.subjects import Operator, random
from convatlas.ops.fft_conv import fft_conv

OPERATORS = [
    Operator(
        fft_conv,
        examples={
            "causal": lambda: (random(3, 1, 11), random(1, 5)),
            "gated": lambda: (random(2, 2, 9), random(2, 9), None, random(2, 2, 9), random(2, 2, 9)),
            "circular": lambda: (random(2, 1, 7), random(1, 7), 7),
            "wrapped_tail": lambda: (random(2, 1, 7), random(1, 1, 6), 9),
            "both_directions": lambda: (random(2, 1, 5), random(1, 10), 10),
            "kernel_longer_than_signal": lambda: (random(2, 1, 3), random(1, 8)),
            "one_sample": lambda: (random(1, 2, 1), random(2, 1)),
            "image": lambda: (random(2, 2, 5, 3), random(2, 3, 2), (5, 4)),
            "volume": lambda: (random(1, 2, 3, 1, 5), random(2, 2, 1, 3)),
        },
        reaching={
            "direct": lambda: (random(2, 2, 300), random(2, 7)),
            "fft": lambda: (random(2, 2, 300), random(2, 300)),
            "overlap_save": lambda: (random(1, 1, 4500), random(1, 130)),
        },
        reaching_on_gpu={"triton": lambda: (random(2, 2, 300).half(), random(2, 300).half())},
        refused={"overlap_save": lambda: (random(2, 2, 7), random(2, 7), 7)},
    ),
]
