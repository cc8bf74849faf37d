"""ResNet, ResNets with efficient channel or efficient local attention, and ResNets of frequency dynamic convolutions.

He, Zhang, Ren, Sun: "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv 1512.03385, in the form that is
common since ("v1.5"): the 3x3 convolution of a bottleneck has the stride. Parameters are named as in torchvision.
Wang, Wu, Zhu, Li, Zuo, Hu: "ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks", CVPR 2020,
arXiv 1910.03151.
Xu, Wan: "ELA: Efficient Local Attention for Deep Convolutional Neural Networks", 2024, arXiv 2403.01123; where its
attention stands in a block is not published: here before the addition, as in ECA-Net.
Chen, Gu, Li, Fu et al.: "Frequency Dynamic Convolution for Dense Image Prediction", CVPR 2025, arXiv 2503.18783: all
convolutions of the blocks, but not the stem and the shortcuts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from convatlas.data.transforms import Preprocess
from convatlas.errors import unknown
from convatlas.networks.base import Backbone, BackboneConfig, Feature, PublishedFile
from convatlas.nn.conv.fdconv import FDCONV_LAYOUT, FDConv2d
from convatlas.nn.mixers.eca import eca_per_stage
from convatlas.nn.mixers.ela import ELA
from convatlas.weights import Layout

__all__ = ["PUBLISHED", "VARIANTS", "BasicBlock", "Bottleneck", "MakeConv", "ResNet", "ResNetConfig", "projection"]

#: Makes the attention of a block from its channels; it keeps the shape of a map (B, C, H, W).
Attention = Callable[[int], nn.Module]
#: Makes a convolution from input channels, output channels, kernel size and stride; it pads by half the kernel.
MakeConv = Callable[[int, int, int, int], nn.Module]

_LAYOUTS = {
    "authors": Layout(renames=((r"(^|\.)eca\.conv\.weight$", r"\1attention.weight"),)),
    "frequency": FDCONV_LAYOUT,
    "timm": Layout(renames=((r"(^|\.)se\.conv\.weight$", r"\1attention.weight"),)),
}


@dataclass(frozen=True, kw_only=True)
class ResNetConfig(BackboneConfig):
    """Config of `ResNet`.

    Attributes:
        block: ``"basic"`` (two 3x3 convolutions) or ``"bottleneck"`` (1x1, 3x3, 1x1).
        depths: blocks of each stage.
        widths: channels of the 3x3 convolutions of each stage; a bottleneck puts out four times as many.
        stem_width: channels of the stem.
        small_stem: a 3x3 stem that keeps the resolution, for images of about 32 pixels, instead of 7x7 with stride 2
            and max-pooling.
        stem_pool: whether a max-pooling follows the stem; by default behind the large one only.
        eca_kernel_sizes: kernel size of ECA for each stage, as numbers or as digits ("3557"); None for no attention.
        ela: variant of ELA, ``"T"``, ``"B"``, ``"S"`` or ``"L"``; None for no attention.
        fdconv_kernels: groups of frequencies of the dynamic convolutions that blocks have where both numbers of
            channels are above 16; None for plain convolutions.

    Raises:
        ValueError: both attentions are asked for.
    """

    block: str = "basic"
    depths: tuple[int, ...] = (2, 2, 2, 2)
    widths: tuple[int, ...] = (64, 128, 256, 512)
    stem_width: int = 64
    small_stem: bool = False
    stem_pool: bool | None = None
    eca_kernel_sizes: tuple[int, ...] | str | None = None
    ela: Literal["T", "B", "S", "L"] | None = None
    fdconv_kernels: int | None = None
    preprocess: Preprocess = field(default_factory=lambda: Preprocess(interpolation="bilinear"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ela is not None and self.eca_kernel_sizes is not None:
            raise ValueError(f"eca_kernel_sizes must be None with ela, got {self.eca_kernel_sizes!r}")

    def build(self) -> ResNet:
        return ResNet(self)


class BasicBlock(nn.Module):
    """y = relu(downsample(x) + attention(bn2(conv2(relu(bn1(conv1(x))))))), both convolutions 3x3 (paper, figure 5).

    Args:
        in_channels: channels of the input.
        width: channels of the convolutions and of the output.
        stride: of the first convolution.
        downsample: maps the input to the shape of the output where they differ; see `projection`.
        attention: module at the end of the residual branch that keeps the shape; by default the identity.
        conv: makes the convolutions; by default those of torch, without bias.
    """

    expansion: ClassVar[int] = 1
    layouts: ClassVar[Mapping[str, Layout]] = _LAYOUTS

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        stride: int = 1,
        downsample: nn.Module | None = None,
        attention: nn.Module | None = None,
        conv: MakeConv | None = None,
    ) -> None:
        super().__init__()
        conv = conv or _conv
        self.conv1 = conv(in_channels, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, 1)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.attention = attention or nn.Identity()
        self.downsample = downsample or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, width, H / stride, W / stride), sizes rounded up."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.attention(self.bn2(self.conv2(y)))
        return self.relu(y + self.downsample(x))


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution to four times the width, then attention; plus the shortcut (paper, figure 5).

    Args:
        in_channels: channels of the input.
        width: channels of the 3x3 convolution; the output has four times as many.
        stride: of the 3x3 convolution.
        downsample: maps the input to the shape of the output where they differ; see `projection`.
        attention: module at the end of the residual branch that keeps the shape; by default the identity.
        conv: makes the convolutions; by default those of torch, without bias.
    """

    expansion: ClassVar[int] = 4
    layouts: ClassVar[Mapping[str, Layout]] = _LAYOUTS

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        stride: int = 1,
        downsample: nn.Module | None = None,
        attention: nn.Module | None = None,
        conv: MakeConv | None = None,
    ) -> None:
        super().__init__()
        conv = conv or _conv
        self.conv1 = conv(in_channels, width, 1, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, self.expansion * width, 1, 1)
        self.bn3 = nn.BatchNorm2d(self.expansion * width)
        self.relu = nn.ReLU(inplace=True)
        self.attention = attention or nn.Identity()
        self.downsample = downsample or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, 4 * width, H / stride, W / stride), sizes rounded up."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.attention(self.bn3(self.conv3(y)))
        return self.relu(y + self.downsample(x))


