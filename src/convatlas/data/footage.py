"""Frames to deliver as a video: a clip, a folder of numbered pictures, or a window that moves over photographs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from convatlas.data.image_files import Unreadable, find_files
from convatlas.data.pictures import read_picture
from convatlas.data.video import Frame, read_video
from convatlas.errors import DataError

__all__ = ["Footage", "moving_photographs", "read_footage"]

Floats = npt.NDArray[np.float32]

#: What `moving_photographs` moves over: photographs of scikit-image, the shots one after the other.
_SHOTS = ("astronaut", "coffee")
_FPS = 30  # of pictures, which do not tell
#: Height or width of a photograph over that of the window, and its pixels for one of the clip, at both ends of a shot.
_ROOM, _ZOOMS = 1.5, (1.0, 0.7)


@dataclass(frozen=True)
class Footage:
    """Frames that are read one after the other, as often as they are asked for.

    Attributes:
        name: what to call them.
        frames: gives every frame, (H, W, 3) uint8, all of one size.
        count: number of frames; of some clips an estimate, or 0.
        size: height and width.
        fps: frames a second.
        clip: the file, where they come from a clip; its sound goes with them.
        pixel_aspect: width of a pixel over its height.
    """

    name: str
    frames: Callable[[], Iterator[Frame]]
    count: int
    size: tuple[int, int]
    fps: Fraction
    clip: Path | None = None
    pixel_aspect: Fraction = Fraction(1)

    @property
    def sound_from(self) -> Path | None:
        """The clip, if it has a sound track."""
        return self.clip if self.clip is not None and read_video(self.clip).has_sound else None


def read_footage(source: str | Path) -> Footage:
    """Find the frames of a source.

    Args:
        source: a clip; a folder of pictures of one size, in the order of the numbers in their names, 30 a second; or
            ``photographs`` for `moving_photographs`.

    Raises:
        DataError: there is nothing at ``source``, or it cannot be read.
        MissingExtra: it is a clip and the package av is not installed.
    """
    if str(source) == "photographs":
        frame = next(moving_photographs())
        return Footage("photographs", moving_photographs, 48, frame.shape[:2], Fraction(_FPS))
    path = Path(source)
    if not path.exists():
        raise DataError(f"{source} does not exist; expected a clip, a folder of pictures, or 'photographs'")
    if path.is_dir():
        pictures = sorted(find_files(path)[0], key=_numbers)
        if not pictures:
            raise DataError(f"{source} holds no pictures")
        first = _picture(pictures[0])
        return Footage(path.name, partial(_pictures, pictures), len(pictures), first.shape[:2], Fraction(_FPS))
    video = read_video(path)
    size = (video.height, video.width)
    return Footage(path.name, video.frames, video.count, size, video.fps, path, video.pixel_aspect)


def _numbers(path: Path) -> tuple[str, list[Any]]:
    """A key by which frame 10 comes after frame 9."""
    return str(path.parent), [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _picture(path: Path) -> Frame:
    try:
        pixels = read_picture(path, name=path.name).pixels
    except Unreadable as error:
        raise DataError(f"{path} cannot be read: {error.reason}") from None
    small = pixels if pixels.dtype == np.uint8 else (pixels >> 8).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(small, (*small.shape[:2], 3)))


def _pictures(paths: list[Path]) -> Iterator[Frame]:
    for path in paths:
        yield _picture(path)


def moving_photographs(
    count: int = 48, size: tuple[int, int] = (96, 160), *, shapes: int = 4, seed: int = 0
) -> Iterator[Frame]:
    """A clip of two shots: a window slides over a photograph and zooms in, and discs move before it.

    Args:
        count: frames, half of them over each photograph.
        size: height and width.
        shapes: number of discs.
        seed: of the discs and of the way of the window.

    Raises:
        ValueError: there would be no frame.
    """
    if count < 1 or min(size) < 1:
        raise ValueError(f"count and size must be at least 1, got {count} and {size}")
    return _moving(count, size, shapes, seed)


def _moving(count: int, size: tuple[int, int], shapes: int, seed: int) -> Iterator[Frame]:
    from skimage import data

    generator = np.random.default_rng(seed)
    each = -(-count // len(_SHOTS))
    for shot, name in enumerate(_SHOTS):
        photograph = _sized(getattr(data, name)()[..., :3], size)
        zooms = np.array(_ZOOMS)
        ends = generator.uniform(0, 1, (2, 2))
        colours = generator.integers(0, 256, (shapes, 3)).astype(np.float32)
        places, speeds = generator.uniform(0, 1, (shapes, 2)), generator.uniform(-1, 1, (shapes, 2))
        radii = generator.uniform(0.04, 0.12, shapes) * size[0]
        for number in range(min(each, count - shot * each)):
            share = number / max(1, each - 1)
            zoom = float(zooms[0] + share * (zooms[1] - zooms[0]))
            free = np.array(photograph.shape[:2]) - 1 - zoom * (np.array(size) - 1)
            corner = np.maximum(free, 0) * (ends[0] + share * (ends[1] - ends[0]))
            frame = _window(photograph, corner, zoom, size)
            for colour, place, speed, radius in zip(colours, places, speeds, radii, strict=True):
                _draw(frame, colour, (place + share * speed) % 1 * np.array(size), radius)
            yield frame.round().clip(0, 255).astype(np.uint8)


def _sized(photograph: Frame, size: tuple[int, int]) -> Floats:
    """The photograph so large that the window has room in it on both axes; without aliasing."""
    share = _ROOM * max(wanted / length for wanted, length in zip(size, photograph.shape[:2], strict=True))
    height, width = (max(2, round(share * length)) for length in photograph.shape[:2])
    image = Image.fromarray(photograph).resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(image, np.float32)


def _window(photograph: Floats, corner: npt.NDArray[np.float64], zoom: float, size: tuple[int, int]) -> Floats:
    """The pixels at a grid, between those of the photograph by linear interpolation."""
    lows, shares = [], []
    for start, length, whole in zip(corner, size, photograph.shape[:2], strict=True):
        places = (start + zoom * np.arange(length)).clip(0, whole - 1)
        low = np.minimum(places.astype(np.int64), whole - 2)
        lows.append(low)
        shares.append((places - low).astype(np.float32))
    (y, x), (down, right) = lows, shares
    rows = photograph[y] * (1 - down)[:, None, None] + photograph[y + 1] * down[:, None, None]
    return np.asarray(rows[:, x] * (1 - right)[:, None] + rows[:, x + 1] * right[:, None], np.float32)


def _draw(frame: Floats, colour: Floats, centre: npt.NDArray[np.float64], radius: float) -> None:
    """Put a disc with a soft edge of a pixel into a frame."""
    y, x = np.mgrid[: frame.shape[0], : frame.shape[1]]
    share = (radius + 0.5 - np.hypot(y - centre[0], x - centre[1])).clip(0, 1)[..., None]
    frame[:] = frame * (1 - share) + colour * share
