"""UniFormer: counts, invariants of the paper, layouts and switches that no shape shows, refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas import load_weights, save_weights
from convatlas.cost import cost
from convatlas.errors import CheckpointError, UnknownName
from convatlas.networks.registry import create_model, list_models, model_config, published_files
from convatlas.networks.uniformer import image, light, video
from convatlas.networks.uniformer.blocks import BlockOptions, GlobalBlock, LocalBlock, SplitBlock, WindowBlock
from convatlas.networks.uniformer.image import UniFormer, UniFormerConfig, mix_tokens
from convatlas.networks.uniformer.inflation import inflate_state_dict, inflate_weight
from convatlas.networks.uniformer.light import EvoBlock, LightConfig
from convatlas.networks.uniformer.video import UniFormer3dConfig
from convatlas.nn.drop import DropPath
from convatlas.surgery import merge
from convatlas.training.optim import parameter_groups
from convatlas.weights import read_checkpoint

PARAMETERS = {
    "uniformer_small": 21_545_256,
    "uniformer_small_plus": 24_032_552,
    "uniformer_small_plus_dim64": 24_032_552,
    "uniformer_base": 49_776_552,
    "uniformer_base_ls": 49_796_520,
    "uniformer_small_tl": 22_058_256,
    "uniformer_small_plus_tl": 24_545_552,
    "uniformer_base_tl": 50_289_552,
    "uniformer_base_dim64_tl": 50_289_552,
    "uniformer_large_ls": 100_103_888,
    "uniformer_xxs": 10_215_280,
    "uniformer_xs": 16_509_264,
    "uniformer3d_small": 21_400_400,
    "uniformer3d_base": 49_813_200,
    "uniformer3d_small_split": 27_847_504,
    "uniformer3d_xxs": 9_833_896,
    "uniformer3d_xs": 16_099_552,
}
#: In units of 10^9, for the input of the published size.
MULTIPLY_ADDS = {
    "uniformer_small_plus": 4.201,
    "uniformer_xxs_160": 0.657,
    "uniformer3d_small_split": 36.68,
}
SIZES: dict[str, Any] = {"dims": (8, 8, 12, 16), "mlp_ratios": (2, 3, 2, 2), "head_dim": 4, "num_classes": 5}
TINY = UniFormerConfig().override(depths=(1, 1, 2, 1), **SIZES)
TINY_3D = UniFormer3dConfig().override(depths=(1, 1, 2, 1), **SIZES)
PRUNED: dict[str, Any] = {"prune_ratios": ((1, 0.5, 0.6), (0.5, 0.5)), "trade_offs": ((1, 0.5, 0.3), (0.5, 0.7))}
LIGHT = LightConfig().override(depths=(1, 1, 3, 2), **SIZES, **PRUNED)
LIGHT_3D = LIGHT.override(preprocess=TINY_3D.preprocess)
WIDE = BlockOptions(channels=12, num_heads=3, mlp_ratio=2)


def stirred(model: nn.Module, scale: float = 0.3) -> Any:
    """The model in float64 and evaluation mode, with weights and statistics that all matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                value += (scale if value.dim() == 1 else 0.1) * torch.randn(value.shape, generator=generator)
            if name.endswith("running_var"):
                value.clamp_(min=0.5)
    return model.double().eval()


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# Counts


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_those_of_the_authors_code(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_every_variant_has_the_count_of_its_size() -> None:
    """Names that add a size, frames or a head dimension change no weight; dense ones exchange norm and head."""
    for name in list_models("uniformer*"):
        shorter = next((key for key in PARAMETERS if key == name or name.startswith(f"{key}_")), None)
        assert shorter or "dense" in name, name
    with torch.device("meta"):
        assert (
            sum(p.numel() for p in create_model("uniformer_small_dense_h14", num_classes=0).parameters()) == 21_033_280
        )
        assert len(create_model("uniformer3d_small_ss").head.weight) == 174


@pytest.mark.parametrize("name", MULTIPLY_ADDS)
def test_multiply_adds_are_those_of_the_authors_code(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name).eval()
        inputs = model.example_inputs()
    assert cost(model, *inputs).total.macs / 1e9 == pytest.approx(MULTIPLY_ADDS[name], rel=1e-3)


def test_dense_backbone_at_the_size_of_detection() -> None:
    with torch.device("meta"):
        model = create_model("uniformer_small_dense_h14", num_classes=0).eval()
        x = torch.empty(1, 3, 800, 1280)
        assert [tuple(each.shape[1:]) for each in model.forward_features(x)] == [
            (64, 200, 320), (128, 100, 160), (320, 50, 80), (512, 25, 40)
        ]  # fmt: skip
        assert cost(model, x).total.macs / 1e9 == pytest.approx(98.77, abs=0.02)


def test_half_of_the_tokens_need_a_quarter_of_the_products() -> None:
    with torch.device("meta"):
        arguments = torch.empty(1, 64, 20, 20), torch.empty(1, 1, 64), torch.empty(1, 400)
        options = BlockOptions(channels=64, num_heads=2)
        products = {}
        for ratio in (1.0, 0.5):
            counted = cost(EvoBlock(options, prune_ratio=ratio), *arguments).operations
            products[ratio] = sum(macs for name, macs in counted.items() if "attention" in name)
    assert products[0.5] / products[1.0] == pytest.approx((202 / 401) ** 2)


# What no shape shows


def test_variants_carry_what_their_checkpoints_need() -> None:
    heads = {name: model_config(name).head_dim for name in list_models("uniformer_*")}
    assert {name for name, size in heads.items() if size == 32} == {
        *("uniformer_small_plus", "uniformer_small_tl", "uniformer_small_plus_tl", "uniformer_base_tl"),
        *("uniformer_small_tl_384", "uniformer_small_plus_tl_384", "uniformer_base_tl_384"),
        *("uniformer_xs", "uniformer_xs_192", "uniformer_xs_dense"),
    }
    assert {model_config(name).head_dim for name in list_models("uniformer3d_[sb]*")} == {64}
    assert model_config("uniformer_base").drop_path == 0.3
    assert model_config("uniformer_large_ls").drop_path == 0.4
    assert model_config("uniformer_xxs_dense").drop_path == 0.0
    assert model_config("uniformer_large_ls_384").preprocess.shape == (384, 384)
    assert model_config("uniformer3d_base_f32").preprocess.size == (32, 224, 224)
    dense = [model_config(f"uniformer_base_dense{kind}") for kind in ("", "_h14")]
    assert [(each.stage3, each.window_size) for each in dense] == [("global", 14), ("hybrid", 14)]
    assert published_files("uniformer_large_ls_384")[0].figures == {"ImageNet-1K top-1 [%]": 86.3}
    assert [list(file.figures.values()) for file in published_files("uniformer3d_base_f32_ss")] == [[61.0], [71.2]]
    published = {**image.PUBLISHED, **light.PUBLISHED, **video.PUBLISHED}
    assert set(published) <= set(list_models("uniformer*"))


def test_a_checkpoint_tells_its_head_dimension(tmp_path: Path) -> None:
    model = stirred(UniFormer(TINY))
    path = save_weights(model, tmp_path / "model.safetensors")
    config = UniFormerConfig().override(**read_config(path))
    assert config == TINY
    again, other = config.build().double().eval(), TINY.override(head_dim=2).build().double().eval()
    x = noise(2, 3, 64, 64)
    for network in (again, other):
        load_weights(network, path)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
        assert not torch.allclose(other(x), model(x), atol=1e-4)  # it loads all the same: nothing else tells


def read_config(path: Path) -> dict[str, Any]:
    import json

    return json.loads(read_checkpoint(path).metadata["config"])


def authors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict under the authors' names."""
    import re

    state = {}
    for key, value in model.state_dict().items():
        key = re.sub(r"^stages\.(\d)\.(\w+)\.", lambda found: f"{found[2]}{int(found[1]) + 1}.", key)
        if found := re.search(r"\.scale(\d)\.gamma$", key):
            key = f"{key[: found.start()]}.gamma_{found[1]}"
            axes = getattr(model, "axes", 2)
            value = value.reshape(1, -1, *[1] * axes) if key.startswith(("blocks1", "blocks2")) else value
        state[key] = value.clone()
    return state


@pytest.mark.parametrize(
    "config",
    [
        TINY.override(conv_stem=True, token_head=True, layer_scale_init=0.1, local_layer_scale=True),
        TINY.override(pyramid=True),
        TINY_3D.override(split=True),
        LIGHT.override(layer_scale_init=0.1),
        LIGHT_3D.override(layer_scale_init=0.1),
        LIGHT.override(pyramid=True),
    ],
    ids=["plus_tl_ls", "dense", "split", "light_ls", "light_3d_ls", "light_dense"],
)
def test_authors_layout_loads_completely(config: Any) -> None:
    model, other = stirred(config.build()), config.build().double().eval()
    state = authors(model)
    assert not any(key.startswith("stages.") or "scale" in key for key in state)
    report = load_weights(other, {"model": state})
    assert (report.layout, report.missing, report.unexpected, report.mismatched) == ("authors", (), (), ())
    x = noise(1, 3, *((4,) if len(config.preprocess.shape) == 3 else ()), 64, 64)
    with torch.no_grad():
        assert torch.equal(other(x), model(x))
    detector = load_weights(other, {"state_dict": {f"backbone.{key}": value for key, value in state.items()}})
    assert detector.prefix == "backbone."


def test_gamma_three_belongs_to_images_only() -> None:
    flat, deep = (set(authors(config.override(layer_scale_init=0.1).build())) for config in (LIGHT, LIGHT_3D))
    assert flat - deep == {f"blocks{place}.gamma_3" for place in ("3.0", "3.1", "3.2", "4.0", "4.1")}


def test_initial_weights_norms_and_drop_path() -> None:
    torch.manual_seed(0)
    model = TINY.override(dims=(32, 64, 64, 96), drop_path=0.4, drop=0.2, attn_drop=0.1).build()
    rates = [module.rate for module in model.modules() if isinstance(module, DropPath)]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.4, 5))
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            assert module.eps == (1e-5 if "patch_embed" in name else 1e-6), name
        elif isinstance(module, nn.BatchNorm2d):
            assert module.eps == 1e-5
        elif isinstance(module, nn.Dropout):
            assert module.p == (0.2 if name != "stages.1.drop" and not name.endswith(("2.drop", "3.drop")) else 0), name
        elif isinstance(module, nn.Linear):
            assert not module.bias.any()
            assert module.weight.numel() < 2000 or abs(module.weight.std().item() - 0.02) < 0.002
    split = TINY_3D.override(split=True).build()
    fresh = [module for module in split.modules() if isinstance(module, SplitBlock)]
    assert len(fresh) == 3
    for block in fresh:
        assert not block.t_attn.qkv.weight.any()
        assert (block.t_attn.proj.weight == 1).all()
        assert not block.t_attn.proj.bias.any()
    kept = [group for group in parameter_groups(LIGHT.build(), weight_decay=0.05) if group["weight_decay"] == 0]
    assert any(tuple(parameter.shape) == (1, 1, 12) for group in kept for parameter in group["params"])


