"""Operators of neural operators against their definitions: loops, differences, integrals, sums."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from convatlas.errors import UnknownName, Unsupported
from convatlas.ops.disco import basis_size, disco_basis, equidistant_basis, equidistant_disco, point_disco
from convatlas.ops.field_losses import h1_error, l2_sum_squared, lp_error
from convatlas.ops.finite_difference import finite_difference
from convatlas.ops.fourier_resize import fourier_resize
from convatlas.ops.neighbours import Neighbours, check_neighbours, radius_neighbors
from convatlas.ops.segment_sum import segment_sum
from convatlas.ops.spectral_conv import spectral_conv

DOUBLE = {"dtype": torch.float64}


def waves(*sizes: int, seed: int = 0, highest: int = 2) -> Tensor:
    """A field of low frequencies, the same on every grid."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.meshgrid(*[torch.arange(n, **DOUBLE) / n for n in sizes], indexing="ij")
    total = torch.zeros(sizes, **DOUBLE)
    for frequency in itertools.product(range(-highest, highest + 1), repeat=len(sizes)):
        phase = 2 * math.pi * sum(k * x for k, x in zip(frequency, places, strict=True))
        total += torch.randn((), generator=generator, **DOUBLE) * torch.cos(phase + frequency[0])
    return total[None, None]


def test_spectral_convolution_is_a_sum_over_frequencies():
    x, weight = torch.randn(1, 2, 5, 6, **DOUBLE), torch.randn(2, 3, 4, 3, 2, **DOUBLE)
    expected = torch.zeros(1, 3, 5, 6, **DOUBLE)
    rows, columns = torch.arange(5, **DOUBLE)[:, None], torch.arange(6, **DOUBLE)[None]
    for p, row in enumerate(range(-2, 2)):
        for column in range(3):
            wave = torch.exp(2j * math.pi * (row * rows / 5 + column * columns / 6))
            coefficient = (x * wave.conj()).mean((2, 3))
            mixed = torch.einsum("bi,io->bo", coefficient, torch.view_as_complex(weight)[:, :, p, column])
            # The real transform holds one of each pair of frequencies; a row without its partner counts for itself.
            factor = 2 if column else 1
            term = mixed[:, :, None, None] * wave
            expected += factor * term.real
    torch.testing.assert_close(spectral_conv(x, weight, backend="naive"), expected)


@pytest.mark.parametrize("backend", ["naive", "fft"])
def test_spectral_convolution_commutes_with_shifts_and_knows_no_grid(backend: str):
    weight = torch.randn(1, 2, 5, 3, 2, **DOUBLE)
    x = torch.randn(1, 1, 9, 7, **DOUBLE)
    shifted = spectral_conv(x.roll((2, 3), (2, 3)), weight, backend=backend)
    torch.testing.assert_close(shifted, spectral_conv(x, weight, backend=backend).roll((2, 3), (2, 3)))
    coarse, fine = (spectral_conv(waves(n, n), weight, backend=backend) for n in (8, 24))
    torch.testing.assert_close(fine[..., ::3, ::3], coarse)
    torch.testing.assert_close(spectral_conv(waves(8, 8), weight, (24, 24), backend=backend), fine)


def test_more_frequencies_than_points():
    # Six are cut to five: the authors leave out the first, aligned ones keep frequency 0 in its place.
    weight = torch.zeros(1, 1, 6, 1, 2, **DOUBLE)
    weight[0, 0, 3, 0, 0] = 1  # the mean
    x = torch.randn(1, 1, 5, 4, **DOUBLE)
    mean = x.mean((2, 3), keepdim=True).expand_as(x)
    torch.testing.assert_close(spectral_conv(x, weight, align=True), mean)
    assert not torch.allclose(spectral_conv(x, weight), mean)


@pytest.mark.parametrize("shape", [(2, 3, 4, 3, 2), (2, 4, 3, 2)])
def test_products_in_half_precision(shape: tuple[int, ...]):
    x, weight = torch.randn(2, 2, 8, 9), torch.randn(shape)
    exact = spectral_conv(x, weight)
    for precision in ("mixed", "half"):
        rough = spectral_conv(x, weight, precision=precision)  # type: ignore[arg-type]
        assert rough.dtype == torch.float32
        assert 0 < (rough - exact).norm() / exact.norm() < 2e-3
    with pytest.raises(UnknownName, match="precision"):
        spectral_conv(x, weight, precision="low")  # type: ignore[arg-type]


