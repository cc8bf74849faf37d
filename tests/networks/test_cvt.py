"""CvT: counts, invariants of the paper, sizes, merging, layouts, refusals."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas import load_weights
from convatlas.cost import cost
from convatlas.networks.base import Feature
from convatlas.networks.cvt import VARIANTS, ConvAttention, CvT, CvTConfig
from convatlas.networks.registry import create_model, model_config, published_files
from convatlas.nn.activation import QuickGELU
from convatlas.nn.drop import DropPath
from convatlas.nn.norm import Float32LayerNorm
from convatlas.surgery import merge
from convatlas.training.optim import parameter_groups

PARAMETERS = {"13": 19_997_480, "21": 31_622_696, "w24": 277_196_392}
TINY = CvTConfig(depths=(1, 1, 2), dims=(8, 12, 16), num_heads=(1, 2, 4), num_classes=5)


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


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_counts_are_the_published_ones(name: str):
    with torch.device("meta"):
        model = create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name.split("_")[1]]


@pytest.mark.parametrize(("name", "macs"), [("cvt_13", 4.566), ("cvt_13_384", 16.269)])
def test_multiply_adds_are_the_published_ones(name: str, macs: float):
    with torch.device("meta"):
        model = create_model(name)
        (x,) = model.example_inputs()
    assert cost(model, x).total.macs / 1e9 == pytest.approx(macs, abs=0.0006)


def test_stage_shapes_at_the_published_size():
    with torch.device("meta"):
        model = create_model("cvt_13").eval()
        maps, token = model.forward_stages(torch.randn(2, 3, 224, 224))
    assert model.feature_info == (Feature(64, 4), Feature(192, 8), Feature(384, 16))
    assert [tuple(feature.shape) for feature in maps] == [(2, 64, 56, 56), (2, 192, 28, 28), (2, 384, 14, 14)]
    assert token is not None
    assert token.shape == (2, 384)


def test_variants_carry_what_their_checkpoints_need():
    for name in VARIANTS:
        config = model_config(name)
        large = name != "cvt_13" and name != "cvt_21"
        assert (config.preprocess.size, config.preprocess.stretch) == ((384, True) if large else (224, False))
        assert config.preprocess.crop == (1.0 if large else 0.875)
        assert config.drop_path[-1] == (0.3 if name == "cvt_w24" else 0.1)
        assert published_files(name)[0].url.startswith("hf://microsoft/cvt-")
    figures = [published_files(name)[0].figures["ImageNet-1K top-1 [%]"] for name in VARIANTS]
    assert figures == [81.6, 83.0, 83.3, 82.5, 83.3, 84.9, 87.6]


def test_drop_path_rises_within_each_stage():
    model = CvT(TINY.override(depths=(2, 1, 3), drop_path=(0.1, 0.2, 0.3)))
    rates = [[module.rate for module in stage.modules() if isinstance(module, DropPath)] for stage in model.stages]
    assert rates[0] == [0, 0.1]
    assert rates[1] == [0]
    assert rates[2] == pytest.approx([0, 0.15, 0.3])


@pytest.mark.parametrize("init", ["trunc_norm", "xavier"])
def test_initial_weights_norms_and_activations(init: str):
    torch.manual_seed(0)
    model = CvT(TINY.override(dims=(32, 64, 96), init=init))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert not module.bias.any()
            if module.weight.numel() > 2000:
                std = 0.02 if init == "trunc_norm" else (2 / (module.in_features + module.out_features)) ** 0.5
                assert module.weight.std().item() == pytest.approx(std, rel=0.1), name
        elif isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            assert module.eps == 1e-5
            assert isinstance(module, Float32LayerNorm | nn.BatchNorm2d) or name.endswith("patch_embed.norm")
    assert sum(isinstance(module, QuickGELU) for module in model.modules()) == 4


# Convolutional attention


def plain_attention(layer: ConvAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Multi-head attention with the scale of all channels."""
    rows = layer.proj_q(query), layer.proj_k(key), layer.proj_v(value)
    heads = [tensor.unflatten(2, (layer.num_heads, -1)).transpose(1, 2) for tensor in rows]
    weights = (heads[0] @ heads[1].transpose(2, 3) * query.shape[-1] ** -0.5).softmax(-1)
    return layer.proj((weights @ heads[2]).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("method", ["dw_bn", "linear"])
def test_convolutions_that_change_nothing_leave_plain_attention(method: Any, class_token: bool):
    layer = stirred(ConvAttention(12, 3, stride_kv=1, method=method, class_token=class_token))
    for module in layer.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data.zero_()
            module.weight.data[:, :, 1, 1] = 1
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.weight.data.fill_((1 + module.eps) ** 0.5)
            module.bias.data.zero_()
    x = images(2, 20 + class_token, 12)
    torch.testing.assert_close(layer(x, (4, 5)), plain_attention(layer, x, x, x))


def test_average_pooling_of_keys_and_values():
    layer = stirred(ConvAttention(12, 3, method="avg"))
    x = images(2, 6 * 8, 12)
    maps = x.transpose(1, 2).reshape(2, 12, 6, 8)
    pooled = F.avg_pool2d(maps, 3, 2, 1, ceil_mode=True).flatten(2).transpose(1, 2)
    assert pooled.shape[1] == 4 * 5  # windows that begin within the padding count, too
    torch.testing.assert_close(layer(x, (6, 8)), plain_attention(layer, x, pooled, pooled))


def test_the_class_token_passes_the_convolutions_by():
    layer = stirred(ConvAttention(12, 3, class_token=True))
    x = images(2, 1 + 30, 12)
    before = layer._projected(x, (5, 6))
    for name in ("conv_proj_q", "conv_proj_k", "conv_proj_v"):
        getattr(layer, name).conv.weight.data.zero_()
    for ours, changed in zip(before, layer._projected(x, (5, 6)), strict=True):
        torch.testing.assert_close(ours[:, 0], changed[:, 0])
        assert not torch.isclose(ours[:, 1:], changed[:, 1:]).any()


@pytest.mark.parametrize(("grid", "keys"), [((7, 6), 12), ((5, 8), 12), ((1, 1), 1)])
def test_attention_weights_are_those_that_the_values_get(grid: tuple[int, int], keys: int):
    layer = stirred(ConvAttention(12, 3, class_token=True))
    x = images(2, 1 + grid[0] * grid[1], 12)
    weights = layer.attention_weights(x, grid)
    assert weights.shape == (2, 3, x.shape[1], 1 + keys)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    value = layer.proj_v(layer._projected(x, grid)[2]).unflatten(2, (3, 4)).transpose(1, 2)
    torch.testing.assert_close(layer.proj((weights @ value).transpose(1, 2).flatten(2)), layer(x, grid))


# The network


def test_any_size_and_one_image():
    model = stirred(CvT(TINY))
    other = TINY.override(preprocess={"size": 64}).build()
    assert {name: p.shape for name, p in model.named_parameters()} == {n: p.shape for n, p in other.named_parameters()}
    assert model.min_size == 3
    with torch.no_grad():
        for size in ((3, 3), (3, 50), (53, 74)):
            assert model(images(1, 3, *size)).shape == (1, 5)
    with pytest.raises(ValueError, match="x must be at least 3 x 3 pixels, got 2 x 64"):
        model(images(1, 3, 2, 64))
    assert CvT(TINY.override(num_classes=1)).eval()(torch.randn(1, 3, 32, 32)).shape == (1, 1)


def test_smaller_strides_for_small_images():
    model = CvT(TINY.override(patch_sizes=(3, 3, 3), patch_strides=(1, 2, 2), patch_paddings=(1, 1, 1)))
    assert [info.stride for info in model.feature_info] == [1, 2, 4]
    assert [feature.shape[2] for feature in model.forward_features(torch.randn(1, 3, 32, 32))] == [32, 16, 8]


def test_class_tokens_of_other_stages_are_lost_behind_them():
    with pytest.warns(UserWarning, match="class tokens of other stages than the last are lost behind their stage"):
        model = CvT(TINY.override(class_tokens=(True, False, False)))
    features = model.forward_features(torch.randn(1, 3, 64, 64))
    assert [feature.shape[1:] for feature in features] == [(8, 16, 16), (12, 8, 8), (16, 4, 4)]
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 5)


