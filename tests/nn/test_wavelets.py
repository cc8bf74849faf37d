"""The wavelet transform as layers."""

from __future__ import annotations

import pytest
import torch

from convatlas.errors import UnknownName
from convatlas.nn.wavelets import DWT, IDWT, DWTConv
from convatlas.ops.wavelets import dwt, wavedec


@pytest.mark.parametrize("size", [(11,), (9, 12), (5, 4, 7)])
def test_layers_invert_each_other(size: tuple[int, ...]):
    x = torch.randn(2, 3, *size)
    forward, back = DWT("db2", levels=2, mode="reflect"), IDWT("db2", mode="reflect")
    torch.testing.assert_close(forward(x), wavedec(x, "db2", "reflect", 2))
    torch.testing.assert_close(back(forward(x), size), x)
    assert not [*forward.state_dict(), *back.state_dict()]


def test_options_are_shown_and_checked():
    assert repr(DWT("db2", levels=2, mode="zero")) == "DWT('db2', levels=2, mode='zero')"
    assert repr(IDWT()) == "IDWT('haar', mode='symmetric')"
    with pytest.raises(ValueError, match="levels must be at least 1, got 0"):
        DWT(levels=0)
    with pytest.raises(UnknownName, match="unknown mode 'reflection': did you mean reflect"):
        DWT(mode="reflection")
    with pytest.raises(UnknownName, match=r"unknown wavelet 'bior4\.5'"):
        IDWT("bior4.5")


@pytest.mark.parametrize(("dims", "wavelet"), [(1, "haar"), (2, "haar"), (3, "haar"), (2, "db2"), (3, "db1")])
def test_a_wavelet_unit_is_a_transform_and_two_convolutions(dims: int, wavelet: str):
    unit = DWTConv(3, 2, dims=dims, wavelet=wavelet).double()
    x = torch.randn(2, 3, *(6, 4, 8)[:dims], dtype=torch.float64)
    bands = dwt(x, wavelet, "periodization", backend="naive").transpose(1, 2).flatten(1, 2)
    low, high = unit(x)
    torch.testing.assert_close(low, unit.low(bands[:, :3]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(high, unit.high(bands[:, 3:]), rtol=1e-12, atol=1e-12)


def test_constant_volumes_are_low_pass_only():
    unit = DWTConv(1, 1).double()
    for conv in (unit.low, unit.high):
        torch.nn.init.ones_(conv.weight)
        torch.nn.init.zeros_(conv.bias)
    low, high = unit(torch.full((1, 1, 4, 4, 4), 3.0, dtype=torch.float64))
    torch.testing.assert_close(low, torch.full((1, 1, 2, 2, 2), 3 * 2**1.5, dtype=torch.float64))
    assert high.abs().max() < 1e-12


def test_odd_lengths_of_a_wavelet_unit():
    x = torch.randn(1, 2, 5, 4, 3)
    with pytest.raises(ValueError, match="size 5 on axis 2 is odd"):
        DWTConv(2, 3)(x)
    padded = DWTConv(2, 3, odd="zero")
    whole = torch.nn.functional.pad(x, (0, 1, 0, 0, 0, 1))
    for ours, theirs in zip(padded(x), padded(whole), strict=True):
        assert torch.equal(ours, theirs)
    for call, message in (
        (lambda: DWTConv(0, 1), "in_channels must be at least 1"),
        (lambda: DWTConv(1, 1, dims=4), "dims must be 1, 2 or 3"),
        (lambda: DWTConv(1, 1, odd="repeat"), "unknown odd 'repeat'"),
        (lambda: DWTConv(1, 1)(torch.zeros(1, 2, 4, 4, 4)), r"x must be \(B, 1, D, H, W\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
