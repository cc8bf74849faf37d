"""MobileNetV2, and its form with efficient channel attention at the end of each inverted residual.

Sandler, Howard, Zhu, Zhmoginov, Chen: "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018,
arXiv 1801.04381. Parameters are named as in torchvision.
Wang, Wu, Zhu, Li, Zuo, Hu: "ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks", CVPR 2020,
arXiv 1910.03151.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from convatlas.data.transforms import Preprocess
from convatlas.networks.base import Backbone, BackboneConfig, Feature, PublishedFile
from convatlas.nn.mixers.eca import eca_per_stage
from convatlas.weights import Layout

__all__ = ["PUBLISHED", "VARIANTS", "InvertedResidual", "MobileNetV2", "MobileNetV2Config"]

#: Makes the attention of a block from its output channels; it keeps the shape of a map (B, C, H, W).
Attention = Callable[[int], nn.Module]

_LAYOUTS = {"authors": Layout(renames=((r"(^|\.)conv\.[34]\.conv\.weight$", r"\1attention.weight"),))}


@dataclass(frozen=True, kw_only=True)
class MobileNetV2Config(BackboneConfig):
    """Config of `MobileNetV2`.

    Attributes:
        stages: rows (t, c, n, s) of table 2: n blocks with c output channels and expansion t, the first with stride s.
        stem_width: channels of the stem, whose stride is 2.
        head_width: channels of the last 1x1 convolution.
        width_mult: multiplies all widths and rounds them to multiples of 8, none by more than a tenth down; head_width
            only grows. 1 leaves them as they are.
        dropout: rate before the classifier.
        eca_kernel_sizes: kernel size of ECA for each stage, as numbers or as digits ("1111333"); None for no attention.
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
    head_width: int = 1280
    width_mult: float = 1.0
    dropout: float = 0.2
    eca_kernel_sizes: tuple[int, ...] | str | None = None
    preprocess: Preprocess = field(default_factory=lambda: Preprocess(interpolation="bilinear"))

    def build(self) -> MobileNetV2:
        return MobileNetV2(self)


class _ConvNormAct(nn.Sequential):
    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(
            _conv(in_channels, out_channels, kernel_size, stride, groups),
            nn.BatchNorm2d(out_channels),
            nn.ReLU6(inplace=True),
        )


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise convolution, linear 1x1 convolution, attention; plus x if shapes agree (table 1).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: of the depthwise convolution.
        expand_ratio: hidden channels over in_channels; with 1 the expansion is left out.
        attention: module at the end of the branch that keeps the shape; by default the identity.
    """

    layouts: ClassVar[Mapping[str, Layout]] = _LAYOUTS

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        expand_ratio: int = 6,
        attention: nn.Module | None = None,
    ) -> None:
        super().__init__()
        hidden = in_channels * expand_ratio
        expansion = [] if expand_ratio == 1 else [_ConvNormAct(in_channels, hidden, 1)]
        self.conv = nn.Sequential(
            *expansion,
            _ConvNormAct(hidden, hidden, 3, stride=stride, groups=hidden),
            _conv(hidden, out_channels, 1),
            nn.BatchNorm2d(out_channels),
        )
        self.attention = attention or nn.Identity()
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H / stride, W / stride), sizes rounded up."""
        y: Tensor = self.attention(self.conv(x))
        return x + y if self.residual else y


