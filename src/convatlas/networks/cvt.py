"""Convolutional vision Transformer (CvT): token embeddings and attention projections made of convolutions.

Wu, Xiao, Codella, Liu, Dai, Yuan, Zhang: "CvT: Introducing Convolutions to Vision Transformers", ICCV 2021,
arXiv 2103.15808. No weight depends on the size of the image: there is no position embedding.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from convatlas.data.transforms import Preprocess
from convatlas.errors import unknown
from convatlas.networks.base import Backbone, BackboneConfig, Feature, PublishedFile
from convatlas.nn.activation import QuickGELU
from convatlas.nn.attention import check_heads
from convatlas.nn.drop import DropPath, drop_path_rates
from convatlas.nn.embedding import PatchEmbed
from convatlas.nn.init import init_linear
from convatlas.nn.mlp import Mlp
from convatlas.nn.norm import Float32LayerNorm
from convatlas.ops.attention import attention_weights, multi_head_attention
from convatlas.ops.tokens import map_to_tokens, prepend_tokens, tokens_to_map
from convatlas.weights import Layout

__all__ = ["PUBLISHED", "VARIANTS", "ConvAttention", "ConvEmbed", "CvT", "CvTConfig", "Projection"]

#: How queries, keys and values are read from the map: depthwise convolution and batch norm, average pooling of keys and
#: values, or as they are.
Projection = Literal["dw_bn", "avg", "linear"]
_PROJECTIONS: tuple[str, ...] = get_args(Projection)


@dataclass(frozen=True, kw_only=True)
class CvTConfig(BackboneConfig):
    """Config of `CvT`; every tuple has an entry for each stage.

    Attributes:
        depths: blocks.
        dims: channels.
        num_heads: attention heads.
        mlp_ratios: hidden width of the MLP over its channels.
        patch_sizes, patch_strides, patch_paddings: of the convolutional token embedding.
        projections: how queries, keys and values are read from the map.
        kernel_sizes: of the projections, odd; queries are padded by half of it and keep their positions.
        kv_strides, kv_paddings: of keys and values.
        qkv_bias: whether the Linear layers of queries, keys and values have a bias.
        class_tokens: whether a token is put in front. That of the last stage becomes the class scores; that of another
            is lost behind its stage. Without one in the last stage the scores come from the mean of its positions.
        drop: rate of the dropout behind the token embedding, in the MLPs and behind the attentions.
        attn_drop: rate of the dropout of the attention weights.
        drop_path: rate at the last block of the stage; it rises linearly from 0 within the stage.
        init: of the Linear layers, truncated normal or Xavier uniform.
    """

    depths: tuple[int, ...] = (1, 2, 10)
    dims: tuple[int, ...] = (64, 192, 384)
    num_heads: tuple[int, ...] = (1, 3, 6)
    mlp_ratios: tuple[float, ...] = (4, 4, 4)
    patch_sizes: tuple[int, ...] = (7, 3, 3)
    patch_strides: tuple[int, ...] = (4, 2, 2)
    patch_paddings: tuple[int, ...] = (2, 1, 1)
    projections: tuple[Projection, ...] = ("dw_bn", "dw_bn", "dw_bn")
    kernel_sizes: tuple[int, ...] = (3, 3, 3)
    kv_strides: tuple[int, ...] = (2, 2, 2)
    kv_paddings: tuple[int, ...] = (1, 1, 1)
    qkv_bias: tuple[bool, ...] = (True, True, True)
    class_tokens: tuple[bool, ...] = (False, False, True)
    drop: tuple[float, ...] = (0.0, 0.0, 0.0)
    attn_drop: tuple[float, ...] = (0.0, 0.0, 0.0)
    drop_path: tuple[float, ...] = (0.0, 0.0, 0.1)
    init: Literal["trunc_norm", "xavier"] = "trunc_norm"

    def build(self) -> CvT:
        return CvT(self)


class ConvEmbed(PatchEmbed):
    """Convolutional token embedding (section 3.1): an overlapping convolution and a LayerNorm of each token."""


class ConvAttention(nn.Module):
    """Attention with convolutional projections (section 3.2): queries, keys and values are read from the map of tokens.

    Each has a depthwise convolution without activation and a Linear layer of its own. A stride of s for keys and values
    leaves a share of 1 / s^2 of them. A class token passes the convolutions by. The scores are scaled by C^-0.5 with C
    all channels, not those of a head, which is what the published weights were trained with.

    Args:
        channels: channels C of the tokens.
        num_heads: divides C.
        kernel_size: side of the projections' kernels; odd.
        stride_kv: stride of keys and values.
        padding_kv: zeros around the map for keys and values; half of the kernel when left out.
        method: ``dw_bn``: depthwise convolution and batch norm; ``avg``: average pooling of keys and values, queries as
            they are; ``linear``: all as they are.
        class_token: whether the first token stands for no position.
        qkv_bias: whether the Linear layers of queries, keys and values have a bias.
        attn_drop: probability to drop one of the softmax's outputs.
        drop: probability of the dropout behind.

    Raises:
        ValueError: num_heads does not divide channels, kernel_size is even, stride_kv is smaller than 1, or method is
            unknown.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        *,
        kernel_size: int = 3,
        stride_kv: int = 2,
        padding_kv: int | None = None,
        method: Projection = "dw_bn",
        class_token: bool = False,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        check_heads(channels, num_heads)
        if method not in _PROJECTIONS:
            raise unknown("projection method", method, _PROJECTIONS)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, so that queries keep their positions, got {kernel_size}")
        if stride_kv < 1:
            raise ValueError(f"stride_kv must be at least 1, got {stride_kv}")
        half = kernel_size // 2
        padding_kv = half if padding_kv is None else padding_kv
        self.num_heads = num_heads
        self.num_prefix_tokens = int(class_token)
        self.scale = channels**-0.5
        self.attn_drop = attn_drop
        self.conv_proj_q = _depthwise(channels, kernel_size, 1, half) if method == "dw_bn" else None
        self.conv_proj_k: nn.Module | None = None
        self.conv_proj_v: nn.Module | None = None
        if method == "dw_bn":
            self.conv_proj_k = _depthwise(channels, kernel_size, stride_kv, padding_kv)
            self.conv_proj_v = _depthwise(channels, kernel_size, stride_kv, padding_kv)
        elif method == "avg":
            self.conv_proj_k = nn.AvgPool2d(kernel_size, stride_kv, padding_kv, ceil_mode=True)
            self.conv_proj_v = self.conv_proj_k
        self.proj_q = nn.Linear(channels, channels, bias=qkv_bias)
        self.proj_k = nn.Linear(channels, channels, bias=qkv_bias)
        self.proj_v = nn.Linear(channels, channels, bias=qkv_bias)
        self.proj = nn.Linear(channels, channels)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Map tokens (B, N, C) to the same shape.

        Args:
            x: the class token, if there is one, and one token for each position, row by row.
            grid: height and width of their map.

        Raises:
            ValueError: the number of tokens is not that of the grid.
        """
        query, key, value = self._projected(x, grid)
        dropout = self.attn_drop if self.training else 0.0
        y = multi_head_attention(query, key, self.proj_v(value), self.num_heads, scale=self.scale, dropout=dropout)
        return self.drop(self.proj(y))

    def attention_weights(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """What each query attends to: (B, num_heads, N, M) for the arguments of `forward`; rows sum to 1.

        The M keys are the class token, if there is one, and the positions of the map of keys, row by row.
        """
        query, key, _ = self._projected(x, grid)
        return attention_weights(query, key, self.num_heads, scale=self.scale)

    def _projected(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys for the scores; values before their Linear layer."""
        prefix = self.num_prefix_tokens
        if x.shape[1] != math.prod(grid) + prefix:
            with_token = " and a class token" if prefix else ""
            raise ValueError(f"x must hold {grid[0]} x {grid[1]} tokens{with_token}, got {x.shape[1]}")
        if self.conv_proj_k is None or self.conv_proj_v is None:
            return self.proj_q(x), self.proj_k(x), x
        class_token, u = x[:, :prefix], tokens_to_map(x[:, prefix:], grid)

        def read(projection: nn.Module) -> Tensor:
            tokens = map_to_tokens(projection(u))
            return torch.cat([class_token, tokens], dim=1) if prefix else tokens

        query = x if self.conv_proj_q is None else read(self.conv_proj_q)
        key = read(self.conv_proj_k)
        value = key if self.conv_proj_v is self.conv_proj_k else read(self.conv_proj_v)
        return self.proj_q(query), self.proj_k(key), value


