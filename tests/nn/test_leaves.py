"""The small shared layers: drop path, layer scale, channels-first layer norm, squeeze and excitation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from convatlas.nn.drop import DropPath, drop_path_rates
from convatlas.nn.mixers.squeeze_excite import SqueezeExcite
from convatlas.nn.norm import ChannelLayerNorm
from convatlas.nn.scale import LayerScale


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    y = DropPath(0.25)(torch.ones(4000, 2, 3, 3))
    kept = y.flatten(1).amax(1)
    assert torch.equal(y, kept.reshape(-1, 1, 1, 1).expand_as(y))
    assert set(kept.tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs((kept > 0).float().mean().item() - 0.75) < 0.03


def test_drop_path_is_the_identity_in_evaluation_and_at_rate_zero():
    x = torch.randn(3, 4)
    assert DropPath(0.5).eval()(x) is x
    assert DropPath(0.0)(x) is x


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_drop_path_rate_is_checked(rate: float):
    with pytest.raises(ValueError, match=rf"drop path rate must be in \[0, 1\), got {rate}"):
        DropPath(rate)


@pytest.mark.parametrize("depths", [(3, 3, 9, 3), (1, 2), (1,), (2, 0, 1)])
def test_drop_path_rates_rise_linearly_over_all_blocks(depths: tuple[int, ...]):
    rates = drop_path_rates(0.3, depths)
    assert tuple(len(stage) for stage in rates) == depths
    flat = torch.tensor([rate for stage in rates for rate in stage], dtype=torch.float64)
    torch.testing.assert_close(flat, torch.linspace(0, 0.3, sum(depths), dtype=torch.float64))


def test_layer_scale_multiplies_the_channels_of_its_axis():
    x = torch.randn(2, 3, 4, 5)
    scale = LayerScale(3, 0.5)
    assert torch.equal(scale(x), 0.5 * x)
    with torch.no_grad():
        scale.gamma.copy_(torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(scale(x)[:, 2], 3 * x[:, 2])
    last = LayerScale(3, channel_dim=-1)
    last.load_state_dict(scale.state_dict())
    torch.testing.assert_close(last(x.movedim(1, -1)).movedim(-1, 1), scale(x))


@pytest.mark.parametrize("shape", [(2, 6), (2, 6, 5), (1, 6, 3, 1), (2, 6, 2, 3, 4)])
def test_channel_layer_norm_normalises_each_position(shape: tuple[int, ...]):
    torch.manual_seed(0)
    norm = ChannelLayerNorm(6, eps=1e-6).double()
    x = torch.randn(shape, dtype=torch.float64)
    mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
    torch.testing.assert_close(norm(x), (x - mean) / (variance + 1e-6).sqrt())
    assert set(norm.state_dict()) == set(nn.LayerNorm(6).state_dict())


def test_squeeze_excite_is_a_gate_of_the_channel_means():
    torch.manual_seed(0)
    layer = SqueezeExcite(16, reduction=4)
    x = torch.randn(2, 16, 3, 5)
    means = x.mean((2, 3))
    hidden = torch.relu(means @ layer.fc1.weight.T + layer.fc1.bias)
    gate = torch.sigmoid(hidden @ layer.fc2.weight.T + layer.fc2.bias)
    torch.testing.assert_close(layer(x), x * gate[:, :, None, None])
    assert sum(weight.numel() for weight in layer.parameters()) == 2 * 16 * 4 + 4 + 16


@pytest.mark.parametrize("reduction", [32, 0, -1])
def test_squeeze_excite_needs_a_bottleneck(reduction: int):
    with pytest.raises(ValueError, match=rf"channels // reduction must be at least 1, got 16 // {reduction}"):
        SqueezeExcite(16, reduction=reduction)
