"""PHResNet, PHVGG and PHSED: sizes of the paper, authors' layouts, channels of zeros, merging, bad input."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convatlas.errors import UnknownName
from convatlas.networks import create_model, list_models, model_config
from convatlas.networks.base import NetworkConfig
from convatlas.networks.phnn import resnet, sed, vgg
from convatlas.networks.phnn.resnet import PHResNet, PHResNetConfig
from convatlas.networks.phnn.sed import PHSED, PHSEDConfig
from convatlas.networks.phnn.vgg import PHVGGConfig
from convatlas.nn.conv.hypercomplex import PHLinear
from convatlas.surgery import merge
from convatlas.weights import load_weights

#: With the biases that are never added, as the authors count.
PARAMETERS = [
    ("phresnet18", {"n": 2}, 5_599_594),
    ("phresnet18", {"n": 4}, 2_810_762),
    ("phresnet50", {"n": 2}, 11_824_498),
    ("phresnet50", {"n": 4}, 5_965_514),
    ("phresnet18_large", {"n": 3}, 3_640_594),
    ("phresnet18_large", {"n": 4}, 2_736_258),
    ("phresnet50_large", {"n": 3}, 7_587_841),
    ("phresnet50_large", {"n": 4}, 5_717_766),
    ("phresnet152_large", {"n": 3, "num_classes": 100}, 18_033_085),
    ("phresnet152_large", {"n": 4, "num_classes": 100}, 13_637_184),
    ("phvgg16", {"n": 2}, 7_636_610),
    ("phvgg16", {"n": 4}, 3_828_618),
    ("phvgg19_large", {"n": 3}, 9_952_744),
    ("phvgg19_large", {"n": 4}, 7_471_630),
    ("phsed", {"n": 1, "algebra": "real"}, 8_557_930),
    ("phsed", {"n": 2}, 7_781_514),
    ("phsed", {"n": 4}, 7_393_514),
    ("phsed", {"n": 8}, 7_201_194),
    ("phsed", {"n": 4, "in_channels": 16}, 7_394_666),
    ("phsed", {"n": 4, "algebra": "quaternion"}, 7_393_258),
    ("phsed_full", {"n": 2}, 6_470_818),
    ("phsed_full", {"n": 4}, 5_427_626),
]
CONVOLUTIONS = {"real": 1_555_776, "quaternion": 391_104, 2: 779_360, 4: 391_360, 8: 199_040}
SMALL = PHResNetConfig(depths=(1, 2), widths=(8, 12), num_classes=5)
SMALL_VGG = PHVGGConfig(widths=((8,), (8, 12)), head_widths=(12, 8), num_classes=5)
SMALL_SED = PHSEDConfig(
    in_channels=4,
    frequencies=12,
    num_classes=3,
    overlaps=2,
    widths=(8, 12),
    pools=((3, 2), (2, 2)),
    recurrent_width=6,
    recurrent_depth=2,
    head_width=8,
)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def stirred(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
    return model.double().eval()


def random(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(("name", "options", "expected"), PARAMETERS)
def test_parameter_counts_are_those_of_the_authors(name: str, options: dict[str, Any], expected: int):
    with torch.device("meta"):
        model = create_model(name, **options)
    assert count(model) == expected
    if name == "phsed" and "in_channels" not in options:
        key = options.get("algebra", options["n"])
        assert count(model.cnn) == CONVOLUTIONS[key]


def test_variants_have_the_names_and_sizes_of_the_paper():
    assert set(list_models("ph*")) == {*resnet.VARIANTS, *vgg.VARIANTS, *sed.VARIANTS}
    for depth in (20, 32, 44, 56, 110):
        for suffix, widths, n in (("", (16, 32, 64), 4), ("_large", (24, 72, 216), 3)):
            config = model_config(f"phresnet{depth}{suffix}")
            assert (config.depths, config.widths, config.n) == (((depth - 2) // 6,) * 3, widths, n)
    config = model_config("phresnet110_large")
    assert (config.preprocess.size, config.preprocess.mean, config.preprocess.std) == (32, (0.5,) * 3, (0.5,) * 3)
    with torch.device("meta"):
        assert count(create_model("phresnet18", algebra="real", n=1)) == 11_173_962
        assert count(create_model("phresnet20", algebra="real", n=1)) == 272_474


# Layouts


def theirs(state: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    """Our state dict in the authors' layout."""
    names = {
        r"^fc\.": "linear.",
        r"\.downsample\.": ".shortcut.",
        r"^(classifier|sed)\.(\d+)\.parametrizations\.weight\.original0": r"\1.\2.a",
        r"^(classifier|sed)\.(\d+)\.parametrizations\.weight\.original1": r"\1.\2.s",
        r"parametrizations\.weight\.original0": "A",
        r"parametrizations\.weight\.original1": "F",
    }
    foreign = {}
    for key, value in state.items():
        name = key
        for pattern, replacement in names.items():
            name = re.sub(pattern, replacement, name)
        if name.endswith("parametrizations.weight.original"):
            parts = value.chunk(4)
            foreign |= {
                name.replace("parametrizations.weight.original", f"{part}_weight"): filters
                for part, filters in zip("rijk", parts, strict=True)
            }
        else:
            foreign[name] = value.unflatten(0, (n, -1)) if name[-2:] in (".F", ".s") else value
    return foreign