def _depthwise(channels: int, kernel_size: int, stride: int, padding: int) -> nn.Module:
    conv = nn.Conv2d(channels, channels, kernel_size, stride=stride, padding=padding, groups=channels, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(channels)))


class _Block(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x)) (figure 2 b)."""

    def __init__(self, attn: ConvAttention, mlp: Mlp, channels: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = Float32LayerNorm(channels)
        self.attn = attn
        self.norm2 = Float32LayerNorm(channels)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), grid))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class _Stage(nn.Module):
    def __init__(self, config: CvTConfig, stage: int, in_channels: int) -> None:
        super().__init__()
        channels, drop = config.dims[stage], config.drop[stage]
        self.patch_embed = ConvEmbed(
            in_channels,
            channels,
            config.patch_sizes[stage],
            stride=config.patch_strides[stage],
            padding=config.patch_paddings[stage],
        )
        self.cls_token: nn.Parameter | None = None
        if config.class_tokens[stage]:
            self.cls_token = nn.Parameter(torch.empty(1, 1, channels))
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.drop = nn.Dropout(drop)
        self.blocks = nn.ModuleList()
        for rate in drop_path_rates(config.drop_path[stage], (config.depths[stage],))[0]:
            attn = ConvAttention(
                channels,
                config.num_heads[stage],
                kernel_size=config.kernel_sizes[stage],
                stride_kv=config.kv_strides[stage],
                padding_kv=config.kv_paddings[stage],
                method=config.projections[stage],
                class_token=config.class_tokens[stage],
                qkv_bias=config.qkv_bias[stage],
                attn_drop=config.attn_drop[stage],
                drop=drop,
            )
            mlp = Mlp(channels, int(channels * config.mlp_ratios[stage]), act=QuickGELU, drop=drop)
            self.blocks.append(_Block(attn, mlp, channels, rate))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The map of the stage, and what becomes of its class token, (B, C)."""
        x = self.patch_embed(x)
        grid = (x.shape[2], x.shape[3])
        tokens = map_to_tokens(x)
        if self.cls_token is not None:
            tokens = prepend_tokens(self.cls_token, tokens)
        tokens = self.drop(tokens)
        for block in self.blocks:
            tokens = block(tokens, grid)
        if self.cls_token is None:
            return tokens_to_map(tokens, grid), None
        return tokens_to_map(tokens[:, 1:], grid), tokens[:, 0]


