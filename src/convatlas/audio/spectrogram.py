"""Spectrograms of audio files: block by block, so that recordings of any length fit, and as pictures.

The layers are those of `convatlas.nn.spectrogram`; a block is computed with as much sound on either side as its frames
depend on, which gives the same numbers as the whole file at once.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from convatlas.audio.pictures import spectrogram_picture
from convatlas.data.audio import Audio, read_audio
from convatlas.errors import Unsupported, unknown
from convatlas.files import atomic_path
from convatlas.nn.spectrogram import CQT, MFCC, STFT, VQT, CQT2010v2, Gammatonegram, MelSpectrogram
from convatlas.nn.spectrogram.signals import SpectrogramLayer
from convatlas.training.progress import progress

__all__ = ["KINDS", "make_layer", "save_spectrogram", "spectrogram", "spectrogram_blocks"]

Array = npt.NDArray[Any]

#: Kind of a spectrogram -> its layer.
KINDS: dict[str, Callable[..., SpectrogramLayer]] = {
    "cqt": CQT,
    "cqt2010": CQT2010v2,
    "gammatone": Gammatonegram,
    "mel": MelSpectrogram,
    "mfcc": MFCC,
    "stft": STFT,
    "vqt": VQT,
}
#: Samples of a block, beside its margins.
_BLOCK = 1 << 20
#: Columns of a picture.
_MOST_COLUMNS = 8000


def make_layer(kind: str, sample_rate: float, **options: Any) -> SpectrogramLayer:
    """The layer of a kind of `KINDS` for a sample rate, with magnitudes as output.

    Raises:
        UnknownName: there is no such kind.
        ValueError: an option is out of range.
    """
    if kind not in KINDS:
        raise unknown("kind of spectrogram", kind, KINDS)
    form = {} if kind in ("gammatone", "mel", "mfcc") else {"output_format": "Magnitude"}
    return KINDS[kind](sr=sample_rate, **form, **options)


def spectrogram_blocks(
    audio: Audio, layer: SpectrogramLayer, *, mono: bool = True, block: int = _BLOCK
) -> Iterator[Tensor]:
    """The frames of a file in order, (channels, F, t) a block, in memory that does not grow with its length.

    Args:
        audio: the file; its sample rate must be the one that the layer was made for.
        layer: with centred frames.
        mono: take the mean of the channels.
        block: samples of a block at least.

    Raises:
        Unsupported: the layer needs the whole signal at once.
        DataError: the file is damaged.
    """
    if layer.reach is None or not hasattr(layer, "hop_length"):
        raise Unsupported(f"{type(layer).__name__} does not centre its frames or needs the whole signal at once")
    hop = int(layer.hop_length)  # type: ignore[arg-type]
    step = math.lcm(hop, layer.grid)
    if step != hop and not getattr(layer, "rounded_hop", False):
        raise Unsupported(f"blocks need a hop_length that is a multiple of {layer.grid}, got {hop}")
    margin = -(-(layer.reach + hop) // step) * step
    size = -(-max(block, 2 * margin) // step) * step
    device = next(iter(layer.state_dict().values())).device
    with torch.inference_mode():
        for first in range(0, audio.samples + 1, size):
            start, stop = max(0, first - margin), min(audio.samples, first + size + margin)
            last = stop == audio.samples
            frames = layer(torch.from_numpy(audio.read(start, stop, mono=mono)).to(device))
            lead = (first - start) // hop
            yield frames[:, :, lead:] if last else frames[:, :, lead : lead + size // hop]
            if last:
                return


def spectrogram(
    source: str | Path | Audio, kind: str = "mel", *, sample_rate: int | None = None, mono: bool = True, **options: Any
) -> Tensor:
    """The spectrogram (channels, F, T) of a file of any length.

    Args:
        source: the file.
        kind: one of `KINDS`.
        sample_rate: rate in Hz to resample a file to.
        mono: take the mean of the channels.
        options: of the layer.

    Raises:
        UnknownName: there is no such kind.
        DataError: the file cannot be read.
    """
    audio = source if isinstance(source, Audio) else read_audio(source, sample_rate=sample_rate)
    layer = make_layer(kind, audio.sample_rate, **options)
    # The floor of a cepstrum refers to the loudest frame of the whole.
    local = layer.melspec_layer if isinstance(layer, MFCC) else layer
    whole = torch.cat(list(spectrogram_blocks(audio, local, mono=mono)), dim=2)
    return layer.cepstrum(whole) if isinstance(layer, MFCC) else whole


def save_spectrogram(
    source: str | Path | Audio, path: str | Path, kind: str = "mel", **options: Any
) -> tuple[int, ...]:
    """Write a spectrogram to an .npy file (float32) or a .png picture and return its shape (channels, F, T).

    It is computed and written block by block and never held in memory. A picture shows the first channel; of more than
    8,000 frames each of its columns is the mean of several.

    Args:
        source, kind, options: as `spectrogram` takes them.
        path: .npy or .png.

    Raises:
        ValueError: the file has another suffix.
        UnknownName: there is no such kind.
        DataError: the file cannot be read.
    """
    path = Path(path)
    if path.suffix not in (".npy", ".png"):
        raise ValueError(f"path must end in .npy or .png, got {path.name}")
    rate, mono = options.pop("sample_rate", None), options.pop("mono", True)
    audio = source if isinstance(source, Audio) else read_audio(source, sample_rate=rate)
    layer = make_layer(kind, audio.sample_rate, **options)
    count = 1 + audio.samples // int(layer.hop_length)  # type: ignore[arg-type]
    with atomic_path(path) as part, progress(f"reading {audio.path.name}", -(-audio.samples // _BLOCK)) as advance:
        blocks = _told(_cepstra if isinstance(layer, MFCC) else spectrogram_blocks, audio, layer, mono, advance)
        if path.suffix == ".npy":
            return _save_array(blocks, count, part)
        columns, shape = _columns(blocks, count)
        _save_picture(spectrogram_picture(columns, decibels=kind != "mfcc"), part)
        return shape


def _told(make: Callable[..., Iterator[Tensor]], audio: Audio, layer: Any, mono: bool, advance: Any) -> Iterator[Array]:
    for block in make(audio, layer, mono=mono):
        yield block.cpu().numpy()
        advance()


def _cepstra(audio: Audio, layer: MFCC, *, mono: bool) -> Iterator[Tensor]:
    """Cepstra in blocks; what they are made of waits on disk, as their floor refers to the loudest frame of all."""
    shapes, loudest = [], torch.zeros(())
    with tempfile.TemporaryFile() as file:
        for block in spectrogram_blocks(audio, layer.melspec_layer, mono=mono):
            shapes.append(block.shape)
            loudest = torch.maximum(loudest, block.amax((1, 2), keepdim=True))
            block.cpu().numpy().tofile(file)
        file.seek(0)
        for shape in shapes:
            block = torch.from_numpy(np.fromfile(file, np.float32, shape.numel())).reshape(shape)
            yield layer.cepstrum(block.to(loudest.device), loudest)


def _save_array(blocks: Iterator[Array], count: int, path: Path) -> tuple[int, ...]:
    """Write blocks (C, F, t) of ``count`` frames in all as one array, each row where it belongs."""
    shape: tuple[int, ...] = ()
    done = start = 0
    with open(path, "wb") as file:
        for block in blocks:
            if not shape:
                shape = (*block.shape[:2], count)
                header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                start = file.tell()
            for row, values in enumerate(block.reshape(-1, block.shape[2]).astype("<f4", copy=False)):
                file.seek(start + 4 * (row * count + done))
                file.write(values.tobytes())
            done += block.shape[2]
    return shape


def _columns(blocks: Iterator[Array], count: int) -> tuple[Array, tuple[int, ...]]:
    """The first channel with as many frames as a picture can have columns, and the shape of the whole."""
    each = -(-count // _MOST_COLUMNS)  # frames in a column
    shape: tuple[int, ...] = ()
    done, sums = 0, np.zeros((0, 0))
    for block in blocks:
        if not shape:
            shape, sums = (*block.shape[:2], count), np.zeros((block.shape[1], -(-count // each)))
        places = np.arange(done, done + block.shape[2]) // each
        starts = np.flatnonzero(np.diff(places, prepend=-1))
        sums[:, places[starts]] += np.add.reduceat(block[0].astype(np.float64), starts, axis=1)
        done += block.shape[2]
    return sums / np.bincount(np.arange(count) // each), shape


def _save_picture(pixels: npt.NDArray[np.uint8], path: Path) -> None:
    from PIL import Image

    Image.fromarray(pixels).save(path, format="PNG")
