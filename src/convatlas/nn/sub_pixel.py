"""Sub-pixel convolution: a convolution at low resolution whose channels become the pixels of a larger image.

Shi et al.: "Real-Time Single Image and Video Super-Resolution Using an Efficient Sub-Pixel Convolutional Neural
Network", CVPR 2016, arXiv 1609.05158, equations 3 and 4. Initialisation: Aitken et al.: "Checkerboard artifact free
sub-pixel convolution", 2017, arXiv 1707.02937.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from convatlas.ops.shuffle import pixel_shuffle

__all__ = [
    "PixelShuffle3d",
    "SubPixelConv2d",
    "SubPixelConv3d",
    "conv_transpose_weight",
    "icnr_",
    "reorder_depth_to_space",
]

_CONVOLUTIONS = {2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, type[nn.ConvTranspose2d] | type[nn.ConvTranspose3d]] = {
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}


class PixelShuffle3d(nn.Module):
    """Spread r^3 channels for each of the volume over blocks of r x r x r voxels, see `convatlas.ops.shuffle`.

    Args:
        factor: r.

    Raises:
        ValueError: factor is smaller than 1.
    """

    def __init__(self, factor: int) -> None:
        super().__init__()
        if factor < 1:
            raise ValueError(f"factor must be at least 1, got {factor}")
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C r^3, D, H, W) to (B, C, r D, r H, r W)."""
        if x.dim() != 5:
            raise ValueError(f"x must be (B, C, D, H, W), got {tuple(x.shape)}")
        return pixel_shuffle(x, self.factor)

    def extra_repr(self) -> str:
        """Show the factor."""
        return str(self.factor)


