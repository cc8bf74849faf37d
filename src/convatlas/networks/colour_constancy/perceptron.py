"""EMLP: a perceptron on the dual-exposure feature.

Afifi, Hu, Liang: "Optimizing Illuminant Estimation in Dual-Exposure HDR Imaging", ECCV 2024, arXiv 2403.02449.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.errors import unknown
from convatlas.networks.base import NetworkConfig
from convatlas.networks.colour_constancy.description import (
    FeatureConfig,
    FeatureFunction,
    IlluminantNetwork,
    check_feature,
    described_feature,
)
from convatlas.ops.log_chroma import log_chroma_to_rgb
from convatlas.weights import Layout

__all__ = ["EMLP", "VARIANTS", "EMLPConfig"]


@dataclass(frozen=True, kw_only=True)
class EMLPConfig(FeatureConfig):
    """Config of `EMLP`.

    Attributes:
        hidden: units of the hidden layers.
        output: ``uv``, log-chroma, or ``rgb``, three numbers that a softplus makes positive.

    Raises:
        ValueError: a value is out of range.
    """

    hidden: tuple[int, ...] = (16, 16)
    output: Literal["uv", "rgb"] = "uv"

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.hidden, default=1) < 1:
            raise ValueError(f"hidden must be at least 1, got {self.hidden}")
        if self.output not in ("uv", "rgb"):
            raise unknown("output", str(self.output), ("uv", "rgb"))

    def build(self) -> EMLP:
        return EMLP(self)


class EMLP(IlluminantNetwork):
    """A perceptron on the dual-exposure feature alone, with leaky ReLUs between its layers.

    Args:
        config: what to build.
        function: a feature of one's own, of ``config.feature_channels`` numbers.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {"emlp and eccc": Layout(((r"^emlp\.", ""), (r"^eccc\..*", "")))}

    def __init__(self, config: EMLPConfig, function: FeatureFunction | None = None) -> None:
        super().__init__()
        self.config, self.function = config, function
        sizes = (config.size, *config.hidden, 2 if config.output == "uv" else 3)
        self._names = [str(2 * place) for place in range(len(sizes) - 1)]
        for name, (before, after) in zip(self._names, pairwise(sizes), strict=True):
            self.add_module(name, nn.Linear(before, after))

    def describe(
        self, long: Tensor, short: Tensor, mask: Tensor | None = None, ratio: Tensor | float | None = None
    ) -> tuple[Tensor, ...]:
        """The feature (B, d)."""
        return (described_feature(self.config, self.function, long, short, mask, ratio),)

    def forward(self, feature: Tensor) -> Tensor:
        """Colours of the light (B, 3), of unit length, of features (B, d).

        Raises:
            ValueError: the feature has another size.
        """
        y = self.answer(feature)
        if self.config.output == "uv":
            return log_chroma_to_rgb(y)
        return F.normalize(F.softplus(y), dim=1)

    def answer(self, feature: Tensor) -> Tensor:
        """What the last layer gives for features (B, d): log-chroma (B, 2), or (B, 3) before the softplus.

        Raises:
            ValueError: the feature has another size.
        """
        check_feature(self.config, feature)
        x = feature
        for name in self._names[:-1]:
            x = F.leaky_relu(self.get_submodule(name)(x), 0.01)
        return self.get_submodule(self._names[-1])(x)

    def example_inputs(self, batch: int = 1) -> tuple[Tensor, ...]:
        """A random feature."""
        return (0.1 * torch.randn(batch, self.config.size),)


VARIANTS: dict[str, NetworkConfig] = {
    "emlp": EMLPConfig(),
    "emlp_matrix": EMLPConfig(feature="matrix", hidden=(27,), output="rgb"),
}
