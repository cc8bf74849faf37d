"""InceptionNeXt: MetaNeXt blocks whose token mixer is the Inception depthwise convolution.

Yu, Zhou, Yan, Wang: "InceptionNeXt: When Inception Meets ConvNeXt", CVPR 2024, arXiv 2303.16900.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.data.transforms import Preprocess
from convatlas.networks.base import Backbone, BackboneConfig, Feature, PublishedFile
from convatlas.nn.drop import DropPath, drop_path_rates
from convatlas.nn.mixers.inception import InceptionDWConv2d
from convatlas.nn.scale import LayerScale
from convatlas.weights import Layout

__all__ = ["PUBLISHED", "VARIANTS", "InceptionNeXt", "InceptionNeXtConfig", "MetaNeXtBlock"]

#: Makes the token mixer of a block from its channels and dilation.
TokenMixer = Callable[[int, int], nn.Module]


@dataclass(frozen=True, kw_only=True)
class InceptionNeXtConfig(BackboneConfig):
    """Config of `InceptionNeXt`.

    Attributes:
        depths: blocks of each stage.
        dims: channels of each stage.
        mlp_ratios: hidden width of the MLP over its channels, for each stage.
        square_kernel_size, band_kernel_size, branch_ratio: of the Inception depthwise convolution.
        output_stride: total stride, 32, 16 or 8; below 32 the last stages keep their resolution and dilate instead.
        drop_path: rate at the last block; it rises linearly from 0.
        dropout: rate before the classifier.
        layer_scale_init: initial LayerScale factor, or None to leave LayerScale out.
    """

    depths: tuple[int, ...] = (3, 3, 9, 3)
    dims: tuple[int, ...] = (96, 192, 384, 768)
    mlp_ratios: tuple[float, ...] = (4, 4, 4, 3)
    square_kernel_size: int = 3
    band_kernel_size: int = 11
    branch_ratio: float = 0.125
    output_stride: int = 32
    drop_path: float = 0.1
    dropout: float = 0.0
    layer_scale_init: float | None = 1e-6

    def build(self) -> InceptionNeXt:
        return InceptionNeXt(self)


class MetaNeXtBlock(nn.Module):
    """y = x + drop_path(gamma * mlp(norm(token_mixer(x)))): one residual, as in ConvNeXt (paper, figure 2).

    Args:
        channels: channels C.
        token_mixer: module that mixes positions and keeps the shape.
        mlp_ratio: hidden width of the MLP over C.
        drop_path: probability to drop the branch of a sample.
        layer_scale_init: initial LayerScale factor, or None to leave LayerScale out.
    """

    def __init__(
        self,
        channels: int,
        token_mixer: nn.Module,
        *,
        mlp_ratio: float = 4,
        drop_path: float = 0.0,
        layer_scale_init: float | None = 1e-6,
    ) -> None:
        super().__init__()
        self.token_mixer = token_mixer
        self.norm = nn.BatchNorm2d(channels)
        self.mlp = _ConvMlp(channels, int(mlp_ratio * channels))
        self.layer_scale = nn.Identity() if layer_scale_init is None else LayerScale(channels, layer_scale_init)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        y = self.mlp(self.norm(self.token_mixer(x)))
        return x + self.drop_path(self.layer_scale(y))


class _ConvMlp(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _Downsample(nn.Sequential):
    """Norm and 2 x 2 convolution; without a stride the map is padded so that it keeps its size."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, dilation: int) -> None:
        super().__init__(
            nn.BatchNorm2d(in_channels), nn.Conv2d(in_channels, out_channels, 2, stride=stride, dilation=dilation)
        )
        self.padding = dilation if stride == 1 else 0

    def forward(self, x: Tensor) -> Tensor:
        norm, conv = self
        x = norm(x)
        return conv(F.pad(x, (0, self.padding, 0, self.padding)) if self.padding else x)


