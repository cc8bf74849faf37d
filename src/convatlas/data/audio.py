"""Audio files through soundfile: whole or in blocks, as float32 from -1 to 1, at any sample rate.

Needs the optional package soundfile (``pip install 'convatlas[audio]'``). It reads WAV, FLAC, OGG, AIFF and MP3,
integers of 8 to 32 bits and floats.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from convatlas.errors import DataError, require
from convatlas.files import atomic_path

__all__ = [
    "AUDIO_SUFFIXES",
    "Audio",
    "find_audio",
    "is_audio_name",
    "read_audio",
    "resample",
    "write_audio",
    "write_audio_blocks",
]

#: (channels, samples) float32.
Samples = npt.NDArray[np.float32]

AUDIO_SUFFIXES = frozenset(
    f".{end}" for end in ("aif", "aiff", "au", "caf", "flac", "mp3", "oga", "ogg", "opus", "wav")
)

#: Zero crossings of the resampling filter on each side, and its Kaiser window: 80 dB of the stop band are suppressed.
_CROSSINGS, _KAISER = 16, 8.0
#: Source samples that are resampled at once.
_CHUNK = 1 << 17


@dataclass(frozen=True)
class Audio:
    """A file on disk; its samples are read when asked for.

    Attributes:
        path: the file.
        sample_rate: of the samples that are given, in Hz.
        channels: number of channels.
        samples: number of samples a channel at that rate.
        file_rate, file_samples: the same of the file itself.
        subtype: how the samples are stored, e.g. ``PCM_16``.
    """

    path: Path
    sample_rate: int
    channels: int
    samples: int
    file_rate: int
    file_samples: int
    subtype: str

    @property
    def seconds(self) -> float:
        """Length in seconds."""
        return self.samples / self.sample_rate

    def read(self, start: int = 0, stop: int | None = None, *, mono: bool = False) -> Samples:
        """Samples start to stop (by default all) as (channels, samples) float32, or (1, samples) of their mean.

        A part is the same as that part of the whole, at any sample rate.

        Raises:
            ValueError: start and stop are not within the file, in this order.
            DataError: the file is damaged or holds values that are not finite.
        """
        stop = self.samples if stop is None else stop
        if not 0 <= start <= stop <= self.samples:
            raise ValueError(f"start and stop must lie in order from 0 to {self.samples}, got {start} and {stop}")
        with _opened(self.path) as file:
            return self._read(file, start, stop, mono)

    def blocks(self, size: int, *, overlap: int = 0, mono: bool = False) -> Iterator[Samples]:
        """The file in blocks (channels, ``size``), each beginning ``size - overlap`` after the one before.

        The last block is shorter where the file ends. Memory does not grow with the length of the file.

        Raises:
            ValueError: size is not above overlap, or overlap is negative.
            DataError: the file is damaged or holds values that are not finite.
        """
        if not 0 <= overlap < size:
            raise ValueError(f"overlap must be from 0 to below size, got {overlap} and {size}")
        with _opened(self.path) as file:
            start = 0
            while True:
                stop = min(start + size, self.samples)
                yield self._read(file, start, stop, mono)
                if stop == self.samples:
                    return
                start += size - overlap

    def _read(self, file: Any, start: int, stop: int, mono: bool) -> Samples:
        if self.sample_rate == self.file_rate:
            return _mixed(_part(file, self.path, start, stop), mono)
        ratio = Fraction(self.sample_rate, self.file_rate)
        step = max(1, int(_CHUNK * ratio))
        taps = _filter(ratio)
        pieces = [np.zeros((1 if mono else self.channels, 0), np.float32)]
        for first in range(start, stop, step):
            last = min(first + step, stop)
            # What reaches into the filter at either end; beyond the file there is silence.
            left, right = _span(ratio, first, last)
            inside = _mixed(_part(file, self.path, max(0, left), min(right, self.file_samples)), mono)
            pieces.append(
                _resampled(
                    np.pad(inside, ((0, 0), (max(0, -left), max(0, right - self.file_samples)))),
                    ratio,
                    taps,
                    left,
                    first,
                    last,
                )
            )
        return np.concatenate(pieces, axis=1)


def is_audio_name(path: str | Path) -> bool:
    """Whether a file is audio by its name, e.g. "speech.WAV"."""
    path = Path(path)
    return path.suffix.lower() in AUDIO_SUFFIXES and not path.name.startswith(".")


def find_audio(folder: str | Path) -> list[Path]:
    """All audio files below a folder, in alphabetical order.

    Raises:
        DataError: the folder does not exist or holds no audio file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder")
    found = sorted(path for path in folder.rglob("*") if is_audio_name(path) and path.is_file())
    if not found:
        raise DataError(f"{folder} holds no audio file ({', '.join(sorted(AUDIO_SUFFIXES))})")
    return found


