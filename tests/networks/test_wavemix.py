"""WaveMix networks: sizes, structure, what they refuse, checkpoint layouts."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from convatlas import load_weights
from convatlas.cost import cost
from convatlas.networks import create_model, model_config, published_files
from convatlas.networks.wavemix import (
    VARIANTS,
    WaveMix,
    WaveMixConfig,
    WaveMixSegmenter,
    WaveMixSegmenterConfig,
    WaveMixSR,
    WaveMixSRConfig,
)

PARAMETERS = {
    "wavemix_192_16_l1": 12_494_536,
    "wavemix_192_16_l3": 27_857_608,
    "wavemix_256_12_l2_places365": 28_449_261,
    "wavemix_256_16_l3": 49_416_808,
    "wavemix_256_16_l4": 62_764_776,
    "wavemix_144_7_l1_cifar10": 3_042_550,
    "wavemix_320_8_l1_cifar10": 17_073_610,
    "wavemix_segmenter_256_16_l4": 63_164_628,
    "wavemix_sr_144_4_l1": 1_944_867,
}
#: Multiply-adds of convolutions in thousand millions, for squares of some pixels.
MACS = [
    ("wavemix_192_16_l1", 256, 16.72),
    ("wavemix_192_16_l1", 224, 12.80),
    ("wavemix_192_16_l3", 256, 19.75),
    ("wavemix_192_16_l3", 224, 15.12),
    ("wavemix_256_12_l2_places365", 256, 12.13),
    ("wavemix_256_16_l3", 256, 35.05),
    ("wavemix_256_16_l4", 256, 29.49),
    ("wavemix_144_7_l1_cifar10", 32, 0.880),
    ("wavemix_320_8_l1_cifar10", 32, 4.886),
]
TINY = WaveMixConfig(depth=2, dim=8, level=2, num_classes=5)


def stirred(model: nn.Module) -> nn.Module:
    """The model in float64 and evaluation mode, with weights and statistics that all matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
    return model.double().eval()


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_the_published_ones(name: str):
    with torch.device("meta"):
        model = create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize(("name", "size", "macs"), MACS)
def test_operations_are_the_published_ones(name: str, size: int, macs: float):
    with torch.device("meta"):
        model = create_model(name).eval()
    counted = cost(model, torch.empty(1, 3, size, size, device="meta")).operations["convolution"]
    assert counted / 1e9 == pytest.approx(macs, rel=3e-3)


def test_every_released_file_has_a_variant():
    files = [file.url.rpartition("/")[2] for name in VARIANTS for file in published_files(name)]
    assert len(files) == len(set(files)) == 15
    assert all(file.licence == "MIT" for name in VARIANTS for file in published_files(name))


def test_classifier_is_stem_residual_blocks_and_mean():
    model, x = stirred(WaveMix(TINY)), torch.randn(1, 3, 16, 32, dtype=torch.float64)
    with torch.no_grad():
        y = model.stem(x)
        assert y.shape == (1, 8, 4, 8)
        for block in model.blocks:
            y = block(y) + y
        torch.testing.assert_close(model(x), model.head(y.mean((2, 3))))
    assert [type(layer) for layer in model.stem] == [nn.Conv2d, nn.Conv2d, nn.Conv2d, nn.GELU, nn.BatchNorm2d]


def test_stems():
    strided = WaveMix(TINY.override(stem="strided", stride=2))
    assert [(conv.kernel_size, conv.stride, conv.padding) for conv in strided.stem] == [((3, 3), (2, 2), (1, 1))] * 2
    assert strided.feature_info[0].stride == 4
    assert WaveMix(TINY.override(stem="strided", stride=1)).feature_info[0].stride == 1
    patchify, pachify = (WaveMix(TINY.override(stem=name)) for name in ("patchify", "pachify"))
    assert str(patchify.stem) == str(pachify.stem)


def test_version_2_widens_before_the_mean():
    model = create_model("wavemix_v2_240_12_l3", depth=1, dim=8, num_classes=3)
    assert model.expansion.weight.shape == (1024, 8, 1, 1)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    assert model.head.in_features == 1024