class _Stage(nn.Module):
    def __init__(self, downsample: nn.Module, blocks: list[MetaNeXtBlock]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class _MlpHead(nn.Module):
    """Mean over the positions, then Linear, GELU, LayerNorm, dropout, Linear (paper, section 3.3)."""

    def __init__(self, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        hidden = 3 * channels
        self.fc1 = nn.Linear(channels, hidden)
        self.norm = nn.LayerNorm(hidden, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.dropout(self.norm(F.gelu(self.fc1(x.mean((2, 3)))))))


class InceptionNeXt(Backbone):
    """The MetaNeXt network (paper, table 2): patch stem of stride 4, four stages, MLP head.

    Args:
        config: what to build.
        token_mixer: makes the token mixer of a block from its channels and dilation, for studies with another one;
            by default the Inception depthwise convolution.

    Raises:
        ValueError: the per-stage tuples differ in length, or output_stride is none of 8, 16 and 32.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {
        "authors": Layout(renames=((r"(blocks\.\d+)\.gamma$", r"\1.layer_scale.gamma"),))
    }
    classifier_modules: ClassVar[tuple[str, ...]] = ("head.fc2",)
    stem_modules: ClassVar[tuple[str, ...]] = ("stem.0",)

    def __init__(self, config: InceptionNeXtConfig, *, token_mixer: TokenMixer | None = None) -> None:
        super().__init__(config)
        depths, dims = config.depths, config.dims
        if not 0 < len(depths) == len(dims) <= len(config.mlp_ratios):
            raise ValueError(
                f"depths, dims and mlp_ratios must name the same stages, got {depths}, {dims} and {config.mlp_ratios}"
            )
        if config.output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride must be 8, 16 or 32, got {config.output_stride}")

        def inception(channels: int, dilation: int) -> nn.Module:
            return InceptionDWConv2d(
                channels, config.square_kernel_size, config.band_kernel_size, config.branch_ratio, dilation
            )

        make_mixer = token_mixer or inception
        self.stem = nn.Sequential(nn.Conv2d(config.in_channels, dims[0], 4, stride=4), nn.BatchNorm2d(dims[0]))
        rates = drop_path_rates(config.drop_path, depths)
        stages, features = [], []
        stride, dilation = 4, 1
        for stage, (depth, channels) in enumerate(zip(depths, dims, strict=True)):
            downsample: nn.Module = nn.Identity()
            if stage > 0:
                step = 2 if stride < config.output_stride else 1
                downsample = _Downsample(dims[stage - 1], channels, stride=step, dilation=dilation)
                stride, dilation = stride * step, dilation * (2 // step)
            blocks = [
                MetaNeXtBlock(
                    channels,
                    make_mixer(channels, dilation),
                    mlp_ratio=config.mlp_ratios[stage],
                    drop_path=rates[stage][block],
                    layer_scale_init=config.layer_scale_init,
                )
                for block in range(depth)
            ]
            stages.append(_Stage(downsample, blocks))
            features.append(Feature(channels, stride))
        self.stages = nn.Sequential(*stages)
        self.feature_info = tuple(features)
        self.apply(_init)
        self.head: nn.Module = _pool()
        self.reset_classifier(config.num_classes)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        self._check_input(x)
        x = self.stem(x)
        features = []
        for stage in self.stages:
            x = self._run_stage(stage, x)
            features.append(x)
        return features

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(x)

    def layers(self) -> list[nn.Module]:
        blocks = [part for stage in self.stages for part in stage.children() if not isinstance(part, nn.Identity)]
        steps = [step for part in blocks for step in ([part] if isinstance(part, _Downsample) else part.children())]
        return [self.stem, *steps, self.head]

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a fresh one for ``num_classes`` classes; the head's hidden layer is kept."""
        self.config = self.config.override(num_classes=num_classes)
        weight = next(self.stem.parameters())
        if num_classes == 0:
            self.head = _pool()
        elif isinstance(self.head, _MlpHead):
            self.head.fc2 = nn.Linear(self.head.fc2.in_features, num_classes, device=weight.device, dtype=weight.dtype)
            _init(self.head.fc2)
        else:
            head = _MlpHead(self.feature_info[-1].channels, num_classes, self.config.dropout)
            self.head = head.to(device=weight.device, dtype=weight.dtype).apply(_init).train(self.training)


def _pool() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_DEEP = (3, 3, 27, 3)
_BASE = (128, 256, 512, 1024)

VARIANTS: dict[str, InceptionNeXtConfig] = {
    "inceptionnext_atto": InceptionNeXtConfig(
        depths=(2, 2, 6, 2), dims=(40, 80, 160, 320), band_kernel_size=9, branch_ratio=0.25
    ),
    "inceptionnext_tiny": InceptionNeXtConfig(),
    "inceptionnext_small": InceptionNeXtConfig(depths=_DEEP, drop_path=0.3),
    "inceptionnext_base": InceptionNeXtConfig(depths=_DEEP, dims=_BASE, drop_path=0.4),
    "inceptionnext_base_384": InceptionNeXtConfig(
        depths=_DEEP, dims=_BASE, drop_path=0.7, dropout=0.5, preprocess=Preprocess(size=384, crop=1.0)
    ),
}

_RELEASE = "https://github.com/sail-sg/inceptionnext/releases/download/model"


def _published(name: str, top1: float) -> tuple[PublishedFile, ...]:
    figures = {"ImageNet-1K top-1 [%]": top1}
    return (PublishedFile(f"{_RELEASE}/{name}.pth", "Apache-2.0", figures),)


PUBLISHED: dict[str, tuple[PublishedFile, ...]] = {
    "inceptionnext_atto": _published("inceptionnext_atto", 75.3),
    "inceptionnext_tiny": _published("inceptionnext_tiny", 82.3),
    "inceptionnext_small": _published("inceptionnext_small", 83.5),
    "inceptionnext_base": _published("inceptionnext_base", 84.0),
    "inceptionnext_base_384": _published("inceptionnext_base_384", 85.2),
}
