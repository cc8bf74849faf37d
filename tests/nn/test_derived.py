"""Weights computed from others: registering without a search, taking the place of a layer, giving it back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from convatlas.errors import Unsupported
from convatlas.nn.conv.derived import DerivedConv, derive, originals
from convatlas.nn.conv.geometry import as_tuple, geometry, plain_conv


class Outer(nn.Module):
    """A weight of one tap as an outer product."""

    def __init__(self, taps: int) -> None:
        super().__init__()
        self.taps = taps
        self.searches = 0

    def forward(self, rows: Tensor, columns: Tensor) -> Tensor:
        return (rows[:, None] * columns)[..., None].expand(-1, -1, self.taps)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        self.searches += 1
        return weight[:, 0, 0], weight[0, :, 0] / weight[0, 0, 0]


class Doubled(nn.Module):
    def forward(self, half: Tensor) -> Tensor:
        return 2 * half

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / 2


class OuterConv1d(DerivedConv, nn.Conv1d):
    def __init__(self, in_channels, out_channels, kernel_size, *place, device=None, dtype=None, gain=1.0, **more):
        if gain <= 0:
            raise ValueError(f"gain must be positive, got {gain}")
        super().__init__(in_channels, out_channels, kernel_size, *place, device=device, dtype=dtype, **more)
        values = [gain * torch.ones(size, device=device, dtype=dtype) for size in (out_channels, in_channels)]
        derive(self, Outer(*self.kernel_size), *values)


def test_the_values_become_parameters_and_nothing_is_searched():
    layer = OuterConv1d(3, 4, 2, gain=2.0)
    outer = layer.parametrizations.weight[0]
    assert outer.searches == 0
    rows, columns = originals(layer)
    assert (rows.shape, columns.shape) == ((4,), (3,))
    assert rows.requires_grad
    assert set(layer.state_dict()) == {"bias", "parametrizations.weight.original0", "parametrizations.weight.original1"}
    assert torch.equal(layer.weight, torch.full((4, 3, 2), 4.0))
    layer.weight = torch.tensor([[2.0, 4.0, 6.0]] * 4)[..., None].expand(4, 3, 2)
    assert outer.searches == 1
    assert columns.tolist() == [1, 2, 3]


def test_one_value_is_the_original():
    layer = nn.Linear(3, 2, device="meta")
    derive(layer, Doubled(), torch.ones(2, 3, dtype=torch.float64))
    assert set(layer.state_dict()) == {"bias", "parametrizations.weight.original"}
    assert torch.equal(layer.weight, torch.full((2, 3), 2.0, dtype=torch.float64))
    layer.weight = torch.zeros(2, 3, dtype=torch.float64)
    assert not originals(layer)[0].any()


def test_the_weight_is_computed_once_where_torch_is_asked_to_keep_it():
    layer = OuterConv1d(3, 4, 2)
    assert layer.weight is not layer.weight
    with nn.utils.parametrize.cached():
        assert layer.weight is layer.weight


def test_it_takes_the_place_of_a_frozen_layer_as_a_frozen_one():
    conv = nn.Conv1d(3, 4, 2, stride=2, dtype=torch.float64).requires_grad_(False).eval()
    layer = OuterConv1d.from_conv(conv)
    assert not layer.training
    assert layer.stride == (2,)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert torch.equal(layer.bias, conv.bias)
    torch.testing.assert_close(layer.weight[:, 0, 0], conv.weight[:, 0, 0])
    assert all(parameter.requires_grad for parameter in OuterConv1d.from_conv(nn.Conv1d(3, 4, 2)).parameters())


def test_a_copy_is_independent():
    layer = OuterConv1d(3, 4, 2)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        originals(twin)[0].zero_()
    assert not twin.weight.any()
    assert layer.weight.all()


def test_what_it_cannot_replace_is_told():
    with pytest.raises(Unsupported, match="it must be a Conv1d, got ConvTranspose1d"):
        OuterConv1d.from_conv(nn.ConvTranspose1d(3, 4, 2))
    with pytest.raises(Unsupported, match="it must be a Conv1d, got Conv2d"):
        OuterConv1d.from_conv(nn.Conv2d(3, 4, 2))
    with pytest.raises(Unsupported, match="it must be a Conv1d, got ParametrizedOuterConv1d"):
        OuterConv1d.from_conv(OuterConv1d(3, 4, 2))
    with pytest.raises(Unsupported, match="gain must be positive, got 0"):
        OuterConv1d.from_conv(nn.Conv1d(3, 4, 2), gain=0)


def test_plain_layers_have_the_same_geometry():
    conv = nn.Conv2d(4, 6, (3, 1), (2, 1), (1, 0), 2, 2, False, "reflect", dtype=torch.float64)
    transposed = nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, 2, True, 1)
    for layer, kind in ((conv, nn.Conv2d), (transposed, nn.ConvTranspose2d)):
        arguments = geometry(layer, 2, transposed=layer.transposed)
        twin = plain_conv(layer.eval())
        assert type(twin) is kind
        assert not twin.training
        assert geometry(twin, transposed=layer.transposed) == arguments
        assert str(kind(**arguments)) == str(layer) == str(twin)
        assert torch.equal(twin.weight, layer.weight)
        assert twin.weight.data_ptr() != layer.weight.data_ptr()
    with pytest.raises(Unsupported, match=r"must be a ConvTranspose1d or .* or ConvTranspose3d, got Conv2d"):
        geometry(conv, transposed=True)


def test_sizes_by_axis():
    assert as_tuple(3, 2, "stride") == (3, 3)
    assert as_tuple((3, 1), 2, "stride") == (3, 1)
    with pytest.raises(ValueError, match=r"stride must be one number or 2, got \(1, 2, 3\)"):
        as_tuple((1, 2, 3), 2, "stride")
