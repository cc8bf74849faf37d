"""Light UniFormers (XXS and XS), for images and for video: an hourglass of tokens in the global blocks.

Li, Wang, Zhang, Gao, Song, Liu, Li, Qiao: "UniFormer: Unifying Convolution and Self-attention for Visual Recognition",
TPAMI 2023, arXiv 2201.09450, section 3.5. A class token tells how informative each other token is; only the informative
ones, and one that represents the rest, go through a block (after Evo-ViT, Xu et al., AAAI 2022, arXiv 2108.01390).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.data.transforms import Preprocess
from convatlas.data.volume_transforms import VolumePreprocess
from convatlas.networks.base import PublishedFile
from convatlas.networks.uniformer.blocks import BlockOptions, GlobalBlock, LocalBlock, conv_embed, patch_embed
from convatlas.networks.uniformer.inflation import VIDEO_LAYOUTS, kinetics_preprocess
from convatlas.networks.uniformer.trunk import Stage, Trunk, TrunkConfig
from convatlas.nn.attention import SelfAttention
from convatlas.ops.attention import attention_weights, multi_head_attention
from convatlas.ops.precision import without_autocast
from convatlas.ops.tokens import map_to_tokens, tokens_to_map
from convatlas.weights import Layout

__all__ = ["PUBLISHED", "VARIANTS", "ClassAttention", "EvoBlock", "LightConfig", "LightFeatures", "LightUniFormer"]


@dataclass(frozen=True, kw_only=True)
class LightConfig(TrunkConfig):
    """Config of `LightUniFormer`; ``preprocess`` says whether it is for images or for video.

    Attributes:
        prune_ratios: share r of the tokens that go through each block of stages 3 and 4; 1 lets all of them.
        trade_offs: weight a of a block's own attention in the running attention of the class token, in the same form.
        pyramid: a LayerNorm for the map of each stage in place of the batch norm and the head of the class token.
        float32_attention: keep the attention in float32 under autocast.
    """

    depths: tuple[int, ...] = (2, 5, 8, 2)
    dims: tuple[int, ...] = (56, 112, 224, 448)
    head_dim: int = 28
    mlp_ratios: tuple[float, ...] = (3, 3, 3, 3)
    prune_ratios: tuple[tuple[float, ...], ...] = ((1, *[0.5] * 7), (0.5, 0.5))
    trade_offs: tuple[tuple[float, ...], ...] = ((1, *[0.5] * 7), (0.5, 0.5))
    pyramid: bool = False
    float32_attention: bool = False
    drop_path: float = 0.0
    preprocess: Preprocess | VolumePreprocess = field(default_factory=Preprocess)

    def build(self) -> LightUniFormer:
        return LightUniFormer(self)


class ClassAttention(SelfAttention):
    """Self-attention that also tells how much the first token attends to each, on average over the heads."""

    #: Whether to keep float32 under autocast.
    float32 = False

    def with_class_row(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, N, C) to the same shape; and the row of the first token, (B, N), which sums to 1.

        Only that row is computed apart, so that the fused form of the attention can serve all others.
        """
        with without_autocast(x) if self.float32 else contextlib.nullcontext():
            query, key, value = self.qkv(x).chunk(3, dim=-1)
            dropout = self.attn_drop if self.training else 0.0
            y = multi_head_attention(query, key, value, self.num_heads, scale=self.scale, dropout=dropout)
            row = attention_weights(query[:, :1], key, self.num_heads, scale=self.scale).mean(1)[:, 0]
            return self.drop(self.proj(y)), row


