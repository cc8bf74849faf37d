"""The im2win layer beyond what the battery tests of every conv-like layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from convatlas.nn.conv.im2win import Im2winConv2d
from convatlas.surgery import merge, swap


def test_it_takes_over_a_model_and_gives_it_back():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding="same", groups=8, padding_mode="reflect", bias=False),
    ).eval()
    x = torch.randn(2, 3, 9, 8)
    ours = swap(model, nn.Conv2d, Im2winConv2d).model
    assert [type(ours[0]), type(ours[2])] == [Im2winConv2d] * 2
    assert ours.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(ours(x), model(x))
    assert [type(part) for part in merge(ours, x).model] == [nn.Conv2d, nn.ReLU, nn.Conv2d]


@pytest.mark.parametrize("kind", [nn.Conv2d, Im2winConv2d])
def test_autocast_gives_half_precision(kind: type[nn.Conv2d]):
    layer, x = kind(3, 4, 3), torch.randn(1, 3, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_options_reach_the_operator():
    layer = Im2winConv2d(4, 4, 3, groups=2, backend="naive")
    x = torch.randn(1, 4, 6, 6)
    torch.testing.assert_close(layer(x), layer.to_conv()(x))
    layer.recompute, layer.backend = False, "nhwc"
    with pytest.raises(ValueError, match="windows are kept for one group only"):
        layer(x)
