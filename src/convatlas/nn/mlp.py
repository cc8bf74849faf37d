"""The multi-layer perceptron of transformer blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

__all__ = ["Mlp"]


class Mlp(nn.Module):
    """Linear, activation, dropout, Linear, dropout, over the last axis.

    Args:
        channels: channels of input and output.
        hidden_channels: channels in between.
        act: makes the activation.
        drop: probability of both dropouts.
        between: module between the first Linear and the activation, such as a depthwise convolution; it gets the hidden
            tensor and whatever `forward` gets beside x.
    """

    def __init__(
        self,
        channels: int,
        hidden_channels: int,
        *,
        act: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
        between: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden_channels)
        self.between = between
        self.act = act()
        self.fc2 = nn.Linear(hidden_channels, channels)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        """Map (..., channels) to the same shape.

        Args:
            x: input.
            context: further arguments of ``between``, such as the grid of the tokens.
        """
        x = self.fc1(x)
        if self.between is not None:
            x = self.between(x, *context)
        return self.drop(self.fc2(self.drop(self.act(x))))
