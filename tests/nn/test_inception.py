"""The two layers that convolve a part of the channels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from convatlas.nn.mixers.inception import InceptionDWConv2d, PartialDWConv2d


@pytest.mark.parametrize(
    ("channels", "ratio", "groups"), [(96, 1 / 8, 12), (20, 1 / 8, 2), (24, 1 / 4, 6), (23, 1 / 8, 2), (12, 1 / 3, 4)]
)
def test_branches_get_the_truncated_share(channels: int, ratio: float, groups: int):
    layer = InceptionDWConv2d(channels, branch_ratio=ratio)
    assert {name: tuple(weight.shape) for name, weight in layer.named_parameters() if name.endswith("weight")} == {
        "dwconv_hw.weight": (groups, 1, 3, 3),
        "dwconv_w.weight": (groups, 1, 1, 11),
        "dwconv_h.weight": (groups, 1, 11, 1),
    }
    assert sum(weight.numel() for weight in layer.parameters()) == groups * (9 + 22) + 3 * groups


@pytest.mark.parametrize("dilation", [1, 2])
def test_to_conv_is_the_same_map(dilation: int):
    layer = InceptionDWConv2d(20, dilation=dilation).double()
    conv = layer.to_conv()
    assert conv.kernel_size == (11, 11)
    assert conv.groups == 20
    x = torch.randn(2, 20, 13, 9, dtype=torch.float64)
    torch.testing.assert_close(layer(x), conv(x))


def test_only_the_last_channels_are_touched():
    x = torch.randn(2, 20, 5, 3)
    assert torch.equal(InceptionDWConv2d(20)(x)[:, :14], x[:, :14])
    assert torch.equal(PartialDWConv2d(20, 3, 0.25)(x)[:, :15], x[:, :15])


def test_partial_convolution_of_all_channels_is_a_depthwise_convolution():
    layer = PartialDWConv2d(6, 5, 1.0)
    x = torch.randn(2, 6, 7, 8)
    assert torch.equal(layer(x), layer.conv(x))


@pytest.mark.parametrize(("ratio", "groups"), [(1 / 2, 48), (3 / 8, 36), (1 / 4, 24), (1 / 8, 12), (1 / 16, 6)])
def test_partial_shares_of_the_study(ratio: float, groups: int):
    assert PartialDWConv2d(96, 3, ratio).conv.weight.shape == (groups, 1, 3, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InceptionDWConv2d(4), r"branch_ratio \* in_channels must be at least 1, got 0.125 \* 4"),
        (lambda: InceptionDWConv2d(8, branch_ratio=0.5), r"three branches need .* got 3 \* 4 > 8"),
        (lambda: InceptionDWConv2d(16, 4), "kernel sizes must be odd to keep the resolution, got square_kernel_size 4"),
        (lambda: InceptionDWConv2d(16, band_kernel_size=10), "must be odd .* band_kernel_size 10"),
        (lambda: InceptionDWConv2d(16, dilation=0), "dilation must be at least 1, got 0"),
        (lambda: PartialDWConv2d(8, 4), "kernel_size must be odd to keep the resolution, got 4"),
        (lambda: PartialDWConv2d(8, 3, 0.1), r"ratio \* channels must be between 1 and 8, got 0.1 \* 8"),
        (lambda: PartialDWConv2d(8, 3, 1.5), r"ratio \* channels must be between 1 and 8, got 1.5 \* 8"),
    ],
)
def test_impossible_layers_are_refused(make: type[nn.Module], message: str):
    with pytest.raises(ValueError, match=message):
        make()