@pytest.mark.parametrize("block", ["wavemix", "v1", "v3"])
def test_versions_of_the_block(block: str):
    model = WaveMix(TINY.override(block=block, level=4, patch_size=2, mult=4)).eval()
    assert model(torch.randn(1, 3, 32, 64)).shape == (1, 5)


def test_a_block_of_ones_own():
    model = WaveMix(TINY, block=lambda channels: nn.Conv2d(channels, channels, 3, padding=1))
    assert model(torch.randn(1, 3, 21, 9)).shape == (1, 5)
    assert isinstance(model.blocks[1], nn.Conv2d)


@pytest.mark.parametrize(("height", "width"), [(16, 32), (45, 61), (4, 7)])
def test_dense_networks_keep_or_double_any_size(height: int, width: int):
    x = torch.randn(2, 1, height, width)
    body = {"depth": 1, "dim": 8, "mode": "reflect", "in_channels": 1}
    for stem in ("patchify", "strided"):
        segmenter = WaveMixSegmenter(WaveMixSegmenterConfig(num_classes=3, stem=stem, **body)).eval()
        # Patches leave out what is left at the end.
        whole = (height, width) if stem == "strided" else (height // 4 * 4, width // 4 * 4)
        assert segmenter(x).shape == (2, 3, *whole)
    assert WaveMixSR(WaveMixSRConfig(**body)).eval()(x).shape == (2, 1, 2 * height, 2 * width)


def test_a_mode_changes_nothing_where_sizes_divide():
    x = torch.randn(1, 3, 16, 48, dtype=torch.float64)
    strict = stirred(WaveMix(TINY))
    free = WaveMix(TINY.override(mode="reflect")).double().eval()
    free.load_state_dict(strict.state_dict())
    with torch.no_grad():
        assert torch.equal(strict(x), free(x))
        # 50 pixels make 12 patches, like 48.
        assert strict(torch.randn(1, 3, 16, 50, dtype=torch.float64)).shape == (1, 5)


def test_export_with_any_size_that_divides():
    model, x = WaveMix(TINY).eval(), torch.randn(2, 3, 32, 48)
    sizes = {0: Dim("batch"), 2: 16 * Dim("height", min=2, max=64), 3: 16 * Dim("width", min=2, max=64)}
    program = torch.export.export(model, (x,), dynamic_shapes=(sizes,), strict=False)
    with torch.no_grad():
        other = torch.randn(3, 3, 64, 32)
        torch.testing.assert_close(program.module()(other), model(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"level": 5}, "level must be from 1 to 4, got 5"),
        ({"level": 0}, "level must be from 1 to 4, got 0"),
        ({"dim": 10}, "dim must be divisible by 4, got 10"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"patch_size": 0}, "patch_size and stride must be at least 1, got 0 and 2"),
        ({"stem": "patch"}, "unknown stem 'patch': did you mean patchify"),
        ({"block": "v4"}, "unknown block 'v4'"),
        ({"mode": "mirror"}, "unknown mode 'mirror'"),
        ({"wavelet": "db2"}, "db2 halves a map only with mode 'periodization', got None"),
        ({"wavelet": "db2", "mode": "zero"}, "db2 halves a map only with mode 'periodization', got 'zero'"),
    ],
)
def test_impossible_networks_are_refused(changes: dict[str, object], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        TINY.override(**changes).build()


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(
        ValueError,
        match=r"must be divisible by 16 \(stem stride 4, 2 levels\), got 45 x 64; mode='reflect' takes any size",
    ):
        WaveMix(TINY)(torch.randn(1, 3, 45, 64))
    with pytest.raises(ValueError, match="spatial size must be divisible by 2 "):
        WaveMixSR(WaveMixSRConfig(depth=1, dim=8))(torch.randn(1, 3, 5, 4))
    for wrong in ((1, 4, 8, 8), (3, 8, 8), (1, 3, 0, 8)):
        for config in (WaveMixSRConfig(depth=1, dim=8), WaveMixSegmenterConfig(depth=1, dim=8)):
            with pytest.raises(ValueError, match=re.escape(f"x must be (B, 3, H, W), got {wrong}")):
                config.build()(torch.zeros(wrong))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (WaveMixSegmenterConfig(num_classes=0), "num_classes must be at least 1, got 0"),
        (WaveMixSegmenterConfig(in_channels=0), "in_channels must be at least 1, got 0"),
        (WaveMixSRConfig(in_channels=0), "in_channels must be at least 1, got 0"),
        (WaveMixSRConfig(stride=2), "the stem of WaveMixSR must keep the size, got a total stride of 4"),
    ],
)
def test_impossible_dense_networks_are_refused(config: WaveMixSegmenterConfig | WaveMixSRConfig, message: str):
    with pytest.raises(ValueError, match=message):
        config.build()