class EvoBlock(GlobalBlock):
    """A global block for the informative tokens only; the others get the update of the token that represents them.

    With the running attention g of the class token, n = floor(r N) tokens of largest g are informative; the others are
    represented by their mean with weights g. The class token, the informative ones and the representative go through
    attention and MLP, whose outputs u and v for the representative are added to all that it stands for.

    Args:
        options: of the stage.
        drop_path: rate of the residual branches.
        prune_ratio: share r of informative tokens, in (0, 1]; 1 lets all tokens through.
        trade_off: weight a in g <- (1 - a) g + a A, A being the class token's attention in this block.

    Raises:
        ValueError: the ratio is out of range, or the heads do not divide the channels.
    """

    attention = ClassAttention
    attn: ClassAttention

    def __init__(
        self, options: BlockOptions, drop_path: float = 0.0, *, prune_ratio: float = 1.0, trade_off: float = 1.0
    ) -> None:
        super().__init__(options, drop_path)
        if not 0 < prune_ratio <= 1:
            raise ValueError(f"prune_ratio must be above 0 and at most 1, got {prune_ratio}")
        self.prune_ratio = prune_ratio
        self.trade_off = trade_off
        # The video networks have no third factor, but scale the two outputs as the branches are scaled.
        scaled_apart = options.axes == 3 and options.layer_scale_init is not None
        self.scale3 = None if scaled_apart else options.scale(channel_dim=-1)

    def forward(  # type: ignore[override]
        self, x: Tensor, class_token: Tensor, attention: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Update a map, the class token and its running attention.

        Args:
            x: (B, C, *grid).
            class_token: (B, 1, C).
            attention: g, (B, N) for the N positions of the grid, row by row; None before the first block.

        Raises:
            ValueError: there is no attention yet by which to choose.
        """
        x = x + self.pos_embed(x)
        grid = x.shape[2:]
        tokens = map_to_tokens(x).contiguous()
        if self.prune_ratio == 1:
            z, _, row = self._related(torch.cat([class_token, tokens], dim=1))
            attention = row if attention is None else self._running(attention, row)
            return tokens_to_map(z[:, 1:], grid), z[:, :1], attention
        if attention is None:
            raise ValueError(f"attention must be given where tokens are pruned (prune_ratio {self.prune_ratio})")
        kept = int(tokens.shape[1] * self.prune_ratio)
        order = attention.argsort(dim=1, descending=True)
        places = order.unsqueeze(-1).expand_as(tokens)
        informative, rest = tokens.gather(1, places).tensor_split([kept], dim=1)
        best, weights = attention.gather(1, order).tensor_split([kept], dim=1)
        weights = weights / weights.sum(1, keepdim=True)
        representative = (weights.unsqueeze(-1) * rest).sum(1, keepdim=True)
        z, update, row = self._related(torch.cat([class_token, informative, representative], dim=1))
        changed = torch.cat([z[:, 1:-1], rest + update], dim=1)
        best = self._running(best, row[:, :-1]).to(attention.dtype)
        tokens = torch.empty_like(changed).scatter(1, places, changed)
        return tokens_to_map(tokens, grid), z[:, :1], attention.scatter(1, order[:, :kept], best)

    def _related(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens behind attention and MLP, what these add to those that the last one stands for, the class row."""
        u, row = self.attn.with_class_row(self.norm1(z))
        z = z + self.drop_path(self.scale1(u))
        v = self.mlp(self.norm2(z))
        z = z + self.drop_path(self.scale2(v))
        u, v = u[:, -1:], v[:, -1:]
        update = self.scale1(u) + self.scale2(v) if self.scale3 is None else self.scale3(u + v)
        return z, update, row[:, 1:]

    def _running(self, attention: Tensor, row: Tensor) -> Tensor:
        return (1 - self.trade_off) * attention + self.trade_off * row


class _EvoStage(Stage):
    """A stage of `EvoBlock`s."""

    def forward(  # type: ignore[override]
        self, x: Tensor, class_token: Tensor, attention: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if attention is not None:
            attention = _pooled(attention, x.shape[2:])
        x = self.embed(x)
        for block in self.blocks:
            x, class_token, attention = block(x, class_token, attention)
        return x, class_token, attention


def _pooled(attention: Tensor, grid: Sequence[int]) -> Tensor:
    """The running attention (B, N) of a grid on the next stage's, 2 x 2 positions averaged, with the sum it had."""
    maps = attention.unflatten(1, tuple(grid)).unsqueeze(1)
    pool = F.avg_pool2d if len(grid) == 2 else F.avg_pool3d
    pooled = pool(maps, (*[1] * (len(grid) - 2), 2, 2)).flatten(1)
    return pooled * (attention.sum(1, keepdim=True) / pooled.sum(1, keepdim=True))


class LightFeatures(NamedTuple):
    """What a light network computes before its heads.

    Attributes:
        maps: those of the four stages.
        class_token: (B, 1, C) behind the last block.
        attention: running attention (B, N) of the class token to the positions of the last map, row by row.
    """

    maps: list[Tensor]
    class_token: Tensor
    attention: Tensor


class LightUniFormer(Trunk):
    """Two stages of local blocks, two of `EvoBlock`s with a class token, on maps of 1/4, 1/8, 1/16 and 1/32.

    The class scores come from the last map; while training there are those of the class token as well, and the loss is
    the mean of both losses. A network for video halves the number of frames once, in its stem.

    Args:
        config: what to build.

    Raises:
        ValueError: a tuple does not fit the depths, a ratio is out of range, the first block of stage 3 prunes, or
            head_dim does not divide dims.
    """

    layouts: ClassVar[Mapping[str, Layout]] = VIDEO_LAYOUTS
    stem_modules: ClassVar[tuple[str, ...]] = ("stages.0.patch_embed.proj.0",)
    undecayed: ClassVar[tuple[str, ...]] = ("cls_token",)

    config: LightConfig

    def __init__(self, config: LightConfig) -> None:
        for name in ("prune_ratios", "trade_offs"):
            lengths = tuple(len(values) for values in getattr(config, name))
            if lengths != config.depths[2:]:
                raise ValueError(
                    f"{name} must hold a number for each block of stages 3 and 4, {config.depths[2:]}, got {lengths}"
                )
        if config.prune_ratios[0][0] != 1:
            raise ValueError(
                "prune_ratios must begin with 1, because the first block has no attention yet to choose by, "
                f"got {config.prune_ratios[0][0]}"
            )
        super().__init__(config, stage_norms=config.pyramid)
        #: The stem rounds up, the patches behind it are cut.
        self.min_size = (1, 29, 29) if self.axes == 3 else 29
        third, fourth = config.dims[2:]
        self.cls_token = nn.Parameter(torch.empty(1, 1, third))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.cls_upsample = nn.Linear(third, fourth)
        self.norm_cls: nn.Module | None = None if config.pyramid else nn.LayerNorm(fourth)
        self._finish()

    @property
    def classifier_modules(self) -> tuple[str, ...]:  # type: ignore[override]
        """The classifiers of the map and of the class token."""
        return ("head",) if self.config.pyramid else ("head", "head_cls")

    def _embedding(self, stage: int) -> nn.Module:
        before, width = self._before(stage), self.config.dims[stage]
        still = (1,) * (self.axes - 2)
        if stage == 0:
            return conv_embed(before, (width // 2, width), [(*still, 2, 2), (2,) * self.axes])
        side = (*still, 2, 2)
        return patch_embed(before, width, side, side, (0,) * self.axes)

    def _block(self, stage: int, index: int, drop_path: float) -> nn.Module:
        config, options = self.config, self._options(stage)
        if stage < 2:
            return LocalBlock(options, drop_path)
        ratio, trade_off = config.prune_ratios[stage - 2][index], config.trade_offs[stage - 2][index]
        block = EvoBlock(options, drop_path, prune_ratio=ratio, trade_off=trade_off)
        block.attn.float32 = config.float32_attention
        return block

    def _stage(self, stage: int, patch_embed: nn.Module, blocks: list[nn.Module], **options: Any) -> Stage:
        return (Stage if stage < 2 else _EvoStage)(patch_embed, blocks, **options)

    def forward_stages(self, x: Tensor) -> LightFeatures:
        """The maps of an image (B, C, H, W) or clip (B, C, T, H, W), and what the class token has become.

        Raises:
            ValueError: x has a wrong number of dimensions or channels, or is too small.
        """
        self._check_input(x)
        maps: list[Tensor] = []
        token, attention = self.cls_token.expand(x.shape[0], -1, -1), None
        for number, stage in enumerate(self.stages):
            if number < 2:
                x = self._run_stage(stage, x)
            else:
                if number == 3:
                    token = self.cls_upsample(token)
                x, token, attention = self._run_stage(stage, x, token, attention)
            maps.append(stage.leave(x))  # type: ignore[operator]
        maps[-1] = self.norm(maps[-1])
        if attention is None:
            raise RuntimeError("the stages with a class token have not run")
        return LightFeatures(maps, token, attention)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        return self.forward_stages(x).maps

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        """Class scores (B, num_classes) of the last map; while training, those of the class token behind them.

        Raises:
            ValueError: x has a wrong number of dimensions or channels, or is too small.
        """
        features = self.forward_stages(x)
        scores = self.forward_head(features.maps[-1])
        if not self.training or self.norm_cls is None:
            return scores
        return scores, self.head_cls(self.norm_cls(features.class_token[:, 0]))

    def reset_classifier(self, num_classes: int) -> None:
        super().reset_classifier(num_classes)
        if not self.config.pyramid:
            self.head_cls = self._classifier(num_classes)


_XXS = LightConfig()
_XS = LightConfig(
    depths=(3, 5, 9, 3),
    dims=(64, 128, 256, 512),
    head_dim=32,
    prune_ratios=((1, *[0.5] * 8), (0.5,) * 3),
    trade_offs=((1, *[0.5] * 8), (0.5,) * 3),
    drop_path=0.1,
)


def _clips(config: LightConfig, frames: int, side: int) -> LightConfig:
    return config.override(num_classes=400, preprocess=kinetics_preprocess(frames, side))


#: A number behind the name is the side of the images; for video, frames and side.
VARIANTS: dict[str, LightConfig] = {
    "uniformer_xxs": _XXS,
    "uniformer_xxs_128": _XXS.override(preprocess=Preprocess(size=128)),
    "uniformer_xxs_160": _XXS.override(preprocess=Preprocess(size=160)),
    "uniformer_xxs_192": _XXS.override(preprocess=Preprocess(size=192)),
    "uniformer_xs": _XS,
    "uniformer_xs_192": _XS.override(preprocess=Preprocess(size=192)),
    "uniformer_xxs_dense": _XXS.override(pyramid=True),
    "uniformer_xs_dense": _XS.override(pyramid=True, drop_path=0.15),
    "uniformer3d_xxs": _clips(_XXS, 16, 160),
    "uniformer3d_xxs_4_128": _clips(_XXS, 4, 128),
    "uniformer3d_xxs_32_160": _clips(_XXS, 32, 160),
    "uniformer3d_xs": _clips(_XS, 32, 192),
}


def _published(top1: float, of: str = "ImageNet-1K top-1 [%]") -> tuple[PublishedFile, ...]:
    page = "https://github.com/Sense-X/UniFormer"
    return (PublishedFile(page, "MIT", {of: top1}, by_hand=True),)


_KINETICS = "Kinetics-400 top-1 of a video [%]"

#: The authors' page links the files to a drive.
PUBLISHED: dict[str, tuple[PublishedFile, ...]] = {
    "uniformer_xxs": _published(80.6),
    "uniformer_xxs_128": _published(76.8),
    "uniformer_xxs_160": _published(79.1),
    "uniformer_xxs_192": _published(79.9),
    "uniformer_xs": _published(82.0),
    "uniformer_xs_192": _published(81.5),
    "uniformer3d_xxs_4_128": _published(63.2, _KINETICS),
    "uniformer3d_xxs_32_160": _published(77.9, _KINETICS),
    "uniformer3d_xs": _published(78.6, _KINETICS),
}
