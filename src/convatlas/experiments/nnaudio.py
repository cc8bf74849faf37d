"""Do spectrogram layers give the numbers of the transforms, by any way, and does it pay to train their kernels?

Cheuk, Anderson, Agres, Herremans: "nnAudio: An on-the-fly GPU Audio to Spectrogram Conversion Toolbox Using 1D
Convolution Neural Networks", IEEE Access 2020, arXiv 1912.12055. It claims the spectrograms of librosa, one hundred
times faster on a GPU and more, and that trained kernels beat fixed ones.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.data.audio import find_audio, read_audio
from convatlas.experiments.small_training import device, finished, progress
from convatlas.nn.spectrogram import STFT, CQT1992v2, CQT2010v2, MelSpectrogram
from convatlas.ops.filter_banks import decibels
from convatlas.report import Cell, Claim, Heatmap, Lines, Note, Report, Section, Table
from convatlas.training.task import seed_everything

__all__ = ["full", "quick", "run"]

# Thresholds, fixed before anything was measured.

#: Largest difference of two ways to the same numbers in float32, over the largest value.
SAME = 1e-5
#: The same for a constant-Q transform octave by octave, whose low-pass filters are not perfect, away from the ends.
SAME_BY_OCTAVES = 2e-3
#: Points of accuracy that trained kernels must gain.
GAIN = 5.0
#: Accuracy in % of the better layer below which nothing has been learned.
LEARNED = 40.0

SEEDS = (0, 1, 2)
CLIPS, SECONDS, RATE = 8, 5.0, 22050

#: Of the tones: sample rate, samples, classes, the lowest pitch and the distance of pitches in Hz, noise.
TONE_RATE, TONE_LENGTH, CLASSES, LOWEST, DISTANCE, NOISE = 8000, 1024, 10, 400.0, 12.0, 0.7
#: Of the layer that classifies them: samples of a frame, bins from 100 to 3,000 Hz.
FRAME, BINS = 256, 12
BATCH, STEPS, LR, TESTED = 64, 300, 3e-3, 1000


def run(
    budget: Literal["quick", "full"], *, data: str | Path | None = None, folder: str | Path | None = None
) -> Report:
    """Test the claims of the paper.

    Args:
        budget: "quick" compares the ways to compute on synthetic music and trains kernels on tones; "full" also times
            the layers on recordings, e.g. those of MAPS.
        data: for "full": a folder with audio files.
        folder: not used.

    Raises:
        ValueError: the budget is unknown, or "full" lacks data.
    """
    if budget == "quick":
        return quick()
    if budget != "full":
        raise ValueError(f"budget must be 'quick' or 'full', got {budget!r}")
    if data is None:
        raise ValueError("budget 'full' needs data, got None")
    return full(data)


def quick() -> Report:
    """Agreement of the ways to compute, and trained against fixed kernels."""
    with progress(1 + 2 * len(SEEDS)) as advance:
        sections = [_parity_section(_music(CLIPS, SECONDS, RATE)), _training_section(advance)]
        advance("agreement")
    return finished("nnAudio: quick test of its claims", sections)


def full(data: str | Path) -> Report:
    """The quick test, and the layers on every recording below a folder."""
    with progress(1 + 2 * len(SEEDS)) as advance:
        sections = [_parity_section(_music(CLIPS, SECONDS, RATE)), _training_section(advance), _timed_section(data)]
        advance("recordings")
    return finished("nnAudio: full test of its claims", sections, data=str(data))


# -- agreement ---------------------------------------------------------------------------------------------------------


def _music(clips: int, seconds: float, rate: int) -> Tensor:
    """Chords with harmonics below a rising chirp, (clips, samples)."""
    random = np.random.default_rng(0)
    t = np.arange(int(seconds * rate)) / rate
    sounds = []
    for _ in range(clips):
        root = 55 * 2 ** (random.integers(0, 36) / 12)
        x = 0.2 * np.sin(2 * np.pi * (200 * t + (random.uniform(500, 3000) / seconds) * t**2 / 2))
        for step in (0, 4, 7):
            for harmonic in range(1, 6):
                f = root * 2 ** (step / 12) * harmonic
                x += 0.3 / harmonic * np.sin(2 * np.pi * f * t + random.uniform(0, 6)) * np.exp(-harmonic * t / 3)
        sounds.append(x / np.abs(x).max())
    return torch.from_numpy(np.stack(sounds)).float()


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def _parity_section(x: Tensor) -> Section:
    with torch.inference_mode():
        values = {
            "STFT": _difference(*(STFT(output_format="Complex", backend=way)(x) for way in ("fft", "conv"))),
            "Mel": _difference(*(MelSpectrogram(sr=RATE, backend=way)(x) for way in ("fft", "conv"))),
        }
        stft = STFT(output_format="Complex")(x[:1])[0]
        exact = _difference(stft.double(), _direct(x[0], stft.shape[1]))
        options: dict[str, Any] = {"sr": RATE, "hop_length": 512, "n_bins": 84}
        whole, octaves = CQT1992v2(**options)(x), CQT2010v2(**options)(x)
        inside = slice(whole.shape[-1] // 4, -(whole.shape[-1] // 4))
        by_octaves = _difference(octaves[..., inside], whole[..., inside])
    rows: list[list[Cell]] = [[f"{name} by convolution and by FFT", value] for name, value in values.items()]
    rows += [["STFT and a direct sum in float64", exact], ["CQT by octaves and at once", by_octaves]]
    claims = [
        Claim.judge(
            "Convolution with fixed kernels and the Fourier transform give the same spectrograms",
            published="convolution with Fourier kernels replaces the transform",
            statistic="largest difference over the largest value, in float32",
            value=max(values.values()),
            at_most=SAME,
            seeds=0,
        ),
        Claim.judge(
            "The layer gives the short-time Fourier transform",
            published="the spectrograms of librosa",
            statistic="largest difference from the sum of the definition in float64, over the largest value",
            value=exact,
            at_most=SAME,
            seeds=0,
        ),
        Claim.judge(
            "A constant-Q transform octave by octave gives that with one kernel for each bin",
            published="CQT2010 and CQT1992 as two ways to one transform",
            statistic="largest difference over the largest value, in the middle half of the clips",
            value=by_octaves,
            at_most=SAME_BY_OCTAVES,
            seeds=0,
        ),
    ]
    shown = decibels(MelSpectrogram(sr=RATE, n_mels=32, hop_length=4096)(x[:1]), top_db=60)[0]
    shown = shown - shown.min()
    picture = Heatmap(
        "Mel spectrogram of one clip",
        shown.flip(0).numpy(),
        [str(band) for band in reversed(range(shown.shape[0]))],
        [str(frame) for frame in range(shown.shape[1])],
        "frame",
        "band",
        annotate=False,
    )
    table = Table("Relative differences", ["ways", "difference"], rows)
    note = Note(
        "The low-pass filters have an even length: each decimation moves the signal by half a sample of its rate."
    )
    return Section("Agreement", [*claims, table, picture, note])


def _direct(x: Tensor, count: int, size: int = 2048, hop: int = 512) -> Tensor:
    """The transform by its definition, (bins, frames, 2) float64."""
    padded = np.pad(x.double().numpy(), size // 2, mode="reflect")
    n, k = np.arange(size), np.arange(size // 2 + 1)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * n / size)
    frames = np.stack([padded[t * hop : t * hop + size] * window for t in range(count)], axis=1)
    # Whole turns are taken off exactly, as integers.
    values = np.exp(-2j * np.pi * (np.outer(k, n) % size) / size) @ frames
    return torch.view_as_real(torch.from_numpy(values))


# -- trained kernels ---------------------------------------------------------------------------------------------------


def _tones(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy tones of close pitches (count, samples) and their classes."""
    labels = torch.randint(CLASSES, (count,), generator=generator)
    phase = 2 * math.pi * torch.rand(count, 1, generator=generator)
    loudness = 0.5 + torch.rand(count, 1, generator=generator)
    t = torch.arange(TONE_LENGTH) / TONE_RATE
    tone = loudness * (2 * math.pi * (LOWEST + DISTANCE * labels[:, None]) * t + phase).sin()
    return tone + NOISE * torch.randn(count, TONE_LENGTH, generator=generator), labels


