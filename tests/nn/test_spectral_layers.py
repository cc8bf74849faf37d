from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from convatlas.nn.t1_layer import T1Layer
from convatlas.nn.transform_conv import DCTConv, DFTConv


def test_a_layer_is_its_equations():
    torch.manual_seed(0)
    layer = T1Layer(3, (4, 2), points=40).double()
    x = torch.randn(2, 3, 8, 5, dtype=torch.float64)
    low = x[:, :, :4, :2]
    z = F.gelu(torch.einsum("bixy,ioxy->boxy", low, layer.ch_mixing_1))
    z = torch.einsum("bcix,ioc->bcox", z, layer.spatial_mixing_1)
    z = torch.einsum("bcyi,ioc->bcyo", z, layer.spatial_mixing_2)
    expected = torch.zeros_like(x)
    expected[:, :, :4, :2] = z + low
    torch.testing.assert_close(layer(x), expected)
    layer.keep_high = True
    # Rows beyond the box pass except for the last four, which the columns beyond it hold alone.
    expected[:, :, 4:-4] = x[:, :, 4:-4]
    expected[:, :, :, 2:] = x[:, :, :, 2:]
    torch.testing.assert_close(layer(x), expected)


def test_without_mixing_of_modes_it_is_a_low_pass():
    layer = T1Layer(3, (2, 2, 2), points=60)
    torch.nn.init.zeros_(layer.get_parameter("spatial_mixing_2"))
    x = torch.randn(1, 3, 5, 4, 3)
    y = layer(x)
    torch.testing.assert_close(y[..., :2, :2, :2], x[..., :2, :2, :2], rtol=0, atol=0)
    assert y.count_nonzero() == 3 * 8


@pytest.mark.parametrize("dims", [1, 2])
def test_variance_at_the_beginning(dims: int):
    torch.manual_seed(0)
    x = torch.randn(4, 16, *[32] * dims)
    options = {"in_channels": 16, "out_channels": 16, "modes": [8] * dims, "points": 32**dims}

    def variance(kind: type, **more: object) -> float:
        return kind(**options, **more)(x).var().item()

    assert variance(DCTConv) == pytest.approx(1, rel=0.2)
    assert variance(DFTConv) == pytest.approx(1, rel=0.2)
    assert variance(DFTConv, legacy=True) == pytest.approx(1.9, rel=0.2)
    assert variance(DCTConv, init="naive") < 1e-3
    assert variance(DFTConv, init="zero") < 1e-12
    assert variance(DCTConv, init="vp") == pytest.approx(dims, rel=0.25)  # in two corners of a plane


@pytest.mark.parametrize("kind", [DCTConv, DFTConv])
def test_convolutions_have_exact_gradients(kind: type):
    torch.manual_seed(0)
    layer = kind(2, 3, (2, 1, 2), points=60).double()
    x = torch.randn(1, 2, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    assert sum(1 for _ in layer.parameters()) == 4

    def call(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        named = {f"weights{number}": weight for number, weight in enumerate(weights, 1)}
        return torch.func.functional_call(layer, named, (x,))

    assert torch.autograd.gradcheck(call, (x, *layer.parameters()), fast_mode=True)


def test_bad_input():
    with pytest.raises(ValueError, match=r"channels, modes and points must be at least 1, got 0, \(2,\) and 8"):
        T1Layer(0, (2,), points=8)
    with pytest.raises(ValueError, match="unknown init 'lecun'"):
        DCTConv(2, 2, (2,), points=8, init="lecun")  # type: ignore[arg-type]
    layer = T1Layer(2, (3,), points=8)
    with pytest.raises(ValueError, match=r"x must have at least the modes \(3,\), got \(2,\)"):
        layer(torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match=r"x must have 2 channels and 1 axes, got \(1, 3, 8\)"):
        DFTConv(2, 2, (3,), points=8)(torch.zeros(1, 3, 8))
    with pytest.raises(ValueError, match="x must be real floating point"):
        DCTConv(2, 2, (3,), points=8)(torch.zeros(1, 2, 8, dtype=torch.cfloat))
