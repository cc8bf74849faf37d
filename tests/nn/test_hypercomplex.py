"""Hypercomplex layers: what the paper says of them, quaternions, biases, replacing and giving back, bad input."""

from __future__ import annotations

import math
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.errors import UnknownName, Unsupported
from convatlas.networks.registry import create_model
from convatlas.nn.conv.derived import originals
from convatlas.nn.conv.hypercomplex import (
    PHConv1d,
    PHConv2d,
    PHConv3d,
    PHConvTranspose2d,
    PHLinear,
    QuaternionConv1d,
    QuaternionConv2d,
    algebra_l1,
    convert_to_hypercomplex,
)
from convatlas.ops.hypercomplex import hypercomplex_algebra, ph_weight
from convatlas.surgery import merge, swap
from convatlas.training.measure import count_parameters
from convatlas.weights import load_weights


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def of(layer: nn.Module, n: int) -> tuple[Tensor, Tensor]:
    """A and F of a layer, in the paper's shape."""
    algebra, filters = originals(layer)
    return algebra, filters.unflatten(0, (n, -1))


@pytest.mark.parametrize(("kind", "dims"), [(PHConv1d, 1), (PHConv2d, 2), (PHConv3d, 3)])
def test_parameters_are_a_share_of_the_plain_ones(kind: type[nn.Module], dims: int):
    layer = kind(12, 24, 3, n=4)
    assert count_parameters(layer) == 4**3 + 24 * 12 * 3**dims // 4 + 24
    assert torch.equal(layer.weight, ph_weight(*of(layer, 4)))
    assert layer.weight.shape == (24, 12, *[3] * dims)


def test_with_one_component_it_is_a_plain_convolution():
    layer, x = PHConv2d(3, 5, 3, n=1), torch.randn(2, 3, 6, 7)
    algebra, filters = of(layer, 1)
    torch.testing.assert_close(layer(x), F.conv2d(x, algebra[0, 0, 0] * filters[0], layer.bias))


def test_initial_weights_are_drawn_as_the_authors_draw_them():
    conv, linear = PHConv2d(64, 128, 3, n=4), PHLinear(64, 128, n=2)
    for layer, n, o, c, area in ((conv, 4, 32, 16, 9), (linear, 2, 64, 32, 1)):
        algebra, filters = of(layer, n)
        for tensor, bound in (
            (algebra, math.sqrt(6 / (2 * n * n))),
            (filters, math.sqrt(6 / ((o + n) * c * area))),
            (layer.bias, 1 / math.sqrt(64)),
        ):
            assert 0.8 * bound < tensor.abs().max() <= bound
            assert abs(tensor.mean()) < 0.5 * bound
    fixed = QuaternionConv2d(64, 128, 3)
    assert 0.95 * 6**0.5 < fixed.weight.abs().max() * math.sqrt((64 + 128) * 9) <= 6**0.5


def test_new_weights_can_be_drawn():
    layer = PHConv2d(8, 8, 3, n=2)
    before = [parameter.clone() for parameter in layer.parameters()]
    layer.reset_parameters()
    assert not any(torch.equal(old, new) for old, new in zip(before, layer.parameters(), strict=True))


def test_groups_share_the_algebra():
    layer, x = PHConv2d(8, 12, 3, groups=2, n=2), torch.randn(2, 8, 5, 6)
    assert count_parameters(layer) == 2**3 + 12 * 8 // 2 * 9 // 2 + 12
    algebra, filters = of(layer, 2)
    biases = layer.bias.chunk(2)
    parts = [
        F.conv2d(part, ph_weight(algebra, own), bias)
        for part, own, bias in zip(x.chunk(2, 1), filters.chunk(2, 1), biases, strict=True)
    ]
    torch.testing.assert_close(layer(x), torch.cat(parts, 1))


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolution_multiplies_from_the_same_side(groups: int):
    layer = PHConvTranspose2d(8, 12, 1, groups=groups, bias=False, n=2)
    algebra, filters = of(layer, 2)
    x = torch.randn(3, 8, 4, 4)
    torch.testing.assert_close(layer(x), F.conv2d(x, ph_weight(algebra, filters, groups), groups=groups))


# Fixed algebras


def hamilton_rows(r: Tensor, i: Tensor, j: Tensor, k: Tensor) -> Tensor:
    rows = [[r, -i, -j, -k], [i, r, -k, j], [j, k, r, -i], [k, -j, i, r]]
    return torch.cat([torch.cat(row, dim=1) for row in rows])


