"""DeepLabV3+ on MobileNetV2, whose atrous branches may be translation variant: optic disc and cup in fundus images.

Chen, He, Zhuo, Ma, Ha, Chan: "TVConv: Efficient Translation Variant Convolution for Layout-aware Visual Processing",
CVPR 2022, arXiv 2203.10489, section 4.2.
Chen, Zhu, Papandreou, Schroff, Adam: "Encoder-Decoder with Atrous Separable Convolution for Semantic Image
Segmentation", ECCV 2018, arXiv 1802.02611.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.networks.base import NetworkConfig
from convatlas.networks.mobilenet import ConvNormAct, InvertedResidual
from convatlas.nn.conv.tvconv import TVCONV_LAYOUT, TVConv2d
from convatlas.weights import Layout

__all__ = ["VARIANTS", "DeepLabV3Plus", "DeepLabV3PlusConfig"]


@dataclass(frozen=True, kw_only=True)
class DeepLabV3PlusConfig(NetworkConfig):
    """Config of `DeepLabV3Plus`.

    Attributes:
        num_classes: maps that are put out: cup and disc.
        in_channels: channels of the image.
        image_size: height and width of the image; with translation variant branches no other size works.
        stages: rows (t, c, n, s) of MobileNetV2; from a stride of 16 on, resolution stays.
        stem_width: channels of the stem.
        low_level: which stage gives the map of stride 4 that the decoder adds.
        rates: of the atrous branches.
        width, low_width: channels of the branches, and of the map of stride 4.
        dropout: rates behind the pyramid and in the decoder, twice.
        translation_variant: whether the atrous branches are inverted residuals with a translation variant convolution.
        expand_ratio: of these.
        position_channels, hidden_channels, hidden_layers: of their generators.

    Raises:
        ValueError: num_classes or in_channels is smaller than 1.
    """

    num_classes: int = 2
    in_channels: int = 3
    image_size: tuple[int, int] = (256, 256)
    stages: tuple[tuple[int, int, int, int], ...] = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    stem_width: int = 32
    low_level: int = 1
    rates: tuple[int, ...] = (6, 12, 18)
    width: int = 256
    low_width: int = 48
    dropout: tuple[float, float, float] = (0.5, 0.5, 0.1)
    translation_variant: bool = False
    expand_ratio: int = 6
    position_channels: int = 4
    hidden_channels: int = 64
    hidden_layers: int = 3

    def __post_init__(self) -> None:
        if min(self.num_classes, self.in_channels) < 1:
            raise ValueError(
                f"num_classes and in_channels must be at least 1, got {self.num_classes} and {self.in_channels}"
            )
        if not 0 <= self.low_level < len(self.stages):
            raise ValueError(f"low_level must be one of {len(self.stages)} stages, got {self.low_level}")

    def build(self) -> DeepLabV3Plus:
        return DeepLabV3Plus(self)


class DeepLabV3Plus(nn.Module):
    """Encoder, atrous spatial pyramid pooling and decoder; the encoder's parameters are named as in torchvision.

    ``load_weights(model, checkpoint_of_mobilenet_v2, strict=False)`` starts from trained weights of the encoder.

    Args:
        config: what to build.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {"authors": TVCONV_LAYOUT}

    def __init__(self, config: DeepLabV3PlusConfig) -> None:
        super().__init__()
        self.config = config
        channels, stride, rate = config.stem_width, 2, 1
        layers: list[nn.Module] = [ConvNormAct(config.in_channels, channels, 3, stride=2)]
        self._low = 0
        low_channels = channels
        for number, (expand_ratio, width, depth, step) in enumerate(config.stages):
            dilation = 1
            if stride == 16:  # further strides become dilations of the stages behind
                step, dilation, rate = 1, rate, rate * step
            stride *= step
            for index in range(depth):
                layers.append(
                    InvertedResidual(
                        channels,
                        width,
                        stride=step if index == 0 else 1,
                        expand_ratio=expand_ratio,
                        depthwise=partial(_atrous, dilation),
                    )
                )
                channels = width
            if number == config.low_level:
                self._low, low_channels = len(layers) - 1, channels
        self.features = nn.Sequential(*layers)
        self.stride = stride
        width = config.width
        size = (-(-config.image_size[0] // stride), -(-config.image_size[1] // stride))
        self.aspp = nn.ModuleList([ConvNormAct(channels, width, 1, act=nn.ReLU)])
        for each in config.rates:
            if config.translation_variant:
                depthwise = partial(_translation_variant, config, size)
                self.aspp.append(
                    InvertedResidual(channels, width, expand_ratio=config.expand_ratio, depthwise=depthwise)
                )
            else:
                conv = nn.Conv2d(channels, width, 3, padding=each, dilation=each, bias=False)
                self.aspp.append(ConvNormAct(channels, width, 3, act=nn.ReLU, conv=conv))
        self.pool = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        joined = (len(config.rates) + 2) * width
        self.project = nn.Sequential(ConvNormAct(joined, width, 1, act=nn.ReLU), nn.Dropout(config.dropout[0]))
        self.low = ConvNormAct(low_channels, config.low_width, 1, act=nn.ReLU)
        self.decoder = nn.Sequential(
            ConvNormAct(width + config.low_width, width, 3, act=nn.ReLU),
            nn.Dropout(config.dropout[1]),
            ConvNormAct(width, width, 3, act=nn.ReLU),
            nn.Dropout(config.dropout[2]),
            nn.Conv2d(width, config.num_classes, 1),
        )

    @property
    def in_channels(self) -> int:
        """Channels of the image."""
        return self.config.in_channels

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes, H, W) of an image (B, in_channels, H, W); a sigmoid makes probabilities.

        Raises:
            ValueError: x has a wrong number of dimensions or channels or, with translation variant branches, size.
        """
        if x.dim() != 4 or x.shape[1] != self.config.in_channels:
            raise ValueError(f"x must be (B, {self.config.in_channels}, H, W), got {tuple(x.shape)}")
        size = x.shape[2:]
        if self.config.translation_variant and tuple(size) != self.config.image_size:
            wanted = self.config.image_size
            raise ValueError(f"x must be {wanted[0]} x {wanted[1]} pixels, got {size[0]} x {size[1]}")
        low = x
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index == self._low:
                low = x
        pooled = self.pool(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        x = self.project(torch.cat([*(branch(x) for branch in self.aspp), pooled], 1))
        x = F.interpolate(x, low.shape[2:], mode="bilinear", align_corners=True)
        x = self.decoder(torch.cat([x, self.low(low)], 1))
        return F.interpolate(x, size, mode="bilinear", align_corners=True)

    def example_inputs(self, batch: int = 1) -> tuple[Tensor, ...]:
        """A random image, for tracing and timing."""
        return (torch.randn(batch, self.config.in_channels, *self.config.image_size),)


def _atrous(dilation: int, channels: int, stride: int) -> nn.Module:
    return nn.Conv2d(channels, channels, 3, stride, dilation, dilation, groups=channels, bias=False)


def _translation_variant(config: DeepLabV3PlusConfig, size: tuple[int, int], channels: int, stride: int) -> nn.Module:
    return TVConv2d(
        channels,
        channels,
        3,
        stride,
        1,
        groups=channels,
        bias=False,
        output_size=size,
        position_channels=config.position_channels,
        hidden_channels=config.hidden_channels,
        hidden_layers=config.hidden_layers,
    )


VARIANTS: dict[str, DeepLabV3PlusConfig] = {
    "deeplab_v3_plus_mobilenet_v2": DeepLabV3PlusConfig(),
    "tvconv_deeplab_v3_plus_mobilenet_v2": DeepLabV3PlusConfig(translation_variant=True),
}