def test_resizing_by_fourier_series():
    small = waves(6, 9)
    torch.testing.assert_close(fourier_resize(small, (12, 18))[..., ::2, ::2], small)
    torch.testing.assert_close(fourier_resize(fourier_resize(small, (13, 20)), (6, 9)), small)
    torch.testing.assert_close(fourier_resize(small, (12, 18)), waves(12, 18))
    line = waves(7)
    torch.testing.assert_close(fourier_resize(line, (21,)), waves(21))
    half = small.to(torch.bfloat16)
    assert fourier_resize(half, (7, 8)).dtype == torch.bfloat16


def test_finite_differences_of_constants_and_lines():
    weight = torch.randn(2, 1, 3, 3, **DOUBLE)
    for padding in ("periodic", "replicate", "reflect"):
        y = finite_difference(torch.ones(1, 1, 6, 5, **DOUBLE), weight, 0.1, padding)
        assert y.abs().max() < 1e-12
    line = torch.arange(8, **DOUBLE).view(1, 1, 8, 1).expand(1, 1, 8, 6) * 0.25
    slope = weight[:, :, 2].sum((1, 2)) - weight[:, :, 0].sum((1, 2))
    y = finite_difference(line, weight, 0.25, "replicate")[0, :, 1:-1]
    torch.testing.assert_close(y, slope[:, None, None].expand_as(y))


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (3, 1), (4, 1), (2, 4), (3, 3), (4, 5), (5, 2)])
def test_hat_functions_of_the_disk(shape: tuple[int, int]):
    places = torch.linspace(-1.2, 1.2, 49, **DOUBLE)
    first, second = torch.meshgrid(places, places, indexing="ij")
    values = disco_basis(first, second, shape, 1.0)
    distance = torch.hypot(first, second)
    assert values.shape[0] == basis_size(shape)
    assert (values >= 0).all()
    assert (values[:, distance > 1] == 0).all()
    assert (values.flatten(1).amax(1) > 0.5).all()
    # Within the outermost ring the hats are a partition of one.
    step = 2 / (shape[0] + 1)
    inner = distance <= 1 - step + 1e-9
    if shape[1] > 2 or shape[0] % 2:  # else functions of the distance alone leave the middle out
        torch.testing.assert_close(values.sum(0)[inner], torch.ones(int(inner.sum()), **DOUBLE))


@pytest.mark.parametrize(("grid", "domain"), [((12, 12), (2.0, 2.0)), ((12, 18), (1.0, 1.0))])
def test_local_integral_of_a_constant_and_on_points(grid: tuple[int, int], domain: tuple[float, float]):
    shape, radius = (3, 4), 2 * domain[0] / grid[0] * (1 + 1e-9)
    basis = equidistant_basis(grid, domain, shape, radius)
    weight = torch.randn(2, 1, len(basis), **DOUBLE)
    options = {"kernel_shape": shape, "radius": radius, "domain": domain}
    constant = equidistant_disco(torch.full((1, 1, *grid), 3.0, **DOUBLE), weight, periodic=True, **options)  # type: ignore[arg-type]
    present = basis.sum((1, 2)) > 0
    expected = 3 * weight[:, :, present].sum((1, 2))
    torch.testing.assert_close(constant, expected[:, None, None].expand_as(constant[0])[None], rtol=1e-6, atol=1e-6)

    x = torch.randn(1, 1, *grid, **DOUBLE)
    y = equidistant_disco(x, weight, **options)  # type: ignore[arg-type]
    lines = [torch.arange(n, **DOUBLE) * length / n for n, length in zip(grid, domain, strict=True)]
    # Offsets count along the width first.
    places = torch.stack(torch.meshgrid(*lines, indexing="ij")).flatten(1).t().flip(1)
    neighbours = radius_neighbors(places, places, radius * (1 + 1e-9))
    area = torch.full((len(places),), domain[0] * domain[1] / math.prod(grid), **DOUBLE)
    sums = point_disco(x.flatten(2).transpose(1, 2), places, places, area, neighbours, shape, radius)
    points = torch.einsum("bnki,oik->bon", sums, weight).unflatten(2, grid)
    inner = (..., slice(3, -3), slice(4, -4))
    torch.testing.assert_close(points[inner], y[inner], rtol=1e-5, atol=1e-5)


