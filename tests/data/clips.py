"""Small clips with a tone, made with PyAV directly."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

SIZE = (48, 64)


def frames_of(count: int = 12, size: tuple[int, int] = SIZE) -> list[npt.NDArray[np.uint8]]:
    """Frames whose brightness rises by 15 from one to the next, with a bright bar that moves."""
    made = []
    for number in range(count):
        frame = np.full((*size, 3), (20 + 15 * number) % 240, np.uint8)
        frame[:, 4 * number : 4 * number + 4, 0] = 230
        made.append(frame)
    return made


def write_clip(
    path: Path,
    frames: list[npt.NDArray[np.uint8]],
    *,
    sound: str | None = "aac",
    times: list[int] | None = None,
    form: str = "yuv420p",
    delay: float = 0.0,
) -> Path:
    """A clip of 25 frames a second, or with times in ms, without loss; with a tone that begins after a delay."""
    av: Any = pytest.importorskip("av")
    height, width = frames[0].shape[:2]
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25, options={"crf": "0", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = width, height, form
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if form == "yuvj420p":
            stream.codec_context.color_range = 2
        track = None if sound is None else out.add_stream(sound, rate=44100)
        for number, frame in enumerate(frames):
            given = av.VideoFrame.from_ndarray(frame, format="rgb24")
            if form == "yuvj420p":
                given = given.reformat(format=form, dst_color_range="JPEG")
            if times is not None:
                given.pts, given.time_base = times[number], Fraction(1, 1000)
            out.mux(stream.encode(given))
        out.mux(stream.encode(None))
        if track is not None:
            wave = (0.3 * np.sin(2 * np.pi * 440 * np.arange(len(frames) * 1764) / 44100)).astype(np.float32)
            for start in range(0, len(wave) - 1023, 1024):
                piece = av.AudioFrame.from_ndarray(wave[None, start : start + 1024], format="fltp", layout="mono")
                piece.sample_rate, piece.pts = 44100, start + round(delay * 44100)
                out.mux(track.encode(piece))
            out.mux(track.encode(None))
    return path


def sound_packets(path: Path) -> list[tuple[float, bytes]]:
    """Time in seconds and content of every packet of the first sound track."""
    av: Any = pytest.importorskip("av")
    with av.open(str(path)) as container:
        packets = container.demux(container.streams.audio[0])
        return [(float(packet.pts * packet.time_base), bytes(packet)) for packet in packets if packet.dts is not None]
