"""Sets of labelled skeleton clips: NTU RGB+D files, NPZ arrays and simulated figures; splits; what a network sees."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from convatlas.data.skeletons import (
    LAYOUTS,
    NTU_SUBJECTS,
    NTU_TRAIN_CAMERAS,
    NTUName,
    SkeletonAugment,
    SkeletonLayout,
    fill_missing,
    normalise_view,
    ntu_name,
    read_ntu_skeleton,
    resample_frames,
)
from convatlas.data.stick_figures import ACTIONS, stick_figures
from convatlas.errors import DataError

__all__ = [
    "ClipDataset",
    "ClipPreparation",
    "Protocol",
    "SkeletonSet",
    "divide_by_protocol",
    "known_layout",
    "read_skeletons",
    "stratified",
]

Array = npt.NDArray[Any]

#: How clips of NTU RGB+D are split: by subjects, by cameras, or at random.
Protocol = Literal["cross_subject", "cross_view", "random"]

_SPLITS = ("train", "val", "test")
_SIMULATED = 900


@dataclass(frozen=True, eq=False)
class SkeletonSet:
    """Clips of one kind of skeleton.

    Attributes:
        clips: each (T, J, dim), NaN where a joint was not seen.
        labels: (N) int64, -1 where there is none.
        classes: names of the labels.
        names: of the clips.
        skipped: files that were left out, and why.
    """

    clips: Sequence[Array]
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    names: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def joints(self) -> int:
        """Joints of a frame, of all bodies."""
        return int(self.clips[0].shape[1])

    @property
    def dim(self) -> int:
        """Coordinates of a joint."""
        return int(self.clips[0].shape[2])

    def subset(self, rows: Sequence[int]) -> SkeletonSet:
        """Some of the clips."""
        names = tuple(self.names[row] for row in rows)
        return SkeletonSet(
            [self.clips[row] for row in rows], self.labels[list(rows)], self.classes, names, self.skipped
        )

    def with_classes(self, classes: Sequence[str]) -> SkeletonSet:
        """The same clips with labels that count in other classes, which hold all of theirs.

        Raises:
            DataError: a class is unknown.
        """
        if unknown := sorted({self.classes[label] for label in self.labels if label >= 0} - set(classes)):
            raise DataError(f"the network does not know the classes {', '.join(unknown[:5])}")
        places = np.array([classes.index(name) if name in classes else -1 for name in self.classes] or [-1])
        labels = np.where(self.labels >= 0, places[np.maximum(self.labels, 0)], -1).astype(np.int64)
        return SkeletonSet(self.clips, labels, tuple(classes), self.names, self.skipped)


def read_skeletons(source: str | Path, *, skip: str | Path | None = None, seed: int = 0) -> dict[str, SkeletonSet]:
    """Read clips: ``all`` of them, or by their splits ``train``, ``val`` and ``test``.

    Args:
        source: ``stick_figures`` for 900 simulated clips; a ``.skeleton`` file or a folder with any number of them at
            any depth, whose class is the action in a name of NTU RGB+D or else the folder's name; or an ``.npz`` file
            with ``clips`` (N, T, J, dim) or (N, T, bodies, J, dim), with NaN where a joint was not seen, and if they
            are known ``labels`` (N), ``lengths`` (N) and ``classes``; or with ``clips_train``, ``labels_train`` and so
            on.
        skip: a text file with names of files to leave out, one a line, such as the published list of those of NTU
            RGB+D with missing skeletons.
        seed: of the simulated clips.

    Raises:
        DataError: nothing can be read.
    """
    if str(source) == "stick_figures":
        clips, labels = stick_figures(_SIMULATED, seed=seed)
        names = tuple(f"figure {number}" for number in range(len(clips)))
        return {"all": SkeletonSet(clips, labels, ACTIONS, names)}
    path = Path(source)
    if path.is_file() and path.suffix.lower() == ".npz":
        return _read_npz(path)
    files = [path] if path.is_file() else sorted(path.rglob("*.skeleton"))
    if not files:
        raise DataError(f"{source} " + ("has no .skeleton file" if path.is_dir() else "does not exist"))
    left_out = set() if skip is None else _names(Path(skip))
    return {"all": _read_files(path, files, left_out)}


def _names(path: Path) -> set[str]:
    try:
        lines = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as a list of names: {error}") from None
    return {Path(line).name.removesuffix(".skeleton") for line in lines}


def _read_files(root: Path, files: Sequence[Path], left_out: set[str]) -> SkeletonSet:
    clips, classes, names, skipped = [], [], [], []
    for file in files:
        name = file.name if root.is_file() else str(file.relative_to(root))
        if file.name.removesuffix(".skeleton") in left_out:
            skipped.append((name, "it is in the list of files to leave out"))
            continue
        try:
            clips.append(read_ntu_skeleton(file))
        except DataError as error:
            skipped.append((name, str(error).removeprefix(f"{file} ")))
            continue
        told = ntu_name(file.name)
        classes.append(f"A{told.action:03d}" if told else file.parent.name)
        names.append(name)
    if not clips:
        raise DataError(f"none of the files of {root} can be read; first: {skipped[0][0]}: {skipped[0][1]}")
    known = tuple(sorted(set(classes)))
    labels = np.array([known.index(name) for name in classes], dtype=np.int64)
    return _checked(SkeletonSet(clips, labels, known, tuple(names), tuple(skipped)), root)


def _read_npz(path: Path) -> dict[str, SkeletonSet]:
    try:
        with np.load(path, allow_pickle=False) as file:
            held = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} cannot be read as an .npz file of plain arrays: {error}") from None
    ends = {"all": "", **{split: f"_{split}" for split in _SPLITS}}
    found = {split: end for split, end in ends.items() if f"clips{end}" in held}
    if not found:
        raise DataError(f"{path} must hold clips, or clips_train and so on; it holds {', '.join(held) or 'nothing'}")
    label_arrays = [held[f"labels{end}"] for end in found.values() if f"labels{end}" in held]
    classes = _classes(held.get("classes"), label_arrays, path)
    sets = {}
    for split, end in found.items():
        clips = held[f"clips{end}"]
        if clips.ndim == 5:  # bodies one behind the other
            clips = clips.reshape(*clips.shape[:2], -1, clips.shape[4])
        if clips.ndim != 4 or clips.dtype.kind not in "fiu" or 0 in clips.shape:
            raise DataError(
                f"{path}: clips{end} must be (N, T, J, dim) or (N, T, bodies, J, dim), got {held[f'clips{end}'].shape}"
            )
        lengths = held.get(f"lengths{end}", np.full(len(clips), clips.shape[1]))
        if lengths.shape != (len(clips),) or lengths.min() < 1 or lengths.max() > clips.shape[1]:
            raise DataError(f"{path}: lengths{end} must be {len(clips)} numbers from 1 to {clips.shape[1]}")
        labels = _labels(held.get(f"labels{end}"), len(clips), classes, path)
        names = tuple(f"{path.stem}{end} {row}" for row in range(len(clips)))
        cut = [clip[: int(length)].astype(np.float32) for clip, length in zip(clips, lengths, strict=True)]
        sets[split] = _checked(SkeletonSet(cut, labels, classes, names), path)
    return sets


def _classes(given: Array | None, labels: Sequence[Array], path: Path) -> tuple[str, ...]:
    if given is not None:
        return tuple(str(name) for name in given.tolist())
    values = sorted({value for array in labels for value in array.reshape(-1).tolist()})
    if not values or isinstance(values[0], str):
        return tuple(str(value) for value in values)
    if not all(isinstance(value, int) and value >= 0 for value in values):
        raise DataError(f"{path}: labels must be names, or whole numbers from 0")
    return tuple(str(number) for number in range(max(values) + 1))


def _labels(given: Array | None, count: int, classes: tuple[str, ...], path: Path) -> npt.NDArray[np.int64]:
    if given is None:
        return np.full(count, -1, np.int64)
    if given.shape != (count,):
        raise DataError(f"{path}: labels must be ({count},), got {given.shape}")
    if given.dtype.kind == "U":
        if set(given.tolist()) - set(classes):
            raise DataError(f"{path}: labels must be among the classes")
        return np.array([classes.index(name) for name in given.tolist()], dtype=np.int64)
    if given.dtype.kind not in "iu" or given.min() < 0 or given.max() >= len(classes):
        raise DataError(f"{path}: labels must be names, or whole numbers from 0 to {len(classes) - 1}")
    return given.astype(np.int64)


def _checked(clips: SkeletonSet, path: Path) -> SkeletonSet:
    shapes = {clip.shape[1:] for clip in clips.clips}
    if len(shapes) > 1:
        raise DataError(f"{path} has clips of different joints: {', '.join(map(str, sorted(shapes)[:3]))}")
    if clips.dim not in (2, 3):
        raise DataError(f"{path} must have joints of 2 or 3 coordinates, got {clips.dim}")
    if any(np.isinf(clip).any() for clip in clips.clips):
        raise DataError(f"{path} holds infinite positions")
    return clips


# -- splits ------------------------------------------------------------------------------------------------------------


def divide_by_protocol(clips: SkeletonSet, protocol: Protocol) -> dict[str, SkeletonSet]:
    """``train`` and ``test`` of NTU RGB+D by subjects or by cameras, which the names of the files tell.

    Raises:
        DataError: a name is of another form, or one of the parts is empty.
    """
    told: list[NTUName] = []
    for name in clips.names:
        found = ntu_name(name)
        if found is None:
            raise DataError(f"the protocol {protocol} needs names such as S001C002P003R002A013, got {name}")
        told.append(found)
    inside = [
        name.subject in NTU_SUBJECTS if protocol == "cross_subject" else name.camera in NTU_TRAIN_CAMERAS
        for name in told
    ]
    rows = {"train": [row for row, yes in enumerate(inside) if yes]}
    rows["test"] = [row for row, yes in enumerate(inside) if not yes]
    for name, part in rows.items():
        if not part:
            raise DataError(f"by the protocol {protocol} there is no clip to {name}")
    return {name: clips.subset(part) for name, part in rows.items()}


def stratified(clips: SkeletonSet, fractions: Mapping[str, float], seed: int) -> dict[str, SkeletonSet]:
    """Split at random, every class in the same shares; the first part takes what rounding leaves.

    Raises:
        DataError: a class has fewer clips than there are parts.
    """
    random = np.random.default_rng(seed)
    first, *others = fractions
    rows: dict[str, list[int]] = {name: [] for name in fractions}
    for label in np.unique(clips.labels):
        own = random.permutation(np.flatnonzero(clips.labels == label))
        if len(own) < len(fractions):
            raise DataError(
                f"class {clips.classes[label]} has {len(own)} clips, but a split needs at least {len(fractions)}"
            )
        start = 0
        for place, name in enumerate(others):
            left = len(others) - place  # each part that is still to come gets one clip at least
            size = min(max(1, round(fractions[name] * len(own))), len(own) - start - left)
            rows[name] += own[start : start + size].tolist()
            start += size
        rows[first] += own[start:].tolist()
    return {name: clips.subset(sorted(part)) for name, part in rows.items()}


# -- what a network sees -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ClipPreparation:
    """How a clip becomes the input of a network.

    Attributes:
        frames: it is resampled to.
        view: root, spine, right hip and left hip of the first body, by which its view is normalised; as it is when left
            out.
        bodies: whose joints lie one behind the other.
        fill: whether joints that were not seen are interpolated over time.
    """

    frames: int
    view: tuple[int, int, int, int] | None
    bodies: int = 1
    fill: bool = True

    def __call__(
        self, clip: Array, augment: SkeletonAugment | None = None, random: np.random.Generator | None = None
    ) -> npt.NDArray[np.float32]:
        """The clip (T, J, dim) as (J * dim, frames), in the training with random changes.

        Raises:
            DataError: joints were not seen and are not to be filled.
        """
        if self.fill:
            clip = fill_missing(clip)
        elif np.isnan(clip).any():
            raise DataError("a joint was not seen; fill must be on")
        absent = [not body.any() for body in np.split(clip, self.bodies, axis=1)]
        if augment is not None and random is not None:
            clip = augment.cropped(clip, random)
        clip = resample_frames(clip, self.frames)
        if self.view is not None:
            clip = normalise_view(clip, *self.view)
        if augment is not None and random is not None:
            clip = augment.turned(clip, random)
        for body, gone in zip(np.split(clip, self.bodies, axis=1), absent, strict=True):
            body[...] = 0 if gone else body  # a view of the clip
        return np.ascontiguousarray(clip.reshape(self.frames, -1).T, dtype=np.float32)


class ClipDataset(Dataset[dict[str, Tensor]]):
    """Clips for training and validation: ``{"clip": (J * dim, frames), "label": (), "index": ()}``.

    Args:
        clips: the set.
        prepare: what makes the input.
        augment: random changes, which follow from the seed of a pair (index, seed).
    """

    def __init__(self, clips: SkeletonSet, prepare: ClipPreparation, augment: SkeletonAugment | None = None) -> None:
        self.clips, self.prepare, self.augment = clips, prepare, augment

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor]:
        index, seed = key if isinstance(key, tuple | list) else (key, 0)
        random = np.random.default_rng([seed % 2**63, index])
        clip = self.prepare(self.clips.clips[index], self.augment, random)
        label = torch.tensor(int(self.clips.labels[index]))
        return {"clip": torch.from_numpy(clip), "label": label, "index": torch.tensor(index)}


def known_layout(joints: int) -> tuple[SkeletonLayout, int] | None:
    """The layout of skeletons with so many joints, and how many bodies that are; None if there is none."""
    for layout in LAYOUTS.values():
        if joints % len(layout.joints) == 0 and joints // len(layout.joints) in (1, 2):
            return layout, joints // len(layout.joints)
    return None