def test_neighbours():
    points, queries = torch.rand(60, 2), torch.rand(20, 2)
    naive, tree = (radius_neighbors(points, queries, 0.3, backend=backend) for backend in ("naive", "tree"))
    assert all(torch.equal(a, b) for a, b in zip(naive, tree, strict=True))
    for query, (start, end) in enumerate(itertools.pairwise(naive.row_splits.tolist())):
        found = set(naive.indices[start:end].tolist())
        assert found == {i for i in range(60) if math.dist(points[i].tolist(), queries[query].tolist()) <= 0.3}
    assert torch.equal(naive.rows, torch.arange(20).repeat_interleave(naive.row_splits.diff()))
    check_neighbours(naive, 60, 20)
    for none in (radius_neighbors(points[:0], queries, 0.1), radius_neighbors(points, queries + 9, 0.1)):
        assert none.row_splits.tolist() == [0] * 21
    assert len(radius_neighbors(points, queries[:0], 0.1, backend="tree").row_splits) == 1


@pytest.mark.parametrize(
    ("splits", "indices", "text"),
    [([0, 2, 1, 3], [0, 1, 2], "must rise"), ([0, 1, 2], [0, 1], "must be"), ([0, 1, 2, 3], [0, 1, 9], "from 0 to 4")],
)
def test_bad_neighbours(splits: list[int], indices: list[int], text: str):
    with pytest.raises(ValueError, match=text):
        check_neighbours(Neighbours(torch.tensor(indices), torch.tensor(splits)), 5, 3)


def test_losses_do_not_depend_on_the_grid():
    (a, b), (c, d) = ([waves(n, n, seed=seed) for seed in (0, 1)] for n in (16, 48))
    torch.testing.assert_close(lp_error(a, b), lp_error(c, d))
    torch.testing.assert_close(lp_error(a, b, lengths=2.0), 2 * lp_error(a, b))
    torch.testing.assert_close(lp_error(a, b, p=1), (a - b).abs().mean()[None])
    torch.testing.assert_close(lp_error(a, b, relative=True), ((a - b).norm() / b.norm())[None])
    torch.testing.assert_close(h1_error(a, b), h1_error(c, d), rtol=0.2, atol=0)
    pairs = torch.cat([a, b]), torch.cat([b, b])
    expected = ((a - b).square().sum() * (2 * math.pi / 16) ** 2).sqrt().square()
    torch.testing.assert_close(l2_sum_squared(*pairs), expected)
    double = l2_sum_squared(torch.cat([a, a]), torch.cat([b, b]))
    torch.testing.assert_close(double, 4 * expected)  # the square is taken after the sum
    line = torch.arange(5, **DOUBLE).view(1, 1, 5, 1).expand(1, 1, 5, 4) / 5
    gradient = h1_error(line, torch.zeros_like(line), periodic=False)
    torch.testing.assert_close(gradient, (line.square().mean() + 1).sqrt()[None])


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: spectral_conv(torch.ones(1, 1, 4).long(), torch.ones(1, 1, 2, 2)), ValueError, "floating point"),
        (lambda: spectral_conv(torch.ones(1, 2, 4), torch.ones(1, 1, 2, 2)), ValueError, "x must be"),
        (lambda: finite_difference(torch.ones(1, 1, 4), torch.ones(1, 1, 2)), ValueError, "should be odd"),
        (lambda: finite_difference(torch.ones(1, 1, 4), torch.ones(1, 1, 3), 0.0), ValueError, "grid_width"),
        (lambda: finite_difference(torch.ones(1, 1, 4), torch.ones(1, 1, 3), 1, "wrap"), UnknownName, "padding"),
        (lambda: radius_neighbors(torch.ones(1, 2), torch.ones(1, 2), 0.0), ValueError, "radius must be positive"),
        (lambda: radius_neighbors(torch.ones(1, 2), torch.ones(1, 3), 1.0), ValueError, "queries"),
        (lambda: fourier_resize(torch.ones(3).long(), (2,)), ValueError, "real and floating"),
        (lambda: fourier_resize(torch.ones(3), (0,)), ValueError, "positive"),
        (lambda: segment_sum(torch.ones(3), torch.tensor([0, 3])), ValueError, "values must be"),
        (lambda: h1_error(torch.ones(1, 1, 2), torch.ones(1, 1, 2)), ValueError, "at least 3"),
        (lambda: lp_error(torch.ones(1, 1, 2), torch.ones(1, 1, 3)), ValueError, "prediction and truth"),
        (lambda: lp_error(torch.ones(1, 1, 2), torch.ones(1, 1, 2), 0.5), ValueError, "p must be"),
    ],
)
def test_bad_arguments_are_named(call, error: type[Exception], text: str):
    with pytest.raises(error, match=text):
        call()


def test_tree_on_another_device():
    with pytest.raises(Unsupported, match="CPU only"):
        radius_neighbors(torch.ones(1, 2, device="meta"), torch.ones(1, 2, device="meta"), 1.0, backend="tree")
