"""DHVT: a vision transformer that learns well on small data sets, by convolutions and by heads that interact.

Lu, Xie, Liu, Zhang: "Bridging the Gap Between Vision Transformers and Convolutional Neural Networks on Small
Datasets", NeurIPS 2022, arXiv 2210.05958. There is no position embedding of the patches, so images of any size are
taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.data.transforms import Preprocess
from convatlas.errors import unknown
from convatlas.networks.base import Backbone, BackboneConfig, Feature
from convatlas.nn.attention import SelfAttention
from convatlas.nn.drop import DropPath, drop_path_rates
from convatlas.nn.init import init_linear
from convatlas.nn.mlp import Mlp
from convatlas.ops.attention import multi_head_attention
from convatlas.ops.tokens import map_to_tokens, prepend_tokens, tokens_to_map
from convatlas.weights import Layout

__all__ = ["DAFF", "DHVT", "SOPE", "VARIANTS", "Affine", "DHVTConfig", "HeadInteractedAttention"]

_ATTENTIONS = ("head_interacted", "self")
_MLPS = ("daff", "plain")


@dataclass(frozen=True, kw_only=True)
class DHVTConfig(BackboneConfig):
    """Config of `DHVT`.

    Attributes:
        patch_size: side of a patch, a power of two; 2, 4 and 16 are published.
        dim: channels C of the tokens.
        depth: blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of DAFF or the MLP over C.
        kernel_size: side of DAFF's depthwise kernel, odd.
        attention: ``head_interacted``, or ``self`` for attention without head tokens.
        mlp: ``daff``, or ``plain`` for an MLP of each token.
        qkv_bias: whether queries, keys and values have a bias.
        drop: rate of the dropout behind the attentions, and in plain MLPs.
        attn_drop: rate of the dropout of the attention weights.
        drop_path: rate at the last block; it rises linearly from 0.
    """

    patch_size: int = 4
    dim: int = 192
    depth: int = 12
    num_heads: int = 4
    mlp_ratio: float = 4
    kernel_size: int = 3
    attention: Literal["head_interacted", "self"] = "head_interacted"
    mlp: Literal["daff", "plain"] = "daff"
    qkv_bias: bool = True
    drop: float = 0.0
    attn_drop: float = 0.0
    drop_path: float = 0.1

    def build(self) -> DHVT:
        return DHVT(self)


class Affine(nn.Module):
    """alpha * x + beta with learnt values for each channel of a map, 1 and 0 at first.

    Args:
        channels: channels of the map.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        return torch.addcmul(self.beta, self.alpha, x)


