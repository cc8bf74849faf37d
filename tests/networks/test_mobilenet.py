"""MobileNetV2, plain and with three attentions: sizes, torchvision's names, attention slots, features, bad input."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from convatlas.cost import cost
from convatlas.errors import UnknownName
from convatlas.networks import create_model
from convatlas.networks.mobilenet import VARIANTS, InvertedResidual, MobileNetV2, MobileNetV2Config
from convatlas.nn.mixers.ela import ELA
from convatlas.nn.mixers.squeeze_excite import SqueezeExcite
from convatlas.nn.mixers.ulsam import ULSAM
from convatlas.weights import load_weights

SMALL = MobileNetV2Config(
    stages=((1, 8, 1, 1), (3, 8, 2, 2), (3, 12, 1, 2), (2, 16, 2, 2), (2, 20, 1, 1), (2, 24, 1, 2)),
    stem_width=8,
    head_width=32,
    num_classes=5,
)


def with_random_statistics(model: nn.Module) -> nn.Module:
    """A fresh network hides mistakes of batch norm, because its statistics are 0 and 1."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "count", "dropout"), [("mobilenet_v2", 3_504_872, 0.2), ("eca_mobilenet_v2", 3_504_903, 0.25)]
)
def test_published_variants(name: str, count: int, dropout: float) -> None:
    with torch.device("meta"):
        model = VARIANTS[name].build()
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert model.classifier[0].p == dropout


@pytest.mark.parametrize(("name", "added"), [("t", 7), ("b", 9), ("s", 42), ("l", 58)])
def test_efficient_local_attention_behind_the_depthwise_convolutions(name: str, added: int) -> None:
    with torch.device("meta"):
        model = VARIANTS[f"ela_{name}_mobilenet_v2"].build()
    channels = [layer.channels for layer in model.modules() if isinstance(layer, ELA)]
    assert len(channels) == 17
    assert channels == [block.conv[-2].in_channels for block in model.features if isinstance(block, InvertedResidual)]
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_504_872 + added * sum(channels)


def test_efficient_local_attention_at_the_end_of_the_branches() -> None:
    model = SMALL.override(ela="B", ela_place="output").build()
    layers = [block.attention for block in model.features if isinstance(block, InvertedResidual)]
    assert [layer.channels for layer in layers] == [8, 8, 8, 12, 16, 16, 20, 24]
    assert [layer.num_groups for layer in layers] == [8, 8, 8, 12, 16, 16, 10, 12]
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize(
    ("positions", "groups", "count", "macs"),
    [
        ((14, 17), 1, 3_067_886, 275.4e6),
        ((14, 17), 4, 3_067_904, 275.4e6),
        ((13, 14, 16, 17), 4, 2_630_936, 236.7e6),
    ],
)
def test_subspace_attention_in_the_place_of_blocks(
    positions: tuple[int, ...], groups: int, count: int, macs: float
) -> None:
    with torch.device("meta"):
        model = create_model("mobilenet_v2", ulsam_positions=positions, ulsam_groups=groups)
        x = torch.empty(1, 3, 224, 224)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert {p for p in range(1, 20) if isinstance(model.features[p - 1], ULSAM)} == set(positions)
    whole = cost(model, x).total
    assert whole.macs + whole.norm_macs == pytest.approx(macs, rel=1e-3)


def test_subspace_attention_behind_blocks_leaves_their_weights_where_they_were() -> None:
    plain = with_random_statistics(SMALL.build())
    model = SMALL.override(ulsam_positions=(2, 5), ulsam_mode="after").build().eval()
    report = load_weights(model, plain.state_dict(), strict=False)
    assert {key.rsplit(".after.")[0] for key in report.missing} == {"features.1", "features.4"}
    assert not report.unexpected
    x = torch.randn(2, 8, 7, 5)
    block = plain.features[1]
    torch.testing.assert_close(model.features[1](x), model.features[1].after(block(x)))


