"""The deep conjugate direction method: its network and the Poisson operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from battery.subjects import Network, Operator, random
from convatlas.ops.poisson import PoissonOperator, poisson_product


def _grid(*shape: int) -> Any:
    return lambda model, batch: (torch.randn(batch, 1, *shape),)


NETWORKS = [
    Network("dcdm_64", {"width": 4, "depths": (1, 1, 1)}, _grid(6, 4, 2)),
    Network("dcdm_2d_128", {"width": 4, "depths": (2, 1, 0)}, _grid(6, 10)),
]


def _cells(*shape: int, batch: tuple[int, ...] = (), masked: bool = True) -> tuple[Tensor, Tensor | None, Tensor]:
    kind = torch.randint(3, shape, generator=torch.Generator().manual_seed(0))
    operator = PoissonOperator(shape, fluid=kind > 0 if masked else None, boundary="neumann" if masked else "dirichlet")
    return random(*batch, *shape), operator.fluid if masked else None, operator.degree


OPERATORS = [
    Operator(
        poisson_product,
        {
            "plane": lambda: _cells(5, 4),
            "volumes": lambda: _cells(3, 4, 5, batch=(2, 1)),
            "line without mask": lambda: _cells(7, masked=False),
            "one row": lambda: _cells(1, 6, masked=False),
            "one cell": lambda: _cells(1, 1, 1, masked=False),
        },
        reaching={"shifts": lambda: _cells(4, 4)},
    )
]
