"""The video ResNets beyond what the battery tests: sizes, factorisation and the slices that MC3 leaves alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from convatlas.cost import cost
from convatlas.errors import UnknownName
from convatlas.networks.registry import create_model
from convatlas.networks.video_resnet import Bottleneck, Conv2Plus1d, ConvNoDepth, factorised_width
from convatlas.training.measure import count_parameters

# Model -> parameters for 400 and 3 classes of 3 channels and for 3 classes of 1 channel, and 10^9 multiply-adds for
# 3 x 16 x 112 x 112.
PUBLISHED = {
    "r3d_18": (33_371_472, 33_167_811, 33_148_995, 40.70),
    "mc3_18": (11_695_440, 11_491_779, 11_472_963, 43.34),
    "r2plus1d_18": (31_505_325, 31_301_664, 31_297_254, 40.52),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name: str):
    with torch.device("meta"):
        whole, three, grey = (
            create_model(name, **options).eval()
            for options in ({}, {"num_classes": 3}, {"num_classes": 3, "in_channels": 1})
        )
        macs = cost(whole, torch.empty(1, 3, 16, 112, 112)).total.macs
    assert tuple(map(count_parameters, (whole, three, grey))) == PUBLISHED[name][:3]
    assert round(macs / 1e9, 2) == PUBLISHED[name][3]


def test_widths_between_the_factors():
    pairs = {(64, 64): 144, (64, 128): 230, (128, 128): 288, (128, 256): 460, (256, 512): 921, (512, 512): 1152}
    assert {pair: factorised_width(*pair) for pair in pairs} == pairs
    with torch.device("meta"):
        block = create_model("r2plus1d_18").layer2[0]
    assert [conv[0].out_channels for conv in (block.conv1[0], block.conv2[0])] == [230, 230]


def test_a_separable_kernel_has_two_factors():
    conv = Conv2Plus1d(1, 1, mid=1).eval()
    conv[1], conv[2] = nn.Identity(), nn.Identity()
    plane, line = torch.randn(3, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    conv.double()
    conv[0].weight.data = plane[None, None, None]
    conv[3].weight.data = line[None, None, :, None, None]
    x = torch.randn(2, 1, 5, 7, 6, dtype=torch.float64)
    whole = nn.functional.conv3d(x, (line[:, None, None] * plane)[None, None], padding=1)
    torch.testing.assert_close(conv(x), whole)


def test_slices_of_the_last_stages_of_mc3_do_not_mix():
    model = create_model("mc3_18", widths=(4, 6, 8, 8), depths=(1, 1, 1, 1), num_classes=3).double().eval()
    x = torch.randn(2, 4, 6, 16, 16, dtype=torch.float64)
    order = torch.tensor([3, 1, 5, 0, 4, 2])

    def last_stages(x: torch.Tensor) -> torch.Tensor:
        return model.layer4(model.layer3(model.layer2(x)))

    torch.testing.assert_close(last_stages(x[:, :, order]), last_stages(x)[:, :, order])
    assert last_stages(x).shape[2] == 6


def test_slices_alone_equal_a_flat_kernel():
    conv = ConvNoDepth(3, 5, 2).double()
    x = torch.randn(2, 3, 4, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(conv(x), nn.Conv3d.forward(conv, x))


def test_bottlenecks():
    model = create_model("r2plus1d_18", block="bottleneck", widths=(4, 4), depths=(1, 1), convolutions=("2plus1d",) * 2)
    assert isinstance(model.layer2[0], Bottleneck)
    assert model.feature_info[-1].channels == 16
    assert model.eval()(torch.randn(1, 3, 4, 16, 16)).shape == (1, 400)


def test_impossible_configs_are_named():
    with pytest.raises(ValueError, match="convolutions, depths and widths must be positive and of the same length"):
        create_model("r3d_18", depths=(1, 1))
    with pytest.raises(UnknownName, match="unknown convolution '3dd': did you mean 3d"):
        create_model("r3d_18", convolutions=("3dd",) * 4)
    with pytest.raises(ValueError, match="x must be at least 1 x 16 x 16 voxels, got 4 x 15 x 16"):
        create_model("r3d_18", widths=(2, 2), depths=(1, 1), convolutions=("3d", "3d"))(torch.zeros(1, 3, 4, 15, 16))
