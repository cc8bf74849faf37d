"""The second stage of E-3DSNN's detector: what lies around points, changes of boxes, what is learned from."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from convatlas.networks.e3dsnn.detection import E3DSNNDetectorConfig
from convatlas.networks.e3dsnn.refinement import BoxRefiner, GridPooling, RefinementConfig
from convatlas.ops.boxes3d import box_corners, encode_boxes, iou_3d
from convatlas.ops.sparse import SparseTensor
from convatlas.ops.sparse.query import places_around

SMALL = RefinementConfig(grid=2, levels=(0, 1), radii=(0.6, 1.2), dim=4, hidden_dims=(6, 5), proposals=(20, 5), rois=8)
DETECTOR = E3DSNNDetectorConfig(
    embed_dim=4,
    dims=(4, 6),
    depths=(0, 0),
    out_dim=4,
    spatial_shape=(13, 16, 20),
    point_range=(0, -4, -3, 10, 4, 3),
    map_depths=(1,),
    map_strides=(1,),
    map_dims=(6,),
    up_strides=(1,),
    up_dims=(6,),
    refinement=SMALL,
)


def boxes(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32)


def voxels(channels: int = 4, share: float = 0.15) -> SparseTensor:
    places = (torch.rand(2, *DETECTOR.spatial_shape) < share).nonzero().int()
    return SparseTensor(torch.randn(len(places), channels), places, DETECTOR.spatial_shape, 2)


@pytest.mark.parametrize("most", [3, 999])
def test_places_around_points_are_those_that_a_search_finds(most: int):
    x = voxels(1)
    points = torch.rand(40, 3) * torch.tensor([16.0, 20, 24]) - 2  # some outside of the grid
    samples = torch.randint(2, (40,))
    found = places_around(x, points, samples, side=torch.tensor([1.0, 1, 0.5]), reach=2, radius=1.7, most=most)
    keys = [tuple(row) for row in x.indices.tolist()]
    expected = []
    for number, (point, sample) in enumerate(zip(points, samples.tolist(), strict=True)):
        own = point.floor()
        if not all(0 <= value < size for value, size in zip(own.tolist(), x.spatial_shape, strict=True)):
            continue
        near = [
            row
            for row in sorted(range(len(keys)), key=keys.__getitem__)
            if keys[row][0] == sample
            and (torch.tensor(keys[row][1:]) - own).abs().max() <= 2
            and float(((torch.tensor(keys[row][1:]) + 0.5 - point) * torch.tensor([1, 1, 0.5])).norm()) <= 1.7
        ]
        expected += [(number, row) for row in near[:most]]
    assert [tuple(pair) for pair in found.T.tolist()] == expected
    assert len(expected) > 40


def test_pooling_takes_what_is_near_in_metres():
    pool = GridPooling(4, 3, 4, reach=3, radius=0.7, samples=16).eval()
    for parameter in pool.parameters():
        parameter.data.uniform_(0.5, 2)
    level = voxels()
    side, low = torch.tensor([0.5, 0.5, 0.25]), torch.tensor([0.0, -4, -3])
    centres = (level.indices[:, 1:].flip(1) + 0.5) * side + low
    alone = SparseTensor(level.features[:1].abs() + 2, level.indices[:1], level.spatial_shape, 2)
    sample = level.indices[:1, 0].long()
    for way in torch.eye(3):
        inside, outside = (pool(alone, centres[:1] + way * step, sample, side, low) for step in (0.6, 0.75))
        nothing = pool(alone, centres[:1] + way * 3, sample, side, low)
        assert torch.equal(outside, nothing)
        assert not torch.equal(inside, nothing)
    other = pool(alone, centres[:1], 1 - sample, side, low)
    assert torch.equal(other, nothing)


def test_changes_bring_boxes_to_the_truth():
    rois = boxes((1, 2, 0, 4, 2, 1.5, 0.3), (5, -1, 1, 3, 1, 2, -2.0), (0, 0, 0, 4, 2, 1, 3.0))
    true = boxes((1.5, 2.2, 0.1, 3.5, 1.9, 1.4, 0.5), (5, -1.2, 1, 3, 1.2, 2, 1.2), (0.1, 0, 0, 4, 2, 1, -3.0))
    refiner = BoxRefiner([4, 4], SMALL, 4)
    own = torch.cat([torch.zeros(3, 3), rois[:, 3:6], torch.zeros(3, 1)], 1)
    offsets = encode_boxes(refiner._seen_from(true, rois), own)
    assert (offsets[:, 6].abs() <= math.pi / 2).all()
    changed = refiner.changed(rois, offsets)
    torch.testing.assert_close(changed[:, :6], true[:, :6])
    torch.testing.assert_close(iou_3d(changed, true).diag(), torch.ones(3), atol=1e-4, rtol=1e-4)
    scores = torch.full((3,), 9.0)
    losses = refiner.losses(scores, offsets, rois, true, torch.full((3,), 0.8))
    assert all(float(loss) < 1e-3 for loss in losses.values())
    moved = refiner.losses(scores, offsets + 0.3, rois, true, torch.full((3,), 0.8))
    assert float(moved["change"]) > 0.5
    assert float(moved["corners"]) > 0.05
    assert float(refiner.losses(scores, offsets, rois, true, torch.full((3,), 0.1))["quality"]) > 5
    assert float(refiner.losses(scores, offsets, rois, true, torch.full((3,), 0.1))["change"]) == 0


def test_the_grid_fills_boxes():
    box = boxes((1, 2, 0, 4, 2, 1.5, 0.3))
    points = BoxRefiner([4, 4], SMALL, 4)._points(box)[0]
    assert points.shape == (8, 3)
    # The points of a grid of two are the corners of a box half as large.
    half = box * torch.tensor([1, 1, 1, 0.5, 0.5, 0.5, 1])
    near = torch.cdist(points, box_corners(half)[0])
    torch.testing.assert_close(near.amin(0), torch.zeros(8), atol=1e-5, rtol=0)


def test_it_learns_from_good_and_bad_boxes():
    refiner = BoxRefiner([4, 4], SMALL, 4)
    true = boxes((0, 0, 0, 4, 2, 1, 0), (9, 0, 0, 4, 2, 1, 0))
    close, beside, far = (true[:1] + torch.tensor([shift, 0, 0, 0, 0, 0, 0]) for shift in (0.1, 1.8, 50))
    rois = torch.cat([close.repeat(9, 1), beside.repeat(9, 1), far.repeat(9, 1)])
    kinds = torch.zeros(27, dtype=torch.int64)
    chosen, goal, overlap = refiner.choose(rois, kinds, true, torch.tensor([0, 1]))
    assert len(chosen) == 8
    assert int((overlap >= 0.55).sum()) == 4
    assert int(((overlap >= 0.1) & (overlap < 0.55)).sum()) == 3
    assert (goal[overlap >= 0.1] == true[0]).all()
    # A box of another class does not overlap.
    assert not refiner.choose(rois, kinds, true, torch.tensor([1, 1]))[2].any()
    assert not refiner.choose(rois, kinds, true[:0], torch.tensor([], dtype=torch.int64))[2].any()


def test_both_stages_learn_and_answer():
    model = DETECTOR.build()
    x = voxels()
    found = model(x)
    assert not found.rois
    truth = [boxes((4, 1, -1, 3.9, 1.6, 1.56, 0.1)), torch.zeros(0, 7)]
    losses = model.losses(found, truth, [torch.tensor([0]), torch.zeros(0).long()])
    assert set(losses) == {"loss", "scores", "offsets", "directions", "quality", "change", "corners"}
    losses["loss"].backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    model.eval()
    with torch.no_grad():
        found = model(x)
        assert [len(each) for each in found.rois] == [len(each) for each in found.refined_scores]
        assert all(0 < len(each) <= 5 for each in found.rois)
        answers = model.decode(found, score_threshold=0.01)
        for (some, scores, _), rois in zip(answers, found.rois, strict=True):
            assert 0 < len(some) <= len(rois)
            assert (scores[:-1] >= scores[1:]).all()
        one = model(x[:1])
        torch.testing.assert_close(one.rois[0], found.rois[0])
        torch.testing.assert_close(one.refined_scores[0], found.refined_scores[0])


def test_settings_are_checked():
    with pytest.raises(ValueError, match="levels and radii must be as many"):
        RefinementConfig(levels=(1,))
    with pytest.raises(ValueError, match=r"bad and good must rise within \[0, 1\]"):
        RefinementConfig(good=0.1)
    assert DETECTOR.override(refinement={"grid": 3}).refinement == RefinementConfig(**{**vars(SMALL), "grid": 3})
