"""Several networks whose answers are averaged: EMLP with ECCC, and those of a cross-validation.

Afifi, Hu, Liang: "Optimizing Illuminant Estimation in Dual-Exposure HDR Imaging", ECCV 2024, arXiv 2403.02449.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.networks.base import NetworkConfig
from convatlas.networks.colour_constancy.description import IlluminantNetwork
from convatlas.networks.colour_constancy.histograms import ECCCConfig
from convatlas.networks.colour_constancy.perceptron import EMLPConfig

__all__ = ["VARIANTS", "Committee", "DualExposureEnsemble", "EnsembleConfig"]


@dataclass(frozen=True, kw_only=True)
class EnsembleConfig(NetworkConfig):
    """Config of `DualExposureEnsemble`.

    Attributes:
        emlp, eccc: the members.
        weights: of the two; the task sets them by the members' errors if asked to.

    Raises:
        ValueError: a weight is negative, or both are 0.
    """

    emlp: EMLPConfig = field(default_factory=EMLPConfig)
    eccc: ECCCConfig = field(default_factory=ECCCConfig)
    weights: tuple[float, float] = (0.5, 0.5)

    def __post_init__(self) -> None:
        if min(self.weights) < 0 or sum(self.weights) <= 0:
            raise ValueError(f"weights must not be negative and not all 0, got {self.weights}")

    def build(self) -> DualExposureEnsemble:
        return DualExposureEnsemble(self)


class _Averaged(IlluminantNetwork):
    """Networks whose answers, vectors of unit length, are averaged."""

    weights: tuple[float, ...]

    @property
    @abstractmethod
    def members(self) -> Sequence[IlluminantNetwork]:
        """The networks."""

    def describe(
        self, long: Tensor, short: Tensor, mask: Tensor | None = None, ratio: Tensor | float | None = None
    ) -> tuple[Tensor, ...]:
        """What the members take, one after the other."""
        return tuple(part for each in self.members for part in each.describe(long, short, mask, ratio))

    def averaged(self, inputs: Sequence[Tensor]) -> Tensor:
        """Colours of the light (B, 3), of unit length, of what `describe` gives.

        Raises:
            ValueError: there are more or fewer inputs, or one has another size.
        """
        answers = [each(*parts) for each, parts in zip(self.members, self.parted(inputs), strict=True)]
        weighted = [weight * answer for weight, answer in zip(self.weights, answers, strict=True)]
        return F.normalize(torch.stack(weighted).sum(0), dim=1)

    def parted(self, inputs: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """The inputs of each member.

        Raises:
            ValueError: there are more or fewer inputs than the members take.
        """
        counts = [len(each.example_inputs()) for each in self.members]
        if len(inputs) != sum(counts):
            raise ValueError(f"inputs must be {sum(counts)} tensors, got {len(inputs)}")
        ends = [sum(counts[: place + 1]) for place in range(len(counts))]
        return [inputs[end - count : end] for end, count in zip(ends, counts, strict=True)]

    def example_inputs(self, batch: int = 1) -> tuple[Tensor, ...]:
        """Random descriptions of all members."""
        return tuple(part for each in self.members for part in each.example_inputs(batch))


class DualExposureEnsemble(_Averaged):
    """EMLP and ECCC together.

    Args:
        config: what to build.
    """

    def __init__(self, config: EnsembleConfig) -> None:
        super().__init__()
        self.config, self.weights = config, config.weights
        self.emlp, self.eccc = config.emlp.build(), config.eccc.build()

    @property
    def members(self) -> Sequence[IlluminantNetwork]:
        """EMLP, ECCC."""
        return self.emlp, self.eccc

    def forward(self, emlp_feature: Tensor, histograms: Tensor, feature: Tensor, gray: Tensor | None = None) -> Tensor:
        """Colours of the light (B, 3), of unit length.

        Args:
            emlp_feature: of the EMLP, (B, d).
            histograms, feature, gray: of the ECCC.

        Raises:
            ValueError: an input has another size.
        """
        return self.averaged([emlp_feature, histograms, feature, *(() if gray is None else (gray,))])


class Committee(_Averaged):
    """Any networks together, such as those of a cross-validation.

    Args:
        members: the networks, of equal weight.

    Raises:
        ValueError: there is none.
    """

    def __init__(self, members: Sequence[IlluminantNetwork]) -> None:
        super().__init__()
        if not members:
            raise ValueError("members must hold a network, got none")
        self.seats = nn.ModuleList(members)
        self.weights = (1 / len(members),) * len(members)

    @property
    def members(self) -> Sequence[IlluminantNetwork]:
        """The networks."""
        return list(self.seats)  # type: ignore[arg-type]

    def forward(self, *inputs: Tensor) -> Tensor:
        """Colours of the light (B, 3), of unit length, of what `describe` gives.

        Raises:
            ValueError: there are more or fewer inputs than the members take.
        """
        return self.averaged(inputs)


VARIANTS: dict[str, NetworkConfig] = {
    "emlp_eccc": EnsembleConfig(),
}
