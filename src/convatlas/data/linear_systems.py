"""Linear systems on grids as files: NPZ of masks or matrices with right-hand sides, and the published binary format.

The binary format is that of the data set of Kaneda et al. (arXiv 2205.10763): a right-hand side is a float64 file whose
first value is its length; a matrix is five int32 (rows, columns, entries, outer size, inner size), float32 entries,
int32 row starts without the last, and int32 columns. Vectors are grids in C order.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage, sparse

from convatlas.errors import DataError
from convatlas.files import atomic_path

__all__ = [
    "GridSystem",
    "find_systems",
    "random_system",
    "read_binary_matrix",
    "read_binary_vector",
    "read_npz_system",
    "write_binary_matrix",
    "write_binary_vector",
    "write_npz_system",
]

Array = npt.NDArray[Any]

_HEADER = 5
#: Standard deviation of the rough part of a random right-hand side, that of the smooth one being 1.
_ROUGH = 0.3
#: Names of arrays in NPZ files, the usual one first.
_KEYS = {
    "b": ("b", "rhs"),
    "fluid": ("fluid", "mask"),
    "air": ("air",),
    "x0": ("x0",),
    "boundary": ("boundary",),
    "shape": ("grid", "shape"),
}


@dataclass(frozen=True, eq=False)
class GridSystem:
    """A x = b on a grid.

    Attributes:
        name: of the file.
        b: right-hand side (*shape), float64.
        fluid: which cells are fluid, bool (*shape).
        air: which cells are air, bool (*shape), None where ``matrix`` is given; all others are solid.
        boundary: ``dirichlet``, ``neumann``, or a pair for each axis; what lies beyond the box.
        matrix: scipy CSR array (n, n), where the system is not told by its cells.
        x0: start (*shape), if there is one.
    """

    name: str
    b: Array
    fluid: Array
    air: Array | None = None
    boundary: str | tuple[tuple[str, str], ...] = "dirichlet"
    matrix: Any = None
    x0: Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Cells along each axis."""
        return tuple(int(size) for size in self.b.shape)


def random_system(shape: Sequence[int], seed: int, *, hole: bool = False) -> GridSystem:
    """A box of fluid with a right-hand side that is partly smooth and partly rough, of norm 1.

    Args:
        shape: cells, two or three sizes.
        seed: of the right-hand side.
        hole: whether a solid ball, of a third of the shortest side, stands off the middle.
    """
    shape = tuple(shape)
    random = np.random.default_rng(seed)
    coarse = random.standard_normal([4] * len(shape))
    smooth = ndimage.zoom(coarse, [size / 4 for size in shape], order=3, mode="nearest", grid_mode=True)
    b = smooth / smooth.std() + _ROUGH * random.standard_normal(shape)
    fluid = np.ones(shape, np.bool_)
    if hole:
        points = np.stack(np.meshgrid(*(np.arange(size) + 0.5 for size in shape), indexing="ij"), -1)
        middle = np.array([0.5 * size for size in shape[:-1]] + [0.4 * shape[-1]])
        fluid = np.linalg.norm(points - middle, axis=-1) > min(shape) / 6
        b *= fluid
    name = f"{'hole' if hole else 'box'}_{'x'.join(map(str, shape))}_{seed}"
    return GridSystem(name, b / np.linalg.norm(b), fluid, np.zeros(shape, np.bool_))


# NPZ


