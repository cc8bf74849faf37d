"""DHVT: counts, the three modules against their definitions, sizes, checkpoints, refusals."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas import load_weights
from convatlas.cost import cost
from convatlas.networks.base import Feature
from convatlas.networks.dhvt import DAFF, DHVT, SOPE, VARIANTS, DHVTConfig, HeadInteractedAttention
from convatlas.networks.registry import create_model, model_config
from convatlas.nn.attention import SelfAttention
from convatlas.nn.drop import DropPath
from convatlas.surgery import merge
from convatlas.training.optim import parameter_groups

#: Parameters, and multiply-adds in units of 10^9, as counted with the authors' code.
PUBLISHED = {
    "dhvt_tiny_cifar_patch4": (6_008_650, 0.388),
    "dhvt_tiny_cifar_patch2": (5_845_162, 1.705),
    "dhvt_small_cifar_patch4": (23_425_450, 1.529),
    "dhvt_small_cifar_patch2": (22_766_698, 6.195),
    "dhvt_tiny_domain_patch16": (6_105_975, 1.358),
    "dhvt_small_domain_patch16": (23_788_431, 5.033),
    "dhvt_tiny_imagenet_patch16": (6_267_334, 1.355),
    "dhvt_small_imagenet_patch16": (24_040_606, 5.033),
}
SMALL = DHVTConfig(dim=16, depth=2, num_heads=4, mlp_ratio=2, num_classes=5).override(
    preprocess={"size": 32, "crop": 1}
)


def stirred(model: nn.Module) -> Any:
    """The model in float64 and evaluation mode, with weights and statistics that all matter."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean += 0.1 * torch.randn_like(module.running_mean)
                module.running_var *= 0.5 + torch.rand_like(module.running_var)
    return model.double().eval()


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_and_multiply_adds_are_the_published_ones(name: str):
    with torch.device("meta"):
        model = create_model(name)
        (x,) = model.example_inputs()
    parameters, macs = PUBLISHED[name]
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    if name in ("dhvt_tiny_cifar_patch4", "dhvt_tiny_imagenet_patch16"):
        # The reference's count takes the two small products of the excitation as well.
        assert cost(model, x).total.macs / 1e9 == pytest.approx(macs, abs=0.0006)


def test_variants_carry_what_their_data_need():
    for name in VARIANTS:
        config = model_config(name)
        size, crop, classes = {
            "cifar": (32, 1.0, 100),
            "domain": (224, 0.875, 345),
            "imagenet": (224, 0.875, 1000),
        }[name.split("_")[2]]
        assert (config.preprocess.size, config.preprocess.crop, config.num_classes) == (size, crop, classes)
        assert name.endswith(f"patch{config.patch_size}")
        assert (config.depth, config.mlp_ratio, config.drop_path) == (12, 4, 0.1)
    assert len(model_config("dhvt_tiny_cifar_patch4").preprocess.mean) == 3


def test_drop_path_norms_and_initial_weights():
    model = DHVT(SMALL.override(dim=64, depth=3, drop_path=0.4, attn_drop=0.1, drop=0.2))
    rates = [module.rate for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0, 0.2, 0.4])
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            assert module.eps == (1e-5 if name.endswith("ht_norm") else 1e-6)
        elif isinstance(module, nn.BatchNorm2d):
            assert module.eps == 1e-5
        elif isinstance(module, nn.Linear):
            assert not module.bias.any()
            assert module.weight.numel() < 2000 or abs(module.weight.std().item() - 0.02) < 0.002
        elif isinstance(module, HeadInteractedAttention):
            assert (module.attn_drop, module.drop.p) == (0.1, 0.2)
            assert module.pos_embed.std().item() == pytest.approx(0.02, rel=0.3)
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.dim() > 1}
    free = [group for group in parameter_groups(model, weight_decay=1.0) if not group["weight_decay"]]
    assert [names[id(p)] for group in free for p in group["params"] if id(p) in names] == ["cls_token"]
    assert "pos_embed" not in model.state_dict()
    held = {id(parameter) for layer in model.layers() for parameter in layer.parameters()}
    assert {name for name, parameter in model.named_parameters() if id(parameter) not in held} == {"cls_token"}


# SOPE


