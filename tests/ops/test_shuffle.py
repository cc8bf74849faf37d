"""Pixel shuffle: the definition position by position, torch, both orders, other dimensions, choice of the backend."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from convatlas.errors import UnknownName, Unsupported
from convatlas.ops.backend import OPERATORS, chosen
from convatlas.ops.shuffle import pixel_shuffle, pixel_unshuffle

CASES = Path(__file__).parents[1] / "golden" / "cases"
BACKENDS = ["naive", "view", "torch"]


def test_every_backend_is_tried_here() -> None:
    for name in ("pixel_shuffle", "pixel_unshuffle"):
        assert OPERATORS[name].names == tuple(BACKENDS)


@pytest.mark.parametrize("order", ["CRD", "DCR"])
@pytest.mark.parametrize("backend", ["naive", "view"])
def test_definition(order: str, backend: str) -> None:
    x = torch.randn(2, 2 * 6, 3, 2)
    result = pixel_shuffle(x, (2, 3), order, backend=backend)
    assert result.shape == (2, 2, 6, 6)
    for channel, row, column in itertools.product(range(2), range(6), range(6)):
        place = 3 * (row % 2) + column % 3
        source = channel * 6 + place if order == "CRD" else place * 2 + channel
        assert torch.equal(result[:, channel, row, column], x[:, source, row // 2, column // 3])


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("shape", [(1, 9, 4, 5), (2, 18, 1, 7), (1, 9, 70, 80)])
def test_equals_torch(backend: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    for layout in (torch.contiguous_format, torch.channels_last):
        expected = F.pixel_shuffle(x, 3)
        moved = x.contiguous(memory_format=layout)
        assert torch.equal(pixel_shuffle(moved, 3, backend=backend), expected)
        assert torch.equal(pixel_unshuffle(expected.contiguous(memory_format=layout), 3, backend=backend), x)


def test_stored_reference() -> None:
    stored = load_file(CASES / "espcn" / "subpixel_icnr.safetensors")
    features = F.conv2d(stored["input.x"], stored["input.weight"], stored["input.bias"], padding=1)
    torch.testing.assert_close(pixel_shuffle(features, 3), stored["output.y"], atol=1e-5, rtol=1e-5)
    assert torch.equal(pixel_unshuffle(stored["output.y"], 3), stored["output.unshuffled"])


@pytest.mark.parametrize("order", ["CRD", "DCR"])
@pytest.mark.parametrize(("shape", "factor"), [((2, 6, 5), 3), ((1, 16, 3, 2, 1), 2), ((2, 12, 3, 2, 5), (1, 2, 3))])
def test_other_dimensions(order: str, shape: tuple[int, ...], factor: int | tuple[int, ...]) -> None:
    x = torch.randn(shape)
    result = pixel_shuffle(x, factor, order)
    assert torch.equal(result, pixel_shuffle(x, factor, order, backend="naive"))
    assert torch.equal(pixel_unshuffle(result, factor, order), x)
    assert torch.equal(pixel_unshuffle(result, factor, order, backend="naive"), x)


def test_any_type() -> None:
    x = torch.arange(16, dtype=torch.uint8).view(1, 4, 2, 2)
    assert pixel_shuffle(x, 2).tolist() == [[[[0, 4, 1, 5], [8, 12, 9, 13], [2, 6, 3, 7], [10, 14, 11, 15]]]]


def test_choice() -> None:
    for name in ("pixel_shuffle", "pixel_unshuffle"):
        assert chosen(name, torch.zeros(1, 4, 4, 4), 2) == "torch"
        assert chosen(name, torch.zeros(1, 4, 4, 4), (2, 2), "DCR") == "view"
        assert chosen(name, torch.zeros(1, 4, 100, 100), (2, 2), "CRD") == "view"
        assert chosen(name, torch.zeros(1, 4, 100), (2,), "CRD") == "view"
        wide = torch.zeros(1, 64, 32, 32)
        assert chosen(name, wide, (2, 2), "CRD") == "view"
        assert chosen(name, wide.to(memory_format=torch.channels_last), (2, 2), "CRD") == "torch"


def test_bad_input() -> None:
    x = torch.zeros(1, 9, 4, 4)
    with pytest.raises(ValueError, match="x must have a multiple of 4 channels for factor 2, got 9"):
        pixel_shuffle(x, 2)
    with pytest.raises(ValueError, match=r"positions of x must be multiples of factor 3, got \(4, 4\)"):
        pixel_unshuffle(x, 3)
    with pytest.raises(ValueError, match="factor must be positive, one or 2 numbers, got 0"):
        pixel_shuffle(x, 0)
    with pytest.raises(ValueError, match=r"factor must be positive, one or 2 numbers, got \(3,\)"):
        pixel_shuffle(x, (3,))
    with pytest.raises(ValueError, match=r"x must be \(B, C, \*positions\), got \(9, 4\)"):
        pixel_shuffle(x[0, :, 0], 3)
    with pytest.raises(UnknownName, match="order 'CDR'"):
        pixel_shuffle(x, 3, "CDR")
    with pytest.raises(Unsupported, match="it takes images, one factor and order CRD"):
        pixel_shuffle(x, 3, "DCR", backend="torch")
