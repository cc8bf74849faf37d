"""Layers are found by name and put where they belong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from convatlas.errors import Unsupported
from convatlas.networks.registry import create_model
from convatlas.nn.conv.hypercomplex import PHConv1d, PHConv3d
from convatlas.nn.mixers.eca import ECA
from convatlas.nn.mixers.ela import ELA
from convatlas.surgery import place_layer
from surgery.toys import count


def plain(dims: int) -> nn.Sequential:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    return nn.Sequential(conv(3, 8, 3), nn.ReLU(), conv(8, 8, 1), conv(8, 4, 3))


def test_slots_of_residual_blocks_are_filled():
    model = create_model("resnet18", depths=(1, 2), widths=(8, 12), stem_width=8, num_classes=3)
    placed = place_layer(model, "eca", kernel_size=5)
    assert placed.changed == ("layer1.0.attention", "layer2.0.attention", "layer2.1.attention")
    assert count(placed.model, ECA) == 3
    assert [parameter.numel() for parameter in placed.model.layer1[0].attention.parameters()] == [5]


def test_elsewhere_layers_stand_behind_convolutions_of_several_taps():
    for dims in (1, 2, 3):
        placed = place_layer(plain(dims), "ela", example_input=torch.randn(2, 3, *(9, 8, 7)[:dims]), num_groups=1)
        assert placed.changed == ("0", "3")
        assert count(placed.model, ELA) == 2


@pytest.mark.parametrize(("dims", "kind"), [(1, PHConv1d), (3, PHConv3d)])
def test_conv_like_layers_have_the_axes_of_what_they_replace(dims: int, kind: type[nn.Module]):
    placed = place_layer(plain(dims), "hypercomplex", n=4)
    assert placed.changed == ("3",)
    assert placed.skipped == (("0", "in_channels (3) must be divisible by n (4)"),)
    assert isinstance(placed.model[3], kind)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ecca", {}, "unknown layer 'ecca': did you mean eca"),
        ("eca", {"kernel": 3}, "unknown option of eca 'kernel': did you mean kernel_size"),
        ("hypercomplex", {}, "layer hypercomplex needs the option n, got none"),
    ],
)
def test_mistakes_are_told(name: str, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        place_layer(plain(2), name, **options)


def test_a_model_without_a_place_is_refused():
    with pytest.raises(Unsupported, match="nothing was"):
        place_layer(nn.Sequential(nn.Linear(3, 4)), "eca")
