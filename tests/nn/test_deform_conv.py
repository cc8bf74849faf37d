"""Deformable convolution beyond what the battery tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from convatlas.nn.conv.deform_conv import DeformConv2d, GivenOffsetConv2d
from convatlas.ops.backend import OPERATORS
from convatlas.ops.deform_conv import deform_conv2d

BACKENDS = OPERATORS["deform_conv2d"].names


@pytest.mark.parametrize("options", [{}, {"offset_groups": 2}, {"modulated": True, "offset_groups": 4}], ids=str)
def test_a_new_layer_computes_the_convolution_it_replaces(options: dict[str, Any]):
    conv = nn.Conv2d(8, 6, 3, stride=2, padding=1, groups=2).double()
    layer, x = DeformConv2d.from_conv(conv, **options), torch.randn(2, 8, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), conv(x))
    assert not layer.conv_offset.weight.any()
    assert layer.to_conv() is None


def test_names_and_shapes_are_those_of_the_authors():
    shapes = {
        "weight": (256, 256, 3, 3),
        "bias": (256,),
        "conv_offset.weight": (18, 256, 3, 3),
        "conv_offset.bias": (18,),
    }
    with torch.device("meta"):
        plain = DeformConv2d(256, 256, 3, padding=1)
        modulated = DeformConv2d(4, 4, (3, 2), bias=False, offset_groups=2, modulated=True)
    assert {name: tuple(value.shape) for name, value in plain.state_dict().items()} == shapes
    assert set(modulated.state_dict()) == {"weight", "conv_offset.weight", "conv_offset.bias"}
    assert modulated.conv_offset.weight.shape == (36, 4, 3, 2)


def test_channels_of_the_offsets_are_down_then_right_and_then_the_modulation():
    layer = DeformConv2d(2, 3, (1, 2), padding="valid", bias=False, modulated=True).double()
    x = torch.randn(1, 2, 6, 7, dtype=torch.float64)
    with torch.no_grad():
        layer.conv_offset.bias.copy_(torch.tensor([2.0, -1.0, 0.0, 3.0, 0.7, -0.3]))
    # Tap 0 reads two rows below and a column to the left, tap 1 three columns to the right.
    wide = F.pad(x, (1, 4, 0, 2))
    first, second = wide[:, :, 2:, :6], wide[:, :, :6, 5:11]
    weights = layer.weight * torch.sigmoid(torch.tensor([0.7, -0.3], dtype=torch.float64))
    expected = F.conv2d(first, weights[..., :1]) + F.conv2d(second, weights[..., 1:])
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_interpolates_within_and_beyond_the_border(backend: str):
    x = torch.tensor([[[[4.0, 8.0]]]])
    places = torch.tensor([[0.0, -1.5], [0.0, -0.25], [0.5, 0.25], [0.0, 1.75], [-1.0, 0.0], [1e6, -1e6]])
    # An output as long as the list of places, of a tap that would read the first pixel everywhere.
    stride = torch.arange(len(places)) * 2
    offset = (places - torch.stack([torch.zeros(len(places)), stride], 1)).T.reshape(1, 2, 1, -1)
    wide = F.pad(x, (0, 9))
    y = deform_conv2d(wide, offset, torch.ones(1, 1, 1, 1), None, (1, 2), backend=backend)
    torch.testing.assert_close(y.flatten(), torch.tensor([0.0, 3.0, 2.5, 2.0, 0.0, 0.0]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_derivative_on_a_pixel_is_that_to_the_right_and_down(backend: str):
    x = torch.tensor([[[[1.0, 5.0], [2.0, 9.0]]]])
    offset = torch.zeros(1, 2, 2, 2, requires_grad=True)
    deform_conv2d(x, offset, torch.ones(1, 1, 1, 1), backend=backend).sum().backward()
    assert offset.grad is not None
    assert offset.grad[0, 0].tolist() == [[1.0, 4.0], [-2.0, -9.0]]
    assert offset.grad[0, 1].tolist() == [[4.0, -5.0], [7.0, -9.0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_samples_and_no_positions(backend: str):
    weight = torch.randn(4, 2, 1, 2, requires_grad=True)
    for batch, width in ((0, 5), (2, 1)):
        x = torch.randn(batch, 4, 3, width, requires_grad=True)
        y = deform_conv2d(x, torch.randn(batch, 4, 3, width - 1), weight, backend=backend)
        assert y.shape == (batch, 4, 3, width - 1)
        y.sum().backward()
        assert x.grad is not None
        assert not x.grad.any()


def test_offsets_from_outside():
    layer, own = (
        GivenOffsetConv2d(4, 3, 3, padding=1, offset_groups=2),
        DeformConv2d(4, 3, 3, padding=1, offset_groups=2),
    )
    own.load_state_dict(layer.state_dict(), strict=False)
    nn.init.normal_(own.conv_offset.weight)
    x = torch.randn(2, 4, 5, 6)
    offset, mask = own.offsets(x)
    assert mask is None
    torch.testing.assert_close(layer(x, offset), own(x))
    torch.testing.assert_close(layer(x, offset, torch.zeros(2, 18, 5, 6)), layer.bias[:, None, None].expand(2, 3, 5, 6))


def test_exported_programs_hold_plain_gathers():
    layer, x = DeformConv2d(2, 2, 3, padding=1).eval(), torch.randn(1, 2, 4, 5)
    program = torch.export.export(layer, (x,), strict=False)
    names = {str(node.target) for node in program.graph.nodes}
    assert "aten.gather.default" in names
    assert not any("embedding_bag" in name for name in names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"padding_mode": "reflect"}, "padding_mode must be 'zeros', got 'reflect'"),
        ({"groups": 3}, "groups must divide in_channels and out_channels, .* got 3 and 1 for 4 and 6"),
        ({"offset_groups": 3}, "and offset_groups in_channels, got 1 and 3 for 4 and 6"),
        ({"kernel_size": 0}, "kernel_size must be at least 1, got 0"),
        ({"padding": "same", "stride": 2}, "padding must be a number, or 'same' with stride 1"),
    ],
)
def test_impossible_settings_are_named(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        DeformConv2d(**{"in_channels": 4, "out_channels": 6, "kernel_size": 3, **arguments})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offset": (2, 17, 5, 5)}, r"offset must have 2 \* 9 channels for each of a number of groups .* 4, got 17"),
        ({"offset": (2, 18, 5, 4)}, r"offset must be \(2, n, 5, 5\), got \(2, 18, 5, 4\)"),
        ({"mask": (2, 18, 5, 5)}, r"mask must be \(2, 9, 5, 5\), got \(2, 18, 5, 5\)"),
        ({"bias": (5,)}, r"bias must be \(6,\), got \(5,\)"),
        ({"weight": (6, 3, 3, 3)}, r"weight must be \(O, C / groups, kh, kw\) for C = 4"),
        ({"x": (2, 4, 5)}, r"x, offset and weight must be \(B, C, H, W\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change: dict[str, tuple[int, ...]], message: str):
    shapes = {"x": (2, 4, 5, 5), "offset": (2, 18, 5, 5), "weight": (6, 4, 3, 3), **change}
    with pytest.raises(ValueError, match=message):
        deform_conv2d(padding=1, **{name: torch.zeros(shape) for name, shape in shapes.items()})