# The blocks


def test_one_window_is_global_attention() -> None:
    whole, windowed = stirred(GlobalBlock(WIDE)), WindowBlock(WIDE, window_size=6).double()
    windowed.load_state_dict(whole.state_dict())
    x = noise(2, 12, 6, 6)
    torch.testing.assert_close(windowed(x), whole(x))
    padded = noise(2, 12, 5, 6)
    assert not torch.allclose(windowed(padded), whole(padded), atol=1e-3)  # the padding takes part


def test_windows_do_not_see_each_other() -> None:
    block = stirred(WindowBlock(WIDE, window_size=3))
    block.pos_embed = nn.Identity()
    x = noise(1, 12, 4, 7)
    changed = x.clone()
    changed[:, :, 3:] += 1
    assert torch.equal(block(changed)[:, :, :3], block(x)[:, :, :3])
    assert not torch.allclose(block(changed)[:, :, 3:], block(x)[:, :, 3:])


def test_every_fourth_block_of_a_hybrid_stage_is_global() -> None:
    with torch.device("meta"):
        stage = create_model("uniformer_small_dense_h14").stages[2]
    assert [isinstance(block, WindowBlock) for block in stage.blocks] == [True, True, True, False] * 2
    x = noise(1, 3, 96, 96)
    hybrid, whole = (TINY.override(stage3=kind, window_size=6).build().double().eval() for kind in ("hybrid", "global"))
    hybrid.load_state_dict(stirred(whole).state_dict())
    torch.testing.assert_close(hybrid(x), whole(x))


