"""Sums of Kronecker products: the definition, known algebras, the nearest sum, channels of zeros, bad input."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from convatlas.errors import UnknownName
from convatlas.ops.hypercomplex import (
    fill_channels,
    hypercomplex_algebra,
    hypercomplex_filters,
    nearest_kronecker_sum,
    ph_weight,
)

HAMILTON = [
    [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]],
    [[0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, -1], [0, 0, 1, 0]],
    [[0, 0, -1, 0], [0, 0, 0, 1], [1, 0, 0, 0], [0, -1, 0, 0]],
    [[0, 0, 0, -1], [0, 0, -1, 0], [0, 1, 0, 0], [1, 0, 0, 0]],
]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def test_every_element_is_as_the_paper_defines_it():
    algebra, filters = random(3, 3, 3), random(3, 2, 4, 2)
    weight = ph_weight(algebra, filters)
    assert weight.shape == (6, 12, 2)
    for a, b, o, c in itertools.product(range(3), range(3), range(2), range(4)):
        expected = sum(algebra[i, a, b] * filters[i, o, c] for i in range(3))
        torch.testing.assert_close(weight[2 * a + o, 4 * b + c], expected)


@pytest.mark.parametrize("backend", ["naive", "matmul"])
def test_of_a_linear_layer_it_is_the_sum_of_torchs_kronecker_products(backend: str):
    algebra, filters = random(2, 2, 2), random(2, 3, 5)
    expected = torch.kron(algebra[0], filters[0]) + torch.kron(algebra[1], filters[1])
    torch.testing.assert_close(ph_weight(algebra, filters, backend=backend), expected)


def test_it_is_linear_in_algebra_and_filters():
    first, second, filters, others = random(4, 4, 4), random(4, 4, 4), random(4, 2, 1, 3), random(4, 2, 1, 3)
    torch.testing.assert_close(
        ph_weight(first + 2 * second, filters), ph_weight(first, filters) + 2 * ph_weight(second, filters)
    )
    torch.testing.assert_close(ph_weight(first, filters - others), ph_weight(first, filters) - ph_weight(first, others))


def test_each_group_has_a_sum_of_its_own():
    algebra, filters = random(2, 2, 2), random(2, 6, 2, 3)
    parts = [ph_weight(algebra, part) for part in filters.chunk(3, dim=1)]
    torch.testing.assert_close(ph_weight(algebra, filters, 3), torch.cat(parts))


def test_autocast_does_not_round_the_weight():
    algebra, filters = random(2, 2, 2).float(), random(2, 3, 5).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weight = ph_weight(algebra, filters)
    assert torch.equal(weight, ph_weight(algebra, filters))


def test_quaternions_are_multiplied_by_hamiltons_rules():
    assert hypercomplex_algebra("quaternion").tolist() == HAMILTON


def test_complex_numbers_are_multiplied_as_python_does():
    x, y = 2 - 3j, -1 + 0.5j
    left = ph_weight(hypercomplex_algebra("complex"), torch.tensor([x.real, x.imag]).reshape(2, 1, 1))
    product = left @ torch.tensor([y.real, y.imag])
    assert product.tolist() == pytest.approx([(x * y).real, (x * y).imag])


@pytest.mark.parametrize(("name", "n"), [("real", 1), ("complex", 2), ("quaternion", 4), ("octonion", 8)])
def test_the_norm_of_a_product_is_the_product_of_the_norms(name: str, n: int):
    algebra = hypercomplex_algebra(name).double()
    assert algebra.shape == (n, n, n)
    assert torch.equal(algebra[0], torch.eye(n, dtype=torch.float64))
    x, y = random(n), random(n)
    torch.testing.assert_close((ph_weight(algebra, x.reshape(n, 1, 1)) @ y).norm(), x.norm() * y.norm())


@pytest.mark.parametrize(("n", "groups", "kernel"), [(1, 1, (3,)), (2, 3, ()), (3, 1, (3, 2)), (4, 2, (1, 1, 2))])
def test_a_sum_is_its_own_nearest_sum(n: int, groups: int, kernel: tuple[int, ...]):
    weight = ph_weight(random(n, n, n), random(n, 6, 2, *kernel), groups)
    algebra, filters = nearest_kronecker_sum(weight, n, groups)
    torch.testing.assert_close(ph_weight(algebra, filters, groups), weight)
    gram = torch.einsum("iab,jab->ij", algebra, algebra)
    torch.testing.assert_close(gram, torch.eye(n, dtype=torch.float64))


def test_no_sum_is_nearer_than_the_nearest():
    weight = random(6, 6, 3)
    algebra, filters = nearest_kronecker_sum(weight, 3)
    error = (ph_weight(algebra, filters) - weight).square().sum()
    rows = weight.reshape(3, 2, 3, 2, 3).permute(0, 2, 1, 3, 4).reshape(9, -1)
    torch.testing.assert_close(error, torch.linalg.svdvals(rows)[3:].square().sum())
    for scale in (1e-1, 1e-3):
        for _ in range(5):
            moved = ph_weight(algebra + scale * random(3, 3, 3), filters + scale * random(3, 2, 2, 3))
            assert (moved - weight).square().sum() > error


def test_weights_with_fewer_elements_than_pairs_of_components_have_a_nearest_sum():
    weight = random(4, 4).bfloat16()
    algebra, filters = nearest_kronecker_sum(weight, 4)
    assert algebra.dtype == filters.dtype == torch.bfloat16
    torch.testing.assert_close(ph_weight(algebra, filters), weight, rtol=0.02, atol=0.02)
    torch.testing.assert_close(algebra.float().flatten(1).norm(dim=1), torch.ones(4), rtol=0.02, atol=0.02)


def test_of_one_component_the_weight_is_the_filter():
    weight = random(5, 3, 3)
    algebra, filters = nearest_kronecker_sum(weight, 1)
    torch.testing.assert_close(algebra, torch.ones(1, 1, 1, dtype=torch.float64))
    torch.testing.assert_close(filters[0], weight)


def test_filters_of_a_given_algebra():
    algebra, filters = hypercomplex_algebra("quaternion").double(), random(4, 2, 3, 2)
    torch.testing.assert_close(hypercomplex_filters(ph_weight(algebra, filters, 2), algebra, 2), filters)
    weight = random(8, 12, 2)
    error = ph_weight(algebra, hypercomplex_filters(weight, algebra)) - weight
    for direction in range(4):  # what is left has no part in the space of the algebra
        part = torch.einsum("aobck,ab->ock", error.reshape(4, 2, 4, 3, 2), algebra[direction])
        torch.testing.assert_close(part, torch.zeros_like(part))


def test_channels_of_zeros_come_first():
    x = torch.rand(2, 3, 4, 5)
    filled = fill_channels(x, 4)
    assert filled.shape == (2, 4, 4, 5)
    assert not filled[:, 0].any()
    assert torch.equal(filled[:, 1:], x)
    assert fill_channels(x, 3) is x
    assert fill_channels(torch.ones(1, 1, 6), 4).sum(2).tolist() == [[0, 0, 0, 6]]


@pytest.mark.parametrize(
    ("shapes", "groups", "message"),
    [
        (((2, 2, 3), (2, 3, 5)), 1, r"algebra must be \(n, n, n\), got \(2, 2, 3\)"),
        (((2, 2, 2), (3, 3, 5)), 1, r"filters must be \(2, out / 2, in / 2, ...\), got \(3, 3, 5\)"),
        (((2, 2, 2), (2, 3)), 1, r"filters must be \(2, out / 2, in / 2, ...\), got \(2, 3\)"),
        (((2, 2, 2), (2, 3, 5)), 2, "groups must divide out / n = 3, got 2"),
        (((2, 2, 2), (2, 3, 5)), 0, "groups must divide out / n = 3, got 0"),
    ],
)
def test_shapes_that_do_not_belong_together(shapes: tuple[tuple[int, ...], ...], groups: int, message: str):
    with pytest.raises(ValueError, match=message):
        ph_weight(*(torch.zeros(shape) for shape in shapes), groups)


def test_impossible_decompositions_are_refused():
    for n, groups in ((4, 1), (0, 1), (2, 2)):
        with pytest.raises(ValueError, match=f"n must divide the 6 input and {6 // groups} output .* got {n}"):
            nearest_kronecker_sum(torch.zeros(6, 6, 3), n, groups)
    with pytest.raises(UnknownName, match="unknown algebra 'quaternions': did you mean quaternion"):
        hypercomplex_algebra("quaternions")
