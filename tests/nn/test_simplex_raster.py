"""Meshes as images, in batches, and the loss between shapes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from convatlas.errors import UnknownName
from convatlas.nn.simplex_raster import SimplexFourier, SimplexRaster, SpectralShapeLoss
from convatlas.ops.simplex_fourier import polygon_elements, rasterize, simplex_fourier

HALVES = torch.tensor([[0, 1, 2], [0, 2, 3]])


def polygon(n: int, radius: float) -> Tensor:
    angles = 2 * math.pi * torch.arange(n, dtype=torch.float64) / n
    return 0.5 + radius * torch.stack([torch.cos(angles), torch.sin(angles)], dim=1)


def test_batches_are_meshes_one_by_one():
    layer = SimplexRaster((8, 6), sigma=1.0)
    meshes, weights = torch.rand(3, 4, 2), torch.rand(2, 2)
    spectra = [simplex_fourier(mesh, HALVES, weights, (8, 6)) for mesh in meshes]
    expected = torch.stack([rasterize(spectrum, (8, 6), sigma=1.0) for spectrum in spectra])
    torch.testing.assert_close(layer(meshes, HALVES, weights), expected)
    torch.testing.assert_close(layer(list(meshes), HALVES.expand(3, 2, 3), [weights] * 3), expected)
    torch.testing.assert_close(layer(meshes[0], HALVES, weights), expected[0])
    torch.testing.assert_close(SimplexFourier((8, 6))(meshes[1], HALVES, weights), spectra[1])
    padded = torch.cat([weights, torch.zeros(1, 2)])
    torch.testing.assert_close(layer(meshes[0], torch.tensor([*HALVES.tolist(), [0, 0, 0]]), padded), expected[0])
    mixed = layer([polygon(5, 0.3).float(), polygon(7, 0.2).float()], [polygon_elements(5), polygon_elements(7)])
    assert mixed.shape == (2, 1, 8, 6)


def test_feeds_a_network():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 6 * 6, 2))
    mesh = torch.rand(2, 4, 2, requires_grad=True)
    network(SimplexRaster((8, 8))(mesh, HALVES)).sum().backward()
    assert mesh.grad is not None
    assert mesh.grad.isfinite().all()
    assert mesh.grad.any()


def test_loss_draws_a_polygon_to_its_target():
    loss = SpectralShapeLoss((16, 16))
    elements, target = polygon_elements(12), polygon(12, 0.3)
    raster = loss.raster(target, elements)
    assert float(loss(target, elements, raster)) == 0
    shape = polygon(12, 0.2).requires_grad_()
    optimizer = torch.optim.Adam([shape], lr=0.01)
    losses = []
    for _ in range(15):
        value = loss(shape, elements, target, elements)
        torch.testing.assert_close(value, loss(shape, elements, raster))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.2 * losses[0]


def test_options_are_shown_and_checked():
    assert repr(SimplexFourier((8, 6))) == "SimplexFourier(resolution=(8, 6), mode='density', boundary=False)"
    assert "smoothing='lanczos'" in repr(SimplexRaster((8,), smoothing="lanczos"))
    with pytest.raises(ValueError, match=r"resolution must be one to three positive numbers, got \(8, 8, 8, 8\)"):
        SimplexFourier((8, 8, 8, 8))
    with pytest.raises(UnknownName, match="unknown mode 'dense'"):
        SimplexFourier((8,), mode="dense")  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match="unknown smoothing 'lanczoz': did you mean lanczos"):
        SimplexRaster((8,), smoothing="lanczoz")  # type: ignore[arg-type]
    layer = SimplexRaster((4, 4))
    with pytest.raises(ValueError, match="elements must be given once or for each of 3 meshes, got 2"):
        layer(torch.rand(3, 4, 2), [HALVES, HALVES])
    with pytest.raises(ValueError, match="elements and densities must be tensors where vertices are those of one mesh"):
        layer(torch.rand(4, 2), [HALVES])
    with pytest.raises(ValueError, match=r"target must be a raster \(1, 4, 4\) where target_elements is left out"):
        SpectralShapeLoss((4, 4), boundary=False)(torch.rand(4, 2), HALVES, torch.zeros(4, 4))
