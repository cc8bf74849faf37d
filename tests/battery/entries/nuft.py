"""The Fourier transform of simplices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from battery.subjects import Operator
from convatlas.ops import simplex_fourier as simplices


def simplex_fourier(*args: Any, backend: str = "auto") -> Tensor:
    """The spectrum as pairs of real numbers, which the battery compares."""
    return torch.view_as_real(simplices.simplex_fourier(*args, backend=backend))


def _inside(n: int, dims: int) -> Tensor:
    return 0.1 + 0.8 * torch.rand(n, dims, dtype=torch.float64)


def _weights(n: int, channels: int = 1) -> Tensor:
    return 0.5 + torch.rand(n, channels, dtype=torch.float64)


_TRIANGLES = torch.tensor([[0, 1, 2], [2, 1, 3]])
_SQUARE = torch.tensor([[0.25, 0.25], [0.75, 0.25], [0.75, 0.75], [0.25, 0.75]], dtype=torch.float64)
_EDGES = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]])
_POINTS = torch.tensor([[0], [2], [2]])

OPERATORS = [
    Operator(
        simplex_fourier,
        examples={
            "line": lambda: (_inside(3, 1), torch.tensor([[0, 1], [1, 2]]), _weights(2), (7,), 2.0),
            "triangles": lambda: (_inside(4, 2), _TRIANGLES, _weights(2, 2), (4, 3)),
            "along_the_axes": lambda: (_SQUARE, torch.tensor([[0, 1, 2], [0, 2, 3]]), _weights(2), (5, 4), 1.0, "mass"),
            "surface": lambda: (_inside(4, 3), _TRIANGLES, _weights(2), (3, 2, 4), (1.0, 2.0, 1.5)),
            "tetrahedron": lambda: (_inside(4, 3), torch.tensor([[3, 1, 0, 2]]), _weights(1), (2, 3, 2)),
            "points": lambda: (_inside(3, 2), _POINTS, _weights(3, 2), (3, 4)),
            "points_in_a_volume": lambda: (_inside(3, 3), _POINTS, _weights(3, 2), (3, 1, 4), 1.5, "mass"),
        },
        reaching={
            "stable": lambda: (_inside(4, 2), _TRIANGLES, _weights(2), (4, 4)),
            "separable": lambda: (_inside(3, 1), _POINTS, _weights(3), (5,)),
        },
        refused={"separable": lambda: (_inside(4, 2), _TRIANGLES, _weights(2), (4, 4))},
        exempt={"bfloat16": "there are no complex numbers of that precision"},
    ),
]