RESNET_KEYS = {
    "conv1.A": (4, 4, 4),
    "conv1.F": (4, 2, 1, 3, 3),
    "conv1.bias": (8,),
    "bn1.running_var": (8,),
    "layer1.0.conv2.F": (4, 2, 2, 3, 3),
    "layer2.0.shortcut.0.F": (4, 3, 2, 1, 1),
    "layer2.0.shortcut.1.weight": (12,),
    "layer2.1.bn2.bias": (12,),
    "linear.weight": (5, 12),
}
VGG_KEYS = {
    "features.0.F": (4, 2, 1, 3, 3),
    "features.1.running_mean": (8,),
    "features.4.A": (4, 4, 4),
    "features.7.bias": (12,),
    "classifier.1.s": (4, 3, 3),
    "classifier.4.a": (4, 4, 4),
    "classifier.6.weight": (5, 8),
}
SED_KEYS = {
    "cnn.0.0.F": (4, 2, 1, 3, 3),
    "cnn.1.0.bias": (12,),
    "cnn.1.1.running_var": (12,),
    "rnn.weight_ih_l0_reverse": (18, 24),
    "sed.0.s": (4, 2, 3),
    "sed.4.bias": (8,),
    "sed.7.weight": (6, 8),
}
QUATERNION_KEYS = {"conv1.r_weight": (2, 1, 3, 3), "layer2.1.conv2.k_weight": (3, 3, 3, 3), "conv1.bias": (8,)}


@pytest.mark.parametrize(
    ("config", "keys", "shape"),
    [
        (SMALL, RESNET_KEYS, (2, 3, 16, 16)),
        (SMALL.override(algebra="quaternion"), QUATERNION_KEYS, (2, 3, 16, 16)),
        (SMALL_VGG, VGG_KEYS, (2, 3, 16, 16)),
        (SMALL_SED.override(hypercomplex_head=True), SED_KEYS, (2, 4, 12, 9)),
    ],
    ids=["resnet", "quaternion", "vgg", "sed"],
)
def test_authors_layouts_load_completely(config: NetworkConfig, keys: dict[str, Any], shape: tuple[int, ...]):
    source = stirred(config.build())
    foreign = theirs(source.state_dict(), 4)
    assert {key: tuple(foreign[key].shape) for key in keys} == keys
    model = config.build().double().eval()
    report = load_weights(model, {"state_dict": foreign})
    assert report.layout == "authors"
    assert report.differences() == []
    x = random(*shape)
    with torch.no_grad():
        assert torch.equal(model(x), source(x))


def test_weights_load_into_a_network_for_other_classes():
    source = SMALL.build()
    model = SMALL.override(num_classes=9).build()
    fresh = model.fc.weight.clone()
    report = load_weights(model, theirs(source.state_dict(), 4))
    assert {key for key, _ in report.adapted} == {"fc.weight", "fc.bias"}
    assert torch.equal(model.fc.weight, fresh)
    assert torch.equal(model.layer2[1].conv2.weight, source.layer2[1].conv2.weight)


# Numbers of the channels


@pytest.mark.parametrize("config", [SMALL, SMALL_VGG], ids=["resnet", "vgg"])
def test_images_are_filled_up_with_zeros_in_front(config: Any):
    whole, rgb, grey = (config.override(in_channels=channels).build().double().eval() for channels in (4, 3, 1))
    for model in (rgb, grey):
        model.load_state_dict(whole.state_dict())
    x = random(2, 3, 16, 16)
    zeros = torch.zeros_like(x)
    with torch.no_grad():
        torch.testing.assert_close(rgb(x), whole(torch.cat([zeros[:, :1], x], 1)))
        torch.testing.assert_close(grey(x[:, :1]), whole(torch.cat([zeros, x[:, :1]], 1)))
    assert (rgb.in_channels, grey.in_channels) == (3, 1)


def test_three_components_need_no_zeros():
    model = SMALL.override(widths=(6, 9), n=3).build()
    assert model.conv1.in_channels == model.in_channels == 3


def test_biases_are_held_but_not_used():
    model, lean = stirred(SMALL.build()), SMALL.override(unused_bias=False).build()
    x = random(2, 3, 16, 16)
    with torch.no_grad():
        before = model(x)
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and "conv" in name:
                parameter += 1
        assert torch.equal(model(x), before)
    assert count(model) - count(lean) == 8 * 3 + 12 * 5
    assert not any(name.endswith("bias") and "conv" in name for name in lean.state_dict())