@pytest.mark.parametrize(
    ("factor", "count"), [(0.25, 1_519_112), (0.5, 1_968_680), (0.75, 2_636_424), (1.4, 6_108_776)]
)
def test_width_multiplier(factor: float, count: int) -> None:
    with torch.device("meta"):
        model = create_model("mobilenet_v2", width_mult=factor)
    assert all(info.channels % 8 == 0 for info in model.feature_info)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_names_are_those_of_torchvision() -> None:
    with torch.device("meta"):
        state = VARIANTS["mobilenet_v2"].build().state_dict()
    shapes = {
        "features.0.0.weight": (32, 3, 3, 3),
        "features.0.1.running_mean": (32,),
        "features.1.conv.0.0.weight": (32, 1, 3, 3),
        "features.1.conv.1.weight": (16, 32, 1, 1),
        "features.1.conv.2.weight": (16,),
        "features.2.conv.0.0.weight": (96, 16, 1, 1),
        "features.2.conv.1.0.weight": (96, 1, 3, 3),
        "features.2.conv.1.1.num_batches_tracked": (),
        "features.2.conv.2.weight": (24, 96, 1, 1),
        "features.2.conv.3.bias": (24,),
        "features.17.conv.2.weight": (320, 960, 1, 1),
        "features.18.0.weight": (1280, 320, 1, 1),
        "features.18.1.weight": (1280,),
        "classifier.1.weight": (1000, 1280),
        "classifier.1.bias": (1000,),
    }
    assert len(state) == 314
    assert {key: tuple(state[key].shape) for key in shapes} == shapes


def test_kernel_size_is_1_below_96_channels_and_3_from_there() -> None:
    with torch.device("meta"):
        model = VARIANTS["eca_mobilenet_v2"].build()
    blocks = [layer for layer in model.features if isinstance(layer, InvertedResidual)]
    assert len(blocks) == 17
    for block in blocks:
        assert block.attention.weight.shape == (1, 1, 1 if block.attention.channels < 96 else 3)


def test_without_attention_it_is_the_plain_network() -> None:
    plain = with_random_statistics(SMALL.build())
    model = SMALL.override(eca_kernel_sizes="111133").build().eval()
    report = load_weights(model, plain.state_dict(), strict=False)
    attention = {key for key in model.state_dict() if ".attention." in key}
    assert len(attention) == 8
    assert set(report.missing) == attention
    assert not report.unexpected
    x = torch.randn(2, 3, 40, 33)
    assert not torch.allclose(model(x), plain(x))
    for module in model.modules():
        if isinstance(module, InvertedResidual):
            module.attention = nn.Identity()
    torch.testing.assert_close(model(x), plain(x))


def test_loads_the_authors_layout() -> None:
    source = SMALL.override(eca_kernel_sizes=(1, 1, 1, 3, 3, 3)).build()
    target = copy.deepcopy(source)
    state = {}
    for key, value in source.state_dict().items():
        position = 3 if key.startswith("features.1.") else 4  # the first block has no expansion
        state["module." + key.replace("attention.weight", f"conv.{position}.conv.weight")] = value + 1
    assert "module.features.1.conv.3.conv.weight" in state
    assert "module.features.8.conv.4.conv.weight" in state
    load_weights(target, {"state_dict": state})
    for key, value in target.state_dict().items():
        torch.testing.assert_close(value, source.state_dict()[key] + 1)


