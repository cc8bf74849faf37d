"""Tiled inference: exact where the overlap covers the reach, weights that sum to one, every number of axes, sizes."""

from __future__ import annotations

from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from convatlas.errors import UnknownName
from convatlas.ops.tiling import tiled
from convatlas.training.measure import peak_bytes


def network(dims: int, scale: int = 1) -> nn.Module:
    """Reach 2 + 1 = 3, so that an overlap of 6 is enough; zeros outside."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    layers = [conv(2, 4, 5, padding=2), nn.Tanh(), conv(4, 3, 3, padding=1)]
    return nn.Sequential(*layers, nn.Upsample(scale_factor=scale)).double().requires_grad_(False)


@pytest.mark.parametrize(
    ("lengths", "tile", "overlap"),
    [
        ((101,), 16, 6),
        ((37, 53), 16, 6),
        ((37, 53), (16, 21), (6, 9)),
        ((37, 53), 8, 7),
        ((37, 5), 11, 6),
        ((9, 8), 64, 6),
        ((17, 19, 23), (9, 10, 30), 6),
        ((16, 26), 16, 6),
    ],
)
@pytest.mark.parametrize("scale", [1, 3])
def test_exact_where_the_overlap_covers_the_reach(
    lengths: tuple[int, ...], tile: int | tuple[int, ...], overlap: int | tuple[int, ...], scale: int
) -> None:
    model = network(len(lengths), scale)
    x = torch.randn(2, 2, *lengths, dtype=torch.float64)
    for batch_size in (1, 5):
        result = tiled(model, x, tile=tile, overlap=overlap, scale=scale, batch_size=batch_size)
        torch.testing.assert_close(result, model(x), rtol=1e-12, atol=1e-12)


def test_less_overlap_shows_seams() -> None:
    model, x = network(2), torch.randn(1, 2, 37, 53, dtype=torch.float64)
    assert (tiled(model, x, tile=16, overlap=4) - model(x)).abs().max() > 1e-3


@pytest.mark.parametrize("window", ["flat", "linear", "hann", "gaussian"])
@pytest.mark.parametrize(("tile", "overlap"), [(10, 0), (10, 1), (10, 4), (10, 9), (7, 5), (50, 3)])
def test_weights_sum_to_one(window: str, tile: int, overlap: int) -> None:
    x = torch.randn(1, 2, 23, 31, dtype=torch.float64)
    options = {"tile": tile, "overlap": overlap, "window": window}
    torch.testing.assert_close(tiled(lambda part: part, x, **options), x)
    doubled = tiled(lambda part: part.repeat_interleave(2, -1), x, scale=(1, 2), **options)
    torch.testing.assert_close(doubled, x.repeat_interleave(2, -1))


@pytest.mark.parametrize(("window", "middle"), [("linear", [1 / 8, 3 / 8, 5 / 8, 7 / 8]), ("hann", None)])
def test_blending_goes_from_one_tile_to_the_next(window: str, middle: list[float] | None) -> None:
    numbers = iter(range(2))

    def number_of_the_call(part: Tensor) -> Tensor:
        return torch.full_like(part, next(numbers))

    result = tiled(number_of_the_call, torch.zeros(1, 1, 16, dtype=torch.float64), tile=10, overlap=4, window=window)
    values = result[0, 0]
    assert values[:6].tolist() == [0] * 6
    assert values[10:].tolist() == [1] * 6
    assert (values[6:10].diff() > 0).all()
    torch.testing.assert_close(values[6:10] + values[6:10].flip(0), torch.ones(4, dtype=torch.float64))
    if middle:
        torch.testing.assert_close(values[6:10], torch.tensor(middle, dtype=torch.float64))


def test_shrinking_functions() -> None:
    x = torch.randn(2, 3, 24, 18, dtype=torch.float64)
    pool = nn.AvgPool2d(2)
    result = tiled(pool, x, tile=(8, 6), overlap=2, scale=Fraction(1, 2))
    torch.testing.assert_close(result, pool(x))


def test_calls_batches_and_progress() -> None:
    shapes, steps = [], []

    def watched(part: Tensor) -> Tensor:
        shapes.append(tuple(part.shape))
        return part

    x = torch.randn(2, 1, 40)
    tiled(watched, x, tile=10, overlap=2, batch_size=2, progress=lambda *counts: steps.append(counts))
    assert shapes == [(4, 1, 10), (4, 1, 10), (2, 1, 10)]
    assert steps == [(2, 5), (4, 5), (5, 5)]


def test_types_devices_and_gradients() -> None:
    x = torch.randn(1, 1, 20, dtype=torch.bfloat16)
    assert tiled(lambda part: part, x, tile=8, overlap=4, window="hann").dtype == torch.bfloat16
    labels = tiled(lambda part: (part > 0).long(), x, tile=8, overlap=4)
    assert torch.equal(labels, (x > 0).long())
    assert tiled(lambda part: part, x, tile=8, device="cpu").device.type == "cpu"
    y = torch.randn(1, 1, 9, dtype=torch.float64, requires_grad=True)
    for window in ("flat", "linear"):
        assert torch.autograd.gradcheck(
            lambda y, window=window: tiled(torch.square, y, tile=4, overlap=2, window=window), (y,)
        )


def test_bad_input() -> None:
    x = torch.zeros(1, 1, 20, 20)

    def same(part: Tensor) -> Tensor:
        return part

    with pytest.raises(ValueError, match=r"x must be \(B, C, \*positions\) and not empty, got \(1, 1\)"):
        tiled(same, x[..., 0, 0], tile=8)
    with pytest.raises(ValueError, match="overlap must be at least 0 and smaller than the tile, got 8 with tile 8"):
        tiled(same, x, tile=8, overlap=8)
    with pytest.raises(ValueError, match=r"tile must be one number or 2, got \(8, 8, 8\)"):
        tiled(same, x, tile=(8, 8, 8))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        tiled(same, x, tile=8, batch_size=0)
    with pytest.raises(ValueError, match="scale must be positive, got 0"):
        tiled(same, x, tile=8, scale=0)
    with pytest.raises(ValueError, match="overlap times scale must be whole"):
        tiled(same, x, tile=8, overlap=3, scale=Fraction(1, 2))
    with pytest.raises(UnknownName, match="did you mean hann"):
        tiled(same, x, tile=8, window="han")
    with pytest.raises(ValueError, match=r"function must turn \(1, 1, 8, 8\) into \(1, C, 16, 16\) at scale 2, got"):
        tiled(same, x, tile=8, scale=2)
    with pytest.raises(ValueError, match="window must be 'flat' for a function that gives"):
        tiled(Tensor.long, x, tile=8, overlap=2, window="hann")


def test_gaussian_weights_trust_the_middle_of_a_tile() -> None:
    def marks_borders(part: Tensor) -> Tensor:
        y = torch.zeros_like(part)
        y[..., 0] = y[..., -1] = 1
        return y

    x = torch.zeros(1, 1, 100)
    seams = tiled(marks_borders, x, tile=32, overlap=16, window="gaussian")[0, 0]
    assert float(seams[1:-1].max()) < 0.05
    assert seams[0] == seams[-1] == 1


def test_a_result_that_the_memory_does_not_hold(tmp_path: Path) -> None:
    x = torch.randn(1, 1, 12, 9, 10)
    mapped = np.memmap(tmp_path / "result", np.float32, "w+", shape=(1, 1, 24, 18, 20))
    mapped[:] = 7
    out = torch.from_numpy(mapped)
    options = {"tile": 6, "overlap": 2, "scale": 2, "window": "gaussian"}
    model = nn.Upsample(scale_factor=2)
    assert tiled(model, x, out=out, **options) is out
    torch.testing.assert_close(torch.from_numpy(np.array(mapped)), tiled(model, x, **options))
    with pytest.raises(ValueError, match="out must be"):
        tiled(model, x, out=out[..., :19], **options)


def test_memory_does_not_grow_with_the_volume(tmp_path: Path) -> None:
    taken = []
    for side in (16, 32):
        x = torch.zeros(1, 1, side, side, side)
        out = torch.from_numpy(np.memmap(tmp_path / str(side), np.float32, "w+", shape=(1, 1, *[2 * side] * 3)))
        call = partial(tiled, nn.Upsample(scale_factor=2), x, tile=8, overlap=4, scale=2, window="gaussian", out=out)
        taken.append(peak_bytes(call))
    assert taken[1] <= 1.05 * taken[0]
