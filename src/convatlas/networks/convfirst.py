"""ConvFirst blocks, the blocks that they are compared with, and a small family of networks of them.

Lavin: "On the Efficiency of Convolutional Neural Networks", 2024, arXiv 2404.03617. The blocks are those of the
author's benchmark (github.com/andravin/spio). The networks are a family of this library: the paper's own were not
published, so no accuracy of the paper is theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from convatlas.errors import Unsupported, unknown
from convatlas.networks.base import Backbone, BackboneConfig, Feature
from convatlas.ops.block_fusion import fused_convfirst, fused_mbconv

__all__ = [
    "BLOCKS",
    "VARIANTS",
    "ConvFirstBlock",
    "ConvFirstConfig",
    "ConvFirstNet",
    "FoldedConvFirst",
    "FoldedMBConv",
    "FusedMBConvBlock",
    "MBConvBlock",
    "MLPBlock",
    "fold_block",
]

#: Makes an activation.
Activation = Callable[[], nn.Module]


@dataclass(frozen=True, kw_only=True)
class ConvFirstConfig(BackboneConfig):
    """Config of `ConvFirstNet`.

    Attributes:
        depths: blocks of each stage; the first of them has stride 2.
        dims: channels of each stage.
        block_types: block of each stage, by its name in `BLOCKS`.
        stem_width: channels of the stem, whose stride is 2.
        head_width: channels of the last 1x1 convolution.
        kernel_size: side of the spatial kernels, odd.
        group_width: channels of a group of the spatial convolutions; 1 makes them depthwise.
        expansion: expanded channels of a block over those of its input.
        dropout: rate before the classifier.
    """

    depths: tuple[int, ...] = (2, 2, 6, 2)
    dims: tuple[int, ...] = (64, 128, 256, 512)
    block_types: tuple[str, ...] = ("convfirst", "convfirst", "convfirst", "convfirst")
    stem_width: int = 32
    head_width: int = 1280
    kernel_size: int = 3
    group_width: int = 8
    expansion: int = 4
    dropout: float = 0.2

    def build(self) -> ConvFirstNet:
        return ConvFirstNet(self)


# -- blocks ------------------------------------------------------------------------------------------------------------


class _Block(nn.Module):
    """Layers in a row, and the input added if it has the shape of their result. Loads the author's keys as they are."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.stride = stride
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H / stride, W / stride), sizes rounded up."""
        y: Tensor = self.layers(x)
        return x + y if self.residual else y

    def merged(self) -> nn.Module | None:
        """The block as one fused operator, or None where its activation has none, for `convatlas.surgery.merge`."""
        return fold_block(self) if self.has_silu else None

    @property
    def has_silu(self) -> bool:
        """Whether the activation is the one of the fused operators."""
        return all(isinstance(layer, nn.Conv2d | nn.BatchNorm2d | nn.SiLU) for layer in self.layers)


class ConvFirstBlock(_Block):
    """Grouped convolution, norm; 1x1 expansion, norm, activation; 1x1 projection, norm.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: side of the grouped kernel, odd.
        stride: of the grouped convolution.
        group_width: channels of a group.
        expansion: expanded channels over in_channels.
        act: makes the activation.

    Raises:
        ValueError: kernel_size is even, the channels do not divide into groups, or a number is smaller than 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 3,
        stride: int = 1,
        group_width: int = 8,
        expansion: int = 4,
        act: Activation = nn.SiLU,
    ) -> None:
        hidden = expansion * in_channels
        super().__init__(
            *(in_channels, out_channels, stride),
            *_conv_norm(in_channels, in_channels, kernel_size, stride=stride, group_width=group_width),
            *(*_conv_norm(in_channels, hidden), act()),
            *_conv_norm(hidden, out_channels),
        )


