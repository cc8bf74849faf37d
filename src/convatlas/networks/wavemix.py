"""WaveMix: networks of one resolution whose blocks mix tokens by a wavelet transform; to classify, segment and enlarge.

Jeevan, Viswanathan, Anandu, Sethi: "WaveMix: A Resource-efficient Neural Network for Image Analysis", 2022,
arXiv 2205.14375; WaveMix-Lite are the networks with blocks of one level. The accuracies in the names of the authors'
files are those of their table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from convatlas.data.transforms import Preprocess
from convatlas.errors import unknown
from convatlas.networks.base import Backbone, BackboneConfig, Feature, NetworkConfig, PublishedFile
from convatlas.nn.mixers.wavemix import WaveMixBlock, WaveMixBlockV1, WaveMixBlockV3
from convatlas.ops.wavelets import Mode
from convatlas.weights import Layout

__all__ = [
    "PUBLISHED",
    "VARIANTS",
    "WaveMix",
    "WaveMixConfig",
    "WaveMixSR",
    "WaveMixSRConfig",
    "WaveMixSegmenter",
    "WaveMixSegmenterConfig",
]

#: Makes a block that keeps the shape, from its channels; the network adds the block's input to its result.
Block = Callable[[int], nn.Module]

_LAYOUT = Layout(
    renames=(
        (r"^conv\.", "stem."),
        (r"^layers\.", "blocks."),
        (r"^pool\.2\.(?=\w+$)", "head."),
        *WaveMixBlock.layouts["authors"].renames,
    )
)
_DENSE_LAYOUT = Layout(
    renames=(
        (r"^conv\.", "stem."),
        (r"^layers\.", "blocks."),
        (r"^(expand|pool)\.", "head."),
        *WaveMixBlock.layouts["authors"].renames,
    )
)


@dataclass(frozen=True, kw_only=True)
class _BodyConfig:
    """What stem and blocks are, in every task.

    Attributes:
        depth: number of blocks.
        dim: channels.
        ff_channels: channels before the transposed convolution of a block; dim when left out.
        mult: hidden width of a block over dim.
        level: levels of the wavelet transform, 1 to 4.
        dropout: rate within the blocks.
        block: version of the block; the released weights have ``wavemix``.
        wavelet: name of the wavelet.
        mode: what lies beyond the border where a map is odd; sizes that do not divide are refused when left out.
        stem: ``patchify``, three convolutions of which the last cuts into patches (the authors also write
            ``pachify``), or ``strided``, two.
        patch_size: of the patchify stem: side of a patch.
        stride: of the strided stem: of each of its two convolutions.
    """

    depth: int = 16
    dim: int = 192
    ff_channels: int | None = None
    mult: int = 2
    level: int = 3
    dropout: float = 0.5
    block: Literal["wavemix", "v1", "v3"] = "wavemix"
    wavelet: str = "haar"
    mode: Mode | None = None
    stem: Literal["patchify", "pachify", "strided"] = "patchify"
    patch_size: int = 4
    stride: int = 2

    @property
    def total_stride(self) -> int:
        """Input pixels that one position of a map spans."""
        return self.stride**2 if self.stem == "strided" else self.patch_size


@dataclass(frozen=True, kw_only=True)
class WaveMixConfig(_BodyConfig, BackboneConfig):
    """Config of `WaveMix`; further attributes are those of stem and blocks, and of every classifier.

    Attributes:
        head_channels: width of a 1x1 convolution before the pooling, as version 2 has it; none when left out.
    """

    head_channels: int | None = None

    def build(self) -> WaveMix:
        return WaveMix(self)


class WaveMix(Backbone):
    """The classifier: stem, blocks with a shortcut each, mean over the positions, linear layer.

    Args:
        config: what to build.
        block: makes a block from its channels, for studies with another one; by default that of the config.

    Raises:
        ValueError: depth, dim, level or stride is out of range, or the block refuses its part.
        UnknownName: there is no such stem or block.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {"authors": _LAYOUT}
    classifier_modules: ClassVar[tuple[str, ...]] = ("head",)
    stem_modules: ClassVar[tuple[str, ...]] = ("stem.0",)

    def __init__(self, config: WaveMixConfig, *, block: Block | None = None) -> None:
        super().__init__(config)
        self.stem = _stem(config, config.in_channels)
        self.blocks = _blocks(config, block)
        self.feature_info = (Feature(config.dim, config.total_stride),)
        width = config.head_channels
        self.expansion = nn.Identity() if width is None else nn.Conv2d(config.dim, width, 1)
        self.head: nn.Module = nn.Identity()
        self.reset_classifier(config.num_classes)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        self._check_input(x)
        x = _embedded(x, self.stem, self.blocks, self.config.total_stride)
        for block in self.blocks:
            x = self._run_stage(block, x) + x
        return [x]

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(self.expansion(x).mean((2, 3)))

    def reset_classifier(self, num_classes: int) -> None:
        self.config = self.config.override(num_classes=num_classes)
        weight = next(self.stem.parameters())
        width = self.config.head_channels or self.config.dim
        self.head = nn.Identity()
        if num_classes:
            self.head = nn.Linear(width, num_classes, device=weight.device, dtype=weight.dtype)


