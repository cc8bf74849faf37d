"""E-3DSNN for LiDAR detection: the spiking voxel backbone, a spiking map seen from above, and boxes from anchors.

Qiu, Yao, Zhang, Chou, Qiao, Zhou, Xu, Li: "Efficient 3D Recognition with Event-driven Spike Sparse Convolution",
AAAI 2025, arXiv 2412.07360. The backbone is the authors' ``VoxelBackBone8x_3dv_snn``; the map seen from above and the
boxes are those of Voxel R-CNN (Deng et al., AAAI 2021, arXiv 2012.15712) with neurons for ReLU. Its second stage stands
in `convatlas.networks.e3dsnn.refinement`.

Weights: the authors' detection checkpoints have another layout, which is not mapped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.networks.base import Feature, NetworkConfig
from convatlas.networks.e3dsnn.points import DownBlock, conv_norm, stem
from convatlas.networks.e3dsnn.refinement import BoxRefiner, RefinementConfig
from convatlas.nn.conv.sparse import SparseConv3d, SparseSequential, SubMConv3d
from convatlas.nn.spiking import IntegerLIF
from convatlas.ops.boxes3d import decode_boxes, encode_boxes, limit_period, nearest_iou_bev, suppress_overlaps
from convatlas.ops.sparse import SparseTensor

__all__ = [
    "VARIANTS",
    "AnchorHead",
    "BoxMaps",
    "E3DSNNDetector",
    "E3DSNNDetectorConfig",
    "SpikingMap",
    "VoxelBackbone",
]


@dataclass(frozen=True, kw_only=True)
class E3DSNNDetectorConfig(NetworkConfig):
    """Config of `E3DSNNDetector`; the defaults are those for cars in KITTI.

    Attributes:
        in_channels: features of a voxel: means of x, y, z and intensity.
        embed_dim: channels of the stem.
        dims, depths: channels and blocks of the three halved stages.
        out_dim: channels of the last, flat stage.
        spatial_shape: voxels along z, y and x; one more along z than the range holds.
        point_range: least x, y, z and greatest x, y, z in metres.
        map_depths, map_strides, map_dims: of the stages of the map seen from above.
        up_strides, up_dims: how each of them is enlarged before all are joined.
        anchor_sizes: length, width and height of the anchors of each class.
        anchor_bottoms: their lower ends.
        rotations: headings of each anchor.
        matched, unmatched: overlap from which an anchor is a box, and below which it is none.
        direction_offset: heading at which the first of two directions begins.
        max_spikes: largest number of spikes that a neuron sends at once.
        refinement: of the second stage; None leaves it out.
    """

    in_channels: int = 4
    embed_dim: int = 16
    dims: tuple[int, ...] = (32, 64, 64)
    depths: tuple[int, ...] = (2, 2, 2)
    out_dim: int = 128
    spatial_shape: tuple[int, int, int] = (41, 1600, 1408)
    point_range: tuple[float, ...] = (0.0, -40.0, -3.0, 70.4, 40.0, 1.0)
    map_depths: tuple[int, ...] = (5, 5)
    map_strides: tuple[int, ...] = (1, 2)
    map_dims: tuple[int, ...] = (64, 128)
    up_strides: tuple[int, ...] = (1, 2)
    up_dims: tuple[int, ...] = (128, 128)
    anchor_sizes: tuple[tuple[float, float, float], ...] = ((3.9, 1.6, 1.56),)
    anchor_bottoms: tuple[float, ...] = (-1.78,)
    rotations: tuple[float, ...] = (0.0, 1.57)
    matched: float = 0.6
    unmatched: float = 0.45
    direction_offset: float = 0.78539
    max_spikes: int = 4
    refinement: RefinementConfig | None = field(default_factory=RefinementConfig)

    def __post_init__(self) -> None:
        if len(self.dims) != len(self.depths) or min(self.dims, default=0) < 1:
            raise ValueError(f"dims and depths must be as many positive numbers, got {self.dims} and {self.depths}")
        parts = (self.map_depths, self.map_strides, self.map_dims, self.up_strides, self.up_dims)
        if len({len(part) for part in parts}) != 1:
            raise ValueError(f"the stages of the map must be as many in all settings, got {parts}")
        if len(self.anchor_sizes) != len(self.anchor_bottoms):
            raise ValueError(
                f"anchor_sizes and anchor_bottoms must be as many, got {self.anchor_sizes} and {self.anchor_bottoms}"
            )
        if self.refinement is not None and not all(0 <= level <= len(self.dims) for level in self.refinement.levels):
            raise ValueError(f"refinement.levels must be from 0 to {len(self.dims)}, got {self.refinement.levels}")
        if not 0 <= self.unmatched <= self.matched <= 1:
            raise ValueError(f"unmatched and matched must rise within [0, 1], got {self.unmatched} and {self.matched}")

    @property
    def num_classes(self) -> int:
        """Kinds of boxes."""
        return len(self.anchor_sizes)

    def build(self) -> E3DSNNDetector:
        """Make the network with fresh weights."""
        return E3DSNNDetector(self)


# -- backbone ----------------------------------------------------------------------------------------------------------


class VoxelBackbone(nn.Module):
    """Voxels to features at an eighth of the resolution: stem, one convolution, three halved stages, one along z."""

    def __init__(self, config: E3DSNNDetectorConfig) -> None:
        super().__init__()
        first, spikes = config.embed_dim, config.max_spikes
        self.stem = stem(config.in_channels, first, spikes)
        self.conv1 = SparseSequential(IntegerLIF(spikes), *conv_norm(SubMConv3d(first, first, 3, bias=False), first))
        self.stages = nn.ModuleList(
            DownBlock(before, after, depth, spikes, kernel_size=3, padding=1, key=f"sweep{index}")
            for index, ((before, after), depth) in enumerate(
                zip(pairwise((first, *config.dims)), config.depths, strict=True)
            )
        )
        last = SparseConv3d(config.dims[-1], config.out_dim, (3, 1, 1), (2, 1, 1), 0, bias=False)
        self.out = SparseSequential(*conv_norm(last, config.out_dim), IntegerLIF(spikes))
        self.feature_info = tuple(Feature(dim, 2**level) for level, dim in enumerate((first, *config.dims)))

    def forward(self, x: SparseTensor) -> tuple[list[SparseTensor], SparseTensor]:
        """Potentials of each stage as `feature_info` describes them, and the spikes after the convolution along z."""
        features = [self.conv1(self.stem(x))]
        for stage in self.stages:
            features.append(stage(features[-1]))
        return features, self.out(features[-1])


class SpikingMap(nn.Module):
    """Stages of convolutions on the map seen from above, enlarged to one size and joined; spikes in, spikes out."""

    def __init__(self, in_channels: int, config: E3DSNNDetectorConfig) -> None:
        super().__init__()
        self.stages, self.ups = nn.ModuleList(), nn.ModuleList()
        stages = (config.map_depths, config.map_strides, config.map_dims, config.up_strides, config.up_dims)
        before = in_channels
        for depth, stride, dim, up, up_dim in zip(*stages, strict=True):
            convs = [nn.Conv2d(before, dim, 3, stride, 1, bias=False)]
            convs += [nn.Conv2d(dim, dim, 3, padding=1, bias=False) for _ in range(depth)]
            layers = [part for conv in convs for part in _fired(conv, dim, config.max_spikes)]
            self.stages.append(nn.Sequential(*layers))
            enlarged = nn.ConvTranspose2d(dim, up_dim, up, up, bias=False)
            self.ups.append(nn.Sequential(*_fired(enlarged, up_dim, config.max_spikes)))
            before = dim
        self.out_channels = sum(config.up_dims)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, sum of up_dims, H, W)."""
        found = []
        for stage, up in zip(self.stages, self.ups, strict=True):
            x = stage(x)
            found.append(up(x))
        return torch.cat(found, 1)


