"""A user's files that are to be restored: finding them, and the names of the results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from convatlas.data.image_files import find_files
from convatlas.data.video import is_video_name
from convatlas.errors import DataError

__all__ = ["JPEG", "found_files", "shown"]

Array = npt.NDArray[Any]

#: Endings of the files that stay JPEG.
JPEG = (".jpg", ".jpeg", ".jfif")


def found_files(inputs: Sequence[str | Path], *, clips: bool = True) -> Iterator[tuple[Path, str]]:
    """Image files, and clips if wanted, among files and folders, each with its name relative to what was given.

    Raises:
        DataError: an input does not exist.
    """
    for given in map(Path, inputs):
        if given.is_dir():
            images, others = find_files(given)
            for path in sorted([*images, *(filter(is_video_name, others) if clips else ())]):
                yield path, path.relative_to(given).as_posix()
        elif given.exists():
            yield given, str(given)
        else:
            raise DataError(f"{given} does not exist; expected an image, a clip or a folder of them")


def shown(pixels: Array) -> Array:
    """Pixels (H, W, C) of 8 or 16 bits as what can be shown: (H, W, 3) uint8."""
    small = pixels if pixels.dtype == np.uint8 else (pixels >> 8).astype(np.uint8)
    return np.broadcast_to(small, (*small.shape[:2], 3))
