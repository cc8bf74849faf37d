"""WaveMix blocks: what the paper says of them, other wavelets, any size, merging, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from convatlas.nn.mixers.wavemix import WaveMixBlock, WaveMixBlockV1, WaveMixBlockV3
from convatlas.ops.wavelets import dwt
from convatlas.surgery import insert, merge


def settled(block: nn.Module) -> nn.Module:
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    return block.double().eval()


def test_tokens_are_the_bands_of_every_level():
    block = settled(WaveMixBlock(8, level=2))
    x = torch.randn(1, 8, 8, 12, dtype=torch.float64)
    z = block.reduction(x)
    first, second = block._tokens(x)
    for channel in range(2):
        ll, hl, lh, hh = dwt(z, "haar", "zero")[:, channel].unbind(1)
        torch.testing.assert_close(first[:, channel], ll)
        for band, expected in enumerate((lh, hl, hh)):
            torch.testing.assert_close(first[:, 2 + 3 * channel + band], expected)
    torch.testing.assert_close(second[:, :2], dwt(first[:, :2], "haar", "zero")[:, :, 0])
    assert z.square().sum().item() == pytest.approx(first.square().sum().item())


def test_lh_has_the_differences_between_rows():
    block = settled(WaveMixBlock(4))
    with torch.no_grad():
        block.reduction.weight.fill_(1.0)
        block.reduction.bias.zero_()
    rows = torch.arange(4.0, dtype=torch.float64).view(1, 1, 4, 1).expand(1, 4, 4, 4)
    (tokens,) = block._tokens(rows)
    low, lh, hl, hh = tokens.unbind(1)
    assert lh.abs().min() > 0.1
    assert not hl.any()
    assert not hh.any()
    assert low.any()


def test_two_levels_are_mixed_from_the_coarsest_upwards():
    block = settled(WaveMixBlock(8, level=2, ff_channels=6))
    x = torch.randn(2, 8, 8, 12, dtype=torch.float64)
    fine, coarse = block._tokens(x)
    u2 = block.feedforward["2"](coarse)
    assert u2.shape == (2, 4, 4, 6)
    torch.testing.assert_close(block(x), block.feedforward["1"](torch.cat([fine, u2], 1)))
    mixer = block.feedforward["1"]
    assert [type(part) for part in mixer] == [
        *(nn.Conv2d, nn.GELU, nn.Dropout, nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)
    ]
    assert (mixer[0].in_channels, mixer[0].out_channels, mixer[3].out_channels) == (12, 16, 6)


def test_version_1_enlarges_every_level_at_once():
    block = settled(WaveMixBlockV1(8))
    x = torch.randn(1, 8, 16, 32, dtype=torch.float64)
    geometry = [(layer.kernel_size[0], layer.stride[0], layer.padding[0]) for layer in block.upsample]
    assert geometry == [(4, 2, 1), (6, 4, 1), (10, 8, 1), (18, 16, 1)]
    for upsample, tokens in zip(block.upsample, block._tokens(x), strict=True):
        assert upsample(block.feedforward(tokens)).shape == (1, 2, 16, 32)
    assert [type(part) for part in block.depthwise] == [nn.Conv2d, nn.GELU, nn.BatchNorm2d]
    assert block.depthwise[0].groups == 8


def test_version_3_shuffles_pixels():
    block = settled(WaveMixBlockV3(8))
    x = torch.randn(1, 8, 4, 6, dtype=torch.float64)
    (tokens,) = block._tokens(x)
    conv, _, _, _, last, norm = block.feedforward
    assert conv.out_channels == 32
    expected = norm(last(F.pixel_shuffle(F.gelu(conv(tokens)), 2)))
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("wavelet", ["db2", "sym4", "bior2.2"])
def test_other_wavelets_keep_the_shape(wavelet: str):
    block = WaveMixBlock(8, level=2, wavelet=wavelet, mode="periodization").eval()
    assert block(torch.randn(1, 8, 12, 8)).shape == (1, 8, 12, 8)


def test_merges_and_goes_into_a_network():
    block, x = settled(WaveMixBlock(8, level=2)), torch.randn(1, 8, 8, 8, dtype=torch.float64)
    merged = merge(block, example_input=x).model
    assert not [part for part in merged.modules() if isinstance(part, nn.BatchNorm2d)]
    torch.testing.assert_close(merged(x), block(x))
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
    image = torch.randn(2, 3, 9, 7)
    net = insert(net, WaveMixBlock, after=nn.Conv2d, example_input=image, mode="reflect").model
    assert net(image).shape == (2, 8, 9, 7)


def test_impossible_blocks_are_refused():
    with pytest.raises(ValueError, match="channels must be divisible by 4, got 6"):
        WaveMixBlock(6)
    with pytest.raises(ValueError, match="level must be from 1 to 4, got 5"):
        WaveMixBlock(8, level=5)
    with pytest.raises(ValueError, match="divisible by 4, got 8 x 6; mode='reflect' takes any size"):
        WaveMixBlock(8, level=2)(torch.zeros(1, 8, 8, 6))
    with pytest.raises(ValueError, match="spatial size must be divisible by 16, got 8 x 16"):
        WaveMixBlockV1(8)(torch.zeros(1, 8, 8, 16))