def test_a_centre_inflated_local_block_is_the_2d_block_on_each_frame() -> None:
    flat, deep = (LocalBlock(BlockOptions(channels=6, axes=axes)) for axes in (2, 3))
    stirred(flat)
    state = flat.state_dict()
    wanted = deep.state_dict()
    inflated = {
        key: inflate_weight(value, wanted[key].shape[2], "center") if value.dim() == 4 else value
        for key, value in state.items()
    }
    deep.double().eval().load_state_dict(inflated)
    x = noise(2, 6, 3, 7, 5)
    torch.testing.assert_close(deep(x), torch.stack([flat(x[:, :, frame]) for frame in range(3)], dim=2))


def test_divided_attention_keeps_frames_apart_in_space_and_positions_in_time() -> None:
    block = stirred(SplitBlock(BlockOptions(channels=12, num_heads=3, mlp_ratio=2, axes=3)))
    block.pos_embed = nn.Identity()
    x = noise(1, 12, 3, 2, 2).requires_grad_()
    y = block(x)
    without_time = copy.deepcopy(block)
    without_time.init_time()
    z = without_time(x)
    gradient = torch.autograd.grad(z[0, :, 0].sum(), x)[0]
    assert gradient[0, :, 0].any()
    assert not gradient[0, :, 1:].any()  # a fresh attention over time adds nothing
    through_time = torch.autograd.grad(y[0, :, 0].sum(), x)[0]
    assert through_time[0, :, 1:].abs().amin() > 0


