"""VGG for small images, with batch norm: the plain chain of 3x3 convolutions, or with a density in its kernels.

Simonyan, Zisserman: "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015, arXiv 1409.1556,
in the form for images of 32 pixels with one linear layer. With a density it is a network of Cammarasana, Patane:
"Optimal Weighted Convolution for Classification and Denosing", 2025, arXiv 2505.24558.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from convatlas.data.transforms import Preprocess
from convatlas.networks.base import Backbone, BackboneConfig, Feature
from convatlas.nn.conv.weighted_conv import BEST_DENSITIES, WeightedConv2d
from convatlas.weights import Layout

__all__ = ["VARIANTS", "VGG", "VGGConfig"]

_SMALL = Preprocess(size=32, crop=1.0)


@dataclass(frozen=True, kw_only=True)
class VGGConfig(BackboneConfig):
    """Config of `VGG`.

    Attributes:
        widths: channels of the convolutions of each stage; a max-pooling follows each stage.
        kernel_size: of all convolutions, odd.
        density: values of a weighted convolution, the outermost first; plain convolutions when left out.
        trainable_density: whether each layer learns its values, from ``density``.
    """

    num_classes: int = 100
    widths: tuple[tuple[int, ...], ...] = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)
    kernel_size: int = 3
    density: tuple[float, ...] | None = None
    trainable_density: bool = False
    preprocess: Preprocess = field(default_factory=lambda: _SMALL)

    def build(self) -> VGG:
        return VGG(self)


class VGG(Backbone):
    """Stages of convolution, batch norm and ReLU with a max-pooling behind each; mean pool, linear classifier.

    Args:
        config: what to build.

    Raises:
        ValueError: a width is smaller than 1, or the kernel is even.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {}
    classifier_modules: ClassVar[tuple[str, ...]] = ("classifier",)
    stem_modules: ClassVar[tuple[str, ...]] = ("stages.0.0",)

    def __init__(self, config: VGGConfig) -> None:
        super().__init__(config)
        if not config.widths or any(not stage or min(stage) < 1 for stage in config.widths):
            raise ValueError(f"widths must hold channels of at least 1 for each stage, got {config.widths}")
        if config.kernel_size < 1 or config.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {config.kernel_size}")
        self.stages = nn.ModuleList()
        channels, features = config.in_channels, []
        for number, stage in enumerate(config.widths, start=1):
            layers: list[nn.Module] = []
            for width in stage:
                layers += [_conv(config, channels, width), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                channels = width
            self.stages.append(nn.Sequential(*layers, nn.MaxPool2d(2)))
            features.append(Feature(channels, 2**number))
        self.feature_info = tuple(features)
        self.reset_classifier(config.num_classes)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        self._check_input(x)
        features = []
        for stage in self.stages:
            x = self._run_stage(stage, x)
            features.append(x)
        return features

    def forward_head(self, x: Tensor) -> Tensor:
        return self.classifier(x.mean((2, 3)))

    def reset_classifier(self, num_classes: int) -> None:
        self.config = self.config.override(num_classes=num_classes)
        self.classifier: nn.Module = nn.Identity()
        if num_classes > 0:
            weight = next(self.stages.parameters())
            place = {"device": weight.device, "dtype": weight.dtype}
            self.classifier = nn.Linear(self.feature_info[-1].channels, num_classes, **place)  # type: ignore[arg-type]


def _conv(config: VGGConfig, in_channels: int, out_channels: int) -> nn.Module:
    size, density = config.kernel_size, config.density
    if density is None:
        conv = nn.Conv2d(in_channels, out_channels, size, padding=size // 2)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        return conv
    values: Sequence[float] = density
    trained = config.trainable_density
    return WeightedConv2d(in_channels, out_channels, size, padding=size // 2, density=values, trainable_density=trained)


VARIANTS: dict[str, VGGConfig] = {
    "vgg16_bn_small": VGGConfig(),
    "vgg16_bn_small_weighted": VGGConfig(density=BEST_DENSITIES[3]),
}
