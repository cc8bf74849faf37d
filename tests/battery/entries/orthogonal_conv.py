"""The regulariser of orthogonal convolutions."""

from __future__ import annotations

from battery.subjects import Operator, random
from convatlas.ops.orthogonality import l_orth

OPERATORS = [
    Operator(
        l_orth,
        examples={
            "rows": lambda: (random(3, 4, 3, 3), 1, 1, 1),
            "columns": lambda: (random(5, 2, 3, 3), 1, 1, 1),
            "strided": lambda: (random(4, 2, 5, 5), 2, 1, 1),
            "groups": lambda: (random(6, 2, 3, 3), 2, 2, 1),
            "dilated": lambda: (random(3, 2, 3, 3), 1, 1, 2),
            "signal": lambda: (random(6, 2, 3), 2, 1, 1),
            "volume": lambda: (random(2, 3, 3, 3, 3), 2, 1, 1),
            "pointwise": lambda: (random(3, 2, 1, 1), 2, 1, 1),
        },
        reaching={"half": lambda: (random(3, 4, 3, 3), 1, 1, 1)},
        exempt={"bfloat16": "as a loss it stays in float32"},
    ),
]