class _Classifier(nn.Module):
    """A small STFT over a logarithmic scale, the mean over time, one linear layer."""

    def __init__(self, trainable: bool) -> None:
        super().__init__()
        self.stft = STFT(
            FRAME,
            freq_bins=BINS,
            hop_length=FRAME // 2,
            freq_scale="log",
            center=False,
            fmin=100,
            fmax=3000,
            sr=TONE_RATE,
            trainable=trainable,
            output_format="Magnitude",
        )
        self.norm = nn.BatchNorm1d(BINS)
        self.head = nn.Linear(BINS, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.stft(x).mean(-1).log1p()))


def _accuracy(trainable: bool, seed: int) -> tuple[float, list[float]]:
    seed_everything(seed)
    generator = torch.Generator().manual_seed(seed)
    model = _Classifier(trainable)
    optimizer = torch.optim.Adam(model.parameters(), LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    losses = []
    for _ in range(STEPS):
        x, labels = _tones(BATCH, generator)
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    x, labels = _tones(TESTED, torch.Generator().manual_seed(10_000 + seed))
    with torch.inference_mode():
        return 100 * float((model.eval()(x).argmax(1) == labels).float().mean()), losses


def _training_section(advance: Callable[..., None]) -> Section:
    results: dict[str, list[float]] = {"fixed kernels": [], "trained kernels": []}
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for seed in SEEDS:
        for name in results:
            accuracy, losses = _accuracy(name.startswith("trained"), seed)
            results[name].append(accuracy)
            if seed == SEEDS[0]:
                curves[name] = (list(range(len(losses))), losses)
            advance(f"tones, {name}")
    fixed, trained = results.values()
    claim = Claim.judge(
        "Trained kernels tell close pitches apart better than fixed ones",
        published="kernels can be trained with the network, to its advantage",
        statistic="accuracy on new tones with trained kernels less that with fixed ones",
        value=[a - b for a, b in zip(trained, fixed, strict=True)],
        at_least=GAIN,
        seeds=len(SEEDS),
        scale_ok=max(sum(trained), sum(fixed)) / len(SEEDS) >= LEARNED,
        unit="points",
    )
    rows: list[list[Cell]] = [[name, *values] for name, values in results.items()]
    columns = ["STFT", *(f"seed {seed} [%]" for seed in SEEDS)]
    caption = f"{CLASSES} pitches, {DISTANCE:g} Hz apart, in noise; a linear layer on {BINS} bins from 100 to 3,000 Hz."
    table = Table("Accuracy on new tones", columns, rows, caption)
    return Section("Trained kernels", [claim, table, Lines("Training loss", "step", "cross-entropy", curves)])


# -- recordings --------------------------------------------------------------------------------------------------------


def _timed_section(data: str | Path, rate: int = 44100) -> Section:
    """Each layer on each recording, on the GPU if there is one; times end when the device is done."""
    place, paths = device(), find_audio(data)
    options: dict[str, Any] = {"hop_length": 512}
    layers: dict[str, nn.Module] = {
        "STFT": STFT(2048, **options, output_format="Magnitude"),
        "Mel": MelSpectrogram(sr=rate, n_fft=2048, **options),
        "CQT1992v2": CQT1992v2(sr=rate, n_bins=84, **options),
        "CQT2010v2": CQT2010v2(sr=rate, n_bins=84, **options),
    }
    forms = {"convolution": STFT(2048, **options, output_format="Magnitude", backend="conv").to(place)}
    everything = {name: layer.to(place) for name, layer in layers.items()} | forms
    seconds = dict.fromkeys(everything, 0.0)
    length = 0.0
    with torch.inference_mode():
        for index, path in enumerate(paths):
            audio = read_audio(path, sample_rate=rate)
            x = torch.from_numpy(audio.read(mono=True)).to(place)
            length += audio.seconds
            for name, layer in everything.items():
                if index == 0:
                    layer(x)
                _wait(place)
                begin = time.perf_counter()
                layer(x)
                _wait(place)
                seconds[name] += time.perf_counter() - begin
    claim = Claim.judge(
        "The STFT with fixed kernels is faster by FFT than by convolution",
        published="0.001 s for 1,770 recordings by convolution on a V100, 10.64 s by librosa",
        statistic="seconds of all recordings by convolution over those by FFT",
        value=seconds["convolution"] / seconds["STFT"],
        at_least=1.0,
        seeds=0,
        unit="times",
    )
    rows: list[list[Cell]] = [[name, 1000 * value / len(paths), length / value] for name, value in seconds.items()]
    table = Table("Time", ["layer", "time of a recording [ms]", "seconds of sound in a second"], rows, f"On {place}.")
    return Section("Recordings", [claim, table, Note(f"{len(paths)} recordings, {length:,.0f} s at {rate:,} Hz.")])


def _wait(place: torch.device) -> None:
    if place.type == "cuda":
        torch.cuda.synchronize()