# The authors' layouts: ours by renaming, the inverse of what loading does.


def theirs(state: dict[str, Tensor], head: str) -> dict[str, Tensor]:
    several = any(".feedforward.2." in key for key in state)
    found = {}
    for key, value in state.items():
        key = re.sub(r"^stem\.", "conv.", key)
        key = re.sub(r"^blocks\.", "layers.", key)
        key = re.sub(r"^head\.", head, key)
        found[re.sub(r"feedforward\.(\d)\.", r"feedforward\1." if several else "feedforward.", key)] = value
    return found


KEYS = {
    "conv.2.weight": (16, 8, 4, 4),
    "conv.4.running_var": (16,),
    "layers.0.reduction.weight": (4, 16, 1, 1),
    "layers.1.feedforward1.0.weight": (32, 24, 1, 1),
    "layers.1.feedforward3.0.weight": (32, 16, 1, 1),
    "layers.0.feedforward2.4.weight": (16, 8, 4, 4),
    "layers.0.feedforward1.4.weight": (16, 16, 4, 4),
    "pool.2.bias": (5,),
}
LITE_KEYS = {
    "conv.1.weight": (16, 8, 3, 3),
    "layers.0.feedforward.4.weight": (16, 16, 4, 4),
    "expand.1.weight": (3, 8, 1, 1),
}
CITYSCAPES_KEYS = {"conv.4.weight": (16,), "pool.0.weight": (16, 12, 4, 4), "pool.2.weight": (20, 6, 1, 1)}


@pytest.mark.parametrize(
    ("config", "head", "keys"),
    [
        (WaveMixConfig(depth=2, dim=16, num_classes=5), "pool.2.", KEYS),
        (WaveMixSRConfig(depth=1, dim=16), "expand.", LITE_KEYS),
        (WaveMixSegmenterConfig(depth=1, dim=16, head_channels=(12, 6)), "pool.", CITYSCAPES_KEYS),
        (WaveMixSegmenterConfig(depth=1, dim=16, level=4, stem="strided"), "expand.", {}),
    ],
    ids=["classifier", "super_resolution", "cityscapes", "segmenter"],
)
def test_authors_layouts_load_completely(
    config: WaveMixConfig | WaveMixSRConfig | WaveMixSegmenterConfig, head: str, keys: dict[str, tuple[int, ...]]
):
    source = stirred(config.build())
    foreign = theirs(source.state_dict(), head)
    assert {key: tuple(foreign[key].shape) for key in keys} == keys
    model = config.build().double().eval()
    report = load_weights(model, foreign)
    assert report.layout == "authors"
    assert report.loaded == len(foreign)
    assert report.differences() == []
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(model(x), source(x))


def test_variants_carry_what_a_checkpoint_needs():
    assert model_config("wavemix_256_16_l4").total_stride == 4
    assert model_config("wavemix_320_8_l1_cifar10").preprocess.size == 32
    assert model_config("wavemix_segmenter_192_16_l3_cityscapes").head_channels == (128, 64)
    assert create_model("wavemix_sr_144_4_l1", depth=1, dim=8).example_inputs(2)[0].shape == (2, 3, 256, 256)
