"""One-way convolutions and the other formats: their kernels, their evaluation, their start, whole models."""

from __future__ import annotations

import itertools
import math
import statistics
from typing import Any

import pytest
import torch
from torch import nn

from convatlas import load_weights
from convatlas.errors import UnknownName, Unsupported
from convatlas.nn.conv import one_way
from convatlas.nn.conv.kernel_formats import FORMATS
from convatlas.nn.conv.one_way import (
    OneWayConv1d,
    OneWayConv2d,
    OneWayConv3d,
    OneWayConvTranspose2d,
    compress_a_priori,
    compression_report,
    decompose,
)

CONVS = {(dims, False): getattr(one_way, f"OneWayConv{dims}d") for dims in (1, 2, 3)}
CONVS |= {(dims, True): getattr(one_way, f"OneWayConvTranspose{dims}d") for dims in (1, 2, 3)}


def test_kernel_is_the_sum_of_products():
    layer = OneWayConv2d(4, 6, (3, 2), groups=2, rank=2).double()
    channel, rows, columns = layer.factors
    for o, i, u, v in itertools.product(range(6), range(2), range(3), range(2)):
        expected = sum(channel[r, o, i] * rows[r, o, u] * columns[r, o, v] for r in range(2))
        torch.testing.assert_close(layer.weight[o, i, u, v], expected)
    turned = OneWayConvTranspose2d(4, 6, (3, 2), groups=2, rank=2).double()
    turned.load_state_dict(layer.state_dict())
    torch.testing.assert_close(turned.weight[3, 1], layer.weight[4, 1])  # input 3 and output 4 are in the second group


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_factor_by_factor_is_the_dense_kernel(dims: int, transposed: bool, name: str):
    place: dict[str, Any] = {"stride": (2, 1, 3)[:dims], "padding": (2, 0, 1)[:dims], "dilation": (1, 2, 1)[:dims]}
    if transposed:
        place["output_padding"] = (1, 0, 2)[:dims]
    layer = CONVS[dims, transposed](4, 6, (3, 2, 4)[:dims], **place, groups=2, rank=2, format=name).double()
    x = torch.randn(2, 4, *(7, 6, 5)[:dims], dtype=torch.float64)
    nn.init.normal_(layer.bias)
    layer.evaluation = "sequential"
    ours = layer(x)
    gradients = torch.autograd.grad(ours.square().sum(), list(layer.parameters()))
    layer.evaluation = "dense"
    torch.testing.assert_close(ours, layer(x))
    torch.testing.assert_close(gradients, torch.autograd.grad(layer(x).square().sum(), list(layer.parameters())))
    torch.testing.assert_close(ours, layer.to_conv()(x))


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # of torch, which copies for even kernels
@pytest.mark.parametrize("place", [{"padding": "same"}, {"padding": 1, "padding_mode": "circular"}], ids=str)
def test_paddings(place: dict[str, Any]):
    layer = OneWayConv2d(3, 4, (3, 2), **place, evaluation="sequential").double()
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer.to_conv()(x))


def test_output_size_of_a_transposed_convolution():
    layer = OneWayConvTranspose2d(3, 2, 3, stride=2, evaluation="sequential")
    x = torch.randn(1, 3, 4, 4)
    assert layer(x, [10, 9]).shape == (1, 2, 10, 9)
    torch.testing.assert_close(layer(x, [10, 9]), layer.to_conv()(x, [10, 9]))


def test_parameters_are_those_of_the_formulas():
    def count(layer: nn.Module) -> int:
        return sum(parameter.numel() for parameter in layer.parameters())

    with torch.device("meta"):
        assert count(OneWayConv2d(64, 64, 3)) == 64 * 70 + 64 == 4544
        assert count(nn.Conv2d(64, 64, 3)) == 36928
        assert count(OneWayConv3d(8, 6, (3, 5, 7), rank=3)) == 3 * 6 * (8 + 15) + 6
        assert count(OneWayConv1d(8, 6, 9, rank=2, bias=False)) == 2 * 6 * 17
        assert count(OneWayConv2d(8, 6, (3, 5), rank=4, format="cp_shared", bias=False)) == 4 * (8 + 6 + 3 + 5)
        assert count(OneWayConv2d(8, 6, (3, 5), rank=2, format="separable", bias=False)) == 2 * (8 * 6 + 8 * 15)
        assert count(OneWayConv2d(8, 6, (3, 5), rank=4, format="tucker2", bias=False)) == 4 * 8 + 16 * 15 + 4 * 6


@pytest.mark.parametrize("name", FORMATS)
def test_kernels_begin_with_the_variance_of_a_dense_one(name: str):
    torch.manual_seed(0)
    layer = OneWayConv2d(40, 300, (3, 5), rank=30, format=name, groups=2)
    assert not layer.bias.any()
    variances = []
    for _ in range(10):
        layer.reset_parameters()
        variances.append(layer.weight.detach().var().item())
    assert statistics.mean(variances) == pytest.approx(2 / (20 * 15), rel=0.1)


def test_a_dense_kernel_of_the_rank_is_found_again():
    for (_, transposed), kind in CONVS.items():
        layer = kind(6, 5, 3, rank=2).double()
        again = kind.from_conv(layer.to_conv(), rank=2)
        torch.testing.assert_close(again.weight, layer.weight, rtol=1e-8, atol=1e-8)
        assert again.transposed == transposed
    for name in FORMATS:
        layer = OneWayConv2d(8, 6, 3, groups=2, rank=2, format=name).double()
        again = OneWayConv2d.from_conv(layer.to_conv(), rank=2, format=name)
        torch.testing.assert_close(again.weight, layer.weight, rtol=1e-7, atol=1e-7)


