"""Initial weights that several papers share."""

from __future__ import annotations

from torch import nn

__all__ = ["init_linear"]


def init_linear(module: nn.Module) -> None:
    """Initialise a Linear as vision transformers do, for ``model.apply``; other modules stay as they are.

    The weight is normal with standard deviation 0.02, cut off at -2 and 2 (not at two deviations); the bias is 0.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
