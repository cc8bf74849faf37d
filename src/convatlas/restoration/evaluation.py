"""Measuring a super-resolution network on images and clips, beside bicubic interpolation."""

from __future__ import annotations

import csv
import io
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from convatlas.cost import cost
from convatlas.data.image_pairs import Sample
from convatlas.files import write_text
from convatlas.networks.base import Upscaler
from convatlas.report import printable
from convatlas.restoration.protocol import Protocol, Quality, as_pixels, as_tensor
from convatlas.restoration.upscaling import in_tiles, upscale_image, upscale_video

__all__ = [
    "ClipQuality",
    "Measured",
    "macs_per_pixel",
    "mean_quality",
    "measure_clip",
    "measure_image",
    "write_qualities",
]

Array = npt.NDArray[Any]

#: Side of the squares that are shown, in pixels of the large image.
_SHOWN = 96


@dataclass(frozen=True, eq=False)
class Measured:
    """One image enlarged by a network and by bicubic interpolation, and how near both are to the truth.

    Attributes:
        name: of the image.
        shape: height and width of the large image.
        network, bicubic: their quality.
        shown: the square with most detail, (H, W, C) uint8 each, of bicubic interpolation, the network and the truth.
    """

    name: str
    shape: tuple[int, int]
    network: Quality
    bicubic: Quality
    shown: tuple[Array, Array, Array]


@dataclass(frozen=True, eq=False)
class ClipQuality:
    """A clip shrunk and enlarged again.

    Attributes:
        network, bicubic: PSNR of luma in dB of each frame.
        seconds: that the network and the conversions around it took.
        shown: as in `Measured`, of one frame.
    """

    network: tuple[float, ...]
    bicubic: tuple[float, ...]
    seconds: float
    shown: tuple[Array, Array, Array]

    @property
    def frames_per_second(self) -> float:
        """How many frames were enlarged in a second."""
        return len(self.network) / self.seconds

    @staticmethod
    def overall(values: Sequence[float]) -> float:
        """PSNR of the clip taken as one image: of the mean of the squared errors."""
        error = sum(10 ** (-value / 10) for value in values) / len(values)
        return -10 * math.log10(error) if error else math.inf