def _fired(conv: nn.Module, channels: int, max_spikes: int) -> list[nn.Module]:
    return [conv, nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01), IntegerLIF(max_spikes)]


# -- boxes -------------------------------------------------------------------------------------------------------------


class BoxMaps(NamedTuple):
    """What is said of the anchors of a batch.

    Attributes:
        scores: (B, A, num_classes), before the sigmoid.
        offsets: (B, A, 7), as `convatlas.ops.boxes3d.encode_boxes` makes them.
        directions: (B, A, 2), scores of the two directions of a heading.
        anchors: (A, 7).
        classes: (A) int64, the class that each anchor has the size of.
        levels: features of the backbone, in training with a second stage.
        rois: for each sample the boxes (R, 7) of the first stage that the second one looked at; none in training.
        roi_classes: their classes (R).
        refined_scores: (R) of each, before the sigmoid.
        refined_offsets: (R, 7) of each.
    """

    scores: Tensor
    offsets: Tensor
    directions: Tensor
    anchors: Tensor
    classes: Tensor
    levels: tuple[SparseTensor, ...] = ()
    rois: tuple[Tensor, ...] = ()
    roi_classes: tuple[Tensor, ...] = ()
    refined_scores: tuple[Tensor, ...] = ()
    refined_offsets: tuple[Tensor, ...] = ()


