"""Sets of volumes to learn restoration from: folders of scans, arrays of volumes, built-in phantoms."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from convatlas.data.image_files import FileKind, Unreadable, find_files, subfolders
from convatlas.data.images import Skipped
from convatlas.data.phantoms import phantom
from convatlas.data.scans import SCAN_SUFFIXES, Scan, read_scan
from convatlas.errors import DataError

__all__ = ["PHANTOMS", "VolumeEntry", "Volumes", "read_volumes", "scan_files"]

#: How many built-in phantoms there are to learn from, to choose the best epoch by, and never seen before the end.
PHANTOMS: dict[str, int] = {"train": 16, "val": 2, "test": 4}
_PHANTOM_SIZE = 64
_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def _no_pixels(*_: object, **__: object) -> object:
    raise NotImplementedError("scans are read by read_scan")


_KIND = FileKind("volume", frozenset(SCAN_SUFFIXES), _no_pixels, _no_pixels)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class VolumeEntry:
    """One volume that is read when asked for; ``read`` raises `Unreadable` where that fails."""

    name: str
    read: Callable[[], Scan]
    clip: str = ""


@dataclass(frozen=True, eq=False)
class Volumes:
    """Volumes of one split, and the files that were left out with the reasons."""

    entries: tuple[VolumeEntry, ...]
    skipped: tuple[Skipped, ...] = ()

    def __len__(self) -> int:
        return len(self.entries)

    def subset(self, rows: Sequence[int]) -> Volumes:
        """The entries at some places; ``skipped`` stays that of the whole."""
        return Volumes(tuple(self.entries[row] for row in rows), self.skipped)


def read_volumes(source: str | Path) -> dict[str, Volumes]:
    """Find the volumes of a source, as sets by split: {"all": ...} or e.g. {"train": ..., "test": ...}.

    Sources:
        ``"phantoms"``: simulated heads of 64 voxels a side;
        a folder of NIfTI, ``.npy`` and ``.npz`` files at any depth, or with ``train``, ``val`` and ``test`` of these;
        a single such file; an ``.npz`` or ``.npy`` file of volumes (N, X, Y, Z), in ``.npz`` named ``volumes``.

    Raises:
        DataError: there is nothing at ``source`` or nothing that can be used.
    """
    if str(source) == "phantoms":
        return {
            split: Volumes(tuple(_phantom_entry(f"{split} {number}") for number in range(count)))
            for split, count in PHANTOMS.items()
        }
    path = Path(source)
    try:
        if not path.exists():
            raise DataError(f"{source} does not exist; expected a folder of volumes, a file, or 'phantoms'")
        if not path.is_dir():
            return {"all": _file(path)}
        tops = subfolders(path)
        named = {_SPLITS[folder.name.lower()]: folder for folder in tops if folder.name.lower() in _SPLITS}
        if "train" in named:
            return {split: _folder(folder, path) for split, folder in named.items()}
        return {"all": _folder(path, path)}
    except OSError as error:
        raise DataError(f"{error.filename or source} cannot be read: {error.strerror or error}") from None


def scan_files(inputs: Sequence[str | Path]) -> list[tuple[Path, str]]:
    """Files of volumes among files and folders, each with its name relative to what was given.

    Raises:
        DataError: an input does not exist.
    """
    found = []
    for given in map(Path, inputs):
        if given.is_dir():
            found += [(path, path.relative_to(given).as_posix()) for path in find_files(given, _KIND)[0]]
        elif given.exists():
            found.append((given, str(given)))
        else:
            raise DataError(f"{given} does not exist; expected a volume or a folder of them")
    return found


def _phantom_entry(name: str) -> VolumeEntry:
    return VolumeEntry(f"phantom of {name}", partial(_phantom, name))


def _phantom(name: str) -> Scan:
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    return Scan(phantom(_PHANTOM_SIZE, generator), np.eye(4))


def _folder(folder: Path, root: Path) -> Volumes:
    files, others = find_files(folder, _KIND)
    if not files:
        raise DataError(f"{folder} holds no volume; expected files ending in {', '.join(SCAN_SUFFIXES)}")
    names = [path.relative_to(root).as_posix() for path in files]
    entries = tuple(
        VolumeEntry(name, partial(read_scan, path, name=name)) for path, name in zip(files, names, strict=True)
    )
    return Volumes(entries, tuple(Skipped(path.relative_to(root).as_posix(), "no volume") for path in others))


def _file(path: Path) -> Volumes:
    if path.suffix.lower() in (".npz", ".npy"):
        try:
            loaded = np.load(path, allow_pickle=False)
            many = loaded if isinstance(loaded, np.ndarray) else loaded.get("volumes")
        except (ValueError, OSError) as error:
            raise DataError(f"{path} cannot be read: {error}") from None
        if many is not None and many.ndim == 4:
            return Volumes(tuple(VolumeEntry(f"volume {row}", partial(_row, many, row)) for row in range(len(many))))
    return Volumes((VolumeEntry(path.name, partial(read_scan, path, name=path.name)),))


def _row(volumes: np.ndarray, row: int) -> Scan:
    values = np.asarray(volumes[row], np.float32)
    if not np.isfinite(values).all():
        raise Unreadable(f"volume {row}", "some of its voxels are not finite")
    return Scan(values, np.eye(4))
