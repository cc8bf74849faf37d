"""Weighted convolution: its density, its gradients, its places in networks, and the search for good values."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from convatlas.errors import Unsupported
from convatlas.networks.registry import create_model
from convatlas.nn.conv.derived import originals
from convatlas.nn.conv.weighted_conv import (
    BEST_DENSITIES,
    WeightedConv1d,
    WeightedConv2d,
    WeightedConv3d,
    apply_weighted_conv,
    bake,
    density_kernel,
    density_param_groups,
    radial_energy,
    tune_density,
)


def test_density_is_the_worked_example():
    phi = density_kernel((0.2, 0.8), 2)
    assert [float(phi[i, j]) for i, j in ((0, 0), (0, 2), (1, 1), (2, 2))] == pytest.approx([0.04, 0.2, 0.64, 1])
    for same in (phi.flip(0), phi.flip(1), phi.T):
        assert torch.equal(same, phi)
    assert density_kernel((), 3).shape == (1, 1, 1)


def test_gradients_are_scaled_by_the_density():
    layer = WeightedConv2d(2, 3, 5, padding=2, density=(0.25, 0.5), trainable_density=True).double()
    plain, x = bake(layer), torch.randn(2, 2, 7, 6, dtype=torch.float64)
    for module in (layer, plain):
        module(x).square().sum().backward()
    (weight,) = originals(layer)
    torch.testing.assert_close(weight.grad, layer.phi.detach() * plain.weight.grad)
    # dL/dd_t, by the sums over each axis.
    m = (plain.weight.grad * weight.detach()).sum((0, 1))
    alpha = torch.tensor([0.25, 0.5, 1, 0.5, 0.25], dtype=torch.float64)
    by_alpha = (m + m.T) @ alpha
    density = layer.parametrizations.weight[0].density
    torch.testing.assert_close(density.grad, by_alpha[:2] + by_alpha[[4, 3]])


def test_ones_are_a_plain_convolution_and_nothing_is_added():
    layer = WeightedConv3d(2, 4, 3, groups=2, density=(1.0,))
    plain = nn.Conv3d(2, 4, 3, groups=2)
    assert sum(p.numel() for p in layer.parameters()) == sum(p.numel() for p in plain.parameters())
    x = torch.randn(1, 2, 4, 5, 3)
    torch.testing.assert_close(bake(layer)(x), layer(x), rtol=0, atol=0)
    assert torch.equal(originals(layer)[0], layer.weight)
    assert not layer.bias.any()


def test_density_for_each_axis():
    layer = WeightedConv2d(1, 1, (3, 5), density=((0.5,), (0.25, 0.75)))
    torch.testing.assert_close(layer.phi, torch.outer(torch.tensor([0.5, 1, 0.5]), density_kernel((0.25, 0.75), 1)))
    by_size = WeightedConv2d(1, 1, (3, 5), density={3: (0.5,), 5: (0.25, 0.75)})
    assert torch.equal(by_size.phi, layer.phi)
    line = WeightedConv2d(1, 1, (3, 1), density={3: (0.5,)})
    assert line.phi.flatten().tolist() == [0.5, 1, 0.5]


def test_rescaled_start_has_the_variance_of_a_plain_one():
    torch.manual_seed(0)
    layer = WeightedConv2d(64, 64, 7, density=BEST_DENSITIES[7], rescale_init=True)
    assert float(layer.weight.square().mean()) == pytest.approx(2 / (64 * 49), rel=0.05)


def test_a_network_changes_or_keeps_its_function():
    model = create_model("resnet18", depths=(1,), widths=(4,), stem_width=4, num_classes=2).double().eval()
    x = torch.randn(1, 3, 20, 20, dtype=torch.float64)
    same = apply_weighted_conv(model, preserve_function=True, by_name={"conv1": (0.5, 0.5, 0.5)})
    assert same.changed == ("conv1", "layer1.0.conv1", "layer1.0.conv2")
    torch.testing.assert_close(same.model(x), model(x))
    assert same.model.conv1.phi[0, 3] == 0.5
    assert float(same.model.layer1[0].conv1.phi[0, 1]) == pytest.approx(0.7)
    changed = apply_weighted_conv(model, {3: (0.5,)}, skip="conv1").model
    assert torch.equal(originals(changed.layer1[0].conv1)[0], model.layer1[0].conv1.weight)
    assert not torch.allclose(changed(x), model(x))
    with pytest.raises(Unsupported, match="one tap"):
        apply_weighted_conv(nn.Conv2d(2, 2, 1))


def test_trained_values_are_a_group_of_their_own():
    layers = nn.Sequential(*(WeightedConv1d(2, 2, 5, density=(0.2, 0.8), trainable_density=True) for _ in range(2)))
    weights, densities = density_param_groups(layers)
    assert [p.numel() for p in densities["params"]] == [2, 2]
    assert (densities["lr"], weights["lr"], len(weights["params"])) == (1e-2, 1e-4, 4)
    torch.optim.AdamW([weights, densities])
    with pytest.raises(Unsupported, match="no trained density"):
        density_param_groups(nn.Linear(2, 2))


def test_search_moves_until_the_middle_wins():
    best, tried = tune_density(lambda d: -((d[0] - 0.8) ** 2) - (d[1] - 1.2) ** 2, (1.0, 1.0), step=0.1)
    assert best == pytest.approx((0.81, 1.21), abs=0.02)
    assert tried[0][0] == (1.0, 1.0)
    assert len({density for density, _ in tried}) == len(tried)


def test_energy_by_distance():
    weight = torch.zeros(1, 1, 5, 5)
    weight[..., 2, 2], weight[..., 1, 3], weight[..., 0, 2] = 3.0, 2.0, 1.0
    torch.testing.assert_close(radial_energy(weight), torch.tensor([9.0, 4.0, 1.0]) / 14)


def test_bad_input():
    for size, density, message in (
        (4, (0.5,), "kernel_size must be odd"),
        (5, (0.5,), "a kernel of size 5 needs 2 density values, outermost first"),
        (3, (0.5, 0.5), "a kernel of size 3 needs 1 density value, outermost first"),
        ((3, 5), (0.5,), "for each axis"),
        (7, {3: (0.5,)}, "size 7"),
        (3, (float("nan"),), "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            WeightedConv2d(1, 1, size, density=density)
    with pytest.raises(Unsupported, match="zero"):
        WeightedConv2d.from_conv(nn.Conv2d(1, 1, 3), density=(0.0,))
    with pytest.raises(Unsupported, match="weighted convolution"):
        bake(nn.Conv2d(1, 1, 3))
    with pytest.raises(ValueError, match="step"):
        tune_density(lambda density: 0.0, (1.0,), step=0)
