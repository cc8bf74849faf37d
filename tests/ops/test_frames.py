"""Frames: tight where the theory says so, real where asked for, and honest about their bounds."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from convatlas.errors import UnknownName
from convatlas.ops.frames import Frame, atrous, cone, learned, meyer, polar, tensor_atrous, weyl_heisenberg

#: Every family on even and odd grids.
TIGHT = {
    "meyer": partial(meyer, 45, 3),
    "meyer real": partial(meyer, (32,), 4, analytic=False),
    "weyl_heisenberg": partial(weyl_heisenberg, 30, 5),
    "weyl_heisenberg 2-D": partial(weyl_heisenberg, (12, 15), 3),
    "haar": partial(atrous, 17, 3),
    "db2": partial(atrous, 24, 2, "db2"),
    "sym4": partial(tensor_atrous, (9, 14), 2, "sym4"),
    "wavelets": partial(polar, (16, 13), 2, 5, 1.0),
    "curvelets": partial(polar, (24, 20), 3, 4, 0.5),
    "ridgelets": partial(polar, (16, 16), 2, 4, 0.0, real=True),
    "shearlets": partial(cone, (16, 20), 3, 8, 0.5),
    "real shearlets": partial(cone, (15, 18), 2, 6, 0.5, real=True),
}


@pytest.mark.parametrize("name", TIGHT)
def test_constructions_are_parseval(name: str):
    frame = TIGHT[name]()
    torch.testing.assert_close(frame.lp_sum(), torch.ones(frame.grid, dtype=torch.float64), rtol=0, atol=1e-13)
    assert frame.is_parseval()
    assert frame.is_real == (name in {"meyer real", "haar", "db2", "sym4", "ridgelets", "real shearlets"})
    x = torch.randn(frame.grid, dtype=torch.complex128)
    parts = torch.fft.ifftn(
        torch.fft.fftn(x) * torch.cat([frame.atom[None], frame.filters]), dim=list(range(1, 1 + x.dim()))
    )
    assert parts.abs().square().sum() == pytest.approx(float(x.abs().square().sum()))


def test_real_atoms_are_real_in_space():
    frame = polar((8, 12), 2, 4, real=True)
    assert torch.fft.ifft2(frame.filters).imag.abs().max() < 1e-15


@pytest.mark.parametrize(("alpha", "counts"), [(1.0, 12), (0.5, 4 + 4 + 8), (0.0, 4 + 8 + 16)])
def test_sectors_follow_the_anisotropy(alpha: float, counts: int):
    assert len(polar((16, 16), 3, 4, alpha).filters) == len(cone((16, 16), 3, 4, alpha).filters) == counts


def test_bands_lie_where_they_should():
    frame = meyer(96, 3)
    xi = torch.fft.fftfreq(96, dtype=torch.float64)
    for j in range(3):
        positive, negative = frame.filters[2 * j : 2 * j + 2]
        assert not positive[xi <= 0].any()
        assert not negative[xi > 0].any()
        assert not (positive + negative)[xi.abs() <= 2**-j / 6].any()  # low_{j + 1} is 1 there
    assert frame.atom[xi.abs() >= 1 / 12].abs().max() < 1e-15
    assert frame.decay_constant() == pytest.approx(float((frame.atom * xi.abs()).max()))
    assert meyer(96, 4).decay_constant() < frame.decay_constant() < 1 / 12


def test_windows_are_shifts_of_each_other():
    frame = weyl_heisenberg(24, 4)
    for m, window in enumerate(frame.filters, start=1):
        torch.testing.assert_close(window, frame.atom.roll(6 * m))
    pairs = weyl_heisenberg((12, 8), 2)
    rows, columns = weyl_heisenberg(12, 2), weyl_heisenberg(8, 2)
    torch.testing.assert_close(pairs.filters[1], torch.outer(rows.filters[0], columns.atom))


def test_undecimated_wavelets_are_convolutions():
    x = torch.randn(10, dtype=torch.float64)
    frame = atrous(10, 1)
    convolved = torch.fft.ifft(torch.fft.fft(x) * frame.filters[0]).real
    torch.testing.assert_close(convolved, (x - x.roll(1)) / 2)
    low = torch.fft.ifft(torch.fft.fft(x) * atrous(10, 2).atom).real
    torch.testing.assert_close(low, sum(x.roll(k) for k in range(4)) / 4)


def test_learned_filters_are_measured_and_scaled():
    weight = torch.randn(3, 1, 3, 2)
    frame = learned((5, 4), weight, atom=-1)
    torch.testing.assert_close(frame.filters[1], torch.fft.fft2(weight[1, 0].double(), s=(5, 4)))
    torch.testing.assert_close(frame.atom, torch.fft.fft2(weight[2, 0].double(), s=(5, 4)))
    lower, upper = frame.bounds()
    assert 0 <= lower < upper
    assert not frame.is_parseval()
    scaled = frame.scaled(upper).bounds()
    assert scaled == pytest.approx((lower / upper, 1))
    # The upper bound is the squared largest singular value of the circular convolution.
    impulses = torch.eye(20, dtype=torch.float64).view(20, 5, 4)
    atoms = torch.cat([frame.atom[None], frame.filters])
    matrix = torch.fft.ifft2(torch.fft.fft2(impulses)[:, None] * atoms).flatten(1)
    assert torch.linalg.matrix_norm(matrix, 2) ** 2 == pytest.approx(upper)
    low = meyer(8, 1).atom
    assert len(learned(8, torch.randn(3, 4), atom=low).filters) == 3
    assert learned((4, 4, 4), torch.randn(2, 1, 3, 3, 3)).grid == (4, 4, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: meyer((4, 4), 1), r"shape must be 1 positive sizes, got \(4, 4\)"),
        (lambda: meyer(8, 0), "J must be at least 1, got 0"),
        (lambda: weyl_heisenberg(8, 1), "M must be at least 2, got 1"),
        (lambda: weyl_heisenberg((2, 2, 2), 2), "shape must be 1 or 2 positive sizes"),
        (lambda: polar((8, 8), 1, 3, real=True), "K0 must be at least 4, got 3"),
        (lambda: polar((8, 8), 1, 5, real=True), "K0 must be even for real atoms, got 5"),
        (lambda: cone((8, 8), 1, 4, 1.5), r"alpha must be from 0 to 1, got 1\.5"),
        (lambda: atrous(8, 1, "bior2.2"), r"wavelet must be orthogonal, got bior2\.2"),
        (lambda: learned(4, torch.ones(2, 1, 5)), r"weight must be \(n, 1, \*kernel\), no larger than \(4,\)"),
        (lambda: learned(4, torch.ones(1, 1, 3)), r"filters must be \(n, \*\(4,\)\) with at least one, got \(0, 4\)"),
        (lambda: meyer(8, 1).scaled(0), "c must be positive, got 0"),
        (lambda: Frame(torch.ones(4), torch.ones(2, 5)), r"filters must be \(n, \*\(4,\)\)"),
    ],
)
def test_bad_arguments_are_named(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_unknown_wavelets_answer_with_the_nearest():
    with pytest.raises(UnknownName, match="unknown wavelet 'har'"):
        atrous(8, 1, "har")
