"""Boxes in space: overlap, suppression, offsets, average precision."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from convatlas.ops.boxes3d import (
    average_precision_r40,
    decode_boxes,
    encode_boxes,
    iou_3d,
    iou_bev,
    limit_period,
    nearest_iou_bev,
    suppress_overlaps,
)


def boxes(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def random_boxes(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(count, 7, generator=generator, dtype=torch.float64)
    return torch.cat([4 * draw[:, :3], 1 + 3 * draw[:, 3:6], 7 * draw[:, 6:]], 1)


def test_known_overlaps():
    square = boxes((0, 0, 0, 2, 2, 2, 0))
    others = boxes(
        (1, 0, 0, 2, 2, 2, 0),  # half
        (0, 0, 0, 2, 2, 2, math.pi / 4),  # an octagon
        (0, 0, 0, 1, 1, 2, 0.3),  # inside
        (5, 0, 0, 2, 2, 2, 1),  # apart
        (0, 0, 1, 2, 2, 2, math.pi / 2),  # above by half
    )
    octagon = 8 * (math.sqrt(2) - 1)
    expected = torch.tensor([1 / 3, octagon / (8 - octagon), 1 / 4, 0, 1], dtype=torch.float64)
    torch.testing.assert_close(iou_bev(square, others)[0], expected)
    expected[4] = 1 / 3
    torch.testing.assert_close(iou_3d(square, others)[0], expected)


def test_overlaps_are_those_of_counted_points():
    a, b = random_boxes(6, 0), random_boxes(5, 1)
    points = 8 * torch.rand(200_000, 2, dtype=torch.float64) - 2

    def inside(box: Tensor) -> Tensor:
        away = points - box[:2]
        cos, sin = box[6].cos(), box[6].sin()
        along, across = away[:, 0] * cos + away[:, 1] * sin, away[:, 1] * cos - away[:, 0] * sin
        return (along.abs() <= box[3] / 2) & (across.abs() <= box[4] / 2)

    ours = iou_bev(a, b)
    for i, first in enumerate(map(inside, a)):
        for j, second in enumerate(map(inside, b)):
            counted = float((first & second).sum() / (first | second).sum())
            assert float(ours[i, j]) == pytest.approx(counted, abs=0.02)
    torch.testing.assert_close(ours, iou_bev(b, a).T)
    torch.testing.assert_close(iou_bev(a, a).diag(), torch.ones(6, dtype=torch.float64))


def test_nearest_axis():
    a = boxes((0, 0, 0, 4, 2, 1, 0.1), (0, 0, 0, 4, 2, 1, 1.5), (0, 0, 0, 2, 4, 1, math.pi))
    ours = nearest_iou_bev(a, a)
    torch.testing.assert_close(ours[0], torch.tensor([1, 1 / 3, 1 / 3], dtype=torch.float64))
    assert float(ours[1, 2]) == 1


def test_the_best_of_overlapping_boxes_stays():
    found = boxes((0, 0, 0, 4, 2, 1, 0), (0.2, 0, 0, 4, 2, 1, 0.1), (9, 0, 0, 4, 2, 1, 0), (0, 3, 0, 4, 2, 1, 0))
    scores = torch.tensor([0.5, 0.9, 0.1, 0.7])
    assert suppress_overlaps(found, scores, 0.3).tolist() == [1, 3, 2]
    assert suppress_overlaps(found, scores, 0.99).tolist() == [1, 3, 0, 2]
    assert suppress_overlaps(found, scores, 0.3, most=2).tolist() == [1, 3]
    assert suppress_overlaps(found[:0], scores[:0], 0.3).tolist() == []


def test_offsets_and_back():
    a, anchors = random_boxes(9, 2), random_boxes(9, 3)
    torch.testing.assert_close(decode_boxes(encode_boxes(a, anchors), anchors), a)
    one = encode_boxes(boxes((3, 4, 1, 6, 4, 2, 0.5)), boxes((0, 0, 0, 3, 4, 2, 0.2)))
    expected = boxes((0.6, 0.8, 0.5, math.log(2), 0, 0, 0.3))
    torch.testing.assert_close(one, expected)


def test_angles_come_into_their_period():
    angle = torch.tensor([-7.0, -3.2, 0.0, 3.2, 9.0], dtype=torch.float64)
    for offset, period in ((0.5, 2 * math.pi), (0.0, math.pi)):
        limited = limit_period(angle, offset, period)
        assert (limited >= -offset * period).all()
        assert (limited < (1 - offset) * period).all()
        torch.testing.assert_close(((limited - angle) / period).round() * period, limited - angle)


def test_average_precision():
    true = boxes((0, 0, 0, 4, 2, 1, 0), (9, 0, 0, 4, 2, 1, 0))
    far = boxes((0, 50, 0, 4, 2, 1, 0))
    found = torch.cat([true, far, true[:1]])
    scores = torch.tensor([0.9, 0.4, 0.6, 0.5])  # right, right, far away, the same again
    # At recall up to 1/2 precision 1, beyond it 2 of 4.
    assert average_precision_r40([(found, scores)], [true]) == pytest.approx(0.75)
    assert average_precision_r40([(found[:1], scores[:1])], [true]) == pytest.approx(0.5)
    assert average_precision_r40([(found, scores)], [true], ignored=[torch.tensor([False, True])]) == 1
    assert average_precision_r40([(found[:0], scores[:0])], [true]) == 0
    assert math.isnan(average_precision_r40([(found, scores)], [true[:0]]))
    with pytest.raises(ValueError, match="must be of as many samples, got 0 and 1"):
        average_precision_r40([], [true])
    with pytest.raises(ValueError, match=r"b must be boxes \(N, 7\), got \(2, 6\)"):
        iou_3d(true, true[:, :6])
