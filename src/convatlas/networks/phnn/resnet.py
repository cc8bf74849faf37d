"""PHResNet: residual networks for small images whose convolutions are hypercomplex.

Grassucci, Zhang, Comminiello: "PHNNs: Lightweight Neural Networks via Parameterized Hypercomplex Convolutions", IEEE
TNNLS 2022, arXiv 2110.04176.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from convatlas.data.transforms import Preprocess
from convatlas.networks.base import BackboneConfig
from convatlas.networks.phnn.layers import conv_maker
from convatlas.networks.resnet import ResNet, ResNetConfig
from convatlas.nn.conv.hypercomplex import PHNN_LAYOUT
from convatlas.ops.hypercomplex import fill_channels
from convatlas.weights import Layout

__all__ = ["VARIANTS", "PHResNet", "PHResNetConfig"]


@dataclass(frozen=True, kw_only=True)
class PHResNetConfig(BackboneConfig):
    """Config of `PHResNet`.

    Attributes:
        block: ``"basic"`` (two 3x3 convolutions) or ``"bottleneck"`` (1x1, 3x3, 1x1).
        depths: blocks of each stage.
        widths: channels of the 3x3 convolutions of each stage, the first also of the stem; a bottleneck puts out four
            times as many. n divides them.
        n: number of components of the numbers that the channels are.
        algebra: ``learned``, ``quaternion`` (n = 4), ``complex`` (2), ``octonion`` (8), or ``real`` (1) for torch's
            convolutions.
        unused_bias: whether the convolutions of a learned algebra hold the bias that the authors' code makes and never
            adds; their checkpoints have it. Otherwise they have none.
    """

    block: str = "basic"
    depths: tuple[int, ...] = (2, 2, 2, 2)
    widths: tuple[int, ...] = (64, 128, 256, 512)
    n: int = 4
    algebra: str = "learned"
    unused_bias: bool = True
    num_classes: int = 10
    preprocess: Preprocess = field(
        default_factory=lambda: Preprocess(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", crop=1.0)
    )

    def build(self) -> PHResNet:
        return PHResNet(self)


class PHResNet(ResNet):
    """The residual network for images of about 32 pixels, with hypercomplex convolutions and a real classifier.

    Channels of zeros are put before those of the image until n divides their number: with n = 4 an RGB image is a
    quaternion without real part, as the authors feed it, and a grey one lies in the last component.

    Args:
        config: what to build.

    Raises:
        UnknownName: there is no such block or algebra.
        ValueError: n does not divide the widths or is not that of the algebra, or the tuples of the config name
            different numbers of stages.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {
        "authors": Layout(
            renames=((r"\.shortcut\.", ".downsample."), (r"^linear\.", "fc."), *PHNN_LAYOUT.renames),
            function=PHNN_LAYOUT.function,
        )
    }

    def __init__(self, config: PHResNetConfig) -> None:
        conv = conv_maker(config.n, config.algebra, unused_bias=config.unused_bias, real_bias=False)
        skeleton = ResNetConfig(
            block=config.block,
            depths=config.depths,
            widths=config.widths,
            stem_width=next(iter(config.widths), 0),
            small_stem=True,
            num_classes=config.num_classes,
            in_channels=config.in_channels + -config.in_channels % config.n,
        )
        super().__init__(skeleton, conv=conv)
        self.config = config

    def _stem(self, x: Tensor) -> Tensor:
        return super()._stem(fill_channels(x, self.config.n))

    def reset_classifier(self, num_classes: int) -> None:
        super().reset_classifier(num_classes)
        if num_classes > 0 and len(self.feature_info) == 3:
            nn.init.kaiming_normal_(self.fc.weight)  # type: ignore[arg-type]  # the authors' small networks only


_LARGE = (60, 120, 240, 516)
_DEPTHS_50 = (3, 4, 6, 3)
_DEPTHS_101 = (3, 4, 23, 3)
_DEPTHS_152 = (3, 8, 36, 3)


def _small(depth: int, widths: tuple[int, ...] = (16, 32, 64), n: int = 4) -> PHResNetConfig:
    return PHResNetConfig(depths=(depth,) * 3, widths=widths, n=n)


_SMALL_LARGE = (24, 72, 216)

#: The large ones have widths that 3 and 4 divide, for n = 3 on RGB images. The paper uses n = 2, 3 and 4.
VARIANTS: dict[str, PHResNetConfig] = {
    "phresnet18": PHResNetConfig(),
    "phresnet34": PHResNetConfig(depths=_DEPTHS_50),
    "phresnet50": PHResNetConfig(block="bottleneck", depths=_DEPTHS_50),
    "phresnet101": PHResNetConfig(block="bottleneck", depths=_DEPTHS_101),
    "phresnet152": PHResNetConfig(block="bottleneck", depths=_DEPTHS_152),
    "phresnet18_large": PHResNetConfig(widths=_LARGE, n=3),
    "phresnet50_large": PHResNetConfig(block="bottleneck", depths=_DEPTHS_50, widths=_LARGE, n=3),
    "phresnet152_large": PHResNetConfig(block="bottleneck", depths=_DEPTHS_152, widths=_LARGE, n=3),
    "phresnet20": _small(3),
    "phresnet32": _small(5),
    "phresnet44": _small(7),
    "phresnet56": _small(9),
    "phresnet110": _small(18),
    "phresnet20_large": _small(3, _SMALL_LARGE, 3),
    "phresnet32_large": _small(5, _SMALL_LARGE, 3),
    "phresnet44_large": _small(7, _SMALL_LARGE, 3),
    "phresnet56_large": _small(9, _SMALL_LARGE, 3),
    "phresnet110_large": _small(18, _SMALL_LARGE, 3),
}
