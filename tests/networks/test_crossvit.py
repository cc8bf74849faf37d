"""CrossViT: counts, what each branch sees, invariants of the exchange, layouts, refusals."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from convatlas import load_weights
from convatlas.cost import cost
from convatlas.networks.base import Feature
from convatlas.networks.crossvit import VARIANTS, CrossAttention, CrossViT, CrossViTConfig, MultiScaleBlock
from convatlas.networks.registry import create_model, model_config, published_files
from convatlas.nn.drop import DropPath
from convatlas.surgery import merge
from convatlas.training.optim import parameter_groups

PARAMETERS = {
    "crossvit_tiny_224": 7_014_800,
    "crossvit_small_224": 26_856_272,
    "crossvit_base_224": 105_025_232,
    "crossvit_9_224": 8_553_296,
    "crossvit_9_dagger_224": 8_776_592,
    "crossvit_15_224": 27_528_464,
    "crossvit_15_dagger_224": 28_209_008,
    "crossvit_18_224": 43_271_408,
    "crossvit_18_dagger_224": 44_266_976,
    "crossvit_15_dagger_384": 28_500_080,
    "crossvit_18_dagger_384": 44_606_560,
}
#: In units of 10^9 at the published size, with the digits that the reference's count gives.
MULTIPLY_ADDS = {"crossvit_tiny_224": 1.563, "crossvit_15_dagger_384": 21.40}
TOP1 = [73.4, 81.0, 82.2, 73.9, 81.5, 82.5, 77.1, 82.3, 82.8, 83.5, 83.9]
SMALL = CrossViTConfig().override(
    dims=(8, 12),
    num_heads=(2, 3),
    mlp_ratios=(2, 3),
    depths=((1, 2, 0), (2, 1, 2)),
    num_classes=5,
    preprocess={"size": 60},
)


def stirred(model: nn.Module) -> Any:
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
    assert cost(model, x).total.macs / 1e9 == pytest.approx(MULTIPLY_ADDS[name], rel=4e-4)


@pytest.mark.parametrize(("name", "sizes"), [("crossvit_9_224", (240, 224)), ("crossvit_15_dagger_384", (408, 384))])
def test_branches_see_the_published_sizes(name: str, sizes: tuple[int, int]):
    with torch.device("meta"):
        model = create_model(name).eval()
        (x,) = model.example_inputs(2)
        assert x.shape == (2, 3, sizes[0], sizes[0])
        first, second = model.views(x)
        assert first is x
        assert second.shape[2:] == (sizes[1], sizes[1])
        maps, tokens = model.forward_branches(x)
    assert [embedding.pos_embed.shape[1] for embedding in model.embeddings] == [
        1 + (sizes[0] // 12) ** 2,
        1 + (sizes[1] // 16) ** 2,
    ]
    assert model.feature_info == (Feature(model.config.dims[0], 12), Feature(model.config.dims[1], 17))
    assert [tuple(feature.shape[1:]) for feature in maps] == [
        (model.config.dims[0], sizes[0] // 12, sizes[0] // 12),
        (model.config.dims[1], sizes[1] // 16, sizes[1] // 16),
    ]
    assert [tuple(token.shape) for token in tokens] == [(2, channels) for channels in model.config.dims]


def test_variants_carry_what_their_checkpoints_need():
    for name in VARIANTS:
        preprocess, large = model_config(name).preprocess, name.endswith("384")
        assert (preprocess.size, preprocess.crop) == ((408, 1.0) if large else (240, 0.875))
        assert preprocess.interpolation == "bicubic"
        assert published_files(name)[0].url.endswith(f"/weights-0.1/{name}.pth")
    assert [published_files(name)[0].figures["ImageNet-1K top-1 [%]"] for name in VARIANTS] == TOP1


def test_drop_path_norms_and_initial_weights():
    model = CrossViT(SMALL.override(dims=(64, 96), norm_eps=1e-4, drop_path=0.5, attn_drop=0.1, drop=0.2))
    rates = torch.linspace(0, 0.5, 6)  # two for the first block, four for the second
    for block, own in zip(model.blocks, (rates[:2], rates[2:]), strict=True):
        for branch in block.blocks:
            assert [layer.drop_path.rate for layer in branch] == pytest.approx(own[: len(branch)].tolist())
        for fusion in block.fusion:
            found = [module.rate for module in fusion.modules() if isinstance(module, DropPath)]
            assert found == pytest.approx(own[-1:].tolist() * len(found))
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-4
        elif isinstance(module, nn.Dropout):
            assert module.p == 0.2
        elif isinstance(module, CrossAttention):
            assert module.attn_drop == 0.1
        elif isinstance(module, nn.Linear):
            assert not module.bias.any()
            assert module.weight.numel() < 2000 or abs(module.weight.std().item() - 0.02) < 0.002
    for embedding in model.embeddings:
        assert embedding.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    decayed = {
        id(p) for group in parameter_groups(model, weight_decay=1.0) if group["weight_decay"] for p in group["params"]
    }
    names = {
        name for name, parameter in model.named_parameters() if id(parameter) not in decayed and parameter.dim() > 1
    }
    assert names == {f"embeddings.{branch}.{name}" for branch in (0, 1) for name in ("cls_token", "pos_embed")}
    assert sum(len(list(step.parameters())) for step in model.layers()) == len(list(model.parameters()))


# What the branches see


@pytest.mark.parametrize("side", [33, 48, 60, 64, 90])
def test_square_images_are_resized_to_the_branches(side: int):
    model = CrossViT(SMALL.override(image_sizes=(60, 48)))
    x = images(1, 3, side, side)
    for view, size in zip(model.views(x), (60, 48), strict=True):
        expected = x if side == size else F.interpolate(x, (size, size), mode="bicubic", align_corners=False)
        assert torch.equal(view, expected)


def test_other_images_keep_their_proportions():
    model = CrossViT(SMALL.override(image_sizes=(60, (48, 64))))
    assert [tuple(view.shape[2:]) for view in model.views(images(1, 3, 40, 70))] == [(60, 108), (48, 80)]
    assert [tuple(view.shape[2:]) for view in model.views(images(1, 3, 100, 50))] == [(120, 60), (128, 64)]
    wide = CrossViT(SMALL.override(preprocess={"size": (60, 120)}))
    assert wide.image_sizes == [(60, 120), (64, 112)]
    assert stirred(wide)(images(1, 3, 60, 120)).shape == (1, 5)


def test_proportional_branches_grow_with_the_image():
    fixed, growing = (stirred(CrossViT(SMALL.override(resize=resize))) for resize in ("fixed", "proportional"))
    growing.load_state_dict(fixed.state_dict())
    x = images(2, 3, 60, 60)
    assert torch.equal(fixed(x), growing(x))
    larger = images(1, 3, 120, 180)
    assert [tuple(view.shape[2:]) for view in growing.views(larger)] == [(120, 180), (128, 192)]
    assert [tuple(feature.shape[2:]) for feature in growing.forward_features(larger)] == [(10, 15), (8, 12)]
    assert [tuple(feature.shape[2:]) for feature in fixed.forward_features(larger)] == [(5, 8), (4, 6)]
    with pytest.raises(ValueError, match="x must be at least 8 x 8 pixels, got 7 x 60"):
        growing(images(1, 3, 7, 60))
    assert growing(images(1, 3, 8, 8)).isfinite().all()


def test_a_table_of_another_size_loads_as_it_would_be_resized():
    source = stirred(CrossViT(SMALL.override(resize="proportional")))
    target = (
        CrossViT(SMALL.override(preprocess={"size": (120, 60)}, image_sizes=((120, 60), (128, 64)))).double().eval()
    )
    report = load_weights(target, source.state_dict())
    assert [key for key, _ in report.adapted] == ["embeddings.0.pos_embed", "embeddings.1.pos_embed"]
    x = images(2, 3, 120, 60)
    torch.testing.assert_close(target(x), source(x))


def test_export_with_any_size():
    model = stirred(CrossViT(SMALL.override(resize="proportional", depths=((1, 1, 0),)))).float()
    sizes = {0: Dim("batch"), 2: Dim("height", min=32, max=2048), 3: Dim("width", min=32, max=2048)}
    program = torch.export.export(model, (torch.randn(2, 3, 64, 96),), dynamic_shapes=(sizes,), strict=False)
    with torch.no_grad():
        for shape in ((1, 3, 60, 60), (3, 3, 77, 131)):
            x = torch.randn(shape)
            torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


# The exchange


def test_cross_attention_is_the_first_row_of_full_attention():
    layer, theirs = stirred(CrossAttention(12, 3)), nn.MultiheadAttention(12, 3, batch_first=True).double()
    parts = (layer.wq, layer.wk, layer.wv)
    theirs.in_proj_weight.data.copy_(torch.cat([part.weight for part in parts]))
    theirs.in_proj_bias.data.copy_(torch.cat([part.bias for part in parts]))
    theirs.out_proj.load_state_dict(layer.proj.state_dict())
    x = images(2, 30, 12)
    full, weights = theirs(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(layer(x), full[:, :1])
    torch.testing.assert_close(layer.attention_weights(x), weights[:, :, 0])


def test_cost_of_cross_attention_is_linear_in_the_tokens():
    def macs(tokens: int) -> int:
        with torch.device("meta"):
            return cost(CrossAttention(64, 4), torch.randn(1, tokens, 64)).total.macs

    assert macs(200) - macs(100) == macs(300) - macs(200) == 100 * (2 * 64 * 64 + 2 * 64)


@pytest.mark.parametrize(("bias", "scale"), [(True, None), (False, 0.3)])
def test_merged_cross_attention_is_the_same_and_cheaper(bias: bool, scale: float | None):
    layer = stirred(CrossAttention(64, 4, qkv_bias=bias, scale=scale))
    merged = merge(layer).model
    for count in (1, 2, 30):
        x = images(2, count, 64)
        torch.testing.assert_close(merged(x), layer(x))
    macs = cost(merged, images(1, 201, 64)).total.macs - cost(merged, images(1, 101, 64)).total.macs
    assert macs == 100 * 2 * 4 * 64  # instead of 100 * (2 * 64 * 64 + 2 * 64)


def test_the_merged_network_computes_the_same():
    model = stirred(CrossViT(SMALL))
    done = merge(model)
    assert list(done.changed) == [
        f"blocks.{name}.attn"
        for name in ("0.fusion.0", "0.fusion.1", "1.fusion.0.0", "1.fusion.0.1", "1.fusion.1.0", "1.fusion.1.1")
    ]
    x = images(2, 3, 60, 60)
    torch.testing.assert_close(done.model(x), model(x))
    torch.testing.assert_close(done.model.class_attention(x), model.class_attention(x))


def test_only_class_tokens_are_exchanged():
    block = stirred(MultiScaleBlock((8, 12), (2, 1, 0), (2, 3), (2, 3)))
    tokens = [images(2, 10, 8), images(2, 5, 12)]
    encoded, exchanged = block.encode(tokens), block(tokens)
    for before, after in zip(encoded, exchanged, strict=True):
        assert torch.equal(before[:, 1:], after[:, 1:])
        assert not torch.isclose(before[:, 0], after[:, 0]).any()
    order = torch.tensor([0, 3, 1, 4, 2])
    shuffled = block([tokens[0], tokens[1][:, order]])
    torch.testing.assert_close(shuffled[0], exchanged[0])
    torch.testing.assert_close(shuffled[1], exchanged[1][:, order])


def test_the_exchange_follows_the_equations():
    block = stirred(MultiScaleBlock((8, 12), (1, 1, 0), (2, 3), (2, 3)))
    first, second = block.encode([images(2, 10, 8), images(2, 5, 12)])
    norm, _, linear = block.projs[0]
    visitor = torch.cat([linear(F.gelu(norm(first[:, :1]))), second[:, 1:]], 1)
    layer = block.fusion[0]
    fused = visitor[:, :1] + layer.attn(layer.norm1(visitor))
    norm, _, linear = block.revert_projs[0]
    expected = torch.cat([linear(F.gelu(norm(fused))), first[:, 1:]], 1)
    torch.testing.assert_close(block([first, second])[0][:, 1:], block.encode([first, second])[0][:, 1:])
    block.blocks = nn.ModuleList([nn.Sequential(), nn.Sequential()])
    torch.testing.assert_close(block([first, second])[0], expected)


def test_three_branches_visit_each_other_in_turn():
    block = stirred(MultiScaleBlock((8, 12, 6), (1, 1, 1, 1), (2, 3, 1), (2, 3, 1)))
    tokens = [images(2, 10, 8), images(2, 5, 12), images(2, 7, 6)]
    outputs = block(tokens)
    assert [output.shape for output in outputs] == [token.shape for token in tokens]
    assert block.fusion[2][0].attn.wq.in_features == 8
    changed = block([tokens[0], tokens[1] + torch.randn_like(tokens[1]), tokens[2]])
    assert not torch.isclose(changed[0][:, 0], outputs[0][:, 0]).any()
    assert torch.equal(changed[2], outputs[2])


def test_scores_are_the_mean_of_the_branches():
    model = stirred(CrossViT(SMALL))
    x = images(2, 3, 60, 60)
    tokens = model.forward_branches(x)[1]
    scores = [head(token) for head, token in zip(model.head, tokens, strict=True)]
    torch.testing.assert_close(model(x), (scores[0] + scores[1]) / 2)
    torch.testing.assert_close(model.forward_head(torch.cat(tokens, 1)), model(x))
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), torch.cat(tokens, 1))
    model.reset_classifier(3)
    assert [head.weight.shape for head in model.head] == [(3, 8), (3, 12)]


def test_class_attention_shows_where_the_class_tokens_look():
    model = stirred(CrossViT(SMALL))
    seen: list[Tensor] = []
    layer = model.blocks[1].fusion[0][0]
    layer.norm1.register_forward_hook(lambda _, __, output: seen.append(layer.attn.attention_weights(output)))
    x = images(2, 3, 60, 60)
    maps = model.class_attention(x)
    assert [[tuple(weights.shape) for weights in block] for block in maps] == 2 * [[(2, 3, 4, 4), (2, 2, 5, 5)]]
    torch.testing.assert_close(maps[1][0].flatten(2), seen[0][..., 1:])
    assert (maps[1][0].sum((2, 3)) < 1).all()


# Checkpoints

AUTHORS_KEYS = {
    "pos_embed.0": (1, 26, 8),
    "cls_token.1": (1, 1, 12),
    "blocks.0.blocks.1.1.attn.qkv.weight": (36, 12),
    "blocks.0.projs.0.0.weight": (8,),
    "blocks.0.projs.0.2.weight": (12, 8),
    "blocks.0.fusion.0.attn.wq.weight": (12, 12),
    "blocks.1.fusion.1.1.attn.proj.bias": (8,),
    "blocks.1.revert_projs.0.2.weight": (8, 12),
    "norm.1.weight": (12,),
    "head.1.weight": (5, 12),
}
PLAIN_KEYS = {"patch_embed.0.proj.weight": (8, 3, 12, 12), "patch_embed.1.proj.bias": (12,)}
DAGGER_KEYS = {
    "patch_embed.0.proj.0.weight": (2, 3, 7, 7),
    "patch_embed.0.proj.2.bias": (4,),
    "patch_embed.1.proj.4.weight": (12, 6, 3, 3),
}


def authors(state: dict[str, Tensor], *, plain: bool) -> dict[str, Tensor]:
    """Our state dict as the authors' code names it."""
    foreign = {}
    for key, value in state.items():
        key = re.sub(r"^embeddings\.(\d)\.(cls_token|pos_embed)$", r"\2.\1", key)
        key = re.sub(
            r"^embeddings\.(\d)\.proj\.0\." if plain else r"^embeddings\.(\d)\.proj\.(?=\d)",
            r"patch_embed.\1.proj.",
            key,
        )
        foreign[key] = value
    return foreign


