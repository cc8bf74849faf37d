"""Spatiospatial networks: ResNets for volumes whose slice axis is treated as the time of a video.

Chatterjee, Nizamani, Nuernberger, Speck: "Classification of Brain Tumours in MR Images using Deep Spatiospatial
Models", Scientific Reports 12, 2022, arXiv 2105.14071. The networks are those of Tran, Wang, Torresani, Ray, LeCun,
Paluri: "A Closer Look at Spatiotemporal Convolutions for Action Recognition", CVPR 2018, arXiv 1711.11248; parameters
are named as in torchvision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.data.volume_transforms import VolumePreprocess
from convatlas.errors import unknown
from convatlas.networks.base import Backbone, BackboneConfig, Feature, PublishedFile

__all__ = [
    "PUBLISHED",
    "VARIANTS",
    "BasicBlock",
    "Bottleneck",
    "Conv2Plus1d",
    "ConvNoDepth",
    "VideoResNet",
    "VideoResNetConfig",
    "factorised_width",
]


@dataclass(frozen=True, kw_only=True)
class VideoResNetConfig(BackboneConfig):
    """Config of `VideoResNet`.

    Attributes:
        convolutions: of the four stages: ``"3d"`` (3x3x3), ``"no_depth"`` (1x3x3) or ``"2plus1d"`` (1x3x3, then 3x1x1).
        block: ``"basic"`` or ``"bottleneck"``.
        depths: blocks of each stage.
        widths: channels of each stage; a bottleneck puts out four times as many.
        stem_mid: channels between the two convolutions of a factorised stem; None for one 3x7x7 convolution.
        stem_width: channels of the stem; those of the first stage when left out.
    """

    convolutions: tuple[str, ...] = ("3d",) * 4
    block: Literal["basic", "bottleneck"] = "basic"
    depths: tuple[int, ...] = (2, 2, 2, 2)
    widths: tuple[int, ...] = (64, 128, 256, 512)
    stem_mid: int | None = None
    stem_width: int | None = None
    preprocess: VolumePreprocess = field(default_factory=VolumePreprocess)

    def build(self) -> VideoResNet:
        return VideoResNet(self)


class ConvNoDepth(nn.Conv3d):
    """A 1x3x3 convolution: each slice on its own.

    It runs as a 2-D convolution with the slices in the batch, which a CPU computes faster.

    Args:
        in_channels, out_channels: channels.
        stride: within the slices.
    """

    computes_convolution: ClassVar[bool] = True

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, (1, 3, 3), (1, stride, stride), (0, 1, 1), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, D, H, W) to (B, out_channels, D, H / stride, W / stride), sizes rounded up."""
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        slices = x.transpose(1, 2).reshape(-1, x.shape[1], *x.shape[3:])
        y = F.conv2d(slices, self.weight.squeeze(2), self.bias, self.stride[1:], 1)
        return y.reshape(x.shape[0], x.shape[2], *y.shape[1:]).transpose(1, 2)


