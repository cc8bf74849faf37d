"""Upright boxes in space that turn about z: overlap, suppression, offsets from anchors, average precision.

A box is x, y, z of its centre, its length, width and height along its own axes, and its heading: the angle from x to
its length, in radians.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = [
    "average_precision_r40",
    "box_corners",
    "decode_boxes",
    "encode_boxes",
    "iou_3d",
    "iou_bev",
    "limit_period",
    "nearest_iou_bev",
    "suppress_overlaps",
]

#: Pairs of boxes whose overlap is found at once.
_CHUNK = 2**18
_TINY = 1e-9


def limit_period(angle: Tensor, offset: float = 0.5, period: float = 2 * math.pi) -> Tensor:
    """The angle plus as many periods as bring it into [-offset * period, (1 - offset) * period)."""
    return angle - torch.floor(angle / period + offset) * period


def _corners(boxes: Tensor) -> Tensor:
    """Corners (..., 4, 2) seen from above, counter-clockwise."""
    signs = boxes.new_tensor([[1, 1], [-1, 1], [-1, -1], [1, -1]]) / 2
    local = signs * boxes[..., None, 3:5]
    cos, sin = boxes[..., 6].cos(), boxes[..., 6].sin()
    turn = torch.stack([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)], -2)
    return local @ turn + boxes[..., None, :2]


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def box_corners(boxes: Tensor) -> Tensor:
    """Corners (N, 8, 3) of boxes (N, 7): the lower four counter-clockwise, then the upper ones."""
    ground = _corners(boxes)
    low, high = (boxes[:, 2:3] + sign * boxes[:, 5:6] / 2 for sign in (-1, 1))
    layers = [torch.cat([ground, z[:, :, None].expand(-1, 4, -1)], 2) for z in (low, high)]
    return torch.cat(layers, 1)


def _overlap_area(a: Tensor, b: Tensor) -> Tensor:
    """Common area (P) of pairs of boxes (P, 7) seen from above.

    The corners of the common polygon are corners of one box inside the other, and crossings of edges.
    """
    first, second = _corners(a), _corners(b)
    edges, others = first.roll(-1, 1) - first, second.roll(-1, 1) - second

    def inside(points: Tensor, polygon: Tensor, sides: Tensor) -> Tensor:
        return (_cross(sides[:, None], points[:, :, None] - polygon[:, None]) >= -_TINY).all(2)

    gap = second[:, None] - first[:, :, None]
    span = _cross(edges[:, :, None], others[:, None])
    safe = torch.where(span.abs() < _TINY, torch.ones_like(span), span)
    t, u = _cross(gap, others[:, None]) / safe, _cross(gap, edges[:, :, None]) / safe
    meets = (span.abs() >= _TINY) & (t >= 0) & (t <= 1) & (u >= 0) & (u <= 1)
    crossings = first[:, :, None] + t[..., None] * edges[:, :, None]
    points = torch.cat([first, second, crossings.flatten(1, 2)], 1)
    valid = torch.cat([inside(first, second, others), inside(second, first, edges), meets.flatten(1)], 1)
    # Around their mean the points of a convex polygon stand in the order of their angles; the others join the first.
    count = valid.sum(1, keepdim=True).clamp(min=1)
    middle = (points * valid[..., None]).sum(1) / count
    away = points - middle[:, None]
    order = torch.where(valid, torch.atan2(away[..., 1], away[..., 0]), math.inf).argsort(1)
    away = away.gather(1, order[..., None].expand_as(away))
    away = torch.where(valid.gather(1, order)[..., None], away, away[:, :1])
    area = _cross(away, away.roll(-1, 1)).sum(1).abs() / 2
    return torch.where(count[:, 0] > 2, area, torch.zeros_like(area))


def _pairwise_overlap(a: Tensor, b: Tensor) -> Tensor:
    overlap = a.new_zeros(len(a), len(b), dtype=torch.float64)
    if not overlap.numel():
        return overlap
    # Boxes farther from each other than half of their diagonals have nothing in common.
    reach = (a[:, 3:5].norm(dim=1)[:, None] + b[:, 3:5].norm(dim=1)) / 2
    near = (torch.cdist(a[:, :2].double(), b[:, :2].double()) <= reach).nonzero()
    for rows in near.split(_CHUNK):
        overlap[rows[:, 0], rows[:, 1]] = _overlap_area(a[rows[:, 0]].double(), b[rows[:, 1]].double())
    return overlap


def _checked(a: Tensor, b: Tensor) -> None:
    for name, boxes in (("a", a), ("b", b)):
        if boxes.dim() != 2 or boxes.shape[1] != 7:
            raise ValueError(f"{name} must be boxes (N, 7), got {tuple(boxes.shape)}")


def iou_bev(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union (N, M) of boxes (N, 7) and (M, 7) seen from above.

    Raises:
        ValueError: they are no boxes.
    """
    _checked(a, b)
    overlap = _pairwise_overlap(a, b)
    union = (a[:, 3] * a[:, 4]).double()[:, None] + (b[:, 3] * b[:, 4]).double() - overlap
    return (overlap / union.clamp(min=_TINY)).to(a.dtype)