class MobileNetV2(Backbone):
    """The network of inverted residuals (paper, table 2): stem, stages, 1x1 convolution, mean pool, linear classifier.

    Its feature maps are those before each change of resolution from stride 4 on; the last one comes after the 1x1
    convolution. Loads torchvision's layout as it is, and the layout of ECA-Net's authors.

    Args:
        config: what to build.
        attention: makes the attention of a block from its output channels, e.g. ``SqueezeExcite``, for studies with
            another one; by default the ECA of the config, or none.

    Raises:
        ValueError: stages is empty or malformed, or eca_kernel_sizes names another number of stages or an even size.
    """

    layouts: ClassVar[Mapping[str, Layout]] = _LAYOUTS
    classifier_modules: ClassVar[tuple[str, ...]] = ("classifier.1",)
    stem_modules: ClassVar[tuple[str, ...]] = ("features.0.0",)
    min_size = 1  # every layer is padded

    def __init__(self, config: MobileNetV2Config, *, attention: Attention | None = None) -> None:
        super().__init__(config)
        stages = config.stages
        if not stages or any(len(row) != 4 or min(row) < 1 for row in stages):
            raise ValueError(f"stages must be rows (t, c, n, s) of positive numbers, got {stages}")
        attentions: Sequence[Attention] = [attention or nn.Identity] * len(stages)
        if attention is None and config.eca_kernel_sizes is not None:
            attentions = eca_per_stage(config.eca_kernel_sizes, len(stages))
        channels = _scaled(config.stem_width, config.width_mult)
        layers: list[nn.Module] = [_ConvNormAct(config.in_channels, channels, 3, stride=2)]
        infos = [Feature(channels, 2)]
        for (expand_ratio, width, depth, stride), make_attention in zip(stages, attentions, strict=True):
            out_channels = _scaled(width, config.width_mult)
            for index in range(depth):
                step = stride if index == 0 else 1
                attend = make_attention(out_channels)
                layers.append(
                    InvertedResidual(channels, out_channels, stride=step, expand_ratio=expand_ratio, attention=attend)
                )
                channels = out_channels
                infos.append(Feature(channels, infos[-1].stride * step))
        head_width = _scaled(config.head_width, max(1.0, config.width_mult))
        layers.append(_ConvNormAct(channels, head_width, 1))
        infos.append(Feature(head_width, infos[-1].stride))
        last = len(layers) - 1
        self._taps = {index for index in range(last) if 4 <= infos[index].stride < infos[index + 1].stride} | {last}
        self.features = nn.Sequential(*layers)
        self.feature_info = tuple(infos[index] for index in sorted(self._taps))
        self.reset_classifier(config.num_classes)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        self._check_input(x)
        features = []
        for index, layer in enumerate(self.features):
            x = self._run_stage(layer, x)
            if index in self._taps:
                features.append(x)
        return features

    def forward_head(self, x: Tensor) -> Tensor:
        return self.classifier(x.mean((2, 3)))

    def reset_classifier(self, num_classes: int) -> None:
        self.config = self.config.override(num_classes=num_classes)
        self.classifier: nn.Module = nn.Identity()
        if num_classes > 0:
            weight = self.get_parameter("features.0.0.weight")
            linear = nn.Linear(self.feature_info[-1].channels, num_classes, device=weight.device, dtype=weight.dtype)
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)
            self.classifier = nn.Sequential(nn.Dropout(self.config.dropout), linear).train(self.training)


def _conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    padding = kernel_size // 2
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=padding, groups=groups, bias=False)
    # Standard deviation sqrt(2 / (k * k * out_channels)). Done here, so that attention keeps its own initialisation.
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _scaled(width: int, factor: float) -> int:
    if factor == 1:
        return width
    rounded = max(8, int(width * factor + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * width * factor else rounded + 8


VARIANTS: dict[str, MobileNetV2Config] = {
    "mobilenet_v2": MobileNetV2Config(),
    "eca_mobilenet_v2": MobileNetV2Config(dropout=0.25, eca_kernel_sizes=(1, 1, 1, 1, 3, 3, 3)),
}

#: The weights that torchvision trained (its "V1" weights), and those of ECA-Net's authors.
PUBLISHED: dict[str, tuple[PublishedFile, ...]] = {
    "mobilenet_v2": (
        PublishedFile(
            "https://download.pytorch.org/models/mobilenet_v2-b0353104.pth",
            "BSD-3-Clause",
            {"ImageNet-1K top-1 [%]": 71.878},
        ),
    ),
    "eca_mobilenet_v2": (
        PublishedFile("https://github.com/BangguWu/ECANet", "MIT", {"ImageNet-1K top-1 [%]": 72.56}, by_hand=True),
    ),
}