class AnchorHead(nn.Module):
    """Scores, offsets and directions of anchors at every position of a map."""

    def __init__(self, in_channels: int, config: E3DSNNDetectorConfig) -> None:
        super().__init__()
        self.config = config
        self.count = config.num_classes * len(config.rotations)
        self.scores = nn.Conv2d(in_channels, self.count * config.num_classes, 1)
        self.offsets = nn.Conv2d(in_channels, self.count * 7, 1)
        self.directions = nn.Conv2d(in_channels, self.count * 2, 1)
        # Few anchors are boxes: all begin at one chance in a hundred.
        nn.init.constant_(self.scores.bias, -math.log(99))  # type: ignore[arg-type]
        nn.init.normal_(self.offsets.weight, std=0.001)

    def anchors(self, height: int, width: int, device: torch.device) -> Tensor:
        """Anchors (A, 7): position after position, first along x, at each the classes and their headings."""
        config = self.config
        low, high = config.point_range[:3], config.point_range[3:]
        x = torch.linspace(low[0], high[0], width, device=device)
        y = torch.linspace(low[1], high[1], height, device=device)
        own = [
            (bottom + size[2] / 2, *size, turn)
            for size, bottom in zip(config.anchor_sizes, config.anchor_bottoms, strict=True)
            for turn in config.rotations
        ]
        rows, columns = torch.meshgrid(y, x, indexing="ij")
        ground = torch.stack([columns, rows], -1).reshape(-1, 1, 2).expand(-1, self.count, -1)
        rest = torch.tensor(own, device=device).expand(len(ground), -1, -1)
        return torch.cat([ground, rest], -1).reshape(-1, 7)

    def forward(self, x: Tensor) -> BoxMaps:
        """Describe the anchors of a map (B, C, H, W)."""
        batch, _, height, width = x.shape
        anchors = self.anchors(height, width, x.device)
        scores, offsets, directions = (
            layer(x).movedim(1, -1).reshape(batch, len(anchors), -1)
            for layer in (self.scores, self.offsets, self.directions)
        )
        kinds = torch.arange(self.config.num_classes, device=x.device).repeat_interleave(len(self.config.rotations))
        return BoxMaps(scores, offsets, directions, anchors, kinds.repeat(height * width))


