"""Layers for sparse tensors: the pairs that they share, their errors, weights of spconv, and folded norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from convatlas.errors import CheckpointError
from convatlas.nn.conv import sparse as layers
from convatlas.nn.conv.sparse import (
    SparseConv2d,
    SparseConv3d,
    SparseConvTranspose2d,
    SparseGlobalPool,
    SparseInverseConv2d,
    SparseMaxPool2d,
    SparseSequential,
    SubMConv2d,
    SubMConv3d,
    ToDense,
    fold_norms,
    from_spconv,
    to_spconv,
)
from convatlas.ops.sparse import SparseTensor


def sparse(channels: int = 3, shape: tuple[int, ...] = (7, 6), share: float = 0.4) -> SparseTensor:
    places = (torch.rand(2, *shape) < share).nonzero().int()
    places = places[torch.randperm(len(places))]
    return SparseTensor(torch.randn(len(places), channels, dtype=torch.float64), places, shape, 2)


def network() -> SparseSequential:
    return SparseSequential(
        SubMConv2d(3, 4, 3, bias=False),
        nn.BatchNorm1d(4),
        nn.ReLU(),
        SubMConv2d(4, 4, 3),
        SparseConv2d(4, 5, 2, stride=2, indice_key="down"),
        nn.BatchNorm1d(5, affine=False),
        nn.ReLU(),
        SparseInverseConv2d(5, 4, 2, "down"),
    ).double()


def test_layers_in_a_row_share_their_pairs_and_find_back():
    x, model = sparse(), network()
    y = model(x)
    assert y.indices is x.indices
    assert y.spatial_shape == x.spatial_shape
    kinds = [key[1] for key in x.rulebooks if isinstance(key, tuple)]
    assert sorted(kinds) == ["conv", "submanifold"]  # two submanifold layers, one search
    assert x.rulebooks["down"].kind == "conv"
    y.features.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_dense_pooling_and_transposed_ends():
    x = sparse()
    torch.testing.assert_close(ToDense()(x), x.dense())
    assert SparseGlobalPool()(x).shape == (2, 3)
    head = SparseSequential(nn.ReLU(), SparseGlobalPool(), nn.Linear(3, 5)).double()
    torch.testing.assert_close(head(x), head[2](SparseGlobalPool()(x.replace_feature(x.features.relu()))))
    pooled = SparseMaxPool2d(2)(x)
    assert pooled.spatial_shape == (3, 3)
    up = SparseConvTranspose2d(3, 2, 2, stride=2).double()(pooled)
    assert up.spatial_shape == (6, 6)
    assert len(up.indices) == 4 * len(pooled.indices)


def test_an_empty_crop_passes_through_norms():
    empty = SparseTensor(torch.zeros(0, 3).double(), torch.zeros(0, 3, dtype=torch.int32), (7, 6), 2)
    for mode in (True, False):
        y = network().train(mode)(empty)
        assert y.features.shape == (0, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SubMConv2d(1, 1, 2), "submanifold convolution needs odd kernel sizes, got 2"),
        (lambda: SubMConv2d(1, 1, (3, 4)), r"odd kernel sizes, got \(3, 4\)"),
        (lambda: SubMConv2d(1, 1, 3, stride=2), "so stride must be 1, got 2"),
        (lambda: SubMConv2d(1, 1, 3, padding=2), "so padding must be 1 or left out, got 2"),
        (lambda: SparseConv2d(1, 1, 3, groups=2), "groups must be 1 in a sparse convolution, got 2"),
        (lambda: SparseConv2d(0, 1, 3), "in_channels must be at least 1, got 0"),
        (lambda: SparseConv2d(1, 1, 0), "kernel_size must be at least 1, got 0"),
        (lambda: SparseConv2d(1, 1, (3, 3, 3)), "kernel_size must be one number or 2"),
        (lambda: SparseConvTranspose2d(1, 1, 2, output_padding=1), "output_padding must be smaller than stride"),
    ],
)
def test_constructors_say_what_they_take(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_inputs_and_keys_are_checked():
    x = sparse()
    with pytest.raises(ValueError, match="x must be a SparseTensor, got Tensor"):
        SparseConv2d(3, 1, 3)(x.features)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x must have 3 spatial axes, got 2"):
        SparseConv3d(3, 1, 3)(x)
    with pytest.raises(ValueError, match="x must have 2 channels, got 3"):
        SparseConv2d(2, 1, 3)(x)
    with pytest.raises(ValueError, match="that of an earlier convolution, got 'up'; known are: none"):
        SparseInverseConv2d(3, 1, 2, "up")(x)
    y = SubMConv2d(3, 3, 3, indice_key="same").double()(x)
    with pytest.raises(ValueError, match="'same' belongs to a submanifold convolution, which has no inverse"):
        SparseInverseConv2d(3, 1, 3, "same")(y)
    with pytest.raises(ValueError, match="'same' belongs to a layer of another geometry or with other places"):
        SubMConv2d(3, 3, 5, indice_key="same").double()(y)
    down = SparseConv2d(3, 3, 2, 2, indice_key="down").double()(y)
    with pytest.raises(ValueError, match="kernel_size must be that of the convolution 'down', 2, got 3"):
        SparseInverseConv2d(3, 1, 3, "down")(down)
    with pytest.raises(ValueError, match="x must have the places that the convolution 'down' gave"):
        SparseInverseConv2d(3, 1, 2, "down")(y)


def test_norms_fold_into_convolutions():
    x, model = sparse(), network()
    for _ in range(3):
        model(x)  # moves the running statistics
    model[1].weight.data.uniform_(0.5, 2)
    expected = model.eval()(x).features
    folded = fold_norms(model)
    assert not any(isinstance(part, nn.BatchNorm1d) for part in folded.modules())
    torch.testing.assert_close(folded(x).features, expected)
    torch.testing.assert_close(model(x).features, expected)


# Weights of spconv


def model_of(*channels: int) -> SparseSequential:
    return SparseSequential(
        SubMConv3d(channels[0], channels[1], 3), SparseConv3d(channels[1], channels[2], 1), nn.BatchNorm1d(channels[2])
    )


def test_one_tap_is_read_in_the_order_of_memory():
    model = model_of(2, 3, 4)
    state = {
        key: torch.randn_like(value) if value.is_floating_point() else value
        for key, value in model.state_dict().items()
    }
    ours = from_spconv(model, state)
    assert torch.equal(ours["0.weight"], state["0.weight"])
    features = torch.randn(5, 3)
    torch.testing.assert_close(features @ ours["1.weight"].reshape(4, 3).T, features @ state["1.weight"].reshape(3, 4))
    back = to_spconv(model, ours)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("last", ["in_out", "out_in"])
def test_older_layouts_are_told_by_their_shapes(last: str):
    model = model_of(2, 3, 4)
    state = dict(model.state_dict())
    order = (1, 2, 3, 4, 0) if last == "in_out" else (1, 2, 3, 0, 4)
    old = {**state, "0.weight": state["0.weight"].permute(order), "1.weight": state["1.weight"].permute(order)}
    if last == "out_in":  # that version read one tap in the order of memory
        old["1.weight"] = state["1.weight"].reshape(4, 3).T.contiguous().reshape(1, 1, 1, 4, 3)
    ours = from_spconv(model, old)
    assert all(torch.equal(ours[key], state[key]) for key in state)


def test_square_old_weights_cannot_be_told():
    model = SparseSequential(SubMConv3d(4, 4, 3))
    old = {"0.weight": torch.randn(3, 3, 3, 4, 4), "0.bias": torch.zeros(4)}
    with pytest.raises(CheckpointError, match="whether C_in or C_out is last cannot be told"):
        from_spconv(model, old)


def test_every_public_convolution_runs():
    for dims in (1, 2, 3, 4):
        x = sparse(2, (5, 4, 3, 4)[:dims])
        for name in ("SubMConv", "SparseConv"):
            layer = getattr(layers, f"{name}{dims}d")(2, 3, 3, padding=1).double()
            assert layer(x).spatial_shape == x.spatial_shape
