"""Plain networks for time series, to compare with: convolutions, a recurrent network, and capsules on convolutions."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from convatlas.networks.sequence_classifier import SequenceClassifier, SequenceConfig
from convatlas.nn.capsules import CapsuleRouting, MarginLoss, capsule_length, primary_capsules

__all__ = [
    "VARIANTS",
    "ConvConfig",
    "ConvSequenceNet",
    "RecurrentConfig",
    "RecurrentSequenceNet",
    "SequenceCapsNet",
    "SequenceCapsNetConfig",
]


@dataclass(frozen=True, kw_only=True)
class ConvConfig(SequenceConfig):
    """Config of `ConvSequenceNet`.

    Attributes:
        widths: channels of each layer.
        kernel_size: of the convolutions, odd.

    Raises:
        ValueError: a value is out of range.
    """

    widths: tuple[int, ...] = (32, 64)
    kernel_size: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"widths must be at least one number of at least 1, got {self.widths}")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {self.kernel_size}")

    def build(self) -> SequenceClassifier:
        return ConvSequenceNet(self)


def _layers(config: ConvConfig) -> nn.Sequential:
    """Convolution, batch norm and ReLU for each width."""
    widths = (config.in_channels, *config.widths)
    return nn.Sequential(
        *(
            nn.Sequential(
                nn.Conv1d(before, after, config.kernel_size, padding=config.kernel_size // 2),
                nn.BatchNorm1d(after),
                nn.ReLU(),
            )
            for before, after in itertools.pairwise(widths)
        )
    )


class ConvSequenceNet(SequenceClassifier):
    """Convolutions, the mean and the maximum over time, and a linear classifier.

    Args:
        config: what to build.
    """

    def __init__(self, config: ConvConfig) -> None:
        super().__init__(config)
        self.layers = _layers(config)
        self.head = nn.Linear(2 * config.widths[-1], config.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x)
        features = self.layers(x)
        scores: Tensor = self.head(torch.cat([features.mean(-1), features.amax(-1)], 1))
        return scores


@dataclass(frozen=True, kw_only=True)
class SequenceCapsNetConfig(ConvConfig):
    """Config of `SequenceCapsNet`.

    Attributes:
        capsule_dim: channels of a capsule of one time; divides the last width.
        class_dim: size of a class capsule.
        iterations: of the routing.

    Raises:
        ValueError: a value is out of range.
    """

    widths: tuple[int, ...] = (16, 32)
    capsule_dim: int = 8
    class_dim: int = 16
    iterations: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.capsule_dim < 1 or self.widths[-1] % self.capsule_dim:
            raise ValueError(f"channels {self.widths[-1]} must be divisible by capsule_dim, got {self.capsule_dim}")

    def build(self) -> SequenceCapsNet:
        return SequenceCapsNet(self)


class SequenceCapsNet(SequenceClassifier):
    """Capsules with dynamic routing on ordinary convolutions.

    Args:
        config: what to build.
    """

    def __init__(self, config: SequenceCapsNetConfig) -> None:
        super().__init__(config)
        self.layers = _layers(config)
        count = config.length * (config.widths[-1] // config.capsule_dim)
        self.caps = CapsuleRouting(count, config.capsule_dim, config.num_classes, config.class_dim, config.iterations)
        self.margin = MarginLoss()

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x)
        return capsule_length(self.caps(primary_capsules(self.layers(x), self.config.capsule_dim)).vectors)

    def training_loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """The margin loss of the lengths."""
        loss: Tensor = self.margin(self(x).float(), labels)
        return loss

    def probabilities(self, scores: Tensor) -> Tensor:
        """Lengths over their sum; they are not calibrated."""
        return scores / scores.sum(1, keepdim=True)


@dataclass(frozen=True, kw_only=True)
class RecurrentConfig(SequenceConfig):
    """Config of `RecurrentSequenceNet`.

    Attributes:
        cell: ``gru`` or ``lstm``.
        hidden: size of the state, for each direction.
        depth: layers.
        bidirectional: whether it reads backwards too.

    Raises:
        ValueError: a value is out of range.
    """

    cell: Literal["gru", "lstm"] = "gru"
    hidden: int = 32
    depth: int = 1
    bidirectional: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cell not in ("gru", "lstm"):
            raise ValueError(f"cell must be 'gru' or 'lstm', got {self.cell!r}")
        if min(self.hidden, self.depth) < 1:
            raise ValueError(f"hidden and depth must be at least 1, got {self.hidden} and {self.depth}")

    def build(self) -> RecurrentSequenceNet:
        return RecurrentSequenceNet(self)


class RecurrentSequenceNet(SequenceClassifier):
    """A recurrent network, the mean of its states over time, and a linear classifier.

    Args:
        config: what to build.
    """

    def __init__(self, config: RecurrentConfig) -> None:
        super().__init__(config)
        kind = nn.GRU if config.cell == "gru" else nn.LSTM
        self.cell = kind(
            config.in_channels, config.hidden, config.depth, batch_first=True, bidirectional=config.bidirectional
        )
        self.head = nn.Linear(config.hidden * (1 + config.bidirectional), config.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x)
        scores: Tensor = self.head(self.cell(x.transpose(1, 2))[0].mean(1))
        return scores


VARIANTS: dict[str, ConvConfig | RecurrentConfig] = {
    "sequence_cnn": ConvConfig(),
    "sequence_capsnet": SequenceCapsNetConfig(),
    "sequence_gru": RecurrentConfig(),
    "sequence_lstm": RecurrentConfig(cell="lstm"),
}
