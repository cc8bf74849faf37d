"""Sets of labelled images, whatever they are kept in, and their stratified split.

One representation of an image everywhere: a numpy array (H, W, C), uint8 or float32 in [0, 1]. Volumes and short videos
are the same with an axis more, (D, H, W, C): slices or frames come first.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from convatlas.data.arrays import Arrays, as_labels, as_samples, digits, idx_files, read_idx, read_npz
from convatlas.data.image_files import IMAGES, FileKind, Unreadable, check_files, find_files, subfolders
from convatlas.errors import DataError

__all__ = [
    "ImageSet",
    "Skipped",
    "Unreadable",
    "check_trainable",
    "from_arrays",
    "read_images",
    "stratified_split",
]

_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class Skipped:
    """A file that was left out of a set, and why."""

    path: str
    reason: str


class _Source(Protocol):
    """Where the pixels of a set come from."""

    @property
    def names(self) -> Sequence[str]: ...
    def image(self, index: int, channels: int) -> npt.NDArray[Any]: ...
    def subset(self, indices: npt.NDArray[np.int64]) -> _Source: ...


@dataclass(frozen=True)
class _Files:
    root: str
    names: tuple[str, ...]
    kind: FileKind

    def image(self, index: int, channels: int) -> npt.NDArray[Any]:
        name = self.names[index]
        return self.kind.decode(os.path.join(self.root, name), channels, name=name)

    def subset(self, indices: npt.NDArray[np.int64]) -> _Files:
        return _Files(self.root, tuple(self.names[i] for i in indices), self.kind)


@dataclass(frozen=True, eq=False)
class _Memory:
    """Rows of one array that all subsets share."""

    array: npt.NDArray[Any]
    rows: npt.NDArray[np.int64]
    prefix: str

    @cached_property
    def names(self) -> tuple[str, ...]:
        digits = max(4, len(str(len(self.array) - 1)))
        return tuple(f"{self.prefix}/{row:0{digits}d}" for row in self.rows)

    def image(self, index: int, channels: int) -> npt.NDArray[Any]:
        image: npt.NDArray[Any] = self.array[self.rows[index]]
        if image.shape[-1] == channels:
            pass
        elif channels == 3:
            image = image.repeat(3, axis=-1)
        elif image.dtype == np.uint8:
            rows = Image.fromarray(image.reshape(-1, *image.shape[-2:]))
            image = np.asarray(rows.convert("L")).reshape(*image.shape[:-1], 1)
        else:
            image = image @ np.array([[0.299], [0.587], [0.114]], np.float32)
        return image

    def subset(self, indices: npt.NDArray[np.int64]) -> _Memory:
        return _Memory(self.array, self.rows[indices], self.prefix)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images with their labels; the pixels are read when asked for.

    Attributes:
        classes: the class names, in the order of the labels; empty for unlabelled images.
        labels: (N,) int64, index into ``classes``, -1 where unknown.
        channels: C of every image.
        skipped: the files that could not be used, with the reasons.
        source: where the pixels come from; made by :func:`read_images` and :func:`from_arrays`.
    """

    classes: tuple[str, ...]
    labels: npt.NDArray[np.int64]
    channels: int
    skipped: tuple[Skipped, ...]
    source: _Source

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def names(self) -> Sequence[str]:
        """The name of each image: a path relative to the folder, or e.g. "digits/0012" for an array."""
        return self.source.names

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """How many images each class has, (len(classes),)."""
        return np.bincount(self.labels[self.labels >= 0], minlength=len(self.classes)).astype(np.int64)

    def image(self, index: int) -> npt.NDArray[Any]:
        """The pixels of one image, (H, W, C) or (D, H, W, C), uint8 or float32; not to be written to.

        Raises:
            Unreadable: the file has changed since the set was read, or was too much to check then.
        """
        return self.source.image(index, self.channels)

    def subset(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> ImageSet:
        """The set of the images at ``indices``, in that order; classes and ``skipped`` stay those of the whole set."""
        rows = np.asarray(indices, np.int64)
        return ImageSet(self.classes, self.labels[rows], self.channels, self.skipped, self.source.subset(rows))

    def with_classes(self, classes: Sequence[str]) -> ImageSet:
        """The same images labelled by position in ``classes``: those that a model was trained on.

        Raises:
            DataError: images are of a class that is not among ``classes``.
        """
        position = {name: i for i, name in enumerate(classes)}
        missing = [c for c, n in zip(self.classes, self.counts, strict=True) if n and c not in position]
        if missing:
            raise DataError(
                f"the images are of {len(missing)} classes that are not among the {len(position)} expected ones: "
                f"{_listed(missing)} (expected: {_listed(classes)})"
            )
        table = np.array([position.get(name, -1) for name in self.classes] + [-1], np.int64)
        return ImageSet(tuple(classes), table[self.labels], self.channels, self.skipped, self.source)


def read_images(
    source: str | Path | Sequence[str | Path],
    *,
    channels: int | None = None,
    labelled: bool = True,
    kind: FileKind = IMAGES,
) -> dict[str, ImageSet]:
    """Read images from wherever they are, as sets by split: {"all": ...} or e.g. {"train": ..., "test": ...}.

    Sources:
        a folder with one subfolder of images for each class (deeper folders within a class and hidden files do not
        matter), or with the subfolders ``train`` and ``val`` (``valid``, ``validation``) or ``test`` of that form;
        an ``.npz`` file, see :func:`convatlas.data.arrays.read_npz`;
        a folder of MNIST-format idx files or one of the image files, see :func:`convatlas.data.arrays.read_idx`;
        ``"digits"``, scikit-learn's handwritten digits;
        with ``labelled=False`` also any folder of images, an image file, or a list of these.

    Image files are brought to 8-bit grey or RGB: 16-bit grey is scaled with rounding (v * 255 / 65535), transparent
    pixels are laid over white, the EXIF orientation is applied, of an animation the first frame is taken. Files that
    cannot be used are left out and listed in ``skipped``: up to 20,000 files are decoded to find that out, of more only
    the headers are read.

    Args:
        source: what to read.
        channels: 1 or 3 converts every image; None keeps 1 if every file is stored as grey, else gives 3, and keeps
            the channels of arrays.
        labelled: False reads the images without labels; a folder is then the one split "all".
        kind: what the files hold: `IMAGES`, or `convatlas.data.volumes.volume_files` for volumes and short videos, in
            which case an ``.npz`` file has them as (N, D, H, W), (N, D, H, W, C) or (N, C, D, H, W).

    Raises:
        DataError: there is nothing at ``source``, no image can be read, or labels are missing or wrong.
    """
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1, 3 or None, got {channels}")
    try:
        if isinstance(source, str | Path):
            return _read_one(source, channels, labelled, kind)
        if len(source) == 1:
            return _read_one(source[0], channels, labelled, kind)
        return _read_several([Path(path) for path in source], channels, labelled, kind)
    except OSError as error:
        raise DataError(f"{error.filename or source} cannot be read: {error.strerror or error}") from None


def from_arrays(
    images: npt.NDArray[Any],
    labels: npt.NDArray[Any] | None = None,
    *,
    classes: Sequence[str] | None = None,
    channels: int | None = None,
    name: str = "array",
) -> ImageSet:
    """A set of the images in an array; see :func:`convatlas.data.arrays.as_samples` for shapes and types.

    Args:
        images: (N, H, W), (N, H, W, C) or (N, C, H, W).
        labels: (N,) integers or strings; None for unlabelled images.
        classes: names of the labels 0, 1, ...; by default the sorted labels that occur are the classes.
        channels: 1 or 3 converts; None keeps what the array has.
        name: what the names of the images begin with.

    Raises:
        DataError: the arrays do not fit each other or cannot be images and labels.
    """
    pixels = as_samples(images, f"{name}: images")
    given = None if labels is None else as_labels(labels, len(pixels), f"{name}: labels")
    names = None if classes is None else tuple(classes)
    return _from_splits({"all": Arrays(pixels, given)}, names, channels, labels is not None, name)["all"]


def check_trainable(image_set: ImageSet) -> None:
    """Check that a classifier can be trained on the set.

    Raises:
        DataError: images without labels, fewer than two classes, or a class without a readable image.
    """
    if not image_set.classes or (image_set.labels < 0).any():
        raise DataError(f"training needs a label for every image; {int((image_set.labels < 0).sum())} have none")
    if len(image_set.classes) < 2:
        raise DataError(f"training needs at least two classes, got only {image_set.classes[0]!r}")
    empty = [name for name, count in zip(image_set.classes, image_set.counts, strict=True) if not count]
    if empty:
        raise DataError(f"{len(empty)} of {len(image_set.classes)} classes have no readable image: {_listed(empty)}")


def stratified_split(image_set: ImageSet, fractions: Mapping[str, float], seed: int) -> dict[str, ImageSet]:
    """Split a set at random so that every part has the classes in the same proportions.

    A class with a single image goes to the first part. The same set, fractions and seed give the same parts;
    within a part the images keep their order.

    Args:
        image_set: what to split; unlabelled images are split without regard to classes.
        fractions: the share of each part by name, e.g. ``{"train": 0.8, "val": 0.2}``, which add up to 1.
        seed: of the random choice.

    Raises:
        ValueError: the fractions are not positive or do not add up to 1.
        DataError: there are too few images for a part to have one of each class.
    """
    if not fractions or min(fractions.values()) <= 0 or abs(sum(fractions.values()) - 1) > 1e-6:
        raise ValueError(f"fractions must be positive and add up to 1, got {dict(fractions)}")
    from sklearn.model_selection import train_test_split

    parts: dict[str, npt.NDArray[np.int64]] = {}
    names = list(fractions)
    rest = np.arange(len(image_set), dtype=np.int64)
    for i, name in enumerate(names[:-1]):
        # Nested: the first part against all later ones, then the second against the later ones, ...
        later = sum(fractions[other] for other in names[i + 1 :])
        labels = image_set.labels[rest]
        single = np.isin(labels, [c for c, n in zip(*np.unique(labels, return_counts=True), strict=True) if n == 1])
        choice = rest[~single]
        held = round(len(rest) * later / (later + fractions[name]))
        try:
            kept, rest_of = train_test_split(
                choice, test_size=held, random_state=seed, stratify=image_set.labels[choice], shuffle=True
            )
        except ValueError:
            raise DataError(
                f"{len(image_set)} images of {len(image_set.classes)} classes are too few to split into "
                f"{', '.join(f'{part} ({share:g})' for part, share in fractions.items())} with every class in each part"
            ) from None
        parts[name] = np.concatenate([kept, rest[single]])
        rest = rest_of
    parts[names[-1]] = rest
    return {name: image_set.subset(np.sort(rows)) for name, rows in parts.items()}


def _read_one(source: str | Path, channels: int | None, labelled: bool, kind: FileKind) -> dict[str, ImageSet]:
    flat = kind is IMAGES
    if flat and source == "digits":
        return _from_splits({"all": digits()}, None, channels, labelled, "digits")
    path = Path(source).expanduser()
    if not path.exists():
        raise DataError(f"{source} does not exist; expected a folder, an .npz file" + ' or "digits"' * flat)
    if path.suffix.lower() == ".npz" and path.is_file():
        splits, classes = read_npz(path, dims=2 if flat else 3)
        return _from_splits(splits, classes, channels, labelled, path.stem)
    if flat and idx_files(path):
        return _from_splits(read_idx(path), None, channels, labelled, path.name)
    if not labelled:
        return _read_several([path], channels, labelled, kind)
    if not path.is_dir():
        what = f"{source} must be a folder with one subfolder for each class, an .npz file"
        raise DataError(what + ' or "digits"' * flat)
    return _read_classes(path, channels, kind)


def _from_splits(
    splits: Mapping[str, Arrays],
    classes: tuple[str, ...] | None,
    channels: int | None,
    labelled: bool,
    name: str,
) -> dict[str, ImageSet]:
    """Sets of arrays that share their classes: those named, or the sorted labels that occur in any split."""
    labels = {split: arrays.labels for split, arrays in splits.items() if arrays.labels is not None}
    if labelled and len(labels) < len(splits):
        raise DataError(f"{name} holds no labels for its images ({', '.join(s for s in splits if s not in labels)})")
    if not labelled:
        classes, labels = (), {}
    elif classes is None or any(values.dtype.kind == "U" for values in labels.values()):
        values, codes = np.unique(np.concatenate(list(labels.values())), return_inverse=True)
        ends = np.cumsum([len(part) for part in labels.values()])[:-1]
        labels = dict(zip(labels, np.split(codes, ends), strict=True))
        classes = tuple(str(value) for value in values)
    elif (high := max(int(part.max()) for part in labels.values())) >= len(classes):
        raise DataError(f"{name} has the label {high}, but names only {len(classes)} classes")
    if len(set(classes)) < len(classes):
        raise DataError(f"{name} names a class twice: {_listed(classes)}")
    result = {}
    for split in (name for name in ("all", "train", "val", "test") if name in splits):
        images = splits[split].images
        depth = images.shape[-1]
        if channels not in (None, depth) and depth not in (1, 3):
            raise DataError(f"{name} has images of {depth} channels, which cannot be converted to {channels}")
        pixels = images.view()
        pixels.flags.writeable = False
        prefix = name if split == "all" else f"{name}/{split}"
        source = _Memory(pixels, np.arange(len(images), dtype=np.int64), prefix)
        codes = labels.get(split, np.full(len(images), -1)).astype(np.int64)
        result[split] = ImageSet(classes, codes, channels or depth, (), source)
    if len({s.channels for s in result.values()}) > 1:
        raise DataError(f"the splits of {name} differ in channels: {[s.channels for s in result.values()]}")
    return result


def _read_several(paths: Sequence[Path], channels: int | None, labelled: bool, kind: FileKind) -> dict[str, ImageSet]:
    """Unlabelled images of files and folders; names are relative to a single folder, else as given."""
    if labelled:
        raise DataError('labelled images must come from one folder, .npz file or "digits", not from single files')
    if not paths:
        raise DataError(f"no {kind.what} was given")
    root = paths[0] if len(paths) == 1 and paths[0].is_dir() else Path()
    files: list[Path] = []
    skipped: list[Skipped] = []
    for path in paths:
        if not path.exists():
            raise DataError(f"{path} does not exist; expected {_a(kind.what)} file or a folder of {kind.what}s")
        found, others = find_files(path, kind) if path.is_dir() else ([path], [])
        files += found
        skipped += _others(others, root, kind)
    split = {"all": [(file, -1) for file in files]}
    return _from_files(root, split, (), channels, {"all": skipped}, kind)


def _read_classes(root: Path, channels: int | None, kind: FileKind) -> dict[str, ImageSet]:
    """Folders of classes, in one split or several."""
    folders = {"all": root}
    tops = subfolders(root)
    named: dict[str, list[Path]] = {}
    for folder in tops:
        if split := _SPLITS.get(folder.name.lower()):
            named.setdefault(split, []).append(folder)
    if ("train" in named and len(named) > 1) or (named and len(tops) == sum(map(len, named.values()))):
        for split, candidates in named.items():
            if len(candidates) > 1:
                raise DataError(f"{root} holds two {split} folders: {' and '.join(f.name for f in candidates)}")
        folders = {split: named[split][0] for split in ("train", "val", "test") if split in named}
    classes = tuple(folder.name for folder in subfolders(folders.get("train", next(iter(folders.values())))))
    if "train" not in folders:
        classes = tuple(sorted({folder.name for each in folders.values() for folder in subfolders(each)}))
    position = {name: i for i, name in enumerate(classes)}

    files: dict[str, list[tuple[Path, int]]] = {}
    skipped: dict[str, list[Skipped]] = {}
    for split, top in folders.items():
        files[split], skipped[split] = [], []
        loose = [file for file in sorted(top.iterdir()) if file.is_file() and kind.matches(file)]
        skipped[split] += [Skipped(_relative(file, root), "in no class folder") for file in loose]
        for folder in subfolders(top):
            found, others = find_files(folder, kind)
            if found and folder.name not in position:
                raise DataError(f"{folder} is a class that {folders['train']} does not have")
            files[split] += [(file, position[folder.name]) for file in found]
            skipped[split] += _others(others, root, kind)
        if not files[split]:
            example = f"{top}/cat/1{'.jpg' if kind is IMAGES else min(kind.suffixes)}"
            layout = f"expected one subfolder of {kind.what}s for each class, e.g. {example}"
            if loose and not subfolders(top):
                raise DataError(f"{top} holds {len(loose)} {kind.what}s, but no class subfolders: {layout}")
            raise DataError(f"{top} {f'holds no {kind.what} files' if any(top.iterdir()) else 'is empty'}: {layout}")
    return _from_files(root, files, classes, channels, skipped, kind)


def _from_files(
    root: Path,
    splits: Mapping[str, Sequence[tuple[Path, int]]],
    classes: tuple[str, ...],
    channels: int | None,
    skipped: Mapping[str, Sequence[Skipped]],
    kind: FileKind,
) -> dict[str, ImageSet]:
    """Check the files of all splits together and keep those that can be read."""
    paths = {split: [file for file, _ in files] for split, files in splits.items()}
    names = {split: [_relative(file, root) for file in files] for split, files in paths.items()}
    flat = [str(file) for files in paths.values() for file in files]
    if not flat:
        raise DataError(f"{root} holds no {kind.what} files ({', '.join(sorted(kind.suffixes))})")
    checked = iter(check_files(flat, [name for part in names.values() for name in part], kind))
    found = {split: [next(checked) for _ in files] for split, files in paths.items()}
    if channels is None:
        coloured = any(grey is False for part in found.values() for grey in part)
        channels = 3 if coloured else 1
    result = {}
    for split, part in found.items():
        failed = [error for error in part if isinstance(error, Unreadable)]
        rows = [row for row, error in enumerate(part) if not isinstance(error, Unreadable)]
        if not rows and len(part) == 1:
            raise failed[0]
        if not rows:
            raise DataError(
                f"none of the {len(part)} {kind.what} files of {root} ({split}) can be read; first: {failed[0]}"
            )
        source = _Files(str(root), tuple(names[split][row] for row in rows), kind)
        labels = np.array([splits[split][row][1] for row in rows], np.int64)
        reasons = (*skipped[split], *(Skipped(error.name, error.reason) for error in failed))
        result[split] = ImageSet(classes, labels, channels, tuple(sorted(reasons, key=lambda s: s.path)), source)
    return result


def _others(files: Sequence[Path], root: Path, kind: FileKind) -> list[Skipped]:
    what = f"not {_a(kind.what)} file"
    return [Skipped(_relative(file, root), f"{what} ({file.suffix or 'no suffix'})") for file in files]


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def _listed(names: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
