"""PVT and PVTv2: counts, invariants of the paper, sizes, layouts, refusals."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from convatlas import load_weights
from convatlas.cost import cost
from convatlas.errors import CheckpointError
from convatlas.networks.base import Feature, FeatureExtractor
from convatlas.networks.pvt import (
    PVT,
    VARIANTS,
    DepthwiseTokens,
    OverlapPatchEmbed,
    PVTConfig,
    PVTv2,
    PVTv2Config,
    SpatialReductionAttention,
)
from convatlas.networks.registry import create_model, model_config, published_files
from convatlas.nn.drop import DropPath
from convatlas.training.optim import parameter_groups

PARAMETERS = {
    "pvt_tiny": 13_229_288,
    "pvt_small": 24_485_864,
    "pvt_medium": 44_208_104,
    "pvt_large": 61_369_320,
    "pvt_huge_v2": 304_945_512,
    "pvt_v2_b0": 3_666_760,
    "pvt_v2_b1": 14_009_000,
    "pvt_v2_b2": 25_362_856,
    "pvt_v2_b2_li": 22_553_512,
    "pvt_v2_b3": 45_238_696,
    "pvt_v2_b4": 62_556_072,
    "pvt_v2_b5": 81_956_008,
}
#: In units of 10^9 at 224 x 224.
MULTIPLY_ADDS = {"pvt_tiny": 1.933, "pvt_v2_b0": 0.566, "pvt_v2_b2_li": 3.889}
DIMS = {"dims": (8, 12, 16, 20), "num_heads": (1, 2, 4, 5), "mlp_ratios": (2, 3, 2, 2), "num_classes": 5}
V1 = PVTConfig().override(depths=(1, 1, 2, 1), preprocess={"size": 64}, **DIMS)
V2 = PVTv2Config().override(depths=(1, 2, 1, 1), **DIMS)


def stirred(model: nn.Module) -> nn.Module:
    """The model in float64 and evaluation mode, with weights that all matter."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (0.3 if parameter.dim() == 1 else 0.1) * torch.randn_like(parameter)
    return model.double().eval()


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_counts_are_the_published_ones(name: str):
    with torch.device("meta"):
        model = create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", MULTIPLY_ADDS)
def test_multiply_adds_are_the_published_ones(name: str):
    with torch.device("meta"):
        model = create_model(name)
        (x,) = model.example_inputs()
    assert x.shape == (1, 3, 224, 224)
    assert cost(model, x).total.macs / 1e9 == pytest.approx(MULTIPLY_ADDS[name], abs=0.0006)


@pytest.mark.parametrize("name", ["pvt_tiny", "pvt_v2_b1", "pvt_v2_b2_li"])
def test_stage_shapes_at_the_published_size(name: str):
    with torch.device("meta"):
        model = create_model(name).eval()
        features = model.forward_features(torch.randn(2, 3, 224, 224))
    assert model.feature_info == tuple(Feature(*pair) for pair in ((64, 4), (128, 8), (320, 16), (512, 32)))
    assert [tuple(feature.shape) for feature in features] == [
        (2, channels, 224 // stride, 224 // stride) for channels, stride in model.feature_info
    ]


def test_variants_carry_what_their_checkpoints_need():
    rates = {name: model_config(name).drop_path for name in VARIANTS}
    assert {name for name, rate in rates.items() if rate == 0.3} == {
        *("pvt_medium", "pvt_large", "pvt_v2_b3", "pvt_v2_b4", "pvt_v2_b5")
    }
    figures = [published_files(name)[0].figures["ImageNet-1K top-1 [%]"] for name in VARIANTS if published_files(name)]
    assert figures == [75.1, 79.8, 81.2, 81.7, 70.5, 78.7, 82.0, 82.1, 83.1, 83.6, 83.8]
    assert published_files("pvt_v2_b2_li")[0].url.endswith("/v2/pvt_v2_b2_li.pth")
    assert not published_files("pvt_huge_v2")
    preprocess = model_config("pvt_tiny").preprocess
    assert (preprocess.size, preprocess.crop, preprocess.interpolation) == (224, 0.875, "bicubic")


@pytest.mark.parametrize("config", [V1, V2])
def test_drop_path_norms_and_initial_weights(config: PVTConfig | PVTv2Config):
    torch.manual_seed(0)
    model = config.override(dims=(32, 64, 80, 100), drop_path=0.4, attn_drop=0.1, drop=0.2).build()
    rates = [module.rate for module in model.modules() if isinstance(module, DropPath)]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.4, 5))
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            assert module.eps == (1e-5 if name.endswith(("patch_embed.norm", "attn.norm")) else 1e-6), name
        elif isinstance(module, nn.Dropout):
            assert module.p == 0.2
        elif isinstance(module, SpatialReductionAttention):
            assert module.attn_drop == 0.1
        elif isinstance(module, nn.Linear):
            assert not module.bias.any()
            assert module.weight.numel() < 2000 or abs(module.weight.std().item() - 0.02) < 0.002
        elif isinstance(module, nn.Conv2d):
            fan_out = 9 if module.groups > 1 else module.weight.numel() / module.in_channels
            fan_in = module.weight[0].numel()
            std = (2 / fan_out) ** 0.5 if isinstance(model, PVTv2) else (1 / (3 * fan_in)) ** 0.5
            assert module.weight.std().item() == pytest.approx(std, rel=0.15)
            assert bool(module.bias.any()) == isinstance(model, PVT)


