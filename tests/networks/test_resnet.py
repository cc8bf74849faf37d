"""ResNet and ECA-Net: published sizes, torchvision's names, the attention slot, features, bad input."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from convatlas.errors import UnknownName
from convatlas.networks import create_model, list_models, published_files
from convatlas.networks.resnet import VARIANTS, BasicBlock, Bottleneck, ResNet, ResNetConfig
from convatlas.nn.mixers.eca import ECA, ChannelGate
from convatlas.nn.mixers.ela import ELA
from convatlas.nn.mixers.squeeze_excite import SqueezeExcite
from convatlas.weights import load_weights

SMALL = ResNetConfig(depths=(1, 1, 2, 1), widths=(8, 12, 16, 20), stem_width=8, num_classes=6)
SMALL_BOTTLENECK = SMALL.override(block="bottleneck")
PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "eca_resnet18": 11_689_556,
    "eca_resnet34": 21_797_744,
    "eca_resnet50": 25_557_112,
    "eca_resnet101": 44_549_317,
    "eca_resnet152": 60_193_042,
    "resnet50_fdconv": 25_557_032 + 3_647_120,
    # C C / g k + 2 C in each block: 5 C for T, 7 C for B, 40 C and 56 C in groups of 8 channels, and 2 C.
    "ela_t_resnet18": 11_689_512 + 7 * 1920,
    "ela_b_resnet18": 11_689_512 + 9 * 1920,
    "ela_s_resnet18": 11_689_512 + 42 * 1920,
    "ela_l_resnet18": 11_689_512 + 58 * 1920,
    "ela_t_resnet50": 25_557_032 + 7 * 15104,
    "ela_b_resnet50": 25_557_032 + 9 * 15104,
    "ela_s_resnet50": 25_557_032 + 42 * 15104,
    "ela_l_resnet50": 25_557_032 + 58 * 15104,
    "ela_t_resnet101": 44_549_160 + 7 * 32512,
    "ela_b_resnet101": 44_549_160 + 9 * 32512,
    "ela_s_resnet101": 44_549_160 + 42 * 32512,
    "ela_l_resnet101": 44_549_160 + 58 * 32512,
}


def with_random_statistics(model: nn.Module) -> nn.Module:
    """A fresh network hides mistakes of batch norm, because its statistics are 0 and 1."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize("name", VARIANTS)
def test_published_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        model = VARIANTS[name].build()
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_every_variant_can_be_made_by_name() -> None:
    assert {name for name in list_models("*resnet*") if name in VARIANTS} == set(VARIANTS)
    assert published_files("resnet50")[0].url == "https://download.pytorch.org/models/resnet50-0676ba61.pth"
    assert published_files("eca_resnet50")[0].by_hand


@pytest.mark.parametrize(
    ("name", "count", "shapes"),
    [
        (
            "resnet18",
            122,
            {
                "conv1.weight": (64, 3, 7, 7),
                "bn1.running_var": (64,),
                "layer1.1.conv2.weight": (64, 64, 3, 3),
                "layer2.0.conv1.weight": (128, 64, 3, 3),
                "layer2.0.downsample.0.weight": (128, 64, 1, 1),
                "layer2.0.downsample.1.num_batches_tracked": (),
                "layer4.1.bn2.bias": (512,),
                "fc.weight": (1000, 512),
                "fc.bias": (1000,),
            },
        ),
        (
            "resnet50",
            320,
            {
                "layer1.0.conv1.weight": (64, 64, 1, 1),
                "layer1.0.downsample.0.weight": (256, 64, 1, 1),
                "layer1.2.conv1.weight": (64, 256, 1, 1),
                "layer3.5.conv2.weight": (256, 256, 3, 3),
                "layer3.5.bn3.running_mean": (1024,),
                "layer4.2.conv3.weight": (2048, 512, 1, 1),
                "fc.weight": (1000, 2048),
            },
        ),
    ],
)
def test_names_are_those_of_torchvision(name: str, count: int, shapes: dict[str, tuple[int, ...]]) -> None:
    with torch.device("meta"):
        state = VARIANTS[name].build().state_dict()
    assert len(state) == count
    assert {key: tuple(state[key].shape) for key in shapes} == shapes


