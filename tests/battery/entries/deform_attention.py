"""Multi-scale deformable sampling."""

from __future__ import annotations

import torch

from battery.subjects import Operator, random
from convatlas.ops.deform_attention import deform_attention


def _places(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Locations within and around a map, and weights."""
    return 0.5 + 0.5 * random(*shape, 2), random(*shape)


OPERATORS = [
    Operator(
        deform_attention,
        examples={
            "levels": lambda: (random(2, 24, 2, 5), ((3, 5), (2, 4), (1, 1)), *_places(2, 7, 2, 3, 2)),
            "one_pixel": lambda: (random(1, 1, 1, 1), ((1, 1),), *_places(1, 1, 1, 1, 1)),
        },
        reaching={"rows": lambda: (random(1, 6, 2, 24), ((2, 3),), *_places(1, 4, 2, 1, 2))},
        reaching_on_gpu={"triton": lambda: (random(1, 6, 2, 3), ((2, 3),), *_places(1, 4, 2, 1, 2))},
    ),
]
