"""Networks of TVConv: published sizes, names, positions, deployment, bad input."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from convatlas.cost import cost
from convatlas.networks import create_model
from convatlas.networks.tvconv.face import FaceMobileNetV2Config, FaceShuffleNetV2Config, ShuffleUnit
from convatlas.networks.tvconv.segmentation import DeepLabV3Plus, DeepLabV3PlusConfig
from convatlas.nn.conv.tvconv import StaticTVConv2d, TVConv2d, export_tvconv
from convatlas.weights import load_weights

#: Width -> parameters of the plain and of the translation variant network, multiply-adds in millions.
PUBLISHED = {
    "x0_1": (324_672, 2_878_872, 21.1),
    "x0_2": (404_352, 3_761_640, 26.5),
    "x0_5": (827_968, 6_666_592, 71.6),
    "x1_0": (2_241_280, 12_610_144, 221.2),
}
SMALL = FaceMobileNetV2Config(
    stages=((1, 8, 1, 1), (2, 8, 2, 2), (2, 12, 1, 2)),
    stem_width=8,
    head_width=16,
    embedding=6,
    hidden_channels=3,
    hidden_layers=0,
    translation_variant=True,
).override(preprocess={"size": 20})


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("width", PUBLISHED)
def test_published_sizes(width: str):
    plain, variant, macs = PUBLISHED[width]
    with torch.device("meta"):
        models = [
            create_model(f"{kind}_mobilenet_v2_{width}", hidden_channels=16, hidden_layers=1)
            for kind in ("face", "tvconv")
        ]
    assert [parameters(model) for model in models] == [plain, variant]
    if width == "x0_1":  # the smallest, because counting takes time
        total = cost(models[0], torch.empty(1, 3, 96, 96, device="meta")).total
        assert (total.macs + total.norm_macs) / 1e6 == pytest.approx(macs, rel=2e-3)


def test_sizes_of_the_maps():
    with torch.device("meta"):
        mobile, shuffle = (create_model(f"tvconv_{name}_v2_x1_0") for name in ("mobilenet", "shufflenet"))
    for model, sides in ((mobile, [96, 48, 48, 24, 24, 24]), (shuffle, [24] * 2 + [24] * 3)):
        layers = [part for part in model.modules() if isinstance(part, TVConv2d)]
        assert [layer.output_size[0] for layer in layers][: len(sides)] == sides
        assert layers[-1].output_size == (6, 6)
        assert model.feature_info[-1].stride == 16


def test_stored_kernels_do_the_same():
    model = SMALL.build().eval()
    x = torch.randn(2, 3, 20, 20)
    stored = export_tvconv(model)
    assert len(stored.changed) == 4
    assert sum(isinstance(part, StaticTVConv2d) for part in stored.model.modules()) == 4
    torch.testing.assert_close(stored.model(x), model(x), rtol=1e-4, atol=1e-4)


def test_loads_the_authors_files():
    source = SMALL.override(num_classes=7).build()
    target = copy.deepcopy(source)
    state: dict[str, Tensor] = {}
    for key, value in source.state_dict().items():
        if key == "classifier.weight":
            state["head.weight"] = value.T + 1
        else:
            state["model." + key.replace("position_maps", "posi_map")] = value + 1
    state["model.features.1.conv.0.0.TVConv_k"] = state["model.features.1.conv.0.0.h"] = torch.tensor(3)
    assert "model.features.1.conv.0.0.posi_map" in state
    load_weights(target, {"state_dict": state})
    for key, value in target.state_dict().items():
        torch.testing.assert_close(value, source.state_dict()[key] + 1)


def test_other_people_can_be_learned():
    model = SMALL.override(num_classes=7).build().eval()
    x = torch.randn(2, 3, 20, 20)
    assert model(x).shape == (2, 7)
    assert model(x).abs().max() <= 32
    model.reset_classifier(0)
    assert model(x).shape == (2, 6)


def test_channels_are_shuffled():
    def depthwise(channels: int, stride: int) -> nn.Module:
        return nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)

    unit = ShuffleUnit(8, 8, stride=1, depthwise=depthwise).eval()
    x = torch.randn(1, 8, 3, 3)
    y = unit(x)
    torch.testing.assert_close(y[:, ::2], x[:, :4])
    torch.testing.assert_close(y[:, 1::2], unit.branch2(x[:, 4:]))
    with pytest.raises(ValueError, match="out_channels must be even, and in_channels with stride 1, got 6 and 8"):
        ShuffleUnit(8, 6, stride=1, depthwise=depthwise)


def test_segmentation_network():
    with torch.device("meta"):
        plain, variant = (DeepLabV3PlusConfig(translation_variant=kind).build() for kind in (False, True))
        encoder = create_model("mobilenet_v2")
        maps = plain.eval()(torch.empty(1, 3, 256, 256))
    assert maps.shape == (1, 2, 256, 256)
    known = set(encoder.state_dict())
    assert {key for key in plain.state_dict() if key.startswith("features.")} <= known
    layers = [part for part in variant.modules() if isinstance(part, TVConv2d)]
    assert [(layer.channels, layer.output_size, len(layer.weight_layers)) for layer in layers] == [
        (1920, (16, 16), 5)
    ] * 3
    dilations = [
        part.dilation[0] for part in plain.features.modules() if isinstance(part, nn.Conv2d) and part.groups > 1
    ]
    assert dilations == [1] * 16 + [2]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SMALL.override(stages=()), "stages must be rows"),
        (FaceShuffleNetV2Config(depths=(1,)), "widths must be two more than depths"),
        (FaceShuffleNetV2Config(depths=(1,), widths=(8, 9, 16)), "out_channels must be even"),
    ],
)
def test_bad_config(config: FaceMobileNetV2Config, message: str):
    with pytest.raises(ValueError, match=message):
        config.build()


def test_bad_input():
    with pytest.raises(ValueError, match="x must be 20 x 20 pixels, got 24 x 20"):
        SMALL.build()(torch.zeros(2, 3, 24, 20))
    with pytest.raises(ValueError, match="low_level must be one of 7 stages, got 7"):
        DeepLabV3PlusConfig(low_level=7)
    with pytest.raises(ValueError, match="num_classes and in_channels must be at least 1, got 0 and 3"):
        DeepLabV3PlusConfig(num_classes=0)
    with torch.device("meta"):
        model: DeepLabV3Plus = DeepLabV3PlusConfig(translation_variant=True).build()
    with pytest.raises(ValueError, match="x must be 256 x 256 pixels, got 128 x 128"):
        model(torch.empty(1, 3, 128, 128, device="meta"))
