"""MedicalNet's residual networks for volumes, whose last stages dilate instead of striding.

Chen, Ma, Zheng: "Med3D: Transfer Learning for 3D Medical Image Analysis", 2019, arXiv 1904.00625. Parameters are named
as in the authors' code, github.com/Tencent/MedicalNet (MIT), which links to files such as ``resnet_10_23dataset.pth``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.data.volume_transforms import VolumePreprocess
from convatlas.errors import unknown
from convatlas.networks.base import Backbone, BackboneConfig, Feature
from convatlas.weights import Layout

__all__ = ["VARIANTS", "DilatedBlock", "MedicalResNet", "MedicalResNetConfig"]

Shortcut = Literal["pad", "conv"]

_WIDTHS, _STRIDES, _DILATIONS = (64, 128, 256, 512), (1, 2, 1, 1), (1, 1, 2, 4)


@dataclass(frozen=True, kw_only=True)
class MedicalResNetConfig(BackboneConfig):
    """Config of `MedicalResNet`.

    Attributes:
        depths: blocks of the four stages.
        width: channels of the first stage; each further one has twice as many.
        shortcut: where the shape changes: every other voxel and channels of zeros, "pad" (type A), or a 1 x 1 x 1
            convolution and a norm, "conv" (type B).

    Raises:
        ValueError: a value is out of range.
        UnknownName: there is no such shortcut.
    """

    num_classes: int = 0
    in_channels: int = 1
    depths: tuple[int, int, int, int] = (1, 1, 1, 1)
    width: int = 64
    shortcut: Shortcut = "conv"
    preprocess: VolumePreprocess = field(
        default_factory=lambda: VolumePreprocess(size=(56, 112, 112), mean=(0.0,), std=(1.0,), intensity="standardise")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.depths) != 4 or min(*self.depths, self.width) < 1:
            raise ValueError(f"depths must be four, and they and width positive, got {self.depths} and {self.width}")
        if self.shortcut not in get_args(Shortcut):
            raise unknown("shortcut", self.shortcut, get_args(Shortcut))

    def build(self) -> MedicalResNet:
        return MedicalResNet(self)


class DilatedBlock(nn.Module):
    """y = relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)), both convolutions dilated.

    Args:
        in_channels, out_channels: channels.
        stride: of the first convolution.
        dilation: of both convolutions.
        shortcut: see `MedicalResNetConfig`.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, dilation: int, shortcut: Shortcut) -> None:
        super().__init__()
        reach = {"padding": dilation, "dilation": dilation, "bias": False}
        self.conv1 = nn.Conv3d(in_channels, out_channels, 3, stride, **reach)  # type: ignore[arg-type]
        self.bn1 = nn.BatchNorm3d(out_channels)
        self.conv2 = nn.Conv3d(out_channels, out_channels, 3, **reach)  # type: ignore[arg-type]
        self.bn2 = nn.BatchNorm3d(out_channels)
        self.stride, self.missing = stride, out_channels - in_channels
        self.downsample: nn.Module | None = None
        if (stride > 1 or self.missing) and shortcut == "conv":
            self.downsample = nn.Sequential(
                nn.Conv3d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm3d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, D, H, W) to (B, out_channels, ...), sizes divided by the stride and rounded up."""
        y: Tensor = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.downsample is not None:
            x = self.downsample(x)
        elif self.stride > 1 or self.missing:
            x = F.pad(x[:, :, :: self.stride, :: self.stride, :: self.stride], (0, 0) * 3 + (0, self.missing))
        return F.relu(y + x)


class MedicalResNet(Backbone):
    """A stem that divides the resolution by four, and four stages, of which the second halves it once more.

    Args:
        config: what to build.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {
        # What the whole networks were trained for, and the discriminator and generator of DISGAN beside it.
        "medicalnet": Layout(
            renames=(
                (r"^(generator|discriminator)\..*", ""),
                (r"^FE\.", ""),
                (r"^module\.", ""),
                (r"^conv_seg\..*", ""),
            )
        ),
    }
    classifier_modules: ClassVar[tuple[str, ...]] = ("fc",)
    stem_modules: ClassVar[tuple[str, ...]] = ("conv1",)
    min_size: int | tuple[int, ...] | None = (1, 1, 1)

    def __init__(self, config: MedicalResNetConfig) -> None:
        super().__init__(config)
        channels = config.width
        self.conv1 = nn.Conv3d(config.in_channels, channels, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm3d(channels)
        stages = []
        for stage, depth in enumerate(config.depths):
            blocks = []
            for number in range(depth):
                width = config.width * 2**stage
                stride = _STRIDES[stage] if number == 0 else 1
                blocks.append(
                    DilatedBlock(channels, width, stride=stride, dilation=_DILATIONS[stage], shortcut=config.shortcut)
                )
                channels = width
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        strides = (4, 8, 8, 8)
        self.feature_info = tuple(Feature(config.width * 2**stage, strides[stage]) for stage in range(4))
        self.reset_classifier(config.num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward_features(self, x: Tensor) -> list[Tensor]:
        self._check_input(x)
        x = F.max_pool3d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        features = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = self._run_stage(stage, x)
            features.append(x)
        return features

    def forward_head(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3, 4)))

    def reset_classifier(self, num_classes: int) -> None:
        self.config = self.config.override(num_classes=num_classes)
        self.fc: nn.Module = nn.Identity()
        if num_classes > 0:
            weight = self.conv1.weight
            self.fc = nn.Linear(self.feature_info[-1].channels, num_classes, device=weight.device, dtype=weight.dtype)


VARIANTS: dict[str, MedicalResNetConfig] = {
    "med3d_resnet10": MedicalResNetConfig(),
    "med3d_resnet18": MedicalResNetConfig(depths=(2, 2, 2, 2), shortcut="pad"),
    "med3d_resnet34": MedicalResNetConfig(depths=(3, 4, 6, 3), shortcut="pad"),
}
