"""Volumes to learn super-resolution from, cut into patches, and measuring how well a network enlarges and cleans."""

from __future__ import annotations

import csv
import io
import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from convatlas.data.scans import Scan
from convatlas.files import write_text
from convatlas.networks.base import Upscaler
from convatlas.ops.volume_quality import nrmse, sharpness, volume_psnr, volume_ssim
from convatlas.ops.volume_resize import Degradation, linear_enlarge, shrink
from convatlas.report import printable
from convatlas.restoration.volume_pictures import middle_slices, orthogonal_slices, residual_slices
from convatlas.restoration.volume_upscaling import Intensities, Patches, super_resolve

__all__ = [
    "MeasuredVolume",
    "VolumePair",
    "VolumePatches",
    "VolumeQuality",
    "WholeVolumes",
    "mean_volume_quality",
    "measure_volume",
    "volume_pair",
    "write_measured",
]

Array = npt.NDArray[Any]

_SSIM_WINDOW = 7
#: Intensity above which a voxel counts as foreground.
_FOREGROUND = 0.05


class VolumeQuality(NamedTuple):
    """How near a volume is to the truth: PSNR in dB, SSIM of the volume and of its slices, NRMSE, and its sharpness."""

    psnr: float
    ssim: float
    slice_ssim: float
    nrmse: float
    sharpness: float

    @classmethod
    def of(cls, volume: Tensor, truth: Tensor) -> VolumeQuality:
        """Compare two volumes (D, H, W)."""
        large = min(truth.shape) >= _SSIM_WINDOW
        flat = min(truth.shape[:2]) >= _SSIM_WINDOW
        return cls(
            float(volume_psnr(volume, truth)),
            float(volume_ssim(volume, truth)) if large else math.nan,
            float(volume_ssim(volume, truth, dims=2)) if flat else math.nan,
            float(nrmse(volume, truth)),
            float(sharpness(volume)),
        )


def mean_volume_quality(qualities: Iterable[VolumeQuality]) -> VolumeQuality:
    """Mean of every measure."""
    rows = list(qualities)
    return VolumeQuality(*(float(np.mean(column)) for column in zip(*rows, strict=True)))


@dataclass(frozen=True, eq=False)
class VolumePair:
    """A volume with its values brought to [0, 1], (D, H, W), and the same at low resolution; both float32."""

    low: Array
    high: Array


def volume_pair(scan: Scan, scale: int, degradation: Degradation) -> VolumePair:
    """Bring a volume to [0, 1], cut it to whole blocks and lower its resolution.

    Raises:
        ValueError: it is smaller than a block, constant or not finite.
    """
    lengths = [length - length % scale for length in scan.values.shape]
    if min(lengths) == 0:
        raise ValueError(f"volume must have at least {scale} voxels a side, got {scan.values.shape}")
    values = scan.values[tuple(slice(length) for length in lengths)]
    high = Intensities.of(values).apply(torch.from_numpy(np.array(values, np.float32)))
    low = shrink(high[None, None], scale, degradation)[0, 0]
    return VolumePair(low.numpy(), high.numpy())


