"""Linear images as a camera's sensor gives them: 16-bit PNG and TIFF, floating-point TIFF, NumPy files; levels.

A file is kept as it is stored; it becomes numbers in [0, 1] by rows, so that a large one never takes the space of all
its pixels in floating point.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from convatlas.data.image_files import SUFFIXES, Unreadable
from convatlas.data.pictures import read_picture

__all__ = ["LINEAR_SUFFIXES", "Levels", "LinearImage", "read_linear_image"]

Array = npt.NDArray[Any]

#: Endings of the files that can be read.
LINEAR_SUFFIXES = frozenset({*SUFFIXES, ".npy", ".npz"})
_TIFF = (".tif", ".tiff")
#: Rows that are made floating point at a time.
_STRIP = 64
#: How far above 1 floating-point values may be for rounding.
_ROUNDING = 1e-4


@dataclass(frozen=True)
class Levels:
    """What the numbers of a file stand for.

    Attributes:
        black: value of no light, one number or one for each channel; 0 when left out.
        white: value of a full pixel; the largest of the file's type, or 1 of floating point, when left out.
        srgb: whether values are encoded by the curve of sRGB, which is undone.

    Raises:
        ValueError: a level is negative or not finite, or there are neither one nor three black levels.
    """

    black: float | tuple[float, float, float] | None = None
    white: float | None = None
    srgb: bool = False

    def __post_init__(self) -> None:
        black = np.atleast_1d(np.asarray(0.0 if self.black is None else self.black, np.float64))
        if black.shape not in ((1,), (3,)) or not (np.isfinite(black).all() and (black >= 0).all()):
            raise ValueError(f"black must be one number or three, from 0 on, got {self.black}")
        if self.white is not None and not (np.isfinite(self.white) and self.white > black.max()):
            raise ValueError(f"white must be above black, got {self.white} and {self.black}")


@dataclass(frozen=True, eq=False)
class LinearImage:
    """An image of linear light.

    Attributes:
        pixels: as stored, (H, W, 3): uint8, uint16 or floating point.
        levels: what the numbers stand for.

    Raises:
        ValueError: pixels have another shape or type, or their values do not fit to linear light.
    """

    pixels: Array
    levels: Levels = Levels()

    def __post_init__(self) -> None:
        pixels, levels = self.pixels, self.levels
        if pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
            raise ValueError(f"expected an image (H, W, 3) of linear RGB, got {pixels.shape}")
        if pixels.dtype == np.uint8 and not levels.srgb:
            raise ValueError(
                "it has 8 bits a channel, which hold gamma-encoded values: give 16 bits of linear RGB, or say srgb"
            )
        if pixels.dtype.kind == "f":
            least, most = float(pixels.min()), float(pixels.max())
            if not (least >= -_ROUNDING or levels.black is not None) or not most <= self.white + _ROUNDING:
                raise ValueError(f"expected linear RGB in [0, {self.white:g}], got values from {least:g} to {most:g}")
        elif pixels.dtype.name not in ("uint8", "uint16"):
            raise ValueError(f"pixels must be uint8, uint16 or floating point, got {pixels.dtype}")
        if self.white <= self.black.max():
            raise ValueError(f"white must be above black, got {self.white:g} and {self.black.max():g}")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.pixels.shape[0], self.pixels.shape[1]

    @property
    def black(self) -> npt.NDArray[np.float32]:
        """Value of no light of each channel."""
        given = 0.0 if self.levels.black is None else self.levels.black
        return np.broadcast_to(np.asarray(given, np.float32), (3,))

    @property
    def white(self) -> float:
        """Value of a full pixel."""
        if self.levels.white is not None:
            return self.levels.white
        return 1.0 if self.pixels.dtype.kind == "f" else float(np.iinfo(self.pixels.dtype).max)

    def rows(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Some rows as linear light in [0, 1], (stop - start, W, 3); what is below black is 0."""
        values = (self.pixels[start:stop].astype(np.float32) - self.black) / np.float32(self.white - self.black)
        values = values.clip(0, 1)
        if self.levels.srgb:
            values = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
        return values.astype(np.float32, copy=False)

    def strips(self) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """All rows in pieces from top to bottom, each with the number of its first row."""
        for start in range(0, self.size[0], _STRIP):
            yield start, self.rows(start, min(start + _STRIP, self.size[0]))

    def array(self) -> npt.NDArray[np.float32]:
        """The whole image as linear light in [0, 1], (H, W, 3)."""
        return self.rows(0, self.size[0])

    def reduced(self, longest: int) -> npt.NDArray[np.float32]:
        """The image with its longer side at most ``longest`` pixels, by means over whole squares of pixels.

        Rows and columns that fill no square are left out. A small image stays as it is.

        Raises:
            ValueError: longest is smaller than 1.
        """
        if longest < 1:
            raise ValueError(f"longest must be at least 1, got {longest}")
        side = -(-max(self.size) // longest)
        if side == 1:
            return self.array()
        height, width = (max(1, length // side) for length in self.size)
        down, right = (min(side, length) for length in self.size)
        result = np.empty((height, width, 3), np.float32)
        for row in range(height):
            block = self.rows(row * down, (row + 1) * down)[:, : width * right]
            result[row] = block.reshape(down, width, right, 3).mean((0, 2))
        return result


def read_linear_image(path: str | Path, levels: Levels | None = None, *, name: str | None = None) -> LinearImage:
    """Read an image of linear light.

    Args:
        path: PNG or TIFF with 16 bits a channel, TIFF with floating point, ``.npy``, or ``.npz`` with one array; files
            of 8 bits if the levels say that they are sRGB.
        levels: black, white and encoding.
        name: what to call the file in an error; by default its path.

    Raises:
        Unreadable: the file is missing, damaged or no linear image.
    """
    path, label = Path(path), str(path) if name is None else name
    try:
        return LinearImage(_pixels(path, label), levels or Levels())
    except Unreadable:
        raise
    except OSError as error:
        raise Unreadable(label, error.strerror or str(error)) from None
    except Exception as error:  # damaged files make decoders raise nearly anything
        raise Unreadable(label, str(error) or type(error).__name__) from None


def _pixels(path: Path, label: str) -> Array:
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return np.asarray(np.load(path, allow_pickle=False))
    if suffix == ".npz":
        with np.load(path, allow_pickle=False) as held:
            names: Sequence[str] = held.files
            if len(names) != 1:
                raise ValueError(f"expected one array, got {', '.join(names) or 'none'}")
            return np.asarray(held[names[0]])
    if suffix in _TIFF:
        from skimage.io import imread

        return np.asarray(imread(path))
    picture = read_picture(path, name=label)
    if picture.alpha is not None or picture.pixels.shape[2] != 3:
        channels = picture.pixels.shape[2] + (picture.alpha is not None)
        raise ValueError(f"expected three channels of linear RGB, got {channels}")
    return picture.pixels
