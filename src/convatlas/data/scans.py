"""Volumes as a scanner stores them: NIfTI files and arrays with the place of their voxels in the world, in and out.

Axes stay in the order and direction of the file, so that what is written lies where what was read lay.
"""

from __future__ import annotations

import gzip
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from convatlas.data.image_files import Unreadable
from convatlas.files import atomic_path

__all__ = ["SCAN_SUFFIXES", "Scan", "enlarged_affine", "read_scan", "write_scan"]

SCAN_SUFFIXES = (".nii", ".nii.gz", ".npy", ".npz")
_NIFTI = (".nii", ".nii.gz")
_KEYS = ("volume", "image", "data", "x")

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Scan:
    """A volume and where its voxels lie.

    Attributes:
        values: (X, Y, Z) float32, as the file tells them, in the order of its axes.
        affine: (4, 4), from the index of a voxel to millimetres to the right, to the front and up.
        header: of a NIfTI file, which what is made of the scan keeps where it can.
    """

    values: npt.NDArray[np.float32]
    affine: npt.NDArray[np.float64]
    header: Any = None

    @property
    def upright_spacing(self) -> tuple[float, float, float]:
        """Distance of slices, rows and columns of `upright` in millimetres."""
        order, spacing = _orientation(self.affine)[0], self.spacing
        right, front, up = (spacing[order.index(world)] for world in range(3))
        return up, front, right

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance of neighbouring voxels along each axis in millimetres."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(x), float(y), float(z)

    def upright(self, values: Array | None = None) -> Array:
        """A view (D, H, W) of the values, or of others along the same axes (X, Y, Z).

        Slices go from the feet up, with the front of the body at the top and its right side at the left.
        """
        values = self.values if values is None else values
        order, flips = _orientation(self.affine)
        turned = values.transpose([order.index(axis) for axis in range(3)])
        for axis, flip in enumerate(flips):
            turned = np.flip(turned, axis) if flip else turned
        return turned.transpose(2, 1, 0)[:, ::-1, ::-1]


def _orientation(affine: npt.NDArray[np.float64]) -> tuple[list[int], list[bool]]:
    """Which direction of the world (right, front, up) each axis follows best, and which of these run backwards."""
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    rotation = affine[:3, :3] / np.where(lengths > 0, lengths, 1)
    weights, order = np.abs(rotation), [-1, -1, -1]
    for _ in range(3):
        best = divmod(int(np.argmax(weights)), 3)
        order[best[1]] = best[0]
        weights[best[0], :] = weights[:, best[1]] = -1
    flips = [False] * 3
    for axis, world in enumerate(order):
        flips[world] = bool(rotation[world, axis] < 0)
    return order, flips


def enlarged_affine(affine: npt.NDArray[Any], scale: int, *, centred: bool) -> npt.NDArray[np.float64]:
    """Where the voxels lie that each voxel of a volume becomes ``scale`` of along each axis.

    Args:
        affine: of the volume, (4, 4).
        scale: how many times as many voxels.
        centred: whether the new voxels share the room of the old one, as where that is their mean; otherwise the first
            of them lies where the old one lay, as where that was picked from among them.
    """
    step = np.eye(4)
    step[:3, :3] /= scale
    if centred:
        step[:3, 3] = 0.5 / scale - 0.5
    moved: npt.NDArray[np.float64] = np.asarray(affine, np.float64) @ step
    return moved


def read_scan(path: str | Path, *, name: str | None = None) -> Scan:
    """Read a NIfTI file, an ``.npy`` file (X, Y, Z), or an ``.npz`` file with ``volume`` and perhaps ``affine``.

    Args:
        path: the file.
        name: what to call the file in an error; by default its path.

    Raises:
        Unreadable: it is missing, damaged, no volume of three axes, or holds values that are not finite.
        ImportError: nibabel is not installed and the file is NIfTI.
    """
    path, name = Path(path), str(path) if name is None else name
    try:
        if not path.exists():
            raise Unreadable(name, "there is no such file")
        scan = _read_nifti(path) if path.name.lower().endswith(_NIFTI) else _read_array(path, name)
    except (Unreadable, ImportError):
        raise
    except Exception as error:  # damaged files make the decoders raise nearly anything
        reason = "the file is empty" if path.stat().st_size == 0 else str(error) or type(error).__name__
        if any(words in reason for words in ("Cannot work out file type", "not a gzip file")):
            reason = "it is no NIfTI file"
        raise Unreadable(name, reason.removeprefix(f"{path} ")) from None
    if scan.values.ndim != 3 or 0 in scan.values.shape:
        what = f"a series of {scan.values.shape[3]} volumes" if scan.values.ndim == 4 else "not that of a volume"
        raise Unreadable(name, f"it has the shape {scan.values.shape}, {what}; three axes are expected")
    finite = np.isfinite(scan.values)
    if not finite.all():
        raise Unreadable(name, f"{finite.size - int(finite.sum())} of its voxels are not finite")
    return scan