def test_released_kernel_sizes() -> None:
    with torch.device("meta"):
        plain, model = VARIANTS["resnet50"].build(), VARIANTS["eca_resnet50"].build()
    added = {key: tuple(value.shape) for key, value in model.state_dict().items() if key not in plain.state_dict()}
    sizes = [3] * 3 + [5] * 4 + [5] * 6 + [7] * 3
    assert list(added.values()) == [(1, 1, size) for size in sizes]
    assert all(key.endswith(".attention.weight") for key in added)


@pytest.mark.parametrize("config", [SMALL, SMALL_BOTTLENECK])
def test_without_attention_it_is_the_plain_network(config: ResNetConfig) -> None:
    plain = with_random_statistics(config.build())
    model = config.override(eca_kernel_sizes="3577").build().eval()
    report = load_weights(model, plain.state_dict(), strict=False)
    attention = {key for key in model.state_dict() if ".attention." in key}
    assert len(attention) == 5
    assert set(report.missing) == attention
    assert not report.unexpected
    x = torch.randn(2, 3, 40, 33)
    assert not torch.allclose(model(x), plain(x))
    for module in model.modules():
        if isinstance(module, BasicBlock | Bottleneck):
            module.attention = nn.Identity()
    torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize("name", ["eca.conv.weight", "se.conv.weight"])
def test_loads_the_layouts_of_the_authors_and_of_timm(name: str) -> None:
    source = SMALL.override(eca_kernel_sizes=(3, 5, 7, 7)).build()
    target = copy.deepcopy(source)
    state = {f"module.{key.replace('attention.weight', name)}": value + 1 for key, value in source.state_dict().items()}
    assert f"module.layer3.1.{name}" in state
    load_weights(target, {"state_dict": state})
    for key, value in target.state_dict().items():
        torch.testing.assert_close(value, source.state_dict()[key] + 1)


def test_kernel_sizes_as_digits() -> None:
    digits = SMALL.override(eca_kernel_sizes="3577").build().state_dict()
    numbers = SMALL.override(eca_kernel_sizes=[3, 5, 7, 7]).build().state_dict()
    assert {key: value.shape for key, value in digits.items()} == {key: value.shape for key, value in numbers.items()}


def test_attention_stands_before_the_addition() -> None:
    block = with_random_statistics(BasicBlock(4, 4, attention=nn.Threshold(torch.inf, 0.0)))
    x = torch.randn(2, 4, 5, 6)
    torch.testing.assert_close(block(x), x.relu())
    block = with_random_statistics(Bottleneck(8, 2, attention=nn.Threshold(torch.inf, 0.0)))
    x = torch.randn(2, 8, 5, 6)
    torch.testing.assert_close(block(x), x.relu())


@pytest.mark.parametrize(
    "attention", [partial(SqueezeExcite, reduction=4), partial(ECA, shared=False), partial(ChannelGate, groups=2)]
)
def test_takes_any_attention(attention: partial[nn.Module]) -> None:
    model = ResNet(SMALL_BOTTLENECK, attention=attention)
    layers = [module for module in model.modules() if type(module) is attention.func]
    assert len(layers) == 5
    scores: Tensor = model(torch.randn(2, 3, 32, 32))
    scores.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_efficient_local_attention_at_the_end_of_every_branch() -> None:
    plain = with_random_statistics(SMALL.override(widths=(16, 16, 32, 32)).build())
    model = plain.config.override(ela="S").build().eval()
    report = load_weights(model, plain.state_dict(), strict=False)
    assert all(".attention." in key for key in report.missing)
    assert len(report.missing) == 5 * 3
    layers = [module for module in model.modules() if isinstance(module, ELA)]
    assert [(layer.channels, layer.groups) for layer in layers] == [(16, 2), (16, 2), (32, 4), (32, 4), (32, 4)]
    x = torch.randn(2, 3, 40, 33)
    assert not torch.allclose(model(x), plain(x))


def test_attention_keeps_its_own_initialisation() -> None:
    def attention(channels: int) -> nn.Module:
        conv = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.constant_(conv.weight, 0.25)
        return conv

    model = ResNet(SMALL, attention=attention)
    assert torch.equal(model.layer1[0].attention.weight, torch.full((8, 8, 3, 3), 0.25))


