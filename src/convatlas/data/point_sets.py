"""Sets of point clouds: folders of classes, ModelNet's lists, SemanticKITTI's sequences, and simulated ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from convatlas.data.image_files import Unreadable
from convatlas.data.images import Skipped
from convatlas.data.point_shapes import SCENE_CLASSES, SOLIDS, scene, solid
from convatlas.data.points import SUFFIXES, Cloud, read_cloud
from convatlas.errors import DataError

__all__ = ["KITTI_CLASSES", "KITTI_LABELS", "CloudSet", "cloud_files", "read_clouds", "read_scenes"]

#: Classes of SemanticKITTI's single-scan benchmark, and its raw labels of each.
KITTI_LABELS: dict[str, tuple[int, ...]] = {
    "car": (10, 252),
    "bicycle": (11,),
    "motorcycle": (15,),
    "truck": (18, 258),
    "other-vehicle": (13, 16, 20, 256, 257, 259),
    "person": (30, 254),
    "bicyclist": (31, 253),
    "motorcyclist": (32, 255),
    "road": (40, 60),
    "parking": (44,),
    "sidewalk": (48,),
    "other-ground": (49,),
    "building": (50,),
    "fence": (51,),
    "vegetation": (70,),
    "trunk": (71,),
    "terrain": (72,),
    "pole": (80,),
    "traffic-sign": (81,),
}
KITTI_CLASSES = tuple(KITTI_LABELS)
_KITTI_SPLITS = {"train": (0, 1, 2, 3, 4, 5, 6, 7, 9, 10), "val": (8,)}
_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
#: Clouds of the simulated sets.
_SOLIDS, _SCENES = 240, 40


@dataclass(frozen=True, eq=False)
class CloudSet:
    """Clouds that are read when they are needed.

    Attributes:
        names: of the clouds.
        labels: (N,) int64, the class of each cloud, -1 where it has none.
        classes: names of the classes, of clouds or of points.
        source: reads a cloud by its name; raises `Unreadable`.
        skipped: files that were left out.
    """

    names: tuple[str, ...]
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    source: Callable[[str], Any]
    skipped: tuple[Skipped, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def cloud(self, index: int) -> Any:
        """Read one cloud, a `Cloud` or a `Sweep`.

        Raises:
            Unreadable: the file fails.
        """
        return self.source(self.names[index])

    def subset(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> CloudSet:
        """Some of the clouds."""
        return replace(self, names=tuple(self.names[row] for row in rows), labels=self.labels[np.asarray(rows, int)])


def cloud_files(folder: Path) -> list[Path]:
    """The files of clouds below a folder, in alphabetical order."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix.lower() in SUFFIXES]


# -- clouds with a class -----------------------------------------------------------------------------------------------


def read_clouds(data: str | Path) -> dict[str, CloudSet]:
    """Find clouds with a class each, in their splits; without splits all are under ``all``.

    Args:
        data: a folder with a folder for each class (or ``train``, ``val``, ``test`` with those, or with ``train`` and
            ``test`` in every class as ModelNet's meshes have), a folder with ModelNet's lists
            (``modelnet40_train.txt``), or ``solids`` for simulated ones.

    Raises:
        DataError: there is no such data.
    """
    if str(data) == "solids":
        names = tuple(f"{index:04d}" for index in range(_SOLIDS))
        labels = np.arange(_SOLIDS) % len(SOLIDS)
        return {"all": CloudSet(names, labels.astype(np.int64), SOLIDS, _simulated_solid)}
    root = _folder(data)
    lists = {path: match for path in sorted(root.glob("*.txt")) if (match := _LIST.fullmatch(path.name))}
    if lists:
        return _from_lists(root, {match["split"]: path for path, match in lists.items()})
    tops = _splits(root)
    entries: dict[str, list[tuple[str, str]]] = {}
    if tops:
        for split, folder in tops.items():
            entries[split] = _by_class(root, folder)
    else:
        for name, label in _by_class(root, root):
            inner = Path(name).parts[1:-1]
            split = _SPLITS.get(inner[0].lower(), "all") if inner else "all"
            entries.setdefault(split, []).append((name, label))
    classes = tuple(sorted({label for part in entries.values() for _, label in part}))
    if len(classes) < 2:
        raise DataError(
            f"{root} must hold a folder of clouds for each of at least two classes, e.g. {root}/chair/1.ply; "
            f"found {', '.join(classes) or 'none'}"
        )
    if "all" in entries and len(entries) > 1:
        raise DataError(f"{root} has clouds inside and outside of train and test folders")
    return {split: _class_set(root, part, classes) for split, part in entries.items()}


def _class_set(root: Path, entries: Sequence[tuple[str, str]], classes: tuple[str, ...]) -> CloudSet:
    position = {name: index for index, name in enumerate(classes)}
    labels = np.array([position[label] for _, label in entries], dtype=np.int64)
    return CloudSet(tuple(name for name, _ in entries), labels, classes, partial(_file, str(root)))


def _by_class(root: Path, folder: Path) -> list[tuple[str, str]]:
    return [
        (path.relative_to(root).as_posix(), path.relative_to(folder).parts[0])
        for path in cloud_files(folder)
        if len(path.relative_to(folder).parts) > 1
    ]


