"""InceptionNeXt and the ConvNeXt variants of its study: sizes, structure, invariants, checkpoint layouts."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from convatlas import load_weights
from convatlas.networks import Feature, create_model, model_config, published_files
from convatlas.networks.convnext import ConvNeXt, ConvNeXtBlock, ConvNeXtConfig
from convatlas.networks.inceptionnext import VARIANTS, InceptionNeXt, InceptionNeXtConfig, MetaNeXtBlock
from convatlas.nn.drop import DropPath

PARAMETERS = {
    "inceptionnext_atto": 4_156_520,
    "inceptionnext_tiny": 28_055_680,
    "inceptionnext_small": 49_374_016,
    "inceptionnext_base": 86_672_136,
    "inceptionnext_base_384": 86_672_136,
    "convnext_tiny": 28_589_128,
    "convnext_small": 50_223_688,
    "convnext_base": 88_591_464,
    "convnext_large": 197_767_336,
    "convnext_tiny_k5": 28_430_152,
    "convnext_tiny_k3": 28_324_168,
    "convnext_tiny_k3_par1_2": 28_291_048,
    "convnext_tiny_k3_par3_8": 28_282_768,
    "convnext_tiny_k3_par1_4": 28_274_488,
    "convnext_tiny_k3_par1_8": 28_266_208,
    "convnext_tiny_k3_par1_16": 28_262_068,
}
DROP_PATH = {"atto": 0.1, "tiny": 0.1, "small": 0.3, "base": 0.4, "base_384": 0.7}
TINY = InceptionNeXtConfig(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), num_classes=5)


def stirred(model: nn.Module) -> nn.Module:
    """The model in float64 and evaluation mode, with weights and statistics that all matter."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (0.3 if parameter.dim() == 1 else 0.1) * torch.randn_like(parameter)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
    return model.double().eval()


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_the_published_ones(name: str):
    with torch.device("meta"):
        model = create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", VARIANTS)
def test_stage_shapes_at_the_published_size(name: str):
    size = 384 if name.endswith("384") else 224
    with torch.device("meta"):
        model = create_model(name).eval()
        (x,) = model.example_inputs()
        features = model.forward_features(x)
    dims = model.config.dims
    assert x.shape == (1, 3, size, size)
    assert model.feature_info == tuple(Feature(channels, 4 * 2**stage) for stage, channels in enumerate(dims))
    assert [feature.shape for feature in features] == [
        (1, channels, size // 4 // 2**stage, size // 4 // 2**stage) for stage, channels in enumerate(dims)
    ]


def test_variants_carry_what_their_checkpoints_need():
    for short, rate in DROP_PATH.items():
        config = model_config(f"inceptionnext_{short}")
        assert config.drop_path == rate
        assert config.dropout == (0.5 if short == "base_384" else 0)
        assert (config.preprocess.size, config.preprocess.crop) == ((384, 1.0) if short == "base_384" else (224, 0.875))
        assert config.preprocess.interpolation == "bicubic"
    figures = [published_files(name)[0].figures["ImageNet-1K top-1 [%]"] for name in VARIANTS]
    assert figures == [75.3, 82.3, 83.5, 84.0, 85.2]
    assert published_files("convnext_tiny_k3")[0].url.endswith("/convnext_tiny_k3_1k_224_ema.pth")
    assert published_files("convnext_tiny")[0].url.endswith("/convnext_tiny_1k_224_ema.pth")


@pytest.mark.parametrize("name", ["inceptionnext_small", "convnext_tiny"])
def test_drop_path_rises_linearly_over_all_blocks(name: str):
    with torch.device("meta"):
        model = create_model(name, drop_path=0.3)
    rates = [module.rate for module in model.modules() if isinstance(module, DropPath)]
    assert len(rates) == sum(model.config.depths)
    assert (rates[0], rates[-1]) == (0, 0.3)
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.3, len(rates)))