class Conv2Plus1d(nn.Sequential):
    """A 3x3x3 convolution in two factors: 1x3x3 to ``mid`` channels, batch norm, ReLU, then 3x1x1 across the slices.

    Args:
        in_channels, out_channels: channels.
        stride: on all three axes.
        mid: channels between the two; see `factorised_width`.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, *, mid: int) -> None:
        super().__init__(
            ConvNoDepth(in_channels, mid, stride),
            nn.BatchNorm3d(mid),
            nn.ReLU(inplace=True),
            nn.Conv3d(mid, out_channels, (3, 1, 1), (stride, 1, 1), (1, 0, 0), bias=False),
        )


def factorised_width(in_channels: int, out_channels: int) -> int:
    """Channels between the factors of a (2+1)-D convolution that give it the parameters of a 3x3x3 one, rounded down.

    The two convolutions of a block both take the number of the first.
    """
    return in_channels * out_channels * 27 // (9 * in_channels + 3 * out_channels)


#: Makes a convolution of a block from in_channels, out_channels, stride and the width between its factors.
_Builder = Callable[[int, int, int, int], nn.Module]
_BUILDERS: dict[str, _Builder] = {
    "3d": lambda inputs, outputs, stride, mid: nn.Conv3d(inputs, outputs, 3, stride, 1, bias=False),
    "no_depth": lambda inputs, outputs, stride, mid: ConvNoDepth(inputs, outputs, stride),
    "2plus1d": lambda inputs, outputs, stride, mid: Conv2Plus1d(inputs, outputs, stride, mid=mid),
}


class BasicBlock(nn.Module):
    """y = relu(bn(conv2(relu(bn(conv1(x))))) + downsample(x)).

    Args:
        in_channels: channels of the input.
        width: channels of the convolutions and of the output.
        stride: of the first convolution.
        convolution: ``"3d"``, ``"no_depth"`` or ``"2plus1d"``.
    """

    expansion: ClassVar[int] = 1

    def __init__(self, in_channels: int, width: int, *, stride: int = 1, convolution: str = "3d") -> None:
        super().__init__()
        make, mid = _builder(convolution), factorised_width(in_channels, width)
        self.conv1 = nn.Sequential(make(in_channels, width, stride, mid), nn.BatchNorm3d(width), nn.ReLU(inplace=True))
        self.conv2 = nn.Sequential(make(width, width, 1, mid), nn.BatchNorm3d(width))
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, width, stride, convolution)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, D, H, W) to (B, width, ...), sizes divided by the stride and rounded up."""
        return self.relu(self.conv2(self.conv1(x)) + self.downsample(x))


