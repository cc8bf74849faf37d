"""As-ViT: four-stage vision transformers from a genotype string, found and scaled without training.

Chen, Huang, Du, Song, Wang, Zhou: "Auto-scaling Vision Transformers without Training", ICLR 2022, arXiv 2202.11921.

The search for a topology, the automatic scaling and the scores behind both are in `convatlas.design.as_vit`, the
training with coarse tokens first in `convatlas.training.progressive_tokens`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.networks.base import Backbone, BackboneConfig, Feature
from convatlas.nn.drop import DropPath, drop_path_rates
from convatlas.nn.embedding import PatchEmbed
from convatlas.nn.init import init_linear
from convatlas.nn.mlp import Mlp
from convatlas.ops.attention import multi_head_attention
from convatlas.ops.position import resize_position_embedding
from convatlas.ops.tokens import tokens_to_map
from convatlas.ops.windows import merge_windows, partition_windows
from convatlas.weights import Layout, PositionTable

__all__ = ["VARIANTS", "AsViT", "AsViTConfig", "Genotype", "PatchMerging", "WindowAttention"]

_LARGEST_WIDTH = 1024
_STRIDE = 4


@dataclass(frozen=True)
class Genotype:
    """A topology and its size, written ``K1,S1,E1,L1|K2,...|K3,...|K4,...|HEAD,HIDDEN``.

    Depths of 1 and the width 32 of the search may be left out: ``8,2,3|4,1,2|4,1,4|4,1,6|32`` is the authors' seed.

    Attributes:
        kernels: K, side of the overlapping patches that enter each stage.
        splits: S, windows of a stage along each side; 1 is global attention.
        expansions: E, hidden width of the MLPs over their channels.
        heads: HEAD, attention heads of the last stage, divisible by 8; the stages have an eighth, a quarter, a half
            and all of them.
        depths: L, blocks of each stage.
        hidden: HIDDEN, channels of the first stage; they double from stage to stage, up to 1024.

    Raises:
        ValueError: a number is out of range, or channels are fewer than heads.
    """

    kernels: tuple[int, int, int, int]
    splits: tuple[int, int, int, int]
    expansions: tuple[int, int, int, int]
    heads: int
    depths: tuple[int, int, int, int] = (1, 1, 1, 1)
    hidden: int = 32

    def __post_init__(self) -> None:
        for name in ("kernels", "splits", "expansions", "depths"):
            values = getattr(self, name)
            if len(values) != 4 or min(values) < 1:
                raise ValueError(f"{name} must be four positive numbers, got {values}")
        if self.kernels[0] < _STRIDE or min(self.kernels) < 2:
            raise ValueError(f"kernels must be at least 4, 2, 2 and 2, the strides, got {self.kernels}")
        if self.heads < 8 or self.heads % 8:
            raise ValueError(f"heads must be divisible by 8, got {self.heads}")
        for channels, heads in zip(self.dims, self.num_heads, strict=True):
            if channels < heads:
                raise ValueError(f"hidden must leave each head a channel, got {channels} channels for {heads} heads")

    @property
    def dims(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(min(_LARGEST_WIDTH, self.hidden * 2**stage) for stage in range(4))

    @property
    def num_heads(self) -> tuple[int, ...]:
        """Attention heads of each stage."""
        return tuple(self.heads // share for share in (8, 4, 2, 1))

    @classmethod
    def parse(cls, text: str) -> Self:
        """A genotype from its string.

        Raises:
            ValueError: the string is malformed; the message says where.
        """
        *stages, last = text.split("|")
        if len(stages) != 4:
            raise ValueError(f"a genotype must have 4 stages and the heads, separated by |, got {text!r}")
        rows = [_numbers(stage, (3, 4), f"stage {number} of {text!r}") for number, stage in enumerate(stages, 1)]
        end = _numbers(last, (1, 2), f"the last part of {text!r}")
        kernels, splits, expansions, depths = zip(*((*row, 1)[:4] for row in rows), strict=True)
        return cls(kernels, splits, expansions, end[0], depths, *end[1:])

    def __str__(self) -> str:
        seed = self.depths == (1, 1, 1, 1) and self.hidden == 32
        columns = (self.kernels, self.splits, self.expansions, *(() if seed else (self.depths,)))
        rows = [",".join(map(str, row)) for row in zip(*columns, strict=True)]
        return "|".join([*rows, str(self.heads) if seed else f"{self.heads},{self.hidden}"])

    def parameters(self, *, num_classes: int = 1000, in_channels: int = 3) -> int:
        """Number of parameters of the network, without building it."""
        first, total = self.dims[0], 0
        total += first * (in_channels * self.kernels[0] ** 2 + 1) + 2 * first
        stages = zip(self.dims, self.num_heads, self.expansions, self.depths, strict=True)
        for channels, heads, expansion, depth in stages:
            inner, hidden = heads * (channels // heads), channels * expansion
            attention = (channels + 1) * 3 * inner + (inner + 1) * channels
            mlp = (channels + 1) * hidden + (hidden + 1) * channels
            total += depth * (4 * channels + attention + mlp)
        for before, after, kernel in zip(self.dims, self.dims[1:], self.kernels[1:], strict=False):
            total += kernel**2 * before * (after + 2)
        last = self.dims[-1]
        return total + 2 * last + (last + 1) * (last + num_classes) if num_classes else total + 2 * last


def _numbers(text: str, lengths: tuple[int, int], where: str) -> tuple[int, ...]:
    words = text.split(",")
    if len(words) not in lengths or not all(word.strip().isdecimal() for word in words):
        raise ValueError(f"{where} needs {lengths[0]} or {lengths[1]} numbers")
    return tuple(map(int, words))


@dataclass(frozen=True, kw_only=True)
class AsViTConfig(BackboneConfig):
    """Config of `AsViT`.

    Attributes:
        genotype: topology and size, see `Genotype`.
        num_mlps: MLPs of a block, each a residual of its own.
        absolute_position: add a learnt position embedding to the tokens, made for the size of ``preprocess``.
        drop_path: rate at the last block; it rises linearly from 0.

    Raises:
        ValueError: the genotype is malformed, or num_mlps is smaller than 1.
    """

    genotype: str = "8,2,3|4,1,2|4,1,4|4,1,6|32"
    num_mlps: int = 1
    absolute_position: bool = False
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        Genotype.parse(self.genotype)
        if self.num_mlps < 1:
            raise ValueError(f"num_mlps must be at least 1, got {self.num_mlps}")

    def build(self) -> AsViT:
        return AsViT(self)


class WindowAttention(nn.Module):
    """Attention within each of S x S windows, whose sides grow with the map; no shift and no position bias.

    A map that S does not divide has zeros added at the bottom and on the right, as in Swin's code; they take part.

    Args:
        channels: channels C; each head has floor(C / num_heads).
        num_heads: attention heads.
        split: S, windows along each side.
    """

    def __init__(self, channels: int, num_heads: int, split: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.split = split
        inner = num_heads * (channels // num_heads)
        self.qkv = nn.Linear(channels, 3 * inner)
        self.proj = nn.Linear(inner, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to the same shape."""
        grid = (x.shape[1], x.shape[2])
        window = (-(-grid[0] // self.split), -(-grid[1] // self.split))
        query, key, value = self.qkv(partition_windows(x, window)).chunk(3, dim=-1)
        return merge_windows(self.proj(multi_head_attention(query, key, value, self.num_heads)), window, grid)


class _Block(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x)), the latter once or several times."""

    def __init__(self, attn: WindowAttention, channels: int, hidden: int, num_mlps: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn = attn
        self.mlps = nn.ModuleList(nn.Sequential(nn.LayerNorm(channels), Mlp(channels, hidden)) for _ in range(num_mlps))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        for mlp in self.mlps:
            x = x + self.drop_path(mlp(x))
        return x


class PatchMerging(nn.Module):
    """Overlapping patches of k x k positions at stride 2, normalised and mapped to twice the channels.

    Args:
        in_channels: channels of the map.
        out_channels: channels of a merged position.
        kernel_size: k, at least 2; zeros around the map keep half its size, one row or column more where it is odd.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.norm = nn.LayerNorm(kernel_size**2 * in_channels)
        self.reduction = nn.Linear(kernel_size**2 * in_channels, out_channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, in_channels) to (B, H / 2, W / 2, out_channels), sizes rounded up."""
        height, width = x.shape[1:3]
        before, after = (self.kernel_size - 2) // 2, (self.kernel_size - 1) // 2
        padded = F.pad(x, (0, 0, before, after + width % 2, before, after + height % 2))
        # Channel by channel, then row by row within the patch, as torch's unfold orders them.
        patches = padded.unfold(1, self.kernel_size, 2).unfold(2, self.kernel_size, 2).flatten(3)
        return self.reduction(self.norm(patches))


class _Stage(nn.Module):
    def __init__(self, blocks: Sequence[_Block], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = downsample


class _TokenEmbedding(PatchEmbed):
    """Patches of K x K pixels, every ``stride`` of them, as tokens; the image is padded to one token a stride."""

    #: Kernel size, stride and dilation of the convolution.
    window: tuple[int, int, int]

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride, dilation = self.window
        extra = dilation * (kernel - 1) + 1 - stride  # negative where a coarse stride leaves pixels out
        before = extra // 2
        height, width = x.shape[2:]
        ends = [extra - before + -size % stride for size in (width, height)]
        x = F.pad(x, (before, ends[0], before, ends[1]))
        for part in self:
            x = part(x)
        return x


class AsViT(Backbone):
    """The network of a genotype: token embedding, four stages of window attention, merging between them, head.

    Images of any size are taken; what strides and splits do not divide is padded with zeros.

    Raises:
        ValueError: an argument of the config is wrong.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {
        "authors": Layout(renames=((r"^layers\.", "stages."), (r"^absolute_pos_embed$", "position")))
    }
    classifier_modules: ClassVar[tuple[str, ...]] = ("head.2",)
    stem_modules: ClassVar[tuple[str, ...]] = ("patch_embed.proj",)
    min_size = 1

    def __init__(self, config: AsViTConfig) -> None:
        super().__init__(config)
        genotype = Genotype.parse(config.genotype)
        dims = genotype.dims
        self.patch_embed = _TokenEmbedding(config.in_channels, dims[0], genotype.kernels[0], stride=_STRIDE)
        if config.absolute_position:
            self._grid = tuple(-(-side // _STRIDE) for side in config.preprocess.shape)
            self.position = nn.Parameter(torch.empty(1, self._grid[0] * self._grid[1], dims[0]))
            nn.init.trunc_normal_(self.position, std=0.02)
            self.position_embeddings = {"position": PositionTable(grid=(self._grid[0], self._grid[1]))}
        stages = []
        rates = drop_path_rates(config.drop_path, genotype.depths)
        for stage, channels in enumerate(dims):
            hidden = channels * genotype.expansions[stage]
            blocks = [
                _Block(
                    WindowAttention(channels, genotype.num_heads[stage], genotype.splits[stage]),
                    *(channels, hidden, config.num_mlps, rate),
                )
                for rate in rates[stage]
            ]
            last = stage == len(dims) - 1
            downsample = None if last else PatchMerging(channels, dims[stage + 1], genotype.kernels[stage + 1])
            stages.append(_Stage(blocks, downsample))
        self.stages = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(dims[-1])
        self._dims = dims
        self.set_tokenization(_STRIDE, 1)
        self.head: nn.Module = nn.Identity()
        self.apply(init_linear)
        self.reset_classifier(config.num_classes)

    def set_tokenization(self, stride: int, dilation: int) -> None:
        """Read one token from every ``stride`` pixels with a kernel spread by ``dilation``; no weight changes.

        Stride 4 and dilation 1 is what the network is made with. Coarser tokens make it cheaper (section 4.3).

        Raises:
            ValueError: stride or dilation is smaller than 1.
        """
        if min(stride, dilation) < 1:
            raise ValueError(f"stride and dilation must be at least 1, got {stride} and {dilation}")
        proj: Any = self.patch_embed.proj
        proj.stride, proj.dilation = (stride, stride), (dilation, dilation)
        self.patch_embed.window = (proj.kernel_size[0], stride, dilation)
        self.feature_info = tuple(Feature(channels, stride * 2**stage) for stage, channels in enumerate(self._dims))

    def forward_features(self, x: Tensor) -> list[Tensor]:
        self._check_input(x)
        x = self.patch_embed(x)
        if self.config.absolute_position:
            grid = (x.shape[2], x.shape[3])
            table = resize_position_embedding(self.position, grid, source_grid=(self._grid[0], self._grid[1]))
            x = x + tokens_to_map(table, grid)
        x = x.movedim(1, -1)
        features = []
        stages: Any = self.stages
        for stage in stages:
            x = self._run_stage(stage.blocks, x)
            features.append(x.movedim(-1, 1))
            if stage.downsample is not None:
                x = stage.downsample(x)
        return features

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(self.pooled(x))

    def pooled(self, x: Tensor) -> Tensor:
        """The mean (B, C) of the normalised positions of the last feature map, which the head reads."""
        return self.norm(x.movedim(1, -1)).mean((1, 2))

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a fresh one for ``num_classes`` classes; the head's hidden layer is kept."""
        self.config = self.config.override(num_classes=num_classes)
        weight, channels = self.norm.weight, self._dims[-1]
        made: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        if num_classes == 0:
            self.head = nn.Identity()
            return
        classifier = nn.Linear(channels, num_classes, **made)
        init_linear(classifier)
        if isinstance(self.head, nn.Identity):
            hidden = nn.Linear(channels, channels, **made)
            init_linear(hidden)
            self.head = nn.Sequential(hidden, nn.Tanh(), classifier)
        else:
            self.head.register_module("2", classifier)


VARIANTS: dict[str, AsViTConfig] = {
    # Any genotype, e.g. one that a search has found; without one it is the authors' seed at the width of the search.
    "as_vit": AsViTConfig(),
    "as_vit_small": AsViTConfig(genotype="8,2,3,3|4,1,2,1|4,1,4,4|4,1,6,2|32,88"),
    "as_vit_base": AsViTConfig(genotype="8,2,3,3|4,1,2,1|4,1,4,5|4,1,6,2|32,116"),
    "as_vit_large": AsViTConfig(genotype="8,2,3,5|4,1,2,2|4,1,4,5|4,1,6,2|32,180"),
}
