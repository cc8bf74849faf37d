"""T1+: one cosine transform, a layer of T1, and a U-Net on the square of the lowest modes.

Poli, Massaroli, Berto, Park, Dao, Re, Ermon: "Transform Once: Efficient Operator Learning in Frequency Domain", NeurIPS
2022, arXiv 2211.14453, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from convatlas.networks.transform_once.dfpnet import DFPNet, DFPNetConfig
from convatlas.networks.transform_once.spectral import ACTIVATIONS, SpectralConfig, SpectralNetwork
from convatlas.nn.t1_layer import T1Layer

__all__ = ["VARIANTS", "T1Plus", "T1PlusConfig"]


@dataclass(frozen=True, kw_only=True)
class T1PlusConfig(SpectralConfig):
    """Config of `T1Plus`, for two axes and the cosine transform.

    Attributes:
        modes: of both axes: 24, 36, 64, 128 or 224.
        channel_exponent: the first level of the U-Net has 2 ** channel_exponent channels.
        op_layer: whether a layer of T1 stands before the U-Net.

    Raises:
        ValueError: a value is out of range.
    """

    channel_exponent: int = 5
    op_layer: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dims != 2 or self.transform != "dct" or self.keep_high:
            given = f"{self.dims}, {self.transform!r} and {self.keep_high}"
            raise ValueError(f"dims, transform and keep_high must be 2, 'dct' and False, got {given}")
        self.unet()

    def unet(self) -> DFPNetConfig:
        """Config of the U-Net."""
        channels = self.in_channels + self.dims
        return DFPNetConfig(
            in_channels=channels,
            out_channels=self.out_channels,
            resolution=self.kept,
            channel_exponent=self.channel_exponent,
        )

    def build(self) -> T1Plus:
        return T1Plus(self)


class T1Plus(SpectralNetwork):
    """fc0 on input and coordinates, transform, a layer of T1, and a U-Net that sees the lowest modes as an image.

    Args:
        config: what to build.
    """

    config: T1PlusConfig

    def __init__(self, config: T1PlusConfig) -> None:
        super().__init__(config)
        channels = config.in_channels + config.dims
        self.fc0 = nn.Linear(channels, channels)
        self.op_layer = (
            T1Layer(
                channels,
                config.kept,
                points=config.points,
                act=ACTIVATIONS[config.act],
                residual=config.residual,
                init=config.init,
            )
            if config.op_layer
            else None
        )
        self.dfpnet = DFPNet(config.unet())

    def forward(self, x: Tensor) -> Tensor:
        """Modes (B, out_channels, *modes) of the answer to a field (B, in_channels, H, W), or the answer on the grid.

        Raises:
            ValueError: x has a wrong number of dimensions or channels, or is not real.
        """
        self._check_input(x)
        z = self._lifted(x)
        if self.op_layer is not None:
            z = self.op_layer(z)
        return self._answered(self.dfpnet.net(z), x.shape[2:], x.dtype)


VARIANTS: dict[str, T1PlusConfig | DFPNetConfig] = {
    "t1u_navier_stokes": T1PlusConfig(),
    # Two frames of smoke behind each other; the paper does not tell the width.
    "t1u_scalarflow": T1PlusConfig(in_channels=2, resolution=(1062, 600), modes=224),
    # The U-Net on the field itself, a baseline.
    "t1_dfpnet_airfoil": DFPNetConfig(in_channels=3, out_channels=3),
}
