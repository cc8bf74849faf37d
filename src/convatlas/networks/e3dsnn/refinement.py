"""The second stage of E-3DSNN's detector: boxes are refined by what lies inside them.

It is the second stage of Voxel R-CNN (Deng, Shi, Li, Zhou, Zhang, Li: "Voxel R-CNN: Towards High Performance
Voxel-based 3D Object Detection", AAAI 2021, arXiv 2012.15712, sections 3.2 and 3.3) with neurons for ReLU: a grid of
points in each box gathers the voxels around it at three resolutions, and two small networks say how good the box is and
how it should change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.nn.spiking import IntegerLIF
from convatlas.ops.boxes3d import box_corners, decode_boxes, encode_boxes, iou_3d, limit_period
from convatlas.ops.sparse import SparseTensor
from convatlas.ops.sparse.query import places_around

__all__ = ["BoxRefiner", "GridPooling", "RefinementConfig"]


@dataclass(frozen=True, kw_only=True)
class RefinementConfig:
    """Config of `BoxRefiner`; the defaults are those for cars in KITTI.

    Attributes:
        grid: points along each side of a box.
        levels: features that are gathered, as places in ``feature_info`` of the backbone.
        radii: how far around a point, in metres, at each level.
        reach: voxels that are looked at on each side of a point.
        samples: voxels that a point gathers at most.
        dim: channels of what it gathers at a level.
        hidden_dims: channels of the layers on a whole box.
        dropout: rate between them.
        candidates: boxes of the first stage that are looked at, by their scores.
        proposals: boxes of a sample that are refined, in training and else.
        overlaps: overlap seen from above from which the worse of two of them is left out, in training and else.
        rois: boxes of a sample that are learned from.
        foreground: largest share of them that overlap a true box by ``regressed``.
        regressed: overlap from which a box learns how to change.
        good, bad: overlaps from which a box is good and below which it is bad; in between its score rises evenly.
    """

    grid: int = 6
    levels: tuple[int, ...] = (1, 2, 3)
    radii: tuple[float, ...] = (0.4, 0.8, 1.6)
    reach: int = 4
    samples: int = 16
    dim: int = 32
    hidden_dims: tuple[int, ...] = (256, 256)
    dropout: float = 0.3
    candidates: int = 2048
    proposals: tuple[int, int] = (512, 100)
    overlaps: tuple[float, float] = (0.8, 0.7)
    rois: int = 128
    foreground: float = 0.5
    regressed: float = 0.55
    good: float = 0.75
    bad: float = 0.25

    def __post_init__(self) -> None:
        if not self.levels or len(self.levels) != len(self.radii):
            raise ValueError(f"levels and radii must be as many, got {self.levels} and {self.radii}")
        if not 0 <= self.bad < self.good <= 1:
            raise ValueError(f"bad and good must rise within [0, 1], got {self.bad} and {self.good}")


class GridPooling(nn.Module):
    """The largest spikes of the voxels around points: of features and of where they lie from the point."""

    def __init__(self, in_channels: int, dim: int, max_spikes: int, *, reach: int, radius: float, samples: int) -> None:
        super().__init__()
        self.reach, self.radius, self.samples = reach, radius, samples
        self.features = nn.Sequential(IntegerLIF(max_spikes), *_linear_norm(in_channels, dim))
        self.position = nn.Sequential(*_linear_norm(3, dim))
        self.fire = IntegerLIF(max_spikes)
        self.out = nn.Sequential(*_linear_norm(dim, dim), IntegerLIF(max_spikes))
        self.dim = dim

    def forward(self, level: SparseTensor, points: Tensor, samples: Tensor, side: Tensor, low: Tensor) -> Tensor:
        """Spikes (M, dim) of points.

        Args:
            level: features in voxels along z, y and x.
            points: (M, 3), x, y, z in metres.
            samples: (M), the sample of each.
            side: (3) of a voxel along x, y and z.
            low: (3), where the grid begins.
        """
        places = ((points - low) / side).flip(1)
        point, row = places_around(
            level, places, samples, side=side.flip(0), reach=self.reach, radius=self.radius, most=self.samples
        )
        away = (level.indices[row, 1:].flip(1) + 0.5) * side + low - points[point]
        gathered = points.new_zeros(len(points), self.dim)
        if len(point) > int(self.training):  # batch normalisation cannot learn from one
            fired = self.fire(self.features(level.features)[row] + self.position(away.to(level.features.dtype)))
            target = point[:, None].expand_as(fired)
            gathered = gathered.to(fired.dtype).scatter_reduce(0, target, fired, "amax")
        result: Tensor = self.out(gathered)
        return result


class BoxRefiner(nn.Module):
    """How good boxes are and how they should change, by what lies in them.

    Args:
        channels: of every level of the backbone.
        config: of the stage.
        max_spikes: largest number of spikes that a neuron sends at once.
    """

    def __init__(self, channels: Sequence[int], config: RefinementConfig, max_spikes: int) -> None:
        super().__init__()
        self.config = config
        self.pools = nn.ModuleList(
            GridPooling(
                channels[level], config.dim, max_spikes, reach=config.reach, radius=radius, samples=config.samples
            )
            for level, radius in zip(config.levels, config.radii, strict=True)
        )

        def layers(before: int) -> nn.Sequential:
            made: list[nn.Module] = []
            for index, dim in enumerate(config.hidden_dims):
                made += [nn.Dropout(config.dropout)] if index else []
                made += [*_linear_norm(before, dim), IntegerLIF(max_spikes)]
                before = dim
            return nn.Sequential(*made)

        last = config.hidden_dims[-1]
        self.shared = layers(len(config.levels) * config.dim * config.grid**3)
        self.scores = nn.Sequential(layers(last), nn.Linear(last, 1))
        self.offsets = nn.Sequential(layers(last), nn.Linear(last, 7))
        nn.init.normal_(self.offsets[-1].weight, std=0.001)  # type: ignore[arg-type]
        nn.init.zeros_(self.offsets[-1].bias)  # type: ignore[arg-type]

    def forward(
        self, levels: Sequence[SparseTensor], rois: Sequence[Tensor], side: Tensor, low: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Scores (R), before the sigmoid, and offsets (R, 7) of the boxes (R, 7) of each sample.

        Args:
            levels: features of the backbone.
            rois: boxes of each sample.
            side: (3) of a voxel of the first level along x, y and z.
            low: (3), where the grid begins.
        """
        counts = [len(boxes) for boxes in rois]
        boxes = torch.cat(list(rois))
        if not len(boxes):
            return [boxes[:, 0]] * len(rois), [boxes] * len(rois)
        grid = self.config.grid
        points = self._points(boxes).reshape(-1, 3)
        owner = torch.arange(len(counts), device=boxes.device).repeat_interleave(
            torch.tensor(counts, device=boxes.device) * grid**3
        )
        found = [
            pool(levels[level], points, owner, side * 2**level, low)
            for pool, level in zip(self.pools, self.config.levels, strict=True)
        ]
        shared = self.shared(torch.cat(found, 1).reshape(len(boxes), -1))
        scores, offsets = self.scores(shared).squeeze(1), self.offsets(shared)
        return list(scores.split(counts)), list(offsets.split(counts))

    def _points(self, boxes: Tensor) -> Tensor:
        """The grid (R, grid^3, 3) in boxes."""
        grid = self.config.grid
        steps = (torch.arange(grid, device=boxes.device, dtype=boxes.dtype) + 0.5) / grid - 0.5
        local = torch.cartesian_prod(steps, steps, steps) * boxes[:, None, 3:6]
        return _turned(local, boxes[:, None, 6]) + boxes[:, None, :3]

    # Learning

    def choose(self, rois: Tensor, kinds: Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (S, 7) of a sample to learn from, the true box (S, 7) of each and their overlap (S).

        At most the share ``foreground`` overlaps a true box of its class well; of the others most overlap one a little.
        """
        overlap = iou_3d(rois, boxes) * (kinds[:, None] == labels) if len(boxes) else rois.new_zeros(len(rois), 1)
        best, which = overlap.max(1)
        true = boxes[which] if len(boxes) else rois
        config = self.config
        front = (best >= config.regressed).nonzero()[:, 0]
        hard = ((best >= 0.1) & (best < config.regressed)).nonzero()[:, 0]
        easy = (best < 0.1).nonzero()[:, 0]
        kept = _some(front, round(config.foreground * config.rois))
        left = config.rois - len(kept)
        harder = _some(hard, max(round(0.8 * left), left - len(easy)))
        rows = torch.cat([kept, harder, _some(easy, left - len(harder))])
        return rois[rows], true[rows], best[rows]

    def losses(self, scores: Tensor, offsets: Tensor, rois: Tensor, true: Tensor, overlap: Tensor) -> dict[str, Tensor]:
        """Cross-entropy of the scores, smooth L1 of the offsets, and of the corners of the changed boxes."""
        config = self.config
        wanted = ((overlap - config.bad) / (config.good - config.bad)).clamp(0, 1)
        quality = F.binary_cross_entropy_with_logits(scores.float(), wanted.float())
        rows = overlap >= config.regressed
        count = rows.sum().clamp(min=1)
        said, own, goal = offsets.float()[rows], rois[rows], self._seen_from(true[rows], rois[rows])
        change = F.smooth_l1_loss(said, encode_boxes(goal, _at_origin(own)), beta=1 / 9, reduction="sum") / count
        ours, theirs = box_corners(self.changed(own, said)), box_corners(true[rows])
        turned = true[rows] + true.new_tensor([0, 0, 0, 0, 0, 0, math.pi])
        gap = torch.minimum((ours - theirs).norm(dim=2), (ours - box_corners(turned)).norm(dim=2))
        corners = F.smooth_l1_loss(gap, torch.zeros_like(gap), reduction="sum") / (8 * count)
        return {"quality": quality, "change": change, "corners": corners}

    @staticmethod
    def _seen_from(boxes: Tensor, rois: Tensor) -> Tensor:
        """Boxes in the frames of others, with the heading of the nearer end."""
        centre = _turned(boxes[:, :3] - rois[:, :3], -rois[:, 6])
        heading = limit_period(boxes[:, 6] - rois[:, 6], 0.5, math.pi)
        return torch.cat([centre, boxes[:, 3:6], heading[:, None]], 1)

    @staticmethod
    def changed(rois: Tensor, offsets: Tensor) -> Tensor:
        """Boxes (R, 7) after their offsets."""
        local = decode_boxes(offsets, _at_origin(rois))
        centre = _turned(local[:, :3], rois[:, 6]) + rois[:, :3]
        return torch.cat([centre, local[:, 3:6], (local[:, 6] + rois[:, 6])[:, None]], 1)


def _linear_norm(in_channels: int, out_channels: int) -> list[nn.Module]:
    return [nn.Linear(in_channels, out_channels, bias=False), nn.BatchNorm1d(out_channels)]


def _at_origin(boxes: Tensor) -> Tensor:
    zero = torch.zeros_like(boxes[:, :3])
    return torch.cat([zero, boxes[:, 3:6], zero[:, :1]], 1)


def _turned(points: Tensor, angle: Tensor) -> Tensor:
    """Points (..., 3) turned about z by angles (...)."""
    cos, sin = angle.cos(), angle.sin()
    x, y, z = points.unbind(-1)
    return torch.stack([x * cos - y * sin, x * sin + y * cos, z.expand_as(x * cos)], -1)


def _some(rows: Tensor, count: int) -> Tensor:
    """At most so many, at random."""
    return rows[torch.randperm(len(rows), device=rows.device)[: max(count, 0)]]
