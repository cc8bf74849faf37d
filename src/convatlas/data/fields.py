"""Pairs of fields on regular grids, to learn the operator that maps one to the other.

A file holds inputs under ``x`` (``a``, ``input``) and outputs under ``y`` (``u``, ``output``, ``target``), either alone
or with a split before or behind the name (``x_train``, ``test_y``, ...). Each is (N, *grid) or (N, C, *grid).
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from convatlas.errors import DataError, require

__all__ = ["FieldPairs", "read_arrays", "read_fields"]

Array = npt.NDArray[Any]
Read = Callable[[Path], Mapping[str, Array]]

_INPUTS = {"x", "a", "input", "inputs"}
_OUTPUTS = {"y", "u", "output", "outputs", "target", "targets"}
_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
#: As many channels at most; more along the second axis are positions.
_MOST_CHANNELS = 16
_HDF5 = (".h5", ".hdf5", ".mat")


@dataclass(frozen=True, eq=False)
class FieldPairs:
    """Inputs and outputs of an operator on one grid.

    Attributes:
        x: inputs (N, C, *grid).
        y: outputs (N, C', *grid); None where only predictions are wanted.
    """

    x: Array
    y: Array | None = None

    def __len__(self) -> int:
        return len(self.x)

    @property
    def grid(self) -> tuple[int, ...]:
        """Points of each axis."""
        return tuple(self.x.shape[2:])

    def subset(self, rows: Sequence[int] | Array) -> FieldPairs:
        """The pairs at some places."""
        return FieldPairs(self.x[rows], None if self.y is None else self.y[rows])


def read_arrays(path: Path) -> Mapping[str, Array]:
    """The arrays of an ``.npz`` or HDF5 file by name; nothing pickled is read.

    Raises:
        DataError: the file is damaged, of another kind, or holds pickled objects.
        MissingExtra: it is an HDF5 file and h5py is not installed.
    """
    if path.suffix.lower() in _HDF5:
        h5py = require("h5py", extra="hdf5", purpose=f"reading {path}")
        try:
            with h5py.File(path, "r") as file:
                return {name: np.asarray(item) for name, item in file.items() if isinstance(item, h5py.Dataset)}
        except (OSError, KeyError, RuntimeError) as error:
            raise DataError(f"{path} cannot be read as an HDF5 file: {error}") from None
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise DataError(f"{path} is a single array, not an .npz file with x and y")
        with file:
            return {name: file[name] for name in file.files}
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} cannot be read as an .npz file of plain arrays: {error}") from None


def read_fields(
    source: str | Path, *, dims: int | None = None, paired: bool = True, read: Read = read_arrays
) -> dict[str, list[FieldPairs]]:
    """Read pairs of fields, as sets by split: {"all": [...]} or e.g. {"train": [...], "test": [...]}.

    Args:
        source: a file, or a folder of them, each with a resolution of its own; what a file is for is told by the names
            of its arrays, else by its own (``flow_64_train.npz``) or that of its folder (``train/``).
        dims: axes of position. None takes the second axis of an array for channels where it is at most 16 and shorter
            than each of the others.
        paired: whether outputs are needed.
        read: gives the arrays of a file by name.

    Raises:
        DataError: there is nothing at ``source``, nothing usable in it, or a value is not finite.
    """
    path = Path(source)
    try:
        if not path.exists():
            raise DataError(f"{source} does not exist; expected a file or a folder of fields, or a simulator")
        kinds = (".npz", *_HDF5, ".pt", ".pth")
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix.lower() in kinds)
        if not files:
            raise DataError(f"{source} holds no file of fields (.npz, .h5, .hdf5, .mat, .pt)")
        found: dict[str, list[FieldPairs]] = {}
        for file in files:
            words = [word for part in file.relative_to(path.parent).parts[1:] for word in re.split(r"[_.\s-]+", part)]
            split = next((_SPLITS[word.lower()] for word in words if word.lower() in _SPLITS), "all")
            for name, pairs in _pairs(file, read(file), dims, paired).items():
                found.setdefault(split if name == "all" else name, []).append(pairs)
    except OSError as error:
        raise DataError(f"{error.filename or source} cannot be read: {error.strerror or error}") from None
    shapes = {(pairs.x.shape[1], pairs.x.ndim, None if pairs.y is None else pairs.y.shape[1]) for pairs in _all(found)}
    if len(shapes) > 1:
        raise DataError(f"the fields of {source} must have the same channels and axes in all files")
    return found


def _all(sets: Mapping[str, list[FieldPairs]]) -> list[FieldPairs]:
    return [pairs for part in sets.values() for pairs in part]


def _pairs(path: Path, arrays: Mapping[str, Array], dims: int | None, paired: bool) -> dict[str, FieldPairs]:
    inputs, outputs = (_by_split(path, arrays, names) for names in (_INPUTS, _OUTPUTS))
    present = ", ".join(arrays) or "nothing"
    if not inputs:
        raise DataError(f"{path} must hold inputs under x (or x_train, x_test, ...); it holds {present}")
    if paired and inputs.keys() != outputs.keys():
        raise DataError(f"{path} must hold outputs under y for each part of the inputs under x; it holds {present}")
    found = {}
    for split, key in inputs.items():
        x = _field(arrays[key], f"{path}: {key}", dims)
        y = _field(arrays[outputs[split]], f"{path}: {outputs[split]}", x.ndim - 2) if split in outputs else None
        if y is not None and (len(y) != len(x) or y.shape[2:] != x.shape[2:]):
            raise DataError(f"{path}: inputs and outputs must be on one grid, got {x.shape} and {y.shape}")
        found[split] = FieldPairs(x, y)
    return found


def _by_split(path: Path, arrays: Mapping[str, Array], names: set[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for key in arrays:
        words = re.split(r"[_.\s-]+", key.lower())
        rest = [word for word in words if word not in names]
        if len(rest) != len(words) - 1 or any(word not in _SPLITS for word in rest) or len(rest) > 1:
            continue
        split = _SPLITS[rest[0]] if rest else "all"
        if split in found:
            raise DataError(f"{path} holds both {found[split]} and {key}: only one of them can be meant")
        found[split] = key
    return found


def _field(array: Array, what: str, dims: int | None) -> Array:
    """The array as (N, C, *grid) in float32 or, if it is that, float64."""
    if array.dtype.kind not in "fiub":
        raise DataError(f"{what} must hold real numbers, got {array.dtype}")
    axes = array.ndim - 1
    if dims is None:
        second, others = array.shape[1:2], array.shape[2:]
        channels = bool(others) and second[0] <= _MOST_CHANNELS and second[0] < min(others)
        dims = axes - channels
    if axes not in (dims, dims + 1) or not 1 <= dims <= 3 or 0 in array.shape:
        grid = ", ".join(["n"] * max(dims, 1))
        raise DataError(f"{what} must have the shape (N, {grid}) or (N, C, {grid}), got {array.shape}")
    array = array if array.dtype == np.float64 else array.astype(np.float32)
    finite = np.isfinite(array).reshape(len(array), -1).all(1)
    if not finite.all():
        raise DataError(
            f"{what}[{int(np.argmin(finite))}] holds NaN or infinite values ({int((~finite).sum())} in all)"
        )
    return array[:, None] if axes == dims else array
