"""Images to be enlarged and what they should become: photographs, clips, and pairs of low and high resolution.

Pairs are found by the names that data sets use: ``img_1_HR.png`` beside ``img_1_LR.png``, or folders ``HR`` and ``LR``
(``GT``, ``high``; ``LRbicx3``, ``low``; ``DIV2K_train_HR`` and ``DIV2K_train_LR_bicubic/X3`` as well).
"""

from __future__ import annotations

import re
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from convatlas.data.image_files import Unreadable, find_files, opened, subfolders
from convatlas.data.images import Skipped
from convatlas.data.pictures import read_picture
from convatlas.data.video import is_video_name, read_video
from convatlas.errors import DataError, require

__all__ = ["PHOTOGRAPHS", "Entry", "Pairs", "Sample", "read_pairs"]

Array = npt.NDArray[Any]

#: Photographs in scikit-image to learn from, to choose the best epoch by, and never seen before the end.
PHOTOGRAPHS: dict[str, tuple[str, ...]] = {
    "train": ("astronaut", "camera", "coffee", "motorcycle", "hubble_deep_field", "brick", "grass", "gravel"),
    "val": ("coins",),
    "test": ("chelsea", "rocket"),
}

_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_HIGH = re.compile(r"hr|gt|gtmod\d+|high|highres|target", re.IGNORECASE)
_LOW = re.compile(r"lr|lrbic\w*|low|lowres|input", re.IGNORECASE)
_TAGGED = re.compile(r"(.+)[_.-](hr|lr)", re.IGNORECASE)
_SCALE_MARK = re.compile(r"[_-]?x\d+$", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Sample:
    """What is learned from or measured on: an image, or consecutive frames of which the middle one counts.

    Attributes:
        high: (H, W, C) each, uint8, uint16, or float32 in [0, 1]; one image, or an odd number of frames.
        low: as many at low resolution, where they are given.
        luma: whether the one channel is luma already, in studio range, and not grey.
    """

    high: tuple[Array, ...]
    low: tuple[Array, ...] | None = None
    luma: bool = False


@dataclass(frozen=True, eq=False)
class Entry:
    """One sample that is read when asked for; ``read`` raises `Unreadable` where that fails.

    ``clip`` is the name of the clip that it is a part of, "" for an image.
    """

    name: str
    read: Callable[[], Sample]
    clip: str = ""


@dataclass(frozen=True, eq=False)
class Pairs:
    """Samples of one split, and the files that were left out with the reasons."""

    entries: tuple[Entry, ...]
    skipped: tuple[Skipped, ...] = ()

    def __len__(self) -> int:
        return len(self.entries)

    def subset(self, rows: Sequence[int]) -> Pairs:
        """The entries at some places; ``skipped`` stays that of the whole."""
        return Pairs(tuple(self.entries[row] for row in rows), self.skipped)


def read_pairs(source: str | Path, *, scale: int, frames: int = 1, frames_per_clip: int = 32) -> dict[str, Pairs]:
    """Find the images of a source, as sets by split: {"all": ...} or e.g. {"train": ..., "test": ...}.

    Sources:
        ``"photographs"``: some of scikit-image;
        a folder of images of any size at any depth, which are high resolution, or of pairs (see above);
        a folder with ``train``, ``val`` and ``test`` of these;
        a clip or a folder of clips, of which ``frames_per_clip`` frames each are taken, evenly spread;
        a single image;
        an HDF5 or ``.npz`` file with ``lr`` and ``hr``: arrays (N, H, W) of luma or (N, H, W, C), or in HDF5 groups of
        arrays named 0, 1, ...; floating-point values above 1 are taken as 0 to 255.

    A pair whose low resolution is not 1 / scale of the high one is left out. So are files that are no images.

    Args:
        source: what to read.
        scale: factor between low and high resolution.
        frames: consecutive frames that make one sample; more than one needs clips.
        frames_per_clip: how many samples to take of each clip.

    Raises:
        DataError: there is nothing at ``source`` or nothing that can be used.
    """
    if str(source) == "photographs":
        return {
            split: Pairs(tuple(Entry(name, partial(_photograph, name)) for name in names))
            for split, names in PHOTOGRAPHS.items()
        }
    path = Path(source)
    reading = _Reading(scale, frames, frames_per_clip)
    try:
        if not path.exists():
            raise DataError(f"{source} does not exist; expected a folder of images, a file, or 'photographs'")
        if path.is_dir():
            return _split_folder(path, reading)
        if path.suffix.lower() in (".h5", ".hdf5", ".npz"):
            return {"all": _arrays(path)}
        return {"all": reading.plain([path], path.parent)}
    except OSError as error:
        raise DataError(f"{error.filename or source} cannot be read: {error.strerror or error}") from None


# -- folders -----------------------------------------------------------------------------------------------------------


def _split_folder(root: Path, reading: _Reading) -> dict[str, Pairs]:
    tops = subfolders(root)
    named = {_SPLITS[folder.name.lower()]: folder for folder in tops if folder.name.lower() in _SPLITS}
    if "train" in named or (named and len(named) == len(tops)):
        return {split: _folder(folder, root, reading) for split, folder in named.items()}
    by_split = {split: found for split, found in _roles(tops).items() if len(found) == 2}
    if by_split.keys() - {"all"}:  # DIV2K_train_HR, DIV2K_train_LR_bicubic and so on
        return {split: reading.matched(found["high"], found["low"], root) for split, found in by_split.items()}
    return {"all": _folder(root, root, reading)}


def _roles(folders: Sequence[Path]) -> dict[str, dict[str, list[Path]]]:
    """Folders of "high" and "low" resolution by split, as far as their names tell."""
    roles: dict[str, dict[str, list[Path]]] = {}
    for folder in folders:
        words = re.split(r"[_.\s-]+", folder.name)
        split = next((_SPLITS[word.lower()] for word in words if word.lower() in _SPLITS), "all")
        for role, form in (("high", _HIGH), ("low", _LOW)):
            if any(map(form.fullmatch, words)):
                roles.setdefault(split, {}).setdefault(role, []).append(folder)
    return roles


def _folder(folder: Path, root: Path, reading: _Reading) -> Pairs:
    """The samples of one split."""
    roles = _roles(subfolders(folder)).get("all", {})
    if len(roles) == 2:
        return reading.matched(roles["high"], roles["low"], root)
    images, others = find_files(folder)
    clips = [path for path in others if is_video_name(path)]
    if not images and not clips:
        raise DataError(f"{folder} holds no images and no clips")
    tagged: dict[str, dict[Path, Path]] = {"hr": {}, "lr": {}}
    alone = []
    for path in images:
        if tag := _TAGGED.fullmatch(path.stem):
            tagged[tag[2].lower()][path.with_name(tag[1])] = path
        else:
            alone.append(path)
    if tagged["hr"] and tagged["lr"]:
        found = reading.pairs(tagged["hr"], {key: [path] for key, path in tagged["lr"].items()}, root, alone)
    else:
        found = reading.plain([*images, *clips], root)
    rest = [Skipped(_relative(path, root), "no image and no clip") for path in others if not is_video_name(path)]
    return Pairs(found.entries, (*found.skipped, *rest))


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def _size(path: Path, name: str) -> tuple[int, int]:
    """Height and width of an upright image, from its header."""
    with opened(str(path), name) as image:
        width, height = image.size
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    return (width, height) if turned else (height, width)


@dataclass(frozen=True)
class _Reading:
    scale: int
    frames: int
    frames_per_clip: int

    def plain(self, files: Sequence[Path], root: Path) -> Pairs:
        """Images and clips without low resolution."""
        entries: list[Entry] = []
        skipped: list[Skipped] = []
        for path in files:
            name = _relative(path, root)
            try:
                if is_video_name(path):
                    entries += self._clip(path, name)
                elif self.frames > 1:
                    raise Unreadable(name, f"{self.frames} consecutive frames are needed, so it must be a clip")
                else:
                    _size(path, name)
                    entries.append(Entry(name, partial(_picture, path, None, name, self.scale)))
            except Unreadable as error:
                skipped.append(Skipped(error.name, error.reason))
        return _usable(entries, skipped, root)

    def matched(self, high: Sequence[Path], low: Sequence[Path], root: Path) -> Pairs:
        """Folders of high and of low resolution whose files have the same names but for a mark such as x3."""
        highs = {_key(path): path for folder in high for path in find_files(folder)[0]}
        lows: dict[Path, list[Path]] = {}
        for folder in low:
            for path in find_files(folder)[0]:
                lows.setdefault(_key(path), []).append(path)
        return self.pairs(highs, lows, root, ())

    def pairs(
        self, high: Mapping[Path, Path], low: Mapping[Path, Sequence[Path]], root: Path, alone: Sequence[Path]
    ) -> Pairs:
        """Files of high resolution by key, and those of low resolution that may belong to them."""
        entries: list[Entry] = []
        skipped: list[Skipped] = []
        for key, path in sorted(high.items()):
            name = _relative(path, root)
            try:
                if self.frames > 1:
                    raise Unreadable(name, f"{self.frames} consecutive frames are needed, so it must be a clip")
                partner = self._partner(path, name, low.get(key, ()), root)
                entries.append(Entry(name, partial(_picture, path, partner, name, self.scale)))
            except Unreadable as error:
                skipped.append(Skipped(error.name, error.reason))
        others = [*alone, *(path for key in low.keys() - high.keys() for path in low[key])]
        skipped += [Skipped(_relative(path, root), "has no partner") for path in others]
        return _usable(entries, skipped, root)

    def _partner(self, path: Path, name: str, candidates: Sequence[Path], root: Path) -> Path:
        if not candidates:
            raise Unreadable(name, "has no partner of low resolution")
        height, width = _size(path, name)
        for candidate in candidates:
            if tuple(length // self.scale for length in (height, width)) == _size(
                candidate, _relative(candidate, root)
            ):
                return candidate
        small = _size(candidates[0], name)
        raise Unreadable(name, f"{height} x {width} pixels are not {self.scale} times {small[0]} x {small[1]}")

    def _clip(self, path: Path, name: str) -> list[Entry]:
        try:
            video = read_video(path)
        except DataError as error:
            raise Unreadable(name, str(error).partition(": ")[2] or str(error)) from None
        length = max(video.count, self.frames)
        count = min(self.frames_per_clip, length - self.frames + 1)
        clip = _Clip(path, name, self.frames)
        starts = np.linspace(0, length - self.frames, count).round().astype(int)
        return [Entry(f"{name}/{start:05d}", partial(clip.sample, int(start)), name) for start in starts]


def _key(path: Path) -> Path:
    return Path(_SCALE_MARK.sub("", path.stem))


def _usable(entries: Sequence[Entry], skipped: Sequence[Skipped], root: Path) -> Pairs:
    if not entries and skipped:
        first = skipped[0]
        raise DataError(f"none of the {len(skipped)} files of {root} can be used; first: {first.path}: {first.reason}")
    return Pairs(tuple(entries), tuple(sorted(skipped, key=lambda each: each.path)))


# -- samples -----------------------------------------------------------------------------------------------------------


def _picture(high: Path, low: Path | None, name: str, scale: int) -> Sample:
    truth = read_picture(high, name=name).pixels
    if low is None:
        return Sample((truth,))
    given = read_picture(low, name=f"{name}, low resolution").pixels
    height, width = (scale * length for length in given.shape[:2])
    return Sample((truth[:height, :width],), (given,))


def _photograph(name: str) -> Sample:
    from skimage import data

    found: Any = getattr(data, "stereo_motorcycle" if name == "motorcycle" else name)()
    image = found[0] if name == "motorcycle" else found
    return Sample((image[..., None] if image.ndim == 2 else image[..., :3],))


class _Clip:
    """Frames of a clip by number; they are decoded one after the other, so rising numbers are cheap."""

    def __init__(self, path: Path, name: str, frames: int) -> None:
        self.path, self.name = path, name
        self._window: deque[Array] = deque(maxlen=frames)
        self._decoder: Iterator[Array] = iter(())
        self._next = -1  # number of the frame that the decoder gives next; -1 before it is opened

    def sample(self, start: int) -> Sample:
        """The window of frames that begins at a number."""
        frames = self._window.maxlen or 1
        try:
            if self._next < 0 or start < self._next - len(self._window):
                self._window.clear()
                self._decoder, self._next = iter(read_video(self.path)), 0
            while self._next < start + frames:
                self._window.append(next(self._decoder))
                self._next += 1
        except StopIteration:
            raise Unreadable(self.name, f"it ends after {self._next} frames") from None
        except DataError as error:
            raise Unreadable(self.name, str(error)) from None
        return Sample(tuple(self._window))


def _arrays(path: Path) -> Pairs:
    """Arrays ``lr`` and ``hr`` of a file."""
    try:
        if path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as held:
                columns = [[*held[name]] if name in held else [] for name in ("hr", "lr")]
        else:
            columns = _hdf5(path)
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    high, low = columns
    if not high or len(high) != len(low):
        raise DataError(f"{path} must hold as many arrays hr as lr, got {len(high)} and {len(low)}")
    return Pairs(
        tuple(Entry(f"{path.name}/{row:05d}", partial(_array, high[row], low[row], path)) for row in range(len(high)))
    )


def _hdf5(path: Path) -> list[list[Array]]:
    h5py = require("h5py", extra="hdf5", purpose=f"reading {path.name}")
    with h5py.File(path, "r") as held:
        columns = []
        for name in ("hr", "lr"):
            node = held[name]
            columns.append([*node[:]] if hasattr(node, "shape") else [node[str(row)][:] for row in range(len(node))])
        return columns


def _array(high: Array, low: Array, path: Path) -> Sample:
    luma = high.ndim == 2
    most = max(float(high.max(initial=0)), float(low.max(initial=0)))
    arrays = []
    for array in (high, low):
        if array.dtype not in (np.uint8, np.uint16):
            array = (array / (255 if most > 1 else 1)).astype(np.float32)
        arrays.append(array[..., None] if luma else array)
    if not all(array.ndim == 3 and array.shape[2] in (1, 3) and array.size for array in arrays):
        raise Unreadable(path.name, f"arrays of shape {high.shape} and {low.shape} are no images")
    return Sample((arrays[0],), (arrays[1],), luma)
