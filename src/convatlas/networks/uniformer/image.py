"""UniFormer for images: classification, dense prediction in windows, and token labelling.

Li, Wang, Zhang, Gao, Song, Liu, Li, Qiao: "UniFormer: Unifying Convolution and Self-attention for Visual Recognition",
TPAMI 2023, arXiv 2201.09450, sections 3.3 and 3.4. Token labelling is that of Jiang et al.: "All Tokens Matter: Token
Labeling for Training Better Vision Transformers", NeurIPS 2021, arXiv 2104.10858.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, get_args

from torch import Tensor, nn

from convatlas.data.transforms import Preprocess
from convatlas.errors import unknown
from convatlas.networks.base import PublishedFile
from convatlas.networks.uniformer.blocks import GlobalBlock, LocalBlock, WindowBlock, conv_embed, patch_embed
from convatlas.networks.uniformer.trunk import LAYOUTS, STRIDE, Trunk, TrunkConfig
from convatlas.ops.tokens import map_to_tokens
from convatlas.weights import Layout

__all__ = ["PUBLISHED", "VARIANTS", "Box", "Stage3", "TokenScores", "UniFormer", "UniFormerConfig", "mix_tokens"]

#: Which positions the blocks of stage 3 relate.
Stage3 = Literal["global", "window", "hybrid"]
#: Rows and columns of a part of a map: top, left, bottom, right, the last two outside.
Box = tuple[int, int, int, int]

#: Every so many blocks of a hybrid stage one is global.
_GLOBAL_EVERY = 4
#: Share of the best token's score in the scores of an image.
_TOKEN_SHARE = 0.5
#: Positions of the first map that one of the last spans on each axis.
_SHRINKING = 8


@dataclass(frozen=True, kw_only=True)
class UniFormerConfig(TrunkConfig):
    """Config of `UniFormer`.

    Attributes:
        conv_stem: embed by overlapping 3x3 convolutions with batch norm instead of patches with LayerNorm.
        local_layer_scale: whether local blocks, too, have the factors that ``layer_scale_init`` asks for.
        token_head: a second classifier that names every token of the last map (token labelling).
        pyramid: a LayerNorm for the map of each stage in place of the batch norm behind the last, as in the authors'
            detectors and segmenters.
        stage3: blocks of stage 3: all global, all in windows, or three in windows and one global in turn (hybrid).
        window_size: side of the windows, in positions of stage 3 (16 pixels each).
    """

    conv_stem: bool = False
    local_layer_scale: bool = False
    token_head: bool = False
    pyramid: bool = False
    stage3: Stage3 = "global"
    window_size: int = 14

    def build(self) -> UniFormer:
        return UniFormer(self)


class TokenScores(NamedTuple):
    """What a network with a token head puts out for token labelling.

    Attributes:
        image: class scores (B, K) of the mean over positions.
        tokens: class scores (B, N, K) of each position, row by row, unmixed.
        box: where, on the last map, tokens of the flipped batch were mixed in.
        grid: rows and columns of the last map.
    """

    image: Tensor
    tokens: Tensor
    box: Box
    grid: tuple[int, int]


class UniFormer(Trunk):
    """Two stages of local blocks, two of global ones, on maps of 1/4, 1/8, 1/16 and 1/32 of the image's size.

    Patches that are cut are left out; the convolutional stem sees all pixels. `forward_features` ends with the normed
    map that the classifier reads.

    Args:
        config: what to build.

    Raises:
        ValueError: a tuple does not name four stages, head_dim does not divide dims, window_size is smaller than 1, or
            layer scale of local blocks is asked for without an initial factor.
        UnknownName: there is no such kind of stage 3.
    """

    layouts: ClassVar[Mapping[str, Layout]] = LAYOUTS

    config: UniFormerConfig

    def __init__(self, config: UniFormerConfig) -> None:
        if config.stage3 not in get_args(Stage3):
            raise unknown("stage3", config.stage3, get_args(Stage3))
        if config.window_size < 1:
            raise ValueError(f"window_size must be at least 1, got {config.window_size}")
        if config.local_layer_scale and config.layer_scale_init is None:
            raise ValueError("local_layer_scale needs layer_scale_init, got None")
        super().__init__(config, stage_norms=config.pyramid)
        self.min_size = 1 if config.conv_stem else STRIDE
        self.aux_head: nn.Module | None = nn.Identity() if config.token_head else None
        self._finish()

    @property
    def stem_modules(self) -> tuple[str, ...]:  # type: ignore[override]
        """The convolution that reads the image."""
        return ("stages.0.patch_embed.proj.0" if self.config.conv_stem else "stages.0.patch_embed.proj",)

    @property
    def classifier_modules(self) -> tuple[str, ...]:  # type: ignore[override]
        """The classifiers of the image and of its tokens."""
        return ("head", "aux_head") if self.config.token_head else ("head",)

    def _embedding(self, stage: int) -> nn.Module:
        before, width = self._before(stage), self.config.dims[stage]
        if self.config.conv_stem:
            widths = (width // 2, width) if stage == 0 else (width,)
            return conv_embed(before, widths, [(2, 2)] * len(widths))
        side = (4, 4) if stage == 0 else (2, 2)
        return patch_embed(before, width, side, side, (0, 0))

    def _block(self, stage: int, index: int, drop_path: float) -> nn.Module:
        config = self.config
        if stage < 2:
            init = config.layer_scale_init if config.local_layer_scale else None
            return LocalBlock(self._options(stage, layer_scale_init=init), drop_path)
        everywhere = config.stage3 == "global" or (config.stage3 == "hybrid" and (index + 1) % _GLOBAL_EVERY == 0)
        if stage == 3 or everywhere:
            return GlobalBlock(self._options(stage), drop_path)
        return WindowBlock(self._options(stage), drop_path, window_size=config.window_size)

    def forward(self, x: Tensor, box: Box | None = None) -> Tensor | TokenScores:  # type: ignore[override]
        """Class scores (B, num_classes) of an image (B, in_channels, H, W).

        Args:
            x: the images.
            box: for token labelling: the part of the map of stage 1 in which each sample takes the place of the one at
                its place in the flipped batch (MixToken); an empty one mixes nothing. Gives `TokenScores`, in which the
                tokens of the part have been put back.

        Raises:
            ValueError: x has a wrong number of dimensions or channels or is too small; or there is a box, and the
                network has no token head or the box does not lie on the map.
        """
        if box is None:
            return self.forward_head(self.forward_features(x)[-1])
        if self.aux_head is None:
            raise ValueError(f"box needs a network with a token head (token_head=True), got {box}")
        x = self._features(x, partial(_mixed, box=box))[-1]
        coarse: Box = tuple(edge // _SHRINKING for edge in box)  # type: ignore[assignment]
        tokens = self.aux_head(map_to_tokens(mix_tokens(x, coarse)))
        return TokenScores(self.head(x.mean((2, 3))), tokens, coarse, (x.shape[2], x.shape[3]))

    def forward_head(self, x: Tensor) -> Tensor:
        """Class scores of the last map; a token head adds half of the largest score that a token gives each class."""
        tokens = map_to_tokens(x)
        scores = self.head(tokens.mean(1))
        if self.aux_head is None or self.num_classes == 0:
            return scores
        return scores + _TOKEN_SHARE * self.aux_head(tokens).amax(1)

    def reset_classifier(self, num_classes: int) -> None:
        super().reset_classifier(num_classes)
        if self.config.token_head:
            self.aux_head = self._classifier(num_classes)


def mix_tokens(x: Tensor, box: Box) -> Tensor:
    """Maps (B, C, H, W) whose part in ``box`` comes from the flipped batch; doing it twice changes nothing."""
    top, left, bottom, right = box
    if bottom <= top or right <= left:
        return x
    mixed = x.clone()
    mixed[:, :, top:bottom, left:right] = x.flip(0)[:, :, top:bottom, left:right]
    return mixed


def _mixed(x: Tensor, box: Box) -> Tensor:
    *_, bottom, right = box
    if min(box) < 0 or bottom > x.shape[2] or right > x.shape[3]:
        raise ValueError(f"box must lie on the map of {x.shape[2]} x {x.shape[3]}, got {box}")
    return mix_tokens(x, box)


_SMALL = UniFormerConfig()
_PLUS = UniFormerConfig(depths=(3, 5, 9, 3), head_dim=32, conv_stem=True)
_BASE = UniFormerConfig(depths=(5, 8, 20, 7), drop_path=0.3)
_LARGE = UniFormerConfig(
    depths=(5, 10, 24, 7),
    dims=(128, 192, 448, 640),
    layer_scale_init=1e-6,
    local_layer_scale=True,
    token_head=True,
    drop_path=0.4,
)
_AT_384 = Preprocess(size=384, crop=1.0)


def _labelled(config: UniFormerConfig, **changes: Any) -> UniFormerConfig:
    return config.override(token_head=True, **changes)


def _dense(config: UniFormerConfig, stage3: Stage3 = "global") -> UniFormerConfig:
    return config.override(pyramid=True, stage3=stage3)


#: ``tl``: trained by token labelling, with a head for tokens; where two releases differ only in ``head_dim`` it is in
#: the name. ``dense``: backbones of detectors and segmenters, global or h14 (hybrid stage 3, windows of 14). What the
#: paper calls h32 and w32 are global weights tested with ``window_size=32`` and ``stage3`` hybrid or window.
VARIANTS: dict[str, UniFormerConfig] = {
    "uniformer_small": _SMALL,
    "uniformer_small_plus": _PLUS,
    "uniformer_small_plus_dim64": _PLUS.override(head_dim=64),
    "uniformer_base": _BASE,
    "uniformer_base_ls": _BASE.override(layer_scale_init=1e-6),
    "uniformer_small_tl": _labelled(_SMALL, head_dim=32),
    "uniformer_small_plus_tl": _labelled(_PLUS),
    "uniformer_small_plus_dim64_tl": _labelled(_PLUS, head_dim=64),
    "uniformer_base_tl": _labelled(_BASE, head_dim=32),
    "uniformer_base_dim64_tl": _labelled(_BASE),
    "uniformer_large_ls": _LARGE,
    "uniformer_small_tl_384": _labelled(_SMALL, head_dim=32, preprocess=_AT_384),
    "uniformer_small_plus_tl_384": _labelled(_PLUS, preprocess=_AT_384),
    "uniformer_base_tl_384": _labelled(_BASE, head_dim=32, preprocess=_AT_384),
    "uniformer_large_ls_384": _LARGE.override(preprocess=_AT_384),
    "uniformer_small_dense": _dense(_SMALL),
    "uniformer_small_dense_h14": _dense(_SMALL, "hybrid"),
    "uniformer_base_dense": _dense(_BASE),
    "uniformer_base_dense_h14": _dense(_BASE, "hybrid"),
}

_HUB = "hf://Sense-X/uniformer_image"
_PAGE = "https://github.com/Sense-X/UniFormer/tree/main/image_classification"


def _published(top1: float, file: str | None = None) -> tuple[PublishedFile, ...]:
    """A file on the authors' hub, or one that their page links to a drive."""
    return (
        PublishedFile(
            f"{_HUB}/{file}.pth" if file else _PAGE, "MIT", {"ImageNet-1K top-1 [%]": top1}, by_hand=file is None
        ),
    )


PUBLISHED: dict[str, tuple[PublishedFile, ...]] = {
    "uniformer_small": _published(82.9, "uniformer_small_in1k"),
    "uniformer_small_plus": _published(83.4),
    "uniformer_small_plus_dim64": _published(83.4),
    "uniformer_base": _published(83.8, "uniformer_base_in1k"),
    "uniformer_base_ls": _published(83.9),
    "uniformer_small_tl": _published(83.4),
    "uniformer_small_plus_tl": _published(83.9),
    "uniformer_base_tl": _published(85.1),
    "uniformer_large_ls": _published(85.6),
    "uniformer_small_tl_384": _published(84.6),
    "uniformer_small_plus_tl_384": _published(84.9),
    "uniformer_base_tl_384": _published(86.0),
    "uniformer_large_ls_384": _published(86.3),
}
