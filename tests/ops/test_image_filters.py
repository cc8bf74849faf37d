"""Analytic filters: bases are orthonormal, waves have their phase, derivatives turn."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from convatlas.errors import UnknownName
from convatlas.ops import image_filters
from convatlas.ops.image_filters import (
    EDGE_FILTERS,
    dct_bank,
    expand_channels,
    fourier_bessel_bank,
    gabor,
    gabor_bank,
    gaussian,
    gaussian_derivative,
    haar_bank,
    laplacian_of_gaussian,
    lm_bank,
    mr8,
    rfs_bank,
    schmid_bank,
    steer,
    steerable_basis,
    walsh_hadamard_bank,
    zigzag_order,
)


@pytest.mark.parametrize("bank", [dct_bank(5), dct_bank(8, "zigzag"), haar_bank(8), walsh_hadamard_bank(4)])
def test_bases_are_orthonormal(bank: torch.Tensor):
    rows = bank.flatten(1)
    torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows), dtype=rows.dtype))


def test_zigzag_goes_from_low_to_high():
    assert zigzag_order(3).tolist() == [[0, 0], [0, 1], [1, 0], [2, 0], [1, 1], [0, 2], [1, 2], [2, 1], [2, 2]]
    assert torch.equal(dct_bank(3, "zigzag")[3], dct_bank(3)[6])


def test_waves():
    # An odd wave has the mean 0; turned by a right angle it is transposed.
    assert abs(float(gabor(7, 0.3, 4, psi=math.pi / 2).sum())) < 1e-12
    torch.testing.assert_close(gabor(5, math.pi / 2, 3), gabor(5, 0, 3).T)
    bank = gabor_bank(5)
    assert bank.shape == (16, 5, 5)
    torch.testing.assert_close(bank.square().sum((1, 2)), torch.ones(16, dtype=bank.dtype))
    assert bank.mean((1, 2)).abs().max() < 1e-12


def test_gaussians_and_derivatives():
    assert float(gaussian(9, 1.5).sum()) == pytest.approx(1)
    assert abs(float(laplacian_of_gaussian(9, 1.5).sum())) < 1e-12
    for order in (1, 2):
        basis = steerable_basis(9, 1.3, order)
        torch.testing.assert_close(steer(basis, 0.7), gaussian_derivative(9, 1.3, order, 0.7))
    ramp = torch.arange(9, dtype=torch.float64).expand(9, 9)[None, None]
    slope = F.conv2d(ramp, gaussian_derivative(9, 1.0, 1)[None, None])
    assert float(slope) == pytest.approx(-1, abs=1e-2)  # a correlation sees the derivative mirrored


def test_edges_see_steps():
    step = torch.tensor([[0.0, 0, 1], [0, 0, 1], [0, 0, 1]], dtype=torch.float64)
    assert float((EDGE_FILTERS["sobel_x"] * step).sum()) == 4
    assert float((EDGE_FILTERS["sobel_y"] * step).sum()) == 0
    assert all(abs(float(values.sum())) == 0 for values in EDGE_FILTERS.values())


def test_texture_banks():
    assert (schmid_bank(25).shape[0], lm_bank(25).shape[0], rfs_bank(25).shape[0]) == (13, 48, 38)
    assert schmid_bank(25).sum((1, 2)).abs().max() < 1e-12
    torch.testing.assert_close(schmid_bank(25), schmid_bank(25).flip(1).transpose(1, 2))
    responses = torch.randn(2, 38, 4, 5)
    assert torch.equal(mr8(responses)[:, 1], responses[:, 6:12].amax(1))
    assert mr8(responses).shape == (2, 8, 4, 5)
    with pytest.raises(ValueError, match="38"):
        mr8(responses[:, :8])


def test_discs():
    bank = fourier_bessel_bank(15)
    assert bank.shape == (3 + 2 * 6, 15, 15)
    rows = bank.flatten(1)
    assert (rows @ rows.T - torch.eye(15, dtype=rows.dtype)).abs().max() < 0.15  # orthogonal but for the sampling
    assert bank[:, 0, 0].abs().max() == 0


def test_channels():
    filters = dct_bank(3)[:2]
    x = torch.rand(1, 3, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(
        F.conv2d(x, expand_channels(filters, 3)), F.conv2d(x.mean(1, keepdim=True), filters[:, None])
    )
    assert expand_channels(filters, 3, "depthwise").shape == (6, 1, 3, 3)
    signs = expand_channels(filters, 4, "signs", torch.Generator().manual_seed(0))
    torch.testing.assert_close(signs.square().sum((1, 2, 3)), torch.ones(2, dtype=signs.dtype))


def test_bad_input():
    for call, message in (
        (lambda: gabor(5, 0, -1), "wavelength must be positive"),
        (lambda: haar_bank(6), "power of 2"),
        (lambda: gaussian_derivative(5, 1, 3), "order must be 0, 1 or 2"),
        (lambda: steerable_basis(5, 1, 3), "order must be 1 or 2"),  # type: ignore[arg-type]
        (lambda: gaussian(0, 1), "k must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(UnknownName, match="order"):
        dct_bank(4, "zig")  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match="how"):
        image_filters.expand_channels(dct_bank(2), 2, "sum")  # type: ignore[arg-type]