# Light networks


def plain_block(block: EvoBlock, tokens: Tensor) -> Tensor:
    """What a vision transformer's block makes of all tokens."""
    tokens = tokens + block.attn(block.norm1(tokens))
    return tokens + block.mlp(block.norm2(tokens))


def test_without_pruning_it_is_a_vision_transformer_with_a_class_token() -> None:
    block = stirred(EvoBlock(WIDE))
    x, token = noise(2, 12, 3, 4), noise(2, 1, 12)
    y, after, attention = block(x, token, None)
    embedded = x + block.pos_embed(x)
    expected = plain_block(block, torch.cat([token, embedded.flatten(2).transpose(1, 2)], 1))
    torch.testing.assert_close(after, expected[:, :1])
    torch.testing.assert_close(y.flatten(2).transpose(1, 2), expected[:, 1:])
    assert attention.shape == (2, 12)
    config = LIGHT.override(prune_ratios=((1, 1, 1), (1, 1)))
    assert stirred(config.build())(noise(1, 3, 64, 64)).isfinite().all()


def test_pruned_block_by_its_definition() -> None:
    ratio, trade = 0.4, 0.3
    options = BlockOptions(channels=12, num_heads=3, mlp_ratio=2, layer_scale_init=0.7)
    block = stirred(EvoBlock(options, prune_ratio=ratio, trade_off=trade))
    x, token, attention = noise(1, 12, 3, 4), noise(1, 1, 12), torch.rand(1, 12, dtype=torch.float64)
    y, after, running = block(x, token, attention)
    tokens = (x + block.pos_embed(x)).flatten(2)[0].T
    order = sorted(range(12), key=lambda place: -float(attention[0, place]))
    kept, dropped = order[: int(12 * ratio)], order[int(12 * ratio) :]
    share = attention[0, dropped] / attention[0, dropped].sum()
    z = torch.cat([token[0], tokens[kept], (share[:, None] * tokens[dropped]).sum(0, keepdim=True)])[None]
    u = block.attn(block.norm1(z))
    z = z + block.scale1.gamma * u
    v = block.mlp(block.norm2(z))
    z = z + block.scale2.gamma * v
    expected = torch.empty_like(tokens)
    expected[kept] = z[0, 1:-1]
    expected[dropped] = tokens[dropped] + block.scale3.gamma * (u + v)[0, -1]
    torch.testing.assert_close(y.flatten(2)[0].T, expected)
    torch.testing.assert_close(after, z[:, :1])
    _, row = block.attn.with_class_row(block.norm1(torch.cat([token[0], tokens[kept]])[None]))
    assert row.shape == (1, 1 + len(kept))
    others = [place for place in range(12) if place not in kept]
    assert torch.equal(running[0, others], attention[0, others])
    assert not torch.equal(running[0, kept], attention[0, kept])