_AUTHORS = Layout(renames=((r"^stage(\d+)\.", r"stages.\1."),))
_TRANSFORMERS = Layout(
    renames=(
        (r"^cvt\.", ""),
        (r"^encoder\.", ""),
        (r"\.embedding\.convolution_embeddings\.projection\.", ".patch_embed.proj."),
        (r"\.embedding\.convolution_embeddings\.normalization\.", ".patch_embed.norm."),
        (r"\.layers\.", ".blocks."),
        (
            r"\.attention\.attention\.convolution_projection_(query|key|value)\.convolution_projection\.",
            r".attn.conv_proj_\1.",
        ),
        (r"\.convolution\.weight$", ".conv.weight"),
        (r"\.normalization\.", ".bn."),
        (r"\.attention\.attention\.projection_(query|key|value)\.", r".attn.proj_\1."),
        (r"proj_(q|k|v)(?:uery|ey|alue)\.", r"proj_\1."),
        (r"\.attention\.output\.dense\.", ".attn.proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"^layernorm\.", "norm."),
        (r"^classifier\.", "head."),
    )
)


class CvT(Backbone):
    """The network of the paper's table 2: stages of convolutional token embedding and blocks, norm, classifier.

    Loads the layouts of the authors and of the transformers library. `forward_features` gives the maps, in whose making
    the class token took part; `forward_head` takes that token.

    Args:
        config: what to build.

    Raises:
        ValueError: the tuples of the config differ in length, a value makes no sense, or init is unknown.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {"authors": _AUTHORS, "transformers": _TRANSFORMERS}
    classifier_modules: ClassVar[tuple[str, ...]] = ("head",)
    stem_modules: ClassVar[tuple[str, ...]] = ("stages.0.patch_embed.proj",)
    undecayed: ClassVar[tuple[str, ...]] = ("cls_token",)

    def __init__(self, config: CvTConfig) -> None:
        super().__init__(config)
        fields = {entry.name: getattr(config, entry.name) for entry in dataclasses.fields(CvTConfig)}
        lengths = {name: len(value) for name, value in fields.items() if isinstance(value, tuple)}
        if not config.depths or len(set(lengths.values())) > 1:
            listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise ValueError(f"every tuple must have an entry for each stage, got {listed}")
        if config.init not in ("trunc_norm", "xavier"):
            raise unknown("init", config.init, ("trunc_norm", "xavier"))
        if any(config.class_tokens[:-1]):
            warnings.warn("class tokens of other stages than the last are lost behind their stage", stacklevel=2)
        stages, features = [], []
        before, stride = config.in_channels, 1
        for stage, channels in enumerate(config.dims):
            stages.append(_Stage(config, stage, before))
            before, stride = channels, stride * config.patch_strides[stage]
            features.append(Feature(channels, stride))
        self.stages = nn.ModuleList(stages)
        self.feature_info = tuple(features)
        self.min_size = _smallest(config)
        self.norm = Float32LayerNorm(before)
        self.apply(self._init)
        self.reset_classifier(config.num_classes)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        return self.forward_stages(x)[0]

    def forward_stages(self, x: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """The maps of `forward_features`, and what becomes of the class token of the last stage, (B, C), or None."""
        self._check_input(x)
        maps, token = [], None
        for stage in self.stages:
            x, token = self._run_stage(stage, x)
            maps.append(x)
        return maps, token

    def forward(self, x: Tensor) -> Tensor:
        maps, token = self.forward_stages(x)
        return self.forward_head(maps[-1] if token is None else token)

    def forward_head(self, x: Tensor) -> Tensor:
        """Class scores of the class token (B, C) behind the last stage; without one, of the last map (B, C, H, W)."""
        if self.config.class_tokens[-1]:
            return self.head(self.norm(x))
        return self.head(self.norm(map_to_tokens(x)).mean(1))

    def layers(self) -> list[nn.Module]:
        parts = [part for stage in self.stages for part in stage.children() if not isinstance(part, nn.Dropout)]
        steps = [step for part in parts for step in (part if isinstance(part, nn.ModuleList) else [part])]
        return [*steps, self.norm, self.head]

    def reset_classifier(self, num_classes: int) -> None:
        self.config = self.config.override(num_classes=num_classes)
        self.head: nn.Module = nn.Identity()
        if num_classes > 0:
            weight = self.norm.weight
            self.head = nn.Linear(self.feature_info[-1].channels, num_classes, device=weight.device, dtype=weight.dtype)
            self._init(self.head)

    def _init(self, module: nn.Module) -> None:
        init_linear(module)
        if isinstance(module, nn.Linear) and self.config.init == "xavier":
            nn.init.xavier_uniform_(module.weight)


def _smallest(config: CvTConfig) -> int:
    """Side of the smallest image that leaves a position in every stage."""
    side = 1
    embeddings = zip(config.patch_sizes, config.patch_strides, config.patch_paddings, strict=True)
    for kernel_size, stride, padding in reversed(list(embeddings)):
        side = max((side - 1) * stride + kernel_size - 2 * padding, 1)
    return side


_21 = CvTConfig(depths=(1, 4, 16))
# The authors evaluate at this size on the whole image, without a crop.
_384 = Preprocess(size=384, crop=1.0, stretch=True)

VARIANTS: dict[str, CvTConfig] = {
    "cvt_13": CvTConfig(),
    "cvt_13_384": CvTConfig(preprocess=_384),
    "cvt_13_384_22k": CvTConfig(preprocess=_384),
    "cvt_21": _21,
    "cvt_21_384": _21.override(preprocess=_384),
    "cvt_21_384_22k": _21.override(preprocess=_384),
    "cvt_w24": CvTConfig(
        depths=(2, 2, 20), dims=(192, 768, 1024), num_heads=(3, 12, 16), drop_path=(0.0, 0.0, 0.3), preprocess=_384
    ),
}


def _published(name: str, file: str, top1: float) -> tuple[PublishedFile, ...]:
    figures = {"ImageNet-1K top-1 [%]": top1}
    return (
        PublishedFile(f"hf://microsoft/{name}", "Apache-2.0", figures),
        PublishedFile(f"https://github.com/microsoft/CvT#{file}", "MIT", figures, by_hand=True),
    )


PUBLISHED: dict[str, tuple[PublishedFile, ...]] = {
    "cvt_13": _published("cvt-13", "CvT-13-224x224-IN-1k.pth", 81.6),
    "cvt_13_384": _published("cvt-13-384", "CvT-13-384x384-IN-1k.pth", 83.0),
    "cvt_13_384_22k": _published("cvt-13-384-22k", "CvT-13-384x384-IN-22k.pth", 83.3),
    "cvt_21": _published("cvt-21", "CvT-21-224x224-IN-1k.pth", 82.5),
    "cvt_21_384": _published("cvt-21-384", "CvT-21-384x384-IN-1k.pth", 83.3),
    "cvt_21_384_22k": _published("cvt-21-384-22k", "CvT-21-384x384-IN-22k.pth", 84.9),
    "cvt_w24": _published("cvt-w24-384-22k", "CvT-w24-384x384-IN-22k.pth", 87.6),
}
