"""Image files: which files of a folder are images, and their decoding to 8-bit grey or RGB."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from convatlas.errors import DataError

__all__ = [
    "IMAGES",
    "SUFFIXES",
    "FileKind",
    "Unreadable",
    "check_files",
    "decode",
    "find_files",
    "opened",
    "subfolders",
]

SUFFIXES = frozenset(
    f".{end}" for end in ("bmp", "gif", "jfif", "jpeg", "jpg", "pbm", "pgm", "png", "pnm", "ppm", "tif", "tiff", "webp")
)
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_GREY_MODES = frozenset({"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N"})
_DECODE_ALL = 20_000  # up to that many files each is decoded before use; beyond, that would take too long


class Unreadable(DataError):
    """An image file cannot be decoded; ``name`` is the file and ``reason`` what is wrong with it."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name} cannot be read: {self.reason}"


class _Decode(Protocol):
    def __call__(self, path: str | Path, channels: int, *, name: str | None = None) -> npt.NDArray[Any]: ...


@dataclass(frozen=True)
class FileKind:
    """A kind of files that hold one sample each.

    Attributes:
        what: what a file holds, in words.
        suffixes: how the names of such files end, in small letters.
        decode: reads a file as an array with the channels last; raises `Unreadable`.
        is_grey: of a path and what to call it, whether a file has one channel, or why it cannot be read; the third
            argument says whether to look at all of it or at its header only.
    """

    what: str
    suffixes: frozenset[str]
    decode: _Decode
    is_grey: Callable[[str, str, bool], bool | Unreadable]

    def matches(self, path: Path) -> bool:
        """Whether a file is of this kind by its name, e.g. "photo.JPG"."""
        return path.name.lower().endswith(tuple(self.suffixes)) and not path.name.startswith(".")


def decode(path: str | Path, channels: int, *, name: str | None = None) -> npt.NDArray[np.uint8]:
    """Read an image file as (H, W, channels) uint8, ``channels`` 1 or 3; conversions as in :func:`read_images`.

    Args:
        path: the file.
        channels: 1 for grey, 3 for RGB.
        name: what to call the file in an error; by default its path.

    Raises:
        Unreadable: the file is missing, truncated, too large or no image.
    """
    with opened(str(path), str(path) if name is None else name) as image:
        pixels = np.asarray(_as_8_bit(image).convert("L" if channels == 1 else "RGB"))
    return pixels.reshape(*pixels.shape[:2], channels)


@contextmanager
def opened(path: str, name: str) -> Iterator[Image.Image]:
    """An image file while it is decoded by Pillow; whatever goes wrong is told as `Unreadable`, with ``name``."""
    try:
        with Image.open(path, formats=_FORMATS) as image:
            yield image
    except UnidentifiedImageError:
        reason = "not an image" if os.path.getsize(path) else "the file is empty"
        raise Unreadable(name, reason) from None
    except OSError as error:
        raise Unreadable(name, error.strerror or str(error)) from None
    except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
        raise Unreadable(name, str(error) or type(error).__name__) from None


def _as_8_bit(image: Image.Image) -> Image.Image:
    """Bring an open file to mode L or RGB, upright and opaque."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels; save them as 8 or 16 bit, or as an array in an .npz file")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"pixels from {values.min()} to {values.max()}; expected at most 16 bit")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    grey = image.mode in _GREY_MODES
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
        image = opaque
    return image.convert("L" if grey else "RGB")


def _is_grey(path: str, name: str, pixels: bool) -> bool | Unreadable:
    """Whether a file is stored as grey, or what is wrong with it."""
    try:
        with opened(path, name) as image:
            return (_as_8_bit(image) if pixels else image).mode in _GREY_MODES
    except Unreadable as error:
        return error


#: Photographs and drawings, (H, W, C) uint8.
IMAGES = FileKind("image", SUFFIXES, decode, _is_grey)


def check_files(paths: Sequence[str], names: Sequence[str], kind: FileKind = IMAGES) -> list[bool | Unreadable]:
    """For each file whether it is stored as grey, or why it cannot be read.

    Up to 20,000 files are decoded, by threads; of more, only the headers are read. On a terminal a progress bar is
    shown when that takes more than two seconds.

    Args:
        paths: the files.
        names: what to call each in an error.
        kind: of the files.
    """
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    pixels = len(paths) <= _DECODE_ALL
    results: list[bool | Unreadable] = []
    console = Console(stderr=True)
    bar: Progress | None = None
    start = time.monotonic()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            for first in range(0, len(paths), 64):  # in small lots, so that Ctrl-C waits for one lot only
                lot = slice(first, first + 64)
                results += pool.map(kind.is_grey, paths[lot], names[lot], [pixels] * len(paths[lot]))
                if bar is None and console.is_terminal and time.monotonic() - start > 2:
                    bar = Progress(
                        *Progress.get_default_columns(), MofNCompleteColumn(), console=console, transient=True
                    )
                    bar.add_task(f"checking {kind.what}s", total=len(paths))
                    bar.start()
                if bar is not None:
                    bar.update(bar.task_ids[0], completed=len(results))
        finally:
            if bar is not None:
                bar.stop()
    return results


def subfolders(folder: Path) -> list[Path]:
    """The folders directly in ``folder``, sorted, without hidden ones."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def find_files(folder: Path, kind: FileKind = IMAGES) -> tuple[list[Path], list[Path]]:
    """The files at any depth below a folder: those of a kind by their names, and the others, without hidden ones.

    Raises:
        OSError: a folder cannot be listed.
    """

    def fail(error: OSError) -> None:
        raise error

    files: list[Path] = []
    for place, folders, names in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(place, name) for name in sorted(names) if not name.startswith(".")]
    return [f for f in files if kind.matches(f)], [f for f in files if not kind.matches(f)]
