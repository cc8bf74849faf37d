"""Pictures whose class is their colour, and a network small enough to learn it in seconds."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from convatlas.training.settings import Training

CLASSES = ("cat", "dog", "hen")
TINY: dict[str, Any] = {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8], "layer_scale_init": None, "drop_path": 0.0}
SHORT: dict[str, Any] = {"epochs": 2, "batch_size": 8, "warmup_epochs": 0, "lr": 0.01}


def short(**settings: Any) -> Training:
    return Training(**{**SHORT, **settings})


def pixels(label: int, seed: int, size: tuple[int, int] = (36, 40)) -> npt.NDArray[np.uint8]:
    """An RGB picture (H, W, 3) of noise in which the channel ``label`` is bright."""
    image = np.random.default_rng(seed).integers(0, 110, (*size, 3))
    image[..., label % 3] += 140
    return image.astype(np.uint8)


def write_pictures(folder: Path, count: int = 12, classes: Sequence[str] = CLASSES, seed: int = 0) -> Path:
    """A folder of classes with ``count`` PNG files each."""
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            Image.fromarray(pixels(label, seed + 100 * label + number)).save(folder / name / f"{number:02}.png")
    return folder


def arrays(count: int, channels: int = 3, seed: int = 0) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Images (N, 36, 40, channels) and labels (N) of three classes."""
    labels = np.arange(count) % 3
    images = np.stack([pixels(label, seed + row) for row, label in enumerate(labels)])
    return np.concatenate([images] * 4, axis=3)[..., :channels], labels


def write_idx(folder: Path, split: str, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]) -> None:
    """A pair of MNIST-format files, compressed."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, array in (("images-idx3", images), ("labels-idx1", labels.astype(np.uint8))):
        header = bytes([0, 0, 8, array.ndim]) + b"".join(int(size).to_bytes(4, "big") for size in array.shape)
        with gzip.open(folder / f"{split}-{kind}-ubyte.gz", "wb") as file:
            file.write(header + array.tobytes())