def _nibabel() -> Any:
    try:
        return importlib.import_module("nibabel")
    except ImportError:
        raise ImportError("reading NIfTI files needs nibabel: pip install 'convatlas[medical]'") from None


def _read_nifti(path: Path) -> Scan:
    image = _nibabel().load(path)
    values = np.asarray(image.dataobj, dtype=np.float32)
    while values.ndim > 3 and values.shape[-1] == 1:
        values = values[..., 0]
    return Scan(values, np.asarray(image.affine, np.float64), image.header)


def _read_array(path: Path, name: str) -> Scan:
    loaded = np.load(path, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return Scan(loaded.astype(np.float32), np.eye(4))
    key = next((key for key in _KEYS if key in loaded), None)
    if key is None:
        raise Unreadable(name, f"it must hold an array named {' or '.join(_KEYS)}, got {', '.join(loaded) or 'none'}")
    affine = np.asarray(loaded["affine"], np.float64) if "affine" in loaded else np.eye(4)
    if affine.shape != (4, 4):
        raise Unreadable(name, f"its affine must be (4, 4), got {affine.shape}")
    return Scan(loaded[key].astype(np.float32), affine)


def write_scan(path: str | Path, scan: Scan, values: Array, scale: int = 1, *, centred: bool = True) -> None:
    """Write a volume made of a scan, in the form that the name of the file tells.

    A NIfTI file keeps the header of the scan; voxel size, affine and both of its forms are those of the finer grid. The
    values are written as float32 slice by slice, so that they may lie in a memory-mapped file.

    Args:
        path: ends in one of `SCAN_SUFFIXES`.
        scan: what the volume was made of.
        values: (scale X, scale Y, scale Z).
        scale, centred: as for `enlarged_affine`.

    Raises:
        ValueError: the shape or the ending does not fit.
        ImportError: nibabel is not installed and the file is NIfTI.
        OSError: the file cannot be written.
    """
    path = Path(path)
    wanted = tuple(scale * length for length in scan.values.shape)
    if values.shape != wanted:
        raise ValueError(f"values must be {wanted}, got {values.shape}")
    lower = path.name.lower()
    if not lower.endswith(SCAN_SUFFIXES):
        raise ValueError(f"path must end in {', '.join(SCAN_SUFFIXES)}, got {path.name!r}")
    affine = enlarged_affine(scan.affine, scale, centred=centred)
    with atomic_path(path) as part:
        if lower.endswith(_NIFTI):
            image = _nifti(scan, values, affine, scale, centred)
            with gzip.open(part, "wb", compresslevel=4) if lower.endswith(".gz") else open(part, "wb") as file:
                image.to_stream(file)
        else:
            with open(part, "wb") as file:
                if lower.endswith(".npy"):
                    np.save(file, values.astype(np.float32, copy=False))
                else:
                    np.savez_compressed(file, volume=values.astype(np.float32, copy=False), affine=affine)


def _nifti(scan: Scan, values: Array, affine: npt.NDArray[np.float64], scale: int, centred: bool) -> Any:
    nibabel = _nibabel()
    if scan.header is None:
        return nibabel.Nifti1Image(values, affine, dtype=np.float32)
    header = scan.header.copy()
    header.set_data_dtype(np.float32)
    header.set_slope_inter(1, 0)
    image = nibabel.Nifti1Image(values, affine, header)
    # The two forms may differ, and each counts in some program.
    for form in ("sform", "qform"):
        own, code = getattr(scan.header, f"get_{form}")(coded=True)
        if code:
            getattr(image, f"set_{form}")(enlarged_affine(own, scale, centred=centred), int(code))
        else:
            getattr(image, f"set_{form}")(None, 0)
    return image