def test_the_class_row_is_that_of_the_attention() -> None:
    block = stirred(EvoBlock(WIDE))
    x = noise(2, 5, 12)
    query, key, _ = (part.unflatten(2, (3, 4)).transpose(1, 2) for part in block.attn.qkv(x).chunk(3, -1))
    scores = (query @ key.transpose(2, 3) / 2).softmax(-1)
    y, row = block.attn.with_class_row(x)
    torch.testing.assert_close(row, scores.mean(1)[:, 0])
    torch.testing.assert_close(y, block.attn(x))


@pytest.mark.parametrize("grid", [(4, 6), (5, 7), (3, 5, 4)])
def test_pooled_attention_keeps_its_sum(grid: tuple[int, ...]) -> None:
    attention = torch.rand(2, torch.Size(grid).numel(), dtype=torch.float64)
    pooled = light._pooled(attention, grid)
    height, width = grid[-2] // 2, grid[-1] // 2
    assert pooled.shape[1] == (grid[0] if len(grid) == 3 else 1) * height * width
    torch.testing.assert_close(pooled.sum(1), attention.sum(1))
    first = attention.reshape(2, *grid)[..., :2, :2].reshape(2, *grid[:-2], 4).mean(-1).reshape(2, -1)[:, 0]
    ratio = pooled[:, 0] / first
    second = attention.reshape(2, *grid)[..., :2, 2:4].reshape(2, *grid[:-2], 4).mean(-1).reshape(2, -1)[:, 0]
    torch.testing.assert_close(pooled[:, 1] / second, ratio)


@pytest.mark.parametrize("config", [LIGHT, LIGHT_3D], ids=["image", "video"])
def test_light_networks_train_two_heads_and_use_one(config: LightConfig) -> None:
    model = stirred(config.build())
    x = noise(2, 3, *((3,) if config is LIGHT_3D else ()), 64, 96)
    features = model.forward_stages(x)
    assert torch.equal(model(x), model.forward_head(features.maps[-1]))
    model.train()
    scores, class_scores = model(x)
    torch.testing.assert_close(class_scores, model.head_cls(model.norm_cls(model.forward_stages(x).class_token[:, 0])))
    assert scores.shape == class_scores.shape == (2, 5)
    (scores.sum() + class_scores.sum()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.reset_classifier(3) is None
    assert [each.shape for each in model(x)] == [(2, 3)] * 2


def test_float32_attention_keeps_its_precision_under_autocast() -> None:
    torch.manual_seed(0)
    plain = EvoBlock(WIDE)
    exact = copy.deepcopy(plain)
    exact.attn.float32 = True
    x = torch.randn(2, 7, 12)
    expected = plain.attn.with_class_row(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(exact.attn.with_class_row(x)[0], expected)
        assert not torch.equal(plain.attn.with_class_row(x)[0].float(), expected)
    assert LIGHT.override(float32_attention=True).build().stages[2].blocks[0].attn.float32


# Images


def test_token_head_adds_half_of_the_best_token() -> None:
    model = stirred(TINY.override(token_head=True).build())
    plain = TINY.build().double().eval()
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if "aux_head" not in key})
    x = noise(2, 3, 64, 96)
    features = model.forward_features(x)[-1]
    tokens = model.aux_head(features.flatten(2).transpose(1, 2))
    torch.testing.assert_close(model(x), plain(x) + 0.5 * tokens.amax(1))
    output = model(x, (0, 0, 0, 0))
    torch.testing.assert_close(output.image, plain(x))
    torch.testing.assert_close(output.tokens, tokens)
    assert (output.box, output.grid) == ((0, 0, 0, 0), (2, 3))
    nn.init.zeros_(model.aux_head.weight)
    nn.init.zeros_(model.aux_head.bias)
    torch.testing.assert_close(model(x), plain(x))


