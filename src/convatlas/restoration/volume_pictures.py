"""Looking at volumes: three slices through the middle, side by side, and residuals in red and blue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from convatlas.data.scans import Scan

__all__ = ["RESIDUAL_GAIN", "middle_slices", "orthogonal_slices", "residual_slices"]

Array = npt.NDArray[Any]

#: What differences are multiplied by to be seen: a quarter of the range is full red or full blue.
RESIDUAL_GAIN = 4
_GAP = 4


def middle_slices(volume: Array, scan: Scan | None = None) -> list[Array]:
    """The axial, the coronal and the sagittal slice through the middle of a volume.

    Args:
        volume: (D, H, W), or with a scan (X, Y, Z) on any finer grid of its axes.
        scan: tells which way up the volume is.

    Returns:
        Planes (H, W), (D, W) and (D, H), with the head and the front at the top, and the front at the left of the last.
    """
    upright = volume if scan is None else scan.upright(volume)
    depth, height, width = (length // 2 for length in upright.shape)
    return [upright[depth], upright[::-1, height], upright[::-1, :, width]]


def orthogonal_slices(planes: Sequence[Array], spacing: Sequence[float] = (1.0, 1.0, 1.0)) -> npt.NDArray[np.uint8]:
    """The three planes side by side in one picture (H', W', 3), values in [0, 1] from black to white.

    Args:
        planes: as `middle_slices` gives them.
        spacing: distance of voxels between slices, rows and columns; pixels of the picture are square.
    """
    return _joined([_grey(plane) for plane in planes], spacing)


def residual_slices(
    result: Sequence[Array], truth: Sequence[Array], spacing: Sequence[float] = (1.0, 1.0, 1.0)
) -> npt.NDArray[np.uint8]:
    """What a result has too much (red) and too little (blue) of, in the form of `orthogonal_slices`; white is none.

    Args:
        result, truth: planes as `middle_slices` gives them, with values in [0, 1].
        spacing: as for `orthogonal_slices`.
    """
    planes = []
    for one, other in zip(result, truth, strict=True):
        excess = np.clip(RESIDUAL_GAIN * (np.asarray(one, np.float32) - np.asarray(other, np.float32)), -1, 1)
        red, blue = 1 - np.maximum(-excess, 0), 1 - np.maximum(excess, 0)
        planes.append(_grey(np.stack([red, np.minimum(red, blue), blue], -1)))
    return _joined(planes, spacing)


def _grey(plane: Array) -> npt.NDArray[np.uint8]:
    levels = np.rint(255 * np.clip(plane, 0, 1)).astype(np.uint8)
    return levels if levels.ndim == 3 else np.repeat(levels[..., None], 3, axis=2)


def _joined(planes: Sequence[npt.NDArray[np.uint8]], spacing: Sequence[float]) -> npt.NDArray[np.uint8]:
    finest = min(spacing)
    depth, height, width = (length / finest for length in spacing)
    sides = ((height, width), (depth, width), (depth, height))
    shown = []
    for plane, (rows, columns) in zip(planes, sides, strict=True):
        size = (max(1, round(plane.shape[1] * columns)), max(1, round(plane.shape[0] * rows)))
        square = size == (plane.shape[1], plane.shape[0])
        shown.append(plane if square else np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.NEAREST)))
    tallest = max(len(plane) for plane in shown)
    parts: list[npt.NDArray[np.uint8]] = []
    for plane in shown:
        parts += [np.full((tallest, plane.shape[1], 3), 255, np.uint8), np.full((tallest, _GAP, 3), 255, np.uint8)]
        parts[-2][: len(plane)] = plane
    return np.concatenate(parts[:-1], 1)
