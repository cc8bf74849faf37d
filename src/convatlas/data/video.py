"""Video files through PyAV: frames one after the other, upright and at a constant rate; writing with the sound kept.

Needs the optional package av (``pip install 'convatlas[video]'``).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from convatlas.errors import DataError, Unsupported, require, unknown
from convatlas.files import atomic_path

__all__ = ["ColourTags", "Frame", "Video", "is_video_name", "read_video", "write_video"]

#: (H, W, 3) uint8.
Frame = npt.NDArray[np.uint8]
Colour = Literal["rgb", "ycbcr"]

_SUFFIXES = frozenset(
    f".{end}"
    for end in (
        *("3gp", "avi", "flv", "m2ts", "m4v", "mkv", "mov", "mp4", "mpeg"),
        *("mpg", "mts", "ogv", "ts", "vob", "webm", "wmv", "y4m"),
    )
)
#: What can be written: suffix -> name of the format.
_FORMATS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}
#: What ffmpeg reads as if it were a video: single pictures and text.
_NO_VIDEO = ("_pipe", "image2", "tty", "bin", "xbin", "idf", "adf")
_UNTAGGED = 2  # value of a colour tag that says nothing
_BT709 = 1
_HD = 720  # from this height on, players take untagged colours for BT.709


class ColourTags(NamedTuple):
    """How a clip says its colours are meant: the numbers of ITU-T H.273 for matrix, primaries and transfer curve."""

    matrix: int = _UNTAGGED
    primaries: int = _UNTAGGED
    transfer: int = _UNTAGGED


@dataclass(frozen=True)
class Video:
    """A clip on disk; its frames are decoded when asked for, one after the other.

    Attributes:
        path: the file.
        width, height: of the upright frames, in pixels.
        fps: frames a second.
        count: number of frames; an estimate from the length where the file does not tell, 0 where it tells neither.
        pixel_aspect: width of a pixel over its height.
        has_sound: whether there is a sound track.
        tags: how the colours are meant.
    """

    path: Path
    width: int
    height: int
    fps: Fraction
    count: int
    pixel_aspect: Fraction
    has_sound: bool
    tags: ColourTags

    def __iter__(self) -> Iterator[Frame]:
        return self.frames()

    def frames(self, colour: Colour = "rgb") -> Iterator[Frame]:
        """Every frame, upright, as (H, W, 3) uint8, at a constant rate.

        Where the timing of a file varies, frames are repeated or left out, so that the sound keeps step.

        Args:
            colour: "rgb", or "ycbcr" for luma and chroma (chroma at full resolution) in studio range: luma of the file
                as it is, black at 16 and white at 235.

        Raises:
            DataError: the file is damaged; the message says after how many frames.
        """
        if colour not in ("rgb", "ycbcr"):
            raise unknown("colour", colour, ("rgb", "ycbcr"))
        with _opened(self.path) as (container, stream):
            stream.thread_type = "AUTO"
            shown, given = None, 0
            for number, (time, frame) in enumerate(_timed(container, stream, self)):
                # Half a frame of tolerance: times are rounded to the clock of the file.
                due = round(time * self.fps)
                while shown is not None and given < due:
                    yield shown
                    given += 1
                shown = _pixels(frame, colour)
                if number == 0:
                    given = due = 0
            if shown is not None:
                yield shown


def is_video_name(path: str | Path) -> bool:
    """Whether a file is a video by its name, e.g. "clip.MP4"."""
    path = Path(path)
    return path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")


def read_video(path: str | Path) -> Video:
    """Open a clip in any format that ffmpeg reads and look at its first frame.

    Raises:
        DataError: the file is missing, empty, damaged or no video.
        MissingExtra: the package av is not installed.
    """
    path = Path(path)
    with _opened(path) as (container, stream):
        rate = stream.average_rate or stream.guessed_rate
        if not rate:
            raise DataError(f"{path} cannot be read: it does not say how many frames it has a second")
        frame = next(_decoded(container, stream, path), None)
        if frame is None:
            raise DataError(f"{path} cannot be read: it holds no frame")
        aspect = Fraction(stream.sample_aspect_ratio or 1)
        turned = frame.rotation % 180 != 0
        width, height = (frame.height, frame.width) if turned else (frame.width, frame.height)
        seconds = stream.duration * stream.time_base if stream.duration else Fraction(container.duration or 0, 10**6)
        return Video(
            path=path,
            width=width,
            height=height,
            fps=Fraction(rate),
            count=stream.frames or round(seconds * rate),
            pixel_aspect=1 / aspect if turned else aspect,
            has_sound=bool(container.streams.audio),
            tags=ColourTags(int(frame.colorspace), int(frame.color_primaries), int(frame.color_trc)),
        )


def write_video(
    path: str | Path,
    frames: Iterable[Frame],
    fps: Fraction | float,
    *,
    colour: Colour = "rgb",
    sound_from: str | Path | None = None,
    pixel_aspect: Fraction | float = 1,
    tags: ColourTags | None = None,
    crf: int = 18,
) -> int:
    """Encode frames as H.264, while they come; the file appears when it is complete.

    The chroma is stored at half the resolution (4:2:0), which every player shows, if both sides are even. Otherwise it
    is stored in full (4:4:4), so that no pixel is added or lost; some players refuse that.

    Args:
        path: where to write: ``.mp4``, ``.m4v``, ``.mov`` or ``.mkv``.
        frames: (H, W, 3) uint8, all of one size.
        fps: frames a second.
        colour: "rgb", or "ycbcr" in studio range, as `Video.frames` gives them.
        sound_from: a file whose sound tracks are copied as they are, up to the end of the frames.
        pixel_aspect: width of a pixel over its height.
        tags: how "ycbcr" is meant; RGB is stored as BT.709.
        crf: constant rate factor of the encoder: 0 loses nothing, 18 nothing visible, 51 nearly everything.

    Returns:
        The number of frames.

    Raises:
        ValueError: there is no frame, a frame has another size or type than the first, or an argument is out of range.
        DataError: ``sound_from`` cannot be read.
        Unsupported: the format of ``path`` cannot hold the sound, or av has no encoder for H.264.
        MissingExtra: the package av is not installed.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in _FORMATS:
        raise ValueError(f"path must end in {', '.join(_FORMATS)}, got {path.name!r}")
    if colour not in ("rgb", "ycbcr"):
        raise unknown("colour", colour, ("rgb", "ycbcr"))
    rate = Fraction(fps).limit_denominator(100_000)
    if rate <= 0:
        raise ValueError(f"fps must be positive, got {fps}")
    if not 0 <= crf <= 51:
        raise ValueError(f"crf must be from 0 to 51, got {crf}")
    av = _av("writing a video")
    if "libx264" not in av.codecs_available:
        raise Unsupported("this build of the package av has no encoder for H.264 (libx264)")
    ordered = iter(frames)
    first = next(ordered, None)
    if first is None:
        raise ValueError("frames must not be empty")
    _check_frame(first, first)
    tags = ColourTags(_BT709, _BT709, _BT709) if colour == "rgb" else tags or ColourTags()
    options = {"movflags": "+faststart"} if path.suffix.lower() != ".mkv" else {}
    with (
        atomic_path(path) as part,
        av.open(str(part), "w", format=_FORMATS[path.suffix.lower()], options=options) as out,
    ):
        stream = _video_stream(out, first, rate, Fraction(pixel_aspect).limit_denominator(10_000), tags, crf)
        with _sound(out, sound_from, path) as packets:
            count = 0
            for count, frame in enumerate(itertools.chain((first,), ordered), 1):
                _check_frame(frame, first)
                for packet in packets.until(count / rate):
                    out.mux(packet)
                encoded = _to_encode(frame, colour, stream.pix_fmt, tags)
                encoded.pts, encoded.time_base = count - 1, 1 / rate
                out.mux(stream.encode(encoded))
            out.mux(stream.encode(None))
    return count


