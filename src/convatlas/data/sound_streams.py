"""Sound that comes and goes while it is worked on: PCM samples from a pipe, and WAV files that grow."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal, Self, get_args

import numpy as np
import numpy.typing as npt

from convatlas.errors import DataError

__all__ = ["GrowingWav", "PcmKind", "PcmStream", "encode_pcm", "read_wav_header"]

Samples = npt.NDArray[np.float32]

#: How samples are stored, by the names of ffmpeg.
PcmKind = Literal["u8", "s16le", "s24le", "s32le", "f32le", "f64le"]

_BYTES: dict[str, int] = {"u8": 1, "s16le": 2, "s24le": 3, "s32le": 4, "f32le": 4, "f64le": 8}
#: Numbers of formats in a WAV header.
_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE


@dataclass(frozen=True)
class PcmStream:
    """Samples that come one after the other, channels interleaved.

    Attributes:
        file: where the bytes come from, at the first sample.
        kind: how samples are stored.
        sample_rate: in Hz.
        channels: number of channels.
        left: bytes that there are, where it is known.

    Raises:
        ValueError: an attribute is out of range.
    """

    file: BinaryIO
    kind: PcmKind
    sample_rate: int
    channels: int = 1
    left: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(PcmKind):
            raise ValueError(f"kind must be one of {', '.join(get_args(PcmKind))}, got {self.kind!r}")
        if min(self.sample_rate, self.channels) < 1:
            raise ValueError(f"sample_rate and channels must be at least 1, got {self.sample_rate} and {self.channels}")

    def blocks(self, size: int) -> Iterator[Samples]:
        """Blocks of ``size`` samples (T,), the mean of the channels, as they come; the last one may be shorter.

        Bytes at the end that make no whole sample are dropped.

        Raises:
            ValueError: size is not positive.
            DataError: a value is not finite.
        """
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        frame, done, left = _BYTES[self.kind] * self.channels, 0, self.left
        while True:
            wanted = size * frame if left is None else min(size * frame, left)
            data = self._read(wanted)
            values = _decoded(data[: len(data) // frame * frame], self.kind).reshape(-1, self.channels).mean(1)
            if not np.isfinite(values).all():
                place = done + int(np.argmin(np.isfinite(values)))
                raise DataError(f"the stream holds a value that is not finite, at sample {place}")
            if len(values):
                yield values.astype(np.float32)
            done, left = done + len(values), None if left is None else left - len(data)
            if len(data) < size * frame:
                return

    def _read(self, count: int) -> bytes:
        """So many bytes, or fewer at the end: a pipe may give less than it is asked for."""
        parts = []
        while count > 0 and (part := self.file.read(count)):
            parts.append(part)
            count -= len(part)
        return b"".join(parts)


def read_wav_header(file: BinaryIO) -> PcmStream:
    """Read a WAV stream up to its first sample; a length that the header does not know yet is taken as endless.

    Raises:
        DataError: it is no WAV, or one of compressed samples.
    """

    def exactly(count: int) -> bytes:
        data = b""
        while len(data) < count and (part := file.read(count - len(data))):
            data += part
        if len(data) < count:
            raise DataError("the stream ends within its header; raw samples need to be told by raw and rate")
        return data

    start = exactly(12)
    if start[:4] not in (b"RIFF", b"RF64") or start[8:] != b"WAVE":
        raise DataError("the stream is no WAV; raw samples need to be told by raw, e.g. s16le, and rate")
    told: tuple[PcmKind, int, int] | None = None
    while True:
        name, size = struct.unpack("<4sI", exactly(8))
        if name == b"data":
            if told is None:
                raise DataError("the WAV stream has samples before it tells their format")
            endless = size in (0, 0xFFFFFFFF) or start[:4] == b"RF64"
            return PcmStream(file, *told, left=None if endless else size)
        body = exactly(size + size % 2)
        if name == b"fmt ":
            told = _format(body)


def _format(body: bytes) -> tuple[PcmKind, int, int]:
    if len(body) < 16:
        raise DataError(f"the format of the WAV stream must have 16 bytes at least, got {len(body)}")
    number, channels, rate, _, _, bits = struct.unpack("<HHIIHH", body[:16])
    if number == _EXTENSIBLE and len(body) >= 26:
        (number,) = struct.unpack("<H", body[24:26])
    kinds: dict[tuple[int, int], PcmKind] = {
        (_PCM, 8): "u8",
        (_PCM, 16): "s16le",
        (_PCM, 24): "s24le",
        (_PCM, 32): "s32le",
        (_FLOAT, 32): "f32le",
        (_FLOAT, 64): "f64le",
    }
    if (number, bits) not in kinds or not channels or not rate:
        raise DataError(f"the WAV stream has format {number} of {bits} bits, which is no plain PCM or float")
    return kinds[number, bits], rate, channels


def _decoded(data: bytes, kind: PcmKind) -> npt.NDArray[np.float64]:
    if kind == "u8":
        return (np.frombuffer(data, np.uint8).astype(np.float64) - 128) / 128
    if kind == "s24le":
        octets = np.frombuffer(data, np.uint8).reshape(-1, 3)
        wide = np.zeros((len(octets), 4), np.uint8)
        wide[:, 1:] = octets
        return wide.view("<i4")[:, 0] / 2.0**31
    values = np.frombuffer(data, {"s16le": "<i2", "s32le": "<i4", "f32le": "<f4", "f64le": "<f8"}[kind])
    return values.astype(np.float64) / {"s16le": 2.0**15, "s32le": 2.0**31}.get(kind, 1.0)


def encode_pcm(samples: Samples, kind: PcmKind) -> bytes:
    """Samples (T,) from -1 to 1 as bytes of one channel; louder ones are clipped to integers.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in get_args(PcmKind):
        raise ValueError(f"kind must be one of {', '.join(get_args(PcmKind))}, got {kind!r}")
    if kind in ("f32le", "f64le"):
        return samples.astype("<f4" if kind == "f32le" else "<f8").tobytes()
    bits = 8 * _BYTES[kind]
    most = 2 ** (bits - 1) - 1
    whole = np.round(samples.astype(np.float64).clip(-1, 1) * most).astype("<i4")
    if kind == "u8":
        return (whole + 128).astype(np.uint8).tobytes()
    if kind == "s24le":
        return whole.view(np.uint8).reshape(-1, 4)[:, :3].tobytes()
    return whole.astype("<i2" if kind == "s16le" else "<i4").tobytes()