class Bottleneck(nn.Module):
    """A 1x1x1 convolution, one of the block's kind and a 1x1x1 to four times the width; plus the shortcut.

    Args:
        in_channels: channels of the input.
        width: channels of the convolutions; the output has four times as many.
        stride: of the middle convolution.
        convolution: ``"3d"``, ``"no_depth"`` or ``"2plus1d"``.
    """

    expansion: ClassVar[int] = 4

    def __init__(self, in_channels: int, width: int, *, stride: int = 1, convolution: str = "3d") -> None:
        super().__init__()
        make, mid = _builder(convolution), factorised_width(in_channels, width)
        out_channels = self.expansion * width
        self.conv1 = nn.Sequential(
            nn.Conv3d(in_channels, width, 1, bias=False), nn.BatchNorm3d(width), nn.ReLU(inplace=True)
        )
        self.conv2 = nn.Sequential(make(width, width, stride, mid), nn.BatchNorm3d(width), nn.ReLU(inplace=True))
        self.conv3 = nn.Sequential(nn.Conv3d(width, out_channels, 1, bias=False), nn.BatchNorm3d(out_channels))
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, out_channels, stride, convolution)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, D, H, W) to (B, 4 * width, ...), sizes divided by the stride and rounded up."""
        return self.relu(self.conv3(self.conv2(self.conv1(x))) + self.downsample(x))


_Block = type[BasicBlock] | type[Bottleneck]
_BLOCKS: dict[str, _Block] = {"basic": BasicBlock, "bottleneck": Bottleneck}


class VideoResNet(Backbone):
    """R3D, MC3 and R(2+1)D: a stem that halves the slices' sides, four stages, mean pool, linear classifier.

    The slice axis D comes before H and W; permute the axes of a volume to choose another plane. MC3 keeps all slices in
    the last three stages, so it has the fewest parameters but not the fewest multiply-adds.

    Args:
        config: what to build.

    Raises:
        UnknownName: there is no such block or convolution.
        ValueError: the tuples of the config name different numbers of stages.
    """

    classifier_modules: ClassVar[tuple[str, ...]] = ("fc",)
    stem_modules: ClassVar[tuple[str, ...]] = ("stem.0",)
    min_size: int | tuple[int, ...] | None = (1, 16, 16)

    def __init__(self, config: VideoResNetConfig) -> None:
        super().__init__(config)
        lengths = {len(config.convolutions), len(config.depths), len(config.widths)}
        if len(lengths) > 1 or not config.depths or min(*config.depths, *config.widths) < 1:
            raise ValueError(
                "convolutions, depths and widths must be positive and of the same length, "
                f"got {config.convolutions}, {config.depths} and {config.widths}"
            )
        if config.block not in _BLOCKS:
            raise unknown("block", config.block, _BLOCKS)
        block = _BLOCKS[config.block]
        channels = config.stem_width or config.widths[0]
        self.stem = _stem(config.in_channels, channels, config.stem_mid)
        stride = 2
        features: list[Feature] = []
        self._stages = [f"layer{stage + 1}" for stage in range(len(config.depths))]
        stages = zip(self._stages, config.convolutions, config.depths, config.widths, strict=True)
        for name, convolution, depth, width in stages:
            blocks = []
            for index in range(depth):
                step = 2 if features and index == 0 else 1
                blocks.append(block(channels, width, stride=step, convolution=convolution))
                channels, stride = block.expansion * width, stride * step
            self.add_module(name, nn.Sequential(*blocks))
            features.append(Feature(channels, stride))
        #: The strides are those within the slices.
        self.feature_info = tuple(features)
        self.reset_classifier(config.num_classes)
        self.apply(_initialise)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        self._check_input(x)
        x = self.stem(x)
        features = []
        for name in self._stages:
            x = self._run_stage(self.get_submodule(name), x)
            features.append(x)
        return features

    def forward_head(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3, 4)))

    def reset_classifier(self, num_classes: int) -> None:
        self.config = self.config.override(num_classes=num_classes)
        self.fc: nn.Module = nn.Identity()
        if num_classes > 0:
            weight = next(self.stem.parameters())
            self.fc = nn.Linear(self.feature_info[-1].channels, num_classes, device=weight.device, dtype=weight.dtype)
            _initialise(self.fc)


def _stem(in_channels: int, width: int, mid: int | None) -> nn.Sequential:
    if mid is None:
        conv = nn.Conv3d(in_channels, width, (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False)
        return nn.Sequential(conv, nn.BatchNorm3d(width), nn.ReLU(inplace=True))
    return nn.Sequential(
        nn.Conv3d(in_channels, mid, (1, 7, 7), (1, 2, 2), (0, 3, 3), bias=False),
        nn.BatchNorm3d(mid),
        nn.ReLU(inplace=True),
        nn.Conv3d(mid, width, (3, 1, 1), 1, (1, 0, 0), bias=False),
        nn.BatchNorm3d(width),
        nn.ReLU(inplace=True),
    )


def _builder(convolution: str) -> _Builder:
    if convolution not in _BUILDERS:
        raise unknown("convolution", convolution, _BUILDERS)
    return _BUILDERS[convolution]


def _shortcut(in_channels: int, out_channels: int, stride: int, convolution: str) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    steps = (1, stride, stride) if convolution == "no_depth" else (stride,) * 3
    return nn.Sequential(nn.Conv3d(in_channels, out_channels, 1, steps, bias=False), nn.BatchNorm3d(out_channels))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv3d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)


_MIXED = ("3d", "no_depth", "no_depth", "no_depth")

VARIANTS: dict[str, VideoResNetConfig] = {
    "r3d_18": VideoResNetConfig(num_classes=400),
    "mc3_18": VideoResNetConfig(num_classes=400, convolutions=_MIXED),
    "r2plus1d_18": VideoResNetConfig(num_classes=400, convolutions=("2plus1d",) * 4, stem_mid=45),
}


def _torchvision(file: str, top1: float) -> tuple[PublishedFile, ...]:
    figures = {"Kinetics-400 top-1 of a video [%]": top1}
    return (PublishedFile(f"https://download.pytorch.org/models/{file}.pth", "BSD-3-Clause", figures),)


#: Weights trained on Kinetics-400; the authors of the tumour paper published none.
PUBLISHED: dict[str, tuple[PublishedFile, ...]] = {
    "r3d_18": _torchvision("r3d_18-b3b3357e", 63.200),
    "mc3_18": _torchvision("mc3_18-a90a0ba3", 63.960),
    "r2plus1d_18": _torchvision("r2plus1d_18-91a641e6", 67.463),
}
