"""Fourier convolution of time series beyond what the battery tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from convatlas.nn.fourier_conv import FourierConv1d


def stirred(*arguments: Any, **options: Any) -> FourierConv1d:
    layer = FourierConv1d(*arguments, **options).double()
    torch.nn.init.normal_(layer.bias)
    return layer


def kernels(layer: FourierConv1d, length: int) -> torch.Tensor:
    return torch.fft.irfft(torch.view_as_complex(layer.weight), n=length)


@pytest.mark.parametrize("length", [8, 9])
def test_all_frequencies_are_a_circular_convolution(length: int):
    layer, x = stirred(2, 3, length), torch.randn(2, 2, length, dtype=torch.float64)
    kernel = kernels(layer, length)
    expected = layer.bias[:, None] + sum(
        torch.einsum("oi,bi->bo", kernel[..., lag], x.roll(lag, -1)[..., t])[..., None] * torch.eye(length)[t]
        for lag in range(length)
        for t in range(length)
    )
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x.roll(3, -1)), layer(x).roll(3, -1))


@pytest.mark.parametrize(("options", "kept"), [({"modes": 3}, (0, 2)), ({"band": (2, 4)}, (2, 4))], ids=str)
def test_nothing_comes_from_other_frequencies(options: dict[str, Any], kept: tuple[int, int]):
    layer = FourierConv1d(2, 2, 12, bias=False, **options).double()
    spectrum = torch.fft.rfft(layer(torch.randn(1, 2, 12, dtype=torch.float64))).abs()
    inside = torch.zeros(7, dtype=torch.bool)
    inside[kept[0] : kept[1] + 1] = True
    assert spectrum[..., inside].min() > 1e-3
    assert spectrum[..., ~inside].max() < 1e-12


def test_linear_padding_does_not_reach_around():
    layer = FourierConv1d(1, 1, 10, padding="linear", bias=False).double()
    x = torch.zeros(1, 1, 10, dtype=torch.float64)
    x[..., 7] = 1.0
    kernel = kernels(layer, 20)[0, 0]
    expected = torch.stack([kernel[(t - 7) % 20] for t in range(10)])
    torch.testing.assert_close(layer(x)[0, 0], expected)


@pytest.mark.parametrize("length", [6, 40])
def test_series_of_other_lengths_keep_their_low_frequencies(length: int):
    layer = FourierConv1d(1, 1, 16, modes=3, bias=False).double()
    time = torch.arange(length, dtype=torch.float64) / length
    wave = torch.cos(2 * torch.pi * 2 * time)[None, None]
    gain = torch.view_as_complex(layer.weight)[0, 0, 2]
    expected = (gain * torch.polar(torch.ones(1).double(), 2 * torch.pi * 2 * time)).real
    torch.testing.assert_close(layer(wave)[0, 0], expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 0}, "in_channels, out_channels and length must be at least 1, got 2, 3, 0"),
        ({"modes": 6}, "frequencies must be from 0 to 4 for length 8, got modes 6"),
        ({"band": (3, 2)}, r"frequencies must be from 0 to 4 for length 8, got band \(3, 2\)"),
        ({"modes": 2, "band": (0, 1)}, r"modes and band exclude each other, got 2 and \(0, 1\)"),
        ({"padding": "same"}, "padding must be 'circular' or 'linear', got 'same'"),
    ],
)
def test_impossible_settings_are_named(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        FourierConv1d(**{"in_channels": 2, "out_channels": 3, "length": 8, **arguments})


def test_wrong_series_are_named():
    with pytest.raises(ValueError, match=r"x must be \(B, 2, T\), got \(1, 3, 8\)"):
        FourierConv1d(2, 3, 8)(torch.zeros(1, 3, 8))
    with pytest.raises(ValueError, match="there must be a frequency from first up to T / 2, got first 3, T 4"):
        FourierConv1d(2, 3, 8, band=(3, 4))(torch.zeros(1, 2, 4))