def iou_3d(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union (N, M) of the volumes of boxes (N, 7) and (M, 7).

    Raises:
        ValueError: they are no boxes.
    """
    _checked(a, b)
    low = torch.maximum((a[:, 2] - a[:, 5] / 2)[:, None], b[:, 2] - b[:, 5] / 2)
    high = torch.minimum((a[:, 2] + a[:, 5] / 2)[:, None], b[:, 2] + b[:, 5] / 2)
    overlap = _pairwise_overlap(a, b) * (high - low).clamp(min=0)
    volumes = [boxes[:, 3:6].double().prod(1) for boxes in (a, b)]
    union = volumes[0][:, None] + volumes[1] - overlap
    return (overlap / union.clamp(min=_TINY)).to(a.dtype)


def nearest_iou_bev(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union (N, M) seen from above, of boxes turned to the nearest axis; as anchors are matched.

    Raises:
        ValueError: they are no boxes.
    """
    _checked(a, b)
    sides = []
    for boxes in (a, b):
        across = (limit_period(boxes[:, 6], 0.5, math.pi).abs() >= math.pi / 4)[:, None]
        half = torch.where(across, boxes[:, [4, 3]], boxes[:, 3:5]) / 2
        sides.append((boxes[:, :2] - half, boxes[:, :2] + half))
    (low_a, high_a), (low_b, high_b) = sides
    common = (torch.minimum(high_a[:, None], high_b) - torch.maximum(low_a[:, None], low_b)).clamp(min=0).prod(2)
    areas = [(high - low).prod(1) for low, high in sides]
    return common / (areas[0][:, None] + areas[1] - common).clamp(min=_TINY)


def suppress_overlaps(boxes: Tensor, scores: Tensor, threshold: float, *, most: int = 512) -> Tensor:
    """Rows of the boxes (N, 7) that stay when each removes worse ones that overlap it, best first.

    Args:
        boxes: of one sample.
        scores: (N).
        threshold: intersection over union, seen from above, from which boxes overlap.
        most: only so many of the best are looked at.
    """
    order = scores.argsort(descending=True, stable=True)[:most]
    overlaps = (iou_bev(boxes[order], boxes[order]) > threshold).cpu()
    removed = torch.zeros(len(order), dtype=torch.bool)
    kept = []
    for row in range(len(order)):
        if not removed[row]:
            kept.append(row)
            removed |= overlaps[row]
    return order[torch.tensor(kept, dtype=torch.int64, device=order.device)]


def encode_boxes(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Offsets (..., 7) of boxes from anchors.

    Of the centre over the diagonal of the anchor's ground and over its height, logarithms of the ratios of sizes, and
    the difference of headings.
    """
    diagonal = anchors[..., 3:5].norm(dim=-1, keepdim=True)
    centre = boxes[..., :3] - anchors[..., :3]
    ground, up = centre[..., :2] / diagonal, centre[..., 2:3] / anchors[..., 5:6]
    sizes = (boxes[..., 3:6] / anchors[..., 3:6]).log()
    return torch.cat([ground, up, sizes, boxes[..., 6:] - anchors[..., 6:]], -1)


def decode_boxes(offsets: Tensor, anchors: Tensor) -> Tensor:
    """Boxes (..., 7) from their offsets from anchors, the inverse of `encode_boxes`."""
    diagonal = anchors[..., 3:5].norm(dim=-1, keepdim=True)
    ground = offsets[..., :2] * diagonal + anchors[..., :2]
    up = offsets[..., 2:3] * anchors[..., 5:6] + anchors[..., 2:3]
    return torch.cat([ground, up, offsets[..., 3:6].exp() * anchors[..., 3:6], offsets[..., 6:] + anchors[..., 6:]], -1)


def average_precision_r40(
    found: Sequence[tuple[Tensor, Tensor]],
    truths: Sequence[Tensor],
    threshold: float = 0.7,
    *,
    ignored: Sequence[Tensor] | None = None,
    overlap: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> float:
    """Mean over the recalls 1/40, 2/40, ... 1 of the best precision at that recall or a higher one, as KITTI has it.

    A detection takes the true box of its sample that it overlaps most and that no better detection has taken, if they
    overlap by the threshold.

    Args:
        found: for each sample boxes (N, 7) and scores (N).
        truths: for each sample its true boxes (M, 7).
        threshold: least intersection over union; 0.7 for cars.
        ignored: for each sample which of its true boxes (M) do not count, found or not, such as hard ones.
        overlap: of boxes with boxes; `iou_3d` when left out.

    Raises:
        ValueError: the numbers of samples differ.
    """
    if len(found) != len(truths):
        raise ValueError(f"found and truths must be of as many samples, got {len(found)} and {len(truths)}")
    hits: list[tuple[float, bool]] = []
    total = 0
    for sample, ((boxes, scores), true) in enumerate(zip(found, truths, strict=True)):
        idle = torch.zeros(len(true), dtype=torch.bool) if ignored is None else ignored[sample].cpu()
        total += int((~idle).sum())
        overlaps = (overlap or iou_3d)(boxes, true).cpu()
        free = torch.ones(len(true), dtype=torch.bool)
        for row in scores.argsort(descending=True, stable=True).tolist():
            possible = torch.where(free, overlaps[row], -1.0)
            best = int(possible.argmax()) if len(true) else -1
            if best >= 0 and float(possible[best]) >= threshold:
                free[best] = False
                if not idle[best]:
                    hits.append((float(scores[row]), True))
            else:
                hits.append((float(scores[row]), False))
    if not total:
        return math.nan
    hits.sort(key=lambda hit: -hit[0])
    right = torch.tensor([hit for _, hit in hits], dtype=torch.float64).cumsum(0)
    precision = right / torch.arange(1, len(hits) + 1)
    recall = right / total
    at = [precision[recall >= step / 40 - 1e-12] for step in range(1, 41)]
    return sum(float(values.max()) if len(values) else 0.0 for values in at) / 40
