"""Initial weights: variances, isometries, and what data make of them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from convatlas.errors import UnknownName, Unsupported
from convatlas.networks.registry import create_model
from convatlas.nn import initialisers
from convatlas.nn.initialisers import (
    INITIALISERS,
    data_dependent_,
    delta_orthogonal_,
    dirac_,
    fixup_,
    gain_of,
    he_normal_,
    initialise,
    lsuv_,
    orthogonal_,
    sparse_,
    truncated_normal_,
    zero_gamma_,
)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    ("name", "options", "variance"),
    [
        ("normal", {}, 1e-4),
        ("truncated_normal", {"std": 0.5}, 0.25),
        ("lecun_normal", {}, 1 / (16 * 9)),
        ("xavier_normal", {"groups": 2}, 2 / (16 * 9 + 64 * 9 / 2)),
        ("xavier_uniform", {"groups": 2}, 2 / (16 * 9 + 64 * 9 / 2)),
        ("he_normal", {}, 2 / (16 * 9)),
        ("he_normal", {"mode": "fan_out", "groups": 2}, 2 / (64 * 9 / 2)),
        ("he_uniform", {"nonlinearity": "tanh"}, (5 / 3) ** 2 / (16 * 9)),
    ],
)
def test_variances(name: str, options: dict, variance: float, generator: torch.Generator):
    weight = INITIALISERS[name](torch.empty(64, 16, 3, 3), generator=generator, **options)
    assert float(weight.var()) == pytest.approx(variance, rel=0.05)
    again = INITIALISERS[name](torch.empty(64, 16, 3, 3), generator=torch.Generator().manual_seed(0), **options)
    assert torch.equal(weight, again)


def test_he_keeps_the_power_of_wide_layers(generator: torch.Generator):
    x = torch.randn(200, 400, generator=generator)
    for _ in range(10):
        x = F.linear(x, he_normal_(torch.empty(400, 400), generator=generator)).relu()
    assert float(x.square().mean()) == pytest.approx(1, rel=0.3)


def test_orthogonal_and_delta_orthogonal_are_isometries(generator: torch.Generator):
    for shape in ((4, 3, 3, 3), (40, 3, 3, 3)):
        matrix = orthogonal_(torch.empty(shape), generator=generator).flatten(1)
        matrix = matrix if len(matrix) <= matrix.shape[1] else matrix.T
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(matrix)))
    x = torch.randn(2, 3, 6, 5)
    y = F.conv2d(x, delta_orthogonal_(torch.empty(8, 3, 3, 3), generator=generator), padding=1)
    torch.testing.assert_close(y.norm(), x.norm())
    with pytest.raises(ValueError, match="as many outputs as inputs"):
        delta_orthogonal_(torch.empty(2, 3, 3))


def test_dirac_is_the_identity_of_each_group():
    x = torch.randn(1, 6, 5, 5)
    assert torch.equal(F.conv2d(x, dirac_(torch.empty(6, 2, 3, 3), 3), padding=1, groups=3), x)


def test_cut_and_sparse(generator: torch.Generator):
    weight = truncated_normal_(torch.empty(1000), 1.0, generator=generator)
    assert float(weight.abs().max()) <= 2 / initialisers._TRUNCATED + 1e-6
    sparse = sparse_(torch.empty(5, 4, 3, 3), 0.75, generator=generator)
    assert ((sparse == 0).flatten(1).sum(1) == 27).all()


def test_lsuv_gives_every_layer_the_variance_one_in_one_pass():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3))
    batch = 3 * torch.randn(16, 2, 6, 6)
    calls: list[int] = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    counts = lsuv_(model, batch, tol=0.01)
    handle.remove()
    assert list(counts) == ["0", "2", "5"]
    assert len(calls) == 1
    assert model.training
    with torch.no_grad():
        for end in (1, 3, 6):
            assert float(model[:end](batch).var(correction=0)) == pytest.approx(1, abs=0.01)
    with pytest.raises(ValueError, match="0 puts out a constant"):
        lsuv_(model, torch.zeros(2, 2, 6, 6))


def test_data_dependent_gives_every_channel_mean_and_variance():
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3))
    batch = 2 + torch.randn(16, 2, 6, 6)
    data_dependent_(model, batch)
    with torch.no_grad():
        y = model[0](batch).movedim(1, 0).flatten(1)
        z = model(batch)
    for values in (y.T, z):
        torch.testing.assert_close(values.mean(0), torch.zeros(values.shape[1]), atol=1e-5, rtol=0)
        torch.testing.assert_close(values.var(0, correction=0), torch.ones(values.shape[1]), atol=1e-4, rtol=0)


def test_residual_branches_begin_as_the_identity():
    model = create_model("resnet18", depths=(2, 1), widths=(8, 8), stem_width=8, num_classes=4)
    assert zero_gamma_(model) == 3
    y = torch.rand(1, 8, 6, 6)
    model.eval()
    torch.testing.assert_close(model.layer1(y), y)
    other = create_model("resnet18", depths=(2, 2), widths=(8, 8), stem_width=8, num_classes=4)
    before = other.layer1[0].conv1.weight.detach().clone()
    fixup_(other)
    torch.testing.assert_close(other.layer1[0].conv1.weight, before * 4**-0.5)
    assert not other.layer2[1].conv2.weight.any()
    assert not other.fc.weight.any()
    with pytest.raises(Unsupported, match="no residual block"):
        zero_gamma_(nn.Sequential(nn.Conv2d(1, 1, 1)))


def test_a_whole_model():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Linear(8, 2))
    initialise(model, "xavier_uniform", skip=("1",))
    bound = math.sqrt(6 / (2 * 9 + 8 * 9 / 2))
    assert 0.9 * bound < float(model[0].weight.abs().max()) <= bound
    assert not model[0].bias.any()
    assert model[1].bias.any()
    with pytest.raises(UnknownName, match="did you mean he_normal"):
        initialise(model, "he_norm")
    with pytest.raises(ValueError, match="1: weight must have at least as many outputs"):
        initialise(model, "delta_orthogonal")
    with pytest.raises(UnknownName, match="nonlinearity"):
        gain_of("swish")
    with pytest.raises(ValueError, match="draw must have the shape"):
        he_normal_(torch.empty(2, 2), draw=torch.zeros(3))