# Reading


def _av(purpose: str) -> Any:
    return require("av", extra="video", purpose=purpose)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream."""
    av = _av("reading a video")
    if not path.is_file():
        raise DataError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}; expected a video file")
    if path.stat().st_size == 0:
        raise DataError(f"{path} cannot be read: the file is empty")
    try:
        container = av.open(str(path))
    except (av.error.FFmpegError, ValueError) as error:
        raise DataError(f"{path} cannot be read: it is damaged or no video ({_reason(error)})") from None
    with container:
        streams = [stream for stream in container.streams.video if not _is_cover(av, stream)]
        if not streams or container.format.name.endswith(_NO_VIDEO):
            raise DataError(f"{path} cannot be read: it holds no video")
        yield container, streams[0]


def _is_cover(av: Any, stream: Any) -> bool:
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _decoded(container: Any, stream: Any, path: Path) -> Iterator[Any]:
    av = _av("reading a video")
    count = 0
    try:
        for frame in container.decode(stream):
            yield frame
            count += 1
    except av.error.FFmpegError as error:
        raise DataError(f"{path} is damaged after {count} frames: {_reason(error)}") from None


def _timed(container: Any, stream: Any, video: Video) -> Iterator[tuple[Fraction, Any]]:
    """Frames with their times since the first, in seconds."""
    start = None
    for number, frame in enumerate(_decoded(container, stream, video.path)):
        if frame.pts is None:
            yield number / video.fps, frame
            continue
        start = frame.pts if start is None else start
        yield (frame.pts - start) * frame.time_base, frame


def _pixels(frame: Any, colour: str) -> Frame:
    from av.video.reformatter import ColorRange, Colorspace

    if colour == "rgb":
        untagged = int(frame.colorspace) == _UNTAGGED and frame.height >= _HD
        pixels = frame.reformat(format="rgb24", src_colorspace=Colorspace.ITU709 if untagged else None).to_ndarray()
    else:
        planes = frame.reformat(format="yuv444p", dst_color_range=ColorRange.MPEG).to_ndarray()
        pixels = np.moveaxis(planes, 0, -1)
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error)


# Writing


def _check_frame(frame: Frame, first: Frame) -> None:
    if not isinstance(frame, np.ndarray) or frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
        given = f"{frame.dtype} {frame.shape}" if isinstance(frame, np.ndarray) else type(frame).__name__
        raise ValueError(f"frames must be (H, W, 3) uint8, got {given}")
    if frame.shape != first.shape:
        raise ValueError(f"frames must have one size, got {frame.shape[:2]} after {first.shape[:2]}")


def _video_stream(out: Any, first: Frame, rate: Fraction, aspect: Fraction, tags: ColourTags, crf: int) -> Any:
    from av.video.reformatter import ColorRange

    height, width = first.shape[:2]
    stream = out.add_stream("libx264", rate=rate, options={"crf": str(crf)})
    stream.width, stream.height = width, height
    stream.pix_fmt = "yuv444p" if width % 2 or height % 2 else "yuv420p"
    context = stream.codec_context
    context.time_base = 1 / rate
    context.sample_aspect_ratio = aspect
    context.color_range = ColorRange.MPEG
    context.colorspace, context.color_primaries, context.color_trc = tags
    return stream


def _to_encode(frame: Frame, colour: str, form: str, tags: ColourTags) -> Any:
    import av
    from av.video.reformatter import ColorRange, Colorspace

    if colour == "rgb":
        made = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        return made.reformat(format=form, dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
    made = av.VideoFrame.from_ndarray(np.ascontiguousarray(np.moveaxis(frame, -1, 0)), format="yuv444p")
    made.color_range, made.colorspace = ColorRange.MPEG, tags.matrix
    return made if form == "yuv444p" else made.reformat(format=form, dst_color_range=ColorRange.MPEG)


class _Packets:
    """The packets of all sound tracks in the order of the file, with the time of each since the first frame."""

    def __init__(self, timed: Iterator[tuple[Fraction, Any]]) -> None:
        self._timed = timed
        self._next = next(timed, None)

    def until(self, time: Fraction) -> Iterator[Any]:
        """Those that begin before a time."""
        while self._next is not None and self._next[0] < time:
            yield self._next[1]
            self._next = next(self._timed, None)


@contextmanager
def _sound(out: Any, source: str | Path | None, path: Path) -> Iterator[_Packets]:
    if source is None:
        yield _Packets(iter(()))
        return
    av = _av("reading a sound track")
    try:
        container = av.open(str(source))
    except (av.error.FFmpegError, ValueError) as error:
        raise DataError(f"the sound of {source} cannot be read: {_reason(error)}") from None
    with container:
        tracks = list(container.streams.audio)
        try:
            copies = {track.index: out.add_stream_from_template(track) for track in tracks}
            out.start_encoding()
        except (av.error.FFmpegError, ValueError) as error:
            codecs = ", ".join(track.codec_context.name for track in tracks)
            raise Unsupported(f"{path.name} cannot hold the sound of {source} ({codecs}): {_reason(error)}") from None
        shown = [stream for stream in container.streams.video if not _is_cover(av, stream)]
        start = (shown[0].start_time or 0) * shown[0].time_base if shown else Fraction(0)
        yield _Packets(_copied(container, tracks, copies, start))


def _copied(
    container: Any, tracks: list[Any], copies: dict[int, Any], start: Fraction
) -> Iterator[tuple[Fraction, Any]]:
    for packet in container.demux(tracks) if tracks else ():
        if packet.dts is None:  # marks the end
            continue
        base = packet.time_base
        shift = round(start / base)
        packet.dts -= shift
        packet.pts = packet.dts if packet.pts is None else packet.pts - shift
        packet.stream = copies[packet.stream.index]
        yield packet.dts * base, packet
