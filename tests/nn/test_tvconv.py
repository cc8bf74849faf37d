"""Translation variant convolution beyond what the battery tests, and its classifier."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from convatlas.errors import Unsupported
from convatlas.nn.conv.tvconv import StaticTVConv2d, TVConv2d, export_tvconv, resize_position_maps
from convatlas.nn.margin_softmax import AMSoftmax
from convatlas.surgery import merge
from convatlas.training.measure import count_parameters
from convatlas.weights import load_weights


def make(channels: int = 8, size: tuple[int, int] = (6, 5), **options: Any) -> TVConv2d:
    options = {"bias": False, "hidden_channels": 16, "hidden_layers": 1, **options}
    layer = TVConv2d(channels, channels, 3, padding=1, groups=channels, output_size=size, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return layer


def test_parameters_and_names_are_those_of_the_authors():
    layer = make()
    height, width, hidden, maps, channels = 6, 5, 16, 4, 8
    norms = 2 * 2 * hidden * height * width
    assert count_parameters(layer) == (
        9 * maps * hidden + 9 * hidden**2 + 9 * hidden * 9 * channels + norms + maps * height * width
    )
    state = {key.replace("position_maps", "posi_map"): value for key, value in layer.state_dict().items()}
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        "posi_map": (1, 4, 6, 5),
        "weight_layers.0.0.weight": (16, 4, 3, 3),
        "weight_layers.0.1.weight": (16, 6, 5),
        "weight_layers.0.1.bias": (16, 6, 5),
        "weight_layers.1.0.weight": (16, 16, 3, 3),
        "weight_layers.1.1.weight": (16, 6, 5),
        "weight_layers.1.1.bias": (16, 6, 5),
        "weight_layers.2.weight": (72, 16, 3, 3),
    }
    scalars = dict.fromkeys(("TVConv_k", "TVConv_k_square", "stride", "channels", "h", "w"), torch.tensor(3))
    other = make()
    load_weights(other, {**state, **scalars})
    torch.testing.assert_close(other.weight_maps, layer.weight_maps)


def test_constant_kernels_are_a_depthwise_convolution():
    x, weight = torch.randn(2, 4, 7, 6, dtype=torch.float64), torch.randn(4, 1, 3, 3, dtype=torch.float64)
    static = StaticTVConv2d(weight[:, 0, :, :, None, None].expand(-1, -1, -1, 4, 3), stride=2)
    torch.testing.assert_close(static(x), F.conv2d(x, weight, stride=2, padding=1, groups=4))


def test_fresh_kernels_differ_at_the_border():
    layer = TVConv2d(2, 2, 3, padding=1, groups=2, bias=False, output_size=(9, 9), hidden_channels=4, hidden_layers=0)
    assert torch.equal(layer.position_maps, torch.ones(1, 4, 9, 9))
    maps = layer.weight_maps
    assert not torch.allclose(maps[..., 0, 0], maps[..., 4, 4])
    torch.testing.assert_close(maps[..., 3, 4], maps[..., 4, 4])


def test_stored_kernels_do_the_same():
    layer = make(bias=True).double()
    x = torch.randn(3, 8, 6, 5, dtype=torch.float64)
    model = nn.Sequential(nn.Conv2d(8, 8, 1), layer, nn.ReLU()).double().eval()
    merged = merge(model, x).model
    assert isinstance(merged[1], StaticTVConv2d)
    torch.testing.assert_close(merged(x), model(x))
    half = export_tvconv(model, dtype=torch.float16).model
    assert half[1].weight_maps.dtype == torch.float16
    torch.testing.assert_close(half(x), model(x), rtol=1e-2, atol=1e-2)
    with pytest.raises(Unsupported):
        export_tvconv(model, max_bytes=100)


@pytest.mark.parametrize("side", [9, 10])
def test_two_sizes_of_input_with_stride_2(side: int):
    layer = TVConv2d(2, 2, 3, 2, 1, groups=2, output_size=(5, 4), hidden_channels=3, hidden_layers=0)
    assert layer(torch.randn(1, 2, side, 8)).shape == (1, 2, 5, 4)
    with pytest.raises(ValueError, match="TVConv2d was built for an output of 5 x 4, got one of 6 x 4 from x"):
        layer(torch.randn(1, 2, 11, 8))


def test_other_sizes_by_resizing():
    layer = make(bias=True)
    other = resize_position_maps(layer, (12, 10))
    assert other(torch.randn(1, 8, 12, 10)).shape == (1, 8, 12, 10)
    same = resize_position_maps(layer, (6, 5))
    torch.testing.assert_close(same.weight_maps, layer.weight_maps)
    nn.init.constant_(layer.position_maps, 2.0)
    torch.testing.assert_close(resize_position_maps(layer, (3, 3)).position_maps, torch.full((1, 4, 3, 3), 2.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": 1}, "in_channels, out_channels and groups must be equal, got 4, 4 and 1"),
        ({"kernel_size": 4, "padding": 2}, "kernel_size must be odd, got 4"),
        ({"padding": 0}, "padding must be 1 zeros, got 0"),
        ({"padding_mode": "circular"}, r"padding must be 1 zeros, got 1 \(circular\)"),
        ({"stride": (1, 2)}, r"stride must be one positive number for both axes, got \(1, 2\)"),
        ({"output_size": (0, 5)}, "output_size, position_channels and hidden_channels must be at least 1"),
    ],
)
def test_impossible_settings_are_named(arguments: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        TVConv2d(4, 4, **{"kernel_size": 3, "padding": 1, "groups": 4, "output_size": (6, 5), **arguments})


def test_angles_and_margins():
    head = AMSoftmax(6, 3, margin=0.4, scale=10.0).double()
    features = 5 * head.weight.detach()[[2, 0]]
    labels = torch.tensor([2, 1])
    plain, shifted = head(features), head(features, labels)
    torch.testing.assert_close(plain[0, 2], torch.tensor(10.0, dtype=torch.float64))
    torch.testing.assert_close((plain - shifted).detach(), 4.0 * F.one_hot(labels, 3).double())
    torch.testing.assert_close(head.loss(features, labels), F.cross_entropy(shifted, labels))
    with pytest.raises(ValueError, match=r"features must be \(B, 6\), got \(2, 5\)"):
        head(torch.zeros(2, 5))
