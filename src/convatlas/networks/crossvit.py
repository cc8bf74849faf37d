"""CrossViT: two vision transformers on patches of two sizes, whose class tokens visit the patches of the other.

Chen, Fan, Panda: "CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image Classification", ICCV 2021,
arXiv 2103.14899.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.data.transforms import Preprocess
from convatlas.errors import unknown
from convatlas.networks.base import Backbone, BackboneConfig, Feature, PublishedFile
from convatlas.nn.attention import SelfAttention, check_heads
from convatlas.nn.drop import DropPath, drop_path_rates
from convatlas.nn.init import init_linear
from convatlas.nn.mlp import Mlp
from convatlas.ops.attention import attention_weights, multi_head_attention
from convatlas.ops.position import resize_position_embedding
from convatlas.ops.tokens import map_to_tokens, prepend_tokens, tokens_to_map
from convatlas.weights import Layout, PositionTable

__all__ = ["PUBLISHED", "VARIANTS", "CrossAttention", "CrossViT", "CrossViTConfig", "MultiScaleBlock"]

#: Sides of the image that the branches see: for 240 pixels 240 and 224, whose grids of patches are 20 x 20 and 14 x 14.
_SHARES = ((1, 1), (14, 15))
_RESIZES = ("fixed", "proportional")


@dataclass(frozen=True, kw_only=True)
class CrossViTConfig(BackboneConfig):
    """Config of `CrossViT`; tuples have an entry for each branch, fine patches first.

    Attributes:
        image_sizes: sides of the image that each branch sees, multiples of its patch size; one value or height and
            width. When left out, the size of ``preprocess`` for the first branch and 14/15 of it for the others, to the
            nearest multiple: 240 and 224 for 240 pixels, 408 and 384 for 408.
        resize: what becomes of images of another size than that of ``preprocess``. ``fixed``, as published: each branch
            sees them resized to its ``image_sizes``; other proportions are kept by making one side longer.
            ``proportional``: the branches see larger images larger, so that the strides of ``feature_info`` hold. The
            position tables follow.
        patch_sizes: sides of the patches.
        multi_conv: embed patches by three convolutions instead of one (the dagger variants); for patches of 12 and 16.
        dims: channels.
        num_heads: attention heads.
        mlp_ratios: hidden width of the MLPs over the channels.
        depths: for each multi-scale block the transformer blocks of each branch (N and M in the paper) and, last, the
            layers of cross-attention (L); 0 is one layer, too, under the names of the published weights.
        qkv_bias: whether queries, keys and values have a bias.
        qk_scale: factor of the attention scores; (channels / heads)^-0.5 when left out.
        norm_eps: added to the variance in every LayerNorm.
        drop: rate of the dropout behind the embeddings, in the MLPs and behind the attentions.
        attn_drop: rate of the dropout of the attention weights.
        drop_path: rate at the last block; it rises linearly from 0.
    """

    image_sizes: tuple[int | tuple[int, int], ...] | None = None
    resize: Literal["fixed", "proportional"] = "fixed"
    patch_sizes: tuple[int, ...] = (12, 16)
    multi_conv: bool = False
    dims: tuple[int, ...] = (192, 384)
    num_heads: tuple[int, ...] = (6, 6)
    mlp_ratios: tuple[float, ...] = (4, 4)
    depths: tuple[tuple[int, ...], ...] = ((1, 4, 0), (1, 4, 0), (1, 4, 0))
    qkv_bias: bool = True
    qk_scale: float | None = None
    norm_eps: float = 1e-6
    drop: float = 0.0
    attn_drop: float = 0.0
    drop_path: float = 0.1
    preprocess: Preprocess = field(default_factory=lambda: Preprocess(size=240))

    def build(self) -> CrossViT:
        return CrossViT(self)


class _PatchEmbedding(nn.Module):
    """Patches of one size as tokens, a class token in front, and a learnt row added to each (section 3.1)."""

    def __init__(self, config: CrossViTConfig, branch: int, grid: tuple[int, int]) -> None:
        super().__init__()
        channels, patch_size = config.dims[branch], config.patch_sizes[branch]
        self.grid = grid
        if config.multi_conv:
            self.proj: nn.Sequential = _three_convs(config.in_channels, channels, patch_size)
        else:
            self.proj = nn.Sequential(nn.Conv2d(config.in_channels, channels, patch_size, stride=patch_size))
        self.cls_token = nn.Parameter(torch.empty(1, 1, channels))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + math.prod(grid), channels))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.drop = nn.Dropout(config.drop)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, 1 + N, C) of an image whose sides are multiples of the patch size."""
        x = self.proj(x)
        table = resize_position_embedding(
            self.pos_embed, (x.shape[2], x.shape[3]), num_prefix_tokens=1, source_grid=self.grid
        )
        return self.drop(prepend_tokens(self.cls_token, map_to_tokens(x)) + table)