@pytest.mark.parametrize(
    ("config", "shape"),
    [(SMALL, (2, 3, 16, 16)), (SMALL_VGG, (2, 3, 16, 16)), (SMALL_SED.override(hypercomplex_head=True), (2, 4, 12, 9))],
    ids=["resnet", "vgg", "sed"],
)
def test_merged_networks_are_plain(config: NetworkConfig, shape: tuple[int, ...]):
    model, x = stirred(config.build()), random(*shape)
    merged = merge(model, x).model
    assert not any("parametrizations" in name for name in merged.state_dict())
    assert not any(isinstance(part, nn.BatchNorm2d) for part in merged.modules())
    with torch.no_grad():
        torch.testing.assert_close(merged(x), model(x))


def test_only_small_networks_draw_the_classifier_by_kaiming():
    torch.manual_seed(0)
    small = PHResNetConfig(depths=(1, 1, 1), widths=(8, 8, 400), num_classes=50).build()
    large = PHResNetConfig(depths=(1, 1), widths=(8, 400), num_classes=50).build()
    assert small.fc.weight.std().item() == pytest.approx((2 / 400) ** 0.5, rel=0.05)
    assert large.fc.weight.abs().max() <= 400**-0.5


# Sound events


def test_sound_events_are_found_for_any_length():
    model = stirred(SMALL_SED.build())
    for frames in (4, 9, 12):
        y = model(random(2, 4, 12, frames))
        assert y.shape == (2, frames // 4, 6)
        assert 0 < y.min() < y.max() < 1


def test_the_head_is_hypercomplex_but_for_its_last_layer():
    kinds = [
        [isinstance(part, PHLinear) for part in SMALL_SED.override(hypercomplex_head=full).build().sed[::2]]
        for full in (False, True)
    ]
    assert kinds == [[False] * 4, [True, True, True, False]]


def test_published_sound_event_network():
    with torch.device("meta"):
        model = create_model("phsed")
        assert model.rnn.input_size == 1024
        assert model.cnn(torch.empty(1, 8, 256, 4800)).shape == (1, 512, 2, 600)
        assert model(*model.example_inputs()).shape == (1, 10, 42)


# Bad input


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (SMALL, {"n": 3}, r"out_channels \(8\) must be divisible by n \(3\)"),
        (SMALL, {"n": 0}, "n must be at least 1, got 0"),
        (SMALL, {"algebra": "real"}, "n must be 1 for the real algebra, got 4"),
        (SMALL, {"n": 2, "algebra": "quaternion"}, "algebra must have n = 2 components, got 'quaternion'"),
        (SMALL, {"algebra": "quarternion"}, "unknown algebra 'quarternion': did you mean quaternion"),
        (SMALL, {"block": "basik"}, "unknown block 'basik': did you mean basic"),
        (SMALL, {"depths": (1,)}, "depths and widths must be positive and of the same length"),
        (SMALL, {"widths": (), "depths": ()}, "depths and widths must be positive and of the same length"),
        (SMALL_VGG, {"widths": ((8,), ())}, r"widths must have at least one convolution in each stage, got \(\(8,\)"),
        (SMALL_VGG, {"head_widths": (6, 8)}, r"out_features \(6\) must be divisible by n \(4\)"),
        (SMALL_SED, {"in_channels": 6}, r"in_channels \(6\) must be divisible by n \(4\)"),
        (SMALL_SED, {"pools": ((3, 2),)}, "widths and pools must be of the same length"),
        (SMALL_SED, {"pools": ((5, 2), (3, 2))}, "pools must leave at least one of 12 frequencies"),
        (SMALL_SED, {"hypercomplex_head": True, "head_width": 6}, r"out_features \(6\) must be divisible by n \(4\)"),
    ],
)
def test_impossible_networks_are_refused(config: NetworkConfig, changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        config.override(**changes).build()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 12, 9), r"x must be \(B, 4, 12, T\), got \(2, 3, 12, 9\)"),
        ((2, 4, 11, 9), r"x must be \(B, 4, 12, T\), got \(2, 4, 11, 9\)"),
        ((4, 12, 9), r"x must be \(B, 4, 12, T\), got \(4, 12, 9\)"),
        ((2, 4, 12, 3), "x must have at least 4 frames, got 3"),
    ],
)
def test_wrong_spectrograms_are_named(shape: tuple[int, ...], message: str):
    with pytest.raises(ValueError, match=message):
        PHSED(SMALL_SED)(torch.zeros(shape))


def test_unknown_options_are_named():
    with pytest.raises(UnknownName, match="unknown option of PHResNetConfig 'algbra': did you mean algebra"):
        create_model("phresnet18", algbra="real")
    assert isinstance(create_model("phresnet20", n=2), PHResNet)
