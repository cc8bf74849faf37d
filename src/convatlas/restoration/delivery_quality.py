"""How good a delivered video is for its bytes, beside bicubic interpolation and beside the video encoded plainly."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from convatlas.data.footage import Footage
from convatlas.data.video import Frame, read_video, write_video
from convatlas.errors import DataError
from convatlas.files import write_text
from convatlas.restoration.delivery import Playback
from convatlas.restoration.protocol import Protocol
from convatlas.restoration.video_chunks import patch_errors, whole_psnr

__all__ = [
    "DeliveryQuality",
    "PlainVideo",
    "bytes_for",
    "encode_plainly",
    "fill",
    "frame_error",
    "measure_delivery",
    "to_psnr",
    "write_frame_quality",
]

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]


def fill(frame: Frame, size: tuple[int, int]) -> Frame:
    """The frame with its last row and column repeated up to a size."""
    more = [(0, wanted - length) for wanted, length in zip(size, frame.shape[:2], strict=True)]
    return np.pad(frame, [*more, (0, 0)], mode="edge")


def frame_error(first: Frame, second: Frame) -> float:
    """Mean squared difference of two frames of 8 bits, in [0, 1]."""
    return float(((first.astype(np.float64) - second) ** 2).mean() / 255**2)


def to_psnr(error: float) -> float:
    """PSNR in dB of a mean squared error in [0, 1]; infinite for 0."""
    return -10 * math.log10(error) if error else math.inf


@dataclass(frozen=True, eq=False)
class DeliveryQuality:
    """A delivered video beside what it should be.

    Attributes:
        network, bicubic: mean squared error in [0, 1] of each frame, over all its pixels, RGB of 8 bits.
        patches: mean squared error of each patch without its border, (frames, patches), as the labels are measured.
        seconds: that the networks took.
        shown: (height, width, 3) uint8 of one frame: bicubic interpolation, networks, truth.
        shown_number: of that frame.
    """

    network: tuple[float, ...]
    bicubic: tuple[float, ...]
    patches: Floats
    seconds: float
    shown: tuple[Frame, Frame, Frame]
    shown_number: int

    @property
    def psnr(self) -> float:
        """PSNR in dB of the whole video: of the mean error of its frames."""
        return to_psnr(sum(self.network) / len(self.network))

    @property
    def bicubic_psnr(self) -> float:
        """The same of bicubic interpolation."""
        return to_psnr(sum(self.bicubic) / len(self.bicubic))

    @property
    def patch_psnr(self) -> float:
        """PSNR in dB of the whole video, borders of patches left out, as the paper measures it."""
        return whole_psnr(torch.from_numpy(self.patches))

    @property
    def frames_per_second(self) -> float:
        """Frames that were enlarged in a second."""
        return len(self.network) / self.seconds


def measure_delivery(
    playback: Playback,
    low: Iterable[Frame],
    truth: Iterable[Frame],
    *,
    shave: int,
    show: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> DeliveryQuality:
    """Play a video and compare it with the truth, frame by frame.

    Args:
        playback: the networks.
        low: frames of low resolution, as they are delivered.
        truth: the frames they were made of.
        shave: pixels left out along the border of each patch, in `DeliveryQuality.patches`.
        show: number of the frame that is kept to be shown.
        advance: called after each frame.

    Raises:
        DataError: the numbers of frames differ.
        ValueError: frames have another size than the networks are for.
    """
    protocol = Protocol()
    network: list[float] = []
    bicubic: list[float] = []
    patches: list[Floats] = []
    shown: tuple[Frame, Frame, Frame] | None = None
    seconds = 0.0
    for number, (small, large) in enumerate(_both(low, truth, len(playback.index))):
        started = time.perf_counter()
        filled = playback.filled(small, number)
        seconds += time.perf_counter() - started
        height, width = playback.size
        ours = filled[:height, :width]
        theirs = protocol.bicubic(small, playback.scale)[:height, :width]
        wanted = fill(large, filled.shape[:2])
        x, y = (torch.from_numpy(image).permute(2, 0, 1)[None] for image in (filled, wanted))
        patches.append(patch_errors(x.double() / 255, y, playback.grid, shave=shave).numpy())
        network.append(frame_error(ours, large))
        bicubic.append(frame_error(theirs, large))
        if number in (0, show):
            shown = (np.ascontiguousarray(theirs), np.ascontiguousarray(ours), large)
        advance()
    if shown is None:
        raise DataError("the video has no frame")
    kept = show if show < len(network) else 0
    return DeliveryQuality(tuple(network), tuple(bicubic), np.stack(patches), seconds, shown, kept)


def _both(low: Iterable[Frame], truth: Iterable[Frame], count: int) -> Iterator[tuple[Frame, Frame]]:
    smalls, larges = iter(low), iter(truth)
    for number in range(count):
        small, large = next(smalls, None), next(larges, None)
        if small is None or large is None:
            which = "of low resolution" if small is None else "to compare with"
            raise DataError(f"the video {which} ends after {number} of {count} frames")
        yield small, large
    if next(larges, None) is not None:
        raise DataError(f"the video to compare with has more than the {count} frames that were delivered")


class PlainVideo(NamedTuple):
    """The video itself, encoded with loss: rate factor, bytes with sound, PSNR in dB of the whole."""

    crf: int
    bytes: int
    psnr: float


def encode_plainly(
    footage: Footage, factors: Sequence[int], advance: Callable[[], None] = lambda: None
) -> list[PlainVideo]:
    """Encode footage at full resolution as H.264 by several rate factors and measure what comes out.

    Args:
        footage: the frames.
        factors: constant rate factors from 0 to 51; larger ones give smaller files.
        advance: called after each of them.

    Raises:
        ValueError: a factor is out of range.
    """
    found = []
    with TemporaryDirectory(prefix="convatlas-") as folder:
        for crf in sorted(factors):
            path = Path(folder) / f"{crf}.mp4"
            write_video(path, footage.frames(), footage.fps, sound_from=footage.sound_from, crf=crf)
            errors = [
                frame_error(decoded, frame)
                for decoded, frame in zip(read_video(path).frames(), footage.frames(), strict=False)
            ]
            found.append(PlainVideo(crf, path.stat().st_size, to_psnr(sum(errors) / len(errors))))
            path.unlink()
            advance()
    return found


def bytes_for(psnr: float, plain: Sequence[PlainVideo]) -> float | None:
    """Bytes that the plain video takes for a PSNR, its logarithm interpolated; None outside of what was encoded."""
    rising = sorted((video.psnr, math.log(video.bytes)) for video in plain)
    if not rising or not rising[0][0] <= psnr <= rising[-1][0]:
        return None
    return math.exp(float(np.interp(psnr, [each[0] for each in rising], [each[1] for each in rising])))


def write_frame_quality(path: str | Path, quality: DeliveryQuality) -> None:
    """One row a frame: PSNR in dB of the networks and of bicubic interpolation."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["frame", "PSNR", "bicubic PSNR"])
    for number, errors in enumerate(zip(quality.network, quality.bicubic, strict=True)):
        writer.writerow([number, *(f"{to_psnr(error):.4f}" for error in errors)])
    write_text(path, text.getvalue())