def test_initial_weights():
    torch.manual_seed(0)
    model = InceptionNeXt(TINY.override(dims=(32, 64, 96, 128)))
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert not module.bias.any()
            if module.weight.numel() > 2000:
                assert abs(module.weight.std().item() - 0.02) < 0.002
    gammas = [value for name, value in model.named_parameters() if name.endswith("gamma")]
    assert len(gammas) == 5
    assert all((gamma == 1e-6).all() for gamma in gammas)


@pytest.mark.parametrize("block", [MetaNeXtBlock(6, nn.Conv2d(6, 6, 3, padding=1)), ConvNeXtBlock(6)])
def test_a_block_without_gain_is_the_identity(block: nn.Module):
    x = images(2, 6, 5, 7)
    block = stirred(block)
    assert not torch.isclose(block(x), x).all()
    nn.init.zeros_(block.layer_scale.gamma)
    assert torch.equal(block(x), x)


def test_layer_scale_can_be_left_out():
    for config in (TINY, ConvNeXtConfig(depths=(1,), dims=(8,))):
        model = config.override(layer_scale_init=None).build()
        assert not any("gamma" in name for name in model.state_dict())


def test_batch_norm_folds_into_the_mlp():
    model = stirred(InceptionNeXt(TINY))
    folded = copy.deepcopy(model)
    with torch.no_grad():
        for block in folded.modules():
            if isinstance(block, MetaNeXtBlock):
                norm, fc1 = block.norm, block.mlp.fc1
                scale = norm.weight / (norm.running_var + norm.eps).sqrt()
                fc1.bias += fc1.weight[:, :, 0, 0] @ (norm.bias - norm.running_mean * scale)
                fc1.weight *= scale[:, None, None]
                block.norm = nn.Identity()
        x = images(2, 3, 64, 64)
        torch.testing.assert_close(folded(x), model(x), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(folded.float()(x.float()), model.float()(x.float()), rtol=1e-5, atol=1e-5)


def test_another_token_mixer():
    made = []

    def mixer(channels: int, dilation: int) -> nn.Module:
        made.append((channels, dilation))
        return nn.Conv2d(channels, channels, 7, padding=3 * dilation, dilation=dilation, groups=channels)

    model = InceptionNeXt(TINY.override(output_stride=16), token_mixer=mixer)
    assert made == [(8, 1), (16, 1), (24, 1), (24, 1), (32, 2)]
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize(("output_stride", "strides"), [(32, (4, 8, 16, 32)), (16, (4, 8, 16, 16)), (8, (4, 8, 8, 8))])
def test_smaller_output_stride_refines_the_same_maps(output_stride: int, strides: tuple[int, ...]):
    plain = stirred(InceptionNeXt(TINY))
    dense = InceptionNeXt(TINY.override(output_stride=output_stride)).double().eval()
    dense.load_state_dict(plain.state_dict())
    assert tuple(info.stride for info in dense.feature_info) == strides
    x = images(1, 3, 64, 96)
    with torch.no_grad():
        coarse, fine = plain.forward_features(x), dense.forward_features(x)
    assert [feature.shape[2:] for feature in fine] == [(64 // stride, 96 // stride) for stride in strides]
    assert torch.equal(fine[0], coarse[0])
    assert torch.equal(fine[1], coarse[1])
    for ours, theirs, stride in zip(fine, coarse, (4, 8, 16, 32), strict=True):
        step = stride // (64 // ours.shape[2])
        torch.testing.assert_close(ours[:, :, ::step, ::step], theirs)


def test_export_with_any_size():
    model = stirred(InceptionNeXt(TINY)).float()
    x = images(2, 3, 64, 96).float()
    sizes = {0: Dim("batch"), 2: Dim("height", min=64, max=2048), 3: Dim("width", min=64, max=2048)}
    program = torch.export.export(model, (x,), dynamic_shapes=(sizes,), strict=False)
    with torch.no_grad():
        for shape in ((1, 3, 64, 77), (3, 3, 224, 224)):
            other = images(*shape).float()
            torch.testing.assert_close(program.module()(other), model(other), rtol=1e-4, atol=1e-5)


def test_a_new_classifier_keeps_the_hidden_layer_of_the_head():
    model = stirred(InceptionNeXt(TINY))
    fc1, norm = model.head.fc1.weight.clone(), model.head.norm.weight.clone()
    model.reset_classifier(9)
    assert torch.equal(model.head.fc1.weight, fc1)
    assert torch.equal(model.head.norm.weight, norm)
    assert model.head.fc2.weight.shape == (9, 96)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": (1, 2)}, "depths, dims and mlp_ratios must name the same stages"),
        ({"mlp_ratios": (4, 4)}, "must name the same stages"),
        ({"depths": (), "dims": ()}, "must name the same stages"),
        ({"output_stride": 4}, "output_stride must be 8, 16 or 32, got 4"),
        ({"band_kernel_size": 10}, "kernel sizes must be odd to keep the resolution"),
        ({"branch_ratio": 0.01}, r"branch_ratio \* in_channels must be at least 1, got 0.01 \* 8"),
        ({"drop_path": 1.0}, r"drop path rate must be in \[0, 1\), got 1.0"),
        ({"band_kernel": 3}, "unknown option of InceptionNeXtConfig 'band_kernel': did you mean band_kernel_size"),
        ({"preprocess": {"siz": 3}}, "unknown option of Preprocess 'siz': did you mean size"),
    ],
)
def test_impossible_networks_are_refused(changes: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        TINY.override(**changes).build()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": (1, 2)}, "depths and dims must name the same stages"),
        ({"kernel_size": 4}, "kernel_size must be odd, one for all stages or one for each, got 4"),
        ({"conv_ratio": 0.01}, r"ratio \* channels must be between 1 and 96"),
        ({"conv_ratio": 1.5}, r"ratio \* channels must be between 1 and 96"),
    ],
)
def test_impossible_convnexts_are_refused(changes: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        ConvNeXtConfig().override(**changes).build()


# Checkpoint layouts: a foreign state dict is made from ours by renaming, the inverse of what loading does.


def theirs(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict in a foreign layout."""
    if name == "authors":
        return {re.sub(r"\.layer_scale\.gamma$", ".gamma", key): value for key, value in state.items()}
    if name == "timm":
        return {_timm_key(key): value for key, value in state.items()}
    foreign = {}
    for key, value in state.items():
        if found := re.fullmatch(r"downsample_layers\.(\d)\.(.*)", key):
            key = f"features.{2 * int(found[1])}.{found[2]}"
        elif found := re.fullmatch(r"stages\.(\d)\.(\d+)\.(\w+)\.(\w+)", key):
            place = f"features.{2 * int(found[1]) + 1}.{found[2]}"
            if found[3] == "layer_scale":
                key, value = f"{place}.layer_scale", value[:, None, None]
            else:
                part = {"dwconv": 0, "norm": 2, "pwconv1": 3, "pwconv2": 5}[found[3]]
                key = f"{place}.block.{part}.{found[4]}"
        else:
            key = key.replace("norm.", "classifier.0.").replace("head.", "classifier.2.")
        foreign[key] = value
    return foreign


def _timm_key(key: str) -> str:
    first, *rest = key.split(".")
    tail = ".".join(rest[-2:])
    if first == "downsample_layers":
        return f"stem.{tail}" if rest[0] == "0" else f"stages.{rest[0]}.downsample.{tail}"
    if first != "stages":
        return {"norm": "head.norm.", "head": "head.fc."}[first] + rest[-1]
    names = {"dwconv": "conv_dw.", "norm": "norm.", "pwconv1": "mlp.fc1.", "pwconv2": "mlp.fc2.", "layer_scale": ""}
    return f"stages.{rest[0]}.blocks.{rest[1]}.{names[rest[2]]}{rest[3]}"


TIMM_KEYS = {
    "stem.0.weight": (8, 3, 4, 4),
    "stages.0.blocks.0.conv_dw.weight": (8, 1, 7, 7),
    "stages.0.blocks.0.gamma": (8,),
    "stages.1.downsample.1.weight": (16, 8, 2, 2),
    "stages.1.blocks.1.mlp.fc2.bias": (16,),
    "head.norm.weight": (16,),
    "head.fc.weight": (5, 16),
}
AUTHORS_KEYS = {
    "stem.0.weight": (8, 3, 4, 4),
    "stem.1.running_var": (8,),
    "stages.0.blocks.0.gamma": (8,),
    "stages.0.blocks.0.token_mixer.dwconv_hw.bias": (1,),
    "stages.1.blocks.0.token_mixer.dwconv_w.weight": (2, 1, 1, 11),
    "stages.1.blocks.0.token_mixer.dwconv_h.weight": (2, 1, 11, 1),
    "stages.2.blocks.1.norm.num_batches_tracked": (),
    "stages.0.blocks.0.mlp.fc1.weight": (32, 8, 1, 1),
    "stages.3.blocks.0.mlp.fc2.weight": (32, 96, 1, 1),
    "stages.3.downsample.0.weight": (24,),
    "stages.3.downsample.1.weight": (32, 24, 2, 2),
    "head.fc1.weight": (96, 32),
    "head.norm.weight": (96,),
    "head.fc2.weight": (5, 96),
}
STUDY_KEYS = {
    "downsample_layers.0.0.weight": (8, 3, 4, 4),
    "downsample_layers.1.1.weight": (16, 8, 2, 2),
    "stages.1.0.dwconv.conv.weight": (4, 1, 3, 3),
    "stages.1.0.norm.weight": (16,),
    "stages.1.0.pwconv1.weight": (64, 16),
    "stages.1.0.pwconv2.bias": (16,),
    "stages.1.0.gamma": (16,),
    "norm.weight": (16,),
    "head.weight": (5, 16),
}
TORCHVISION_KEYS = {
    "features.0.0.weight": (8, 3, 4, 4),
    "features.0.1.weight": (8,),
    "features.1.0.block.0.weight": (8, 1, 7, 7),
    "features.1.0.block.2.weight": (8,),
    "features.1.0.block.3.weight": (32, 8),
    "features.1.0.block.5.weight": (8, 32),
    "features.1.0.layer_scale": (8, 1, 1),
    "features.2.0.weight": (8,),
    "features.2.1.weight": (16, 8, 2, 2),
    "features.3.1.block.0.bias": (16,),
    "classifier.0.weight": (16,),
    "classifier.2.weight": (5, 16),
}


@pytest.mark.parametrize("wrapped", [False, True], ids=["flat", "under_model"])
@pytest.mark.parametrize(
    ("config", "layout", "keys"),
    [
        (TINY, "authors", AUTHORS_KEYS),
        (
            ConvNeXtConfig(depths=(1, 2), dims=(8, 16), num_classes=5, kernel_size=3, conv_ratio=0.25),
            "authors",
            STUDY_KEYS,
        ),
        (ConvNeXtConfig(depths=(1, 2), dims=(8, 16), num_classes=5), "torchvision", TORCHVISION_KEYS),
        (ConvNeXtConfig(depths=(1, 2), dims=(8, 16), num_classes=5), "timm", TIMM_KEYS),
    ],
    ids=["inceptionnext-authors", "convnext_par-authors", "convnext-torchvision", "convnext-timm"],
)
def test_foreign_layouts_load_completely(
    config: InceptionNeXtConfig | ConvNeXtConfig, layout: str, keys: dict[str, tuple[int, ...]], wrapped: bool
):
    source = stirred(config.build())
    foreign = theirs(layout, source.state_dict())
    assert len(foreign) == len(source.state_dict())
    assert {key: tuple(foreign[key].shape) for key in keys} == keys
    model = config.build().double().eval()
    report = load_weights(model, {"model": foreign, "epoch": 300} if wrapped else foreign)
    assert report.layout == layout
    assert report.loaded == len(foreign)
    assert report.differences() == []
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), source(x))


def test_all_four_stages_of_torchvisions_layout():
    config = ConvNeXtConfig(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), num_classes=5)
    source, model = stirred(config.build()), ConvNeXt(config).double()
    report = load_weights(model, theirs("torchvision", source.state_dict()))
    assert report.differences() == []
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
