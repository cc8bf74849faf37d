"""Separating a user's recordings, of any length in bounded memory, and writing the sources."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from convatlas.audio.separation_options import Separating
from convatlas.data.audio import Audio, find_audio, read_audio, write_audio_blocks
from convatlas.data.images import Skipped
from convatlas.errors import DataError, Unsupported
from convatlas.files import free_name
from convatlas.networks.conv_tasnet.network import ConvTasNet
from convatlas.ops.chunked_separation import ChunkedSeparation
from convatlas.training.progress import progress

__all__ = ["Engine", "SeparatedFile", "Streamed", "separate_files", "source_marks"]

Samples = npt.NDArray[np.float32]

#: Seconds of each file that are kept to be shown.
_SHOWN = 8.0
#: Recordings with a lower peak are made louder for the network, to the second value: the norms of a network add 1e-8 to
#: variances, which is much for whispers.
_QUIET, _LIFTED = 0.01, 0.1
#: Samples that are scaled and written at once.
_WRITTEN = 1 << 18


class Engine(Protocol):
    """Takes samples (1, n) and gives the sources' samples (1, C, m) that are done."""

    def push(self, x: Tensor) -> Tensor:
        """Take the next samples."""

    def finish(self) -> Tensor:
        """What is left when the recording has ended."""


class Streamed:
    """A causal network as an engine: what it gives is what it would give for the whole at once.

    Raises:
        Unsupported: the network is not causal, or a norm looks ahead.
    """

    def __init__(self, network: ConvTasNet) -> None:
        self.network, self.state = network, network.initial_state()

    def push(self, x: Tensor) -> Tensor:
        """Take the next samples (1, n) and give those of the sources that are done, (1, C, m)."""
        y, self.state = self.network.step(x, self.state)
        return y

    def finish(self) -> Tensor:
        """The samples (1, C, m) that are left."""
        return self.network.finish(self.state)


class _Whole:
    """Waits for the end."""

    def __init__(self, network: ConvTasNet) -> None:
        self.network = network
        self.parts: list[Tensor] = []

    def push(self, x: Tensor) -> Tensor:
        self.parts.append(x)
        return x.new_zeros(1, self.network.num_sources, 0)

    def finish(self) -> Tensor:
        y: Tensor = self.network(torch.cat(self.parts, 1))
        return y


@dataclass(frozen=True, eq=False)
class SeparatedFile:
    """A recording that was separated.

    Attributes:
        name: of the input, as given or relative to a folder that was given.
        paths: of the results, relative to the output folder.
        length: in seconds.
        note: what was done to the input, e.g. resampled; "" for nothing.
        how: ``whole``, ``in chunks`` or ``as a stream``.
        seconds: from reading to writing.
        gains: by what each source was multiplied.
        shown: the beginning of the recording and of the sources, (1 + C, T) float32.
    """

    name: str
    paths: tuple[str, ...]
    length: float
    note: str
    how: str
    seconds: float
    gains: tuple[float, ...]
    shown: Samples


def source_marks(count: int) -> list[str]:
    """What stands behind the name of a recording for each of its sources."""
    return ["speech"] if count == 1 else [f"speaker{number}" for number in range(1, count + 1)]


def separate_files(
    network: ConvTasNet, inputs: Sequence[str | Path], folder: Path, options: Separating
) -> tuple[list[SeparatedFile], list[Skipped]]:
    """Separate audio files and all in folders.

    Returns:
        What was written, and what was left out with the reasons.

    Raises:
        DataError: an input does not exist, or nothing can be separated.
        OSError: a file cannot be written.
    """
    found: list[tuple[Path, str]] = []
    for given in map(Path, inputs):
        if given.is_dir():
            found += [(path, path.relative_to(given).as_posix()) for path in find_audio(given)]
        elif given.exists():
            found.append((given, str(given)))
        else:
            raise DataError(f"{given} does not exist; expected a recording or a folder of them")
    done: list[SeparatedFile] = []
    skipped: list[Skipped] = []
    taken: set[str] = set()
    for path, name in found:
        try:
            audio = read_audio(path, sample_rate=network.sample_rate)
            done.append(_separate_file(network, audio, name, folder, options, taken))
        except DataError as error:
            skipped.append(Skipped(name, str(error).removeprefix(f"{path} ").removeprefix("cannot be read: ")))
    if not done:
        raise DataError(f"{skipped[0].path} cannot be separated: {skipped[0].reason}")
    return done, skipped


