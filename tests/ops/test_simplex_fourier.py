"""The Fourier transform of simplices against what is known of it, and its divided differences to the last digits."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from convatlas.errors import UnknownName, Unsupported
from convatlas.ops.simplex_fourier import (
    as_real_pairs,
    exp_divided_difference,
    normalize_vertices,
    polygon_elements,
    rasterize,
    simplex_fourier,
    spectral_gaussian,
    sub_simplices,
)

CUBE = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)), dtype=torch.float64)
#: A cube in six tetrahedra around its diagonal.
TETRAHEDRA = torch.tensor(
    [
        [0, *(sum(2 ** (2 - axis) for axis in order[:k]) for k in (1, 2)), 7]
        for order in itertools.permutations(range(3))
    ]
)
SQUARE = torch.tensor([[0.25, 0.25], [0.75, 0.25], [0.75, 0.75], [0.25, 0.75]], dtype=torch.float64)
HALVES = torch.tensor([[0, 1, 2], [0, 2, 3]])


def ones(n: int, channels: int = 1) -> Tensor:
    return torch.ones(n, channels, dtype=torch.float64)


def bidiagonal(phases: Tensor) -> Tensor:
    n = phases.shape[-1]
    matrix = torch.diag_embed(torch.complex(torch.zeros_like(phases), -phases))
    return torch.linalg.matrix_exp(matrix + torch.diag(torch.ones(n - 1, dtype=torch.complex128), 1))[..., 0, -1]


def waves(resolution: tuple[int, ...]) -> Tensor:
    axes = [torch.fft.fftfreq(n, 1 / n, dtype=torch.float64) for n in resolution[:-1]]
    axes.append(torch.arange(resolution[-1] // 2 + 1, dtype=torch.float64))
    return 2 * math.pi * torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


# -- divided differences -----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 5),
    spread=st.sampled_from([0.0, 1e-9, 1e-4, 0.1, 0.2, 0.25, 0.3, 1.0, 7.0, 40.0]),
    centre=st.floats(-10, 10),
    seed=st.integers(0, 1000),
)
def test_divided_differences_are_exact(n: int, spread: float, centre: float, seed: int):
    places = torch.rand(4, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    places[0] = places[0].round()  # equal nodes
    phases = centre + spread * places
    # The oracle is exact around zero; a shift of all nodes is a factor.
    expected = bidiagonal(phases - centre) * torch.exp(torch.tensor(-1j * centre, dtype=torch.complex128))
    torch.testing.assert_close(exp_divided_difference(phases), expected, rtol=0, atol=2e-13)
    single = exp_divided_difference(phases.float())
    assert single.dtype == torch.complex64
    assert (single - expected).abs().max() < 2e-5


def test_divided_differences_of_known_nodes():
    for n in range(1, 6):
        zeros = exp_divided_difference(torch.zeros(n, dtype=torch.float64))
        assert complex(zeros) == pytest.approx(1 / math.factorial(n - 1))
    phases = torch.tensor([0.3, -2.0, 5.0], dtype=torch.float64)
    closed = -sum(
        torch.exp(-1j * phases[a]) / math.prod(phases[a] - phases[b] for b in range(3) if b != a) for a in range(3)
    )
    torch.testing.assert_close(exp_divided_difference(phases), closed)
    torch.testing.assert_close(exp_divided_difference(phases.flip(0)), closed)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_divided_differences_have_derivatives(n: int):
    phases = torch.randn(3, n, dtype=torch.float64)
    phases[0] = 0.4
    phases[1, 1:] = phases[1, :1] + 1e-7 * torch.arange(1, n)
    assert torch.autograd.gradcheck(exp_divided_difference, phases.requires_grad_(), fast_mode=True)
    assert torch.autograd.gradgradcheck(exp_divided_difference, phases, atol=1e-4, fast_mode=True)


# -- transforms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("j", [0, 1, 2, 3])
def test_zero_frequency_is_the_mass(j: int):
    vertices, densities = 0.9 * torch.rand(6, 3, dtype=torch.float64), torch.rand(5, 2, dtype=torch.float64)
    elements = torch.stack([torch.randperm(6)[: j + 1] for _ in range(5)])
    edges = vertices[elements[:, 1:]] - vertices[elements[:, :1]]
    gram = torch.linalg.det(edges @ edges.mT) if j else torch.ones(5, dtype=torch.float64)
    mass = (gram.sqrt() / math.factorial(j)) @ densities
    spectrum = simplex_fourier(vertices, elements, densities, (4, 3, 4), mode="mass")
    torch.testing.assert_close(spectrum[:, 0, 0, 0], mass.to(torch.complex128))
    # Moved, the spectrum turns; turned around in itself, an element is the same; scaled, so are the frequencies.
    shift = torch.tensor([0.05, 0.02, 0.09], dtype=torch.float64)
    moved = simplex_fourier(vertices + shift, elements.flip(1), densities, (4, 3, 4), mode="mass")
    torch.testing.assert_close(moved, spectrum * torch.exp(-1j * (waves((4, 3, 4)) @ shift)))
    half = simplex_fourier(vertices / 2, elements, densities, (4, 3, 4), 0.5, mode="mass")
    torch.testing.assert_close(half, spectrum / 2**j)


def test_points_are_the_direct_transform():
    points, weights = torch.rand(7, 2, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    spectrum = simplex_fourier(points, torch.arange(7)[:, None], weights, (5, 6))
    direct = torch.exp(-1j * (waves((5, 6)) @ points.T)) @ weights.to(torch.complex128)
    torch.testing.assert_close(spectrum, direct.movedim(-1, 0))


def test_a_box_is_a_product_of_sincs():
    size = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
    spectrum = simplex_fourier(0.1 + CUBE * size, TETRAHEDRA, ones(6), (6, 5, 4), mode="mass")[0]
    k = waves((6, 5, 4))
    sincs = (size * torch.sinc(k * size / (2 * math.pi)) * torch.exp(-1j * k * (0.1 + size / 2))).prod(-1)
    torch.testing.assert_close(spectrum, sincs)


def test_what_a_boundary_encloses():
    polygon = simplex_fourier(SQUARE, polygon_elements(4), ones(4), (6, 7), boundary=True)
    torch.testing.assert_close(polygon, simplex_fourier(SQUARE, HALVES, ones(2), (6, 7)))
    clockwise = simplex_fourier(SQUARE, polygon_elements(4).flip(1), ones(4), (6, 7), boundary=True)
    torch.testing.assert_close(clockwise, -polygon)
    # The faces of the cube, seen from outside, from its tetrahedra.
    vertices = 0.2 + 0.5 * CUBE
    faces = []
    for corners in TETRAHEDRA.tolist():
        for left_out in range(4):
            face = [corner for k, corner in enumerate(corners) if k != left_out]
            edges = vertices[face] - vertices[corners[left_out]]
            faces.append(face if torch.linalg.det(edges) > 0 else [face[0], face[2], face[1]])
    inner = {frozenset(face) for face in faces if sum(set(face) == set(other) for other in faces) == 2}
    outer = torch.tensor([face for face in faces if frozenset(face) not in inner])
    assert len(outer) == 12
    surface = simplex_fourier(vertices, outer, ones(12), (4, 4, 4), boundary=True)
    torch.testing.assert_close(surface, simplex_fourier(vertices, TETRAHEDRA, ones(6), (4, 4, 4)))


def test_subdivision_changes_nothing():
    corners = torch.rand(3, 2, dtype=torch.float64)
    middles = (corners + corners.roll(-1, 0)) / 2
    vertices = torch.cat([corners, middles])
    parts = torch.tensor([[0, 3, 5], [3, 1, 4], [5, 4, 2], [3, 4, 5]])
    whole = simplex_fourier(vertices, torch.tensor([[0, 1, 2]]), ones(1), (8, 8))
    torch.testing.assert_close(simplex_fourier(vertices, parts, ones(4), (8, 8)), whole, rtol=0, atol=1e-12)


def test_blocks_add_up(monkeypatch: pytest.MonkeyPatch):
    from convatlas.ops import simplex_fourier as module

    vertices, elements = torch.rand(9, 2, dtype=torch.float64), torch.randint(0, 9, (40, 3))
    densities = torch.rand(40, 2, dtype=torch.float64)

    def gradients() -> tuple[Tensor, Tensor, Tensor]:
        v, d = vertices.clone().requires_grad_(), densities.clone().requires_grad_()
        spectrum = simplex_fourier(v, elements, d, (7, 6))
        return spectrum, *torch.autograd.grad(spectrum.abs().square().sum(), (v, d))

    whole = gradients()
    monkeypatch.setattr(module, "_PAIRS", {"cpu": 160, "other": 160})
    for part, all_at_once in zip(gradients(), whole, strict=True):
        torch.testing.assert_close(part, all_at_once)


def test_scales():
    line = torch.tensor([[0.1, 0.1], [0.4, 0.5]], dtype=torch.float64)
    for elements, j in ((torch.tensor([[0]]), 0), (torch.tensor([[0, 1]]), 1)):
        mass = simplex_fourier(line, elements, ones(1), (8, 4), 2.0, "mass")
        density = simplex_fourier(line, elements, ones(1), (8, 4), 2.0)
        torch.testing.assert_close(density, mass * (8 * 4 / 4) ** (j / 2))
        theirs = simplex_fourier(line, elements, ones(1), (8, 4), 2.0, "first_axis_density")
        torch.testing.assert_close(theirs, mass * 8**j)


def test_a_raster_is_one_inside_and_nothing_outside():
    spectrum = simplex_fourier(SQUARE, HALVES, ones(2), (64, 64))
    raster = rasterize(spectrum, (64, 64))[0]
    assert raster[24:40, 24:40] == pytest.approx(torch.ones(16, 16).numpy(), abs=0.02)
    assert raster[:8].abs().max() < 0.02
    assert float(raster.mean()) == pytest.approx(0.25)
    assert raster[16, 32] == pytest.approx(0.5, abs=0.02)  # samples lie on the grid, not at centres
    for smoothing in ("lanczos", "exponential", "none"):
        other = rasterize(spectrum, (64, 64), smoothing)[0]
        assert float(other.mean()) == pytest.approx(0.25)
        assert float(other[32, 32]) == pytest.approx(1, abs=0.06)
    odd = simplex_fourier(SQUARE, HALVES, ones(2), (9, 7))
    assert rasterize(odd, (9, 7)).shape == (1, 9, 7)
    assert spectral_gaussian((8, 8), 1.5)[0, 4] == pytest.approx(math.exp(-0.5 * 1.5**2))
    torch.testing.assert_close(as_real_pairs(odd)[1, 2, 0], torch.view_as_real(odd)[0, 1, 2])


def test_types():
    exact = simplex_fourier(SQUARE, HALVES, ones(2), (5, 4))
    for dtype in (torch.float32, torch.bfloat16):
        rough = simplex_fourier(SQUARE.to(dtype), HALVES, ones(2).to(dtype), (5, 4))
        assert rough.dtype == torch.complex64
        torch.testing.assert_close(rough, exact.to(torch.complex64))  # computed in float64
    single = simplex_fourier(SQUARE, HALVES.int(), ones(2), (5, 4), dtype=torch.float32)
    assert single.dtype == torch.complex128
    torch.testing.assert_close(single, exact, rtol=0, atol=1e-4)


def test_nothing_and_elements_without_content():
    assert not simplex_fourier(SQUARE, HALVES[:0], ones(0, 2), (5, 4)).any()
    flat = SQUARE[:, :1].repeat(1, 2).requires_grad_()
    spectrum = simplex_fourier(flat, HALVES, ones(2), (5, 4))
    assert not spectrum.any()
    spectrum.real.sum().backward()
    assert flat.grad is not None
    assert flat.grad.isfinite().all()


def test_helpers():
    assert polygon_elements(3).tolist() == [[0, 1], [1, 2], [2, 0]]
    assert sub_simplices(HALVES, 1).tolist() == [[0, 1], [0, 2], [0, 3], [1, 2], [2, 3]]
    assert sub_simplices(torch.tensor([[5, 2, 7]]), 0).flatten().tolist() == [2, 5, 7]
    placed = normalize_vertices(torch.tensor([[0.0, 10.0], [4.0, 12.0]]), margin=0.2)
    torch.testing.assert_close(placed, torch.tensor([[0.1, 0.3], [0.9, 0.7]]))
    assert normalize_vertices(torch.ones(2, 3)).tolist() == [[0.5] * 3] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"elements": torch.tensor([[0, 1, 4], [1, 2, 3]])}, "elements must be indices of the 4 vertices, got 0 to 4"),
        ({"elements": torch.tensor([[0, 1, 2, 3]])}, "elements must have from 1 to 3 vertices in 2-D, got 4"),
        ({"elements": torch.zeros(2, 3)}, r"elements must be integers \(n_e, j \+ 1\), got torch\.float32"),
        ({"vertices": torch.zeros(4, 4)}, r"vertices must be real \(n_v, d\) with d from 1 to 3, got \(4, 4\)"),
        ({"densities": torch.ones(3, 1)}, r"densities must be real \(2, C\), got \(3, 1\)"),
        ({"resolution": (4,)}, r"resolution must be 2 positive numbers, one for each axis, got \(4,\)"),
        ({"period": 0.0}, r"period must be positive, one for all axes or each of 2, got 0\.0"),
        ({"mode": "masses"}, "unknown mode 'masses': did you mean mass"),
        ({"dtype": torch.float16}, r"dtype must be torch\.float64 or torch\.float32, got torch\.float16"),
        ({"boundary": True}, r"elements of a boundary must be \(n_e, 2\) in 2-D, got \(2, 3\)"),
        (
            {"boundary": True, "elements": torch.tensor([[0, 1], [1, 0]]), "densities": torch.tensor([[1.0], [2.0]])},
            "densities must be equal: boundary mode needs one common density",
        ),
        (
            {"boundary": True, "vertices": torch.rand(4, 1), "elements": torch.tensor([[0], [1]]), "resolution": (4,)},
            "boundary must be False in 1-D",
        ),
    ],
)
def test_bad_input_is_named(changes: dict, message: str):
    arguments = {"vertices": SQUARE, "elements": HALVES, "densities": ones(2), "resolution": (4, 4), **changes}
    with pytest.raises((ValueError, UnknownName), match=message):
        simplex_fourier(**arguments)


def test_doubtful_input_is_warned_of():
    with pytest.warns(UserWarning, match="the boundary is not closed"):
        simplex_fourier(SQUARE, polygon_elements(4)[:3], ones(3), (4, 4), boundary=True)
    with pytest.warns(UserWarning, match=r"vertices lie outside the period \(1\.0, 1\.0\) and wrap around"):
        simplex_fourier(SQUARE + 0.5, HALVES, ones(2), (4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        simplex_fourier(SQUARE + 0.5, HALVES, ones(2), (4, 4), 2.0)
    with pytest.raises(UnknownName, match="unknown smoothing 'gauss': did you mean gaussian"):
        rasterize(torch.zeros(4, 3), (4, 4), "gauss")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"spectrum must be \(\.\.\., 4, 3\), got \(4, 4\)"):
        rasterize(torch.zeros(4, 4), (4, 4))
    with pytest.raises(ValueError, match=r"phases must be \(\.\.\., j \+ 1\) in float64 or float32"):
        exp_divided_difference(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="j must be from 0 to 2, got 3"):
        sub_simplices(HALVES, 3)
    with pytest.raises(ValueError, match="n must be at least 3, got 2"):
        polygon_elements(2)
    with pytest.raises(ValueError, match=r"margin must be in \[0, 1\), got 1"):
        normalize_vertices(SQUARE, 1)
    with pytest.raises(Unsupported, match="elements are not points"):
        simplex_fourier(SQUARE, HALVES, ones(2), (4, 4), backend="separable")
