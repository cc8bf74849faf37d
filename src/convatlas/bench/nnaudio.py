"""Spectrogram layers beside nnAudio, or the convolutions that it consists of, and beside `torch.stft` and librosa."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.bench.ratio import Bar, Call, Case, compare, forward, report
from convatlas.nn import spectrogram
from convatlas.ops.framing import pad_ends
from convatlas.report import Report

__all__ = ["run"]

CONVOLUTION, TORCH, LIBROSA = "convolution", "torch.stft", "librosa"
_PUBLISHED = "arXiv 1912.12055, table: 1,770 clips in 0.001 s (STFT), 0.015 s (Mel), 0.258 s (CQT) on a V100"

# Fixed before anything was measured. The side "convolution" is nnAudio itself where it is installed, else its
# convolutions written with torch.
BARS = [
    *(
        Bar(
            statement=f"{kind} is at least five times as fast as nnAudio's convolutions, at equal output",
            published=_PUBLISHED,
            theirs=CONVOLUTION,
            at_least=5.0,
            what=kind,
        )
        for kind in ("STFT", "MelSpectrogram", "CQT2010v2", "VQT")
    ),
    *(
        Bar(
            statement=f"{kind} is not slower than by torch.stft",
            published="no figure",
            theirs=TORCH,
            at_least=1.0,
            what=kind,
        )
        for kind in ("STFT", "MelSpectrogram")
    ),
]

#: Clips, seconds and sample rate.
CLIPS = (8, 5.0, 22050)
#: Arguments of each layer.
LAYERS: dict[str, dict[str, Any]] = {
    "STFT": {"n_fft": 2048, "hop_length": 512, "output_format": "Magnitude"},
    "MelSpectrogram": {"n_fft": 2048, "hop_length": 512},
    "CQT1992v2": {"hop_length": 512, "n_bins": 84},
    "CQT2010v2": {"hop_length": 512, "n_bins": 84},
    "VQT": {"hop_length": 512, "n_bins": 84, "gamma": 5},
}
_MULTIRATE = ("CQT2010v2", "VQT")


def run(*, threads: Sequence[int] | None = None, quick: bool = False) -> Report:
    """Ratios of time and memory, on random signals.

    Args:
        threads: numbers of threads to measure with; by default 1 and 2.
        quick: fewer clips.
    """
    clips, seconds, rate = CLIPS
    clips = max(1, clips // 4) if quick else clips
    cases = [
        Case(
            f"{clips} x {seconds:g} s at {rate:,} Hz",
            kind,
            partial(_sides, kind, clips, int(seconds * rate), rate),
            tolerance=1e-4,
        )
        for kind in LAYERS
    ]
    note = "The side 'convolution' is " + ("nnAudio itself." if _reference() else "nnAudio's convolutions in torch.")
    return report("nnaudio", compare(cases, threads=threads, quick=quick), BARS, note, quick=quick)


def _sides(kind: str, clips: int, length: int, rate: int, device: torch.device) -> dict[str, Call]:
    x = torch.randn(clips, length, device=device) * 0.1
    sr = {} if kind == "STFT" else {"sr": rate}
    # The authors' scale after an early decimation, so that all sides give the same.
    legacy = {"legacy_downsample": True} if kind in _MULTIRATE else {}
    ours = getattr(spectrogram, kind)(**LAYERS[kind], **sr, **legacy).to(device)
    sides = {"convatlas": forward(ours, x), CONVOLUTION: forward(_convolution(kind, ours, sr, device), x)}
    if kind in ("STFT", "MelSpectrogram"):
        sides[TORCH] = forward(partial(_by_torch, layer=ours), x)
    if kind in ("STFT", "MelSpectrogram") and device.type == "cpu" and importlib.util.find_spec("librosa"):
        sides[LIBROSA] = partial(_by_librosa, x.numpy(), kind, rate)
    return sides


def _reference() -> Any:
    return importlib.util.find_spec("nnAudio") and importlib.import_module("nnAudio.features")


def _convolution(kind: str, ours: Any, sr: dict[str, Any], device: torch.device) -> Callable[[Tensor], Tensor]:
    if features := _reference():
        with contextlib.redirect_stdout(io.StringIO()):
            return getattr(features, kind)(**LAYERS[kind], **sr, verbose=False).to(device)
    if kind == "STFT":
        return partial(_convolved, layer=ours)
    if kind == "MelSpectrogram":
        return lambda x: torch.matmul(ours.mel_basis, _convolved(x, ours.stft) ** 2)
    if kind == "CQT1992v2":
        return partial(_one_rate, layer=ours)
    return partial(_octaves, layer=ours)


def _convolved(x: Tensor, layer: Any) -> Tensor:
    x = pad_ends(x, layer.n_fft // 2).unsqueeze(1)
    parts = (F.conv1d(x, kernels, stride=layer.hop_length) for kernels in (layer.wcos, layer.wsin))
    return sum((part.square() for part in parts), start=x.new_zeros(())).sqrt()


def _one_rate(x: Tensor, layer: Any) -> Tensor:
    real, imag = layer.cqt_kernels_real, layer.cqt_kernels_imag
    x = pad_ends(x, real.shape[-1] // 2).unsqueeze(1)
    power = F.conv1d(x, real, stride=layer.hop_length) ** 2 + F.conv1d(x, imag, stride=layer.hop_length) ** 2
    return power.sqrt() * layer.lengths.sqrt()[:, None]


def _octaves(x: Tensor, layer: Any) -> Tensor:
    """Octave by octave, each by convolutions."""
    found, hop = [], layer.hop_length // layer.downsample_factor
    x = x.unsqueeze(1)
    if layer.early_downsample_filter is not None:
        x = F.conv1d(x, layer.early_downsample_filter, stride=layer.downsample_factor, padding=127)
    for number in range(layer.bins.octaves):
        if number:
            x, hop = F.conv1d(x, layer.lowpass_filter, stride=2, padding=127), hop // 2
        ending = f"_{number}" if hasattr(layer, "cqt_kernels_real_0") else ""
        real, imag = (getattr(layer, f"cqt_kernels_{part}{ending}") for part in ("real", "imag"))
        padded = pad_ends(x.squeeze(1), real.shape[-1] // 2).unsqueeze(1)
        found.append((F.conv1d(padded, real, stride=hop) ** 2 + F.conv1d(padded, imag, stride=hop) ** 2).sqrt())
    whole = torch.cat(found[::-1], dim=1)[:, -layer.bins.n_bins :] * layer.gain("librosa")
    return whole * layer.lengths.sqrt()[:, None]


def _by_torch(x: Tensor, layer: Any) -> Tensor:
    stft = getattr(layer, "stft", layer)
    taper = stft.window_mask[0, :, 0]
    values = torch.stft(x, stft.n_fft, stft.hop_length, window=taper, return_complex=True).abs()
    return values if stft is layer else torch.matmul(layer.mel_basis, values**2)


def _by_librosa(x: Any, kind: str, rate: int) -> Tensor:
    librosa = importlib.import_module("librosa")
    if kind == "STFT":
        return torch.from_numpy(abs(librosa.stft(x, n_fft=2048, hop_length=512, pad_mode="reflect")))
    values = librosa.feature.melspectrogram(y=x, sr=rate, n_fft=2048, hop_length=512, pad_mode="reflect")
    return torch.from_numpy(values)
