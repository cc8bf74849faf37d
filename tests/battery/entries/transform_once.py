"""Transform Once: mixing of modes."""

from __future__ import annotations

from battery.subjects import Operator, random
from convatlas.ops.mode_mixing import mix_modes, mode_major

OPERATORS = [
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