def _separate_file(
    network: ConvTasNet, audio: Audio, name: str, folder: Path, options: Separating, taken: set[str]
) -> SeparatedFile:
    started = time.perf_counter()
    rate = network.sample_rate
    if audio.samples < network.config.kernel_size:
        raise DataError(f"{audio.path} is shorter than a frame of the network, {network.config.kernel_size} samples")
    peak = max(float(np.abs(block).max()) for block in read_audio(audio.path).blocks(_WRITTEN, mono=True))
    if peak == 0:
        raise DataError(f"{audio.path} is silent")
    lift = np.float32(_LIFTED / peak if peak < _QUIET else 1)
    note = _note(audio, name)
    chunk = max(2, 2 * round(options.chunk * rate / 2))
    engine, how = _engine(network, audio.samples, chunk)
    weight = next(network.parameters())
    meter = _Meter(network.num_sources)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        kept = [stack.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in range(network.num_sources)]

        def keep(y: Tensor) -> None:
            if y.shape[1]:
                for file, samples in zip(kept, meter.heard((y[0].float() / float(lift)).cpu().numpy()), strict=True):
                    file.write(samples.tobytes())

        with torch.inference_mode(), progress(name, -(-audio.samples // chunk)) as advance:
            for block in audio.blocks(chunk, mono=True):
                meter.mixture(block[0])
                keep(engine.push(torch.from_numpy(lift * block).to(weight.device, weight.dtype)))
                advance()
            keep(engine.finish())
        gains = meter.gains(options.level)
        written, heads = [], [audio.read(0, min(audio.samples, round(_SHOWN * rate)), mono=True)[0]]
        for mark, file, gain in zip(source_marks(len(kept)), kept, gains, strict=True):
            written.append(free_name(name, mark, ".wav", taken))
            subtype = "FLOAT" if options.floats else "PCM_16"
            write_audio_blocks(folder / written[-1], _scaled(file, gain), rate, subtype=subtype)
            file.seek(0)
            heads.append(np.float32(gain) * np.frombuffer(file.read(4 * len(heads[0])), np.float32))
    seconds = time.perf_counter() - started
    return SeparatedFile(name, tuple(written), audio.seconds, note, how, seconds, tuple(gains), np.stack(heads))


def _note(audio: Audio, name: str) -> str:
    told = []
    if audio.file_rate != audio.sample_rate:
        told.append(f"file is {audio.file_rate} Hz, model expects {audio.sample_rate} Hz: resampled")
    if audio.channels > 1:
        told.append(f"file has {audio.channels} channels: their mean is taken")
    for each in told:
        logging.getLogger(__name__).warning("%s: %s", name, each)
    return "; ".join(told)


def _engine(network: ConvTasNet, samples: int, chunk: int) -> tuple[Engine, str]:
    if samples <= chunk:
        return _Whole(network), "whole"
    if network.config.causal:
        try:
            return Streamed(network), "as a stream"
        except Unsupported:
            pass  # its norm needs the whole
    return ChunkedSeparation(network, window_size=chunk), "in chunks"


class _Meter:
    """Peaks and products of a mixture and its sources, which come in blocks, for the gains of the sources."""

    def __init__(self, sources: int) -> None:
        self.loudest = 0.0
        self.peaks = np.zeros(sources)
        self.gram, self.against = np.zeros((sources, sources)), np.zeros(sources)
        self.waiting: Samples = np.zeros(0, np.float32)

    def mixture(self, samples: Samples) -> None:
        """Hear the next samples (T,) of the mixture."""
        self.loudest = max(self.loudest, float(np.abs(samples).max(initial=0)))
        self.waiting = np.concatenate([self.waiting, samples])

    def heard(self, sources: Samples) -> Samples:
        """Hear the next samples (C, T) of the sources, which come later, and give them back."""
        count = sources.shape[1]
        if count:
            mixture, self.waiting = self.waiting[:count].astype(np.float64), self.waiting[count:]
            exact = sources.astype(np.float64)
            self.peaks = np.maximum(self.peaks, np.abs(exact).max(1))
            self.gram += exact @ exact.T
            self.against += exact @ mixture
        return sources

    def gains(self, level: str) -> list[float]:
        """By what to multiply each source."""
        if level == "none":
            return [1.0] * len(self.peaks)
        if level == "peak":
            return [self.loudest / peak if peak > 0 else 1.0 for peak in self.peaks]
        gains = np.linalg.pinv(self.gram, hermitian=True) @ self.against
        most = float(np.abs(gains * self.peaks).max())
        return [float(gain) for gain in gains / max(1.0, most)]


def _scaled(file: Any, gain: float) -> Iterator[Samples]:
    file.seek(0)
    while data := file.read(4 * _WRITTEN):
        yield np.float32(gain) * np.frombuffer(data, np.float32)[None]
