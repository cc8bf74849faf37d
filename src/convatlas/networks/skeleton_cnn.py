"""Ensem-NN: four 1-D convolutional networks that name the action of a moving skeleton, and their ensemble.

Xu, Wang, et al.: "Ensemble One-dimensional Convolution Neural Networks for Skeleton-based Action Recognition", IEEE
Signal Processing Letters 2018. The paper gives the ideas; sizes of layers are this library's. Inputs are x (B, D, T)
with the channels joint * dim + coordinate: a network sees T frames of D = joints * dim coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.errors import unknown
from convatlas.networks.base import NetworkConfig
from convatlas.ops.score_fusion import Fusion, fuse_scores

__all__ = [
    "VARIANTS",
    "BodyPartNet",
    "BodyPartNetConfig",
    "EnsemNN",
    "EnsemNNConfig",
    "FrameDifferenceNet",
    "FrameDifferenceNetConfig",
    "ResidualBlock1d",
    "SkeletonAttentionNet",
    "SkeletonAttentionNetConfig",
    "SkeletonBase",
    "SkeletonNet",
    "SkeletonNetConfig",
    "TwoStreamNet",
    "TwoStreamNetConfig",
]

#: Joints of NTU RGB+D for two bodies: those of the second are 25 higher.
_NTU_PARTS = (*((4, 5, 6, 7, 21, 22), (8, 9, 10, 11, 23, 24), (12, 13, 14, 15), (16, 17, 18, 19), (0, 1, 20, 2, 3)),)
_TWO_BODIES = tuple((*part, *(25 + joint for joint in part)) for part in _NTU_PARTS)


@dataclass(frozen=True, kw_only=True)
class SkeletonNetConfig(NetworkConfig):
    """What the networks have in common.

    Attributes:
        joints: of all bodies together; NTU RGB+D has two of 25.
        dim: coordinates of a joint.
        frames: of a clip.
        num_classes: size of the classifier.
        widths: channels of the stages of a base network.
        depths: residual blocks of the stages.
        kernel_size: of its convolutions, odd.
        dropout: in the training before the classifier.

    Raises:
        ValueError: a value is out of range.
    """

    joints: int = 50
    dim: int = 3
    frames: int = 100
    num_classes: int = 60
    widths: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[int, ...] = (2, 2, 2, 2)
    kernel_size: int = 3
    dropout: float = 0.5

    def __post_init__(self) -> None:
        for name in ("joints", "dim", "frames", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if len(self.widths) != len(self.depths) or min((*self.widths, *self.depths), default=0) < 1:
            raise ValueError(f"widths and depths must be as many and at least 1, got {self.widths} and {self.depths}")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {self.kernel_size}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    @property
    def coordinates(self) -> int:
        """Channels D of the input."""
        return self.joints * self.dim


@dataclass(frozen=True, kw_only=True)
class TwoStreamNetConfig(SkeletonNetConfig):
    """Config of `TwoStreamNet`."""

    def build(self) -> TwoStreamNet:
        return TwoStreamNet(self)


@dataclass(frozen=True, kw_only=True)
class BodyPartNetConfig(SkeletonNetConfig):
    """Config of `BodyPartNet`.

    Attributes:
        parts: joints of each part; they may overlap, and joints in none are not seen.

    Raises:
        ValueError: there is no part, one is empty, or a joint is out of range.
    """

    parts: tuple[tuple[int, ...], ...] = _TWO_BODIES

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_parts(self.parts, self.joints)

    def build(self) -> BodyPartNet:
        return BodyPartNet(self)


@dataclass(frozen=True, kw_only=True)
class SkeletonAttentionNetConfig(SkeletonNetConfig):
    """Config of `SkeletonAttentionNet`.

    Attributes:
        reduction: factor between the last channels and the bottleneck of their attention.

    Raises:
        ValueError: the bottleneck would have no channel.
    """

    reduction: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_reduction(self.reduction, self.widths)

    def build(self) -> SkeletonAttentionNet:
        return SkeletonAttentionNet(self)


@dataclass(frozen=True, kw_only=True)
class FrameDifferenceNetConfig(SkeletonNetConfig):
    """Config of `FrameDifferenceNet`."""

    def build(self) -> FrameDifferenceNet:
        return FrameDifferenceNet(self)


@dataclass(frozen=True, kw_only=True)
class EnsemNNConfig(SkeletonNetConfig):
    """Config of `EnsemNN`.

    Attributes:
        parts: as `BodyPartNetConfig` has them.
        reduction: as `SkeletonAttentionNetConfig` has it.
        fusion: how the scores become one: ``mean``, ``product``, ``max`` or ``weighted``.
        weights: of the four networks, in the order of `members`, if the fusion is weighted.

    Raises:
        ValueError: a value is out of range.
    """

    parts: tuple[tuple[int, ...], ...] = _TWO_BODIES
    reduction: int = 16
    fusion: Fusion = "mean"
    weights: tuple[float, ...] = (0.25, 0.25, 0.25, 0.25)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_parts(self.parts, self.joints)
        _check_reduction(self.reduction, self.widths)
        if self.fusion not in get_args(Fusion):
            raise unknown("fusion", self.fusion, get_args(Fusion))
        if len(self.weights) != 4 or min(self.weights) < 0 or sum(self.weights) <= 0:
            raise ValueError(f"weights must be 4 numbers of at least 0, not all 0, got {self.weights}")

    @property
    def members(self) -> dict[str, SkeletonNetConfig]:
        """Configs of the four networks."""
        shared = {name: getattr(self, name) for name in SkeletonNetConfig.__dataclass_fields__}
        return {
            "two_stream": TwoStreamNetConfig(**shared),
            "body_part": BodyPartNetConfig(**shared, parts=self.parts),
            "attention": SkeletonAttentionNetConfig(**shared, reduction=self.reduction),
            "difference": FrameDifferenceNetConfig(**shared),
        }

    def build(self) -> EnsemNN:
        return EnsemNN(self)


def _check_parts(parts: tuple[tuple[int, ...], ...], joints: int) -> None:
    if not parts or not all(parts):
        raise ValueError(f"parts must each have a joint, got {parts}")
    for joint in (joint for part in parts for joint in part):
        if not 0 <= joint < joints:
            raise ValueError(f"parts must be joints below {joints}, got {joint}")


def _check_reduction(reduction: int, widths: tuple[int, ...]) -> None:
    if reduction < 1 or widths[-1] // reduction < 1:
        raise ValueError(f"reduction must be from 1 to the last of widths ({widths[-1]}), got {reduction}")


# -- the base network --------------------------------------------------------------------------------------------------


class ResidualBlock1d(nn.Module):
    """Two convolutions with batch norm and a shortcut; ReLU after the sum.

    Args:
        in_channels, out_channels, kernel_size, stride: of the first convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1) -> None:
        super().__init__()
        padding = kernel_size // 2
        self.conv1 = nn.Conv1d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.bn1 = nn.BatchNorm1d(out_channels)
        self.conv2 = nn.Conv1d(out_channels, out_channels, kernel_size, 1, padding, bias=False)
        self.bn2 = nn.BatchNorm1d(out_channels)
        self.short: nn.Module = nn.Identity()
        if in_channels != out_channels or stride != 1:
            conv = nn.Conv1d(in_channels, out_channels, 1, stride, bias=False)
            self.short = nn.Sequential(conv, nn.BatchNorm1d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, T) to (B, out_channels, T / stride)."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.short(x))


