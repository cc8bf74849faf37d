"""ResNet-18 of Cross-D convolutions: trained on images, then a network for volumes.

Yavuz, Yang: "Cross-D Conv: Cross-Dimensional Transferable Knowledge Base via Fourier Shifting Operation", 2024, arXiv
2411.02441. Every convolution of `convatlas.networks.resnet`, that of the stem and of the shortcuts as well, is a
`CrossDConv2d`; the network for volumes has their 3-D kernels, and loads checkpoints of the one for images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from convatlas.data.transforms import Preprocess
from convatlas.data.volume_transforms import VolumePreprocess
from convatlas.networks.resnet import ResNet, ResNetConfig
from convatlas.nn.conv.cross_d_conv import CrossDConv2d, convert_to_3d
from convatlas.weights import Layout

__all__ = ["VARIANTS", "CrossDResNet", "CrossDResNetConfig"]

#: Size of the images of RadImageNet, and of the volumes that the transfer was tested on.
_IMAGES = Preprocess(interpolation="bilinear")
_VOLUMES = VolumePreprocess(size=(64, 64, 64), mean=_IMAGES.mean, std=_IMAGES.std)


@dataclass(frozen=True, kw_only=True)
class CrossDResNetConfig(ResNetConfig):
    """Config of `CrossDResNet`. What it takes, images or volumes, is decided by ``preprocess``.

    Attributes:
        centered: of the convolutions: whether the 2-D kernels are the middle slices where the angle is 0.
    """

    num_classes: int = 165
    centered: bool = False
    preprocess: Preprocess | VolumePreprocess = field(default_factory=lambda: _IMAGES)  # type: ignore[assignment]

    def build(self) -> CrossDResNet:
        return CrossDResNet(self)


def _without_controllers(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if "rotation_params." not in key}


#: A network for volumes takes the 3-D kernels of one for images as they are.
_FROM_IMAGES = Layout(renames=((r"(^|\.)weights_3d$", r"\1weight"),), function=_without_controllers)


class CrossDResNet(ResNet):
    """The residual network with Cross-D convolutions for images, or with their 3-D kernels for volumes.

    Args:
        config: what to build.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {**ResNet.layouts, "images": _FROM_IMAGES}

    def __init__(self, config: CrossDResNetConfig) -> None:
        def conv(in_channels: int, out_channels: int, kernel_size: int, stride: int) -> nn.Module:
            place: Any = {"padding": kernel_size // 2, "bias": False, "centered": config.centered}
            return CrossDConv2d(in_channels, out_channels, kernel_size, stride, **place)

        super().__init__(config, conv=conv)
        if isinstance(config.preprocess, VolumePreprocess):
            convert_to_3d(self, inplace=True)


VARIANTS: dict[str, CrossDResNetConfig] = {
    "cross_d_resnet18": CrossDResNetConfig(),
    "cross_d_resnet18_3d": CrossDResNetConfig(preprocess=_VOLUMES),
}