def test_mixed_tokens_are_put_back() -> None:
    model = stirred(TINY.override(token_head=True, conv_stem=True).build())
    x = noise(4, 3, 64, 96)
    whole = (0, 0, 16, 24)  # everything comes from the other sample
    output, swapped = model(x, whole), model(x.flip(0), (0, 0, 0, 0))
    torch.testing.assert_close(output.image, swapped.image)
    torch.testing.assert_close(output.tokens, swapped.tokens.flip(0))
    assert output.box == (0, 0, 2, 3)
    assert model(x, (3, 8, 13, 23)).box == (0, 1, 1, 2)
    maps = noise(2, 3, 5, 7)
    assert torch.equal(mix_tokens(mix_tokens(maps, (1, 2, 4, 6)), (1, 2, 4, 6)), maps)
    assert torch.equal(mix_tokens(maps, (1, 2, 4, 6))[0, :, 1:4, 2:6], maps[1, :, 1:4, 2:6])


def test_dense_backbone_norms_each_map_and_passes_on_the_other() -> None:
    dense = stirred(TINY.override(pyramid=True).build())
    x = raw = noise(1, 3, 64, 96)
    for stage, ours in zip(dense.stages, dense.forward_features(x), strict=True):
        raw, norm = stage(raw), stage.norm
        expected = F.layer_norm(raw.movedim(1, -1), norm.normalized_shape, norm.weight, norm.bias, 1e-6)
        torch.testing.assert_close(ours, expected.movedim(-1, 1))
    assert "norm.weight" not in dense.state_dict()
    with pytest.raises(CheckpointError, match=r"missing in the checkpoint: stages\.0\.norm"):
        load_weights(dense, authors(TINY.build()))


def test_gradient_checkpointing_of_the_first_blocks() -> None:
    torch.manual_seed(0)
    model = TINY.override(depths=(2, 1, 2, 1), drop_path=0.0).build().double().train()
    calls: list[int] = []
    for module in model.modules():
        if isinstance(module, LocalBlock | GlobalBlock):
            module.register_forward_pre_hook(lambda *_: calls.append(1))
    x = noise(2, 3, 64, 64)
    gradients, counts = [], []
    for blocks in ((0, 0, 0, 0), (1, 0, 2, 0)):
        model.set_gradient_checkpointing(blocks=blocks)
        model.zero_grad()
        calls.clear()
        model(x).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        counts.append(len(calls))
    assert counts == [6, 9]
    torch.testing.assert_close(gradients[0], gradients[1])
    with pytest.raises(ValueError, match=r"blocks must be 4 numbers of at least 0, got \(1,\)"):
        model.set_gradient_checkpointing(blocks=(1,))


def test_merging_folds_norms_and_factors() -> None:
    model = stirred(TINY.override(conv_stem=True, layer_scale_init=0.5, local_layer_scale=True).build())
    x = noise(2, 3, 45, 61)
    merged = merge(model, x)
    torch.testing.assert_close(merged.model(x), model(x))
    assert [name for name, _ in merged.skipped] == ["norm"]  # the mean over positions lies behind it


def test_images_of_any_size_and_channels() -> None:
    model = stirred(TINY.override(in_channels=4).build())
    assert model(noise(1, 4, 33, 95)).shape == (1, 5)
    assert stirred(TINY.override(conv_stem=True).build())(noise(1, 3, 1, 9)).isfinite().all()


# Video