class GrowingWav:
    """A WAV file of one channel with 16 bits that can be played at any time while samples are added.

    Args:
        path: the file; one of that name is replaced.
        sample_rate: in Hz.

    Raises:
        ValueError: the rate is not positive.
        OSError: the file cannot be written.
    """

    def __init__(self, path: str | Path, sample_rate: int) -> None:
        if sample_rate < 1:
            raise ValueError(f"sample_rate must be positive, got {sample_rate}")
        self.path, self.sample_rate, self.samples = Path(path), sample_rate, 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("wb")
        self._file.write(self._header())
        self._file.flush()

    def add(self, samples: Samples) -> None:
        """Add samples (T,) from -1 to 1, and tell their number in the header."""
        self._file.seek(0, 2)
        self._file.write(encode_pcm(samples, "s16le"))
        self.samples += len(samples)
        self._file.seek(0)
        self._file.write(self._header())
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _header(self) -> bytes:
        # Beyond 4 GB the sizes say that they are not known, which players take as "to the end".
        size = min(2 * self.samples, 0xFFFFFFFF - 36)
        return struct.pack(
            "<4sI8sIHHIIHH4sI",
            b"RIFF",
            size + 36,
            b"WAVEfmt ",
            16,
            _PCM,
            1,
            self.sample_rate,
            2 * self.sample_rate,
            2,
            16,
            b"data",
            size,
        )