# Spatial-reduction attention


def test_attention_without_reduction_is_torchs():
    layer, theirs = stirred(SpatialReductionAttention(12, 3)), nn.MultiheadAttention(12, 3, batch_first=True).double()
    theirs.in_proj_weight.data.copy_(torch.cat([layer.q.weight, layer.kv.weight]))
    theirs.in_proj_bias.data.copy_(torch.cat([layer.q.bias, layer.kv.bias]))
    theirs.out_proj.load_state_dict(layer.proj.state_dict())
    x = images(2, 30, 12)
    torch.testing.assert_close(layer(x, (5, 6)), theirs(x, x, x)[0])


def test_reduction_by_a_delta_picks_strided_tokens():
    layer = stirred(SpatialReductionAttention(6, 2, 2))
    with torch.no_grad():
        layer.sr.weight.zero_()
        layer.sr.weight[:, :, 1, 0] = torch.eye(6)
        layer.sr.bias.zero_()
    x = images(1, 5 * 7, 6)  # the last row and the last column of the map give no key
    picked = x.reshape(1, 5, 7, 6)[:, 1:4:2, 0:6:2].flatten(1, 2)
    key, value = layer.kv(F.layer_norm(picked, (6,), layer.norm.weight, layer.norm.bias, 1e-5)).chunk(2, -1)
    query, key, value = (t.unflatten(2, (2, 3)).transpose(1, 2) for t in (layer.q(x), key, value))
    heads = (query @ key.transpose(2, 3) * 3**-0.5).softmax(-1) @ value
    torch.testing.assert_close(layer(x, (5, 7)), layer.proj(heads.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("grid", [(14, 14), (9, 15), (3, 2), (1, 1)])
def test_linear_attention_reads_seven_by_seven_keys(grid: tuple[int, int]):
    layer = stirred(SpatialReductionAttention(6, 2, 8, linear=True))
    x = images(2, grid[0] * grid[1], 6)
    pooled = F.adaptive_avg_pool2d(x.transpose(1, 2).reshape(2, 6, *grid), 7).flatten(2).transpose(1, 2)
    reduced = F.linear(pooled, layer.sr.weight[:, :, 0, 0], layer.sr.bias)
    reduced = F.gelu(F.layer_norm(reduced, (6,), layer.norm.weight, layer.norm.bias))
    key, value = layer.kv(reduced).chunk(2, -1)
    query, key, value = (t.unflatten(2, (2, 3)).transpose(1, 2) for t in (layer.q(x), key, value))
    heads = (query @ key.transpose(2, 3) * 3**-0.5).softmax(-1) @ value
    torch.testing.assert_close(layer(x, grid), layer.proj(heads.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("ratio", [1, 2, 4, 8])
def test_products_of_the_attention_shrink_with_the_square_of_the_ratio(ratio: int):
    with torch.device("meta"):
        layer, x = SpatialReductionAttention(64, 1, ratio), torch.randn(1, 56 * 56, 64)
    counted = cost(layer, x, (56, 56))
    products = sum(macs for name, macs in counted.operations.items() if "attention" in name)
    assert products == 2 * 56**2 * (56 // ratio) ** 2 * 64


def test_depthwise_tokens_see_their_neighbours():
    layer = DepthwiseTokens(4, relu=True)
    x = torch.randn(2, 15, 4)
    maps = x.relu().transpose(1, 2).reshape(2, 4, 3, 5)
    torch.testing.assert_close(layer(x, (3, 5)).transpose(1, 2).reshape(2, 4, 3, 5), layer.dwconv(maps))


# Sizes


def test_position_tables_are_added_as_they_are_or_resized():
    model = stirred(PVT(V1))
    for stage, side in enumerate((16, 8, 4, 2)):
        position = model.stages[stage].position
        prefix = 1 if stage == 3 else 0
        native = torch.zeros(1, prefix + side * side, V1.dims[stage], dtype=torch.float64)
        assert torch.equal(position(native, (side, side), prefix), position.table)
        assert torch.equal(position(native[:, prefix:], (side, side), 0), position.table[:, prefix:])
        for grid in ((2 * side, 2 * side), (side + 1, side), (2 * side, side // 2)):  # the last has the same area
            added = position(native.new_zeros(1, prefix + grid[0] * grid[1], V1.dims[stage]), grid, prefix)
            table = position.table[:, prefix:].transpose(1, 2).reshape(1, -1, side, side)
            expected = F.interpolate(table, size=grid, mode="bilinear", align_corners=False)
            torch.testing.assert_close(added[:, prefix:], expected.flatten(2).transpose(1, 2))
            assert torch.equal(added[:, :prefix], position.table[:, :prefix])


def test_twice_the_size_works():
    model = stirred(PVT(V1))
    with torch.no_grad():
        assert model(images(1, 3, 128, 128)).isfinite().all()
        assert model(images(1, 3, 128, 32)).isfinite().all()


def test_version_1_cuts_pixels_off_and_version_2_sees_them_all():
    whole = images(1, 3, 69, 103)
    changed = whole.clone()
    changed[:, :, 64:] += 1
    changed[:, :, :, 96:] += 1
    with torch.no_grad():
        first, second = stirred(PVT(V1)), stirred(PVTv2(V2))
        for feature, other in zip(first.forward_features(whole)[3:], first.forward_features(changed)[3:], strict=True):
            assert feature.shape[2:] == (2, 3)
            assert torch.equal(feature, other)
        for feature, other in zip(second.forward_features(whole), second.forward_features(changed), strict=True):
            assert not torch.isclose(feature, other).all()
        assert second.forward_features(whole)[3].shape[2:] == (3, 4)


def test_only_the_tables_depend_on_the_size():
    for config, count in ((V1, 4), (V2, 0)):
        small, large = (config.override(preprocess={"size": size}).build() for size in (64, (96, 128)))
        other = {name for name, value in small.state_dict().items() if value.shape != large.state_dict()[name].shape}
        assert len(other) == count
        assert all(name.endswith("position.table") for name in other)


def test_tables_of_another_size_load_as_they_would_be_resized():
    source = stirred(PVT(V1))
    target = PVT(V1.override(preprocess={"size": (96, 64)})).double().eval()
    report = load_weights(target, source.state_dict())
    assert [key for key, _ in report.adapted] == [f"stages.{stage}.position.table" for stage in range(4)]
    x = images(2, 3, 96, 64)
    with torch.no_grad():
        torch.testing.assert_close(target(x), source(x))


def test_class_token_takes_part_in_the_last_stage_only():
    model = stirred(PVT(V1))
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        features, scores = model.forward_features(x), model(x)
        model.cls_token += torch.randn_like(model.cls_token)
        for feature, other in zip(model.forward_features(x), features, strict=True):
            assert torch.equal(feature, other)
        assert not torch.isclose(model(x), scores).any()
        model.reset_classifier(0)
        token = model.norm(model.stages[3](features[2], model.cls_token))
        torch.testing.assert_close(model(x), token)


def test_export_with_any_size():
    two = {"dims": (8, 12), "num_heads": (1, 2), "mlp_ratios": (2, 2), "sr_ratios": (8, 1)}
    model = stirred(PVT(V1.override(depths=(0, 1), **two))).float()
    sizes = {0: Dim("batch"), 2: Dim("height", min=64, max=2048), 3: Dim("width", min=64, max=2048)}
    program = torch.export.export(model, (torch.randn(2, 3, 64, 96),), dynamic_shapes=(sizes,), strict=False)
    with torch.no_grad():
        for shape in ((1, 3, 64, 64), (3, 3, 77, 101)):
            x = torch.randn(shape)
            torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


# Checkpoints


def authors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict as the authors' code names it."""
    foreign = {}
    for key, value in state.items():
        if found := re.fullmatch(r"stages\.(\d)\.(\w+)\.(.*)", key):
            stage, part, rest = int(found[1]) + 1, found[2], found[3]
            if part == "position":
                key = f"pos_embed{stage}"
            else:
                rest = rest.replace("mlp.between.dwconv", "mlp.dwconv.dwconv")
                key = f"{ {'blocks': 'block'}.get(part, part) }{stage}.{rest}"
        foreign[key] = value
    return foreign


def timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict as timm names it (version 2)."""
    foreign = {}
    for key, value in state.items():
        key = key.replace("mlp.between.dwconv", "mlp.dwconv")
        key = re.sub(r"^stages\.0\.patch_embed\.", "patch_embed.", key).replace(".patch_embed.", ".downsample.")
        foreign[key] = value
    return foreign


V1_KEYS = {
    "pos_embed1": (1, 256, 8),
    "pos_embed4": (1, 5, 20),
    "cls_token": (1, 1, 20),
    "patch_embed1.proj.weight": (8, 3, 4, 4),
    "patch_embed2.proj.weight": (12, 8, 2, 2),
    "patch_embed4.norm.bias": (20,),
    "block1.0.attn.sr.weight": (8, 8, 8, 8),
    "block1.0.attn.norm.weight": (8,),
    "block3.1.attn.kv.weight": (32, 16),
    "block4.0.attn.q.bias": (20,),
    "block4.0.mlp.fc2.weight": (20, 40),
    "norm.weight": (20,),
    "head.weight": (5, 20),
}
V2_KEYS = {
    "patch_embed1.proj.weight": (8, 3, 7, 7),
    "patch_embed2.proj.weight": (12, 8, 3, 3),
    "block2.1.mlp.dwconv.dwconv.weight": (36, 1, 3, 3),
    "norm3.bias": (16,),
    "head.bias": (5,),
}
LINEAR_KEYS = {"block4.0.attn.sr.weight": (20, 20, 1, 1), "block1.0.attn.norm.bias": (8,)}
TIMM_KEYS = {
    "patch_embed.proj.weight": (8, 3, 7, 7),
    "stages.1.downsample.norm.weight": (12,),
    "stages.1.blocks.1.mlp.dwconv.bias": (36,),
    "stages.3.norm.weight": (20,),
}


@pytest.mark.parametrize("wrapped", ["", "model", "state_dict"])
@pytest.mark.parametrize(
    ("config", "layout", "keys"),
    [
        (V1, "authors", V1_KEYS),
        (V2, "authors", V2_KEYS),
        (V2.override(linear=True), "authors", LINEAR_KEYS),
        (V2, "timm", TIMM_KEYS),
    ],
    ids=["v1", "v2", "v2-linear", "v2-timm"],
)
def test_foreign_layouts_load_completely(
    config: PVTConfig | PVTv2Config, layout: str, keys: dict[str, tuple[int, ...]], wrapped: str
):
    source = stirred(config.build())
    foreign = {"authors": authors, "timm": timm}[layout](source.state_dict())
    assert len(foreign) == len(source.state_dict())
    assert {key: tuple(foreign[key].shape) for key in keys} == keys
    model = config.build().double().eval()
    report = load_weights(model, {wrapped: foreign, "epoch": 300} if wrapped else foreign)
    assert (report.layout, report.loaded, report.differences()) == (layout, len(foreign), [])
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), source(x))


def test_the_classifiers_checkpoint_serves_dense_prediction():
    source = stirred(PVT(V1))
    dense = PVT(V1.override(class_token=False, num_classes=0)).double().eval()
    report = load_weights(dense, authors(source.state_dict()))
    assert report.differences() == []
    assert report.loaded == len(dense.state_dict()) == len(source.state_dict()) - 5
    x = images(1, 3, 72, 104)
    with torch.no_grad():
        for feature, expected in zip(dense.forward_features(x), source.forward_features(x), strict=True):
            assert torch.equal(feature, expected)
        torch.testing.assert_close(dense(x), expected.mean((2, 3)))
    with pytest.raises(CheckpointError, match=r"2 missing in the checkpoint: head\.weight, head\.bias"):
        load_weights(PVT(V1.override(class_token=False)), authors(source.state_dict()))


def test_a_detectors_checkpoint_gives_its_backbone():
    source = stirred(PVT(V1.override(class_token=False, num_classes=0)))
    state = {f"backbone.{key}": value for key, value in authors(source.state_dict()).items()}
    state["neck.fpn.weight"] = torch.zeros(3)
    extractor = FeatureExtractor(PVT(V1.override(class_token=False, num_classes=0)).double(), (1, 3)).eval()
    report = load_weights(extractor.backbone, {"state_dict": state})
    assert report.ignored == ("neck.fpn.weight",)
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        expected = source.forward_features(x)
        assert all(torch.equal(*pair) for pair in zip(extractor(x), expected[1::2], strict=True))


def test_the_class_token_is_not_decayed_and_the_tables_are():
    model = PVT(V1)
    decayed = {
        id(p) for group in parameter_groups(model, weight_decay=0.1) if group["weight_decay"] for p in group["params"]
    }
    assert id(model.cls_token) not in decayed
    assert id(model.stages[0].position.table) in decayed
    held = {id(p) for layer in model.layers() for p in layer.parameters()}
    assert {name for name, p in model.named_parameters() if id(p) not in held} == {"cls_token"}


# Refusals


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (V1, {"depths": (1, 2)}, "must name the same stages"),
        (V2, {"sr_ratios": (8, 4)}, "must name the same stages"),
        (V2, {"depths": ()}, "must name the same stages"),
        (V2, {"num_heads": (1, 2, 4, 8)}, "channels must be divisible by num_heads, got 20 and 8"),
        (V2, {"sr_ratios": (8, 4, 2, 0)}, "sr_ratio must be at least 1, got 0"),
        (
            V1,
            {"sr_ratios": (8, 4, 2, 2)},
            r"sr_ratios must end with 1 where there is a class token, got \(8, 4, 2, 2\)",
        ),
        (V1, {"preprocess": {"size": 24}}, r"preprocess\.size must be at least 32, got 24"),
        (V2, {"drop_path": 1.0}, r"drop path rate must be in \[0, 1\), got 1\.0"),
        (V2, {"class_token": True}, "unknown option of PVTv2Config 'class_token'"),
    ],
)
def test_impossible_networks_are_refused(config: PVTConfig | PVTv2Config, changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        config.override(**changes).build()


def test_small_images_are_refused_by_what_the_reduction_needs():
    model = PVTv2(V2.override(depths=(1, 1), dims=(8, 8), num_heads=(1, 1), mlp_ratios=(1, 1), sr_ratios=(16, 4)))
    with pytest.raises(ValueError, match="x must be at least 64 x 64 pixels, got 63 x 80"):
        model(torch.randn(1, 3, 63, 80))


def test_impossible_modules_and_inputs_are_refused():
    layer = SpatialReductionAttention(8, 2, 4)
    with pytest.raises(ValueError, match="x must hold 5 x 6 tokens, got 31"):
        layer(torch.randn(1, 31, 8), (5, 6))
    with pytest.raises(ValueError, match="grid must be at least 4 x 4, got 3 x 8"):
        layer(torch.randn(1, 24, 8), (3, 8))
    with pytest.raises(ValueError, match="kernel_size must be odd and larger than the stride 4, got 3"):
        OverlapPatchEmbed(3, 8, 3, 4)
    with pytest.raises(ValueError, match="kernel_size must be odd and larger than the stride 4, got 6"):
        OverlapPatchEmbed(3, 8, 6, 4)
