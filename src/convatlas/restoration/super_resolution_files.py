"""Enlarging a user's files: finding them, writing them under new names, leaving out what cannot be read."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from convatlas.data.image_files import Unreadable
from convatlas.data.images import Skipped
from convatlas.data.pictures import Picture, read_picture, write_picture
from convatlas.data.video import Frame, is_video_name, read_video, write_video
from convatlas.errors import DataError
from convatlas.files import free_name
from convatlas.networks.base import Upscaler
from convatlas.ops.colour import ycbcr_to_rgb
from convatlas.restoration.naming import JPEG, found_files, shown
from convatlas.restoration.protocol import Protocol, as_pixels, as_tensor
from convatlas.restoration.upscaling import upscale_image, upscale_video
from convatlas.training.progress import progress

__all__ = ["Enlarged", "enlarge_files"]

Array = npt.NDArray[Any]

#: What clips are written as; any other becomes Matroska, which holds every kind of sound.
_CLIPS = (".mp4", ".m4v", ".mov", ".mkv")


@dataclass(frozen=True, eq=False)
class Enlarged:
    """A file that was enlarged.

    Attributes:
        name: of the input, as given or relative to a folder that was given.
        path: of the result, relative to the output folder.
        before, after: height and width.
        frames: of a clip, 1 for an image.
        seconds: from reading to writing.
        sample: the image, or a frame of the clip, as it was and as it is: (H, W, 3) uint8.
    """

    name: str
    path: str
    before: tuple[int, int]
    after: tuple[int, int]
    frames: int
    seconds: float
    sample: tuple[Array, Array]


def enlarge_files(
    model: Upscaler,
    protocol: Protocol,
    inputs: Sequence[str | Path],
    folder: Path,
    check: Callable[[str, Array], None],
) -> tuple[list[Enlarged], list[Skipped]]:
    """Enlarge image files, clips, and all of both in folders.

    Args:
        model: the network.
        protocol: whose luma and interpolation the network was trained with.
        inputs: files and folders.
        folder: where to write.
        check: called with the name and the pixels of each image; raises `Unreadable` to have it left out.

    Returns:
        What was written, and what was left out with the reasons.

    Raises:
        DataError: an input does not exist, or nothing can be read.
        OSError: a file cannot be written.
    """
    found = list(found_files(inputs))
    if not found:
        raise DataError(f"there is no image and no clip in {', '.join(map(str, inputs)) or 'nothing'}")
    done: list[Enlarged] = []
    skipped: list[Skipped] = []
    taken: set[str] = set()
    for path, name in found:
        enlarge = _clip if is_video_name(path) else partial(_image, check)
        try:
            done.append(enlarge(model, protocol, path, name, folder, taken))
        except (Unreadable, DataError) as error:
            skipped.append(Skipped(name, error.reason if isinstance(error, Unreadable) else str(error)))
    if not done:
        raise DataError(f"{skipped[0].path} cannot be enlarged: {skipped[0].reason}")
    return done, skipped


def _image(
    check: Callable[[str, Array], None],
    model: Upscaler,
    protocol: Protocol,
    path: Path,
    name: str,
    folder: Path,
    taken: set[str],
) -> Enlarged:
    if model.frames > 1:
        raise DataError(f"the network takes {model.frames} frames of a clip, not an image")
    started = time.perf_counter()
    picture = read_picture(path, name=name)
    check(name, picture.pixels)
    parts = [picture.pixels] if picture.alpha is None else [picture.pixels, picture.alpha]
    with progress(name, None) as advance:
        whole = upscale_image(
            model,
            np.concatenate(parts, 2),
            luma=protocol.luma,
            convention=protocol.convention,
            progress=lambda *_: advance(),
        )
    colours = picture.pixels.shape[2]
    alpha = whole[..., colours:] if picture.alpha is not None else None
    result = Picture(np.ascontiguousarray(whole[..., :colours]), alpha, picture.icc)
    plain = alpha is None and whole.dtype == np.uint8
    suffix = path.suffix if path.suffix.lower() in JPEG and plain else ".png"
    written = free_name(name, f"x{model.scale}", suffix, taken)
    write_picture(folder / written, result)
    sample = (shown(picture.pixels), shown(result.pixels))
    seconds = time.perf_counter() - started
    return Enlarged(name, written, picture.pixels.shape[:2], whole.shape[:2], 1, seconds, sample)


def _clip(model: Upscaler, protocol: Protocol, path: Path, name: str, folder: Path, taken: set[str]) -> Enlarged:
    started = time.perf_counter()
    video = read_video(path)
    suffix = path.suffix if path.suffix.lower() in _CLIPS else ".mkv"
    written = free_name(name, f"x{model.scale}", suffix, taken)
    colour: Literal["rgb", "ycbcr"] = "ycbcr" if model.in_channels == 1 else "rgb"
    kept: dict[str, Frame] = {}

    def watched(frames: Iterator[Frame], what: str) -> Iterator[Frame]:
        for number, frame in enumerate(frames):
            if number in (0, video.count // 3):
                kept[what] = frame
            yield frame

    with progress(name, video.count) as advance:

        def counted(frames: Iterator[Frame]) -> Iterator[Frame]:
            for frame in frames:
                yield frame
                advance()

        enlarged = upscale_video(
            model,
            watched(video.frames(colour), "before"),
            colour=colour,
            luma=protocol.luma,
            convention=protocol.convention,
        )
        frames = write_video(
            folder / written,
            counted(watched(enlarged, "after")),
            video.fps,
            colour=colour,
            sound_from=path if video.has_sound else None,
            pixel_aspect=video.pixel_aspect,
            tags=video.tags,
        )
    before, after = (_to_rgb(kept[what]) if colour == "ycbcr" else kept[what] for what in ("before", "after"))
    seconds = time.perf_counter() - started
    return Enlarged(name, written, before.shape[:2], after.shape[:2], frames, seconds, (before, after))


def _to_rgb(frame: Frame) -> Array:
    return as_pixels(ycbcr_to_rgb(as_tensor(frame), "matlab"), np.uint8)
