"""E-3DSNN for LiDAR detection: sizes, anchors, losses and boxes."""

from __future__ import annotations

import math

import pytest
import torch

from convatlas.networks.e3dsnn.detection import BoxMaps, E3DSNNDetectorConfig
from convatlas.networks.registry import create_model
from convatlas.ops.boxes3d import encode_boxes
from convatlas.ops.sparse import SparseTensor

SMALL = E3DSNNDetectorConfig(
    embed_dim=4,
    dims=(4, 6, 6),
    depths=(1, 0, 0),
    out_dim=8,
    spatial_shape=(25, 64, 48),
    point_range=(0, -4, -3, 6, 4, 1),
    map_depths=(1, 1),
    map_dims=(6, 8),
    up_dims=(5, 7),
    anchor_sizes=((1.5, 0.8, 1.0), (0.8, 0.8, 1.7)),
    anchor_bottoms=(-1.5, -1.5),
    refinement=None,
)


def sweep(config: E3DSNNDetectorConfig, batch: int = 2) -> SparseTensor:
    places = (torch.rand(batch, *config.spatial_shape) < 0.01).nonzero().int()
    return SparseTensor(torch.randn(len(places), config.in_channels), places, config.spatial_shape, batch)


def said(model, box: torch.Tensor, kind: int, *, reverse: bool = False) -> BoxMaps:
    """Maps that are sure of one box, at the anchor beside it."""
    anchors = model.head.anchors(8, 6, torch.device("cpu"))
    classes = torch.arange(2).repeat_interleave(2).repeat(48)
    distance = (anchors[:, :2] - box[:2]).norm(dim=1) + 99 * (classes != kind) + (anchors[:, 6] - box[6]).abs()
    row = int(distance.argmin())
    scores = torch.full((1, len(anchors), 2), -9.0)
    scores[0, row, kind] = 9.0
    offsets = torch.zeros(1, len(anchors), 7)
    offsets[0, row] = encode_boxes(box, anchors[row])
    if reverse:
        offsets[0, row, 6] += math.pi
    turned = (box[6] - model.config.direction_offset) % (2 * math.pi)
    directions = torch.zeros(1, len(anchors), 2)
    directions[0, row, int(turned // math.pi)] = 9.0
    return BoxMaps(scores, offsets, directions, anchors, classes)


def test_the_published_grid_becomes_a_map_of_an_eighth():
    with torch.device("meta"):
        model = create_model("e3dsnn_kitti_car")
    assert model.map.stages[0][0].in_channels == 256
    assert [info.channels for info in model.backbone.feature_info] == [16, 32, 64, 64]
    anchors = model.head.anchors(200, 176, torch.device("cpu"))
    assert anchors.shape == (200 * 176 * 2, 7)
    torch.testing.assert_close(anchors[1], torch.tensor([0, -40, -1, 3.9, 1.6, 1.56, 1.57]))
    torch.testing.assert_close(anchors[-2], torch.tensor([70.4, 40, -1, 3.9, 1.6, 1.56, 0]))


def test_it_describes_every_anchor_and_learns():
    model = SMALL.build()
    x = sweep(SMALL)
    features, flat = model.backbone(x)
    assert [each.spatial_shape for each in features] == [(25, 64, 48), (13, 32, 24), (7, 16, 12), (4, 8, 6)]
    assert flat.spatial_shape == (1, 8, 6)
    found = model(x)
    assert found.scores.shape == (2, 8 * 6 * 4, 2)
    assert found.offsets.shape == (2, 8 * 6 * 4, 7)
    true = [torch.tensor([[2.0, 1, -1, 1.5, 0.8, 1, 0.1]]), torch.zeros(0, 7)]
    losses = model.losses(found, true, [torch.tensor([0]), torch.zeros(0).long()])
    losses["loss"].backward()
    parts = {name: float(value.detach()) for name, value in losses.items()}
    assert parts["loss"] == pytest.approx(parts["scores"] + 2 * parts["offsets"] + 0.2 * parts["directions"], rel=1e-5)
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@torch.no_grad()
def test_samples_are_independent():
    model = SMALL.build().double().eval()
    for parameter in model.parameters():
        parameter.normal_(0, 0.5)
    x = sweep(SMALL).double()
    both, one = model(x), model(x[:1])
    for ours, theirs in zip(one[:3], both[:3], strict=True):
        torch.testing.assert_close(ours, theirs[:1])
    assert not torch.allclose(both.scores[0], both.scores[1])


@pytest.mark.parametrize("heading", [0.3, -2.8, 1.4, -1.9])
@pytest.mark.parametrize("kind", [0, 1])
def test_true_boxes_come_back(heading: float, kind: int):
    model = SMALL.build()
    box = torch.tensor([2.5, 0.7, -1.0, 1.6, 0.7, 1.1, heading])
    for reverse in (False, True):  # the offset does not tell both directions apart, the other score does
        ((boxes, scores, kinds),) = model.decode(said(model, box, kind, reverse=reverse))
        torch.testing.assert_close(boxes, box[None], atol=1e-4, rtol=1e-4)
        assert kinds.tolist() == [kind]
        assert float(scores[0]) > 0.99
        found = said(model, box, kind, reverse=reverse)
        losses = model.losses(found, [box[None]], [torch.tensor([kind])])
        assert float(losses["offsets"]) >= 0


def test_losses_vanish_for_the_truth():
    model = SMALL.build()
    box = torch.tensor([2.4, 0.57, -1.0, 1.5, 0.8, 1.0, 0.0])  # on an anchor
    found = said(model, box, 0)
    target, best = model._assign(found, box[None], torch.tensor([0]))
    assert int((target == 0).sum()) == 1
    assert not best.any()
    assert not (target == 1).any()
    losses = model.losses(found, [box[None]], [torch.tensor([0])])
    assert float(losses["loss"]) < 1e-3
    assert float(model.losses(found, [box[None] + 1], [torch.tensor([0])])["loss"]) > 1
    assert float(model.losses(found, [box[None]], [torch.tensor([1])])["loss"]) > 1


def test_inputs_are_checked():
    model = SMALL.build()
    with pytest.raises(ValueError, match=r"x must have a grid of \(25, 64, 48\) with 4 features"):
        model(SparseTensor(torch.randn(1, 4), torch.zeros(1, 4).int(), (25, 64, 49), 1))
    with pytest.raises(ValueError, match="x must be a SparseTensor of voxels, got Tensor"):
        model(torch.randn(2, 4))
    with pytest.raises(ValueError, match="anchor_sizes and anchor_bottoms must be as many"):
        SMALL.override(anchor_bottoms=(0.0,))
    with pytest.raises(ValueError, match=r"refinement.levels must be from 0 to 1, got \(1, 2, 3\)"):
        E3DSNNDetectorConfig(dims=(4,), depths=(0,))
    with pytest.raises(ValueError, match=r"unmatched and matched must rise within \[0, 1\]"):
        SMALL.override(matched=0.1)