@pytest.mark.parametrize(("stride", "out_channels", "residual"), [(1, 6, True), (2, 6, False), (1, 8, False)])
def test_attention_stands_in_the_branch(stride: int, out_channels: int, residual: bool) -> None:
    block = InvertedResidual(6, out_channels, stride=stride, attention=nn.Threshold(torch.inf, 0.0)).eval()
    x = torch.randn(2, 6, 5, 6)
    expected = x if residual else torch.zeros(2, out_channels, -(-5 // stride), 6 // stride)
    torch.testing.assert_close(block(x), expected)


def test_takes_any_attention() -> None:
    model = MobileNetV2(SMALL, attention=partial(SqueezeExcite, reduction=4))
    assert sum(isinstance(module, SqueezeExcite) for module in model.modules()) == 8
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("config", "channels"),
    [
        (SMALL, (8, 12, 20, 32)),
        (MobileNetV2Config(width_mult=0.5), (16, 16, 48, 1280)),
    ],
)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (45, 33)])
def test_features(config: MobileNetV2Config, channels: tuple[int, ...], height: int, width: int) -> None:
    model = config.build().eval()
    assert tuple(info.channels for info in model.feature_info) == channels
    assert tuple(info.stride for info in model.feature_info) == (4, 8, 16, 32)
    features = model.forward_features(torch.randn(1, 3, height, width))
    for feature, info in zip(features, model.feature_info, strict=True):
        assert feature.shape == (1, info.channels, -(-height // info.stride), -(-width // info.stride))


def test_feature_extractor() -> None:
    model = create_model("eca_mobilenet_v2", out_indices=(0, 2), in_channels=1)
    assert [tuple(info) for info in model.feature_info] == [(24, 4), (96, 16)]
    shapes = [tuple(feature.shape) for feature in model.eval()(torch.randn(1, 1, 32, 64))]
    assert shapes == [(1, 24, 8, 16), (1, 96, 2, 4)]


def test_classifier_can_be_left_out_and_replaced() -> None:
    model = SMALL.override(num_classes=0).build().double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(model(x), model.forward_features(x)[-1].mean((2, 3)))
    model.eval().reset_classifier(3)
    assert torch.equal(model(x), model(x))  # the fresh dropout is in evaluation mode too
    assert model(x).shape == (2, 3)
    assert model.num_classes == 3
    assert torch.equal(model.classifier[1].bias, torch.zeros(3, dtype=torch.float64))


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model = SMALL.override(eca_kernel_sizes="111333", dropout=0.0).build().double()
    other = copy.deepcopy(model)
    other.set_gradient_checkpointing()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for network in (model, other):
        network(x).square().sum().backward()
    for parameter, same in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, same.grad)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": ()}, "stages must be rows"),
        ({"stages": ((1, 16, 1),)}, r"stages must be rows \(t, c, n, s\) of positive numbers, got \(\(1, 16, 1\),\)"),
        ({"stages": ((1, 16, 0, 1),)}, "positive numbers"),
        ({"eca_kernel_sizes": "357"}, "kernel_sizes must be 6 odd numbers"),
        ({"eca_kernel_sizes": "135246"}, "ECA kernel size must be odd, got 2"),
        ({"ela": "B", "eca_kernel_sizes": "111333"}, "eca_kernel_sizes must be None with ela"),
        ({"ela_place": "input"}, "ela_place must be 'depthwise' or 'output', got 'input'"),
        ({"ulsam_mode": "before"}, "ulsam_mode must be 'replace' or 'after', got 'before'"),
        ({"ulsam_positions": (1,)}, r"ulsam_positions must be from 2 to 9, got \(1,\)"),
        ({"ulsam_positions": (3,)}, "layers that keep the shape, got 3 with 8 to 8 channels and stride 2"),
        ({"ulsam_positions": (8,)}, "layers that keep the shape, got 8 with 16 to 20 channels and stride 1"),
        ({"ulsam_positions": (4,), "ulsam_groups": 3}, "channels must be divisible by num_splits, got 8 and 3"),
        ({"num_classes": -1}, "num_classes must be 0 or more"),
    ],
)
def test_bad_config(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SMALL.override(**changes).build()


def test_bad_names_and_input() -> None:
    with pytest.raises(UnknownName, match="mobilenet_v2"):
        create_model("mobilenetv2")
    with pytest.raises(ValueError, match=r"x must be \(B, 3, H, W\), got \(3, 32, 32\)"):
        SMALL.build()(torch.zeros(3, 32, 32))


def test_any_size_works():
    assert SMALL.build().eval()(torch.zeros(2, 3, 31, 1)).isfinite().all()
