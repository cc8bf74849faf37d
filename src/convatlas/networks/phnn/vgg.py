"""PHVGG: VGG with batch norm for small images, whose convolutions and hidden linear layers are hypercomplex.

Grassucci, Zhang, Comminiello: "PHNNs: Lightweight Neural Networks via Parameterized Hypercomplex Convolutions", IEEE
TNNLS 2022, arXiv 2110.04176.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from convatlas.data.transforms import Preprocess
from convatlas.networks.base import Backbone, BackboneConfig, Feature
from convatlas.networks.phnn.layers import conv_maker, linear_maker
from convatlas.nn.conv.hypercomplex import PHNN_LAYOUT
from convatlas.ops.hypercomplex import fill_channels
from convatlas.weights import Layout

__all__ = ["PHVGG", "VARIANTS", "PHVGGConfig"]


@dataclass(frozen=True, kw_only=True)
class PHVGGConfig(BackboneConfig):
    """Config of `PHVGG`.

    Attributes:
        widths: channels of the convolutions of each stage; a max-pooling ends the stage. n divides them.
        head_widths: features of the two hidden layers of the classifier; n divides them.
        n: number of components of the numbers that the channels are.
        algebra: ``learned``, ``quaternion`` (n = 4), ``complex`` (2), ``octonion`` (8), or ``real`` (1) for torch's
            layers.
        unused_bias: whether the convolutions of a learned algebra hold the bias that the authors' code makes and never
            adds; their checkpoints have it. Otherwise they have none.
        dropout: rate before each hidden layer of the classifier.
    """

    widths: tuple[tuple[int, ...], ...] = ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3)
    head_widths: tuple[int, int] = (512, 512)
    n: int = 4
    algebra: str = "learned"
    unused_bias: bool = True
    dropout: float = 0.5
    num_classes: int = 10
    preprocess: Preprocess = field(
        default_factory=lambda: Preprocess(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", crop=1.0)
    )

    def build(self) -> PHVGG:
        return PHVGG(self)


class PHVGG(Backbone):
    """VGG with batch norm: 3x3 convolutions and max-pooling, then two hidden layers and a real classifier.

    The classifier sees the mean over the positions, of which there is one in an image of 32 pixels. Channels of zeros
    are put before those of the image until n divides their number, as in `PHResNet`.

    Args:
        config: what to build.

    Raises:
        UnknownName: there is no such algebra.
        ValueError: n does not divide the widths or is not that of the algebra, or there is an empty stage.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {"authors": PHNN_LAYOUT}
    classifier_modules: ClassVar[tuple[str, ...]] = ("classifier.6",)
    stem_modules: ClassVar[tuple[str, ...]] = ("features.0",)

    def __init__(self, config: PHVGGConfig) -> None:
        super().__init__(config)
        if not config.widths or not all(config.widths):
            raise ValueError(f"widths must have at least one convolution in each stage, got {config.widths}")
        make = conv_maker(config.n, config.algebra, unused_bias=config.unused_bias, real_bias=True)
        layers: list[nn.Module] = []
        self._ends = []
        channels = config.in_channels + -config.in_channels % config.n
        for stage in config.widths:
            for width in stage:
                layers += [make(channels, width, 3, 1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                channels = width
            layers.append(nn.MaxPool2d(2))
            self._ends.append(len(layers))
        self.features = nn.Sequential(*layers)
        self.feature_info = tuple(Feature(stage[-1], 2 ** (index + 1)) for index, stage in enumerate(config.widths))
        linear = linear_maker(config.n, config.algebra)
        first, second = config.head_widths
        self.classifier = nn.Sequential(
            *(nn.Dropout(config.dropout), linear(channels, first), nn.ReLU(inplace=True)),
            *(nn.Dropout(config.dropout), linear(first, second), nn.ReLU(inplace=True)),
            nn.Identity(),
        )
        self.reset_classifier(config.num_classes)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        self._check_input(x)
        x = fill_channels(x, self.config.n)
        features = []
        for start, end in zip([0, *self._ends], self._ends, strict=False):
            x = self._run_stage(self.features[start:end], x)
            features.append(x)
        return features

    def forward_head(self, x: Tensor) -> Tensor:
        return self.classifier(x.mean((2, 3)))

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a fresh one for ``num_classes`` classes; its hidden layers are kept."""
        self.config = self.config.override(num_classes=num_classes)
        self.classifier[6] = nn.Identity()
        if num_classes > 0:
            like = next(self.features.parameters())
            width = self.config.head_widths[1]
            self.classifier[6] = nn.Linear(width, num_classes, device=like.device, dtype=like.dtype)


_LARGE_19 = ((24,) * 2, (72,) * 2, (216,) * 4, (648,) * 4, (648,) * 4)
_STAGES_19 = ((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4)

#: The large one has widths that 3 and 4 divide, for n = 3 on RGB images. The paper uses n = 2, 3 and 4.
VARIANTS: dict[str, PHVGGConfig] = {
    "phvgg16": PHVGGConfig(),
    "phvgg19": PHVGGConfig(widths=_STAGES_19),
    "phvgg19_large": PHVGGConfig(widths=_LARGE_19, head_widths=(516, 516), n=3),
}
