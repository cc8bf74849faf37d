"""Face recognition by MobileNetV2 and ShuffleNetV2, with depthwise or with translation variant convolutions.

Chen, He, Zhuo, Ma, Ha, Chan: "TVConv: Efficient Translation Variant Convolution for Layout-aware Visual Processing",
CVPR 2022, arXiv 2203.10489, section 4.1. Faces are aligned and of 96 x 96 pixels; the stem keeps the resolution.
Sandler et al.: "MobileNetV2", CVPR 2018, arXiv 1801.04381. Ma, Zhang, Zheng, Sun: "ShuffleNet V2: Practical Guidelines
for Efficient CNN Architecture Design", ECCV 2018, arXiv 1807.11164.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from convatlas.data.transforms import Preprocess
from convatlas.networks.base import Backbone, BackboneConfig, Feature
from convatlas.networks.mobilenet import ConvNormAct, InvertedResidual, scaled_width
from convatlas.nn.conv.tvconv import TVCONV_LAYOUT, TVConv2d
from convatlas.nn.margin_softmax import AMSoftmax
from convatlas.weights import Layout

__all__ = [
    "VARIANTS",
    "FaceConfig",
    "FaceMobileNetV2",
    "FaceMobileNetV2Config",
    "FaceNetwork",
    "FaceShuffleNetV2",
    "FaceShuffleNetV2Config",
    "ShuffleUnit",
]


def _with_head(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The authors' head holds its classes in columns and stands beside the network."""
    return {
        "classifier.weight" if key == "head.weight" else key: value.T if key == "head.weight" else value
        for key, value in state.items()
    }


#: Makes a depthwise 3x3 convolution from channels and stride.
MakeDepthwise = Callable[[int, int], nn.Module]


@dataclass(frozen=True, kw_only=True)
class FaceConfig(BackboneConfig):
    """What the configs of both networks share.

    Attributes:
        num_classes: people to tell apart in training; 0 for the embedding.
        embedding: length of the feature vector of a face.
        dropout: rate before the embedding.
        translation_variant: whether the depthwise convolutions of the blocks are translation variant; the network then
            works for images of the size of ``preprocess`` only.
        position_channels, hidden_channels, hidden_layers: of their generators.
    """

    num_classes: int = 0
    embedding: int = 512
    dropout: float = 0.0
    translation_variant: bool = False
    position_channels: int = 4
    hidden_channels: int = 64
    hidden_layers: int = 3
    preprocess: Preprocess = field(
        default_factory=lambda: Preprocess(size=96, mean=(0.5,), std=(0.5,), interpolation="bilinear", crop=1.0)
    )


@dataclass(frozen=True, kw_only=True)
class FaceMobileNetV2Config(FaceConfig):
    """Config of `FaceMobileNetV2`.

    Attributes:
        stages: rows (t, c, n, s): n blocks with c output channels and expansion t, the first with stride s.
        stem_width: channels of the stem.
        head_width: channels of the last 1x1 convolution.
        width_mult: multiplies all widths and rounds them to multiples of 8; head_width only grows.
    """

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
    head_width: int = 512
    width_mult: float = 1.0

    def build(self) -> FaceMobileNetV2:
        return FaceMobileNetV2(self)


@dataclass(frozen=True, kw_only=True)
class FaceShuffleNetV2Config(FaceConfig):
    """Config of `FaceShuffleNetV2`.

    Attributes:
        depths: units of each stage.
        widths: channels of the stem, of each stage and of the last 1x1 convolution.
    """

    depths: tuple[int, ...] = (4, 8, 4)
    widths: tuple[int, ...] = (24, 116, 232, 464, 1024)

    def build(self) -> FaceShuffleNetV2:
        return FaceShuffleNetV2(self)


