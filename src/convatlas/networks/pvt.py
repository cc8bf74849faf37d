"""Pyramid Vision Transformer (PVT) and PVTv2: transformers with a feature pyramid and reduced keys and values.

Wang, Xie, Li, Fan, Song, Liang, Lu, Luo, Shao: "Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction
without Convolutions", ICCV 2021, arXiv 2102.12122. Version 2, by the same authors: "PVT v2: Improved Baselines with
Pyramid Vision Transformer", Computational Visual Media 2022, arXiv 2106.13797.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.networks.base import Backbone, BackboneConfig, Feature, PublishedFile
from convatlas.nn.attention import check_heads
from convatlas.nn.drop import DropPath, drop_path_rates
from convatlas.nn.embedding import PatchEmbed
from convatlas.nn.init import init_linear
from convatlas.nn.mlp import Mlp
from convatlas.ops.attention import multi_head_attention
from convatlas.ops.position import resize_position_embedding
from convatlas.ops.tokens import map_to_tokens, prepend_tokens, tokens_to_map
from convatlas.weights import Layout, PositionTable

__all__ = [
    "PUBLISHED",
    "PVT",
    "VARIANTS",
    "DepthwiseTokens",
    "OverlapPatchEmbed",
    "PVTConfig",
    "PVTv2",
    "PVTv2Config",
    "SpatialReductionAttention",
]


@dataclass(frozen=True, kw_only=True)
class _PyramidConfig(BackboneConfig):
    """Config of both versions.

    Attributes:
        depths: blocks of each stage.
        dims: channels of each stage.
        num_heads: attention heads of each stage.
        mlp_ratios: hidden width of the MLP over its channels, for each stage.
        sr_ratios: by how much the sides of the map of keys and values are reduced, for each stage (R in the paper).
        qkv_bias: whether queries, keys and values have a bias.
        qk_scale: factor of the attention scores; (channels / heads)^-0.5 when left out.
        drop: rate of the dropout in the MLPs, behind the attentions and behind the position embeddings.
        attn_drop: rate of the dropout of the attention weights.
        drop_path: rate at the last block; it rises linearly from 0.
    """

    depths: tuple[int, ...] = (2, 2, 2, 2)
    dims: tuple[int, ...] = (64, 128, 320, 512)
    num_heads: tuple[int, ...] = (1, 2, 5, 8)
    mlp_ratios: tuple[float, ...] = (8, 8, 4, 4)
    sr_ratios: tuple[int, ...] = (8, 4, 2, 1)
    qkv_bias: bool = True
    qk_scale: float | None = None
    drop: float = 0.0
    attn_drop: float = 0.0
    drop_path: float = 0.1


@dataclass(frozen=True, kw_only=True)
class PVTConfig(_PyramidConfig):
    """Config of `PVT`; the position tables are made for the size of ``preprocess``, patches that are cut left out.

    Attributes:
        patch_size: side of a patch of the first stage; in the others it is 2.
        class_token: put a token into the last stage that becomes the class scores. False makes the network of the
            authors' detectors and segmenters, which has none, nor the norm behind it; its classifier, if it gets one,
            averages the positions.
    """

    patch_size: int = 4
    class_token: bool = True

    def build(self) -> PVT:
        return PVT(self)


@dataclass(frozen=True, kw_only=True)
class PVTv2Config(_PyramidConfig):
    """Config of `PVTv2`.

    Attributes:
        linear: pool keys and values to 7 x 7 positions in every stage, whatever ``sr_ratios`` are (linear SRA).
    """

    linear: bool = False

    def build(self) -> PVTv2:
        return PVTv2(self)


class SpatialReductionAttention(nn.Module):
    """Attention whose keys and values are read from a reduced map (PVT, equations 1 to 3; PVTv2, section 3.2).

    With R = ``sr_ratio`` above 1, a convolution of kernel and stride R and a LayerNorm reduce the map to
    floor(H / R) x floor(W / R) positions, so that the products of N tokens take 2 N (N / R^2) C multiply-adds.
    ``linear`` pools the map to 7 x 7 positions instead, followed by a 1 x 1 convolution, LayerNorm and GELU.

    Args:
        channels: channels C of the tokens.
        num_heads: divides C.
        sr_ratio: reduction R of each side; 1 is ordinary attention.
        linear: reduce to 7 x 7 positions, whatever ``sr_ratio``.
        qkv_bias: whether queries, keys and values have a bias.
        scale: factor of the scores; (C / num_heads)^-0.5 when left out.
        attn_drop: probability to drop one of the softmax's outputs.
        drop: probability of the dropout behind.

    Raises:
        ValueError: num_heads does not divide channels, or sr_ratio is smaller than 1.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        sr_ratio: int = 1,
        *,
        linear: bool = False,
        qkv_bias: bool = True,
        scale: float | None = None,
        attn_drop: float = 0.0,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        check_heads(channels, num_heads)
        if sr_ratio < 1:
            raise ValueError(f"sr_ratio must be at least 1, got {sr_ratio}")
        self.num_heads = num_heads
        self.sr_ratio = 1 if linear else sr_ratio
        self.linear = linear
        self.scale = scale
        self.attn_drop = attn_drop
        self.q = nn.Linear(channels, channels, bias=qkv_bias)
        self.kv = nn.Linear(channels, 2 * channels, bias=qkv_bias)
        self.sr: nn.Module | None = None
        if linear or sr_ratio > 1:
            self.sr = nn.Conv2d(channels, channels, self.sr_ratio, stride=self.sr_ratio)
            self.norm = nn.LayerNorm(channels)
        self.proj = nn.Linear(channels, channels)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Map tokens (B, N, C) to the same shape.

        Args:
            x: one token for each position, row by row; others may stand in front where nothing is reduced.
            grid: height and width of their map.

        Raises:
            ValueError: the number of tokens is not that of the grid, or the grid is smaller than ``sr_ratio``.
        """
        key, value = self.kv(self._reduced(x, grid)).chunk(2, dim=-1)
        dropout = self.attn_drop if self.training else 0.0
        y = multi_head_attention(self.q(x), key, value, self.num_heads, scale=self.scale, dropout=dropout)
        return self.drop(self.proj(y))

    def _reduced(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.sr is None:
            return x
        if x.shape[1] != math.prod(grid):
            raise ValueError(f"x must hold {grid[0]} x {grid[1]} tokens, got {x.shape[1]}")
        if min(grid) < self.sr_ratio:
            raise ValueError(f"grid must be at least {self.sr_ratio} x {self.sr_ratio}, got {grid[0]} x {grid[1]}")
        u = tokens_to_map(x, grid)
        if self.linear:
            u = F.adaptive_avg_pool2d(u, 7)
        u = self.norm(map_to_tokens(self.sr(u)))
        return F.gelu(u) if self.linear else u


class OverlapPatchEmbed(PatchEmbed):
    """The overlapping patch embedding of version 2 (section 3.1): zeros around the map, so that no border is lost.

    Args:
        in_channels: channels of the image or map.
        channels: channels of a token.
        kernel_size: side of a patch; odd.
        stride: distance of the patches.

    Raises:
        ValueError: kernel_size is even, or not larger than stride.
    """

    def __init__(self, in_channels: int, channels: int, kernel_size: int = 7, stride: int = 4) -> None:
        if kernel_size <= stride or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and larger than the stride {stride}, got {kernel_size}")
        super().__init__(in_channels, channels, kernel_size, stride=stride, padding=kernel_size // 2)


class DepthwiseTokens(nn.Module):
    """A 3 x 3 depthwise convolution over the map of tokens, which gives the MLP of version 2 a sense of position.

    Args:
        channels: channels of the tokens.
        relu: apply ReLU before, as beside linear SRA.
    """

    def __init__(self, channels: int, *, relu: bool = False) -> None:
        super().__init__()
        self.act = nn.ReLU() if relu else nn.Identity()
        self.dwconv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Map tokens (B, H * W, C) of a grid (H, W) to the same shape."""
        return map_to_tokens(self.dwconv(tokens_to_map(self.act(x), grid)))


