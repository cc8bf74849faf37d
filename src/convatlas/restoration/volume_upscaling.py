"""Enlarging whole volumes with a super-resolution network: intensities, overlapping patches, bounded memory, files."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.data.image_files import Unreadable
from convatlas.data.images import Skipped
from convatlas.data.scans import SCAN_SUFFIXES, Scan, read_scan, write_scan
from convatlas.data.volume_sets import scan_files
from convatlas.errors import DataError
from convatlas.files import free_name
from convatlas.networks.base import Upscaler
from convatlas.ops.tiling import Window, tiled
from convatlas.ops.volume_resize import Degradation, is_centred, linear_enlarge
from convatlas.restoration.volume_pictures import middle_slices, orthogonal_slices, residual_slices
from convatlas.training.progress import progress as shown_progress

__all__ = ["EnlargedScan", "Intensities", "Patches", "enlarge_scans", "super_resolve"]

Array = npt.NDArray[Any]

#: Share of the voxels, in per cent, below the intensity that becomes 1: a few bright vessels must not set it.
_BRIGHT = 99.9
#: Voxels above which a result is put together in a file instead of memory.
_IN_MEMORY = 2**27
_LOOKED_AT = 2**22
#: Half the side of the cube in the middle that is shown, in voxels of the input.
_SHOWN = 64


class Intensities(NamedTuple):
    """Where the values of a volume lie: ``low`` becomes 0 and ``high`` 1. Values beyond are not cut off."""

    low: float
    high: float

    @classmethod
    def of(cls, values: Array) -> Intensities:
        """From the smallest value to the 99.9th percentile of some millions of voxels, evenly spread.

        Raises:
            ValueError: the volume is constant, or holds values that are not finite.
        """
        step = max(1, math.ceil((values.size / _LOOKED_AT) ** (1 / 3)))
        some = values[::step, ::step, ::step]
        low = float(values.min())
        if not math.isfinite(low + float(values.max())):
            raise ValueError("volume must be finite, got NaN or infinity")
        high = float(np.percentile(some, _BRIGHT))
        high = high if high > low else float(values.max())
        if not high > low:
            raise ValueError(f"volume must not be constant, all of it is {low:g}")
        return cls(low, high)

    def apply(self, values: Tensor) -> Tensor:
        """Bring values to [0, 1]."""
        return (values - self.low) / (self.high - self.low)

    def undo(self, values: Tensor) -> Tensor:
        """Bring values back."""
        return values * (self.high - self.low) + self.low


@dataclass(frozen=True, kw_only=True)
class Patches:
    """How a volume is cut to go through a network.

    Attributes:
        tile: side of a patch at low resolution, in voxels.
        overlap: voxels that neighbouring patches share; 0 as DISGAN's authors do, which shows seams.
        window: how what overlaps is blended.
        pad: whether the volume is first padded with zeros on both sides to whole patches, as DISGAN's authors do;
            otherwise the last patch is moved back to end where the volume ends.
        batch_size: patches that go through the network together.
    """

    tile: int = 32
    overlap: int = 8
    window: Window = "gaussian"
    pad: bool = False
    batch_size: int = 1

    def __post_init__(self) -> None:
        if self.tile < 1:
            raise ValueError(f"tile must be at least 1, got {self.tile}")
        if not 0 <= self.overlap < self.tile:
            raise ValueError(f"overlap must be at least 0 and smaller than tile, got {self.overlap} and {self.tile}")


@torch.inference_mode()
def super_resolve(
    model: Upscaler,
    volume: Array,
    *,
    patches: Patches | None = None,
    intensities: Intensities | None = None,
    out: npt.NDArray[np.float32] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> npt.NDArray[np.float32]:
    """Enlarge a volume patch by patch, in the units of its values.

    Only one batch of patches and the result are held; with ``out`` over a memory-mapped file, as `numpy.memmap` gives
    one, the memory does not grow with the volume.

    Args:
        model: a network for volumes of one channel, in evaluation mode, on any device.
        volume: (D, H, W), of any real type; it may be memory-mapped.
        patches: how it is cut; patches of 32 voxels with an overlap of 8 by default.
        intensities: which values become 0 and 1; those of the volume by default.
        out: where to put the result.
        progress: called with the patches done and the number of all.

    Returns:
        (scale D, scale H, scale W) float32, or ``out``.

    Raises:
        ValueError: the network is not for volumes of one channel, or the volume has another shape, is empty, constant
            or not finite, or out does not fit.
    """
    patches = patches or Patches()
    if model.dims != 3 or model.in_channels != 1:
        raise ValueError(f"model must take volumes of 1 channel, it takes {model.dims} axes of {model.in_channels}")
    if volume.ndim != 3 or 0 in volume.shape:
        raise ValueError(f"volume must be (D, H, W) and not empty, got {volume.shape}")
    if volume.dtype.kind not in "biuf":
        raise ValueError(f"volume must be real, got {volume.dtype}")
    intensities = intensities or Intensities.of(volume)
    weight = next(model.parameters())
    if not (volume.flags.writeable and volume.dtype == np.float32 and min(volume.strides) > 0):
        volume = np.array(volume, np.float32)
    x = torch.from_numpy(volume)[None, None]
    lengths, scale = volume.shape, model.scale
    if patches.pad:
        missing = [-length % patches.tile for length in lengths]
        x = F.pad(x, [end for gap in reversed(missing) for end in (gap // 2, gap - gap // 2)], value=intensities.low)
        if out is not None and any(missing):
            raise ValueError("out must be left out where the volume is padded to whole patches")

    def enlarge(part: Tensor) -> Tensor:
        y = model(intensities.apply(part.to(weight.device)).to(weight.dtype))
        return intensities.undo(y.float())

    result = tiled(
        enlarge,
        x,
        tile=patches.tile,
        overlap=patches.overlap,
        scale=scale,
        window=patches.window,
        batch_size=patches.batch_size,
        device="cpu",
        out=None if out is None else torch.from_numpy(out)[None, None],
        progress=progress,
    )[0, 0]
    if patches.pad:
        result = result[
            tuple(
                slice(scale * (gap // 2), scale * (gap // 2 + length))
                for gap, length in zip(missing, lengths, strict=True)
            )
        ]
    return result.numpy() if out is None else out


# -- a user's files ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class EnlargedScan:
    """A file that was enlarged.

    Attributes:
        name: of the input, as given or relative to a folder that was given.
        path: of the result, relative to the output folder.
        before, after: voxels along each axis.
        spacing: distance of the new voxels in millimetres.
        seconds: from reading to writing.
        pictures: three slices of the linear interpolation, of the result, and of their difference.
    """

    name: str
    path: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    spacing: tuple[float, ...]
    seconds: float
    pictures: tuple[Array, Array, Array]


def enlarge_scans(
    model: Upscaler, inputs: Sequence[str | Path], folder: Path, *, patches: Patches, degradation: Degradation
) -> tuple[list[EnlargedScan], list[Skipped]]:
    """Enlarge files of volumes and all in folders; each result has the form of its file.

    Args:
        model: the network.
        inputs: NIfTI, ``.npy`` and ``.npz`` files, or folders of them.
        folder: where to write.
        patches: how volumes are cut.
        degradation: that the network was trained to undo; it tells where the new voxels lie.

    Returns:
        What was written, and what was left out with the reasons.

    Raises:
        DataError: an input does not exist, or nothing can be read.
        OSError: a file cannot be written.
    """
    found = scan_files(inputs)
    if not found:
        raise DataError(f"there is no volume in {', '.join(map(str, inputs)) or 'nothing'}")
    done: list[EnlargedScan] = []
    skipped: list[Skipped] = []
    taken: set[str] = set()
    for path, name in found:
        try:
            done.append(_enlarge_file(model, path, name, folder, taken, patches, degradation))
        except Unreadable as error:
            skipped.append(Skipped(name, error.reason))
        except ValueError as error:
            skipped.append(Skipped(name, str(error)))
    if not done:
        raise DataError(f"{skipped[0].path} cannot be enlarged: {skipped[0].reason}")
    return done, skipped


def _enlarge_file(
    model: Upscaler, path: Path, name: str, folder: Path, taken: set[str], patches: Patches, degradation: Degradation
) -> EnlargedScan:
    started = time.perf_counter()
    scan = read_scan(path, name=name)
    wanted = tuple(model.scale * length for length in scan.values.shape)
    intensities = Intensities.of(scan.values)
    suffix = next(ending for ending in SCAN_SUFFIXES if name.lower().endswith(ending))
    written = free_name(name.removesuffix(name[-len(suffix) :]) + ".nii", f"x{model.scale}", suffix, taken)
    folder.mkdir(parents=True, exist_ok=True)
    with _room(wanted, folder, patches) as out, shown_progress(name, None) as advance:
        values = super_resolve(
            *(model, scan.values),
            patches=patches,
            intensities=intensities,
            out=out,
            progress=lambda *_: advance(),
        )
        write_scan(folder / written, scan, values, model.scale, centred=is_centred(degradation))
        pictures = _before_after(scan, values, model.scale, intensities, degradation)
    spacing = tuple(length / model.scale for length in scan.spacing)
    return EnlargedScan(name, written, scan.values.shape, wanted, spacing, time.perf_counter() - started, pictures)


@contextmanager
def _room(shape: tuple[int, ...], folder: Path, patches: Patches) -> Iterator[npt.NDArray[np.float32] | None]:
    """A memory-mapped file for a large result, laid out as NIfTI is, and nothing for a small one."""
    if math.prod(shape) <= _IN_MEMORY or patches.pad:
        yield None
        return
    with tempfile.NamedTemporaryFile(prefix=".convatlas-", suffix=".part", dir=folder) as file:
        yield np.memmap(file.name, np.float32, "w+", shape=shape, order="F")


def _before_after(
    scan: Scan, values: Array, scale: int, intensities: Intensities, degradation: Degradation
) -> tuple[Array, Array, Array]:
    """Slices through the middle by linear interpolation and of the result, and what the network has added."""
    cuts = [slice(max(0, length // 2 - _SHOWN), length // 2 + _SHOWN) for length in scan.values.shape]
    low = torch.from_numpy(np.ascontiguousarray(scan.values[tuple(cuts)]))[None, None]
    before = linear_enlarge(low, scale, degradation)[0, 0].numpy()
    after = values[tuple(slice(scale * cut.start, scale * cut.stop) for cut in cuts)]
    planes = [
        [intensities.apply(torch.from_numpy(np.array(plane))).numpy() for plane in middle_slices(volume, scan)]
        for volume in (before, after)
    ]
    spacing = scan.upright_spacing
    first, second = (orthogonal_slices(each, spacing) for each in planes)
    return first, second, residual_slices(planes[1], planes[0], spacing)