@pytest.mark.parametrize("frames", [1, 4, 5])
def test_any_number_of_frames(frames: int) -> None:
    model = stirred(TINY_3D.override(overlapping_time=True).build())
    maps = model.forward_features(noise(1, 3, frames, 64, 33))
    assert [tuple(each.shape[2:]) for each in maps] == [
        ((frames + 1) // 2, 64 // stride, 33 // stride) for stride in (4, 8, 16, 32)
    ]


def test_image_weights_start_a_network_for_video() -> None:
    flat = stirred(TINY.build())
    deep, centred = (TINY_3D.override(num_classes=3).build().double().eval() for _ in range(2))
    report = load_weights(deep, authors(flat))
    assert report.layout == "images"
    assert not report.missing
    assert [key for key, _ in report.adapted] == ["head.weight", "head.bias"]
    weight = flat.state_dict()["stages.0.patch_embed.proj.weight"]
    torch.testing.assert_close(deep.state_dict()["stages.0.patch_embed.proj.weight"].sum(2), weight)
    load_weights(centred, inflate_state_dict(flat.state_dict(), centred, "center"))
    inflated = centred.state_dict()["stages.1.blocks.0.attn.weight"]
    assert torch.equal(inflated[:, :, 2], flat.state_dict()["stages.1.blocks.0.attn.weight"])
    assert not inflated[:, :, [0, 1, 3, 4]].any()
    still = noise(1, 3, 64, 64)
    with torch.no_grad():
        for ours, theirs in zip(centred.forward_features(still[:, :, None]), flat.forward_features(still), strict=True):
            torch.testing.assert_close(ours[:, :, 0], theirs)  # of a single frame
    light_3d = LIGHT_3D.build().double()
    assert load_weights(light_3d, authors(stirred(LIGHT.build()))).layout == "images"


def test_weights_of_another_depth_are_refused() -> None:
    with pytest.raises(CheckpointError, match="does not fit"):
        load_weights(TINY.build(), authors(TINY.override(depths=(1, 1, 3, 1)).build()))


# Refusals


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TINY.override(head_dim=5).build(), "head_dim must divide dims of the last two stages, got 5 and"),
        (lambda: TINY.override(depths=(1, 1, 1)).build(), r"must be of 4 stages with at least one block each"),
        (lambda: TINY.override(window_size=0).build(), "window_size must be at least 1, got 0"),
        (lambda: TINY.override(local_layer_scale=True).build(), "local_layer_scale needs layer_scale_init, got None"),
        (lambda: WindowBlock(WIDE, window_size=0), "window_size must be at least 1, got 0"),
        (lambda: LIGHT.override(prune_ratios=((0.5, 1, 1), (1, 1))).build(), "prune_ratios must begin with 1"),
        (lambda: LIGHT.override(prune_ratios=((1, 0, 1), (1, 1))).build(), "prune_ratio must be above 0 and at most 1"),
        (lambda: LIGHT.override(trade_offs=((1, 1), (1, 1))).build(), "trade_offs must hold a number for each block"),
        (lambda: EvoBlock(WIDE, prune_ratio=0.5)(noise(1, 12, 2, 2).float(), torch.ones(1, 1, 12), None), "attention"),
        (lambda: TINY.build()(torch.ones(1, 3, 64, 64), (0, 0, 1, 1)), "box needs a network with a token head"),
        (lambda: TINY.override(token_head=True).build()(torch.ones(1, 3, 64, 64), (0, 0, 17, 1)), "box must lie on"),
        (lambda: TINY.build()(torch.ones(1, 3, 31, 64)), "x must be at least 32 x 32 pixels, got 31 x 64"),
        (lambda: TINY_3D.build()(torch.ones(1, 3, 64, 64)), r"x must be \(B, 3, D, H, W\), got"),
        (lambda: inflate_weight(torch.ones(1, 1, 3), 3), r"weight must be \(O, I, kH, kW\), got \(1, 1, 3\)"),
        (lambda: inflate_weight(torch.ones(1, 1, 3, 3), 0), "frames must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_built_or_run_is_named(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_unknown_names_are_told() -> None:
    with pytest.raises(UnknownName, match="stage3"):
        TINY.override(stage3="windows").build()
    with pytest.raises(UnknownName, match="mode"):
        inflate_weight(torch.ones(1, 1, 3, 3), 3, "middle")  # type: ignore[arg-type]
