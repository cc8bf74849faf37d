"""The matrix-free Poisson operator beside its definition and its matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from convatlas.errors import UnknownName
from convatlas.ops.poisson import PoissonOperator, boundary_walls, poisson_product


def masks(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    kind = torch.randint(4, shape, generator=torch.Generator().manual_seed(0))
    return kind > 1, kind == 1


def by_definition(x: Tensor, operator: PoissonOperator) -> Tensor:
    """Cell by cell: the sum over neighbours that are not solid of what flows to them."""
    y = torch.zeros_like(x)
    for cell in operator.fluid.nonzero().tolist():
        for axis in range(len(cell)):
            for side, step in enumerate((-1, 1)):
                other = cell.copy()
                other[axis] += step
                inside = 0 <= other[axis] < operator.shape[axis]
                if inside and operator.fluid[tuple(other)]:
                    y[tuple(cell)] += x[tuple(cell)] - x[tuple(other)]
                elif (inside and operator.air[tuple(other)]) or (
                    not inside and operator.boundary[axis][side] == "dirichlet"
                ):
                    y[tuple(cell)] += x[tuple(cell)]
    return y


@pytest.mark.parametrize("boundary", ["dirichlet", "neumann", "mixed"])
@pytest.mark.parametrize("shape", [(5, 4), (3, 4, 2), (6,), (1, 3)], ids=str)
@pytest.mark.parametrize("cells", ["fluid", "fluid and solid", "fluid, air and solid"])
def test_product_and_matrix_follow_the_definition(shape: tuple[int, ...], boundary: Any, cells: str):
    fluid, air = masks(shape)
    chosen = {"fluid": {}, "fluid and solid": {"fluid": fluid}, "fluid, air and solid": {"fluid": fluid, "air": air}}
    walls = [("neumann", "dirichlet")] * len(shape) if boundary == "mixed" else boundary
    operator = PoissonOperator(shape, boundary=walls, **chosen[cells])
    x = torch.randn(2, *shape, dtype=torch.float64)
    expected = torch.stack([by_definition(one, operator) for one in x])
    torch.testing.assert_close(operator(x), expected)
    torch.testing.assert_close(operator(x.flatten(1)), expected.flatten(1))
    matrix = torch.from_numpy(operator.to_csr().toarray())
    torch.testing.assert_close(x.flatten(1) @ matrix, expected.flatten(1))
    torch.testing.assert_close(matrix.diagonal(), operator.diagonal())
    # Every body of fluid without air has one constant in the null space, every other cell itself.
    zero = int((torch.linalg.eigvalsh(matrix) < 1e-9).sum())
    closed = 0 if operator._closed is None else len(operator._closed[operator._closed > 0].unique())
    assert zero == closed + int((~operator.fluid).sum())
    assert operator.singular == (closed > 0)
    projected = operator.project(x)
    torch.testing.assert_close(operator(projected), expected)
    torch.testing.assert_close(operator.project(projected), projected)
    assert projected[0][~operator.fluid].abs().sum() == 0


def test_what_is_outside_the_fluid_does_not_matter():
    fluid, _ = masks((5, 4))
    operator = PoissonOperator((5, 4), fluid=fluid)
    x = torch.randn(5, 4)
    spoilt = torch.where(fluid, x, 1e6)
    for backend in ("naive", "shifts"):
        product = poisson_product(spoilt, fluid, operator.degree, backend=backend)
        torch.testing.assert_close(product, operator(x))


def test_no_sample_is_no_product():
    assert PoissonOperator((3, 4))(torch.zeros(0, 3, 4)).shape == (0, 3, 4)


def test_mistakes_are_told():
    with pytest.raises(ValueError, match=r"x must be \(..., 12\) or \(..., \(3, 4\)\), got \(5,\)"):
        PoissonOperator((3, 4))(torch.zeros(5))
    with pytest.raises(ValueError, match=r"x must be floating point, got torch\.int64"):
        poisson_product(torch.zeros(3, dtype=torch.long), None, torch.ones(3))
    with pytest.raises(ValueError, match=r"got \(4,\), none and \(3,\)"):
        poisson_product(torch.zeros(4), None, torch.ones(3))
    with pytest.raises(ValueError, match=r"fluid must be bool \(3, 4\), got torch.float32 \(3, 4\)"):
        PoissonOperator((3, 4), fluid=torch.ones(3, 4))
    with pytest.raises(ValueError, match="fluid and air must not share cells"):
        PoissonOperator((3,), fluid=torch.ones(3).bool(), air=torch.ones(3).bool())
    with pytest.raises(UnknownName, match="unknown boundary 'neuman': did you mean neumann"):
        boundary_walls("neuman", 2)
    with pytest.raises(ValueError, match="a pair for each of 3 axes"):
        boundary_walls(["neumann", "dirichlet"], 3)
    with pytest.raises(ValueError, match="shape must be at least one size of at least 1"):
        PoissonOperator((3, 0))