def test_quaternion_convolution_is_the_hamilton_product():
    layer, x = QuaternionConv2d(8, 12, 3, padding=1), torch.randn(2, 8, 5, 6)
    weight = hamilton_rows(*originals(layer)[0].chunk(4))
    assert torch.equal(layer.weight, weight)
    torch.testing.assert_close(layer(x), F.conv2d(x, weight, layer.bias, padding=1))
    assert count_parameters(layer) == 12 * 8 * 9 // 4 + 12


def test_authors_quaternion_layers_load():
    parts = {f"{part}_weight": torch.randn(3, 2, 5) for part in "rijk"}
    layer = QuaternionConv1d(8, 12, 5)
    report = load_weights(layer, {**parts, "bias": torch.randn(12)})
    assert (report.layout, report.differences()) == ("authors", [])
    assert torch.equal(layer.weight, hamilton_rows(*parts.values()))


def test_authors_layers_load():
    conv = {"bias": torch.randn(6), "A": torch.randn(3, 3, 3), "F": torch.randn(3, 2, 3, 5, 5)}
    linear = {"bias": torch.randn(6), "a": torch.randn(3, 3, 3), "s": torch.randn(3, 2, 3)}
    for layer, state in ((PHConv2d(9, 6, 5, n=3), conv), (PHLinear(9, 6, n=3), linear)):
        report = load_weights(layer, state)
        assert (report.layout, report.differences()) == ("authors", [])
        bias, algebra, filters = state.values()
        torch.testing.assert_close(layer.weight, ph_weight(algebra, filters))
        assert torch.equal(layer.bias, bias)


def test_a_fixed_algebra_is_no_parameter_and_moves_with_the_layer():
    split_complex = torch.tensor([[[1.0, 0], [0, 1]], [[0, 1], [1, 0]]])
    layer = PHConv2d(4, 6, 3, n=2, algebra=split_complex).double()
    assert set(layer.state_dict()) == {"bias", "parametrizations.weight.original"}
    assert layer(torch.randn(1, 4, 5, 5, dtype=torch.float64)).dtype == torch.float64
    (filters,) = originals(layer)
    torch.testing.assert_close(layer.weight, ph_weight(split_complex.double(), filters.unflatten(0, (2, -1))))


def test_a_learned_algebra_can_begin_with_a_known_one():
    layer = PHConv2d(8, 12, 3, n=4)
    with torch.no_grad():
        originals(layer)[0].copy_(hypercomplex_algebra("quaternion"))
    torch.testing.assert_close(layer.weight, hamilton_rows(*originals(layer)[1].chunk(4)))


# Bias


def test_the_bias_of_the_authors_is_held_but_never_added():
    layer, x = PHConv2d(4, 6, 3, n=2, unused_bias=True), torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        layer.bias.fill_(7)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight))
    layer(x).sum().backward()
    assert layer.bias.grad is None
    assert not layer.bias.requires_grad
    assert "bias" in layer.state_dict()
    assert layer.to_conv().bias is None
    with pytest.raises(Unsupported, match="unused_bias must be off"):
        PHConv2d.from_conv(nn.Conv2d(4, 6, 3), n=2, unused_bias=True)


# Replacing and giving back