def test_fresh_weights() -> None:
    model = SMALL.override(widths=(64, 64, 64, 64)).build()
    conv, bn = model.layer2[0].conv2, model.layer2[0].bn2
    assert conv.weight.std().item() == pytest.approx((2 / (3 * 3 * 64)) ** 0.5, rel=0.02)
    assert conv.weight.mean().item() == pytest.approx(0, abs=1e-3)
    assert torch.equal(bn.weight, torch.ones(64))
    assert torch.equal(bn.bias, torch.zeros(64))


@pytest.mark.parametrize(
    ("config", "channels", "strides"),
    [
        (SMALL, (8, 12, 16, 20), (4, 8, 16, 32)),
        (SMALL_BOTTLENECK, (32, 48, 64, 80), (4, 8, 16, 32)),
        (SMALL.override(small_stem=True), (8, 12, 16, 20), (1, 2, 4, 8)),
        (SMALL.override(small_stem=True, stem_pool=True), (8, 12, 16, 20), (2, 4, 8, 16)),
        (SMALL.override(stem_pool=False), (8, 12, 16, 20), (2, 4, 8, 16)),
        (ResNetConfig(depths=(3, 3, 3), widths=(16, 32, 64), stem_width=16, small_stem=True), (16, 32, 64), (1, 2, 4)),
    ],
)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (45, 33)])
def test_features(
    config: ResNetConfig, channels: tuple[int, ...], strides: tuple[int, ...], height: int, width: int
) -> None:
    model = config.build().eval()
    assert tuple(info.channels for info in model.feature_info) == channels
    assert tuple(info.stride for info in model.feature_info) == strides
    features = model.forward_features(torch.randn(1, 3, height, width))
    for feature, info in zip(features, model.feature_info, strict=True):
        assert feature.shape == (1, info.channels, -(-height // info.stride), -(-width // info.stride))


def test_feature_extractor() -> None:
    overrides = {"depths": (1, 1, 1, 1), "widths": (8, 12, 16, 20), "in_channels": 1}
    model = create_model("eca_resnet18", out_indices=(1, -1), **overrides)
    shapes = [tuple(feature.shape) for feature in model(torch.randn(2, 1, 64, 32))]
    assert shapes == [(2, 12, 8, 4), (2, 20, 2, 1)]
    assert [info.stride for info in model.feature_info] == [8, 32]


def test_classifier_can_be_left_out_and_replaced() -> None:
    model = SMALL.override(num_classes=0).build().double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(model(x), model.forward_features(x)[-1].mean((2, 3)))
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    assert model.num_classes == 3


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model = SMALL.override(eca_kernel_sizes="3333").build().double()
    other = copy.deepcopy(model)
    other.set_gradient_checkpointing()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for network in (model, other):
        network(x).square().sum().backward()
    for parameter, same in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, same.grad)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": (1, 1)}, r"depths and widths must be positive and of the same length, got \(1, 1\)"),
        ({"depths": (), "widths": ()}, "depths and widths must be positive"),
        ({"depths": (1, 0, 1, 1)}, "depths and widths must be positive"),
        ({"eca_kernel_sizes": "357"}, "kernel_sizes must be 4 odd numbers"),
        ({"eca_kernel_sizes": (3, 4, 5, 7)}, "ECA kernel size must be odd, got 4"),
        ({"ela": "B", "eca_kernel_sizes": "3577"}, "eca_kernel_sizes must be None with ela, got '3577'"),
        ({"ela": "B"}, "ELA-B needs channels divisible by 16, got 8"),
        ({"in_channels": 0}, "in_channels must be at least 1"),
    ],
)
def test_bad_config(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SMALL.override(**changes).build()


def test_bad_names_and_input() -> None:
    with pytest.raises(UnknownName, match="bottleneck"):
        SMALL.override(block="bottlenek").build()
    with pytest.raises(UnknownName, match="eca_kernel_sizes"):
        create_model("eca_resnet18", eca_kernel_size="3557")
    model = SMALL.build()
    with pytest.raises(ValueError, match=r"x must be \(B, 3, H, W\), got \(2, 1, 32, 32\)"):
        model(torch.zeros(2, 1, 32, 32))


def test_any_size_works():
    assert SMALL.build().eval()(torch.zeros(2, 3, 16, 1)).isfinite().all()