class MBConvBlock(_Block):
    """1x1 expansion, norm, activation; grouped convolution, norm, activation; 1x1 projection, norm.

    Sandler, Howard, Zhu, Zhmoginov, Chen, CVPR 2018, arXiv 1801.04381, with groups of group_width channels. It has no
    squeeze-excitation, whose mean over the map would keep the block from being computed tile by tile.

    Args:
        in_channels, out_channels, kernel_size, stride, group_width, expansion, act: as `ConvFirstBlock` takes them; the
            groups are those of the expanded channels.

    Raises:
        ValueError: as `ConvFirstBlock`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 3,
        stride: int = 1,
        group_width: int = 8,
        expansion: int = 4,
        act: Activation = nn.SiLU,
    ) -> None:
        hidden = expansion * in_channels
        super().__init__(
            *(in_channels, out_channels, stride),
            *(*_conv_norm(in_channels, hidden), act()),
            *(*_conv_norm(hidden, hidden, kernel_size, stride=stride, group_width=group_width), act()),
            *_conv_norm(hidden, out_channels),
        )


class FusedMBConvBlock(_Block):
    """Dense convolution that expands, norm, activation; 1x1 projection, norm.

    Args:
        in_channels, out_channels, kernel_size, stride, expansion, act: as `ConvFirstBlock` takes them.

    Raises:
        ValueError: kernel_size is even, or a number is smaller than 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 3,
        stride: int = 1,
        expansion: int = 4,
        act: Activation = nn.SiLU,
    ) -> None:
        hidden = expansion * in_channels
        super().__init__(
            *(in_channels, out_channels, stride),
            *(*_conv_norm(in_channels, hidden, kernel_size, stride=stride), act()),
            *_conv_norm(hidden, out_channels),
        )


class MLPBlock(_Block):
    """1x1 expansion, norm, activation; 1x1 projection, norm.

    Args:
        in_channels, out_channels, expansion, act: as `ConvFirstBlock` takes them.

    Raises:
        ValueError: a number is smaller than 1.
    """

    def __init__(self, in_channels: int, out_channels: int, *, expansion: int = 4, act: Activation = nn.SiLU) -> None:
        hidden = expansion * in_channels
        layers = (*_conv_norm(in_channels, hidden), act(), *_conv_norm(hidden, out_channels))
        super().__init__(in_channels, out_channels, 1, *layers)


#: Blocks with a spatial convolution, by the names that a config has for them.
BLOCKS: dict[str, type[ConvFirstBlock | MBConvBlock | FusedMBConvBlock]] = {
    "convfirst": ConvFirstBlock,
    "mbconv": MBConvBlock,
    "fused_mbconv": FusedMBConvBlock,
}


