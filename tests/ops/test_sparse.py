"""Sparse tensors, rulebooks and sparse convolution against torch's dense ones."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.ops.sparse import (
    Kernel,
    Rulebook,
    SparseTensor,
    conv_rulebook,
    rulebook,
    sparse_conv,
    sparse_max_pool,
    sparse_mean,
    submanifold_rulebook,
    transposed_rulebook,
)

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
SHAPES = [(11,), (7, 6), (5, 7, 4)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def sparse(shape: tuple[int, ...], share: float = 0.3, channels: int = 3, batch: int = 2) -> SparseTensor:
    """Random features at random places, in random order."""
    places = (torch.rand(batch, *shape) < share).nonzero().int()
    places = places[torch.randperm(len(places))]
    return SparseTensor(torch.randn(len(places), channels, dtype=torch.float64), places, shape, batch)


def geometry(dims: int, size: int, stride: int = 1, padding: int = 0, dilation: int = 1) -> Kernel:
    return Kernel(*((number,) * dims for number in (size, stride, padding, dilation)))


def at(grid: Tensor, indices: Tensor) -> Tensor:
    """Rows of a dense grid (B, C, *sizes) at places."""
    return grid.movedim(1, -1)[tuple(indices.long().unbind(1))]


def rest(grid: Tensor, indices: Tensor) -> Tensor:
    """A dense grid with zeros at places."""
    grid = grid.movedim(1, -1).clone()
    grid[tuple(indices.long().unbind(1))] = 0
    return grid


def weights(kernel: Kernel, c_in: int = 3, c_out: int = 4) -> tuple[Tensor, Tensor]:
    weight = torch.randn(c_out, *kernel.size, c_in, dtype=torch.float64)
    return weight, torch.randn(c_out, dtype=torch.float64)


# Convolution


@shapes
@pytest.mark.parametrize("numbers", [(2, 2), (3, 2, 1), (3, 1, 0), (2, 1, 1, 2), (3, 3, 2, 2)], ids=str)
def test_convolution_is_the_dense_one_at_every_reached_place(shape: tuple[int, ...], numbers: tuple[int, ...]):
    x, kernel = sparse(shape), geometry(len(shape), *numbers)
    found = conv_rulebook(x.indices, x.spatial_shape, x.batch_size, kernel)
    weight, bias = weights(kernel)
    dense = CONV[len(shape)](x.dense(), weight.movedim(-1, 1), None, kernel.stride, kernel.padding, kernel.dilation)
    assert found.output_shape == tuple(dense.shape[2:])
    torch.testing.assert_close(sparse_conv(x.features, found, weight, bias), at(dense, found.output_indices) + bias)
    assert not rest(dense, found.output_indices).any()
    keys = [tuple(row) for row in found.output_indices.tolist()]
    assert keys == sorted(set(keys))


@shapes
@pytest.mark.parametrize(("size", "dilation"), [(1, 1), (3, 1), (5, 1), (3, 2)])
def test_submanifold_convolution_is_the_dense_one_at_the_places_of_the_input(
    shape: tuple[int, ...], size: int, dilation: int
):
    for share in (0.3, 1.0):
        x, dims = sparse(shape, share), len(shape)
        found = submanifold_rulebook(x.indices, shape, 2, (size,) * dims, (dilation,) * dims)
        weight, bias = weights(found.kernel)
        dense = CONV[dims](x.dense(), weight.movedim(-1, 1), bias, padding="same", dilation=dilation)
        torch.testing.assert_close(sparse_conv(x.features, found, weight, bias), at(dense, x.indices))


@shapes
@pytest.mark.parametrize("more", [0, 1])
def test_transposed_convolution_is_the_dense_one(shape: tuple[int, ...], more: int):
    x, dims = sparse(shape), len(shape)
    kernel = Kernel((3,) * dims, (2,) * dims, (1,) * dims, (1,) * dims, (more,) * dims)
    found = transposed_rulebook(x.indices, shape, 2, kernel)
    weight, _ = weights(kernel)
    dense = TRANSPOSED[dims](x.dense(), weight.movedim(-1, 0), None, 2, 1, more)
    assert found.output_shape == tuple(dense.shape[2:])
    torch.testing.assert_close(sparse_conv(x.features, found, weight), at(dense, found.output_indices))
    assert not rest(dense, found.output_indices).any()


@shapes
def test_the_way_back_is_the_dense_transposed_convolution_and_the_adjoint(shape: tuple[int, ...]):
    x, dims = sparse(shape, 0.7), len(shape)
    down = conv_rulebook(x.indices, shape, 2, geometry(dims, 2, 2))
    weight, _ = weights(down.kernel, 3, 4)
    y = torch.randn(down.num_outputs, 4, dtype=torch.float64)
    back = sparse_conv(y, down.inverse, weight.transpose(0, -1).contiguous())
    assert down.inverse.output_indices is x.indices
    dense = TRANSPOSED[dims](
        SparseTensor(y, down.output_indices, down.output_shape, 2).dense(),
        weight.movedim(-1, 1),
        stride=2,
        output_padding=tuple(size % 2 for size in shape),
    )
    torch.testing.assert_close(back, at(dense, x.indices))
    lost = (x.indices[:, 1:] >= 2 * torch.tensor(down.output_shape)).any(1)  # the last plane of an odd size
    assert lost.any()
    assert not back[lost].any()
    torch.testing.assert_close((sparse_conv(x.features, down, weight) * y).sum(), (x.features * back).sum())


def test_four_axes_are_a_sum_of_convolutions_of_three():
    x = sparse((3, 4, 3, 2), 0.5)
    found = submanifold_rulebook(x.indices, x.spatial_shape, 2, (3,) * 4, (1,) * 4)
    weight, _ = weights(found.kernel)
    padded = F.pad(x.dense(), (0, 0) * 3 + (1, 1))
    dense = torch.stack(
        [
            sum(F.conv3d(padded[:, :, t + q], weight[:, q].movedim(-1, 1), padding="same") for q in range(3))
            for t in range(3)
        ],
        2,
    )
    torch.testing.assert_close(sparse_conv(x.features, found, weight), at(dense, x.indices))


def test_convolution_is_linear_and_follows_the_order_of_rows():
    x = sparse((6, 5))
    found = submanifold_rulebook(x.indices, (6, 5), 2, (3, 3), (1, 1))
    weight, _ = weights(found.kernel)
    y = torch.randn_like(x.features)
    both = sparse_conv(2 * x.features - y, found, weight)
    torch.testing.assert_close(both, 2 * sparse_conv(x.features, found, weight) - sparse_conv(y, found, weight))
    order = torch.randperm(len(x.indices))
    moved = submanifold_rulebook(x.indices[order], (6, 5), 2, (3, 3), (1, 1))
    torch.testing.assert_close(
        sparse_conv(x.features[order], moved, weight), sparse_conv(x.features, found, weight)[order]
    )


@pytest.mark.parametrize("build", [0, 1, 2], ids=["submanifold", "strided", "transposed"])
def test_large_grids_are_searched_in_sorted_keys(monkeypatch: pytest.MonkeyPatch, build: int):
    x = sparse((9, 8, 7), 0.2)

    def made() -> Rulebook:
        if build == 0:
            return submanifold_rulebook(x.indices, x.spatial_shape, 2, (3, 3, 3), (1, 1, 1))
        maker = conv_rulebook if build == 1 else transposed_rulebook
        return maker(x.indices, x.spatial_shape, 2, geometry(3, 3, 2, 1))

    table = made()
    monkeypatch.setattr(rulebook, "_fits_table", lambda rows, places: False)
    ordered = made()
    assert table.counts == ordered.counts
    for name in ("source", "target", "output_indices"):
        assert torch.equal(getattr(table, name), getattr(ordered, name))


def test_a_grid_of_kilometres_costs_what_its_places_cost():
    far = torch.tensor([[0, 0, 0, 0], [0, 2**20, 2**20, 2**20], [0, 2**20, 2**20, 2**20 - 1]], dtype=torch.int64)
    x = SparseTensor(torch.ones(3, 1), far, (2**20 + 1,) * 3, 1)
    found = submanifold_rulebook(far, x.spatial_shape, 1, (3, 3, 3), (1, 1, 1))
    assert sparse_conv(x.features, found, torch.ones(1, 3, 3, 3, 1)).flatten().tolist() == [1, 2, 2]
    with pytest.raises(ValueError, match="less than 2\\^63 places"):
        submanifold_rulebook(far, (2**21, 2**21, 2**21), 2, (3, 3, 3), (1, 1, 1))


@pytest.mark.parametrize("backend", ["naive", "pairs", "dense", "triton"])
def test_nothing_and_one_row(backend: str):
    for rows in (0, 1):
        places = torch.tensor([[1, 2, 3]], dtype=torch.int32)[:rows]
        features = torch.randn(rows, 2, requires_grad=True)
        for found in (
            submanifold_rulebook(places, (4, 5), 2, (3, 3), (1, 1)),
            conv_rulebook(places, (4, 5), 2, geometry(2, 2, 2)),
        ):
            weight = torch.randn(3, *found.kernel.size, 2, requires_grad=True)
            y = sparse_conv(features, found, weight, backend=backend)
            assert y.shape == (rows, 3)
            y.sum().backward()
            assert features.grad is not None
            assert weight.grad is not None


@pytest.mark.parametrize(("shape", "share"), [((6, 5), 0.4), ((3, 4, 3), 0.3)])
def test_second_derivatives(shape: tuple[int, ...], share: float):
    x = sparse(shape, share, channels=2)
    found = conv_rulebook(x.indices, shape, 2, geometry(len(shape), 2, 2))
    weight, _ = weights(found.kernel, 2, 2)
    inputs = x.features.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda f, w: sparse_conv(f, found, w, backend="pairs"), inputs, fast_mode=True)


def test_shapes_are_checked():
    x = sparse((5, 4))
    found = submanifold_rulebook(x.indices, (5, 4), 2, (3, 3), (1, 1))
    with pytest.raises(ValueError, match=rf"features must be \({len(x.features)}, C\), got \(1, 3\)"):
        sparse_conv(x.features[:1], found, torch.ones(1, 3, 3, 3))
    with pytest.raises(ValueError, match=r"weight must be \(C_out, 3, 3, 3\), got \(1, 3, 3, 2\)"):
        sparse_conv(x.features, found, torch.ones(1, 3, 3, 2))
    with pytest.raises(ValueError, match=r"bias must be \(1,\), got \(2,\)"):
        sparse_conv(x.features, found, torch.ones(1, 3, 3, 3).double(), torch.ones(2))
    with pytest.raises(ValueError, match="leaves nothing of a grid of"):
        conv_rulebook(x.indices, (5, 4), 2, geometry(2, 6))


# Pooling


@shapes
def test_pooling_takes_the_largest_active_value(shape: tuple[int, ...]):
    x, dims = sparse(shape), len(shape)
    x = x.replace_feature(x.features - 5)  # all negative: inactive places must not count as 0
    found = conv_rulebook(x.indices, shape, 2, geometry(dims, 2, 2))
    low = SparseTensor(x.features + 100, x.indices, shape, 2).dense() - 100
    low[x.dense() == 0] = -math.inf
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[dims - 1]
    y = sparse_max_pool(x.features.requires_grad_(), found)
    torch.testing.assert_close(y, at(pool(low, 2), found.output_indices))
    y.sum().backward()
    assert x.features.grad is not None
    assert float(x.features.grad.sum()) == y.numel()


def test_mean_of_each_sample():
    places = torch.tensor([[0, 1], [2, 0], [0, 3]], dtype=torch.int32)
    x = SparseTensor(torch.tensor([[1.0], [5.0], [2.0]]), places, (4,), 3)
    assert sparse_mean(x).flatten().tolist() == [1.5, 0, 5]


# Tensors


@shapes
def test_dense_and_back(shape: tuple[int, ...]):
    x = sparse(shape)
    again = SparseTensor.from_dense(x.dense())
    torch.testing.assert_close(again.dense(), x.dense())
    assert len(again.indices) == len(x.indices)
    assert again.occupancy == x.occupancy == len(x.indices) / (2 * math.prod(shape))


def test_samples_types_and_features():
    x = sparse((5, 4), batch=3)
    torch.testing.assert_close(x[1:3].dense(), x.dense()[1:3])
    torch.testing.assert_close(x.repeat(5).dense(), x.dense()[[0, 1, 2, 0, 1]])
    assert x.to(torch.float32).features.dtype == torch.float32
    assert x.replace_feature(x.features[:, :1]).channels == 1
    assert x.replace_feature(x.features).rulebooks is x.rulebooks
    with pytest.raises(ValueError, match=r"features must be \(\d+, C\)"):
        x.replace_feature(x.features[1:])
    with pytest.raises(ValueError, match="samples must be one or more consecutive ones of 3"):
        x[3:]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": torch.ones(3)}, r"features must be \(N, C\), got \(3,\)"),
        ({"features": torch.ones(2, 1)}, "features has 2 rows but indices has 3"),
        ({"indices": torch.ones(3, 3)}, "indices must be .* of int32 or int64, got .* of torch.float32"),
        ({"spatial_shape": (4,)}, r"spatial_shape must be 2 positive sizes, .* got \(4,\)"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 1}, r"indices\[2\] = \(1, 0, 0\) is outside \(1, 4, 3\)"),
        ({"spatial_shape": (2, 3)}, r"indices\[1\] = \(0, 2, 1\) is outside \(2, 2, 3\)"),
        ({"indices": torch.tensor([[0, 1, 1], [0, -1, 1], [1, 0, 0]])}, r"indices\[1\] = \(0, -1, 1\) is outside"),
        (
            {"indices": torch.tensor([[0, 1, 1], [1, 0, 0], [0, 1, 1]])},
            r"indices\[2\] repeats indices\[0\] = \(0, 1, 1\)",
        ),
    ],
)
def test_what_is_no_sparse_tensor(changes: dict[str, Any], message: str):
    good = {
        "features": torch.ones(3, 1),
        "indices": torch.tensor([[0, 1, 1], [0, 2, 1], [1, 0, 0]]),
        "spatial_shape": (4, 3),
        "batch_size": 2,
    }
    SparseTensor(**good)
    with pytest.raises(ValueError, match=message):
        SparseTensor(**{**good, **changes})
