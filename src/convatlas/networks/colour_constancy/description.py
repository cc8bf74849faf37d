"""What networks that find the light share: a description of exposures in, a colour out, a feature of two exposures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn

from convatlas.errors import unknown
from convatlas.networks.base import NetworkConfig
from convatlas.ops.illuminant import FEATURE_SIZES, Feature, dual_exposure_feature
from convatlas.weights import Layout

__all__ = [
    "FeatureConfig",
    "FeatureFunction",
    "IlluminantNetwork",
    "check_feature",
    "described_feature",
    "estimate_illuminant",
]

#: A feature of one's own: of long and short exposures (B, 3, H, W), numbers (B, d).
FeatureFunction = Callable[[Tensor, Tensor], Tensor]


class IlluminantNetwork(nn.Module, ABC):
    """A network that takes a description of an image or a pair of exposures and gives the colour of the light."""

    #: How foreign checkpoint layouts map to this class (see `convatlas.weights`).
    layouts: ClassVar[Mapping[str, Layout]] = {}

    config: Any

    @abstractmethod
    def describe(
        self, long: Tensor, short: Tensor, mask: Tensor | None = None, ratio: Tensor | float | None = None
    ) -> tuple[Tensor, ...]:
        """What `forward` takes, computed from exposures (B, 3, H, W), linear and in [0, 1].

        Args:
            long, short: exposures of the same scenes.
            mask: (B, 1, H, W) bool, True where a pixel counts.
            ratio: exposure of the long frame over that of the short one; estimated where it is needed and left out.

        Raises:
            ValueError: the images have other or different shapes, or one of them has no valid pixel.
        """

    @abstractmethod
    def example_inputs(self, batch: int = 1) -> tuple[Tensor, ...]:
        """A random description."""


def estimate_illuminant(
    long: Tensor,
    short: Tensor,
    model: IlluminantNetwork,
    mask: Tensor | None = None,
    ratio: Tensor | float | None = None,
) -> Tensor:
    """Colours of the light (B, 3), of unit length, in pairs of exposures; arguments as of `IlluminantNetwork.describe`.

    Raises:
        ValueError: the images have other or different shapes, or one of them has no valid pixel.
    """
    with torch.inference_mode():
        rgb: Tensor = model(*model.describe(long, short, mask, ratio))
    return rgb


@dataclass(frozen=True, kw_only=True)
class FeatureConfig(NetworkConfig):
    """Config of a network that takes the dual-exposure feature.

    Attributes:
        feature: ``uv``, ``matrix`` or ``concat``, see `dual_exposure_feature`.
        feature_channels: size of a feature of one's own; that of ``feature`` when left out.

    Raises:
        ValueError: a value is out of range.
    """

    feature: Feature = "uv"
    feature_channels: int | None = None

    def __post_init__(self) -> None:
        if self.feature not in get_args(Feature):
            raise unknown("feature", str(self.feature), get_args(Feature))
        if self.feature_channels is not None and self.feature_channels < 1:
            raise ValueError(f"feature_channels must be at least 1, got {self.feature_channels}")

    @property
    def size(self) -> int:
        """Numbers of the feature."""
        return FEATURE_SIZES[self.feature] if self.feature_channels is None else self.feature_channels


def described_feature(
    config: FeatureConfig,
    function: FeatureFunction | None,
    long: Tensor,
    short: Tensor,
    mask: Tensor | None,
    ratio: Tensor | float | None,
) -> Tensor:
    """The feature (B, d) of exposures: one's own, or the one that the config names.

    Raises:
        ValueError: the config asks for a feature of another size than there is.
    """
    if function is not None:
        feature = function(long, short)
        check_feature(config, feature)
        return feature
    if config.feature_channels not in (None, FEATURE_SIZES[config.feature]):
        raise ValueError(f"function must be given for a feature of {config.feature_channels} numbers, got None")
    return dual_exposure_feature(long, short, config.feature, mask, ratio=ratio)


def check_feature(config: FeatureConfig, feature: Tensor) -> None:
    """Refuse what is no feature (B, d).

    Raises:
        ValueError: it is not.
    """
    if feature.dim() != 2 or feature.shape[1] != config.size:
        raise ValueError(f"feature must be (B, {config.size}), got {tuple(feature.shape)}")