class _Block(nn.Module):
    """x + SRA(LN(x)), then x + MLP(LN(x)) (PVT, figure 3)."""

    def __init__(self, attn: SpatialReductionAttention, mlp: Mlp, channels: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), grid))
        return x + self.drop_path(self.mlp(self.norm2(x), grid))


class _PositionEmbedding(nn.Module):
    """Adds a learnt row to each token; other grids get the table interpolated bilinearly."""

    def __init__(self, channels: int, grid: tuple[int, int], num_prefix_tokens: int, drop: float) -> None:
        super().__init__()
        self.grid = grid
        self.num_prefix_tokens = num_prefix_tokens
        self.table = nn.Parameter(torch.empty(1, num_prefix_tokens + math.prod(grid), channels))
        nn.init.trunc_normal_(self.table, std=0.02)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, grid: tuple[int, int], num_prefix_tokens: int) -> Tensor:
        # Tokens without the prefix leave the rows of the prefix unused.
        table = self.table[:, self.num_prefix_tokens - num_prefix_tokens :]
        resized = resize_position_embedding(
            table, grid, num_prefix_tokens=num_prefix_tokens, source_grid=self.grid, mode="bilinear"
        )
        return self.drop(x + resized)


class _Stage(nn.Module):
    def __init__(
        self, patch_embed: PatchEmbed, blocks: list[_Block], *, position: nn.Module | None, norm: nn.Module | None
    ) -> None:
        super().__init__()
        self.patch_embed = patch_embed
        self.position = position
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm

    def forward(self, x: Tensor, class_token: Tensor | None = None) -> Tensor:
        """The map of the stage; with a class token (1, 1, C) what becomes of that, (B, C)."""
        x = self.patch_embed(x)
        grid = (x.shape[2], x.shape[3])
        tokens = map_to_tokens(x)
        if class_token is not None:
            tokens = prepend_tokens(class_token, tokens)
        if self.position is not None:
            tokens = self.position(tokens, grid, 0 if class_token is None else 1)
        for block in self.blocks:
            tokens = block(tokens, grid)
        if self.norm is not None:
            tokens = self.norm(tokens)
        return tokens_to_map(tokens, grid) if class_token is None else tokens[:, 0]


