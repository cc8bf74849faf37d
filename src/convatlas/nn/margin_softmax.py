"""Classifiers of faces by the angle between features and classes, with a margin that the true class has to exceed.

Wang, Cheng, Liu, Liu: "Additive Margin Softmax for Face Verification", 2018, arXiv 1801.05599.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.errors import CheckpointError
from convatlas.weights import Layout

__all__ = ["AMSoftmax"]


def _from_head(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The weight of the authors' head, whose classes are columns."""
    if state.keys() != {"head.weight"}:
        raise CheckpointError("it has no head.weight alone")
    return {"weight": state["head.weight"].T}


class AMSoftmax(nn.Module):
    """Logits s cos, and s (cos - m) for the true class where labels are given.

    The cosines are those of the angles between a feature and the rows of the weight, held in [-1, 1].

    Args:
        in_features: of a feature vector.
        num_classes: number of classes, e.g. of people.
        margin: m.
        scale: s.

    Raises:
        ValueError: in_features or num_classes is smaller than 1.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {"authors": Layout(function=_from_head)}

    def __init__(self, in_features: int, num_classes: int, *, margin: float = 0.35, scale: float = 32.0) -> None:
        super().__init__()
        if in_features < 1 or num_classes < 1:
            raise ValueError(f"in_features and num_classes must be at least 1, got {in_features} and {num_classes}")
        self.margin, self.scale = margin, scale
        self.weight = nn.Parameter(torch.empty(num_classes, in_features))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits (B, num_classes) of features (B, in_features); with the margin if labels (B) are given."""
        if features.dim() != 2 or features.shape[1] != self.weight.shape[1]:
            raise ValueError(f"features must be (B, {self.weight.shape[1]}), got {tuple(features.shape)}")
        cosines = F.linear(F.normalize(features, dim=1), F.normalize(self.weight, dim=1)).clamp(-1, 1)
        if labels is not None:
            cosines = cosines - self.margin * F.one_hot(labels, cosines.shape[1]).to(cosines.dtype)
        return self.scale * cosines

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of the logits with the margin."""
        return F.cross_entropy(self(features, labels), labels)

    def extra_repr(self) -> str:
        """Show sizes, margin and scale."""
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, margin={self.margin}, scale={self.scale}"
