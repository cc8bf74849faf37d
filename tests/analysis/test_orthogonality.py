"""Measures of the orthogonality of networks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from convatlas.analysis.orthogonality import layer_orthogonality, lipschitz_upper_bound, measure_orthogonality, study
from convatlas.errors import Unsupported
from convatlas.training.orthogonality import orthogonal_conv_init_


def test_measures_follow_the_theorems():
    conv = nn.Conv2d(2, 6, 3, 2, padding=1, padding_mode="circular", bias=False)
    found = layer_orthogonality(conv, (8, 12))
    assert found.frobenius**2 == pytest.approx(4 * 6 * found.l_orth)
    assert found.spectral <= found.bound
    assert len(found.singular_values) == 4 * 6 * 6
    orthogonal_conv_init_(conv)
    found = layer_orthogonality(conv, 8)
    assert found.spectral < 1e-6
    assert found.note == "it exists"


def test_a_network_is_measured_where_it_is_called():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 2), nn.Conv2d(4, 8, 3, 2, padding=1))
    measured, skipped = measure_orthogonality(model, torch.randn(1, 3, 9, 9))
    assert [each.name for each in measured] == ["0", "2"]
    assert "odd kernels" in skipped["1"]
    assert len(measured[1].singular_values) == 8 * 9
    assert "as if padding were circular" in measured[0].note
    report = study(model, torch.randn(1, 3, 9, 9))
    assert "furthest from orthogonal" in report.summary
    assert len(report.to_html()) > 10_000


def test_lipschitz_bound_holds_and_is_tight_for_orthogonal_layers():
    model = nn.Sequential(
        *(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(8), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 4, 3, 2), nn.Flatten(), nn.Linear(4 * 9, 3)),
    ).eval()
    x = torch.randn(8, 2, 14, 14)
    bound = lipschitz_upper_bound(model, x)
    y = x + 0.1 * torch.randn_like(x)
    assert ((model(x) - model(y)).norm(dim=1) <= bound * (x - y).flatten(1).norm(dim=1)).all()
    chain = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 9, 3, padding=1)).eval()
    for layer in (chain[0], chain[2]):
        orthogonal_conv_init_(layer)
    assert lipschitz_upper_bound(chain, x) == pytest.approx(1, abs=1e-5)
    assert math.isfinite(bound)


def test_what_is_no_chain_is_refused():
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.one(x) + self.two(x)

    with pytest.raises(Unsupported, match="two does not read"):
        lipschitz_upper_bound(Sum().eval(), torch.randn(2, 3))
    with pytest.raises(Unsupported, match="norm of a GELU is not known"):
        lipschitz_upper_bound(nn.Sequential(nn.GELU()).eval(), torch.randn(2, 3))
    with pytest.raises(ValueError, match="evaluation mode"):
        lipschitz_upper_bound(nn.Linear(3, 3), torch.randn(2, 3))