def test_batch_norms_fold_into_the_convolutions():
    model = stirred(CvT(TINY))
    x = images(2, 3, 53, 74)
    merged = merge(copy.deepcopy(model), x)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in merged.model.modules())
    assert len(merged.changed) == 3 * 4
    with torch.no_grad():
        torch.testing.assert_close(merged.model(x), model(x))


def test_class_tokens_are_not_decayed():
    model = CvT(TINY)
    groups = parameter_groups(model, weight_decay=0.1)
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert id(model.stages[2].cls_token) not in decayed
    held = {id(p) for layer in model.layers() for p in layer.parameters()}
    assert {name for name, p in model.named_parameters() if id(p) not in held} == {"stages.2.cls_token"}


# Checkpoints


def authors(key: str) -> str:
    return re.sub(r"^stages\.(\d)", r"stage\1", key)


def transformers(key: str) -> str:
    """Our key as the transformers library names it."""
    if not key.startswith("stages."):
        return key.replace("norm.", "layernorm.").replace("head.", "classifier.")
    words = {"q": "query", "k": "key", "v": "value"}
    key = key.replace(".patch_embed.proj.", ".embedding.convolution_embeddings.projection.")
    key = key.replace(".patch_embed.norm.", ".embedding.convolution_embeddings.normalization.")
    key = key.replace(".blocks.", ".layers.")
    for letter, word in words.items():
        inner = f".attention.attention.convolution_projection_{word}.convolution_projection."
        key = key.replace(f".attn.conv_proj_{letter}.conv.", f"{inner}convolution.")
        key = key.replace(f".attn.conv_proj_{letter}.bn.", f"{inner}normalization.")
        key = key.replace(f".attn.proj_{letter}.", f".attention.attention.projection_{word}.")
    for ours, theirs in (
        (".attn.proj.", ".attention.output.dense."),
        (".mlp.fc1.", ".intermediate.dense."),
        (".mlp.fc2.", ".output.dense."),
        (".norm1.", ".layernorm_before."),
        (".norm2.", ".layernorm_after."),
    ):
        key = key.replace(ours, theirs)
    return f"cvt.encoder.{key}"


