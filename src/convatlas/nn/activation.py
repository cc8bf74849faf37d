"""Activations that torch lacks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["QuickGELU"]


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), an approximation of GELU that CLIP and CvT were trained with.

    Hendrycks, Gimpel: "Gaussian Error Linear Units", 2016, arXiv 1606.08415, section 2.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map any shape to the same shape."""
        # As a scaled SiLU it keeps one tensor for the backward pass, not two.
        return F.silu(1.702 * x) / 1.702
