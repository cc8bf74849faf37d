"""E-3DSNN for point clouds: sizes, samples, neurons and the authors' layout."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from convatlas import load_weights
from convatlas.networks.e3dsnn.points import E3DSNNClassifierConfig, E3DSNNSegmenterConfig
from convatlas.networks.registry import create_model
from convatlas.nn.conv.sparse import SubMConv3d, to_spconv
from convatlas.nn.spiking import IntegerLIF, firing_rates
from convatlas.ops.sparse import SparseTensor
from convatlas.training.measure import count_parameters

PARAMETERS = {
    "e3dsnn_t": 1_874_216,
    "e3dsnn_s": 3_271_144,
    "e3dsnn_l": 17_330_600,
    "e3dsnn_xl": 46_574_248,
    "e3dsnn_seg": 20_049_683,
    "e3dsnn_seg_deep": 32_709_427,
}
SMALL = {"embed_dim": 4, "dims": (4, 6), "depths": (1, 0), "num_classes": 3, "in_channels": 2}


def voxels(channels: int = 2, batch: int = 2, shape: tuple[int, int, int] = (9, 7, 8)) -> SparseTensor:
    places = (torch.rand(batch, *shape) < 0.2).nonzero().int()
    return SparseTensor(torch.randn(len(places), channels, dtype=torch.float64), places, shape, batch)


def lively(model: nn.Module) -> nn.Module:
    """Weights large enough for neurons to fire."""
    for module in model.modules():
        if isinstance(module, SubMConv3d | nn.Linear):
            nn.init.normal_(module.weight, std=1.5 / math.sqrt(module.weight[0].numel()))
        elif isinstance(module, nn.BatchNorm1d):
            nn.init.uniform_(module.bias, 0, 1)
    return model.double().eval()


@pytest.fixture(params=[E3DSNNClassifierConfig(**SMALL), E3DSNNSegmenterConfig(**SMALL, decoder_dims=(5, 4))])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return lively(request.param.build())


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_published(name: str):
    with torch.device("meta"):
        assert count_parameters(create_model(name)) == PARAMETERS[name]


def test_features_are_as_described(model):
    for feature, info, size in zip(model.forward_features(voxels()), model.feature_info, (9, 4, 2), strict=True):
        assert feature.channels == info.channels
        assert feature.spatial_shape[0] == size == 9 // info.stride


@torch.no_grad()
def test_samples_are_independent(model):
    x = voxels()
    first = len(x[:1].indices)
    rows = 1 if isinstance(model.config, E3DSNNClassifierConfig) else first
    both = model(x)
    torch.testing.assert_close(model(x[:1]), both[:rows])
    features = x.features.clone()
    features[first:] *= -3
    torch.testing.assert_close(model(x.replace_feature(features))[:rows], both[:rows])
    assert not torch.equal(model(x.replace_feature(features)), both)


@torch.no_grad()
def test_the_order_of_voxels_does_not_matter(model):
    x = voxels()
    order = torch.randperm(len(x.indices))
    moved = SparseTensor(x.features[order], x.indices[order], x.spatial_shape, 2)
    scores = model(x)
    if isinstance(model.config, E3DSNNSegmenterConfig):
        scores = scores[order]
        assert len(scores) == len(x.indices)
    torch.testing.assert_close(model(moved), scores)


@torch.no_grad()
def test_convolutions_see_spikes_and_the_first_one_voxels(model):
    seen = []
    for module in model.modules():
        if isinstance(module, IntegerLIF):
            module.register_forward_hook(lambda module, args, output: seen.append(output))
    model(voxels())
    assert {float(value) for spikes in seen for value in spikes.unique()} == {0, 1, 2, 3, 4}
    rates = firing_rates(model, voxels())
    assert len(rates) == sum(isinstance(module, IntegerLIF) for module in model.modules())
    assert all(0 < rate < 4 for rate in rates.values())


def test_it_trains_in_half_precision(model):
    x = voxels().bfloat16()
    model = copy.deepcopy(model).bfloat16().train()
    scores = model(x)
    assert scores.dtype == torch.bfloat16
    scores.float().square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_an_empty_sample_and_an_empty_batch(model):
    x = voxels(batch=1)
    more = SparseTensor(x.features, x.indices, x.spatial_shape, 2)
    empty = SparseTensor(x.features[:0], x.indices[:0], x.spatial_shape, 2)
    classifies = isinstance(model.config, E3DSNNClassifierConfig)
    assert model(more).shape[0] == (2 if classifies else len(x.indices))
    assert model(empty).shape == (2 if classifies else 0, 3)
    if classifies:
        assert not model(empty).any()
    model.train()(empty).sum().backward()


def test_the_authors_layout_loads_with_any_prefix(model):
    names = (
        ("stages.", "enc."),
        (".first.", ".block."),
        (".second.", ".voxel_block."),
        ("decoder.", "dec."),
        ("classifier.", "final."),
    )
    theirs = {}
    for key, value in to_spconv(model, model.state_dict()).items():
        for ours, their in names:
            key = key.replace(ours, their)
        theirs[f"module.backbone.{key}"] = value.clone()
    other = model.config.build().double().eval()
    report = load_weights(other, {"state_dict": theirs})
    assert report.layout == "authors"
    assert not report.differences()
    x = voxels()
    with torch.no_grad():
        assert torch.equal(other(x), model(x))


def test_voxels_end_beyond_the_last_one(model):
    places = torch.tensor([[0, 4, 5], [3, 0, 2]])
    x = model.voxels(places, torch.randn(2, 2), torch.tensor([0, 1]))
    margin = model.config.margin
    assert margin == (96 if isinstance(model.config, E3DSNNClassifierConfig) else 1)
    assert x.spatial_shape == (3 + margin, 4 + margin, 5 + margin)
    wide = model.voxels(places, torch.randn(2, 2), torch.tensor([0, 1]), spatial_shape=(8, 8, 8))
    assert wide.spatial_shape == (8, 8, 8)
    with pytest.raises(ValueError, match=r"coordinates and batch must be \(N, 3\) and \(N,\)"):
        model.voxels(places, torch.randn(2, 2), torch.tensor([0]))
    with pytest.raises(ValueError, match="x must have a grid of at least 4 voxels"):
        model(SparseTensor(torch.randn(1, 2).double(), torch.zeros(1, 4).int(), (3, 9, 9), 1))
    with pytest.raises(ValueError, match="x must have 3 axes and 2 features a voxel, got 3 and 5"):
        model(voxels(5))
    with pytest.raises(ValueError, match="x must be a SparseTensor of voxels, got Tensor"):
        model(torch.randn(1, 2, 8, 8, 8))


def test_configs_are_checked():
    with pytest.raises(ValueError, match="dims and depths must be as many positive numbers"):
        E3DSNNClassifierConfig(dims=(4, 4))
    with pytest.raises(ValueError, match="decoder_dims must be 4 positive numbers"):
        E3DSNNSegmenterConfig(decoder_dims=(4,))
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        E3DSNNClassifierConfig(num_classes=0)


def test_initial_weights_are_the_authors():
    model = create_model("e3dsnn_t", embed_dim=32)
    submanifold = model.stem[3].weight
    assert float(submanifold.detach().std()) == pytest.approx(0.02, rel=0.05)
    strided = model.stages[0].down[1].weight
    assert float(strided.detach().abs().max()) <= 1 / math.sqrt(8 * 32)
    assert float(strided.detach().std()) == pytest.approx(1 / math.sqrt(3 * 8 * 32), rel=0.05)
    assert not model.classifier.bias.any()
    norm = model.stem[1]
    assert (norm.eps, norm.momentum) == (1e-3, 0.01)