def measure_image(model: Upscaler, name: str, sample: Sample, protocol: Protocol) -> Measured:
    """Enlarge the low resolution of an image, or of the middle one of several frames, and compare.

    Raises:
        ValueError: the image is smaller than the border of the protocol or than a block, or does not suit the network.
    """
    scale, middle = model.scale, len(sample.high) // 2
    truth = protocol.cut(sample.high[middle], scale)
    low = sample.low or tuple(protocol.shrink(protocol.cut(image, scale), scale) for image in sample.high)
    low = tuple(image[: truth.shape[0] // scale, : truth.shape[1] // scale] for image in low)
    rounded = protocol.rounding and not sample.luma
    # Pillow enlarges whole numbers to whole numbers, whatever is done with the network's.
    keep = rounded or protocol.convention == "pillow" or sample.luma
    interpolated = protocol.bicubic(low[middle] if keep else _as_float(low[middle]), scale)
    bicubic = protocol.measure(interpolated, truth, scale, is_luma=sample.luma)
    if rounded:
        enlarged = _whole(model, low, protocol)
        network = protocol.measure(enlarged, truth, scale)
    elif model.in_channels == 1:
        planes = torch.cat([protocol.luma_of(as_tensor(image), is_luma=sample.luma) for image in low])
        weight = next(model.parameters())
        y = in_tiles(model, planes[None].to(weight.device, weight.dtype))[0].float()
        enlarged = as_pixels(y, np.float32)
        plane = as_pixels(protocol.luma_of(as_tensor(truth), is_luma=sample.luma), np.float32)
        network = protocol.measure(enlarged, plane, scale, is_luma=True)
        if not sample.luma:
            enlarged = _whole(model, low, protocol)
    else:
        enlarged = upscale_image(model, _as_float(low[middle]), luma=protocol.luma, convention=protocol.convention)
        network = protocol.measure(enlarged, truth, scale)
    shown = tuple(_crop(image, truth) for image in (interpolated, enlarged, truth))
    return Measured(name, truth.shape[:2], network, bicubic, shown)  # type: ignore[arg-type]


def measure_clip(
    model: Upscaler,
    frames: Iterable[Array],
    protocol: Protocol,
    *,
    show: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> ClipQuality:
    """Shrink every frame of a clip, enlarge it again, and compare, holding a few frames at a time.

    Args:
        model: the network.
        frames: (H, W, 3) uint8, taken as the truth.
        protocol: what low resolution is, and what is compared.
        show: number of the frame of which a square is kept; the first if the clip has no such frame.
        advance: called after each frame.

    Raises:
        ValueError: there is no frame, or frames are smaller than a block or than the border of the protocol.
        DataError: the clip is damaged.
    """
    waiting: deque[tuple[Array, Array]] = deque()

    def shrunk() -> Iterator[Array]:
        for frame in frames:
            truth = protocol.cut(frame, model.scale)
            waiting.append((truth, protocol.shrink(truth, model.scale)))
            yield waiting[-1][1]

    reading = _Stopwatch(shrunk())
    enlarging = _Stopwatch(upscale_video(model, reading, luma=protocol.luma, convention=protocol.convention))
    network: list[Any] = []
    bicubic: list[Any] = []
    shown: tuple[Array, Array, Array] | None = None
    for enlarged in enlarging:
        truth, low = waiting.popleft()
        interpolated = protocol.bicubic(low, model.scale)
        if len(network) in (0, show):
            shown = (_crop(interpolated, truth), _crop(enlarged, truth), _crop(truth, truth))
        network.append(protocol.measure(enlarged, truth, model.scale).psnr)
        bicubic.append(protocol.measure(interpolated, truth, model.scale).psnr)
        advance()
    if shown is None:
        raise ValueError("frames must not be empty")
    return ClipQuality(tuple(network), tuple(bicubic), enlarging.seconds - reading.seconds, shown)


def mean_quality(qualities: Iterable[Quality]) -> Quality:
    """Means over images; SSIM over those that are large enough for it."""
    psnrs, ssims = zip(*qualities, strict=True)
    known = [value for value in ssims if not math.isnan(value)]
    return Quality(sum(psnrs) / len(psnrs), sum(known) / len(known) if known else math.nan)


def macs_per_pixel(model: Upscaler) -> float:
    """Multiply-adds of the convolutions of a network for one pixel of the enlarged image."""
    weight = next(model.parameters())
    side = 8
    x = torch.zeros(1, model.frames * model.in_channels, side, side, device=weight.device, dtype=weight.dtype)
    return cost(model, x).operations["convolution"] / (side * model.scale) ** 2


def write_qualities(path: str | Path, measured: Sequence[Measured]) -> None:
    """One row an image: its name, size, and the quality of network and bicubic interpolation."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "height", "width", "PSNR", "SSIM", "bicubic PSNR", "bicubic SSIM"])
    for each in measured:
        numbers = [f"{value:.4f}" for value in (*each.network, *each.bicubic)]
        writer.writerow([printable(each.name), *each.shape, *numbers])
    write_text(path, text.getvalue())


class _Stopwatch:
    """Passes on what an iterator gives, and counts the seconds that it takes for that."""

    def __init__(self, inner: Iterator[Array]) -> None:
        self.inner, self.seconds = inner, 0.0

    def __iter__(self) -> Iterator[Array]:
        while True:
            started = time.perf_counter()
            item = next(self.inner, None)
            self.seconds += time.perf_counter() - started
            if item is None:
                return
            yield item


def _whole(model: Upscaler, low: Sequence[Array], protocol: Protocol) -> Array:
    """The enlarged image in its own type, as a file of it would be."""
    if model.frames == 1:
        return upscale_image(model, low[0], luma=protocol.luma, convention=protocol.convention)
    frames = upscale_video(model, low, luma=protocol.luma, convention=protocol.convention)
    return list(frames)[len(low) // 2]


def _as_float(pixels: Array) -> Array:
    return pixels if pixels.dtype.kind == "f" else pixels.astype(np.float32) / np.iinfo(pixels.dtype).max


def _crop(image: Array, truth: Array) -> Array:
    """The square of an image where the truth has most detail, as something that can be shown."""
    side = min(_SHOWN, *truth.shape[:2])
    grey = _as_float(truth).mean(2)
    steps = np.abs(np.diff(grey, axis=0))[:, :-1] + np.abs(np.diff(grey, axis=1))[:-1]
    sums = np.pad(steps, ((1, 1), (1, 1)))[: truth.shape[0] + 1, : truth.shape[1] + 1].cumsum(0).cumsum(1)
    detail = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    y, x = np.unravel_index(int(detail.argmax()), detail.shape)
    cut = _as_float(image)[y : y + side, x : x + side].clip(0, 1)
    shown: Array = (255 * np.broadcast_to(cut, (*cut.shape[:2], 3))).round().astype(np.uint8)
    return shown