def timm(state: dict[str, Tensor], *, plain: bool) -> dict[str, Tensor]:
    """Our state dict as timm names it."""
    return {
        re.sub(r"^(cls_token|pos_embed)\.", r"\1_", key): value for key, value in authors(state, plain=plain).items()
    }


@pytest.mark.parametrize("wrapped", ["", "model"])
@pytest.mark.parametrize("multi_conv", [False, True], ids=["plain", "dagger"])
@pytest.mark.parametrize("layout", [authors, timm])
def test_foreign_layouts_load_completely(layout: Any, multi_conv: bool, wrapped: str):
    config = SMALL.override(multi_conv=multi_conv)
    source = stirred(CrossViT(config))
    foreign = layout(source.state_dict(), plain=not multi_conv)
    keys = AUTHORS_KEYS | (DAGGER_KEYS if multi_conv else PLAIN_KEYS)
    if layout is timm:
        keys = {re.sub(r"^(cls_token|pos_embed)\.", r"\1_", key): shape for key, shape in keys.items()}
    assert {key: tuple(foreign[key].shape) for key in keys} == keys
    model = CrossViT(config).double().eval()
    report = load_weights(model, {wrapped: foreign} if wrapped else foreign)
    assert (report.layout, report.missing, report.unexpected) == ("authors", (), ())
    x = images(2, 3, 50, 50)
    with torch.no_grad():
        torch.testing.assert_close(model(x), source(x), rtol=0, atol=0)


