"""ConvNeXt, and the variants of it that the InceptionNeXt paper studies.

Liu, Mao, Wu, Feichtenhofer, Darrell, Xie: "A ConvNet for the 2020s", CVPR 2022, arXiv 2201.03545. The smaller kernels
and the partial depthwise convolution: Yu, Zhou, Yan, Wang, CVPR 2024, arXiv 2303.16900, section 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.networks.base import Backbone, BackboneConfig, Feature, PublishedFile
from convatlas.nn.depthwise import DepthwiseConv2d
from convatlas.nn.drop import DropPath, drop_path_rates
from convatlas.nn.mixers.inception import PartialDWConv2d
from convatlas.nn.norm import ChannelLayerNorm
from convatlas.nn.scale import LayerScale
from convatlas.weights import Layout

__all__ = ["PUBLISHED", "VARIANTS", "ConvNeXt", "ConvNeXtBlock", "ConvNeXtConfig"]


@dataclass(frozen=True, kw_only=True)
class ConvNeXtConfig(BackboneConfig):
    """Config of `ConvNeXt`.

    Attributes:
        depths: blocks of each stage.
        dims: channels of each stage.
        kernel_size: side of the depthwise kernel, odd; one for all stages or one for each.
        conv_ratio: share of the channels that the depthwise kernel convolves, in (0, 1].
        drop_path: rate at the last block; it rises linearly from 0.
        layer_scale_init: initial LayerScale factor, or None to leave LayerScale out.
    """

    depths: tuple[int, ...] = (3, 3, 9, 3)
    dims: tuple[int, ...] = (96, 192, 384, 768)
    kernel_size: int | tuple[int, ...] = 7
    conv_ratio: float = 1.0
    drop_path: float = 0.1
    layer_scale_init: float | None = 1e-6

    def build(self) -> ConvNeXt:
        return ConvNeXt(self)


class ConvNeXtBlock(nn.Module):
    """y = x + drop_path(gamma * mlp(norm(dwconv(x)))), norm and MLP over the channels (paper, figure 4).

    Args:
        channels: channels C.
        kernel_size: side of the depthwise kernel, odd.
        conv_ratio: share of the channels that it convolves, in (0, 1].
        drop_path: probability to drop the branch of a sample.
        layer_scale_init: initial LayerScale factor, or None to leave LayerScale out.
    """

    def __init__(
        self,
        channels: int,
        *,
        kernel_size: int = 7,
        conv_ratio: float = 1.0,
        drop_path: float = 0.0,
        layer_scale_init: float | None = 1e-6,
    ) -> None:
        super().__init__()
        self.dwconv: nn.Module
        if conv_ratio == 1:
            self.dwconv = DepthwiseConv2d(channels, channels, kernel_size, padding=kernel_size // 2)
        else:
            self.dwconv = PartialDWConv2d(channels, kernel_size, conv_ratio)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.pwconv2 = nn.Linear(4 * channels, channels)
        self.layer_scale = (
            nn.Identity() if layer_scale_init is None else LayerScale(channels, layer_scale_init, channel_dim=-1)
        )
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        y = self.dwconv(x).permute(0, 2, 3, 1)
        y = self.pwconv2(F.gelu(self.pwconv1(self.norm(y))))
        return x + self.drop_path(self.layer_scale(y).permute(0, 3, 1, 2))


def _flatten_layer_scale(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    # torchvision keeps the factors as (C, 1, 1).
    return {key: value.flatten() if key.endswith(".gamma") else value for key, value in state.items()}


_TORCHVISION = Layout(
    renames=(
        (r"^features\.0\.", "downsample_layers.0."),
        *((rf"^features\.{2 * stage}\.", f"downsample_layers.{stage}.") for stage in (1, 2, 3)),
        *((rf"^features\.{2 * stage + 1}\.", f"stages.{stage}.") for stage in range(4)),
        (r"\.block\.0\.", ".dwconv."),
        (r"\.block\.2\.", ".norm."),
        (r"\.block\.3\.", ".pwconv1."),
        (r"\.block\.5\.", ".pwconv2."),
        (r"\.layer_scale$", ".layer_scale.gamma"),
        (r"^classifier\.0\.", "norm."),
        (r"^classifier\.2\.", "head."),
    ),
    function=_flatten_layer_scale,
)


_TIMM = Layout(
    renames=(
        (r"^stem\.", "downsample_layers.0."),
        (r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
        (r"^stages\.(\d+)\.blocks\.", r"stages.\1."),
        (r"\.conv_dw\.", ".dwconv."),
        (r"\.mlp\.fc([12])\.", r".pwconv\1."),
        (r"\.gamma$", ".layer_scale.gamma"),
        (r"^head\.norm\.", "norm."),
        (r"^head\.fc\.", "head."),
    )
)


class ConvNeXt(Backbone):
    """ConvNeXt (paper, table 9): patch stem of stride 4, four stages, mean pool, norm, linear classifier.

    Loads the layouts of the authors, torchvision and timm.

    Args:
        config: what to build.

    Raises:
        ValueError: depths, dims and kernel sizes differ in number, or a kernel size is even.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {
        "authors": Layout(renames=((r"^(stages\.\d+\.\d+)\.gamma$", r"\1.layer_scale.gamma"),)),
        "torchvision": _TORCHVISION,
        "timm": _TIMM,
    }
    classifier_modules: ClassVar[tuple[str, ...]] = ("head",)
    head_modules: ClassVar[tuple[str, ...]] = ("norm",)
    stem_modules: ClassVar[tuple[str, ...]] = ("downsample_layers.0.0",)

    def __init__(self, config: ConvNeXtConfig) -> None:
        super().__init__(config)
        depths, dims = config.depths, config.dims
        if not 0 < len(depths) == len(dims):
            raise ValueError(f"depths and dims must name the same stages, got {depths} and {dims}")
        sizes = (config.kernel_size,) * len(dims) if isinstance(config.kernel_size, int) else config.kernel_size
        if len(sizes) != len(dims) or any(size % 2 == 0 for size in sizes):
            raise ValueError(f"kernel_size must be odd, one for all stages or one for each, got {config.kernel_size}")
        stem = nn.Sequential(nn.Conv2d(config.in_channels, dims[0], 4, stride=4), ChannelLayerNorm(dims[0]))
        downsamples = [
            nn.Sequential(ChannelLayerNorm(before), nn.Conv2d(before, after, 2, stride=2))
            for before, after in pairwise(dims)
        ]
        self.downsample_layers = nn.ModuleList([stem, *downsamples])
        rates = drop_path_rates(config.drop_path, depths)
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    ConvNeXtBlock(
                        channels,
                        kernel_size=sizes[stage],
                        conv_ratio=config.conv_ratio,
                        drop_path=rate,
                        layer_scale_init=config.layer_scale_init,
                    )
                    for rate in rates[stage]
                )
            )
            for stage, channels in enumerate(dims)
        )
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.feature_info = tuple(Feature(channels, 4 * 2**stage) for stage, channels in enumerate(dims))
        self.apply(_init)
        self.reset_classifier(config.num_classes)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        self._check_input(x)
        features = []
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = self._run_stage(stage, downsample(x))
            features.append(x)
        return features

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x.mean((2, 3))))

    def layers(self) -> list[nn.Module]:
        stages = zip(self.downsample_layers, self.stages, strict=True)
        steps = [step for downsample, blocks in stages for step in (downsample, *blocks.children())]
        return [*steps, self.norm, self.head]

    def reset_classifier(self, num_classes: int) -> None:
        self.config = self.config.override(num_classes=num_classes)
        self.head: nn.Module = nn.Identity()
        if num_classes > 0:
            weight = self.norm.weight
            self.head = nn.Linear(self.feature_info[-1].channels, num_classes, device=weight.device, dtype=weight.dtype)
            _init(self.head)


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_DEEP = (3, 3, 27, 3)