@dataclass(eq=False)
class VolumePatches(Dataset[dict[str, Tensor]]):
    """The cubes of a grid over each volume that show something, indexed by position or by (position, seed).

    A sample is ``{"low": (1, size / scale, ...), "high": (1, size, ...)}``.

    Attributes:
        pairs: the volumes; those smaller than a patch give none.
        scale: of high over low resolution.
        size: side of a patch at high resolution; a multiple of scale.
        stride: distance of the patches at high resolution; a multiple of scale.
        foreground: share of a patch's voxels that must be brighter than a twentieth of the range.
        flip: whether each patch is mirrored along each axis or not, by its seed.
    """

    pairs: Sequence[VolumePair]
    scale: int
    size: int
    stride: int
    foreground: float = 0.1
    flip: bool = False
    places: list[tuple[int, int, int, int]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.places = []
        for number, pair in enumerate(self.pairs):
            for z, y, x in np.ndindex(*(max(0, (side - self.size) // self.stride + 1) for side in pair.high.shape)):
                place = (number, z * self.stride, y * self.stride, x * self.stride)
                if (self._cut(pair.high, place, 1) > _FOREGROUND).mean() >= self.foreground:
                    self.places.append(place)

    def _cut(self, volume: Array, place: tuple[int, int, int, int], scale: int) -> Array:
        side = self.size // scale
        cut: Array = volume[tuple(slice(start // scale, start // scale + side) for start in place[1:])]
        return cut

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor]:
        index, seed = key if isinstance(key, tuple | list) else (key, 0)
        place = self.places[index]
        pair = self.pairs[place[0]]
        axes = tuple(axis for axis in range(3) if self.flip and seed >> axis & 1)
        cuts = {"low": self._cut(pair.low, place, self.scale), "high": self._cut(pair.high, place, 1)}
        return {
            name: torch.from_numpy(np.ascontiguousarray(np.flip(cut, axes)))[None].float() for name, cut in cuts.items()
        }


@dataclass(eq=False)
class WholeVolumes(Dataset[dict[str, Tensor]]):
    """Whole volumes, of any sizes: ``{"low": (1, D, H, W), "high": (1, scale D, scale H, scale W)}``."""

    pairs: Sequence[VolumePair]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        pair = self.pairs[index]
        return {name: torch.from_numpy(np.array(getattr(pair, name)))[None] for name in ("low", "high")}


@dataclass(frozen=True, eq=False)
class MeasuredVolume:
    """One volume enlarged by a network and by linear interpolation, without and with noise, and how near both are.

    Attributes:
        name: of the volume.
        shape: of the large volume.
        linear, network: quality where low resolution is clean.
        noisy_linear, noisy_network: where it is noisy.
        sharpness: of the truth.
        slices: three slices side by side as uint8: of linear interpolation, the network, the truth, the residual of
            interpolation and that of the network.
        noisy_slices: the same of the noisy volume, without the truth.
    """

    name: str
    shape: tuple[int, ...]
    linear: VolumeQuality
    network: VolumeQuality
    noisy_linear: VolumeQuality
    noisy_network: VolumeQuality
    sharpness: float
    slices: dict[str, Array]
    noisy_slices: dict[str, Array]


def measure_volume(
    model: Upscaler, name: str, scan: Scan, *, degradation: Degradation, sigma: float, patches: Patches
) -> MeasuredVolume:
    """Lower the resolution of a volume, enlarge it again and compare; then once more with noise.

    Args:
        model: the network.
        name: of the volume, which the noise follows from.
        scan: the volume.
        degradation: how its resolution is lowered.
        sigma: standard deviation of the noise that is added to low resolution, as a share of the range.
        patches: how the volume is cut.

    Raises:
        ValueError: the volume cannot be used.
    """
    pair = volume_pair(scan, model.scale, degradation)
    truth = torch.from_numpy(pair.high)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode("utf-8", "surrogateescape")))
    clean = torch.from_numpy(pair.low)
    noisy = clean + sigma * torch.randn(clean.shape, generator=generator)
    (linear, network, slices), (noisy_linear, noisy_network, noisy_slices) = (
        _enlarged_twice(model, low, truth, scan, degradation, patches) for low in (clean, noisy)
    )
    return MeasuredVolume(
        name,
        tuple(truth.shape),
        linear=linear,
        network=network,
        noisy_linear=noisy_linear,
        noisy_network=noisy_network,
        sharpness=float(sharpness(truth)),
        slices=slices,
        noisy_slices=noisy_slices,
    )


def _enlarged_twice(
    model: Upscaler, low: Tensor, truth: Tensor, scan: Scan, degradation: Degradation, patches: Patches
) -> tuple[VolumeQuality, VolumeQuality, dict[str, Array]]:
    """By interpolation and by the network: the quality of both, and their slices."""
    linear = linear_enlarge(low[None, None], model.scale, degradation)[0, 0]
    plain = Intensities(0.0, 1.0)
    network = torch.from_numpy(super_resolve(model, low.numpy(), patches=patches, intensities=plain))
    shown = _slices(scan, linear, network, truth)
    return VolumeQuality.of(linear, truth), VolumeQuality.of(network, truth), shown


def _slices(scan: Scan, linear: Tensor, network: Tensor, truth: Tensor) -> dict[str, Array]:
    spacing = scan.upright_spacing
    planes = {
        label: middle_slices(volume.numpy(), scan)
        for label, volume in (("linear", linear), ("network", network), ("truth", truth))
    }
    shown: dict[str, Array] = {label: orthogonal_slices(each, spacing) for label, each in planes.items()}
    for label in ("linear", "network"):
        shown[f"{label} residual"] = residual_slices(planes[label], planes["truth"], spacing)
    return shown


def write_measured(path: str | Path, measured: Sequence[MeasuredVolume]) -> None:
    """One row for each volume and way, without and with noise: its name, size, and the quality."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["volume", "size", "way", "noise", "PSNR", "SSIM", "slice SSIM", "NRMSE", "sharpness"])
    for each in measured:
        size = " x ".join(map(str, each.shape))
        for way, noise, quality in (
            ("linear", "no", each.linear),
            ("network", "no", each.network),
            ("linear", "yes", each.noisy_linear),
            ("network", "yes", each.noisy_network),
        ):
            writer.writerow([printable(each.name), size, way, noise, *(f"{value:.5f}" for value in quality)])
    write_text(path, text.getvalue())
