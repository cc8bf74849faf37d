"""Volumes and short videos: NIfTI files, arrays and MP4 files as arrays (D, H, W, C).

D are slices of a volume, from the feet to the head, or frames of a video, from first to last. A volume is shown as
radiologists look at it: every slice has the front of the body at the top and its right side at the left.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from convatlas.data.arrays import as_samples
from convatlas.data.image_files import FileKind, Unreadable
from convatlas.errors import DataError, unknown

__all__ = ["CLIP_SUFFIXES", "VOLUME_SUFFIXES", "Plane", "VolumeReading", "montage", "read_volume", "volume_files"]

VOLUME_SUFFIXES = frozenset({".nii", ".nii.gz", ".npy"})
CLIP_SUFFIXES = frozenset({".mp4", ".avi", ".mov", ".mkv", ".webm"})

#: Which plane of the body a slice shows.
Plane = Literal["axial", "coronal", "sagittal"]

_MAX_CHANNELS = 16
#: Voxel sides that differ by less than this share count as equal.
_SAME_SPACING = 0.01
#: No file of a user should need more: a volume of 1024 cubed in single precision.
_MOST_VOXELS = 2**30
#: Shorter side in pixels to which the frames of larger videos are reduced.
_LARGEST_SIDE = 512


@dataclass(frozen=True)
class VolumeReading:
    """How volumes and videos are read.

    Attributes:
        plane: which plane of the body the slices of a NIfTI file are to show.
        spacing: distance of voxels in mm between slices, rows and columns, to which NIfTI files are resampled; where
            left out, only the rows and columns of a slice are brought to the same distance.
        frames: of a video so many frames, spread evenly over its length, are read at most.
    """

    plane: Plane = "axial"
    spacing: tuple[float, float, float] | None = None
    frames: int = 64

    def __post_init__(self) -> None:
        if self.plane not in get_args(Plane):
            raise unknown("plane", self.plane, get_args(Plane))
        if self.spacing is not None and min(self.spacing) <= 0:
            raise ValueError(f"spacing must be positive, got {self.spacing}")
        if self.frames < 1:
            raise ValueError(f"frames must be at least 1, got {self.frames}")


def volume_files(reading: VolumeReading | None = None) -> FileKind:
    """Volumes and videos as a kind of files for `convatlas.data.images.read_images`."""
    reading = reading or VolumeReading()
    return FileKind("volume", VOLUME_SUFFIXES | CLIP_SUFFIXES, partial(_decode, reading=reading), _is_grey)


def read_volume(path: str | Path, reading: VolumeReading | None = None) -> npt.NDArray[Any]:
    """Read a file as (D, H, W, C): uint8 of a video, float32 of a volume with the values that the file holds.

    A NIfTI file is brought into the orientation that its header tells, whatever the order of its axes; its fourth axis
    becomes the channels. Of an ``.npy`` file the axes are (D, H, W), (D, H, W, C) or (C, D, H, W).

    Raises:
        Unreadable: the file is missing, damaged, too large, or holds no volume.
        ImportError: nibabel (for NIfTI) or PyAV (for videos) is not installed.
    """
    return _read(str(path), str(path), reading or VolumeReading())


def montage(volume: npt.NDArray[Any], most: int = 16) -> npt.NDArray[Any]:
    """Up to ``most`` evenly spread slices or frames of a volume (D, H, W, C), side by side in one image (H', W', C)."""
    count = min(most, len(volume))
    slices = volume[np.linspace(0, len(volume) - 1, count).round().astype(int)]
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    empty = np.zeros((rows * columns - count, *slices.shape[1:]), slices.dtype)
    tiles = np.concatenate([slices, empty]).reshape(rows, columns, *slices.shape[1:])
    return tiles.swapaxes(1, 2).reshape(rows * slices.shape[1], columns * slices.shape[2], slices.shape[3])


def _decode(path: str | Path, channels: int, *, name: str | None = None, reading: VolumeReading) -> npt.NDArray[Any]:
    name = str(path) if name is None else name
    volume = _read(str(path), name, reading)
    if volume.shape[-1] == channels:
        return volume
    if volume.shape[-1] == 1:
        return np.repeat(volume, channels, axis=-1)
    if channels == 1 and volume.shape[-1] == 3:
        grey = volume @ np.array([[0.299], [0.587], [0.114]], np.float32)
        return np.rint(grey).astype(np.uint8) if volume.dtype == np.uint8 else grey
    raise Unreadable(name, f"it has {volume.shape[-1]} channels, {channels} are expected")


def _read(path: str, name: str, reading: VolumeReading) -> npt.NDArray[Any]:
    try:
        if not os.path.exists(path):
            raise Unreadable(name, "there is no such file")
        if path.lower().endswith(tuple(CLIP_SUFFIXES)):
            return _read_clip(path, name, reading.frames)
        if path.lower().endswith(".npy"):
            return as_samples(np.load(path, allow_pickle=False)[None], name, dims=3)[0]
        return _read_nifti(path, name, reading)
    except (Unreadable, ImportError):
        raise
    except DataError as error:
        raise Unreadable(name, str(error).removeprefix(f"{name} ")) from None
    except Exception as error:  # damaged files make the decoders raise nearly anything
        raise Unreadable(name, str(error) or type(error).__name__) from None


def _is_grey(path: str, name: str, whole: bool) -> bool | Unreadable:
    # Volumes are large, so that only their headers are looked at.
    try:
        if path.lower().endswith(tuple(CLIP_SUFFIXES)):
            _read_clip(path, name, 1)
            return False
        if path.lower().endswith(".npy"):
            shape: tuple[int, ...] = np.load(path, mmap_mode="r", allow_pickle=False).shape
            if len(shape) == 4:
                return min(shape[0], shape[-1]) == 1
        else:
            shape = _nifti(path, name).shape
        if len(shape) not in (3, 4) or 0 in shape:
            raise Unreadable(name, f"it has the shape {shape}, not that of a volume")
        return len(shape) == 3 or shape[3] == 1
    except Unreadable as error:
        return error
    except ImportError:
        raise
    except Exception as error:
        return Unreadable(name, str(error) or type(error).__name__)


def _nifti(path: str, name: str) -> Any:
    try:
        nibabel: Any = importlib.import_module("nibabel")
    except ImportError:
        raise ImportError("reading NIfTI files needs nibabel: pip install 'convatlas[medical]'") from None
    try:
        return nibabel.load(path)
    except Exception as error:
        reason = "the file is empty" if os.path.getsize(path) == 0 else str(error).removeprefix(f"{path} ")
        raise Unreadable(name, reason) from None


def _read_nifti(path: str, name: str, reading: VolumeReading) -> npt.NDArray[np.float32]:
    nibabel: Any = importlib.import_module("nibabel")
    image = _nifti(path, name)
    shape = image.shape
    if len(shape) == 4 and shape[3] > _MAX_CHANNELS:
        raise Unreadable(name, f"it is a series of {shape[3]} volumes; at most {_MAX_CHANNELS} are taken as channels")
    if len(shape) not in (3, 4) or 0 in shape:
        raise Unreadable(name, f"it has the shape {shape}, not that of a volume")
    if np.prod(shape, dtype=np.int64) > _MOST_VOXELS:
        raise Unreadable(name, f"it has {shape} voxels, more than can be held")
    # Axes from left to right, back to front, feet to head.
    upright: Any = nibabel.as_closest_canonical(image)
    values = np.asarray(upright.dataobj, dtype=np.float32).reshape(*upright.shape[:3], -1)
    if not np.isfinite(values).all():
        values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)  # outside the field of view of some scanners
    width, depth, height = (float(side) for side in upright.header.get_zooms()[:3])
    if min(width, depth, height) <= 0:
        raise Unreadable(name, f"its header tells the voxel size {width:g} x {depth:g} x {height:g} mm")
    # Rows go from front to back in an axial slice, from head to feet in the others; the right side is at the left.
    match reading.plane:
        case "axial":
            volume, spacing = values.transpose(2, 1, 0, 3)[:, ::-1, ::-1], (height, depth, width)
        case "coronal":
            volume, spacing = values.transpose(1, 2, 0, 3)[:, ::-1, ::-1], (depth, height, width)
        case "sagittal":
            volume, spacing = values.transpose(0, 2, 1, 3)[:, ::-1, ::-1], (width, height, depth)
    return _resampled(np.ascontiguousarray(volume), spacing, reading.spacing)


def _resampled(
    volume: npt.NDArray[np.float32], old: Sequence[float], new: Sequence[float] | None
) -> npt.NDArray[np.float32]:
    """Change the distance of voxels by linear interpolation."""
    if new is None:
        finer = min(old[1:])
        new = (old[0], finer, finer)
    if all(abs(a / b - 1) < _SAME_SPACING for a, b in zip(old, new, strict=True)):
        return volume
    from scipy import ndimage

    factors = [max(1, round(size * a / b)) / size for size, a, b in zip(volume.shape, old, new, strict=False)]
    if volume.size * np.prod(factors) > _MOST_VOXELS:
        raise DataError(f"resampled to a spacing of {tuple(new)} mm it would be too large")
    resampled: npt.NDArray[np.float32] = ndimage.zoom(volume, [*factors, 1], order=1, mode="nearest", grid_mode=True)
    return resampled


def _read_clip(path: str, name: str, frames: int) -> npt.NDArray[np.uint8]:
    try:
        av: Any = importlib.import_module("av")
    except ImportError:
        raise ImportError("reading videos needs PyAV: pip install 'convatlas[video]'") from None
    with av.open(path) as container:
        if not container.streams.video:
            raise Unreadable(name, "it has no picture")
        stream = container.streams.video[0]
        kept: list[npt.NDArray[np.uint8]] = []
        step = 1
        for index, frame in enumerate(container.decode(stream)):
            # The number of frames is not known before the end: keep every step-th, and half as many when there are too
            # many.
            if index % step:
                continue
            shrink = max(1.0, min(frame.width, frame.height) / _LARGEST_SIDE)
            size = {"width": round(frame.width / shrink), "height": round(frame.height / shrink)}
            kept.append(frame.reformat(**size, format="rgb24").to_ndarray())
            if len(kept) == 2 * frames:
                kept, step = kept[::2], 2 * step
            if frames == 1:
                break
    if not kept:
        raise Unreadable(name, "it has no frame that can be decoded")
    chosen = np.linspace(0, len(kept) - 1, min(frames, len(kept))).round().astype(int)
    return np.stack([kept[index] for index in chosen])