class SkeletonBase(nn.Module):
    """Base-Net: stem, stages of residual blocks of which all but the first halve the length, mean over the length.

    Args:
        in_channels: of the input.
        widths, depths, kernel_size: as `SkeletonNetConfig` has them.
    """

    def __init__(self, in_channels: int, widths: Sequence[int], depths: Sequence[int], kernel_size: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv1d(in_channels, widths[0], kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm1d(widths[0])
        self.blocks = nn.Sequential()
        channels = widths[0]
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            for block in range(depth):
                stride = 2 if stage and not block else 1
                self.blocks.append(ResidualBlock1d(channels, width, kernel_size, stride))
                channels = width

    def features(self, x: Tensor) -> Tensor:
        """The last map (B, widths[-1], T') of an input (B, in_channels, T)."""
        y: Tensor = self.blocks(F.relu(self.bn(self.stem(x))))
        return y

    def forward(self, x: Tensor) -> Tensor:
        """The mean of the last map (B, widths[-1])."""
        return self.features(x).mean(2)


# -- the four networks -------------------------------------------------------------------------------------------------


class SkeletonNet(nn.Module):
    """What the networks have in common: dropout and classifier, checks, an example.

    Args:
        config: what to build.
        features: numbers that the classifier sees.
    """

    def __init__(self, config: SkeletonNetConfig, features: int) -> None:
        super().__init__()
        self.config = config
        self.fc = nn.Linear(features, config.num_classes)

    def example_inputs(self, batch: int = 1) -> tuple[Tensor, ...]:
        """Random clips, for tracing and timing."""
        return (torch.randn(batch, self.config.coordinates, self.config.frames),)

    def _base(self, in_channels: int | None = None) -> SkeletonBase:
        config = self.config
        return SkeletonBase(in_channels or config.coordinates, config.widths, config.depths, config.kernel_size)

    def _classified(self, features: Tensor) -> Tensor:
        scores: Tensor = self.fc(F.dropout(features, self.config.dropout, self.training))
        return scores

    def _check_input(self, x: Tensor, least: int = 1) -> None:
        config = self.config
        if x.dim() != 3 or x.shape[1] != config.coordinates:
            wanted = f"(B, {config.coordinates}, T), {config.joints} joints of {config.dim} coordinates"
            raise ValueError(f"x must be {wanted}, got {tuple(x.shape)}")
        if x.shape[2] < least:
            raise ValueError(f"x must have at least {least} frames, got {x.shape[2]}")


class TwoStreamNet(SkeletonNet):
    """Two-stream entirety net: convolutions over time on all coordinates, and over the coordinates on all frames.

    Args:
        config: what to build; clips must have its number of frames.
    """

    def __init__(self, config: TwoStreamNetConfig) -> None:
        super().__init__(config, 2 * config.widths[-1])
        self.temporal = self._base()
        self.spatial = self._base(config.frames)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores (B, num_classes) of clips (B, joints * dim, frames).

        Raises:
            ValueError: x has another shape.
        """
        self._check_input(x)
        if x.shape[2] != self.config.frames:
            raise ValueError(
                f"this network was built for {self.config.frames} frames, got {x.shape[2]}: resample first"
            )
        return self._classified(torch.cat([self.temporal(x), self.spatial(x.transpose(1, 2))], dim=1))


class BodyPartNet(SkeletonNet):
    """A base network for each part of the body.

    Args:
        config: what to build.
    """

    def __init__(self, config: BodyPartNetConfig) -> None:
        super().__init__(config, len(config.parts) * config.widths[-1])
        self.channels = [[joint * config.dim + c for joint in part for c in range(config.dim)] for part in config.parts]
        self.nets = nn.ModuleList([self._base(len(channels)) for channels in self.channels])

    def forward(self, x: Tensor) -> Tensor:
        """Class scores (B, num_classes) of clips (B, joints * dim, T).

        Raises:
            ValueError: x has another shape.
        """
        self._check_input(x)
        parts = [net(x[:, channels]) for net, channels in zip(self.nets, self.channels, strict=True)]
        return self._classified(torch.cat(parts, dim=1))


class SkeletonAttentionNet(SkeletonNet):
    """Attention to frames before a base network, and to channels behind it.

    Args:
        config: what to build.
    """

    def __init__(self, config: SkeletonAttentionNetConfig) -> None:
        last = config.widths[-1]
        super().__init__(config, last)
        self.base = self._base()
        self.frame = nn.Conv1d(config.coordinates, 1, 3, padding=1)
        self.fc1 = nn.Linear(last, last // config.reduction)
        self.fc2 = nn.Linear(last // config.reduction, last)

    def frame_weights(self, x: Tensor) -> Tensor:
        """Weight of each frame (B, 1, T); their mean is 1."""
        self._check_input(x)
        return self.frame(x).softmax(2) * x.shape[2]

    def channel_weights(self, features: Tensor) -> Tensor:
        """Weight of each channel (B, C) of a map (B, C, T'), from 0 to 1."""
        return self.fc2(F.relu(self.fc1(features.mean(2)))).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """Class scores (B, num_classes) of clips (B, joints * dim, T).

        Raises:
            ValueError: x has another shape.
        """
        features = self.base.features(x * self.frame_weights(x))
        return self._classified((features * self.channel_weights(features)[..., None]).mean(2))


class FrameDifferenceNet(SkeletonNet):
    """A base network on the differences of successive frames: on motion alone.

    Args:
        config: what to build.
    """

    def __init__(self, config: FrameDifferenceNetConfig) -> None:
        super().__init__(config, config.widths[-1])
        self.base = self._base()

    def forward(self, x: Tensor) -> Tensor:
        """Class scores (B, num_classes) of clips (B, joints * dim, T) of at least two frames.

        Raises:
            ValueError: x has another shape.
        """
        self._check_input(x, least=2)
        return self._classified(self.base(x.diff(dim=2)))


class EnsemNN(nn.Module):
    """The four networks, which are trained one by one, and their scores as one.

    Args:
        config: what to build.
    """

    def __init__(self, config: EnsemNNConfig) -> None:
        super().__init__()
        self.config = config
        self.members = nn.ModuleDict({name: member.build() for name, member in config.members.items()})

    def example_inputs(self, batch: int = 1) -> tuple[Tensor, ...]:
        """Random clips, for tracing and timing."""
        return (torch.randn(batch, self.config.coordinates, self.config.frames),)

    def scores(self, x: Tensor) -> list[Tensor]:
        """Class probabilities (B, num_classes) of each of the four networks."""
        logits = [member(x) for member in self.members.values()]
        return [each.softmax(1, torch.promote_types(each.dtype, torch.float32)).to(each.dtype) for each in logits]

    def forward(self, x: Tensor) -> Tensor:
        """Logarithms of the fused class probabilities (B, num_classes) of clips (B, joints * dim, frames).

        Raises:
            ValueError: x has another shape.
        """
        weighted = self.config.fusion == "weighted"
        fused = fuse_scores(self.scores(x), self.config.fusion, self.config.weights if weighted else None)
        fused = fused / fused.sum(1, keepdim=True)
        return fused.clamp_min(torch.finfo(fused.dtype).tiny).log()


VARIANTS: dict[str, NetworkConfig] = {
    "ensem_nn": EnsemNNConfig(),
    "skeleton_two_stream": TwoStreamNetConfig(),
    "skeleton_body_part": BodyPartNetConfig(),
    "skeleton_attention": SkeletonAttentionNetConfig(),
    "skeleton_difference": FrameDifferenceNetConfig(),
}
