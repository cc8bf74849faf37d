"""How the networks make their layers from n and the algebra."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from convatlas.nn.conv.hypercomplex import PHConv2d, PHLinear

__all__ = ["conv_maker", "linear_maker"]


def conv_maker(
    n: int, algebra: str, *, unused_bias: bool, real_bias: bool
) -> Callable[[int, int, int, int], nn.Conv2d]:
    """Makes convolutions from input channels, output channels, kernel size and stride; they pad by half the kernel.

    With a learned algebra they hold the bias that the authors never add, or none: a batch norm follows. With a fixed
    one they have a bias.

    Args:
        n: number of components.
        algebra: ``learned``, the name of a fixed one, or ``real`` for torch's convolution.
        unused_bias: whether those with a learned algebra hold the bias that is not added.
        real_bias: whether torch's convolution has a bias.

    Raises:
        ValueError: n is smaller than 1, or not 1 for the real algebra. What else is wrong is told when a layer is made.
    """
    _check(n, algebra)

    def make(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
        place = (in_channels, out_channels, kernel_size, stride, kernel_size // 2)
        if algebra == "real":
            return nn.Conv2d(*place, bias=real_bias)
        bias = algebra != "learned" or unused_bias
        return PHConv2d(*place, bias=bias, n=n, algebra=algebra, unused_bias=bias and algebra == "learned")

    return make


def linear_maker(n: int, algebra: str) -> Callable[[int, int], nn.Linear]:
    """Makes linear layers from input and output features.

    Raises:
        ValueError: as `conv_maker` does.
    """
    _check(n, algebra)

    def make(in_features: int, out_features: int) -> nn.Linear:
        if algebra == "real":
            return nn.Linear(in_features, out_features)
        return PHLinear(in_features, out_features, n=n, algebra=algebra)

    return make


def _check(n: int, algebra: str) -> None:
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if algebra == "real" and n != 1:
        raise ValueError(f"n must be 1 for the real algebra, got {n}")