_Block = type[BasicBlock] | type[Bottleneck]
_BLOCKS: dict[str, _Block] = {"basic": BasicBlock, "bottleneck": Bottleneck}


class ResNet(Backbone):
    """The residual network (paper, table 1): 7x7 stem and max-pooling, four stages, mean pool, linear classifier.

    Loads torchvision's layout as it is, and the ECA-Net layouts of its authors and of timm.

    Args:
        config: what to build.
        attention: makes the attention of a block from its channels, e.g. ``SqueezeExcite``, for studies with another
            one; by default the ECA or ELA of the config, or none.
        conv: makes the convolutions; by default those of torch without bias, or the dynamic ones of the config.

    Raises:
        UnknownName: there is no such block or no such variant of ELA.
        ValueError: the tuples of the config name different numbers of stages, a kernel size is even, or ELA cannot have
            the channels.
    """

    layouts: ClassVar[Mapping[str, Layout]] = _LAYOUTS
    classifier_modules: ClassVar[tuple[str, ...]] = ("fc",)
    stem_modules: ClassVar[tuple[str, ...]] = ("conv1",)
    min_size = 1  # every layer is padded

    def __init__(
        self, config: ResNetConfig, *, attention: Attention | None = None, conv: MakeConv | None = None
    ) -> None:
        super().__init__(config)
        block_conv = conv or (_conv if config.fdconv_kernels is None else partial(_dynamic, config.fdconv_kernels))
        conv = conv or _conv
        depths, widths = config.depths, config.widths
        if config.block not in _BLOCKS:
            raise unknown("block", config.block, _BLOCKS)
        if not depths or len(depths) != len(widths) or min(*depths, *widths) < 1:
            raise ValueError(f"depths and widths must be positive and of the same length, got {depths} and {widths}")
        block = _BLOCKS[config.block]
        if attention is None and config.ela is not None:
            attention = partial(ELA, variant=config.ela)
        attentions: Sequence[Attention] = [attention or nn.Identity] * len(depths)
        if attention is None and config.eca_kernel_sizes is not None:
            attentions = eca_per_stage(config.eca_kernel_sizes, len(depths))
        self.conv1 = conv(config.in_channels, config.stem_width, *((3, 1) if config.small_stem else (7, 2)))
        self.bn1 = nn.BatchNorm2d(config.stem_width)
        self.relu = nn.ReLU(inplace=True)
        pooled = not config.small_stem if config.stem_pool is None else config.stem_pool
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if pooled else nn.Identity()
        stride, channels = (1 if config.small_stem else 2) * (2 if pooled else 1), config.stem_width
        features: list[Feature] = []
        self._stages = [f"layer{stage + 1}" for stage in range(len(depths))]
        for name, depth, width, make_attention in zip(self._stages, depths, widths, attentions, strict=True):
            step = 2 if features else 1
            self.add_module(name, _stage(block, channels, width, depth, step, make_attention, block_conv, conv))
            channels, stride = block.expansion * width, stride * step
            features.append(Feature(channels, stride))
        self.feature_info = tuple(features)
        self.reset_classifier(config.num_classes)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        self._check_input(x)
        x = self._stem(x)
        features = []
        for name in self._stages:
            x = self._run_stage(self.get_submodule(name), x)
            features.append(x)
        return features

    def _stem(self, x: Tensor) -> Tensor:
        return self.maxpool(self.relu(self.bn1(self.conv1(x))))

    def forward_head(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(2).mean(2))

    def reset_classifier(self, num_classes: int) -> None:
        self.config = self.config.override(num_classes=num_classes)
        self.fc: nn.Module = nn.Identity()
        if num_classes > 0:
            weight = next(self.conv1.parameters())
            self.fc = nn.Linear(self.feature_info[-1].channels, num_classes, device=weight.device, dtype=weight.dtype)