def representable(conv: nn.Module, n: int) -> nn.Module:
    """The layer in float64 with a weight that is a sum of n Kronecker products."""
    conv = conv.double()
    groups = getattr(conv, "groups", 1)
    turned = getattr(conv, "transposed", False)
    weight = conv.weight.transpose(0, 1) if turned else conv.weight
    shape = (n, weight.shape[0] // n, weight.shape[1] // n, *weight.shape[2:])
    sum_ = ph_weight(torch.randn(n, n, n).double(), torch.randn(shape).double(), groups)
    with torch.no_grad():
        conv.weight.copy_(sum_.transpose(0, 1) if turned else sum_)
    return conv


def test_conversion_keeps_what_can_be_kept_and_names_the_rest():
    model = nn.Sequential(
        OrderedDict(
            stem=nn.Conv2d(3, 8, 3),
            conv=representable(nn.Conv2d(8, 12, 3, padding=1, groups=2), 2),
            norm=nn.BatchNorm2d(12),
            depthwise=nn.Conv2d(12, 12, 3, padding=1, groups=12),
            up=representable(nn.ConvTranspose2d(12, 8, 2, stride=2), 2),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            fc=representable(nn.Linear(8, 6), 2),
            head=nn.Linear(6, 5),
        )
    ).double()
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    result = convert_to_hypercomplex(model, 2, skip="head", example_input=x)
    assert result.changed == ("conv", "up", "fc")
    reasons = dict(result.skipped)
    assert reasons == {
        "stem": "in_channels (3) must be divisible by n (2)",
        "depthwise": "in_channels / groups (1) must be divisible by n (2)",
    }
    torch.testing.assert_close(result.model(x), model(x))
    assert type(model.conv) is nn.Conv2d
    again = merge(result.model, x).model
    assert [type(part) for part in (again.conv, again.up, again.fc)] == [nn.Conv2d, nn.ConvTranspose2d, nn.Linear]
    torch.testing.assert_close(again(x), model.eval()(x))


def test_what_cannot_be_kept_is_near():
    conv = nn.Conv2d(16, 16, 3, dtype=torch.float64)
    near = PHConv2d.from_conv(conv, n=4)
    distance = (near.weight - conv.weight).norm() / conv.weight.norm()
    assert 0.1 < distance < 1
    assert torch.equal(near.bias, conv.bias)
    fixed = QuaternionConv2d.from_conv(conv)
    assert distance < (fixed.weight - conv.weight).norm() / conv.weight.norm() < 1


def test_a_whole_network_can_be_converted():
    model = create_model("resnet18", depths=(1, 1), widths=(8, 16), stem_width=8, num_classes=10)
    x = torch.randn(1, 3, 32, 32)
    result = convert_to_hypercomplex(model, 4, skip=lambda name, module: name == "fc", example_input=x)
    assert [name for name, _ in result.skipped] == ["conv1"]
    assert len(result.changed) == 5
    assert count_parameters(result.model) < count_parameters(model) / 2
    assert algebra_l1(result.model) > 0
    with pytest.raises(Unsupported, match="nothing was swapped"):
        convert_to_hypercomplex(result.model, 4, skip="fc", example_input=x)


def test_linear_layers_take_their_place_and_go():
    linear = representable(nn.Linear(6, 9, bias=False), 3).eval()
    layer = PHLinear.from_linear(linear, n=3)
    torch.testing.assert_close(layer.weight, linear.weight)
    assert layer.bias is None
    merged = layer.merged()
    assert type(merged) is nn.Linear
    assert not merged.training
    assert torch.equal(merged.weight, layer.weight)
    swapped = swap(nn.Sequential(linear), nn.Linear, PHLinear.from_linear, n=3)
    assert swapped.changed == ("0",)
    with pytest.raises(Unsupported, match="it must be a Linear, got Bilinear"):
        PHLinear.from_linear(nn.Bilinear(2, 2, 2), n=2)
    with pytest.raises(Unsupported, match=r"in_features \(6\) must be divisible by n \(4\)"):
        PHLinear.from_linear(linear, n=4)


def test_penalty_is_the_sum_over_all_learned_algebras():
    model = nn.Sequential(PHConv2d(4, 4, 3, n=2), QuaternionConv2d(4, 4, 3), nn.Sequential(PHLinear(4, 6, n=2)))
    expected = sum(originals(layer)[0].abs().sum() for layer in (model[0], model[2][0]))
    penalty = algebra_l1(model)
    torch.testing.assert_close(penalty, expected)
    penalty.backward()
    assert torch.equal(originals(model[0])[0].grad, originals(model[0])[0].sign())
    with pytest.raises(Unsupported, match="this Sequential has no layer with a learned algebra"):
        algebra_l1(model[1:2])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((4, 8, 3), {"n": 0}, ValueError, "n must be at least 1, got 0"),
        ((3, 8, 3), {"n": 4}, ValueError, r"in_channels \(3\) must be divisible by n \(4\)"),
        ((8, 6, 3), {"n": 4}, ValueError, r"out_channels \(6\) must be divisible by n \(4\)"),
        ((8, 8, 3), {"n": 4, "groups": 4}, ValueError, r"in_channels / groups \(2\) must be divisible by n \(4\)"),
        ((8, 8, 3), {"n": 2, "algebra": "quaternion"}, ValueError, "algebra must have n = 2 components, got 'quat"),
        ((8, 8, 3), {"n": 2, "algebra": torch.eye(2)}, ValueError, r"must have n = 2 components, got \(2, 2\)"),
        ((8, 8, 3), {"n": 2, "algebra": "tessarine"}, UnknownName, "unknown algebra 'tessarine'"),
    ],
)
def test_impossible_layers_are_refused(arguments, options, error, message):
    with pytest.raises(error, match=message):
        PHConv2d(*arguments, **options)


def test_impossible_conversions_are_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        convert_to_hypercomplex(model, 0)
    with pytest.raises(ValueError, match="modules are selected by type"):
        convert_to_hypercomplex(model, 2, skip=3)  # type: ignore[arg-type]
    with pytest.raises(Unsupported, match="nothing was swapped"):
        convert_to_hypercomplex(model, 3)
