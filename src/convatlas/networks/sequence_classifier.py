"""The protocol of networks that name what a time series of a fixed number of steps shows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.networks.base import NetworkConfig
from convatlas.weights import Layout

__all__ = ["SHORTEST", "SequenceClassifier", "SequenceConfig"]

#: Steps that a series must have at least.
SHORTEST = 8


@dataclass(frozen=True, kw_only=True)
class SequenceConfig(NetworkConfig):
    """Config of a network for time series (B, in_channels, length).

    Attributes:
        in_channels: features of a step.
        num_classes: classes to tell apart.
        length: steps of a series.

    Raises:
        ValueError: a value is out of range.
    """

    in_channels: int = 2
    num_classes: int = 3
    length: int = 40

    def __post_init__(self) -> None:
        if self.in_channels < 1 or self.num_classes < 1:
            raise ValueError(
                f"in_channels and num_classes must be at least 1, got {self.in_channels} and {self.num_classes}"
            )
        if self.length < SHORTEST:
            raise ValueError(f"length must be at least {SHORTEST} steps, got {self.length}")

    @abstractmethod
    def build(self) -> SequenceClassifier: ...


class SequenceClassifier(nn.Module, ABC):
    """A network that turns a time series (B, C, T) into class scores (B, K)."""

    #: How foreign checkpoint layouts map to this class (see `convatlas.weights`).
    layouts: ClassVar[Mapping[str, Layout]] = {}

    def __init__(self, config: SequenceConfig) -> None:
        super().__init__()
        self.config: Any = config

    @property
    def in_channels(self) -> int:
        """Features of a step."""
        return int(self.config.in_channels)

    @property
    def num_classes(self) -> int:
        """Classes to tell apart."""
        return int(self.config.num_classes)

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Class scores (B, num_classes) of standardised series (B, in_channels, length).

        Raises:
            ValueError: x has another shape.
        """

    def training_loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """What is minimised for a batch; by default the cross-entropy of the scores."""
        return F.cross_entropy(self(x).float(), labels)

    def probabilities(self, scores: Tensor) -> Tensor:
        """Shares of the classes, which sum to 1, of what `forward` gave; by default softmax."""
        return scores.softmax(1)

    def example_inputs(self, batch: int = 1) -> tuple[Tensor, ...]:
        """Random series, for tracing and timing."""
        return (torch.randn(batch, self.in_channels, int(self.config.length)),)

    def _check_input(self, x: Tensor) -> None:
        shape = (self.in_channels, int(self.config.length))
        if x.dim() != 3 or tuple(x.shape[1:]) != shape:
            raise ValueError(f"x must be (B, {shape[0]}, {shape[1]}), got {tuple(x.shape)}")