def test_enough_terms_represent_any_kernel():
    conv = nn.Conv2d(20, 3, (3, 2)).double()
    torch.testing.assert_close(OneWayConv2d.from_conv(conv, rank=6).weight, conv.weight)
    few = [(OneWayConv2d.from_conv(conv, rank=rank).weight - conv.weight).norm().item() for rank in (1, 2, 4)]
    assert few[0] > few[1] > few[2] > 0


@pytest.mark.parametrize("name", FORMATS)
def test_normalised_filters_have_length_one_and_the_same_kernel(name: str):
    layer = OneWayConv2d(4, 6, 3, rank=5, groups=2, format=name).double()
    kernel = layer.weight.detach().clone()
    layer.normalise_filters()
    torch.testing.assert_close(layer.weight, kernel)
    _, *filters = layer.factors
    if name != "tucker2":
        for factor in filters:
            lengths = factor.flatten(2).norm(dim=2) if name in ("oneway", "separable") else factor.norm(dim=1)
            torch.testing.assert_close(lengths, torch.ones_like(lengths))
    else:
        inner = filters[1].unflatten(0, (2, 5))  # two orthonormal rows; those above the rank are zero
        torch.testing.assert_close((inner.mT @ inner).diagonal(dim1=1, dim2=2), torch.ones(2, 2, dtype=torch.float64))


def test_auto_takes_few_operations_of_wide_layers_only():
    def sequential(*sizes: int, **options: Any) -> bool:
        layer = OneWayConv2d(*sizes, **options)  # type: ignore[arg-type]
        return layer.sequential(torch.empty(1, sizes[0], 8, 8))

    assert sequential(64, 64, 3)
    assert not sequential(16, 64, 3)
    assert not sequential(64, 64, 3, stride=2)
    assert not sequential(64, 64, 3, rank=4)
    assert sequential(16, 16, 3, evaluation="sequential")
    assert not sequential(64, 64, 3, evaluation="dense")


@pytest.mark.parametrize("form", ["axis_{}", "axis{}"])
def test_factors_load_under_their_names(form: str):
    layer = OneWayConv2d(3, 4, (3, 5), rank=2)
    state = {"channel": torch.randn(2, 4, 3), form.format(0): torch.randn(2, 4, 3)}
    state |= {form.format(1): torch.randn(2, 4, 5), "bias": torch.randn(4)}
    report = load_weights(layer, state)
    assert not report.missing
    assert not report.unexpected
    for factor, name in zip(layer.factors, state, strict=False):
        torch.testing.assert_close(factor.detach(), state[name])


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, 4, 1))
        self.up = nn.ConvTranspose2d(4, 2, 4, stride=2, padding=1)
        self.thin = nn.Conv2d(2, 1, (1, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any."""
        return self.thin(self.up(self.body(self.stem(x))))


def test_compress_before_the_training():
    model = _Net()
    result = compress_a_priori(model, 2, skip="stem", example_input=torch.randn(1, 3, 8, 8))
    assert set(result.changed) == {"body.0", "up"}
    reasons = dict(result.skipped)
    assert reasons["body.2"] == "its kernel has one tap"
    assert reasons["thin"] == "it would have 10 weights instead of 4"
    assert not result.model.body[0].bias.any()  # fresh, not decomposed
    assert type(model.up) is nn.ConvTranspose2d
    report = compression_report(result.model)
    rows = report.sections[1].parts[0].rows
    assert rows[0][:4] == ("body.0", "5 x 5", 2 * 8 * 18, 8 * 8 * 25)
    assert report.summary.startswith(f"2 one-way layers have {(1600 + 128) / (288 + 48):.2f} times fewer")
    with pytest.raises(Unsupported, match="this _Net has no one-way convolution"):
        compression_report(model)
    with pytest.raises(Unsupported, match="computed from others already"):
        compress_a_priori(OneWayConv2d(4, 4, 3))


def test_decompose_after_the_training():
    torch.manual_seed(0)
    model, x = _Net(), torch.randn(1, 3, 8, 8)
    errors = []
    for rank in (1, 2):
        result = decompose(model, rank, skip="thin", example_input=x)
        report = compression_report(result.model, model)
        errors.append(float(report.sections[1].parts[0].rows[1][-1]))
        expected = (result.model.body[0].weight - model.body[0].weight).norm() / model.body[0].weight.norm()
        assert errors[-1] == pytest.approx(expected.item())
    assert errors[1] < errors[0]
    torch.testing.assert_close(result.model.body[0].bias, model.body[0].bias)


def test_bad_arguments_are_told():
    with pytest.raises(ValueError, match="rank must be a whole number of at least 1, got 0"):
        OneWayConv2d(3, 4, 3, rank=0)
    with pytest.raises(UnknownName, match="unknown format 'tucker'"):
        OneWayConv2d(3, 4, 3, format="tucker")
    with pytest.raises(UnknownName, match="unknown evaluation 'fast'"):
        OneWayConv2d(3, 4, 3, evaluation="fast")  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="one tap gains nothing by a rank above 1"):
        OneWayConv2d(3, 4, 1, rank=2)
    with pytest.raises(ValueError, match="rank must be a whole number"):
        compress_a_priori(_Net(), 0)
    assert math.isclose(OneWayConv2d(9, 4, 3).kernel_format.macs, 4 * 15)