class E3DSNNDetector(nn.Module):
    """Boxes of a LiDAR sweep: voxels, a map seen from above, anchors."""

    def __init__(self, config: E3DSNNDetectorConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = VoxelBackbone(config)
        depth = config.spatial_shape[0]
        for _ in config.dims:
            depth = (depth - 1) // 2 + 1
        self.map = SpikingMap(config.out_dim * ((depth - 3) // 2 + 1), config)
        self.head = AnchorHead(self.map.out_channels, config)
        channels = [info.channels for info in self.backbone.feature_info]
        self.refiner = None
        if config.refinement is not None:
            self.refiner = BoxRefiner(channels, config.refinement, config.max_spikes)
        low, high = torch.tensor(config.point_range[:3]), torch.tensor(config.point_range[3:])
        z, y, x = config.spatial_shape
        # One plane of voxels more than the range holds.
        self.register_buffer("voxel_size", (high - low) / torch.tensor([x, y, z - 1]), persistent=False)
        self.register_buffer("low", low, persistent=False)

    voxel_size: Tensor
    low: Tensor

    @property
    def in_channels(self) -> int:
        """Features of a voxel."""
        return self.config.in_channels

    @property
    def num_classes(self) -> int:
        """Kinds of boxes."""
        return self.config.num_classes

    def example_inputs(self, batch: int = 1) -> tuple[SparseTensor]:
        """Random voxels, two thousand for each sample."""
        shape = self.config.spatial_shape
        columns = [torch.randint(size, (2000 * batch,)) for size in shape]
        sample = torch.arange(batch).repeat_interleave(2000)
        indices = torch.stack([sample, *columns], 1).unique(dim=0).int()
        return (SparseTensor(torch.randn(len(indices), self.in_channels), indices, shape, batch),)

    def forward(self, x: SparseTensor) -> BoxMaps:
        """Describe the anchors, given voxels as `convatlas.ops.point_grid.voxel_means` makes them: z, y, x.

        Raises:
            ValueError: x has another grid or other features.
        """
        if not isinstance(x, SparseTensor):
            raise ValueError(f"x must be a SparseTensor of voxels, got {type(x).__name__}")
        if x.spatial_shape != self.config.spatial_shape or x.channels != self.in_channels:
            raise ValueError(
                f"x must have a grid of {self.config.spatial_shape} with {self.in_channels} features, "
                f"got {x.spatial_shape} with {x.channels}"
            )
        levels, flat = self.backbone(x)
        found: BoxMaps = self.head(self.map(flat.dense().flatten(1, 2)))
        if self.refiner is None:
            return found
        if self.training:  # the second stage learns from boxes near the true ones, which `losses` knows
            return found._replace(levels=tuple(levels))
        chosen = self._proposals(found)
        rois = [boxes for boxes, _, _ in chosen]
        scores, offsets = self.refiner(levels, rois, self.voxel_size, self.low)
        kinds = tuple(kind for _, _, kind in chosen)
        return found._replace(
            rois=tuple(rois), roi_classes=kinds, refined_scores=tuple(scores), refined_offsets=tuple(offsets)
        )

    @torch.no_grad()
    def _proposals(self, found: BoxMaps) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Boxes of each sample that the second stage looks at."""
        refinement: RefinementConfig = self.config.refinement  # type: ignore[assignment]
        which = 0 if self.training else 1
        boxes = self._first_stage(found, 0.0, refinement.overlaps[which], most=refinement.candidates)
        count = refinement.proposals[which]
        return [(some[:count], scores[:count], kinds[:count]) for some, scores, kinds in boxes]

    def losses(self, found: BoxMaps, boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> dict[str, Tensor]:
        """Losses of a batch: focal loss of the scores, smooth L1 of the offsets, cross-entropy of the directions.

        Weights 1, 2 and 0.2; each sample counts by its number of anchors that are boxes. Of the second stage the
        cross-entropy of the quality, smooth L1 of changes and of corners are added.

        Args:
            found: what `forward` gave.
            boxes: for each sample its true boxes (M, 7).
            labels: for each sample their classes (M).
        """
        total: dict[str, list[Tensor]] = {"scores": [], "offsets": [], "directions": []}
        for sample, (true, kinds) in enumerate(zip(boxes, labels, strict=True)):
            target, best = self._assign(found, true, kinds)
            positive = target >= 0
            count = positive.sum().clamp(min=1)
            wanted = F.one_hot(target.clamp(min=0), self.num_classes) * positive[:, None]
            focal = _focal(found.scores[sample].float(), wanted.float()).sum(1)
            total["scores"].append(focal[target >= -1].sum() / count)
            anchors, goal = found.anchors[positive], true[best[positive]]
            offsets = found.offsets[sample].float()[positive]
            total["offsets"].append(_offset_loss(offsets, encode_boxes(goal, anchors)) / count)
            turned = limit_period(goal[:, 6] - self.config.direction_offset, 0.0)
            direction = (turned / math.pi).floor().long().clamp(0, 1)
            scores = found.directions[sample].float()[positive]
            total["directions"].append(F.cross_entropy(scores, direction, reduction="sum") / count)
        parts = {name: torch.stack(values).mean() for name, values in total.items()}
        if self.refiner is not None:
            parts |= self._refinement_losses(self.refiner, found, boxes, labels)
        weights = {"offsets": 2.0, "directions": 0.2}
        loss = torch.stack([weights.get(name, 1.0) * part for name, part in parts.items()]).sum()
        return {"loss": loss, **parts}

    def _refinement_losses(
        self, refiner: BoxRefiner, found: BoxMaps, boxes: Sequence[Tensor], labels: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        chosen = [
            refiner.choose(rois, kinds, true, names)
            for (rois, _, kinds), true, names in zip(self._proposals(found), boxes, labels, strict=True)
        ]
        rois = [some for some, _, _ in chosen]
        if sum(map(len, rois)) < 2:  # batch normalisation cannot learn from one
            return {}
        scores, offsets = refiner(found.levels, rois, self.voxel_size, self.low)
        true, overlap = (torch.cat([entry[index] for entry in chosen]) for index in (1, 2))
        return refiner.losses(torch.cat(scores), torch.cat(offsets), torch.cat(rois), true, overlap)

    def _assign(self, found: BoxMaps, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The class of each anchor (A), -1 for none and -2 for those that do not count, and the box (A) of each.

        An anchor is a box if it overlaps one of its class enough, or more than any other anchor does.
        """
        target = torch.full_like(found.classes, -1)
        best = torch.zeros_like(found.classes)
        for kind in range(self.num_classes):
            own, true = (found.classes == kind).nonzero()[:, 0], (labels == kind).nonzero()[:, 0]
            if not len(true):
                continue
            overlaps = nearest_iou_bev(found.anchors[own], boxes[true])
            largest, which = overlaps.max(1)
            most = overlaps.amax(0)
            forced = ((overlaps == most) & (most > 0)).any(1)
            positive = forced | (largest >= self.config.matched)
            value = torch.where(largest < self.config.unmatched, -1, -2)
            target[own] = torch.where(positive, kind, value)
            best[own] = true[which]
        return target, best

    @torch.no_grad()
    def decode(
        self, found: BoxMaps, *, score_threshold: float = 0.3, overlap_threshold: float = 0.1
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Boxes (N, 7), scores (N) and classes (N) of each sample, the best first, without overlaps.

        Args:
            found: what `forward` gave.
            score_threshold: least score.
            overlap_threshold: overlap seen from above from which the worse box is left out.
        """
        if not found.refined_scores:
            return self._first_stage(found, score_threshold, overlap_threshold)
        results = []
        for rois, kinds, values, changes in zip(
            found.rois, found.roi_classes, found.refined_scores, found.refined_offsets, strict=True
        ):
            scores = values.float().sigmoid()
            rows = (scores >= score_threshold).nonzero()[:, 0]
            boxes = BoxRefiner.changed(rois[rows], changes[rows].float())
            boxes = torch.cat([boxes[:, :6], limit_period(boxes[:, 6:])], 1)
            kept = suppress_overlaps(boxes, scores[rows], overlap_threshold)
            results.append((boxes[kept], scores[rows][kept], kinds[rows][kept]))
        return results

    def _first_stage(
        self, found: BoxMaps, score_threshold: float, overlap_threshold: float, most: int = 512
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        results = []
        for scores, offsets, directions in zip(found.scores, found.offsets, found.directions, strict=True):
            best, kinds = scores.float().sigmoid().max(1)
            order = best.argsort(descending=True, stable=True)[:most]
            rows = order[best[order] >= score_threshold]
            boxes = decode_boxes(offsets[rows].float(), found.anchors[rows])
            half = limit_period(boxes[:, 6] - self.config.direction_offset, 0.0, math.pi)
            heading = half + self.config.direction_offset + math.pi * directions[rows].argmax(1)
            boxes = torch.cat([boxes[:, :6], limit_period(heading)[:, None]], 1)
            kept = suppress_overlaps(boxes, best[rows], overlap_threshold, most=most)
            results.append((boxes[kept], best[rows][kept], kinds[rows][kept]))
        return results


def _focal(scores: Tensor, wanted: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, arXiv 1708.02002, for each score."""
    chance = scores.sigmoid()
    share = wanted * alpha + (1 - wanted) * (1 - alpha)
    wrong = wanted * (1 - chance) + (1 - wanted) * chance
    return share * wrong**gamma * F.binary_cross_entropy_with_logits(scores, wanted, reduction="none")


def _offset_loss(offsets: Tensor, wanted: Tensor, beta: float = 1 / 9) -> Tensor:
    """Smooth L1, summed; of headings the sine of the difference counts, which both directions have in common."""
    a, b = offsets[:, 6:], wanted[:, 6:]
    ours = torch.cat([offsets[:, :6], a.sin() * b.cos()], 1)
    theirs = torch.cat([wanted[:, :6], a.cos() * b.sin()], 1)
    return F.smooth_l1_loss(ours, theirs, beta=beta, reduction="sum")


VARIANTS: dict[str, E3DSNNDetectorConfig] = {"e3dsnn_kitti_car": E3DSNNDetectorConfig()}