@pytest.mark.parametrize(
    ("patch", "widths", "last"),
    [
        (2, [16], nn.GELU),
        (4, [8, 16], nn.Sequential),
        (8, [4, 8, 16], nn.Sequential),
        (16, [2, 4, 8, 16], nn.Sequential),
    ],
)
def test_embedding_halves_the_image_step_by_step(patch: int, widths: list[int], last: type[nn.Module]):
    layer = stirred(SOPE(3, 16, patch))
    assert [part[0].out_channels for part in layer.proj if isinstance(part, nn.Sequential)] == widths
    assert type(layer.proj[-1]) is last
    assert sum(isinstance(part, nn.GELU) for part in layer.proj) == max(1, len(widths) - 1)
    x = images(2, 3, 45, 61)
    y = layer(x)
    assert y.shape == (2, 16, -(-45 // patch), -(-61 // patch))
    inner = layer.proj(layer.pre_affine.alpha * x + layer.pre_affine.beta)
    torch.testing.assert_close(y, layer.post_affine.alpha * inner + layer.post_affine.beta)


def test_a_shift_by_a_patch_moves_the_tokens():
    layer = stirred(SOPE(3, 16, 4))
    x = images(1, 3, 48, 48)
    shifted = layer(x.roll((4, 8), (2, 3)))
    torch.testing.assert_close(shifted[..., 3:-1, 4:-1], layer(x)[..., 2:-2, 2:-3])


# Head-interacted attention


def test_head_tokens_are_means_of_the_heads():
    layer = stirred(HeadInteractedAttention(12, 3))
    x = images(2, 10, 12)
    tokens = layer.head_tokens(x)
    assert tokens.shape == (2, 3, 12)
    for head in range(3):
        inner = layer.ht_proj(x[:, :, 4 * head : 4 * head + 4].mean(1))
        parts = [F.gelu(layer.ht_norm(inner[:, 4 * part : 4 * part + 4])) for part in range(3)]
        torch.testing.assert_close(tokens[:, head], torch.cat(parts, 1) + layer.pos_embed[0, head])


def test_interaction_is_attention_with_more_tokens():
    layer = stirred(HeadInteractedAttention(12, 3))
    plain = SelfAttention(12, 3).double()
    plain.load_state_dict({key: value for key, value in layer.state_dict().items() if key.startswith(("qkv", "proj"))})
    x = images(2, 10, 12)
    y = plain(torch.cat([x, layer.head_tokens(x)], 1))
    torch.testing.assert_close(layer(x)[:, 1:], y[:, 1:10])
    torch.testing.assert_close(layer(x)[:, 0], y[:, 0] + y[:, 10:].mean(1))


def test_without_head_tokens_it_is_plain_attention():
    model = DHVT(SMALL.override(attention="self", mlp="plain"))
    assert type(model.blocks[0].attn) is SelfAttention
    assert not any("ht_" in name or "pos_embed" in name or "bn1" in name for name, _ in model.named_parameters())


# DAFF


def test_daff_is_its_definition():
    layer = stirred(DAFF(12, 24, 5))
    x = images(2, 1 + 3 * 5, 12)
    y = layer(x, (3, 5))
    maps = x[:, 1:].transpose(1, 2).reshape(2, 12, 3, 5)
    z = F.gelu(layer.bn1(layer.conv1(maps)))
    z = z + F.gelu(layer.bn2(layer.conv2(z)))
    m = layer.bn3(layer.conv3(z))
    torch.testing.assert_close(y[:, 1:].transpose(1, 2).reshape(2, 12, 3, 5), m)
    weight = layer.excitation(F.gelu(layer.compress(m.mean((2, 3)))))
    torch.testing.assert_close(y[:, 0], x[:, 0] * weight)


def test_daff_keeps_patches_and_class_token_apart():
    layer = stirred(DAFF(12, 24))
    x = images(2, 17, 12)
    y, other = layer(x), x.clone()
    other[:, 0] = 3 * x[:, 0]
    assert torch.equal(layer(other)[:, 1:], y[:, 1:])
    torch.testing.assert_close(layer(other)[:, 0], 3 * y[:, 0])


def test_daff_without_its_depthwise_convolution_is_an_mlp():
    layer = stirred(DAFF(12, 24))
    with torch.no_grad():
        for tensor in (layer.conv2.weight, layer.conv2.bias, layer.bn2.bias, layer.bn2.running_mean):
            tensor.zero_()
    x = images(2, 17, 12)
    one = torch.stack([layer(torch.cat([x[:, :1], x[:, n : n + 1]], 1))[:, 1] for n in range(1, 17)], 1)
    torch.testing.assert_close(layer(x)[:, 1:], one)


@pytest.mark.parametrize("tokens", [1, 16])
def test_patches_that_do_not_fill_the_grid_are_refused(tokens: int):
    with pytest.raises(ValueError, match=f"must hold a class token and . x . patches, got {tokens} tokens"):
        DAFF(8, 8)(torch.randn(2, tokens, 8))
    with pytest.raises(ValueError, match="must hold a class token and 3 x 4 patches"):
        DAFF(8, 8)(torch.randn(2, 17, 8), (3, 4))
    assert DAFF(8, 8).eval()(torch.randn(2, 13, 8), (3, 4)).shape == (2, 13, 8)


# The whole network


def test_any_size_and_shape():
    model = stirred(DHVT(SMALL))
    assert model.feature_info == (Feature(16, 4),)
    for size in ((1, 1), (32, 32), (45, 61), (7, 90)):
        features, token = model.forward_tokens(images(2, 3, *size))
        assert features.shape == (2, 16, -(-size[0] // 4), -(-size[1] // 4))
        torch.testing.assert_close(model.head(token), model(images(2, 3, *size)))


def test_batch_norms_are_folded():
    model = stirred(DHVT(SMALL)).float()
    x = torch.randn(2, 3, 32, 32)
    merged = merge(model, x)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in merged.model.modules())
    torch.testing.assert_close(merged.model(x), model(x), rtol=1e-4, atol=1e-4)


# Checkpoints

KEYS = {
    "cls_token": (1, 1, 16),
    "patch_embed.pre_affine.alpha": (1, 3, 1, 1),
    "patch_embed.post_affine.beta": (1, 16, 1, 1),
    "patch_embed.proj.0.0.weight": (8, 3, 3, 3),
    "patch_embed.proj.2.1.running_var": (16,),
    "blocks.1.attn.pos_embed": (1, 4, 16),
    "blocks.0.attn.qkv.weight": (48, 16),
    "blocks.0.attn.ht_proj.weight": (16, 4),
    "blocks.0.attn.ht_norm.weight": (4,),
    "blocks.0.mlp.conv1.bias": (32,),
    "blocks.0.mlp.conv2.weight": (32, 1, 3, 3),
    "blocks.0.mlp.bn3.weight": (16,),
    "blocks.0.mlp.compress.weight": (4, 16),
    "blocks.0.mlp.excitation.bias": (16,),
    "norm.weight": (16,),
    "head.weight": (5, 16),
}


def test_the_authors_checkpoint_loads_completely():
    source, average = stirred(DHVT(SMALL)), stirred(DHVT(SMALL))
    with torch.no_grad():
        average.head.bias += 1
    state = source.state_dict()
    assert {key: tuple(state[key].shape) for key in KEYS} == KEYS
    saved = {"model": state, "model_ema": average.state_dict(), "epoch": 299, "optimizer": {"state": {}}}
    x = images(2, 3, 32, 32)
    for part, expected in (("model", source), ("model_ema", average)):
        model = DHVT(SMALL).double().eval()
        report = load_weights(model, saved, part=part)
        assert (report.loaded, report.missing, report.unexpected) == (len(state), (), ())
        assert torch.equal(model(x), expected(x))


def test_weights_for_other_channels_and_classes():
    source = stirred(DHVT(SMALL))
    with torch.no_grad():  # equal for all channels, so that grey images are served exactly
        for parameter in (source.patch_embed.pre_affine.alpha, source.patch_embed.pre_affine.beta):
            parameter.copy_(parameter[:, :1].clone())
    x = images(2, 1, 32, 32)
    grey = DHVT(SMALL.override(in_channels=1)).double().eval()
    load_weights(grey, source.state_dict())
    torch.testing.assert_close(grey(x), source(x.expand(-1, 3, -1, -1)))
    five = DHVT(SMALL.override(in_channels=5, num_classes=3)).double().eval()
    load_weights(five, source.state_dict())
    assert five.patch_embed.pre_affine.alpha.shape == (1, 5, 1, 1)
    assert five(images(1, 5, 32, 32)).shape == (1, 3)
    assert torch.equal(five.blocks[1].mlp.conv2.weight, source.blocks[1].mlp.conv2.weight)


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 6}, "patch_size must be a power of two such as 2, 4 or 16, got 6"),
        ({"patch_size": 1}, "patch_size must be a power of two such as 2, 4 or 16, got 1"),
        ({"patch_size": 16, "dim": 20}, "channels must be divisible by 8 for patches of 16, got 20"),
        ({"num_heads": 5}, "channels must be divisible by num_heads, got 16 and 5"),
        ({"kernel_size": 4}, "kernel_size must be odd, got 4"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"attention": "none"}, "unknown attention 'none'"),
        ({"mlp": "dafff"}, "unknown mlp 'dafff'"),
    ],
)
def test_impossible_configs_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        DHVT(SMALL.override(**changes))