def _three_convs(in_channels: int, channels: int, patch_size: int) -> nn.Sequential:
    middle, padding, last = {12: (3, 0, 1), 16: (2, 1, 2)}[patch_size]
    return nn.Sequential(
        nn.Conv2d(in_channels, channels // 4, 7, stride=4, padding=3),
        nn.ReLU(),
        nn.Conv2d(channels // 4, channels // 2, 3, stride=middle, padding=padding),
        nn.ReLU(),
        nn.Conv2d(channels // 2, channels, 3, stride=last, padding=1),
    )


class _Block(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x)) (section 3.1)."""

    def __init__(self, attn: SelfAttention, mlp: Mlp, channels: int, drop_path: float, norm_eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=norm_eps)
        self.attn = attn
        self.norm2 = nn.LayerNorm(channels, eps=norm_eps)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class CrossAttention(nn.Module):
    """Attention of the class token, the only query, on all tokens (section 3.3): its cost is linear in their number.

    Args:
        channels: channels C of the tokens.
        num_heads: divides C.
        qkv_bias: whether queries, keys and values have a bias.
        scale: factor of the scores; (C / num_heads)^-0.5 when left out.
        attn_drop: probability to drop one of the softmax's outputs.
        drop: probability of the dropout behind.

    Raises:
        ValueError: num_heads does not divide channels.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        scale: float | None = None,
        attn_drop: float = 0.0,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        check_heads(channels, num_heads)
        self.num_heads = num_heads
        self.scale = scale
        self.attn_drop = attn_drop
        self.wq = nn.Linear(channels, channels, bias=qkv_bias)
        self.wk = nn.Linear(channels, channels, bias=qkv_bias)
        self.wv = nn.Linear(channels, channels, bias=qkv_bias)
        self.proj = nn.Linear(channels, channels)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """What becomes of the class token, (B, 1, C): the first of the tokens (B, N, C), itself a key and a value."""
        query, key, value = self.wq(x[:, :1]), self.wk(x), self.wv(x)
        dropout = self.attn_drop if self.training else 0.0
        y = multi_head_attention(query, key, value, self.num_heads, scale=self.scale, dropout=dropout)
        return self.drop(self.proj(y))

    def attention_weights(self, x: Tensor) -> Tensor:
        """What the class token of (B, N, C) attends to: (B, num_heads, N), whose rows sum to 1."""
        return attention_weights(self.wq(x[:, :1]), self.wk(x), self.num_heads, scale=self.scale).squeeze(2)

    def merged(self) -> nn.Module | None:
        """For `convatlas.surgery.merge`: the same at a fraction of the cost; None if a part was replaced."""
        return _MergedCrossAttention(self) if type(self.wk) is type(self.wv) is nn.Linear else None


class _MergedCrossAttention(nn.Module):
    """Cross-attention with its products in another order: no token has a key or a value of its own.

    For the one query q of a head, q . (W_k u) = (W_k^T q) . u, and the sum of a_n W_v u_n is W_v times the sum of
    a_n u_n. With h heads N tokens take 2 N h C multiply-adds instead of 2 N C^2. The bias of the keys adds the same to
    every score, and so drops out; that of the values comes through as it is, for the a_n sum to 1.
    """

    def __init__(self, layer: CrossAttention) -> None:
        super().__init__()
        heads = (layer.num_heads, -1)
        self.wq, self.proj = layer.wq, layer.proj
        self.key = nn.Parameter(layer.wk.weight.detach().unflatten(0, heads).clone())
        self.value = nn.Parameter(layer.wv.weight.detach().unflatten(0, heads).clone())
        self.value_bias = None if layer.wv.bias is None else nn.Parameter(layer.wv.bias.detach().clone())
        self.scale = self.key.shape[1] ** -0.5 if layer.scale is None else layer.scale

    def forward(self, x: Tensor) -> Tensor:
        read = multi_head_attention(self._queries(x), x, x, 1, scale=self.scale)
        y = torch.einsum("bhc,hdc->bhd", read, self.value).flatten(1)
        return self.proj(y if self.value_bias is None else y + self.value_bias)[:, None]

    def attention_weights(self, x: Tensor) -> Tensor:
        return attention_weights(self._queries(x), x, 1, scale=self.scale).squeeze(1)

    def _queries(self, x: Tensor) -> Tensor:
        return torch.einsum("bhd,hdc->bhc", self.wq(x[:, 0]).unflatten(-1, self.key.shape[:2]), self.key)


class _CrossAttentionLayer(nn.Module):
    """y = x_0 + CA(LN(x)) of the class token x_0 (figure 4)."""

    def __init__(self, attn: CrossAttention, channels: int, drop_path: float, norm_eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=norm_eps)
        self.attn = attn
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1] + self.drop_path(self.attn(self.norm1(x)))


class MultiScaleBlock(nn.Module):
    """Transformer blocks in each branch, then the exchange of information by class tokens (figures 2 and 4).

    The class token of a branch is projected to the width of the next branch, attends to the patches of that branch, and
    is projected back (f and g in the paper). It replaces the class token that it was; patch tokens do not change. Both
    branches read what the transformer blocks left.

    Args:
        dims: channels of each branch.
        depth: transformer blocks of each branch and, last, layers of cross-attention; 0 is one layer that is no list.
        num_heads: attention heads of each branch; cross-attention has those of the branch whose patches it reads.
        mlp_ratios: hidden width of the MLPs over the channels.
        qkv_bias: whether queries, keys and values have a bias.
        qk_scale: factor of the attention scores; (channels / heads)^-0.5 when left out.
        norm_eps: added to the variance in every LayerNorm.
        drop: rate of the dropout in the MLPs and behind the attentions.
        attn_drop: rate of the dropout of the attention weights.
        drop_path: rates of the transformer blocks, which both branches share; cross-attention has the last one. Zeros
            when left out.

    Raises:
        ValueError: the arguments name different branches, a branch has no block, or num_heads does not divide dims.
    """

    def __init__(
        self,
        dims: Sequence[int],
        depth: Sequence[int],
        num_heads: Sequence[int],
        mlp_ratios: Sequence[float],
        *,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        norm_eps: float = 1e-6,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        count = len(dims)
        if count < 2 or not len(num_heads) == len(mlp_ratios) == len(depth) - 1 == count:
            raise ValueError(
                "dims, num_heads, mlp_ratios and all but the last number of depth must name the same two or more "
                f"branches, got {dims}, {num_heads}, {mlp_ratios} and {depth}"
            )
        *blocks, layers = depth
        if min(blocks) < 1 or layers < 0:
            raise ValueError(f"depth must give each branch a block or more, and 0 or more layers last, got {depth}")
        rates = drop_path or [0.0] * _slots(depth)
        options = {"qkv_bias": qkv_bias, "scale": qk_scale, "attn_drop": attn_drop, "drop": drop}

        def block(branch: int, rate: float) -> _Block:
            attn = SelfAttention(dims[branch], num_heads[branch], **options)  # type: ignore[arg-type]
            mlp = Mlp(dims[branch], int(dims[branch] * mlp_ratios[branch]), drop=drop)
            return _Block(attn, mlp, dims[branch], rate, norm_eps)

        def fusion(branch: int) -> nn.Module:
            made = []
            for _ in range(max(layers, 1)):
                attn = CrossAttention(dims[branch], num_heads[branch], **options)  # type: ignore[arg-type]
                made.append(_CrossAttentionLayer(attn, dims[branch], rates[-1], norm_eps))
            return nn.Sequential(*made) if layers else made[0]

        def projection(before: int, after: int) -> nn.Module:
            norm = nn.LayerNorm(dims[before], eps=norm_eps)
            return nn.Sequential(norm, nn.GELU(), nn.Linear(dims[before], dims[after]))

        following = [(branch + 1) % count for branch in range(count)]
        self.blocks = nn.ModuleList(
            nn.Sequential(*(block(branch, rates[index]) for index in range(blocks[branch]))) for branch in range(count)
        )
        self.projs = nn.ModuleList(projection(branch, other) for branch, other in enumerate(following))
        self.fusion = nn.ModuleList(fusion(other) for other in following)
        self.revert_projs = nn.ModuleList(projection(other, branch) for branch, other in enumerate(following))

    def forward(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        """Map the tokens (B, 1 + N_b, C_b) of each branch to the same shapes."""
        return self.exchange(self.encode(tokens))

    def encode(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        """The tokens of each branch behind its transformer blocks, before the exchange."""
        return [blocks(own) for blocks, own in zip(self.blocks, tokens, strict=True)]

    def exchange(self, encoded: Sequence[Tensor]) -> list[Tensor]:
        """Map what `encode` gave to the same shapes; only the class tokens change."""
        parts = zip(encoded, self.fusion, self.revert_projs, self._visitors(encoded), strict=True)
        return [torch.cat([back(fusion(visitor)), own[:, 1:]], dim=1) for own, fusion, back, visitor in parts]

    def class_attention(self, encoded: Sequence[Tensor]) -> list[Tensor]:
        """What the class token of each branch attends to in the first layer of cross-attention.

        Args:
            encoded: what `encode` gave.

        Returns:
            For each branch (B, heads, 1 + N) over the class token itself and the N patches of the next branch.
        """
        maps = []
        for fusion, visitor in zip(self.fusion, self._visitors(encoded), strict=True):
            first: Any = fusion[0] if isinstance(fusion, nn.Sequential) else fusion
            maps.append(first.attn.attention_weights(first.norm1(visitor)))
        return maps

    def _visitors(self, encoded: Sequence[Tensor]) -> list[Tensor]:
        """The projected class token of each branch in front of the patches of the next branch."""
        others = [*encoded[1:], encoded[0]]
        return [
            torch.cat([proj(own[:, :1]), other[:, 1:]], dim=1)
            for proj, own, other in zip(self.projs, encoded, others, strict=True)
        ]


def _slots(depth: Sequence[int]) -> int:
    """Drop path rates that a multi-scale block uses up: those of its deepest branch and of the cross-attention."""
    *blocks, layers = depth
    return max(blocks) + layers


_AUTHORS = Layout(
    renames=(
        (r"^patch_embed\.(\d+)\.proj\.(weight|bias)$", r"embeddings.\1.proj.0.\2"),
        (r"^patch_embed\.", "embeddings."),
        (r"^(cls_token|pos_embed)[._](\d+)$", r"embeddings.\2.\1"),  # timm writes an underscore
    )
)


class CrossViT(Backbone):
    """The network of figure 2: embeddings of each branch, multi-scale blocks, the mean of the branches' class scores.

    `forward_features` gives the normalised patch tokens of each branch as a map; `forward_head` takes the normalised
    class tokens of all branches side by side. Loads the layouts of the authors and of timm.

    Args:
        config: what to build.

    Raises:
        ValueError: the tuples of the config name different branches, an image size is not divisible by the patch size,
            num_heads does not divide dims, patches do not go with multi_conv, or resize is unknown.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {"authors": _AUTHORS}
    undecayed: ClassVar[tuple[str, ...]] = ("cls_token", "pos_embed")

    def __init__(self, config: CrossViTConfig) -> None:
        super().__init__(config)
        count = len(config.dims)
        for name in ("patch_sizes", "num_heads", "mlp_ratios"):
            if len(getattr(config, name)) != count:
                raise ValueError(
                    f"{name} must have an entry for each of the {count} branches, got {getattr(config, name)}"
                )
        if not config.depths:
            raise ValueError("depths must hold at least one multi-scale block, got none")
        if config.multi_conv and not set(config.patch_sizes) <= {12, 16}:
            raise ValueError(f"multi_conv needs patch sizes of 12 or 16, got {config.patch_sizes}")
        if config.resize not in _RESIZES:
            raise unknown("resize", config.resize, _RESIZES)
        self.image_sizes = _image_sizes(config)
        grids = [
            (height // patch, width // patch)
            for (height, width), patch in zip(self.image_sizes, config.patch_sizes, strict=True)
        ]
        shape = config.preprocess.shape
        self.feature_info = tuple(
            Feature(channels, round(shape[0] / grid[0])) for channels, grid in zip(config.dims, grids, strict=True)
        )
        self.min_size: int | tuple[int, ...] = 1
        if config.resize == "proportional":
            # Half a patch is rounded up to one.
            self.min_size = tuple(
                max(-(-side // (2 * grid[axis])) for grid in grids) for axis, side in enumerate(shape)
            )
        self.embeddings = nn.ModuleList(_PatchEmbedding(config, branch, grid) for branch, grid in enumerate(grids))
        self.position_embeddings = {
            f"embeddings.{branch}.pos_embed": PositionTable(1, grid) for branch, grid in enumerate(grids)
        }
        rates = drop_path_rates(config.drop_path, tuple(_slots(depth) for depth in config.depths))
        self.blocks = nn.ModuleList(
            MultiScaleBlock(
                config.dims,
                depth,
                config.num_heads,
                config.mlp_ratios,
                qkv_bias=config.qkv_bias,
                qk_scale=config.qk_scale,
                norm_eps=config.norm_eps,
                drop=config.drop,
                attn_drop=config.attn_drop,
                drop_path=own,
            )
            for depth, own in zip(config.depths, rates, strict=True)
        )
        self.norm = nn.ModuleList(nn.LayerNorm(channels, eps=config.norm_eps) for channels in config.dims)
        self.stem_modules = tuple(f"embeddings.{branch}.proj.0" for branch in range(count))  # type: ignore[misc]
        self.classifier_modules = tuple(f"head.{branch}" for branch in range(count))  # type: ignore[misc]
        self.apply(init_linear)
        self.reset_classifier(config.num_classes)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        return self.forward_branches(x)[0]

    def forward_branches(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The maps of `forward_features`, and the normalised class token (B, C_b) of each branch."""
        tokens, grids = self._tokens(x)
        normed = [norm(own) for norm, own in zip(self.norm, tokens, strict=True)]
        maps = [tokens_to_map(own[:, 1:], grid) for own, grid in zip(normed, grids, strict=True)]
        return maps, [own[:, 0] for own in normed]

    def forward(self, x: Tensor) -> Tensor:
        tokens, _ = self._tokens(x)
        return self.forward_head(
            torch.cat([norm(own[:, 0]) for norm, own in zip(self.norm, tokens, strict=True)], dim=1)
        )

    def forward_head(self, x: Tensor) -> Tensor:
        """Class scores of the class tokens of all branches (B, C_0 + C_1); these themselves without a classifier."""
        if self.num_classes == 0:
            return x
        parts = x.split(self.config.dims, dim=1)
        return torch.stack([head(part) for head, part in zip(self.head, parts, strict=True)]).mean(0)

    def class_attention(self, x: Tensor) -> list[list[Tensor]]:
        """What the class tokens attend to in the other branch, for an image (B, C, H, W).

        Returns:
            For each multi-scale block and each branch (B, heads, rows, columns) over the patches of the next branch;
            1 less their sum is what the class token keeps of itself.
        """
        self._check_input(x)
        views = self.views(x)
        tokens: Sequence[Tensor] = [embed(view) for embed, view in zip(self.embeddings, views, strict=True)]
        grids = [self._grid(view, branch) for branch, view in enumerate(views)]
        maps = []
        for block in self.blocks:
            encoded = block.encode(tokens)  # type: ignore[operator]
            rows = zip(block.class_attention(encoded), [*grids[1:], grids[0]], strict=True)  # type: ignore[operator]
            maps.append([weights[..., 1:].unflatten(-1, grid) for weights, grid in rows])
            tokens = block.exchange(encoded)  # type: ignore[operator]
        return maps

    def views(self, x: Tensor) -> list[Tensor]:
        """The image that each branch sees: bicubic without antialiasing, as it is where the size is right."""
        seen = []
        for size in self._sizes(x.shape[2], x.shape[3]):
            view = x
            # Symbolic sizes of an exported program cannot be compared; resizing to the same size changes nothing.
            if not all(isinstance(side, int) for side in size) or size != tuple(x.shape[2:]):
                exact = x.to(torch.promote_types(x.dtype, torch.float32))
                view = F.interpolate(exact, size=size, mode="bicubic", align_corners=False).to(x.dtype)
            seen.append(view)
        return seen

    def _sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        sizes = []
        for (rows, columns), patch in zip(self.image_sizes, self.config.patch_sizes, strict=True):
            if self.config.resize == "fixed":
                # One side becomes exactly what it should be, the other one at least.
                tall = torch.sym_max(rows, _nearest(height * columns, width, patch))
                wide = torch.sym_max(columns, _nearest(width * rows, height, patch))
                sizes.append((tall, wide))
            else:
                whole = self.config.preprocess.shape
                sizes.append((_nearest(height * rows, whole[0], patch), _nearest(width * columns, whole[1], patch)))
        return sizes

    def _tokens(self, x: Tensor) -> tuple[list[Tensor], list[tuple[int, int]]]:
        """The tokens (B, 1 + N_b, C_b) behind the last block, and the grid of the patches, of each branch."""
        self._check_input(x)
        views = self.views(x)
        tokens = [self._run_stage(embed, view) for embed, view in zip(self.embeddings, views, strict=True)]
        for block in self.blocks:
            tokens = self._run_stage(block, tokens)
        return tokens, [self._grid(view, branch) for branch, view in enumerate(views)]

    def _grid(self, view: Tensor, branch: int) -> tuple[int, int]:
        patch = self.config.patch_sizes[branch]
        return view.shape[2] // patch, view.shape[3] // patch

    def layers(self) -> list[nn.Module]:
        return [self.embeddings, *self.blocks, self.norm, self.head]

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifiers of all branches by fresh ones for ``num_classes`` classes."""
        self.config = self.config.override(num_classes=num_classes)
        self.head = nn.ModuleList()
        if num_classes > 0:
            like = next(self.norm.parameters())
            for channels in self.config.dims:
                self.head.append(nn.Linear(channels, num_classes, device=like.device, dtype=like.dtype))
            self.head.apply(init_linear)


def _nearest(numerator: int, denominator: int, multiple: int) -> int:
    """The multiple that is nearest to a fraction."""
    return (2 * numerator + denominator * multiple) // (2 * denominator * multiple) * multiple


def _image_sizes(config: CrossViTConfig) -> list[tuple[int, int]]:
    """Height and width of what each branch sees of an image of the size of ``preprocess``."""
    if config.image_sizes is None:
        sizes = []
        for branch, patch in enumerate(config.patch_sizes):
            share, whole = _SHARES[min(branch, 1)]
            height, width = (max(patch, _nearest(side * share, whole, patch)) for side in config.preprocess.shape)
            sizes.append((height, width))
        return sizes
    if len(config.image_sizes) != len(config.dims):
        raise ValueError(
            f"image_sizes must have an entry for each of the {len(config.dims)} branches, got {config.image_sizes}"
        )
    sizes = [(size, size) if isinstance(size, int) else size for size in config.image_sizes]
    for branch, (size, patch) in enumerate(zip(sizes, config.patch_sizes, strict=True)):
        for side in size:
            if side < 1 or side % patch:
                raise ValueError(f"branch {branch}: image size {side} is not divisible by patch size {patch}")
    return sizes


def _deep(blocks: int) -> tuple[tuple[int, ...], ...]:
    return ((1, blocks, 0),) * 3


_9 = CrossViTConfig(dims=(128, 256), num_heads=(4, 4), mlp_ratios=(3, 3), depths=_deep(3))
_15 = CrossViTConfig(mlp_ratios=(3, 3), depths=_deep(5))
_18 = CrossViTConfig(dims=(224, 448), num_heads=(7, 7), mlp_ratios=(3, 3), depths=_deep(6))
# The branches of these see 408 and 384 pixels; evaluation resizes to 408 without a crop beyond the square.
_408 = Preprocess(size=408, crop=1.0)

VARIANTS: dict[str, CrossViTConfig] = {
    "crossvit_tiny_224": CrossViTConfig(dims=(96, 192), num_heads=(3, 3)),
    "crossvit_small_224": CrossViTConfig(),
    "crossvit_base_224": CrossViTConfig(dims=(384, 768), num_heads=(12, 12)),
    "crossvit_9_224": _9,
    "crossvit_15_224": _15,
    "crossvit_18_224": _18,
    "crossvit_9_dagger_224": _9.override(multi_conv=True),
    "crossvit_15_dagger_224": _15.override(multi_conv=True),
    "crossvit_18_dagger_224": _18.override(multi_conv=True),
    "crossvit_15_dagger_384": _15.override(multi_conv=True, preprocess=_408),
    "crossvit_18_dagger_384": _18.override(multi_conv=True, preprocess=_408),
}


def _published(name: str, top1: float) -> tuple[PublishedFile, ...]:
    url = f"https://github.com/IBM/CrossViT/releases/download/weights-0.1/{name}.pth"
    return (PublishedFile(url, "Apache-2.0", {"ImageNet-1K top-1 [%]": top1}),)


PUBLISHED: dict[str, tuple[PublishedFile, ...]] = {
    "crossvit_tiny_224": _published("crossvit_tiny_224", 73.4),
    "crossvit_small_224": _published("crossvit_small_224", 81.0),
    "crossvit_base_224": _published("crossvit_base_224", 82.2),
    "crossvit_9_224": _published("crossvit_9_224", 73.9),
    "crossvit_15_224": _published("crossvit_15_224", 81.5),
    "crossvit_18_224": _published("crossvit_18_224", 82.5),
    "crossvit_9_dagger_224": _published("crossvit_9_dagger_224", 77.1),
    "crossvit_15_dagger_224": _published("crossvit_15_dagger_224", 82.3),
    "crossvit_18_dagger_224": _published("crossvit_18_dagger_224", 82.8),
    "crossvit_15_dagger_384": _published("crossvit_15_dagger_384", 83.5),
    "crossvit_18_dagger_384": _published("crossvit_18_dagger_384", 83.9),
}
