"""Separating sound while it comes in: from standard input, into WAV files that grow and to standard output."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from convatlas.audio.separation_files import Streamed, source_marks
from convatlas.audio.separation_options import Separating
from convatlas.audio.separation_reports import beginning
from convatlas.data.sound_streams import GrowingWav, PcmStream, encode_pcm, read_wav_header
from convatlas.errors import DataError, Unsupported
from convatlas.networks.conv_tasnet.network import ConvTasNet
from convatlas.report import Cell, Files, Note, Report, Section, Table
from convatlas.training.measure import provenance

__all__ = ["LiveLevel", "separate_standard_input", "separate_stream"]

Samples = npt.NDArray[np.float32]

#: Seconds of the stream that are kept to be shown.
_SHOWN = 8.0


class LiveLevel:
    """Makes sources as loud as their mixture while the end is not known: by the peaks so far.

    The gain of a source is the largest magnitude of the mixture so far over that of the source; within a block it goes
    over to its new value. At the end of a recording it is the gain that the recording as a whole would get.

    Args:
        sources: how many.
    """

    def __init__(self, sources: int) -> None:
        self.loudest = 0.0
        self.peaks = np.zeros(sources, np.float32)
        self.gain = np.ones(sources, np.float32)
        self.begun = False

    def mixture(self, samples: Samples) -> None:
        """Hear the next samples (T,) of the mixture."""
        self.loudest = max(self.loudest, float(np.abs(samples).max(initial=0)))

    def __call__(self, sources: Samples) -> Samples:
        """Scale the next samples (C, T) of the sources."""
        if not sources.shape[1]:
            return sources
        self.peaks = np.maximum(self.peaks, np.abs(sources).max(1))
        gain = np.where(self.peaks > 0, self.loudest / np.maximum(self.peaks, 1e-12), self.gain).astype(np.float32)
        before = self.gain if self.begun else gain
        self.begun = self.begun or bool(self.peaks.max() > 0)
        ramp = np.linspace(0, 1, sources.shape[1] + 1, dtype=np.float32)[1:]
        scaled: Samples = sources * (before[:, None] + (gain - before)[:, None] * ramp)
        self.gain = gain
        return scaled


def separate_standard_input(model: str, network: ConvTasNet, folder: Path, options: Separating) -> Report:
    """Separate what comes from standard input until it ends.

    Raises:
        Unsupported: the network is not causal, or its norm looks ahead.
        DataError: the stream is no sound, or of another sample rate than the network's.
    """
    engine = _engine(model, network)  # before the first byte is waited for
    _check_speaker(network, options)
    if options.raw is None:
        stream = read_wav_header(sys.stdin.buffer)
    else:
        stream = PcmStream(sys.stdin.buffer, options.raw, options.rate or network.sample_rate, options.channels)
    # Standard output itself: what the command prints goes elsewhere meanwhile.
    output: Any = sys.__stdout__.buffer if options.takes_stdout and sys.__stdout__ is not None else None
    return separate_stream(model, network, stream, folder, options, output=output, engine=engine)


def separate_stream(
    model: str,
    network: ConvTasNet,
    stream: PcmStream,
    folder: Path,
    options: Separating,
    *,
    output: BinaryIO | None = None,
    engine: Streamed | None = None,
) -> Report:
    """Separate a stream block by block; each block goes out before the next one is waited for.

    Args:
        model: name of the network.
        network: in evaluation mode.
        stream: what comes in.
        folder: where a WAV file for each source grows.
        options: level, block and speaker; ``consistent`` is not known before the end and taken as ``peak``.
        output: where the samples of ``options.speaker`` go.
        engine: what the network has begun already.

    Raises:
        Unsupported: the network is not causal, or its norm looks ahead.
        DataError: the stream has another sample rate than the network, no samples, or a value that is not finite.
    """
    engine = engine or _engine(model, network)
    _check_speaker(network, options)
    if stream.sample_rate != network.sample_rate:
        raise DataError(
            f"the stream is {stream.sample_rate} Hz, the model expects {network.sample_rate} Hz: resample it before, "
            f"e.g. by ffmpeg -ar {network.sample_rate}"
        )
    weight, level = next(network.parameters()), LiveLevel(network.num_sources)
    names = [f"live_{mark}.wav" for mark in source_marks(network.num_sources)]
    count, slowest, busy = 0, 0.0, 0.0
    heads: list[Samples] = [np.zeros((1, 0), np.float32), np.zeros((network.num_sources, 0), np.float32)]
    most = round(_SHOWN * network.sample_rate)
    with ExitStack() as stack:
        files = [stack.enter_context(GrowingWav(folder / name, network.sample_rate)) for name in names]

        def keep(place: int, samples: Samples) -> None:
            if room := most - heads[place].shape[1]:
                heads[place] = np.concatenate([heads[place], samples[:, :room]], 1)

        def give(sources: Samples) -> None:
            scaled = sources if options.level == "none" else level(sources)
            for file, samples in zip(files, scaled, strict=True):
                file.add(samples)
            keep(1, scaled)
            if output is not None and options.speaker is not None:
                output.write(encode_pcm(scaled[options.speaker - 1], options.output))
                output.flush()

        with torch.inference_mode():
            try:
                for block in stream.blocks(options.block):
                    started = time.perf_counter()
                    level.mixture(block)
                    keep(0, block[None])
                    x = torch.from_numpy(block)[None].to(weight.device, weight.dtype)
                    give(engine.push(x)[0].float().cpu().numpy())
                    took = time.perf_counter() - started
                    count, slowest, busy = count + len(block), max(slowest, took), busy + took
            except KeyboardInterrupt:  # how a listener ends what has no end of its own
                pass
            if count < network.config.kernel_size:
                raise DataError(
                    f"the stream has {count} samples, the network needs {network.config.kernel_size} at least"
                )
            give(engine.finish()[0].float().cpu().numpy())
    seconds = count / network.sample_rate
    rows: list[list[Cell]] = [["sound [s]", seconds], ["computing [s]", busy], ["real-time factor", busy / seconds]]
    rows += [["block [ms]", 1000 * options.block / network.sample_rate], ["slowest block [ms]", 1000 * slowest]]
    rows += [["delay of the network [ms]", 1000 * network.latency / network.sample_rate]]
    sections = [
        Section("Time", [Table("The stream", ["", "value"], rows), Note(_ADVICE)]),
        Section("Pictures and sounds", beginning("The beginning", np.concatenate(heads), network.sample_rate)),
        Section("Files", [Files("In this folder", {name: name for name in names})]),
    ]
    return Report(
        f"Live separation by {model}", f"{model} separated {seconds:.1f} s as they came.", sections, provenance()
    )


_ADVICE = (
    "The real-time factor is seconds of computing for a second of sound: below 1 the network keeps up. A sample goes "
    "out after the rest of its block has come and the delay of the network has passed."
)


def _engine(model: str, network: ConvTasNet) -> Streamed:
    try:
        return Streamed(network)
    except Unsupported as error:
        raise Unsupported(
            f"{model} cannot separate a stream: {error}; train a causal one, e.g. conv_tasnet_causal, or give files"
        ) from None


def _check_speaker(network: ConvTasNet, options: Separating) -> None:
    if options.speaker is not None and options.speaker > network.num_sources:
        raise ValueError(f"speaker must be from 1 to {network.num_sources}, got {options.speaker}")