def projection(in_channels: int, out_channels: int, *, stride: int = 1, conv: MakeConv | None = None) -> nn.Sequential:
    """The shortcut of a block that changes channels or resolution: 1x1 convolution and batch norm (paper, option B)."""
    return nn.Sequential((conv or _conv)(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


def _stage(
    block: _Block,
    in_channels: int,
    width: int,
    depth: int,
    stride: int,
    make_attention: Attention,
    conv: MakeConv,
    shortcut: MakeConv,
) -> nn.Sequential:
    channels = block.expansion * width
    changes = stride != 1 or in_channels != channels
    downsample = projection(in_channels, channels, stride=stride, conv=shortcut) if changes else None

    def make(in_channels: int, **changes: Any) -> nn.Module:
        return block(in_channels, width, attention=make_attention(channels), conv=conv, **changes)

    first = make(in_channels, stride=stride, downsample=downsample)
    return nn.Sequential(first, *(make(channels) for _ in range(depth - 1)))


def _conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
    # Standard deviation sqrt(2 / (k * k * out_channels)). Done here, so that attention keeps its own initialisation.
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _dynamic(kernel_num: int, in_channels: int, out_channels: int, kernel_size: int, stride: int) -> nn.Module:
    """A frequency dynamic convolution, where the authors have one."""
    plain = _conv(in_channels, out_channels, kernel_size, stride)
    if min(in_channels, out_channels) <= 16 or kernel_size not in (1, 3):
        return plain
    return FDConv2d.from_conv(plain, kernel_num=kernel_num)


_DEPTHS_50 = (3, 4, 6, 3)
_DEPTHS_101 = (3, 4, 23, 3)
_DEPTHS_152 = (3, 8, 36, 3)

VARIANTS: dict[str, ResNetConfig] = {
    "resnet18": ResNetConfig(),
    "resnet34": ResNetConfig(depths=_DEPTHS_50),
    "resnet50": ResNetConfig(block="bottleneck", depths=_DEPTHS_50),
    "resnet101": ResNetConfig(block="bottleneck", depths=_DEPTHS_101),
    "resnet152": ResNetConfig(block="bottleneck", depths=_DEPTHS_152),
    "eca_resnet18": ResNetConfig(eca_kernel_sizes=(3, 5, 7, 7)),
    "eca_resnet34": ResNetConfig(depths=_DEPTHS_50, eca_kernel_sizes=(3, 3, 5, 7)),
    "eca_resnet50": ResNetConfig(block="bottleneck", depths=_DEPTHS_50, eca_kernel_sizes=(3, 5, 5, 7)),
    "eca_resnet101": ResNetConfig(block="bottleneck", depths=_DEPTHS_101, eca_kernel_sizes=(3, 3, 5, 7)),
    "eca_resnet152": ResNetConfig(block="bottleneck", depths=_DEPTHS_152, eca_kernel_sizes=(3, 3, 5, 7)),
    "ela_t_resnet18": ResNetConfig(ela="T"),
    "ela_b_resnet18": ResNetConfig(ela="B"),
    "ela_s_resnet18": ResNetConfig(ela="S"),
    "ela_l_resnet18": ResNetConfig(ela="L"),
    "ela_t_resnet50": ResNetConfig(block="bottleneck", depths=_DEPTHS_50, ela="T"),
    "ela_b_resnet50": ResNetConfig(block="bottleneck", depths=_DEPTHS_50, ela="B"),
    "ela_s_resnet50": ResNetConfig(block="bottleneck", depths=_DEPTHS_50, ela="S"),
    "ela_l_resnet50": ResNetConfig(block="bottleneck", depths=_DEPTHS_50, ela="L"),
    "ela_t_resnet101": ResNetConfig(block="bottleneck", depths=_DEPTHS_101, ela="T"),
    "ela_b_resnet101": ResNetConfig(block="bottleneck", depths=_DEPTHS_101, ela="B"),
    "ela_s_resnet101": ResNetConfig(block="bottleneck", depths=_DEPTHS_101, ela="S"),
    "ela_l_resnet101": ResNetConfig(block="bottleneck", depths=_DEPTHS_101, ela="L"),
    "resnet50_fdconv": ResNetConfig(block="bottleneck", depths=_DEPTHS_50, fdconv_kernels=64),
}


def _torchvision(file: str, top1: float) -> tuple[PublishedFile, ...]:
    url, figures = f"https://download.pytorch.org/models/{file}.pth", {"ImageNet-1K top-1 [%]": top1}
    return (PublishedFile(url, "BSD-3-Clause", figures),)


def _eca(top1: float) -> tuple[PublishedFile, ...]:
    # The files lie on Google Drive; the digits in their names are the kernel sizes of the four stages.
    figures = {"ImageNet-1K top-1 [%]": top1}
    return (PublishedFile("https://github.com/BangguWu/ECANet", "MIT", figures, by_hand=True),)


#: The weights that torchvision trained with the recipe of the paper (its "V1" weights), and those of ECA-Net's authors.
PUBLISHED: dict[str, tuple[PublishedFile, ...]] = {
    "resnet18": _torchvision("resnet18-f37072fd", 69.758),
    "resnet34": _torchvision("resnet34-b627a593", 73.314),
    "resnet50": _torchvision("resnet50-0676ba61", 76.130),
    "resnet101": _torchvision("resnet101-63fe2227", 77.374),
    "resnet152": _torchvision("resnet152-394f9c45", 78.312),
    "eca_resnet18": _eca(70.92),
    "eca_resnet34": _eca(74.21),
    "eca_resnet50": _eca(77.42),
    "eca_resnet101": _eca(78.65),
    "eca_resnet152": _eca(78.92),
}