_LIST = re.compile(r"modelnet\d+_(?P<split>train|test)\.txt")


def _from_lists(root: Path, lists: Mapping[str, Path]) -> dict[str, CloudSet]:
    entries = {}
    for split, path in lists.items():
        names = path.read_text(encoding="utf-8").split()
        pairs = [(name, name.rpartition("_")[0]) for name in names]
        entries[split] = [(f"{label}/{name}.txt", label) for name, label in pairs]
    classes = tuple(sorted({label for part in entries.values() for _, label in part}))
    return {split: _class_set(root, part, classes) for split, part in entries.items()}


# -- clouds whose points have classes ----------------------------------------------------------------------------------


def read_scenes(data: str | Path) -> dict[str, CloudSet]:
    """Find clouds with a class for each point, in their splits; without splits all are under ``all``.

    Args:
        data: a folder of PLY or NPZ files with labels (or ``train``, ``val``, ``test`` with those), with the names of
            the classes in ``classes.txt``, a line each; SemanticKITTI, a folder with ``sequences``; or ``scenes`` for
            simulated ones. Labels below 0 do not count.

    Raises:
        DataError: there is no such data.
    """
    if str(data) == "scenes":
        names = tuple(f"{index:04d}" for index in range(_SCENES))
        return {"all": CloudSet(names, np.full(_SCENES, -1), SCENE_CLASSES, _simulated_scene)}
    root = _folder(data)
    for folder in (root / "sequences", root / "dataset" / "sequences"):
        if folder.is_dir():
            return _semantic_kitti(folder)
    found = {split: cloud_files(folder) for split, folder in (_splits(root) or {"all": root}).items()}
    found = {split: [path for path in files if path.name != "classes.txt"] for split, files in found.items()}
    if not any(found.values()):
        raise DataError(f"{root} holds no clouds ({', '.join(SUFFIXES)})")
    classes = _class_names(root, [path for files in found.values() for path in files])
    return {
        split: CloudSet(
            tuple(path.relative_to(root).as_posix() for path in files),
            np.full(len(files), -1),
            classes,
            partial(_file, str(root)),
        )
        for split, files in found.items()
        if files
    }


def _class_names(root: Path, files: Sequence[Path]) -> tuple[str, ...]:
    listed = root / "classes.txt"
    if listed.is_file():
        return tuple(line.strip() for line in listed.read_text(encoding="utf-8").splitlines() if line.strip())
    largest = -1
    for path in files:
        try:
            labels = read_cloud(path).labels
        except Unreadable:
            continue  # told when the set is used
        largest = max(largest, -1 if labels is None or not len(labels) else int(labels.max()))
    if largest < 1:
        raise DataError(f"the clouds of {root} must have labels of at least two classes, e.g. a PLY property 'label'")
    return tuple(f"class {index}" for index in range(largest + 1))


def _semantic_kitti(folder: Path) -> dict[str, CloudSet]:
    sets = {}
    for split, sequences in _KITTI_SPLITS.items():
        files = [path for number in sequences for path in sorted((folder / f"{number:02d}" / "velodyne").glob("*.bin"))]
        if files:
            names = tuple(path.relative_to(folder).as_posix() for path in files)
            sets[split] = CloudSet(names, np.full(len(names), -1), KITTI_CLASSES, partial(_kitti_file, str(folder)))
    if "train" not in sets:
        raise DataError(f"{folder} has no scans of the training sequences, e.g. {folder}/00/velodyne/000000.bin")
    return sets


# -- sources -----------------------------------------------------------------------------------------------------------


def _file(root: str, name: str) -> Cloud:
    return read_cloud(Path(root) / name, name=name)


def _kitti_file(root: str, name: str) -> Cloud:
    path = Path(root) / name
    cloud = read_cloud(path, name=name)
    beside = path.parent.parent / "labels" / f"{path.stem}.label"
    try:
        raw = np.fromfile(beside, "<u4") & 0xFFFF
    except OSError:
        raise Unreadable(name, f"its labels, {beside}, cannot be read") from None
    if len(raw) != len(cloud):
        raise Unreadable(name, f"{beside.name} has {len(raw)} labels for {len(cloud)} points")
    table = np.full(2**16, -1, dtype=np.int64)
    for index, numbers in enumerate(KITTI_LABELS.values()):
        table[list(numbers)] = index
    return Cloud(cloud.coordinates, cloud.features, table[raw])


def _simulated_solid(name: str) -> Cloud:
    return solid(SOLIDS[int(name) % len(SOLIDS)], seed=int(name))


def _simulated_scene(name: str) -> Cloud:
    return scene(seed=int(name))


def _folder(data: str | Path) -> Path:
    root = Path(data)
    if not root.is_dir():
        raise DataError(f"{root} is no folder; expected a folder of clouds")
    return root


def _splits(root: Path) -> dict[str, Path]:
    named = {
        _SPLITS[path.name.lower()]: path
        for path in sorted(root.iterdir())
        if path.is_dir() and path.name.lower() in _SPLITS
    }
    return {split: named[split] for split in ("train", "val", "test") if split in named} if "train" in named else {}
