"""MobileNetV2, and its forms with efficient channel attention, efficient local attention or subspace attention.

Sandler, Howard, Zhu, Zhmoginov, Chen: "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018,
arXiv 1801.04381. Parameters are named as in torchvision.
Wang, Wu, Zhu, Li, Zuo, Hu: "ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks", CVPR 2020,
arXiv 1910.03151: attention at the end of each branch.
Xu, Wan: "ELA: Efficient Local Attention for Deep Convolutional Neural Networks", 2024, arXiv 2403.01123; where its
attention stands is not published: here behind the depthwise convolution, or at the end of the branch.
Saini, Jha, Das, Mittal, Mohan: "ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural
Networks", WACV 2020, arXiv 2006.15102: attention in the place of whole blocks, or behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

from torch import Tensor, nn

from convatlas.data.transforms import Preprocess
from convatlas.networks.base import Backbone, BackboneConfig, Feature, PublishedFile
from convatlas.nn.mixers.eca import eca_per_stage
from convatlas.nn.mixers.ela import ELA
from convatlas.nn.mixers.ulsam import ULSAM
from convatlas.weights import Layout

__all__ = [
    "PUBLISHED",
    "VARIANTS",
    "ConvNormAct",
    "InvertedResidual",
    "MobileNetV2",
    "MobileNetV2Config",
    "SubspaceAttention",
    "scaled_width",
]

#: Makes an attention from the channels of its input; it keeps the shape of a map (B, C, H, W).
Attention = Callable[[int], nn.Module]
#: Makes a depthwise convolution from its channels and stride.
MakeDepthwise = Callable[[int, int], nn.Module]

_LAYOUTS = {"authors": Layout(renames=((r"(^|\.)conv\.[34]\.conv\.weight$", r"\1attention.weight"),))}


@dataclass(frozen=True)
class SubspaceAttention:
    """Where a MobileNet has subspace attention.

    Attributes:
        positions: of the layers, counted from 1, the stem.
        groups: number of groups of channels, each with a map of its own.
        mode: whether the attention stands in the place of the layers or behind them.
        last: position of the last layer at which it can be.

    Raises:
        ValueError: there is no such mode or no such position.
    """

    positions: tuple[int, ...]
    groups: int
    mode: Literal["replace", "after"]
    last: int

    def __post_init__(self) -> None:
        if self.mode not in ("replace", "after"):
            raise ValueError(f"ulsam_mode must be 'replace' or 'after', got {self.mode!r}")
        if not all(2 <= position <= self.last for position in self.positions):
            raise ValueError(f"ulsam_positions must be from 2 to {self.last}, got {self.positions}")

    def around(self, layer: nn.Module, position: int, channels: tuple[int, int], stride: int) -> nn.Module:
        """The layer at a position, the attention in its place, or the layer with the attention behind it.

        Args:
            layer: has an empty slot called ``after``.
            position: of the layer.
            channels, stride: of the layer; channels of input and output.

        Raises:
            ValueError: the layer changes the shape and can not be replaced, or its channels are not divisible by the
                groups.
        """
        if position not in self.positions:
            return layer
        if self.mode == "replace" and (channels[0] != channels[1] or stride != 1):
            raise ValueError(
                f"ulsam_positions must be of layers that keep the shape, got {position} with {channels[0]} to "
                f"{channels[1]} channels and stride {stride}"
            )
        attention = ULSAM(channels[1], num_splits=self.groups)
        if self.mode == "replace":
            return attention
        layer.after = attention
        return layer


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
        ela: variant of ELA, ``"T"``, ``"B"``, ``"S"`` or ``"L"``; None for no attention.
        ela_place: ``"depthwise"``, behind the depthwise convolution, or ``"output"``, at the end of the branch.
        ulsam_positions: layers, counted from 1, the stem, at which there is subspace attention.
        ulsam_groups: number of its groups of channels, each with a map of its own.
        ulsam_mode: whether it stands in the place of those layers or behind them.

    Raises:
        ValueError: two attentions are asked for at one place, or ela_place is unknown.
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
    ela: Literal["T", "B", "S", "L"] | None = None
    ela_place: Literal["depthwise", "output"] = "depthwise"
    ulsam_positions: tuple[int, ...] = ()
    ulsam_groups: int = 4
    ulsam_mode: Literal["replace", "after"] = "replace"
    preprocess: Preprocess = field(default_factory=lambda: Preprocess(interpolation="bilinear"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ela_place not in ("depthwise", "output"):
            raise ValueError(f"ela_place must be 'depthwise' or 'output', got {self.ela_place!r}")
        if self.ela is not None and self.eca_kernel_sizes is not None:
            raise ValueError(f"eca_kernel_sizes must be None with ela, got {self.eca_kernel_sizes!r}")

    def build(self) -> MobileNetV2:
        return MobileNetV2(self)


class ConvNormAct(nn.Sequential):
    """A convolution without bias that pads by half its kernel, batch norm, and ReLU6 or another activation.

    Args:
        in_channels, out_channels, kernel_size, stride, groups: of the convolution.
        act: makes the activation.
        conv: the convolution itself, instead of torch's.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        groups: int = 1,
        act: Callable[..., nn.Module] = nn.ReLU6,
        conv: nn.Module | None = None,
    ) -> None:
        super().__init__(
            conv or _conv(in_channels, out_channels, kernel_size, stride, groups),
            nn.BatchNorm2d(out_channels),
            act(inplace=True),
        )


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise convolution, linear 1x1 convolution, attention; plus x if shapes agree (table 1).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: of the depthwise convolution.
        expand_ratio: hidden channels over in_channels; with 1 the expansion is left out.
        attention: module at the end of the branch that keeps the shape; by default the identity.
        hidden_attention: module behind the depthwise convolution that keeps the shape; by default the identity.
        depthwise: makes the depthwise convolution; by default that of torch, 3x3 without bias.
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
        hidden_attention: nn.Module | None = None,
        depthwise: MakeDepthwise | None = None,
    ) -> None:
        super().__init__()
        hidden = in_channels * expand_ratio
        conv = depthwise(hidden, stride) if depthwise else None
        expansion = [] if expand_ratio == 1 else [ConvNormAct(in_channels, hidden, 1)]
        self.conv = nn.Sequential(
            *expansion,
            ConvNormAct(hidden, hidden, 3, stride=stride, groups=hidden, conv=conv),
            _conv(hidden, out_channels, 1),
            nn.BatchNorm2d(out_channels),
        )
        self.hidden_attention = hidden_attention or nn.Identity()
        self.attention = attention or nn.Identity()
        self.after: nn.Module = nn.Identity()
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H / stride, W / stride), sizes rounded up."""
        *hidden, project, norm = self.conv
        y = x
        for layer in hidden:
            y = layer(y)
        y = self.attention(norm(project(self.hidden_attention(y))))
        return self.after(x + y if self.residual else y)


class MobileNetV2(Backbone):
    """The network of inverted residuals (paper, table 2): stem, stages, 1x1 convolution, mean pool, linear classifier.

    Its feature maps are those before each change of resolution from stride 4 on; the last one comes after the 1x1
    convolution. Loads torchvision's layout as it is, and the layout of ECA-Net's authors.

    Args:
        config: what to build.
        attention: makes the attention at the end of a block from its output channels, e.g. ``SqueezeExcite``, for
            studies with another one; by default the ECA or ELA of the config, or none.

    Raises:
        UnknownName: there is no such variant of ELA.
        ValueError: stages is empty or malformed, eca_kernel_sizes names another number of stages or an even size, or
            subspace attention cannot have one of its positions.
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
        # Few of the widths are divisible by 32, as ELA-T has its groups.
        local = partial(ELA, variant=config.ela, num_groups="auto") if config.ela is not None else None
        hidden_attention = local if config.ela_place == "depthwise" else None
        if attention is None and config.ela_place == "output":
            attention = local
        attentions: Sequence[Attention] = [attention or nn.Identity] * len(stages)
        if attention is None and config.eca_kernel_sizes is not None:
            attentions = eca_per_stage(config.eca_kernel_sizes, len(stages))
        channels = scaled_width(config.stem_width, config.width_mult)
        place = (config.ulsam_positions, config.ulsam_groups, config.ulsam_mode)
        subspace = SubspaceAttention(*place, last=1 + sum(row[2] for row in stages))
        layers: list[nn.Module] = [ConvNormAct(config.in_channels, channels, 3, stride=2)]
        infos = [Feature(channels, 2)]
        for (expand_ratio, width, depth, stride), make_attention in zip(stages, attentions, strict=True):
            out_channels = scaled_width(width, config.width_mult)
            for index in range(depth):
                step = stride if index == 0 else 1
                block = InvertedResidual(
                    channels,
                    out_channels,
                    stride=step,
                    expand_ratio=expand_ratio,
                    attention=make_attention(out_channels),
                    hidden_attention=hidden_attention(channels * expand_ratio) if hidden_attention else None,
                )
                layers.append(subspace.around(block, len(layers) + 1, (channels, out_channels), step))
                channels = out_channels
                infos.append(Feature(channels, infos[-1].stride * step))
        head_width = scaled_width(config.head_width, max(1.0, config.width_mult))
        layers.append(ConvNormAct(channels, head_width, 1))
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


def scaled_width(width: int, factor: float) -> int:
    """A width times a factor, rounded to a multiple of 8, by no more than a tenth down; with 1 as it is."""
    if factor == 1:
        return width
    rounded = max(8, int(width * factor + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * width * factor else rounded + 8


VARIANTS: dict[str, MobileNetV2Config] = {
    "mobilenet_v2": MobileNetV2Config(),
    "eca_mobilenet_v2": MobileNetV2Config(dropout=0.25, eca_kernel_sizes=(1, 1, 1, 1, 3, 3, 3)),
    "ela_t_mobilenet_v2": MobileNetV2Config(ela="T"),
    "ela_b_mobilenet_v2": MobileNetV2Config(ela="B"),
    "ela_s_mobilenet_v2": MobileNetV2Config(ela="S"),
    "ela_l_mobilenet_v2": MobileNetV2Config(ela="L"),
    "mobilenet_v2_ulsam": MobileNetV2Config(ulsam_positions=(14, 17)),
    "mobilenet_v2_ulsam_13_14_16_17": MobileNetV2Config(ulsam_positions=(13, 14, 16, 17)),
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
