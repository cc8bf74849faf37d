"""Efficient local attention beyond what the battery tests."""

from __future__ import annotations

import pytest
import torch

from convatlas.errors import UnknownName
from convatlas.networks.registry import create_model
from convatlas.nn.mixers.ela import ELA
from convatlas.surgery import insert
from convatlas.training.measure import count_parameters

# C -> parameters of T, B, S, L.
PUBLISHED = {
    64: (448, 576, 2688, 3712),
    256: (1792, 2304, 10752, 14848),
    512: (3584, 4608, 21504, 29696),
}


@pytest.mark.parametrize("channels", PUBLISHED)
def test_parameters(channels: int):
    assert tuple(count_parameters(ELA(channels, variant=variant)) for variant in "TBSL") == PUBLISHED[channels]


def test_gates_lie_between_zero_and_one_and_axes_can_be_exchanged():
    layer, x = ELA(16).double(), torch.rand(2, 16, 5, 7, dtype=torch.float64) + 0.1
    gates = layer(x) / x
    assert gates.min() > 0
    assert gates.max() < 1
    torch.testing.assert_close(layer(x.transpose(2, 3)), layer(x).transpose(2, 3))
    apart = ELA(16, shared=False).double()
    assert not torch.allclose(apart(x.transpose(2, 3)), apart(x).transpose(2, 3))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_without_weights_every_axis_halves(dims: int):
    layer = ELA(16)
    torch.nn.init.zeros_(layer.conv[0].weight)
    x = torch.randn(2, 16, *(5, 6, 7)[:dims])
    torch.testing.assert_close(layer(x), x / 2**dims)


def test_square_maps_run_as_one_batch_with_the_same_result():
    layer, x = ELA(32, variant="L").double(), torch.randn(2, 32, 6, 6, dtype=torch.float64)
    once = layer(x)
    gates = [
        layer.norm[0](layer.conv[0](x.mean(axis))).sigmoid().unsqueeze(axis)  # means over W, then over H
        for axis in (3, 2)
    ]
    torch.testing.assert_close(once, x * gates[0] * gates[1])


def test_placed_in_the_blocks_of_a_network():
    model = create_model("resnet18", depths=(1, 1), widths=(16, 32), stem_width=16, num_classes=3).eval()
    changed = insert(model, ELA, at="*.attention", variant="B")
    assert changed.changed == ("layer1.0.attention", "layer2.0.attention")
    assert changed.model(torch.randn(1, 3, 32, 32)).shape == (1, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 40, "variant": "T"}, "ELA-T needs channels divisible by 32, got 40"),
        ({"channels": 12, "variant": "S"}, "ELA-S needs channels divisible by 8, got 12"),
        ({"channels": 16, "kernel_size": 4}, "kernel_size must be odd, got 4"),
        ({"channels": 16, "groups": 3}, "groups must divide the 16 channels, got 3"),
        ({"channels": 16, "dims": 4}, "dims must be 1, 2 or 3, got 4"),
    ],
)
def test_impossible_settings_are_named(arguments: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        ELA(**arguments)  # type: ignore[arg-type]


def test_any_number_of_channels_and_unknown_variants():
    assert ELA(144, variant="T", num_groups="auto").num_groups == 24
    assert ELA(17, num_groups="auto").num_groups == 1
    with pytest.raises(UnknownName, match="unknown variant of ELA"):
        ELA(16, variant="X")  # type: ignore[arg-type]