class _SubPixelConv(nn.Module):
    """A sub-pixel convolution of ``dims`` position axes.

    Args:
        in_channels: channels of the input.
        out_channels: channels C of the image; the convolution has C r^dims.
        kernel_size: odd kernel size k at low resolution.
        scale: r.
        bias: whether the convolution has one.
        device, dtype: of the parameters.

    Raises:
        ValueError: a size is smaller than 1, or kernel_size is even.
    """

    dims: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        scale: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("scale", scale)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        self.scale = scale
        self.conv = _CONVOLUTIONS[self.dims](
            in_channels,
            out_channels * scale**self.dims,
            kernel_size,
            padding=kernel_size // 2,
            bias=bias,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, *positions) to (B, out_channels, *positions * r)."""
        return pixel_shuffle(self.conv(x), self.scale)

    def to_conv_transpose(self) -> nn.ConvTranspose2d | nn.ConvTranspose3d:
        """The transposed convolution that computes the same, with copies of the weights.

        Its bias is one number for each channel of the image, where a sub-pixel convolution has one for each position of
        a block.

        Raises:
            ValueError: the biases of a channel differ.
        """
        scale, conv, block = self.scale, self.conv, self.scale**self.dims
        bias = None if conv.bias is None else conv.bias.detach().view(-1, block)
        if bias is not None and not bias.is_meta and not torch.equal(bias, bias[:, :1].expand_as(bias)):
            raise ValueError(f"bias must be the same for the {block} pixels of a block, or no transposed one has it")
        kernel_size = conv.kernel_size[0]
        other = _TRANSPOSED[self.dims](
            conv.in_channels,
            conv.out_channels // block,
            scale * kernel_size,
            stride=scale,
            padding=scale * (kernel_size // 2),
            bias=bias is not None,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        with torch.no_grad():
            other.weight.copy_(conv_transpose_weight(conv.weight, scale))
            if bias is not None and other.bias is not None:
                other.bias.copy_(bias[:, 0])
        return other.train(self.training)

    def extra_repr(self) -> str:
        """Show the scale."""
        return f"scale={self.scale}"


class SubPixelConv2d(_SubPixelConv):
    """pixel_shuffle(conv(x), r): r^2 channels for each of the image become its r x r pixels.

    Padded with zeros so that (B, in_channels, H, W) becomes (B, out_channels, r H, r W). Exactly a transposed
    convolution of kernel size r k and stride r, see `to_conv_transpose`, with the same weights and multiply-adds.

    Args:
        in_channels: channels of the input.
        out_channels: channels C of the image; the convolution has C r^2.
        kernel_size: odd kernel size k at low resolution.
        scale: r.
        bias: whether the convolution has one.
        device, dtype: of the parameters.

    Raises:
        ValueError: a size is smaller than 1, or kernel_size is even.
    """

    dims = 2


class SubPixelConv3d(_SubPixelConv):
    """`SubPixelConv2d` for volumes: r^3 channels for each become r x r x r voxels.

    Args:
        in_channels: channels of the input.
        out_channels: channels C of the volume; the convolution has C r^3.
        kernel_size: odd kernel size k at low resolution.
        scale: r.
        bias: whether the convolution has one.
        device, dtype: of the parameters.

    Raises:
        ValueError: a size is smaller than 1, or kernel_size is even.
    """

    dims = 3


def conv_transpose_weight(weight: Tensor, scale: int) -> Tensor:
    """The weight (I, C, r k, r k) of the transposed convolution that a sub-pixel convolution is.

    W'[i, c, r (k - 1 - u) + a, r (k - 1 - v) + b] = W[c r^2 + r a + b, i, u, v]; its stride is r, its padding
    r floor(k / 2). The same with one more axis for volumes.

    Args:
        weight: (C r^2, I, k, k) or (C r^3, I, k, k, k).
        scale: r.

    Raises:
        ValueError: weight is not of that shape.
    """
    _check(weight, scale)
    if weight.dim() == 4:
        return rearrange(weight.flip(2, 3), "(c a b) i u v -> i c (u a) (v b)", a=scale, b=scale)
    return rearrange(weight.flip(2, 3, 4), "(c a b d) i u v w -> i c (u a) (v b) (w d)", a=scale, b=scale, d=scale)


@torch.no_grad()
def icnr_(weight: Tensor, scale: int, init: Callable[[Tensor], object] = nn.init.kaiming_normal_) -> Tensor:
    """Fill the weight of a sub-pixel convolution so that it begins as a convolution and nearest-neighbour enlargement.

    One kernel is drawn for each channel of the image and repeated for the pixels of a block (Aitken et al., section 3),
    so that no checkerboard is there to be unlearned. The bias must not differ within a block either: leave it zero.

    Args:
        weight: (C r^2, I, k, k) or (C r^3, I, k, k, k), changed in place.
        scale: r.
        init: fills the kernels (C, I, k, k) or (C, I, k, k, k) in place.

    Raises:
        ValueError: weight is not of that shape.
    """
    _check(weight, scale)
    block = scale ** (weight.dim() - 2)
    kernels = weight.new_empty(weight.shape[0] // block, *weight.shape[1:])
    init(kernels)
    return weight.copy_(repeat(kernels, "c ... -> (c block) ...", block=block))


def reorder_depth_to_space(tensor: Tensor, scale: int) -> Tensor:
    """Weight or bias trained for TensorFlow's depth_to_space, and for the paper's equation 4, in the order of torch.

    There the channels of the image come last within the output channels, (r^2, C); here they come first, (C, r^2).

    Args:
        tensor: (r^2 C, ...).
        scale: r.

    Raises:
        ValueError: the first length is no multiple of r^2.
    """
    if scale < 1 or tensor.dim() < 1 or tensor.shape[0] % scale**2:
        raise ValueError(f"tensor must be (C * {scale**2}, ...) for scale {scale}, got {tuple(tensor.shape)}")
    return rearrange(tensor, "(block c) ... -> (c block) ...", block=scale**2)


def _check(weight: Tensor, scale: int) -> None:
    dims = weight.dim() - 2
    if scale < 1 or dims not in (2, 3) or weight.shape[0] % scale**dims or math.prod(weight.shape) == 0:
        wanted = "(C * scale^3, I, k, k, k)" if dims == 3 else "(C * scale^2, I, k, k)"
        raise ValueError(f"weight must be {wanted} for scale {scale}, got {tuple(weight.shape)}")
