"""Depthwise layers are torch's convolutions, number for number."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from convatlas.errors import Unsupported
from convatlas.nn.depthwise import DepthwiseConv1d, DepthwiseConv2d, DepthwiseConv3d
from convatlas.ops.backend import chosen
from convatlas.ops.depthwise import depthwise_conv
from convatlas.surgery import merge, swap

KINDS = {1: (DepthwiseConv1d, nn.Conv1d), 2: (DepthwiseConv2d, nn.Conv2d), 3: (DepthwiseConv3d, nn.Conv3d)}


@pytest.mark.parametrize("dims", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 11, "padding": "same"},
        {"kernel_size": 3, "padding": "valid", "stride": 2},
        {"kernel_size": 3, "padding": 2, "dilation": 2, "padding_mode": "circular", "bias": False},
        {"kernel_size": 5, "padding": 2, "padding_mode": "reflect"},
    ],
    ids=str,
)
def test_takes_the_place_of_a_convolution_with_a_group_each(dims: int, options: dict[str, object]):
    ours, plain = KINDS[dims]
    conv = plain(4, 8, groups=4, **options).double()
    layer = ours.from_conv(conv)
    x = torch.randn(2, 4, *(9, 8, 7)[:dims], dtype=torch.float64)
    torch.testing.assert_close(layer(x), conv(x))
    assert {name for name, _ in layer.named_parameters()} == {name for name, _ in conv.named_parameters()}


def test_swap_makes_a_model_fast_and_merge_keeps_it_so():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 13, padding=6, groups=6), nn.BatchNorm2d(6)).eval()
    model[2].running_mean.normal_()
    x = torch.randn(2, 3, 9, 7)
    changed = swap(model, nn.Conv2d, DepthwiseConv2d, example_input=x)
    assert changed.changed == ("1",)
    assert changed.skipped[0][0] == "0"
    merged = merge(changed.model, example_input=x).model
    assert isinstance(merged[1], DepthwiseConv2d)
    assert isinstance(merged[2], nn.Identity)
    with torch.no_grad():
        torch.testing.assert_close(merged(x), model(x), rtol=1e-4, atol=1e-5)


def test_other_groups_are_refused():
    with pytest.raises(Unsupported, match=r"as many groups as input channels \(4\), got 2"):
        DepthwiseConv2d.from_conv(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(Unsupported, match="Conv1d"):
        DepthwiseConv1d.from_conv(nn.Conv2d(4, 4, 3, groups=4))
    with pytest.raises(ValueError, match="out_channels must be divisible by groups"):
        DepthwiseConv2d(4, 6, 3)


def test_layout_of_the_input_is_kept():
    x, weight = torch.randn(2, 3, 15, 14), torch.randn(3, 1, 17, 17)
    assert chosen("depthwise_conv", x, weight, None, (1, 1), (8, 8), (1, 1)) == "channels_last"
    assert depthwise_conv(x, weight, padding=8).is_contiguous()
    moved = x.contiguous(memory_format=torch.channels_last)
    assert depthwise_conv(moved, weight, padding=8).is_contiguous(memory_format=torch.channels_last)
    assert depthwise_conv(x[:0], weight, padding=8).shape == (0, 3, 15, 14)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 4), torch.zeros(4, 1, 3)), r"x must be \(B, C, L\).*got 2 dimensions"),
        ((torch.zeros(1, 4, 5), torch.zeros(6, 1, 3)), r"multiple of the 4 channels of x, got \(6, 1, 3\)"),
        ((torch.zeros(1, 4, 5), torch.zeros(4, 1, 3), None, 0), "stride must be at least 1 on each of 1 axes, got 0"),
        ((torch.zeros(1, 4, 5), torch.zeros(4, 1, 3), None, 1, (1, 1)), r"padding must be at least 0 .* got \(1, 1\)"),
    ],
)
def test_bad_arguments(arguments: tuple[object, ...], message: str):
    with pytest.raises(ValueError, match=message):
        depthwise_conv(*arguments)


def test_layer_names_the_wrong_input():
    with pytest.raises(ValueError, match=r"x must be \(B, 4, \.\.\.\) with 2 position axes, got \(1, 4, 5\)"):
        DepthwiseConv2d(4, 4, 3)(torch.zeros(1, 4, 5))
