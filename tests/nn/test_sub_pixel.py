"""Sub-pixel convolution is a transposed convolution, and begins without a checkerboard when told to."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from convatlas.nn.sub_pixel import (
    PixelShuffle3d,
    SubPixelConv2d,
    SubPixelConv3d,
    conv_transpose_weight,
    icnr_,
    reorder_depth_to_space,
)
from convatlas.ops.shuffle import pixel_shuffle


@pytest.mark.parametrize(("scale", "kernel_size", "channels"), [(1, 3, 1), (2, 1, 2), (3, 3, 2), (4, 5, 1)])
def test_it_is_a_transposed_convolution(scale: int, kernel_size: int, channels: int):
    layer = SubPixelConv2d(5, channels, kernel_size, scale=scale).double()
    with torch.no_grad():
        layer.conv.bias.copy_(torch.randn(channels).repeat_interleave(scale**2))
    x = torch.randn(2, 5, 6, 7, dtype=torch.float64)
    other = layer.to_conv_transpose()
    assert other.weight.shape == (5, channels, scale * kernel_size, scale * kernel_size)
    y = layer(x)
    assert y.shape == (2, channels, 6 * scale, 7 * scale)
    torch.testing.assert_close(other(x), y, rtol=1e-12, atol=1e-12)


def test_its_weight_alone_is_that_of_a_transposed_convolution():
    layer = SubPixelConv2d(3, 2, 3, scale=2, bias=False).double()
    x = torch.randn(1, 3, 4, 5, dtype=torch.float64)
    y = F.conv_transpose2d(x, conv_transpose_weight(layer.conv.weight, 2), stride=2, padding=2)
    torch.testing.assert_close(layer(x), y, rtol=1e-12, atol=1e-12)
    assert layer.to_conv_transpose().bias is None


def test_a_bias_that_differs_within_a_block_has_no_transposed_convolution():
    layer = SubPixelConv2d(3, 1, 3, scale=2)
    with pytest.raises(ValueError, match="bias must be the same for the 4 pixels of a block"):
        layer.to_conv_transpose()


@pytest.mark.parametrize("scale", [2, 3])
def test_icnr_begins_as_nearest_neighbour_enlargement(scale: int):
    layer = SubPixelConv2d(4, 3, 3, scale=scale).double()
    nn.init.zeros_(layer.conv.bias)
    kernels = torch.randn(3, 4, 3, 3, dtype=torch.float64)
    assert icnr_(layer.conv.weight, scale, lambda weight: weight.copy_(kernels)) is layer.conv.weight
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    y = layer(x)
    small = F.conv2d(x, kernels, padding=1)
    torch.testing.assert_close(y, F.interpolate(small, scale_factor=scale, mode="nearest"))
    # What differs from one pixel of a block to another is nothing: no energy at the frequencies of the grid.
    blocks = y.unfold(2, scale, scale).unfold(3, scale, scale)
    torch.testing.assert_close(blocks, blocks[..., :1, :1].expand_as(blocks))


def test_channels_of_depth_to_space_are_put_in_our_order():
    weight, bias = torch.randn(12, 5, 3, 3), torch.randn(12)
    x = torch.randn(2, 5, 4, 6)
    theirs = pixel_shuffle(F.conv2d(x, weight, bias, padding=1), 2, "DCR")
    ours = F.conv2d(x, reorder_depth_to_space(weight, 2), reorder_depth_to_space(bias, 2), padding=1)
    torch.testing.assert_close(pixel_shuffle(ours, 2), theirs)
    assert not torch.equal(reorder_depth_to_space(bias, 2), bias)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SubPixelConv2d(3, 1, 4, scale=2), "kernel_size must be odd, got 4"),
        (lambda: SubPixelConv2d(3, 1, 3, scale=0), "scale must be at least 1, got 0"),
        (lambda: SubPixelConv2d(0, 1, 3, scale=2), "in_channels must be at least 1, got 0"),
        (lambda: icnr_(torch.zeros(5, 3, 3, 3), 2), r"weight must be \(C \* scale\^2, I, k, k\) for scale 2"),
        (lambda: conv_transpose_weight(torch.zeros(4, 3, 3), 2), "weight must be"),
        (lambda: reorder_depth_to_space(torch.zeros(6), 2), r"tensor must be \(C \* 4, ...\) for scale 2, got \(6,\)"),
    ],
)
def test_what_cannot_be_is_refused(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("scale", "kernel_size"), [(2, 3), (3, 1)])
def test_volumes_are_enlarged_as_by_a_transposed_convolution(scale: int, kernel_size: int):
    layer = SubPixelConv3d(3, 2, kernel_size, scale=scale).double()
    with torch.no_grad():
        layer.conv.bias.copy_(torch.randn(2).repeat_interleave(scale**3))
    x = torch.randn(2, 3, 4, 3, 5, dtype=torch.float64)
    y = layer(x)
    assert y.shape == (2, 2, 4 * scale, 3 * scale, 5 * scale)
    torch.testing.assert_close(layer.to_conv_transpose()(x), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(PixelShuffle3d(scale)(layer.conv(x)), y)
    nn.init.zeros_(layer.conv.bias)
    icnr_(layer.conv.weight, scale)
    blocks = layer(x).unfold(2, scale, scale).unfold(3, scale, scale).unfold(4, scale, scale)
    torch.testing.assert_close(blocks, blocks[..., :1, :1, :1].expand_as(blocks))


def test_voxels_come_from_channels_row_by_row():
    x = torch.arange(16.0).reshape(1, 16, 1, 1, 1)
    y = PixelShuffle3d(2)(x)
    assert torch.equal(y[0, 1], torch.arange(8.0, 16).reshape(2, 2, 2))
    for call, message in (
        (lambda: PixelShuffle3d(0), "factor must be at least 1"),
        (lambda: PixelShuffle3d(2)(x[0]), r"x must be \(B, C, D, H, W\)"),
        (lambda: conv_transpose_weight(torch.zeros(9, 1, 3, 3, 3), 2), r"weight must be \(C \* scale\^3, I, k, k, k\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
