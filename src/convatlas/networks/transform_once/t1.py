"""T1: one cosine (or Fourier) transform, then layers that work on the modes, and answers among the modes.

Poli, Massaroli, Berto, Park, Dao, Re, Ermon: "Transform Once: Efficient Operator Learning in Frequency Domain", NeurIPS
2022, arXiv 2211.14453, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from convatlas.networks.transform_once.spectral import ACTIVATIONS, SpectralConfig, SpectralNetwork
from convatlas.nn.spectral_weights import as_complex
from convatlas.nn.t1_layer import T1Layer
from convatlas.weights import Layout

__all__ = ["T1", "VARIANTS", "T1Config"]

#: Channels between the two matrices of the head.
_HEAD_WIDTH = 128
#: Standard deviation of the head's weights: the network answers almost nothing at first.
_HEAD_DEVIATION = 1e-8


@dataclass(frozen=True, kw_only=True)
class T1Config(SpectralConfig):
    """Config of `T1`.

    Attributes:
        width: channels of the layers.
        depth: how many layers.

    Raises:
        ValueError: width or depth is smaller than 1.
    """

    width: int = 48
    depth: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width < 1 or self.depth < 1:
            raise ValueError(f"width and depth must be at least 1, got {self.width} and {self.depth}")

    def build(self) -> T1:
        return T1(self)


class T1(SpectralNetwork):
    """fc0 on input and coordinates, transform, layers, and a head of two matrices at each mode with sin between them.

    Modes above those that the layers mix stay zero unless ``keep_high``, so the answer is a band-limited field.

    Args:
        config: what to build.
    """

    config: T1Config
    layouts: ClassVar[Mapping[str, Layout]] = {"authors": Layout(renames=((r"^layers\.", "blocks."),))}

    def __init__(self, config: T1Config) -> None:
        super().__init__(config)
        complex_valued = config.transform == "dft"
        self.fc0 = nn.Linear(config.in_channels + config.dims, config.width)
        self.blocks = nn.ModuleList(
            T1Layer(
                config.width,
                config.kept,
                points=config.points,
                complex_valued=complex_valued,
                act=ACTIVATIONS[config.act],
                residual=config.residual,
                keep_high=config.keep_high,
                init=config.init,
            )
            for _ in range(config.depth)
        )
        parts = [2] if complex_valued else []
        self.fc1 = nn.Parameter(_HEAD_DEVIATION * torch.randn(config.width, _HEAD_WIDTH, *parts))
        self.fc2 = nn.Parameter(_HEAD_DEVIATION * torch.randn(_HEAD_WIDTH, config.out_channels, *parts))

    def forward(self, x: Tensor) -> Tensor:
        """Modes (B, out_channels, *modes) of the answer to a field (B, in_channels, *grid), or the answer on the grid.

        Raises:
            ValueError: x has a wrong number of dimensions or channels, or is not real.
        """
        self._check_input(x)
        z = self._lifted(x)
        for block in self.blocks:
            z = block(z)
        return self._answered(self._head(z), x.shape[2:], x.dtype)

    def _head(self, z: Tensor) -> Tensor:
        weights = (self.fc1, self.fc2)
        first, second = (as_complex(each) for each in weights) if self.config.transform == "dft" else weights
        last = z.movedim(1, -1)
        return (torch.sin(last @ first.to(z.dtype)) @ second.to(z.dtype)).movedim(-1, 1)


VARIANTS: dict[str, T1Config] = {
    "t1_navier_stokes": T1Config(),
    "t1_airfoil": T1Config(in_channels=3, out_channels=3, resolution=128, modes=64, depth=6),
}