AUTHORS_KEYS = {
    "stage2.cls_token": (1, 1, 16),
    "stage0.patch_embed.proj.weight": (8, 3, 7, 7),
    "stage1.patch_embed.norm.bias": (12,),
    "stage2.blocks.1.norm2.weight": (16,),
    "stage0.blocks.0.attn.conv_proj_q.conv.weight": (8, 1, 3, 3),
    "stage0.blocks.0.attn.conv_proj_k.bn.running_var": (8,),
    "stage0.blocks.0.attn.conv_proj_v.bn.num_batches_tracked": (),
    "stage1.blocks.0.attn.proj_k.weight": (12, 12),
    "stage1.blocks.0.attn.proj.bias": (12,),
    "stage2.blocks.1.mlp.fc1.weight": (64, 16),
    "norm.weight": (16,),
    "head.weight": (5, 16),
}
TRANSFORMERS_KEYS = {
    "cvt.encoder.stages.2.cls_token": (1, 1, 16),
    "cvt.encoder.stages.0.embedding.convolution_embeddings.projection.weight": (8, 3, 7, 7),
    "cvt.encoder.stages.0.embedding.convolution_embeddings.normalization.bias": (8,),
    "cvt.encoder.stages.1.layers.0.attention.attention.convolution_projection_key.convolution_projection"
    ".convolution.weight": (12, 1, 3, 3),
    "cvt.encoder.stages.1.layers.0.attention.attention.convolution_projection_value.convolution_projection"
    ".normalization.running_mean": (12,),
    "cvt.encoder.stages.1.layers.0.attention.attention.projection_query.bias": (12,),
    "cvt.encoder.stages.1.layers.0.attention.output.dense.weight": (12, 12),
    "cvt.encoder.stages.2.layers.1.intermediate.dense.weight": (64, 16),
    "cvt.encoder.stages.2.layers.1.output.dense.weight": (16, 64),
    "cvt.encoder.stages.2.layers.1.layernorm_after.bias": (16,),
    "layernorm.weight": (16,),
    "classifier.bias": (5,),
}


@pytest.mark.parametrize(
    ("layout", "rename", "keys"),
    [("authors", authors, AUTHORS_KEYS), ("transformers", transformers, TRANSFORMERS_KEYS)],
    ids=["authors", "transformers"],
)
def test_foreign_layouts_load_completely(layout: str, rename: Any, keys: dict[str, tuple[int, ...]]):
    source = stirred(CvT(TINY))
    foreign = {rename(key): value for key, value in source.state_dict().items()}
    assert len(foreign) == len(source.state_dict())
    assert {key: tuple(foreign[key].shape) for key in keys} == keys
    model = CvT(TINY).double().eval()
    report = load_weights(model, foreign)
    assert (report.layout, report.loaded, report.differences()) == (layout, len(foreign), [])
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), source(x))


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": (1, 2)}, "every tuple must have an entry for each stage, got depths 2, dims 3"),
        ({"kv_strides": (2,)}, "every tuple must have an entry for each stage"),
        ({"init": "normal"}, "unknown init 'normal'"),
        ({"projections": ("dw_bn", "dw_bn", "max")}, "unknown projection method 'max'"),
        ({"kernel_sizes": (3, 3, 4)}, "kernel_size must be odd, so that queries keep their positions, got 4"),
        ({"kv_strides": (2, 2, 0)}, "stride_kv must be at least 1, got 0"),
        ({"num_heads": (1, 5, 4)}, "channels must be divisible by num_heads, got 12 and 5"),
        ({"drop_path": (0.0, 0.0, 1.0)}, r"drop path rate must be in \[0, 1\), got 1\.0"),
        ({"stride_q": (1, 1, 1)}, "unknown option of CvTConfig 'stride_q'"),
    ],
)
def test_impossible_networks_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        TINY.override(**changes).build()


def test_tokens_must_fill_the_grid():
    with pytest.raises(ValueError, match="x must hold 4 x 5 tokens and a class token, got 20"):
        ConvAttention(12, 3, class_token=True)(torch.randn(1, 20, 12), (4, 5))
    with pytest.raises(ValueError, match="x must hold 4 x 5 tokens, got 21"):
        ConvAttention(12, 3)(torch.randn(1, 21, 12), (4, 5))
