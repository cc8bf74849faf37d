"""Training patches: images of low and high resolution as a network sees them, cut into a grid of small squares."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from convatlas.data.image_pairs import Sample
from convatlas.restoration.protocol import Protocol, as_tensor

__all__ = ["LearningPair", "PatchSet", "Shelf", "WholeSet", "learning_pair"]

Array = npt.NDArray[Any]

#: Bytes that the images of a training may take in memory; beyond, they lie in a temporary file.
_IN_MEMORY = 2**30


@dataclass(frozen=True, eq=False)
class LearningPair:
    """An image as a network sees it: luma in float32, or RGB as stored.

    Attributes:
        low: (frames * C, H, W).
        high: (C, scale H, scale W).
    """

    low: Array
    high: Array


def learning_pair(sample: Sample, protocol: Protocol, *, scale: int, channels: int) -> LearningPair:
    """Cut a sample to whole blocks, shrink it where no low resolution is given, and convert it for a network.

    Args:
        sample: the image, or the frames.
        protocol: what low resolution is, and which luma.
        scale: of the network.
        channels: 1 for luma, 3 for RGB.

    Raises:
        ValueError: the sample holds luma only and the network is for RGB, or the image is smaller than a block.
    """
    if sample.luma and channels != 1:
        raise ValueError("these images are luma only, so the network must have in_channels 1")
    high = [protocol.cut(image, scale) for image in sample.high]
    low = sample.low or tuple(protocol.shrink(image, scale) for image in high)
    if low[0].shape[0] * scale != high[0].shape[0] or low[0].shape[1] * scale != high[0].shape[1]:
        rows, columns = high[0].shape[0] // scale, high[0].shape[1] // scale
        low = tuple(image[:rows, :columns] for image in low)
    lows = [_seen(image, protocol, channels, is_luma=sample.luma) for image in low]
    return LearningPair(np.concatenate(lows), _seen(high[len(high) // 2], protocol, channels, is_luma=sample.luma))


def _seen(image: Array, protocol: Protocol, channels: int, *, is_luma: bool) -> Array:
    if channels == 1:
        return protocol.luma_of(as_tensor(image), is_luma=is_luma).numpy()
    return np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3)).transpose(2, 0, 1))


class Shelf:
    """Keeps arrays in memory as long as they are few, and in a temporary file when they are many.

    Args:
        limit: bytes to keep in memory.
    """

    def __init__(self, limit: int = _IN_MEMORY) -> None:
        self.limit, self.held = limit, 0
        self._file: IO[bytes] | None = None

    def keep(self, array: Array) -> Array:
        """The array, or the same values in the file."""
        if self.held + array.nbytes <= self.limit:
            self.held += array.nbytes
            return array
        self._file = self._file or tempfile.TemporaryFile(prefix="convatlas-")  # noqa: SIM115 - lives as long as self
        place = self._file.seek(0, 2)
        self._file.write(np.ascontiguousarray(array).data)
        self._file.flush()
        return np.memmap(self._file, array.dtype, "r", place, array.shape)


@dataclass(eq=False)
class PatchSet(Dataset[dict[str, Tensor]]):
    """The squares of a grid over each image, indexed by position or by (position, seed).

    A sample is ``{"low": (frames * C, size, size), "high": (C, scale size, scale size)}`` in [0, 1].

    Attributes:
        pairs: the images; those smaller than a patch give none.
        scale: of high over low resolution.
        size: side of a patch at low resolution.
        stride: distance of the patches at low resolution.
        turn: whether each patch is turned and mirrored in one of the eight ways, by its seed.
    """

    pairs: Sequence[LearningPair]
    scale: int
    size: int
    stride: int
    turn: bool = False
    ends: Array = field(init=False, repr=False)

    def __post_init__(self) -> None:
        counts = [rows * columns for rows, columns in map(self._grid, self.pairs)]
        self.ends = np.cumsum(counts, dtype=np.int64) if counts else np.zeros(0, np.int64)

    def _grid(self, pair: LearningPair) -> tuple[int, int]:
        rows, columns = (max(0, (length - self.size) // self.stride + 1) for length in pair.low.shape[1:])
        return rows, columns

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor]:
        index, seed = key if isinstance(key, tuple | list) else (key, 0)
        image = int(np.searchsorted(self.ends, index, side="right"))
        pair = self.pairs[image]
        place = index - (int(self.ends[image - 1]) if image else 0)
        y, x = (self.stride * number for number in divmod(place, self._grid(pair)[1]))
        patches = {
            name: as_tensor(np.moveaxis(whole[:, f * y : f * (y + self.size), f * x : f * (x + self.size)], 0, -1))
            for name, whole, f in (("low", pair.low, 1), ("high", pair.high, self.scale))
        }
        if not self.turn:
            return patches
        turns, mirrored = divmod(seed % 8, 2)
        turned = {name: torch.rot90(patch, turns, (1, 2)) for name, patch in patches.items()}
        return {name: (patch.flip(2) if mirrored else patch).contiguous() for name, patch in turned.items()}


@dataclass(eq=False)
class WholeSet(Dataset[dict[str, Tensor]]):
    """Whole images, of any sizes: ``{"low": (frames * C, H, W), "high": (C, scale H, scale W)}`` in [0, 1]."""

    pairs: Sequence[LearningPair]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        pair = self.pairs[index]
        return {
            "low": as_tensor(np.moveaxis(pair.low, 0, -1)),
            "high": as_tensor(np.moveaxis(pair.high, 0, -1)),
        }