def _conv_norm(
    in_channels: int, out_channels: int, kernel_size: int = 1, *, stride: int = 1, group_width: int | None = None
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    for name, value in (("channels", min(in_channels, out_channels)), ("stride", stride)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {kernel_size}")
    if group_width is not None and (group_width < 1 or in_channels % group_width):
        raise ValueError(f"channels must be divisible by group_width, got {in_channels} and {group_width}")
    groups = 1 if group_width is None else in_channels // group_width
    conv = nn.Conv2d(
        in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, groups=groups, bias=False
    )
    # As large as what an output of the backward pass sums over: the channels of one group.
    nn.init.normal_(conv.weight, std=(2 * groups / (kernel_size**2 * out_channels)) ** 0.5)
    return conv, nn.BatchNorm2d(out_channels, eps=1e-5)


# -- inference form ----------------------------------------------------------------------------------------------------


class FoldedConvFirst(nn.Module):
    """A ConvFirst or MLP block with its norms folded, as one operator; see `fused_convfirst`.

    Args:
        wg, bg: kernel and bias of the grouped convolution; both None in an MLP block.
        w2, b2, w3, b3: of the expansion and the projection.
        stride, groups: of the grouped convolution.
        tile: height and width of the tiles that it is computed in; None leaves the way to the operator.
    """

    wg: Tensor | None
    bg: Tensor | None
    w2: Tensor
    b2: Tensor
    w3: Tensor
    b3: Tensor

    def __init__(
        self,
        wg: Tensor | None,
        bg: Tensor | None,
        w2: Tensor,
        b2: Tensor,
        w3: Tensor,
        b3: Tensor,
        *,
        stride: int = 1,
        groups: int = 1,
        tile: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        _keep_weights(self, wg=wg, bg=bg, w2=w2, b2=b2, w3=w3, b3=b3)
        self.stride, self.groups, self.tile = stride, groups, tile

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H / stride, W / stride), sizes rounded up."""
        return fused_convfirst(
            x, self.wg, self.bg, self.w2, self.b2, self.w3, self.b3, self.stride, self.groups, self.tile
        )


class FoldedMBConv(nn.Module):
    """An MBConv or fused MBConv block with its norms folded, as one operator; see `fused_mbconv`.

    Args:
        w1, b1: kernel and bias of the expansion; both None in a fused MBConv block.
        wg, bg, w3, b3: of the spatial convolution and the projection.
        stride, groups: of the spatial convolution.
        tile: height and width of the tiles that it is computed in; None leaves the way to the operator.
    """

    w1: Tensor | None
    b1: Tensor | None
    wg: Tensor
    bg: Tensor
    w3: Tensor
    b3: Tensor

    def __init__(
        self,
        w1: Tensor | None,
        b1: Tensor | None,
        wg: Tensor,
        bg: Tensor,
        w3: Tensor,
        b3: Tensor,
        *,
        stride: int = 1,
        groups: int = 1,
        tile: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        _keep_weights(self, w1=w1, b1=b1, wg=wg, bg=bg, w3=w3, b3=b3)
        self.stride, self.groups, self.tile = stride, groups, tile

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H / stride, W / stride), sizes rounded up."""
        return fused_mbconv(
            x, self.w1, self.b1, self.wg, self.bg, self.w3, self.b3, self.stride, self.groups, self.tile
        )


def fold_block(block: nn.Module, *, tile: tuple[int, int] | None = None) -> FoldedConvFirst | FoldedMBConv:
    """The inference form of a block: its norms folded into its convolutions, all of it one operator.

    Args:
        block: one of the blocks of this module, in evaluation mode; it stays as it is.
        tile: height and width of the tiles of the output that it is computed in; None leaves the way to the operator.

    Raises:
        ValueError: block is in training mode, where norms depend on the batch.
        Unsupported: it is no such block, or its activation is not SiLU.
    """
    if not isinstance(block, _Block):
        raise Unsupported(f"only ConvFirst, MBConv, fused MBConv and MLP blocks fold, got {type(block).__name__}")
    if block.training:
        raise ValueError("fold the block first: call eval() and fold_block, got a block in training mode")
    convs = [layer for layer in block.layers if isinstance(layer, nn.Conv2d)]
    norms = [layer for layer in block.layers if isinstance(layer, nn.BatchNorm2d)]
    if not block.has_silu:
        raise Unsupported("the fused operator has SiLU as its activation, the block has another")
    folded = [tensor for conv, norm in zip(convs, norms, strict=True) for tensor in _folded(conv, norm)]
    if isinstance(block, MLPBlock):
        w2, b2, w3, b3 = folded
        return FoldedConvFirst(None, None, w2, b2, w3, b3, tile=tile)
    stride = block.stride
    if isinstance(block, ConvFirstBlock):
        wg, bg, w2, b2, w3, b3 = folded
        return FoldedConvFirst(wg, bg, w2, b2, w3, b3, stride=stride, groups=convs[0].groups, tile=tile)
    if isinstance(block, MBConvBlock):
        w1, b1, wg, bg, w3, b3 = folded
        return FoldedMBConv(w1, b1, wg, bg, w3, b3, stride=stride, groups=convs[1].groups, tile=tile)
    wg, bg, w3, b3 = folded
    return FoldedMBConv(None, None, wg, bg, w3, b3, stride=stride, tile=tile)


@torch.no_grad()
def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    mean, variance = norm.running_mean, norm.running_var
    scale = norm.weight.double() / (variance.double() + norm.eps).sqrt()  # type: ignore[union-attr]
    bias = norm.bias.double() - mean.double() * scale  # type: ignore[union-attr]
    weight = conv.weight.double() * scale.view(-1, 1, 1, 1)
    return weight.to(conv.weight.dtype), bias.to(conv.weight.dtype)


def _keep_weights(module: nn.Module, **weights: Tensor | None) -> None:
    for name, weight in weights.items():
        module.register_parameter(name, None if weight is None else nn.Parameter(weight))


# -- network -----------------------------------------------------------------------------------------------------------


class _ConvNormAct(nn.Sequential):
    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1) -> None:
        super().__init__(*_conv_norm(in_channels, out_channels, kernel_size, stride=stride), nn.SiLU())


class ConvFirstNet(Backbone):
    """Stem of stride 2, four stages of stride 2 each, 1x1 convolution, mean pool, dropout, linear classifier.

    Args:
        config: what to build.

    Raises:
        ValueError: the per-stage tuples differ in length, or a block cannot be built.
        UnknownName: there is no block of such a type.
    """

    classifier_modules: ClassVar[tuple[str, ...]] = ("classifier",)
    stem_modules: ClassVar[tuple[str, ...]] = ("stem.0",)
    min_size = 1  # every layer is padded

    def __init__(self, config: ConvFirstConfig) -> None:
        super().__init__(config)
        depths, dims, types = config.depths, config.dims, config.block_types
        if not 0 < len(depths) == len(dims) == len(types) or min(depths) < 1:
            raise ValueError(
                f"depths, dims and block_types must name the same stages, got {depths}, {dims} and {types}"
            )
        channels = config.stem_width
        self.stem = _ConvNormAct(config.in_channels, channels, 3, stride=2)
        stages, features = [], []
        for index, (depth, dim, kind) in enumerate(zip(depths, dims, types, strict=True)):
            if kind not in BLOCKS:
                raise unknown("block type", kind, BLOCKS)
            groups = {} if kind == "fused_mbconv" else {"group_width": config.group_width}
            options: dict[str, Any] = {"kernel_size": config.kernel_size, "expansion": config.expansion, **groups}
            blocks = []
            for block in range(depth):
                blocks.append(BLOCKS[kind](channels, dim, stride=1 if block else 2, **options))
                channels = dim
            stages.append(nn.Sequential(*blocks))
            features.append(Feature(channels, 4 * 2**index))
        self.stages = nn.Sequential(*stages)
        self.feature_info = tuple(features)
        self.head = _ConvNormAct(channels, config.head_width, 1)
        self.dropout = nn.Dropout(config.dropout)
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
        return self.classifier(self.dropout(self.head(x).mean((2, 3))))

    def layers(self) -> list[nn.Module]:
        blocks = [block for stage in self.stages for block in stage.children()]
        return [self.stem, *blocks, self.head, *([self.classifier] if self.num_classes else [])]

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a fresh one for ``num_classes`` classes; the 1x1 convolution before it is kept."""
        self.config = self.config.override(num_classes=num_classes)
        self.classifier: nn.Module = nn.Identity()
        if num_classes > 0:
            weight = self.get_parameter("stem.0.weight")
            linear = nn.Linear(self.config.head_width, num_classes, device=weight.device, dtype=weight.dtype)
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)
            self.classifier = linear


_DEEP = (3, 3, 9, 3)
_MBCONV_LAST = ("convfirst", "convfirst", "mbconv", "mbconv")

VARIANTS: dict[str, ConvFirstConfig] = {
    "convfirst_tiny": ConvFirstConfig(),
    "convfirst_small": ConvFirstConfig(depths=_DEEP),
    "convfirst_mbconv_tiny": ConvFirstConfig(block_types=_MBCONV_LAST),
    "convfirst_mbconv_small": ConvFirstConfig(depths=_DEEP, block_types=_MBCONV_LAST),
}