VARIANTS: dict[str, ConvNeXtConfig] = {
    "convnext_tiny": ConvNeXtConfig(),
    "convnext_small": ConvNeXtConfig(depths=_DEEP, drop_path=0.4),
    "convnext_base": ConvNeXtConfig(depths=_DEEP, dims=(128, 256, 512, 1024), drop_path=0.5),
    "convnext_large": ConvNeXtConfig(depths=_DEEP, dims=(192, 384, 768, 1536), drop_path=0.5),
    "convnext_tiny_k5": ConvNeXtConfig(kernel_size=5),
    "convnext_tiny_k3": ConvNeXtConfig(kernel_size=3),
    "convnext_tiny_k3_par1_2": ConvNeXtConfig(kernel_size=3, conv_ratio=1 / 2),
    "convnext_tiny_k3_par3_8": ConvNeXtConfig(kernel_size=3, conv_ratio=3 / 8),
    "convnext_tiny_k3_par1_4": ConvNeXtConfig(kernel_size=3, conv_ratio=1 / 4),
    "convnext_tiny_k3_par1_8": ConvNeXtConfig(kernel_size=3, conv_ratio=1 / 8),
    "convnext_tiny_k3_par1_16": ConvNeXtConfig(kernel_size=3, conv_ratio=1 / 16),
}

_RELEASE = "https://github.com/sail-sg/inceptionnext/releases/download/model"


def _study(name: str, top1: float) -> tuple[PublishedFile, ...]:
    figures = {"ImageNet-1K top-1 [%]": top1}
    return (PublishedFile(f"{_RELEASE}/{name}_1k_224_ema.pth", "Apache-2.0", figures),)


def _authors(size: str, top1: float) -> tuple[PublishedFile, ...]:
    url = f"https://dl.fbaipublicfiles.com/convnext/convnext_{size}_1k_224_ema.pth"
    return (PublishedFile(url, "MIT", {"ImageNet-1K top-1 [%]": top1}),)


PUBLISHED: dict[str, tuple[PublishedFile, ...]] = {
    "convnext_tiny": _authors("tiny", 82.1),
    "convnext_small": _authors("small", 83.1),
    "convnext_base": _authors("base", 83.8),
    "convnext_large": _authors("large", 84.3),
    "convnext_tiny_k5": _study("convnext_tiny_k5", 82.0),
    "convnext_tiny_k3": _study("convnext_tiny_k3", 81.5),
    "convnext_tiny_k3_par1_2": _study("convnext_tiny_k3_par1_2", 81.4),
    "convnext_tiny_k3_par3_8": _study("convnext_tiny_k3_par3_8", 81.4),
    "convnext_tiny_k3_par1_4": _study("convnext_tiny_k3_par1_4", 81.3),
    "convnext_tiny_k3_par1_8": _study("convnext_tiny_k3_par1_8", 80.8),
    "convnext_tiny_k3_par1_16": _study("convnext_tiny_k3_par1_16", 80.1),
}