def read_audio(path: str | Path, *, sample_rate: int | None = None) -> Audio:
    """Open a file and look at its header.

    Args:
        path: the file.
        sample_rate: rate in Hz to resample to when samples are read; by default that of the file.

    Raises:
        ValueError: sample_rate is not positive.
        DataError: the file is missing, empty, damaged or no audio.
        MissingExtra: the package soundfile is not installed.
    """
    path = Path(path)
    if sample_rate is not None and sample_rate < 1:
        raise ValueError(f"sample_rate must be positive, got {sample_rate}")
    with _opened(path) as file:
        if file.frames < 1:
            raise DataError(f"{path} cannot be read: it holds no samples")
        rate = sample_rate or file.samplerate
        return Audio(
            path=path,
            sample_rate=rate,
            channels=file.channels,
            samples=-(-file.frames * rate // file.samplerate),
            file_rate=file.samplerate,
            file_samples=file.frames,
            subtype=file.subtype,
        )


def write_audio(path: str | Path, samples: npt.ArrayLike, sample_rate: int, *, subtype: str | None = None) -> None:
    """Write (samples,) or (channels, samples) from -1 to 1, atomically; louder samples are clipped to integers.

    Args:
        path: .wav, .flac or another suffix that soundfile knows.
        samples: floats.
        sample_rate: in Hz.
        subtype: e.g. ``PCM_24`` or ``FLOAT``; by default 16 bits.

    Raises:
        ValueError: samples have another shape or are not finite.
        DataError: soundfile cannot write this kind of file.
        MissingExtra: the package soundfile is not installed.
    """
    values = np.atleast_2d(np.asarray(samples))
    if values.ndim != 2 or values.dtype.kind != "f":
        raise ValueError(f"samples must be floats (samples,) or (channels, samples), got {values.dtype} {values.shape}")
    write_audio_blocks(path, [values], sample_rate, channels=len(values), subtype=subtype)


def write_audio_blocks(
    path: str | Path,
    blocks: Iterable[npt.NDArray[Any]],
    sample_rate: int,
    *,
    channels: int = 1,
    subtype: str | None = None,
) -> None:
    """Write a sound that comes in blocks (channels, samples), as `write_audio` does, holding one block at a time.

    Raises:
        ValueError: a block is not finite.
        DataError: soundfile cannot write this kind of file.
        MissingExtra: the package soundfile is not installed.
    """
    soundfile: Any = require("soundfile", extra="audio", purpose="writing audio files")
    path = Path(path)
    form = {".aif": "AIFF", ".oga": "OGG", ".opus": "OGG"}.get(path.suffix.lower(), path.suffix[1:].upper())
    try:
        with atomic_path(path) as part:
            try:
                file = soundfile.SoundFile(part, "w", sample_rate, channels, subtype, format=form)
            except (soundfile.LibsndfileError, ValueError, TypeError) as error:
                raise DataError(f"{path} cannot be written: {error}") from None
            with file:
                for block in blocks:
                    if not np.isfinite(block).all():
                        raise ValueError("samples must be finite, got NaN or infinity")
                    file.write(block.T)
    except soundfile.LibsndfileError as error:
        raise DataError(f"{path} cannot be written: {error}") from None


def resample(samples: Samples, old_rate: int, new_rate: int) -> Samples:
    """Change the sample rate of (channels, samples) by a windowed-sinc filter; silence surrounds the signal.

    Raises:
        ValueError: a rate is not positive.
    """
    if min(old_rate, new_rate) < 1:
        raise ValueError(f"sample rates must be positive, got {old_rate} and {new_rate}")
    if old_rate == new_rate:
        return samples
    ratio = Fraction(new_rate, old_rate)
    count = -(-samples.shape[-1] * new_rate // old_rate)
    left, right = _span(ratio, 0, count)
    padded = np.pad(samples, ((0, 0), (-left, max(0, right - samples.shape[-1]))))
    return _resampled(padded, ratio, _filter(ratio), left, 0, count)


# -- reading -----------------------------------------------------------------------------------------------------------


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    soundfile: Any = require("soundfile", extra="audio", purpose="reading audio files")
    if not path.is_file():
        raise DataError(f"{path} cannot be read: there is no such file")
    if os.path.getsize(path) == 0:
        raise DataError(f"{path} cannot be read: the file is empty")
    try:
        file = soundfile.SoundFile(path)
    except (soundfile.LibsndfileError, TypeError) as error:
        reason = str(error).partition(": ")[2] or str(error)
        raise DataError(f"{path} cannot be read: {reason}") from None
    with file:
        yield file


def _part(file: Any, path: Path, start: int, stop: int) -> Samples:
    """Samples of the file itself, (channels, samples)."""
    stop = max(start, stop)
    try:
        if file.tell() != start:
            file.seek(start)
        values: Samples = file.read(stop - start, dtype="float32", always_2d=True).T
    except RuntimeError as error:
        raise DataError(f"{path} is damaged after {start} samples: {error}") from None
    if values.shape[1] < stop - start:
        raise DataError(f"{path} is damaged: it ends after {start + values.shape[1]} of {file.frames} samples")
    if not np.isfinite(values).all():
        place = start + int(np.argmin(np.isfinite(values).all(0)))
        raise DataError(f"{path} holds a value that is not finite, at sample {place}")
    return values


def _mixed(values: Samples, mono: bool) -> Samples:
    return values.mean(0, keepdims=True, dtype=np.float32) if mono else np.ascontiguousarray(values)


# -- resampling --------------------------------------------------------------------------------------------------------


def _half(ratio: Fraction) -> int:
    """Samples of the filter on each side of its middle, at the rate up * old."""
    return _CROSSINGS * max(ratio.numerator, ratio.denominator)


def _filter(ratio: Fraction) -> npt.NDArray[np.float64]:
    from scipy.signal import firwin

    up, down = ratio.numerator, ratio.denominator
    taps: npt.NDArray[np.float64] = firwin(2 * _half(ratio) + 1, 1 / max(up, down), window=("kaiser", _KAISER)) * up
    return taps


def _span(ratio: Fraction, first: int, last: int) -> tuple[int, int]:
    """Samples of the source that new samples first to last depend on; the first one begins a period of the ratio."""
    up, down = ratio.numerator, ratio.denominator
    margin = -(-_half(ratio) // up) + 1
    left = first * down // up - margin
    return left, max(left, (last - 1) * down // up + 1) + margin


def _resampled(
    values: Samples, ratio: Fraction, taps: npt.NDArray[np.float64], left: int, first: int, last: int
) -> Samples:
    """New samples first to last from source samples that begin at ``left``."""
    from scipy.signal import upfirdn

    up, down = ratio.numerator, ratio.denominator
    # New sample n stands at n down of the fine grid, source sample j at j up: start the filter so that it is hit.
    offset = first * down + _half(ratio) - left * up
    lead = -offset % down
    filtered = upfirdn(np.concatenate([np.zeros(lead), taps]), values, up, down, axis=-1)
    begin = (offset + lead) // down
    return filtered[:, begin : begin + last - first].astype(np.float32)
