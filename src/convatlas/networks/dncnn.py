"""DnCNN: a chain of convolutions that predicts the noise of an image, plain or with a density in its kernels.

Zhang, Zuo, Chen, Meng, Zhang: "Beyond a Gaussian Denoiser: Residual Learning of Deep CNN for Image Denoising", IEEE TIP
2017, arXiv 1608.03981. With a density it is a network of Cammarasana, Patane: "Optimal Weighted Convolution for
Classification and Denosing", 2025, arXiv 2505.24558.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from convatlas.networks.base import Denoiser, DenoiserConfig
from convatlas.nn.conv.weighted_conv import BEST_DENSITIES, WeightedConv2d

__all__ = ["VARIANTS", "DnCNN", "DnCNNConfig"]


@dataclass(frozen=True, kw_only=True)
class DnCNNConfig(DenoiserConfig):
    """Config of `DnCNN`.

    Attributes:
        depth: convolutions, of which all but the first and the last have a batch norm.
        dim: channels between them.
        kernel_size: of all, odd.
        density: values of a weighted convolution, the outermost first; plain convolutions when left out.
        trainable_density: whether each layer learns its values, from ``density``.

    Raises:
        ValueError: a value is out of range.
    """

    depth: int = 17
    dim: int = 64
    kernel_size: int = 3
    density: tuple[float, ...] | None = None
    trainable_density: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth < 2 or self.dim < 1:
            raise ValueError(f"depth must be at least 2 and dim at least 1, got {self.depth} and {self.dim}")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {self.kernel_size}")

    def build(self) -> DnCNN:
        return DnCNN(self)


class DnCNN(Denoiser):
    """x - R(x): convolution and ReLU; convolutions, batch norms and ReLUs; a convolution to the image (paper, fig. 1).

    Args:
        config: what to build.
    """

    def __init__(self, config: DnCNNConfig) -> None:
        super().__init__(config)
        layers: list[nn.Module] = [_conv(config, config.in_channels, config.dim, bias=True), nn.ReLU()]
        for _ in range(config.depth - 2):
            layers += [_conv(config, config.dim, config.dim, bias=False), nn.BatchNorm2d(config.dim), nn.ReLU()]
        self.dncnn = nn.Sequential(*layers, _conv(config, config.dim, config.in_channels, bias=True))

    @property
    def reach(self) -> int:
        return int(self.config.depth * (self.config.kernel_size // 2))

    def forward(self, x: Tensor) -> Tensor:
        """The clean image (B, in_channels, H, W)."""
        self._check_input(x)
        return x - self.dncnn(x)


def _conv(config: DnCNNConfig, in_channels: int, out_channels: int, *, bias: bool) -> nn.Module:
    size = config.kernel_size
    if config.density is None:
        return nn.Conv2d(in_channels, out_channels, size, padding=size // 2, bias=bias)
    options = {"density": config.density, "trainable_density": config.trainable_density}
    return WeightedConv2d(in_channels, out_channels, size, padding=size // 2, bias=bias, **options)  # type: ignore[arg-type]


VARIANTS: dict[str, DnCNNConfig] = {
    "dncnn": DnCNNConfig(),
    "dncnn_blind": DnCNNConfig(depth=20),
    "dncnn_weighted": DnCNNConfig(density=BEST_DENSITIES[3]),
    "dncnn_weighted_k5": DnCNNConfig(kernel_size=5, density=BEST_DENSITIES[5]),
    "dncnn_weighted_k7": DnCNNConfig(kernel_size=7, density=BEST_DENSITIES[7]),
    "dncnn_trained_density_k7": DnCNNConfig(kernel_size=7, density=(0.27, 0.17, 0.54), trainable_density=True),
}