class FaceNetwork(Backbone):
    """What both networks share: the embedding of a face, and a classifier of people by angles.

    The embedding is batch norm, dropout, mean, a linear layer and batch norm. With ``num_classes`` the network gives
    the logits of `AMSoftmax`, without the margin; train with ``network.classifier.loss(embedding, labels)``.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {
        "authors": Layout(renames=((r"^model\.", ""), *TVCONV_LAYOUT.renames), function=_with_head)
    }
    classifier_modules: ClassVar[tuple[str, ...]] = ("classifier",)

    def _finish(self, infos: list[Feature], layers: list[nn.Module]) -> None:
        """Set the features, the maps that are given out, and the output layer."""
        config, last = self.config, len(layers) - 1
        self._taps = {index for index in range(last) if 4 <= infos[index].stride < infos[index + 1].stride} | {last}
        self.features = nn.Sequential(*layers)
        self.feature_info = tuple(infos[index] for index in sorted(self._taps))
        # Kernels belong to positions; else every layer is padded.
        self.min_size = config.preprocess.shape if config.translation_variant else 1
        channels = infos[-1].channels
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.Dropout(config.dropout),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, config.embedding),
            nn.BatchNorm1d(config.embedding),
        )
        self.reset_classifier(config.num_classes)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        self._check_input(x)
        size = self.config.preprocess.shape
        if self.config.translation_variant and tuple(x.shape[2:]) != size:
            raise ValueError(f"x must be {size[0]} x {size[1]} pixels, got {x.shape[2]} x {x.shape[3]}")
        features = []
        for index, layer in enumerate(self.features):
            x = self._run_stage(layer, x)
            if index in self._taps:
                features.append(x)
        return features

    def forward_head(self, x: Tensor) -> Tensor:
        return self.classifier(self.output_layer(x))

    def reset_classifier(self, num_classes: int) -> None:
        self.config = self.config.override(num_classes=num_classes)
        self.classifier: nn.Module = nn.Identity()
        if num_classes > 0:
            weight = next(self.features.parameters())
            self.classifier = AMSoftmax(self.config.embedding, num_classes).to(weight.device, weight.dtype)

    def _depthwise(self, stride: int) -> MakeDepthwise:
        """Makes the depthwise convolution of a unit whose input has a stride in the image."""
        config = self.config

        def make(channels: int, step: int) -> nn.Module:
            if not config.translation_variant:
                return nn.Conv2d(channels, channels, 3, step, 1, groups=channels, bias=False)
            height, width = (-(-side // (stride * step)) for side in config.preprocess.shape)
            return TVConv2d(
                channels,
                channels,
                3,
                step,
                1,
                groups=channels,
                bias=False,
                output_size=(height, width),
                position_channels=config.position_channels,
                hidden_channels=config.hidden_channels,
                hidden_layers=config.hidden_layers,
            )

        return make


class FaceMobileNetV2(FaceNetwork):
    """MobileNetV2 with a stem of stride 1 and 512 channels at its end.

    Args:
        config: what to build.

    Raises:
        ValueError: stages is empty or malformed.
    """

    stem_modules: ClassVar[tuple[str, ...]] = ("features.0.0",)

    def __init__(self, config: FaceMobileNetV2Config) -> None:
        super().__init__(config)
        if not config.stages or any(len(row) != 4 or min(row) < 1 for row in config.stages):
            raise ValueError(f"stages must be rows (t, c, n, s) of positive numbers, got {config.stages}")
        channels = scaled_width(config.stem_width, config.width_mult)
        layers: list[nn.Module] = [ConvNormAct(config.in_channels, channels, 3)]
        infos = [Feature(channels, 1)]
        for expand_ratio, width, depth, stride in config.stages:
            out_channels = scaled_width(width, config.width_mult)
            for index in range(depth):
                step = stride if index == 0 else 1
                depthwise = self._depthwise(infos[-1].stride)
                layers.append(
                    InvertedResidual(
                        channels, out_channels, stride=step, expand_ratio=expand_ratio, depthwise=depthwise
                    )
                )
                channels = out_channels
                infos.append(Feature(channels, infos[-1].stride * step))
        head_width = scaled_width(config.head_width, max(1.0, config.width_mult))
        layers.append(ConvNormAct(channels, head_width, 1))
        infos.append(Feature(head_width, infos[-1].stride))
        self._finish(infos, layers)


class ShuffleUnit(nn.Module):
    """Half of the channels pass, the others are transformed, and both are shuffled; with stride 2 all are transformed.

    ShuffleNet V2, figure 3 (c) and (d).

    Args:
        in_channels, out_channels: of the unit; equal with stride 1.
        stride: 1 or 2.
        depthwise: makes the depthwise convolutions.

    Raises:
        ValueError: out_channels is odd, or with stride 1 it is not in_channels.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, depthwise: MakeDepthwise) -> None:
        super().__init__()
        if out_channels % 2 or (stride == 1 and in_channels != out_channels):
            raise ValueError(
                f"out_channels must be even, and in_channels with stride 1, got {out_channels} and {in_channels}"
            )
        half = out_channels // 2

        def norm(channels: int) -> nn.Module:
            return nn.BatchNorm2d(channels)

        def pointwise(channels: int) -> list[nn.Module]:
            return [nn.Conv2d(channels, half, 1, bias=False), norm(half), nn.ReLU(inplace=True)]

        self.stride = stride
        self.branch1 = nn.Sequential()
        if stride > 1:
            self.branch1 = nn.Sequential(depthwise(in_channels, stride), norm(in_channels), *pointwise(in_channels))
        seen = in_channels if stride > 1 else half
        self.branch2 = nn.Sequential(*pointwise(seen), depthwise(half, stride), norm(half), *pointwise(half))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H / stride, W / stride), sizes rounded up."""
        first, second = (x, x) if self.stride > 1 else x.chunk(2, 1)
        y = torch.stack([self.branch1(first), self.branch2(second)], 2)  # a shuffle with two groups
        return y.flatten(1, 2)


class FaceShuffleNetV2(FaceNetwork):
    """ShuffleNetV2 with a stem of stride 1.

    Args:
        config: what to build.

    Raises:
        ValueError: the widths do not fit the depths, or one of a stage is odd.
    """

    stem_modules: ClassVar[tuple[str, ...]] = ("features.0.0",)

    def __init__(self, config: FaceShuffleNetV2Config) -> None:
        super().__init__(config)
        depths, widths = config.depths, config.widths
        if not depths or len(widths) != len(depths) + 2 or min(*depths, *widths) < 1:
            raise ValueError(f"widths must be two more than depths and all positive, got {widths} for {depths}")
        stem, *stages, head = widths
        layers: list[nn.Module] = [
            ConvNormAct(config.in_channels, stem, 3, act=nn.ReLU),
            nn.MaxPool2d(3, 2, 1),
        ]
        infos = [Feature(stem, 1), Feature(stem, 2)]
        for depth, width in zip(depths, stages, strict=True):
            for index in range(depth):
                channels, stride = infos[-1]
                step = 2 if index == 0 else 1
                layers.append(ShuffleUnit(channels, width, stride=step, depthwise=self._depthwise(stride)))
                infos.append(Feature(width, stride * step))
        layers.append(ConvNormAct(stages[-1], head, 1, act=nn.ReLU))
        infos.append(Feature(head, infos[-1].stride))
        self._finish(infos, layers)


_SHUFFLE_X0_5 = (24, 48, 96, 192, 1024)
_SHUFFLE_X1_0 = (24, 116, 232, 464, 1024)
_SHUFFLE_X1_5 = (24, 176, 352, 704, 1024)

VARIANTS: dict[str, FaceConfig] = {
    "face_mobilenet_v2_x0_1": FaceMobileNetV2Config(width_mult=0.1),
    "face_mobilenet_v2_x0_2": FaceMobileNetV2Config(width_mult=0.2),
    "face_mobilenet_v2_x0_3": FaceMobileNetV2Config(width_mult=0.3),
    "face_mobilenet_v2_x0_5": FaceMobileNetV2Config(width_mult=0.5),
    "face_mobilenet_v2_x1_0": FaceMobileNetV2Config(),
    "face_shufflenet_v2_x0_5": FaceShuffleNetV2Config(widths=_SHUFFLE_X0_5),
    "face_shufflenet_v2_x1_0": FaceShuffleNetV2Config(widths=_SHUFFLE_X1_0),
    "face_shufflenet_v2_x1_5": FaceShuffleNetV2Config(widths=_SHUFFLE_X1_5),
    "tvconv_mobilenet_v2_x0_1": FaceMobileNetV2Config(width_mult=0.1, translation_variant=True),
    "tvconv_mobilenet_v2_x0_2": FaceMobileNetV2Config(width_mult=0.2, translation_variant=True),
    "tvconv_mobilenet_v2_x0_3": FaceMobileNetV2Config(width_mult=0.3, translation_variant=True),
    "tvconv_mobilenet_v2_x0_5": FaceMobileNetV2Config(width_mult=0.5, translation_variant=True),
    "tvconv_mobilenet_v2_x1_0": FaceMobileNetV2Config(translation_variant=True),
    "tvconv_shufflenet_v2_x0_5": FaceShuffleNetV2Config(widths=_SHUFFLE_X0_5, translation_variant=True),
    "tvconv_shufflenet_v2_x1_0": FaceShuffleNetV2Config(widths=_SHUFFLE_X1_0, translation_variant=True),
    "tvconv_shufflenet_v2_x1_5": FaceShuffleNetV2Config(widths=_SHUFFLE_X1_5, translation_variant=True),
}