@dataclass(frozen=True, kw_only=True)
class WaveMixSegmenterConfig(_BodyConfig, NetworkConfig):
    """Config of `WaveMixSegmenter`; further attributes are those of stem and blocks.

    Attributes:
        num_classes: number of classes, the void one included; the Cityscapes weights have void first and 19 others.
        in_channels: channels of the image.
        head_channels: channels behind the two transposed convolutions; dim / 2 and dim / 4 when left out.
        preprocess: how the published weights expect an image to be prepared.
    """

    num_classes: int = 20
    in_channels: int = 3
    head_channels: tuple[int, int] | None = None
    preprocess: Preprocess = field(default_factory=lambda: Preprocess(size=(1024, 2048), crop=1.0))

    def build(self) -> WaveMixSegmenter:
        return WaveMixSegmenter(self)


class WaveMixSegmenter(nn.Module):
    """Class scores of each pixel: stem, blocks, two transposed convolutions and a 1x1 convolution.

    Args:
        config: what to build. The scores have the image's size if the stem has a total stride of 4, else 4 / stride of
            it.
        block: as for `WaveMix`.

    Raises:
        ValueError: num_classes, in_channels or a part of the body is out of range.
        UnknownName: there is no such stem or block.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {"authors": _DENSE_LAYOUT}

    def __init__(self, config: WaveMixSegmenterConfig, *, block: Block | None = None) -> None:
        super().__init__()
        for name in ("num_classes", "in_channels"):
            if getattr(config, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
        self.config = config
        self.stem = _stem(config, config.in_channels)
        self.blocks = _blocks(config, block)
        first, second = config.head_channels or (config.dim // 2, config.dim // 4)
        self.head = nn.Sequential(
            nn.ConvTranspose2d(config.dim, first, 4, stride=2, padding=1),
            nn.ConvTranspose2d(first, second, 4, stride=2, padding=1),
            nn.Conv2d(second, config.num_classes, 1),
        )

    @property
    def in_channels(self) -> int:
        """Channels of the image."""
        return self.config.in_channels

    def forward(self, x: Tensor) -> Tensor:
        """Scores (B, num_classes, H, W) of an image (B, in_channels, H, W)."""
        _check_image(x, self.config.in_channels)
        stride = self.config.total_stride
        height, width = (4 * length // stride for length in x.shape[2:])
        return self.head(_mixed(_embedded(x, self.stem, self.blocks, stride), self.blocks))[..., :height, :width]

    def example_inputs(self, batch: int = 1) -> tuple[Tensor, ...]:
        """A random image of the published size, for tracing and timing."""
        return (torch.randn(batch, self.config.in_channels, *self.config.preprocess.shape),)


@dataclass(frozen=True, kw_only=True)
class WaveMixSRConfig(_BodyConfig, NetworkConfig):
    """Config of `WaveMixSR`; further attributes are those of blocks. Its stem is strided, with a stride of 1.

    Attributes:
        in_channels: channels of the image.
        size: of the image that `example_inputs` gives, in pixels.
    """

    depth: int = 4
    dim: int = 144
    level: int = 1
    stem: Literal["patchify", "pachify", "strided"] = "strided"
    stride: int = 1
    in_channels: int = 3
    size: int = 256

    def build(self) -> WaveMixSR:
        return WaveMixSR(self)


class WaveMixSR(nn.Module):
    """An image of twice the size: two 3x3 convolutions, blocks, transposed convolution, 1x1 convolution.

    Values are in [0, 1] as published.

    Args:
        config: what to build.
        block: as for `WaveMix`.

    Raises:
        ValueError: in_channels or a part of the body is out of range, or the stem changes the size.
        UnknownName: there is no such block.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {"authors": _DENSE_LAYOUT}

    def __init__(self, config: WaveMixSRConfig, *, block: Block | None = None) -> None:
        super().__init__()
        if config.in_channels < 1:
            raise ValueError(f"in_channels must be at least 1, got {config.in_channels}")
        if config.total_stride != 1:
            raise ValueError(f"the stem of WaveMixSR must keep the size, got a total stride of {config.total_stride}")
        self.config = config
        self.stem = _stem(config, config.in_channels)
        self.blocks = _blocks(config, block)
        self.head = nn.Sequential(
            nn.ConvTranspose2d(config.dim, config.dim // 2, 4, stride=2, padding=1),
            nn.Conv2d(config.dim // 2, config.in_channels, 1),
        )

    @property
    def in_channels(self) -> int:
        """Channels of the image."""
        return self.config.in_channels

    def forward(self, x: Tensor) -> Tensor:
        """An image (B, in_channels, 2 H, 2 W) from one (B, in_channels, H, W)."""
        _check_image(x, self.config.in_channels)
        return self.head(_mixed(_embedded(x, self.stem, self.blocks, 1), self.blocks))

    def example_inputs(self, batch: int = 1) -> tuple[Tensor, ...]:
        """A random image, for tracing and timing."""
        return (torch.rand(batch, self.config.in_channels, self.config.size, self.config.size),)


def _stem(config: _BodyConfig, in_channels: int) -> nn.Sequential:
    dim = config.dim
    if min(config.patch_size, config.stride) < 1:
        raise ValueError(f"patch_size and stride must be at least 1, got {config.patch_size} and {config.stride}")
    if dim < 4 or dim % 4:
        raise ValueError(f"dim must be divisible by 4, got {dim}")
    if config.stem == "strided":
        return nn.Sequential(
            nn.Conv2d(in_channels, dim // 2, 3, stride=config.stride, padding=1),
            nn.Conv2d(dim // 2, dim, 3, stride=config.stride, padding=1),
        )
    if config.stem not in ("patchify", "pachify"):
        raise unknown("stem", config.stem, ("patchify", "strided"))
    return nn.Sequential(
        nn.Conv2d(in_channels, dim // 4, 3, padding=1),
        nn.Conv2d(dim // 4, dim // 2, 3, padding=1),
        nn.Conv2d(dim // 2, dim, config.patch_size, stride=config.patch_size),
        nn.GELU(),
        nn.BatchNorm2d(dim),
    )


def _blocks(config: _BodyConfig, block: Block | None) -> nn.ModuleList:
    if config.depth < 1:
        raise ValueError(f"depth must be at least 1, got {config.depth}")
    if block is None:
        common: dict[str, Any] = {name: getattr(config, name) for name in ("mult", "dropout", "wavelet", "mode")}
        versions: dict[str, Block] = {
            "wavemix": partial(WaveMixBlock, ff_channels=config.ff_channels, level=config.level, **common),
            "v1": partial(WaveMixBlockV1, ff_channels=config.ff_channels, **common),
            "v3": partial(WaveMixBlockV3, **common),
        }
        if config.block not in versions:
            raise unknown("block", config.block, versions)
        block = versions[config.block]
    return nn.ModuleList(block(config.dim) for _ in range(config.depth))


def _embedded(x: Tensor, stem: nn.Module, blocks: nn.ModuleList, stride: int) -> Tensor:
    """What the blocks get; refuses an image whose map they cannot halve."""
    y: Tensor = stem(x)
    levels = 0 if getattr(blocks[0], "mode", None) else getattr(blocks[0], "levels", 0)
    if y.shape[2] % 2**levels or y.shape[3] % 2**levels:
        raise ValueError(
            f"spatial size must be divisible by {stride * 2**levels} (stem stride {stride}, {levels} levels), "
            f"got {x.shape[2]} x {x.shape[3]}; mode='reflect' takes any size"
        )
    return y


def _mixed(x: Tensor, blocks: nn.ModuleList) -> Tensor:
    for block in blocks:
        x = block(x) + x
    return x


def _check_image(x: Tensor, channels: int) -> None:
    if x.dim() != 4 or x.shape[1] != channels or min(x.shape[2:]) < 1:
        raise ValueError(f"x must be (B, {channels}, H, W), got {tuple(x.shape)}")


_CIFAR10 = Preprocess(size=32, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), crop=1.0)
_CIFAR100 = Preprocess(size=32, mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762), crop=1.0)
_TINY_IMAGENET = Preprocess(size=64, crop=1.0)
_LARGE = Preprocess(size=256, crop=1.0)


def _small(depth: int, dim: int, num_classes: int, preprocess: Preprocess) -> WaveMixConfig:
    """Images of 32 or 64 pixels keep their resolution: both convolutions of the stem have stride 1."""
    return WaveMixConfig(
        depth=depth, dim=dim, level=1, stem="strided", stride=1, num_classes=num_classes, preprocess=preprocess
    )


#: Named by channels, depth and levels, and by the data where it is not ImageNet-1K. The size, crop and normalisation
#: that the published accuracies were measured with are not stated, except for the data sets' own mean and deviation.
VARIANTS: dict[str, Any] = {
    "wavemix_192_16_l1": WaveMixConfig(level=1),
    "wavemix_192_16_l3": WaveMixConfig(),
    "wavemix_256_16_l3": WaveMixConfig(dim=256),
    "wavemix_256_16_l4": WaveMixConfig(dim=256, level=4, stem="strided", preprocess=_LARGE),
    "wavemix_256_12_l2_places365": WaveMixConfig(
        depth=12, dim=256, level=2, patch_size=8, num_classes=365, preprocess=_LARGE
    ),
    "wavemix_144_7_l1_cifar10": _small(7, 144, 10, _CIFAR10),
    "wavemix_320_8_l1_cifar10": _small(8, 320, 10, _CIFAR10),
    "wavemix_256_8_l1_cifar100": _small(8, 256, 100, _CIFAR100),
    "wavemix_256_10_l1_cifar100": _small(10, 256, 100, _CIFAR100),
    "wavemix_256_12_l1_tiny_imagenet": _small(12, 256, 200, _TINY_IMAGENET),
    "wavemix_192_16_l3_tiny_imagenet": WaveMixConfig(num_classes=200, preprocess=_TINY_IMAGENET),
    "wavemix_192_16_l1_galaxy10": WaveMixConfig(level=1, num_classes=10, preprocess=_LARGE),
    "wavemix_192_16_l3_galaxy10": WaveMixConfig(num_classes=10, preprocess=_LARGE),
    "wavemix_v2_240_12_l3": WaveMixConfig(depth=12, dim=240, head_channels=1024),
    "wavemix_segmenter_192_16_l3_cityscapes": WaveMixSegmenterConfig(head_channels=(128, 64)),
    "wavemix_segmenter_256_16_l4": WaveMixSegmenterConfig(dim=256, level=4, stem="strided"),
    "wavemix_sr_144_4_l1": WaveMixSRConfig(),
}

_WEIGHTS = "https://huggingface.co/cloudwalker/wavemix/resolve/main/Saved_Models_Weights"


def _file(name: str, figure: str, value: float) -> PublishedFile:
    return PublishedFile(f"{_WEIGHTS}/{name}.pth", "MIT", {figure: value})


_IMAGENET = "ImageNet-1K top-1 [%]"

PUBLISHED: dict[str, tuple[PublishedFile, ...]] = {
    "wavemix_192_16_l1": (_file("ImageNet/wavemixlite_71.18", _IMAGENET, 71.18),),
    "wavemix_192_16_l3": (_file("ImageNet/wavemix_192_16_75.06", _IMAGENET, 75.06),),
    "wavemix_256_16_l3": (_file("ImageNet/ImageNet73.03", _IMAGENET, 73.03),),
    "wavemix_256_16_l4": (_file("ImageNet/imagenet4level_70.42", _IMAGENET, 70.42),),
    "wavemix_256_12_l2_places365": (_file("Places365/places365_54.94", "Places365 top-1 [%]", 54.94),),
    "wavemix_144_7_l1_cifar10": (_file("cifar10/cifar10_94.58", "CIFAR-10 top-1 [%]", 94.58),),
    "wavemix_320_8_l1_cifar10": (_file("cifar10/cifar10_95.37", "CIFAR-10 top-1 [%]", 95.37),),
    "wavemix_256_8_l1_cifar100": (_file("cifar100/cifar100_77.82", "CIFAR-100 top-1 [%]", 77.82),),
    "wavemix_256_10_l1_cifar100": (_file("cifar100/cifar100_78.81", "CIFAR-100 top-1 [%]", 78.81),),
    "wavemix_256_12_l1_tiny_imagenet": (_file("tinyimagenet/tinyimagenet_62.51", "Tiny ImageNet top-1 [%]", 62.51),),
    "wavemix_192_16_l3_tiny_imagenet": (
        _file("tinyimagenet/tiny_78.76", "Tiny ImageNet top-1 [%]", 78.76),
        _file("tinyimagenet/tiny_71.69", "Tiny ImageNet top-1 [%]", 71.69),
    ),
    "wavemix_192_16_l1_galaxy10": (_file("galaxy10/galaxy_90.23", "Galaxy10 DECaLS top-1 [%]", 90.23),),
    "wavemix_192_16_l3_galaxy10": (_file("galaxy10/galaxy_95.42", "Galaxy10 DECaLS top-1 [%]", 95.42),),
    "wavemix_segmenter_192_16_l3_cityscapes": (
        # The authors call it mean IoU, but their code counts the common bits of label numbers.
        _file("cityscapes_83.04", "Cityscapes, score of the authors' code [%]", 83.04),
    ),
}