def test_a_checkpoint_of_another_task_and_size_loads():
    source = stirred(CrossViT(SMALL))
    config = SMALL.override(num_classes=3, in_channels=1, preprocess={"size": 96})
    model = CrossViT(config).double()
    report = load_weights(model, authors(source.state_dict(), plain=True))
    adapted = {key for key, _ in report.adapted}
    assert adapted >= {"embeddings.0.pos_embed", "embeddings.1.proj.0.weight", "head.0.weight", "head.1.bias"}
    torch.testing.assert_close(
        model.embeddings[0].proj[0].weight, source.embeddings[0].proj[0].weight.sum(1, keepdim=True)
    )


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_sizes": (250, 224)}, "branch 0: image size 250 is not divisible by patch size 12"),
        ({"image_sizes": (240, (224, 230))}, "branch 1: image size 230 is not divisible by patch size 16"),
        ({"image_sizes": (240,)}, "image_sizes must have an entry for each of the 2 branches, got (240,)"),
        ({"num_heads": (2, 5)}, "channels must be divisible by num_heads, got 12 and 5"),
        ({"num_heads": (2, 3, 1)}, "num_heads must have an entry for each of the 2 branches, got (2, 3, 1)"),
        ({"multi_conv": True, "patch_sizes": (12, 8)}, "multi_conv needs patch sizes of 12 or 16, got (12, 8)"),
        ({"depths": ()}, "depths must hold at least one multi-scale block, got none"),
        (
            {"depths": ((0, 1, 0),)},
            "depth must give each branch a block or more, and 0 or more layers last, got (0, 1, 0)",
        ),
        ({"depths": ((1, 1),)}, "must name the same two or more branches, got (8, 12), (2, 3), (2, 3) and (1, 1)"),
        ({"resize": "crop"}, "unknown resize 'crop'"),
    ],
)
def test_impossible_configs_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        CrossViT(SMALL.override(**changes))
