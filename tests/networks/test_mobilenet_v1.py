"""MobileNetV1, plain and with subspace attention: published sizes, positions, features, bad input."""

from __future__ import annotations

import pytest
import torch

from convatlas.cost import cost
from convatlas.networks import create_model
from convatlas.networks.mobilenet_v1 import VARIANTS, MobileNetV1Config
from convatlas.nn.mixers.ulsam import ULSAM

SMALL = MobileNetV1Config(layers=((12, 2), (16, 1), (16, 1), (24, 2), (24, 1), (32, 2)), stem_width=8, num_classes=5)
#: Published for the plain network: 4.2 million parameters and 569 million multiply-adds (arXiv 1704.04861, table 4).
PLAIN = 4_231_976
#: A depthwise separable layer with 512 channels, and subspace attention in four groups.
LAYER, ATTENTION = 9 * 512 + 512**2 + 4 * 512, 2572


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("mobilenet_v1", PLAIN),
        ("mobilenet_v1_ulsam", PLAIN + ATTENTION),
        ("mobilenet_v1_ulsam_11", PLAIN + ATTENTION - LAYER),
        ("mobilenet_v1_ulsam_11_12", PLAIN + 2 * (ATTENTION - LAYER)),
    ],
)
def test_published_variants(name: str, count: int) -> None:
    with torch.device("meta"):
        model = VARIANTS[name].build()
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_multiply_adds() -> None:
    with torch.device("meta"):
        model, x = VARIANTS["mobilenet_v1"].build(), torch.empty(1, 3, 224, 224)
    assert cost(model, x).total.macs == pytest.approx(569e6, rel=2e-3)


@pytest.mark.parametrize("position", [8, 9, 10, 11, 12])
def test_positions_are_those_of_the_layers_with_512_channels(position: int) -> None:
    with torch.device("meta"):
        model = create_model("mobilenet_v1_ulsam_11", ulsam_positions=(position,), ulsam_groups=16)
        maps: list[tuple[int, ...]] = []
        attention = model.features[position - 1]
        attention.register_forward_hook(lambda module, inputs, output: maps.append(tuple(output.shape)))
        model(torch.empty(1, 3, 224, 224))
    assert isinstance(attention, ULSAM)
    assert attention.num_splits == 16
    assert maps == [(1, 512, 14, 14)]


def test_attention_behind_a_layer() -> None:
    model = SMALL.override(ulsam_positions=(4,), ulsam_mode="after").build().eval()
    x = torch.randn(2, 16, 6, 5)
    torch.testing.assert_close(model.features[3](x), model.features[3].after(model.features[3].conv(x)))
    assert sum(isinstance(module, ULSAM) for module in model.modules()) == 1


@pytest.mark.parametrize(("height", "width"), [(32, 32), (45, 33)])
def test_features(height: int, width: int) -> None:
    model = SMALL.build().eval()
    assert [tuple(info) for info in model.feature_info] == [(16, 4), (24, 8), (32, 16)]
    for feature, info in zip(model.forward_features(torch.randn(1, 3, height, width)), model.feature_info, strict=True):
        assert feature.shape == (1, info.channels, -(-height // info.stride), -(-width // info.stride))


def test_classifier_can_be_left_out() -> None:
    model = SMALL.override(num_classes=0, width_mult=0.5).build().eval()
    x = torch.randn(2, 3, 32, 32)
    assert model(x).shape == (2, 16)
    torch.testing.assert_close(model(x), model.forward_features(x)[-1].mean((2, 3)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": ()}, r"layers must be rows \(c, s\) of positive numbers, got \(\)"),
        ({"layers": ((8, 0),)}, "positive numbers"),
        ({"ulsam_positions": (8,)}, r"ulsam_positions must be from 2 to 7, got \(8,\)"),
        ({"ulsam_positions": (3,)}, "layers that keep the shape, got 3 with 12 to 16 channels and stride 1"),
        ({"ulsam_mode": "both"}, "ulsam_mode must be 'replace' or 'after', got 'both'"),
    ],
)
def test_bad_config(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SMALL.override(**changes).build()