def read_npz_system(path: str | Path) -> GridSystem:
    """Read one system from an ``.npz`` file.

    It holds ``b`` (or ``rhs``), a grid, with ``mask`` (or ``fluid``), the fluid cells, and where they are needed
    ``air``, ``boundary`` and ``x0``. Or it holds a matrix as `scipy.sparse.save_npz` writes it (CSR) beside ``b``, with
    ``grid``, the sizes of the grid, unless that is b's shape or a cube. Nothing pickled is read.

    Raises:
        DataError: the file is damaged, lacks something, or its arrays do not fit.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            held = {key: file[key] for key in file.files}
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error, AttributeError) as error:
        raise DataError(f"{path} cannot be read as an .npz file of plain arrays: {error}") from None
    arrays = {name: next((held[key] for key in keys if key in held), None) for name, keys in _KEYS.items()}
    if arrays["b"] is None:
        raise DataError(f"{path} must hold b, the right-hand side; it holds {', '.join(held) or 'nothing'}")
    matrix = _matrix_of(path, held) if {"data", "indices", "indptr"} <= held.keys() else None
    shape = arrays["shape"] if "grid" in held or matrix is None else None
    b = _on_grid(arrays["b"], None if shape is None else tuple(map(int, shape)), matrix is not None, f"{path}: b")
    masks = {name: _mask(arrays[name], b.shape, f"{path}: {name}") for name in ("fluid", "air")}
    if matrix is not None:
        if matrix.shape != (b.size, b.size):
            raise DataError(
                f"{path}: the matrix must be {b.size} x {b.size}, got {matrix.shape[0]} x {matrix.shape[1]}"
            )
        fluid = matrix.diagonal().reshape(b.shape) != 0
        system = GridSystem(path.stem, b, fluid, matrix=matrix, x0=_start(arrays["x0"], b, path))
    else:
        air = np.zeros(b.shape, np.bool_) if masks["air"] is None else masks["air"]
        fluid = ~air if masks["fluid"] is None else masks["fluid"]
        if (fluid & air).any():
            raise DataError(f"{path}: fluid and air share {int((fluid & air).sum())} cells")
        boundary = _boundary(arrays["boundary"], b.ndim, path)
        system = GridSystem(path.stem, b, fluid, air, boundary, x0=_start(arrays["x0"], b, path))
    return system


def write_npz_system(path: str | Path, system: GridSystem) -> Path:
    """Write a system as `read_npz_system` reads it."""
    path = Path(path)
    arrays: dict[str, Any] = {"b": system.b}
    if system.matrix is not None:
        csr = sparse.csr_array(system.matrix)
        arrays |= {"data": csr.data, "indices": csr.indices, "indptr": csr.indptr, "grid": np.array(system.shape)}
    else:
        arrays |= {"mask": system.fluid, "boundary": np.array(system.boundary)}
        arrays |= {} if system.air is None else {"air": system.air}
    arrays |= {} if system.x0 is None else {"x0": system.x0}
    with atomic_path(path) as part, open(part, "wb") as file:
        np.savez_compressed(file, **arrays)
    return path


def _matrix_of(path: Path, held: dict[str, Array]) -> Any:
    kind = held.get("format")
    if kind is not None and bytes(np.asarray(kind).reshape(-1)[0]) != b"csr":
        raise DataError(f"{path} must hold its matrix as CSR")
    rows = len(held["indptr"]) - 1
    try:
        matrix = sparse.csr_array((held["data"], held["indices"], held["indptr"]), shape=(rows, rows))
        matrix.check_format(full_check=True)
    except (ValueError, IndexError) as error:
        raise DataError(f"{path}: the matrix is damaged: {error}") from None
    return matrix.astype(np.float64)


def _on_grid(b: Array, shape: tuple[int, ...] | None, guess: bool, what: str) -> Array:
    if b.dtype.kind not in "iuf":
        raise DataError(f"{what} must hold real numbers, got {b.dtype}")
    if not np.isfinite(b).all():
        raise DataError(f"{what} holds NaN or infinite values")
    if b.ndim == 1 and shape is None and guess:
        shape = _cube(b.size, what)
    if shape is not None:
        if int(np.prod(shape)) != b.size:
            raise DataError(f"{what} must have the values of the grid {shape}, got {b.shape}")
        b = b.reshape(shape)
    if b.ndim not in (2, 3):
        raise DataError(f"{what} must be a grid (H, W) or (D, H, W), got {b.shape}")
    return np.ascontiguousarray(b, dtype=np.float64)


def _cube(size: int, what: str) -> tuple[int, int, int]:
    side = round(size ** (1 / 3))
    if side**3 != size:
        raise DataError(f"{what} must have as many values as a cube has cells, got {size}; give the sizes as grid")
    return side, side, side


def _mask(mask: Array | None, shape: tuple[int, ...], what: str) -> Array | None:
    if mask is None:
        return None
    if mask.shape != shape:
        raise DataError(f"{what} must be {shape}, got {mask.shape}")
    return mask.astype(np.bool_)


def _start(x0: Array | None, b: Array, path: Path) -> Array | None:
    if x0 is None:
        return None
    if x0.size != b.size or x0.dtype.kind not in "iuf":
        raise DataError(f"{path}: x0 must have the values of b, got {x0.dtype} {x0.shape}")
    return x0.reshape(b.shape).astype(np.float64)


def _boundary(given: Array | None, dims: int, path: Path) -> str | tuple[tuple[str, str], ...]:
    if given is None:
        return "dirichlet"
    if given.dtype.kind != "U" or given.shape not in ((), (dims, 2)):
        raise DataError(f"{path}: boundary must be one word or a pair for each axis, got {given.dtype} {given.shape}")
    if bad := set(given.reshape(-1).tolist()) - {"dirichlet", "neumann"}:
        raise DataError(f"{path}: boundary must be dirichlet or neumann, got {', '.join(sorted(bad))}")
    return str(given) if not given.shape else tuple((str(low), str(high)) for low, high in given)


# The published binary format


def read_binary_vector(path: str | Path) -> Array:
    """Read a right-hand side (n,), float64.

    Raises:
        DataError: the file is no such vector.
    """
    path = Path(path)
    size = path.stat().st_size
    if size < 16 or size % 8:
        raise DataError(f"{path} must hold float64 values behind a length, it has {size} bytes")
    vector = np.fromfile(path, "<f8")[1:]
    if not np.isfinite(vector).all():
        raise DataError(f"{path} holds NaN or infinite values")
    return vector


def read_binary_matrix(path: str | Path) -> Any:
    """Read a matrix as a scipy CSR array (n, n) in float64.

    Raises:
        DataError: the file is no such matrix.
    """
    path = Path(path)
    if (layout := _matrix_layout(path)) is None:
        raise DataError(f"{path} is no matrix of the published format: its size does not follow from its header")
    rows, columns, entries = layout
    with open(path, "rb") as file:
        file.seek(4 * _HEADER)
        values = np.fromfile(file, "<f4", entries)
        starts = np.fromfile(file, "<i4", rows)
        indices = np.fromfile(file, "<i4", entries)
    try:
        matrix = sparse.csr_array((values, indices, np.append(starts, entries)), shape=(rows, columns))
        matrix.check_format(full_check=True)
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}") from None
    return matrix.astype(np.float64)


def _matrix_layout(path: Path) -> tuple[int, int, int] | None:
    """Rows, columns and entries, if the file is a matrix."""
    header = np.fromfile(path, "<i4", _HEADER)
    if len(header) < _HEADER:
        return None
    rows, columns, entries, outer, _ = map(int, header)
    expected = 4 * (_HEADER + 2 * entries + rows)
    sound = 0 < rows == columns == outer and entries >= 0
    return (rows, columns, entries) if sound and path.stat().st_size == expected else None


def write_binary_vector(path: str | Path, vector: Array) -> Path:
    """Write a right-hand side; the length stands before it as an integer of eight bytes."""
    path = Path(path)
    with atomic_path(path) as part, open(part, "wb") as file:
        np.array([vector.size], "<i8").tofile(file)
        np.asarray(vector, "<f8").reshape(-1).tofile(file)
    return path


def write_binary_matrix(path: str | Path, matrix: Any) -> Path:
    """Write a sparse matrix; its entries become float32."""
    path = Path(path)
    csr = sparse.csr_array(matrix)
    csr.sort_indices()
    rows, columns = csr.shape
    with atomic_path(path) as part, open(part, "wb") as file:
        np.array([rows, columns, csr.nnz, rows, columns], "<i4").tofile(file)
        csr.data.astype("<f4").tofile(file)
        csr.indptr[:-1].astype("<i4").tofile(file)
        csr.indices.astype("<i4").tofile(file)
    return path


# Files and folders


def find_systems(inputs: Sequence[str | Path]) -> list[GridSystem]:
    """Read systems: ``.npz`` files, folders of them, and folders with matrices and right-hand sides as ``.bin`` files.

    In a folder, a right-hand side belongs to the matrix with the same number at the end of its name, or to the only
    matrix. Two files that are given together, a matrix and a right-hand side, are a system too.

    Raises:
        DataError: an input does not exist or cannot be read, or a right-hand side has no matrix.
    """
    systems: list[GridSystem] = []
    loose: list[Path] = []
    for given in map(Path, inputs):
        if not given.exists():
            raise DataError(f"{given} does not exist")
        files = sorted(given.iterdir()) if given.is_dir() else [given]
        systems += [read_npz_system(file) for file in files if file.suffix == ".npz"]
        binary = [file for file in files if file.suffix == ".bin"]
        if given.is_dir():
            systems += _binary_systems(binary)
        elif binary:
            loose += binary
        elif given.suffix != ".npz":
            raise DataError(f"{given} must be an .npz or .bin file, or a folder of them")
    systems += _binary_systems(loose)
    if not systems:
        raise DataError(f"there is no system in {', '.join(map(str, inputs)) or 'nothing'}")
    return systems


def _binary_systems(files: Sequence[Path]) -> list[GridSystem]:
    matrices = [file for file in files if _matrix_layout(file) is not None]
    systems = []
    held: dict[Path, Any] = {}
    for file in (file for file in files if file not in matrices):
        number = _number(file)
        own = [matrix for matrix in matrices if _number(matrix) == number] if len(matrices) > 1 else matrices
        if len(own) != 1:
            raise DataError(f"{file} needs one matrix with its number, there are {len(own)} among {len(matrices)}")
        matrix = held.setdefault(own[0], None)
        if matrix is None:
            matrix = held[own[0]] = read_binary_matrix(own[0])
        b = _on_grid(read_binary_vector(file), None, True, str(file))
        if matrix.shape[0] != b.size:
            raise DataError(f"{file} must have {matrix.shape[0]} values for {own[0].name}, got {b.size}")
        systems.append(GridSystem(file.stem, b, matrix.diagonal().reshape(b.shape) != 0, matrix=matrix))
    return systems


def _number(path: Path) -> str:
    found = re.search(r"(\d+)$", path.stem)
    return found[1] if found else ""
