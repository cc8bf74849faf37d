"""LiDAR sweeps with boxes around things: KITTI, and simulated streets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from convatlas.data.image_files import Unreadable
from convatlas.data.point_sets import CloudSet
from convatlas.data.points import read_cloud
from convatlas.errors import DataError

__all__ = ["Sweep", "SweepAugment", "read_sweep", "read_sweeps", "street"]

Floats = npt.NDArray[np.float32]

#: Width and height of KITTI's left colour image; things outside of it have no box.
_IMAGE = (1242, 375)
#: A thing is easy or moderate to see with so many pixels, at most so much hidden and cut off.
_LEAST_PIXELS, _MOST_HIDDEN, _MOST_CUT = 25, 1, 0.3
#: Kinds that look like another and are neither right nor wrong in its place.
_ALIKE = {"Car": ("Van",), "Pedestrian": ("Person_sitting",)}
_STREETS = 60


@dataclass(frozen=True, eq=False)
class Sweep:
    """One turn of a LiDAR.

    Attributes:
        points: (N, 4) float32: x forwards, y to the left, z up in metres, and intensity.
        boxes: (M, 7) float32: centre, length, width, height, heading from x.
        labels: (M,) int64, the class of each box.
        ignored: (M,) bool, whether a box does not count in measures of quality: it is hard to see, or of a kind alike.
    """

    points: Floats
    boxes: Floats
    labels: npt.NDArray[np.int64]
    ignored: npt.NDArray[np.bool_]


def read_sweeps(data: str | Path, classes: Sequence[str], point_range: Sequence[float]) -> dict[str, CloudSet]:
    """Find sweeps with boxes, in their splits; without splits all are under ``all``.

    Args:
        data: KITTI's object data, a folder with ``training`` in it, split by ``ImageSets/train.txt`` and ``val.txt``
            where these are; or ``streets`` for simulated ones, whose only class is the first.
        classes: kinds of things to find, by KITTI's names.
        point_range: least x, y, z and greatest x, y, z; boxes whose centre is outside are left out.

    Raises:
        DataError: there is no such data.
    """
    names = tuple(classes)
    if str(data) == "streets":
        own = partial(_street, tuple(point_range))
        every = tuple(f"{index:04d}" for index in range(_STREETS))
        return {"all": CloudSet(every, np.full(_STREETS, -1), names, own)}
    root = Path(data)
    folder = root / "training"
    if not (folder / "velodyne").is_dir():
        raise DataError(f"{root} must be KITTI's object data with training/velodyne, label_2 and calib in it")
    source = partial(_kitti, str(folder), names, tuple(point_range))
    found = {split: root / "ImageSets" / f"{split}.txt" for split in ("train", "val")}
    if all(path.is_file() for path in found.values()):
        splits = {split: tuple(path.read_text(encoding="utf-8").split()) for split, path in found.items()}
    else:
        splits = {"all": tuple(path.stem for path in sorted((folder / "velodyne").glob("*.bin")))}
    if not all(splits.values()):
        raise DataError(f"{root} holds no sweeps")
    return {split: CloudSet(part, np.full(len(part), -1), names, source) for split, part in splits.items()}


def read_sweep(name: str) -> Sweep:
    """The points of one file, without boxes.

    Raises:
        Unreadable: the file fails, or its points have no intensity.
    """
    cloud = read_cloud(name)
    if cloud.features.shape[1] != 1:
        raise Unreadable(name, f"a point must have an intensity, got {cloud.features.shape[1]} numbers beside x, y, z")
    points = np.concatenate([cloud.coordinates, cloud.features], 1)
    return Sweep(points, np.zeros((0, 7), np.float32), np.zeros(0, np.int64), np.zeros(0, np.bool_))


# -- KITTI -------------------------------------------------------------------------------------------------------------


def _kitti(folder: str, classes: tuple[str, ...], point_range: tuple[float, ...], name: str) -> Sweep:
    root = Path(folder)
    sweep = read_sweep(str(root / "velodyne" / f"{name}.bin"))
    try:
        table = _calibration(root / "calib" / f"{name}.txt")
        lines = (root / "label_2" / f"{name}.txt").read_text(encoding="ascii").splitlines()
        camera = table["R0_rect"] @ table["Tr_velo_to_cam"]
        seen = _in_image(sweep.points[:, :3], table["P2"] @ camera)
        back = np.asarray(np.linalg.inv(camera), np.float64)
        found = [entry for line in lines if (entry := _box(line.split(), classes, back)) is not None]
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise Unreadable(name, f"its labels or calibration fail: {error}") from None
    low, high = np.array(point_range[:3]), np.array(point_range[3:])
    found = [entry for entry in found if ((entry[0][:3] >= low) & (entry[0][:3] <= high)).all()]
    boxes = np.array([box for box, _, _ in found], np.float32).reshape(-1, 7)
    labels = np.array([label for _, label, _ in found], np.int64)
    return Sweep(sweep.points[seen], boxes, labels, np.array([hard for _, _, hard in found], np.bool_))


def _calibration(path: Path) -> dict[str, npt.NDArray[np.float64]]:
    """Matrices (4, 4) by name."""
    found = {}
    for line in path.read_text(encoding="ascii").splitlines():
        name, _, numbers = line.partition(":")
        values = np.array(numbers.split(), np.float64)
        if len(values) in (9, 12):
            matrix = np.eye(4)
            matrix[:3, : len(values) // 3] = values.reshape(3, -1)
            found[name] = matrix
    return found


def _in_image(points: Floats, projection: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    seen = np.concatenate([points, np.ones((len(points), 1))], 1) @ projection.T
    depth = np.where(seen[:, 2] > 0, seen[:, 2], np.inf)
    across, down = seen[:, 0] / depth, seen[:, 1] / depth
    inside = (across >= 0) & (across < _IMAGE[0]) & (down >= 0) & (down < _IMAGE[1])
    return np.asarray((seen[:, 2] > 0) & inside)


def _box(
    words: Sequence[str], classes: tuple[str, ...], to_lidar: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], int, bool] | None:
    kind = words[0]
    alike = None if kind in classes else next((name for name in classes if kind in _ALIKE.get(name, ())), None)
    if kind not in classes and alike is None:
        return None
    cut, hidden, _, _, top, _, bottom, height, width, length, x, y, z, turn = map(float, words[1:15])
    centre = (to_lidar @ np.array([x, y, z, 1.0]))[:3]
    centre[2] += height / 2  # a place of KITTI is the middle of the bottom
    hard = bottom - top < _LEAST_PIXELS or hidden > _MOST_HIDDEN or cut > _MOST_CUT or alike is not None
    box = np.array([*centre, length, width, height, -(turn + math.pi / 2)])
    return box, classes.index(alike or kind), hard


# -- streets -----------------------------------------------------------------------------------------------------------


def _street(point_range: tuple[float, ...], name: str) -> Sweep:
    return street(point_range, seed=int(name))


def street(point_range: Sequence[float], *, cars: tuple[int, int] = (2, 6), points: int = 6000, seed: int = 0) -> Sweep:
    """A flat road with walls and cars; the LiDAR sees the sides that look at it, less of what is far away.

    Args:
        point_range: least x, y, z and greatest x, y, z; the LiDAR stands at the origin, 1.73 m above the road.
        cars: least and largest number of cars.
        points: how many about.
        seed: of everything that is random.
    """
    generator = np.random.default_rng(seed)
    low, high = np.array(point_range[:2]), np.array(point_range[3:5])
    boxes: list[list[float]] = []
    for _ in range(20 * cars[1]):
        if len(boxes) >= int(generator.integers(cars[0], cars[1] + 1)):
            break
        margin = np.minimum(3.0, (high - low) / 4)
        x, y = generator.uniform(low + margin, high - margin)
        if math.hypot(x, y) < 3 or any(math.hypot(x - box[0], y - box[1]) < 5 for box in boxes):
            continue
        size = np.array([3.9, 1.6, 1.56]) * generator.uniform(0.9, 1.1, 3)
        boxes.append([x, y, -1.73 + size[2] / 2, *size, generator.uniform(-math.pi, math.pi)])
    parts = [np.column_stack([generator.uniform(low, high, (points, 2)), np.full(points, -1.73)])]
    wall = generator.uniform(low, high, (points // 4, 2))
    wall[:, 1] = np.where(generator.random(len(wall)) < 0.5, low[1] + 0.5, high[1] - 0.5)
    parts.append(np.column_stack([wall, generator.uniform(-1.73, 0.5, len(wall))]))
    parts += [_car(np.array(box), generator) for box in boxes]
    places = np.concatenate(parts)
    intensity = np.concatenate([np.full((len(part), 1), 0.2 if index < 2 else 0.6) for index, part in enumerate(parts)])
    distance = np.linalg.norm(places[:, :2], axis=1)
    kept = generator.random(len(places)) < np.clip(12 / np.maximum(distance, 1e-3), 0.08, 1)
    places = places[kept] + 0.02 * generator.standard_normal((int(kept.sum()), 3))
    bright = intensity[kept] + 0.1 * generator.standard_normal((len(places), 1))
    count = len(boxes)
    return Sweep(
        np.concatenate([places, bright], 1).astype(np.float32),
        np.array(boxes, np.float32).reshape(-1, 7),
        np.zeros(count, np.int64),
        np.zeros(count, np.bool_),
    )


def _car(box: npt.NDArray[np.float64], generator: np.random.Generator, count: int = 700) -> npt.NDArray[np.float64]:
    """Points on the roof and on the sides of a box that look at the origin."""
    local = generator.uniform(-0.5, 0.5, (count, 3))
    axis = generator.choice(3, count, p=[0.25, 0.45, 0.3])
    side = np.where(axis == 2, 1.0, generator.choice([-1.0, 1.0], count))
    local[np.arange(count), axis] = side / 2
    normal = np.zeros((count, 3))
    normal[np.arange(count), axis] = side
    cos, sin = math.cos(box[6]), math.sin(box[6])
    turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    places = (local * box[3:6]) @ turn.T + box[:3]
    facing = ((normal @ turn.T) * places).sum(1) < 0
    return np.asarray(places[facing | (axis == 2)])


# -- changes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SweepAugment:
    """Random changes of a training sweep and its boxes.

    Attributes:
        flip: probability of a mirror at y = 0.
        rotate: largest turn about z in radians, to either side.
        scale: range of the factor of all lengths.

    Raises:
        ValueError: a setting is out of range.
    """

    flip: float = 0.5
    rotate: float = math.pi / 4
    scale: tuple[float, float] = (0.95, 1.05)

    def __post_init__(self) -> None:
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip must be in [0, 1], got {self.flip}")
        if not 0 <= self.rotate <= math.pi:
            raise ValueError(f"rotate must be from 0 to pi, got {self.rotate}")
        if not 0 < self.scale[0] <= self.scale[1] < math.inf:
            raise ValueError(f"scale must be a range of positive factors, got {self.scale}")

    def __call__(self, sweep: Sweep, generator: torch.Generator) -> Sweep:
        """Change a sweep; what is drawn depends on the generator only."""
        draw = torch.rand(3, generator=generator).tolist()
        points, boxes = sweep.points.copy(), sweep.boxes.copy()
        if draw[0] < self.flip:
            points[:, 1] *= -1
            boxes[:, [1, 6]] *= -1
        angle = self.rotate * (2 * draw[1] - 1)
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], np.float32)
        points[:, :2], boxes[:, :2] = points[:, :2] @ turn.T, boxes[:, :2] @ turn.T
        boxes[:, 6] += angle
        factor = self.scale[0] + (self.scale[1] - self.scale[0]) * draw[2]
        points[:, :3] *= factor
        boxes[:, :6] *= factor
        return replace(sweep, points=points, boxes=boxes)
