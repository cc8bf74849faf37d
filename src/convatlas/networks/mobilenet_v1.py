"""MobileNetV1, and its form with subspace attention behind blocks or in their place.

Howard, Zhu, Chen, Kalenichenko, Wang, Weyand, Andreetto, Adam: "MobileNets: Efficient Convolutional Neural Networks for
Mobile Vision Applications", 2017, arXiv 1704.04861.
Saini, Jha, Das, Mittal, Mohan: "ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural
Networks", WACV 2020, arXiv 2006.15102.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor, nn

from convatlas.data.transforms import Preprocess
from convatlas.networks.base import Backbone, BackboneConfig, Feature
from convatlas.networks.mobilenet import ConvNormAct, SubspaceAttention, scaled_width

__all__ = ["VARIANTS", "DepthwiseSeparable", "MobileNetV1", "MobileNetV1Config"]


@dataclass(frozen=True, kw_only=True)
class MobileNetV1Config(BackboneConfig):
    """Config of `MobileNetV1`.

    Attributes:
        layers: rows (c, s) of table 1: a depthwise separable layer with c output channels and stride s.
        stem_width: channels of the stem, whose stride is 2.
        width_mult: multiplies all widths and rounds them to multiples of 8, none by more than a tenth down. 1 leaves
            them as they are.
        dropout: rate before the classifier.
        ulsam_positions: layers, counted from 1, the stem, at which there is subspace attention.
        ulsam_groups: number of its groups of channels, each with a map of its own.
        ulsam_mode: whether it stands in the place of those layers or behind them.
    """

    layers: tuple[tuple[int, int], ...] = (
        (64, 1),
        (128, 2),
        (128, 1),
        (256, 2),
        (256, 1),
        (512, 2),
        *((512, 1),) * 5,
        (1024, 2),
        (1024, 1),
    )
    stem_width: int = 32
    width_mult: float = 1.0
    dropout: float = 0.0
    ulsam_positions: tuple[int, ...] = ()
    ulsam_groups: int = 4
    ulsam_mode: Literal["replace", "after"] = "replace"
    preprocess: Preprocess = field(default_factory=lambda: Preprocess(interpolation="bilinear"))

    def build(self) -> MobileNetV1:
        return MobileNetV1(self)


class DepthwiseSeparable(nn.Module):
    """A 3x3 depthwise and a 1x1 convolution, each followed by batch norm and ReLU (paper, figure 3).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: of the depthwise convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            ConvNormAct(in_channels, in_channels, 3, stride=stride, groups=in_channels, act=nn.ReLU),
            ConvNormAct(in_channels, out_channels, 1, act=nn.ReLU),
        )
        self.after: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H / stride, W / stride), sizes rounded up."""
        return self.after(self.conv(x))


class MobileNetV1(Backbone):
    """The network of depthwise separable layers (paper, table 1): stem, layers, mean pool, linear classifier.

    Its feature maps are those before each change of resolution from stride 4 on, and the last one.

    Args:
        config: what to build.

    Raises:
        ValueError: layers is empty or malformed, or subspace attention cannot have one of its positions.
    """

    classifier_modules: ClassVar[tuple[str, ...]] = ("classifier.1",)
    stem_modules: ClassVar[tuple[str, ...]] = ("features.0.0",)
    min_size = 1  # every layer is padded

    def __init__(self, config: MobileNetV1Config) -> None:
        super().__init__(config)
        if not config.layers or any(len(row) != 2 or min(row) < 1 for row in config.layers):
            raise ValueError(f"layers must be rows (c, s) of positive numbers, got {config.layers}")
        place = (config.ulsam_positions, config.ulsam_groups, config.ulsam_mode)
        attention = SubspaceAttention(*place, last=1 + len(config.layers))
        channels = scaled_width(config.stem_width, config.width_mult)
        layers: list[nn.Module] = [ConvNormAct(config.in_channels, channels, 3, stride=2, act=nn.ReLU)]
        infos = [Feature(channels, 2)]
        for width, stride in config.layers:
            out_channels = scaled_width(width, config.width_mult)
            layer: nn.Module = DepthwiseSeparable(channels, out_channels, stride=stride)
            layers.append(attention.around(layer, len(layers) + 1, (channels, out_channels), stride))
            channels = out_channels
            infos.append(Feature(channels, infos[-1].stride * stride))
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


VARIANTS: dict[str, MobileNetV1Config] = {
    "mobilenet_v1": MobileNetV1Config(),
    "mobilenet_v1_ulsam": MobileNetV1Config(ulsam_positions=(11,), ulsam_mode="after"),
    "mobilenet_v1_ulsam_11": MobileNetV1Config(ulsam_positions=(11,)),
    "mobilenet_v1_ulsam_11_12": MobileNetV1Config(ulsam_positions=(11, 12)),
}
