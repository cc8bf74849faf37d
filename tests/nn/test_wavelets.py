"""The wavelet transform as layers."""

from __future__ import annotations

import pytest
import torch

from convatlas.errors import UnknownName
from convatlas.nn.wavelets import DWT, IDWT
from convatlas.ops.wavelets import wavedec


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