class SOPE(nn.Module):
    """Sequential overlapping patch embedding (SOPE): 3 x 3 convolutions of stride 2 between two affine maps.

    Each convolution is followed by batch norm, and doubles the channels up to ``channels`` at the last; GELU stands
    between them, and behind the only one where patches have 2 pixels.

    Args:
        in_channels: channels of the image.
        channels: channels of a token.
        patch_size: side of a patch, a power of two.

    Raises:
        ValueError: patch_size is no power of two, or channels cannot be halved often enough.
    """

    def __init__(self, in_channels: int, channels: int, patch_size: int) -> None:
        super().__init__()
        steps = patch_size.bit_length() - 1
        if steps < 1 or patch_size != 2**steps:
            raise ValueError(f"patch_size must be a power of two such as 2, 4 or 16, got {patch_size}")
        if channels % 2 ** (steps - 1):
            raise ValueError(
                f"channels must be divisible by {2 ** (steps - 1)} for patches of {patch_size}, got {channels}"
            )
        widths = [in_channels, *(channels // 2**step for step in reversed(range(steps)))]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            conv = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
            layers += [nn.Sequential(conv, nn.BatchNorm2d(after)), nn.GELU()]
        self.pre_affine = Affine(in_channels)
        self.proj = nn.Sequential(*(layers if steps == 1 else layers[:-1]))
        self.post_affine = Affine(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map an image (B, in_channels, H, W) to tokens on a grid (B, channels, H / P, W / P), sizes rounded up."""
        return self.post_affine(self.proj(self.pre_affine(x)))


class HeadInteractedAttention(SelfAttention):
    """Self-attention among the tokens and one more token for each head (HI-MHSA).

    The part of all tokens that belongs to a head is averaged and projected to the full width: this head token takes
    part in the attention of all heads, and so lets them know of each other. What becomes of the head tokens is averaged
    and added to the class token.

    Args:
        channels: channels C of the tokens.
        num_heads: h, divides C.
        qkv_bias: whether queries, keys and values have a bias.
        attn_drop: probability to drop one of the softmax's outputs.
        drop: probability of the dropout behind.

    Raises:
        ValueError: num_heads does not divide channels.
    """

    def __init__(
        self, channels: int, num_heads: int, *, qkv_bias: bool = True, attn_drop: float = 0.0, drop: float = 0.0
    ) -> None:
        super().__init__(channels, num_heads, qkv_bias=qkv_bias, attn_drop=attn_drop, drop=drop)
        head_channels = channels // num_heads
        self.ht_proj = nn.Linear(head_channels, channels)
        self.ht_norm = nn.LayerNorm(head_channels)
        self.pos_embed = nn.Parameter(torch.empty(1, num_heads, channels))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, 1 + N, C), the class token first, to the same shape."""
        count = x.shape[1]
        query, key, value = self.qkv(torch.cat([x, self.head_tokens(x)], dim=1)).chunk(3, dim=-1)
        dropout = self.attn_drop if self.training else 0.0
        y = self.proj(multi_head_attention(query, key, value, self.num_heads, dropout=dropout))
        class_token = y[:, :1] + y[:, count:].mean(1, keepdim=True)
        return self.drop(torch.cat([class_token, y[:, 1:count]], dim=1))

    def head_tokens(self, x: Tensor) -> Tensor:
        """The tokens (B, h, C) that stand for the heads, of tokens (B, 1 + N, C)."""
        heads = self.ht_proj(x.mean(1).unflatten(-1, (self.num_heads, -1)))
        heads = F.gelu(self.ht_norm(heads.unflatten(-1, (self.num_heads, -1))))
        return heads.flatten(2) + self.pos_embed


class DAFF(nn.Module):
    """Dynamic aggregation feed forward (DAFF): a convolutional MLP of the patches that scales the class token.

    The patches pass a 1 x 1 convolution, a depthwise one with a shortcut, and a 1 x 1 one, each followed by batch norm.
    The class token is multiplied by a squeeze and excitation of the result, without a sigmoid.

    Args:
        channels: channels C of the tokens.
        hidden_channels: channels in between.
        kernel_size: side of the depthwise kernel; odd.

    Raises:
        ValueError: kernel_size is even, or channels are fewer than four.
    """

    def __init__(self, channels: int, hidden_channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        if channels < 4:
            raise ValueError(f"channels must be at least 4, so that a quarter of them is left, got {channels}")
        half = kernel_size // 2
        self.conv1 = nn.Conv2d(channels, hidden_channels, 1)
        self.bn1 = nn.BatchNorm2d(hidden_channels)
        self.conv2 = nn.Conv2d(hidden_channels, hidden_channels, kernel_size, padding=half, groups=hidden_channels)
        self.bn2 = nn.BatchNorm2d(hidden_channels)
        self.conv3 = nn.Conv2d(hidden_channels, channels, 1)
        self.bn3 = nn.BatchNorm2d(channels)
        self.compress = nn.Linear(channels, channels // 4)
        self.excitation = nn.Linear(channels // 4, channels)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Map tokens (B, 1 + N, C), the class token first, to the same shape.

        Args:
            x: the class token and one token for each patch, row by row.
            grid: rows and columns of the patches; a square when left out.

        Raises:
            ValueError: the patches do not fill the grid.
        """
        patches = x.shape[1] - 1
        grid = grid or (math.isqrt(max(patches, 0)),) * 2
        if patches < 1 or math.prod(grid) != patches:
            raise ValueError(
                f"x must hold a class token and {grid[0]} x {grid[1]} patches, got {x.shape[1]} tokens: give the grid "
                "of patches that are no square"
            )
        z = F.gelu(self.bn1(self.conv1(tokens_to_map(x[:, 1:], grid))))
        z = z + F.gelu(self.bn2(self.conv2(z)))
        m = self.bn3(self.conv3(z))
        weight = self.excitation(F.gelu(self.compress(m.mean((2, 3)))))
        return torch.cat([x[:, :1] * weight[:, None], map_to_tokens(m)], dim=1)


class _Block(nn.Module):
    """x + HI(LN(x)), then x + DAFF(LN(x))."""

    def __init__(self, config: DHVTConfig, drop_path: float) -> None:
        super().__init__()
        channels, hidden = config.dim, int(config.mlp_ratio * config.dim)
        attention = HeadInteractedAttention if config.attention == "head_interacted" else SelfAttention
        self.norm1 = nn.LayerNorm(channels, eps=1e-6)
        self.attn = attention(
            channels, config.num_heads, qkv_bias=config.qkv_bias, attn_drop=config.attn_drop, drop=config.drop
        )
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)
        self.mlp: DAFF | Mlp
        if config.mlp == "daff":
            self.mlp = DAFF(channels, hidden, config.kernel_size)
        else:
            self.mlp = Mlp(channels, hidden, drop=config.drop)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        y = self.norm2(x)
        return x + self.drop_path(self.mlp(y, grid) if isinstance(self.mlp, DAFF) else self.mlp(y))


def _for_channels(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    # The loader adapts the first convolution to other input channels; the affine map before it follows. A single
    # channel gets the mean of all, more get them in turn.
    if isinstance(model, DHVT):
        for name in ("patch_embed.pre_affine.alpha", "patch_embed.pre_affine.beta"):
            value, channels = state[name], model.in_channels
            if channels == 1:
                state[name] = value.mean(1, keepdim=True)
            elif channels != value.shape[1]:
                state[name] = value[:, torch.arange(channels) % value.shape[1]]
    return state


class DHVT(Backbone):
    """The network of the paper: SOPE, blocks of head-interacted attention and DAFF, classifier of the class token.

    `forward_features` gives the normalised patches as one map; `forward_head` takes the normalised class token. The
    names of the weights are those of the authors.

    Args:
        config: what to build.

    Raises:
        ValueError: patch_size is no power of two, num_heads does not divide dim, kernel_size is even, or attention or
            mlp is unknown.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {"authors": Layout(function=_for_channels)}
    classifier_modules: ClassVar[tuple[str, ...]] = ("head",)
    stem_modules: ClassVar[tuple[str, ...]] = ("patch_embed.proj.0.0",)
    #: As the authors left it, the `pos_embed` of the head tokens is decayed.
    undecayed: ClassVar[tuple[str, ...]] = ("cls_token",)
    min_size = 1

    def __init__(self, config: DHVTConfig) -> None:
        super().__init__(config)
        if config.attention not in _ATTENTIONS:
            raise unknown("attention", config.attention, _ATTENTIONS)
        if config.mlp not in _MLPS:
            raise unknown("mlp", config.mlp, _MLPS)
        if config.depth < 1:
            raise ValueError(f"depth must be at least 1, got {config.depth}")
        self.feature_info = (Feature(config.dim, config.patch_size),)
        self.patch_embed = SOPE(config.in_channels, config.dim, config.patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.dim))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.blocks = nn.ModuleList(
            _Block(config, rate) for rate in drop_path_rates(config.drop_path, (config.depth,))[0]
        )
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.apply(init_linear)
        self.reset_classifier(config.num_classes)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        return [self.forward_tokens(x)[0]]

    def forward_tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The map (B, C, H, W) of `forward_features`, and the normalised class token (B, C)."""
        tokens, grid = self._tokens(x)
        tokens = self.norm(tokens)
        return tokens_to_map(tokens[:, 1:], grid), tokens[:, 0]

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.norm(self._tokens(x)[0][:, 0]))

    def forward_head(self, x: Tensor) -> Tensor:
        """Class scores of the normalised class token (B, C)."""
        return self.head(x)

    def _tokens(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        self._check_input(x)
        x = self._run_stage(self.patch_embed, x)
        grid = (x.shape[2], x.shape[3])
        tokens = prepend_tokens(self.cls_token, map_to_tokens(x))
        for block in self.blocks:
            tokens = self._run_stage(block, tokens, grid)
        return tokens, grid

    def reset_classifier(self, num_classes: int) -> None:
        self.config = self.config.override(num_classes=num_classes)
        self.head: nn.Module = nn.Identity()
        if num_classes > 0:
            weight = self.norm.weight
            self.head = nn.Linear(self.config.dim, num_classes, device=weight.device, dtype=weight.dtype)
            init_linear(self.head)


_CIFAR = DHVTConfig(num_classes=100, preprocess=Preprocess(size=32, crop=1.0))
_DOMAIN = DHVTConfig(num_classes=345, patch_size=16)
_IMAGENET = DHVTConfig(patch_size=16, num_heads=3)

VARIANTS: dict[str, DHVTConfig] = {
    "dhvt_tiny_cifar_patch4": _CIFAR,
    "dhvt_tiny_cifar_patch2": _CIFAR.override(patch_size=2),
    "dhvt_small_cifar_patch4": _CIFAR.override(dim=384, num_heads=8),
    "dhvt_small_cifar_patch2": _CIFAR.override(dim=384, num_heads=8, patch_size=2),
    "dhvt_tiny_domain_patch16": _DOMAIN,
    "dhvt_small_domain_patch16": _DOMAIN.override(dim=384, num_heads=6),
    "dhvt_tiny_imagenet_patch16": _IMAGENET,
    "dhvt_small_imagenet_patch16": _IMAGENET.override(dim=384, num_heads=6),
}
