"""Pixel shuffle and its inverse."""

from __future__ import annotations

from battery.subjects import Operator, random
from convatlas.ops.shuffle import pixel_shuffle, pixel_unshuffle

OPERATORS = [
    Operator(
        pixel_shuffle,
        examples={
            "odd": lambda: (random(2, 18, 3, 5), 3),
            "pixel": lambda: (random(1, 4, 1, 1), 2),
            "channel_last_in_block": lambda: (random(2, 8, 3, 5), 2, "DCR"),
            "factors": lambda: (random(2, 12, 3, 1), (2, 3)),
            "signal": lambda: (random(2, 6, 5), 3),
            "volume": lambda: (random(1, 8, 1, 3, 2), 2),
        },
        reaching={
            "view": lambda: (random(1, 9, 71, 67), (3, 3), "CRD"),
            "torch": lambda: (random(1, 9, 5, 7), (3, 3), "CRD"),
        },
        refused={"torch": lambda: (random(1, 8, 3, 5), 2, "DCR")},
    ),
    Operator(
        pixel_unshuffle,
        examples={
            "odd": lambda: (random(2, 2, 9, 15), 3),
            "pixel": lambda: (random(1, 1, 2, 2), 2),
            "channel_last_in_block": lambda: (random(2, 2, 6, 10), 2, "DCR"),
            "factors": lambda: (random(2, 2, 6, 3), (2, 3)),
            "signal": lambda: (random(2, 2, 15), 3),
            "volume": lambda: (random(1, 1, 2, 6, 4), 2),
        },
        reaching={
            "view": lambda: (random(1, 1, 213, 201), (3, 3), "CRD"),
            "torch": lambda: (random(1, 1, 15, 21), (3, 3), "CRD"),
        },
        refused={"torch": lambda: (random(1, 2, 6, 10), 2, "DCR")},
    ),
]