_STAGES = range(1, 7)
_AUTHORS = (
    *((rf"^(patch_embed|norm){stage}\.", rf"stages.{stage - 1}.\1.") for stage in _STAGES),
    *((rf"^block{stage}\.", f"stages.{stage - 1}.blocks.") for stage in _STAGES),
    *((rf"^pos_embed{stage}$", f"stages.{stage - 1}.position.table") for stage in _STAGES),
    (r"\.mlp\.dwconv\.", ".mlp.between."),
)
_TIMM = (
    (r"^patch_embed\.", "stages.0.patch_embed."),
    (r"\.downsample\.", ".patch_embed."),
    (r"\.mlp\.dwconv\.", ".mlp.between.dwconv."),
)


def _without_class_token(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    # The detectors' network has no use for the token, nor for what was trained on it.
    if isinstance(model, PVT) and not model.config.class_token and "cls_token" in state:
        return {key: value for key, value in state.items() if not key.startswith(("cls_token", "norm.", "head."))}
    return state


class _Pyramid(Backbone):
    """What both versions share: stages of patch embedding and blocks, and a linear classifier."""

    classifier_modules: ClassVar[tuple[str, ...]] = ("head",)
    stem_modules: ClassVar[tuple[str, ...]] = ("stages.0.patch_embed.proj",)

    stages: nn.ModuleList

    def __init__(self, config: _PyramidConfig, patch_size: int) -> None:
        super().__init__(config)
        depths, dims = config.depths, config.dims
        per_stage = (dims, config.num_heads, config.mlp_ratios, config.sr_ratios)
        if not depths or any(len(values) != len(depths) for values in per_stage):
            raise ValueError(
                "depths, dims, num_heads, mlp_ratios and sr_ratios must name the same stages, "
                f"got {depths}, {dims}, {config.num_heads}, {config.mlp_ratios} and {config.sr_ratios}"
            )
        strides = [patch_size * 2**stage for stage in range(len(dims))]
        self.feature_info = tuple(Feature(*pair) for pair in zip(dims, strides, strict=True))
        self.min_size = max(
            strides[-1], *(stride * ratio for stride, ratio in zip(strides, config.sr_ratios, strict=True))
        )

    def _blocks(self, stage: int, *, linear: bool = False, depthwise: bool = False) -> list[_Block]:
        config = self.config
        channels = config.dims[stage]
        hidden = int(channels * config.mlp_ratios[stage])
        blocks = []
        for rate in drop_path_rates(config.drop_path, config.depths)[stage]:
            attn = SpatialReductionAttention(
                channels,
                config.num_heads[stage],
                config.sr_ratios[stage],
                linear=linear,
                qkv_bias=config.qkv_bias,
                scale=config.qk_scale,
                attn_drop=config.attn_drop,
                drop=config.drop,
            )
            between = DepthwiseTokens(hidden, relu=linear) if depthwise else None
            blocks.append(_Block(attn, Mlp(channels, hidden, drop=config.drop, between=between), channels, rate))
        return blocks

    def forward_features(self, x: Tensor) -> list[Tensor]:
        self._check_input(x)
        features = []
        for stage in self.stages:
            x = self._run_stage(stage, x)
            features.append(x)
        return features

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(x.mean((2, 3)))

    def layers(self) -> list[nn.Module]:
        parts = [part for stage in self.stages for part in stage.children()]
        steps = [step for part in parts for step in (part if isinstance(part, nn.ModuleList) else [part])]
        return [*steps, self.head]

    def reset_classifier(self, num_classes: int) -> None:
        self.config = self.config.override(num_classes=num_classes)
        self.head: nn.Module = nn.Identity()
        if num_classes > 0:
            weight = next(self.stages.parameters())
            self.head = nn.Linear(self.feature_info[-1].channels, num_classes, device=weight.device, dtype=weight.dtype)
            init_linear(self.head)


class PVT(_Pyramid):
    """Version 1 (PVT, section 3): patches that do not overlap, position embeddings, a class token in the last stage.

    `forward_features` gives the maps that the authors' detectors use: the class token takes no part in them, and they
    are not normed. `forward` lets the token take part in the last stage; `forward_head` takes what becomes of it.

    Args:
        config: what to build.

    Raises:
        ValueError: the per-stage tuples differ in length, num_heads does not divide dims, or the image is smaller than
            the total stride, or the last stage reduces keys and values although it has a class token.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {"authors": Layout(renames=_AUTHORS, function=_without_class_token)}
    undecayed: ClassVar[tuple[str, ...]] = ("cls_token",)

    def __init__(self, config: PVTConfig) -> None:
        super().__init__(config, config.patch_size)
        if config.class_token and config.sr_ratios[-1] != 1:
            raise ValueError(f"sr_ratios must end with 1 where there is a class token, got {config.sr_ratios}")
        sides = config.preprocess.shape
        if min(sides) < self.feature_info[-1].stride:
            raise ValueError(f"preprocess.size must be at least {self.feature_info[-1].stride}, got {min(sides)}")
        stages = []
        tables: dict[str, PositionTable] = {}
        before, last = config.in_channels, len(config.dims) - 1
        for stage, (channels, stride) in enumerate(self.feature_info):
            grid = (sides[0] // stride, sides[1] // stride)
            prefix = 1 if stage == last else 0
            tables[f"stages.{stage}.position.table"] = PositionTable(prefix, grid, "bilinear")
            patch_embed = PatchEmbed(before, channels, config.patch_size if stage == 0 else 2)
            position = _PositionEmbedding(channels, grid, prefix, config.drop)
            stages.append(_Stage(patch_embed, self._blocks(stage), position=position, norm=None))
            before = channels
        self.stages = nn.ModuleList(stages)
        self.position_embeddings = tables
        if config.class_token:
            self.cls_token = nn.Parameter(torch.empty(1, 1, before))
            nn.init.trunc_normal_(self.cls_token, std=0.02)
            self.norm = nn.LayerNorm(before, eps=1e-6)
        self.apply(init_linear)
        self.reset_classifier(config.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        if not self.config.class_token:
            return super().forward(x)
        self._check_input(x)
        *others, last = self.stages
        for stage in others:
            x = self._run_stage(stage, x)
        return self.forward_head(self._run_stage(last, x, self.cls_token))

    def forward_head(self, x: Tensor) -> Tensor:
        """Class scores of the class token (B, C) behind the last stage; without one, of the last map (B, C, H, W)."""
        return self.head(self.norm(x)) if self.config.class_token else super().forward_head(x)

    def layers(self) -> list[nn.Module]:
        *steps, head = super().layers()
        return [*steps, self.norm, head] if self.config.class_token else [*steps, head]


class PVTv2(_Pyramid):
    """Version 2 (PVTv2, section 3): overlapping patches, depthwise convolution in the MLP, a norm behind each stage.

    There is no position embedding and no class token, so no weight depends on the size of the image.

    Args:
        config: what to build.

    Raises:
        ValueError: the per-stage tuples differ in length, or num_heads does not divide dims.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {"authors": Layout(renames=_AUTHORS), "timm": Layout(renames=_TIMM)}

    def __init__(self, config: PVTv2Config) -> None:
        super().__init__(config, 4)
        stages = []
        before = config.in_channels
        for stage, channels in enumerate(config.dims):
            patch_embed = OverlapPatchEmbed(before, channels, *((7, 4) if stage == 0 else (3, 2)))
            blocks = self._blocks(stage, linear=config.linear, depthwise=True)
            stages.append(_Stage(patch_embed, blocks, position=None, norm=nn.LayerNorm(channels, eps=1e-6)))
            before = channels
        self.stages = nn.ModuleList(stages)
        self.apply(init_linear)
        self.apply(_init_conv)
        self.reset_classifier(config.num_classes)


def _init_conv(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels / module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_B2, _B3, _B4 = (3, 4, 6, 3), (3, 4, 18, 3), (3, 8, 27, 3)

VARIANTS: dict[str, PVTConfig | PVTv2Config] = {
    "pvt_tiny": PVTConfig(),
    "pvt_small": PVTConfig(depths=_B2),
    "pvt_medium": PVTConfig(depths=_B3, drop_path=0.3),
    "pvt_large": PVTConfig(depths=_B4, drop_path=0.3),
    "pvt_huge_v2": PVTConfig(depths=(3, 10, 60, 3), dims=(128, 256, 512, 768), num_heads=(2, 4, 8, 12), drop_path=0.0),
    "pvt_v2_b0": PVTv2Config(dims=(32, 64, 160, 256)),
    "pvt_v2_b1": PVTv2Config(),
    "pvt_v2_b2": PVTv2Config(depths=_B2),
    "pvt_v2_b2_li": PVTv2Config(depths=_B2, linear=True),
    "pvt_v2_b3": PVTv2Config(depths=_B3, drop_path=0.3),
    "pvt_v2_b4": PVTv2Config(depths=_B4, drop_path=0.3),
    "pvt_v2_b5": PVTv2Config(depths=(3, 6, 40, 3), mlp_ratios=(4, 4, 4, 4), drop_path=0.3),
}


def _published(name: str, top1: float) -> tuple[PublishedFile, ...]:
    url = f"https://github.com/whai362/PVT/releases/download/v2/{name}.pth"
    return (PublishedFile(url, "Apache-2.0", {"ImageNet-1K top-1 [%]": top1}),)


PUBLISHED: dict[str, tuple[PublishedFile, ...]] = {
    "pvt_tiny": _published("pvt_tiny", 75.1),
    "pvt_small": _published("pvt_small", 79.8),
    "pvt_medium": _published("pvt_medium", 81.2),
    "pvt_large": _published("pvt_large", 81.7),
    "pvt_v2_b0": _published("pvt_v2_b0", 70.5),
    "pvt_v2_b1": _published("pvt_v2_b1", 78.7),
    "pvt_v2_b2": _published("pvt_v2_b2", 82.0),
    "pvt_v2_b2_li": _published("pvt_v2_b2_li", 82.1),
    "pvt_v2_b3": _published("pvt_v2_b3", 83.1),
    "pvt_v2_b4": _published("pvt_v2_b4", 83.6),
    "pvt_v2_b5": _published("pvt_v2_b5", 83.8),
}
