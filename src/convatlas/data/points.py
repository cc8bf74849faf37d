"""Point clouds from files: OFF, PLY, BIN of LiDARs, text and NPZ; and coloured PLY files to look at."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from convatlas.data.image_files import Unreadable
from convatlas.files import atomic_path

__all__ = ["SUFFIXES", "Cloud", "read_cloud", "sample_surface", "write_ply"]

Floats = npt.NDArray[np.float32]

#: Points that a mesh becomes, as many as the resampled ModelNet has.
SURFACE_POINTS = 10_000
_PLY_TYPES = {
    **{"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "float": "f4"},
    **{"int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4", "float32": "f4"},
    **{"double": "f8", "float64": "f8"},
}
_LABELS = ("label", "labels", "class", "segment", "scalar_label", "scalar_Label")
_COORDINATES = ("coordinates", "coord", "points", "xyz", "pos")
_FEATURES = ("features", "feat", "normals", "normal", "intensity", "strength", "colors", "color")


@dataclass(frozen=True, eq=False)
class Cloud:
    """A cloud of points.

    Attributes:
        coordinates: (N, 3) float32.
        features: (N, F) float32: normals, intensity, colours from 0 to 1, or none.
        labels: (N,) int64, the class of each point from 0 and -1 where it is unknown, or None.
    """

    coordinates: Floats
    features: Floats
    labels: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.coordinates)

    @property
    def has_normals(self) -> bool:
        """Whether the first three features are normals: all of length 1, or almost."""
        lengths = np.linalg.norm(self.features[:100, :3], axis=1)
        return self.features.shape[1] >= 3 and len(lengths) > 0 and bool((np.abs(lengths - 1) < 0.02).all())

    def rows(self, chosen: npt.NDArray[Any]) -> Cloud:
        """Some of the points."""
        labels = None if self.labels is None else self.labels[chosen]
        return Cloud(self.coordinates[chosen], self.features[chosen], labels)


def read_cloud(path: str | Path, *, name: str = "") -> Cloud:
    """Read one file; points that are not finite are left out.

    - ``.off``: a mesh, of whose surface 10,000 points are drawn, always the same ones, with normals.
    - ``.ply``: vertices with x, y, z; all other numbers of a vertex are features, but for its label.
    - ``.bin``: x, y, z, intensity in float32, as KITTI has them; beside it labels in a ``.label`` file.
    - ``.txt``, ``.xyz``, ``.pts``, ``.csv``: a point a line, coordinates first.
    - ``.npz``: ``coordinates`` (also coord, points, xyz), ``features`` (normals, intensity, colors), ``labels``.

    Args:
        path: of the file.
        name: what to call it in errors.

    Raises:
        Unreadable: the file is no such file, damaged, or holds no point.
    """
    path = Path(path)
    name = name or str(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise Unreadable(name, f"expected {', '.join(_READERS)}")
    try:
        cloud = reader(path)
    except Unreadable as error:
        raise Unreadable(name, error.reason) from None
    except (OSError, ValueError, KeyError, IndexError, UnicodeDecodeError) as error:
        raise Unreadable(name, " ".join(str(error).split())) from None
    finite = np.asarray(np.isfinite(cloud.coordinates).all(1) & np.isfinite(cloud.features).all(1))
    cloud = cloud if finite.all() else cloud.rows(finite)
    if not len(cloud):
        raise Unreadable(name, "it holds no point")
    return cloud


def sample_surface(vertices: Floats, faces: npt.NDArray[np.int64], count: int, seed: int = 0) -> Cloud:
    """Draw points uniformly from the surface of a mesh, with the normals of their triangles.

    Args:
        vertices: (V, 3).
        faces: (T, 3) rows of vertices.
        count: points to draw.
        seed: of the draw.

    Raises:
        ValueError: the mesh has no surface.
    """
    corners = vertices[faces].astype(np.float64)
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    areas = np.linalg.norm(normals, axis=1)
    if not areas.sum() > 0:
        raise ValueError("the mesh has no surface")
    generator = np.random.default_rng(seed)
    chosen = generator.choice(len(faces), count, p=areas / areas.sum())
    a, b = generator.random((2, count, 1))
    a, b = np.where(a + b > 1, 1 - a, a), np.where(a + b > 1, 1 - b, b)
    base = corners[chosen]
    points = base[:, 0] + a * (base[:, 1] - base[:, 0]) + b * (base[:, 2] - base[:, 0])
    units = normals[chosen] / areas[chosen, None]
    return Cloud(points.astype(np.float32), units.astype(np.float32))


def _columns(table: npt.NDArray[Any]) -> Cloud:
    """Coordinates in the first three columns, features in the others."""
    if table.ndim != 2 or table.shape[1] < 3:
        raise ValueError(f"expected at least three numbers a point, got an array of {table.shape}")
    with np.errstate(over="ignore"):
        table = np.ascontiguousarray(table, dtype=np.float32)
    return Cloud(table[:, :3], table[:, 3:])


def _read_off(path: Path) -> Cloud:
    words = [line.partition("#")[0] for line in path.read_text(encoding="ascii").splitlines()]
    text = " ".join(words).split()
    if not text or not text[0].startswith("OFF"):
        raise ValueError("it does not begin with OFF")
    # Some files of ModelNet have the first number right behind the word.
    text = [text[0][3:], *text[1:]] if text[0] != "OFF" else text[1:]
    vertices, faces = int(text[0]), int(text[1])
    table = np.array(text[3 : 3 + 3 * vertices], dtype=np.float64).reshape(vertices, 3).astype(np.float32)
    triangles: list[tuple[int, int, int]] = []
    at = 3 + 3 * vertices
    for _ in range(faces):
        corners = [int(word) for word in text[at + 1 : at + 1 + int(text[at])]]
        triangles += [(corners[0], second, third) for second, third in pairwise(corners[1:])]
        at += 1 + int(text[at])
    if not triangles:
        return _columns(table)
    return sample_surface(table, np.array(triangles, dtype=np.int64), SURFACE_POINTS)


def _read_ply(path: Path) -> Cloud:
    data = path.read_bytes()
    end = data.find(b"end_header")
    if not data.startswith(b"ply") or end < 0:
        raise ValueError("it is no PLY file")
    start = data.index(b"\n", end) + 1
    form, element, count = "", "", 0
    properties: list[tuple[str, str]] = []
    for line in data[:end].decode("ascii", "replace").splitlines():
        match line.split():
            case ["format", form, *_]:
                pass
            case ["element", element, number]:
                if element == "vertex":
                    count = int(number)
                elif not count:
                    raise ValueError(f"vertices must come before the element {element!r}")
            case ["property", "list", *_] if element == "vertex":
                raise ValueError("a vertex must not hold lists")
            case ["property", kind, label] if element == "vertex":
                properties.append((label, _PLY_TYPES[kind]))
    order = {"binary_little_endian": "<", "binary_big_endian": ">", "ascii": "="}
    if form not in order:
        raise ValueError(f"the format is {form or 'missing'}; expected {', '.join(order)}")
    fields = np.dtype([(label, order[form] + kind) for label, kind in properties])
    if form == "ascii":
        lines = data[start:].decode("ascii").splitlines()[:count]
        rows = np.array([tuple(line.split()[: len(properties)]) for line in lines], dtype=object)
        columns = {label: rows[:, index].astype(np.float64) for index, (label, _) in enumerate(properties)}
    else:
        table = np.frombuffer(data, fields, count, start)
        columns = {label: table[label].astype(np.float64) for label, _ in properties}
    coordinates = np.stack([columns.pop(axis) for axis in ("x", "y", "z")], 1)
    found = [columns.pop(label) for label in _LABELS if label in columns]
    kinds = dict(properties)
    scaled = [values / 255 if kinds[label].endswith("u1") else values for label, values in columns.items()]
    features = np.stack(scaled, 1) if scaled else np.empty((count, 0))
    labels = found[0].astype(np.int64) if found else None
    return Cloud(coordinates.astype(np.float32), features.astype(np.float32), labels)


def _read_bin(path: Path) -> Cloud:
    numbers = np.fromfile(path, "<f4")
    if len(numbers) % 4:
        raise ValueError(f"expected four numbers a point, got {len(numbers)} in all")
    cloud = _columns(numbers.reshape(-1, 4))
    beside = path.with_suffix(".label")
    if not beside.is_file():
        return cloud
    # The upper half counts the things of one class.
    labels = (np.fromfile(beside, "<u4") & 0xFFFF).astype(np.int64)
    if len(labels) != len(cloud):
        raise ValueError(f"{beside.name} has {len(labels)} labels for {len(cloud)} points")
    return Cloud(cloud.coordinates, cloud.features, labels)


def _read_text(path: Path) -> Cloud:
    with path.open(encoding="utf-8") as file:
        first = file.readline()
    header = not _is_number(first.replace(",", " ").split()[0]) if first.split() else False
    return _columns(
        np.loadtxt(path, delimiter="," if "," in first else None, skiprows=int(header), dtype=np.float64, ndmin=2)
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _read_npz(path: Path) -> Cloud:
    if not zipfile.is_zipfile(path):
        raise ValueError("it is no NPZ file")
    with np.load(path, allow_pickle=False) as file:
        held = {key.lower(): file[key] for key in file.files}
    name = next((key for key in _COORDINATES if key in held), None)
    if name is None:
        raise ValueError(f"it has none of {', '.join(_COORDINATES)}")
    first = _columns(held[name])
    more = [held[key].reshape(len(first), -1).astype(np.float32) for key in _FEATURES if key in held]
    features = np.concatenate([first.features, *more], 1)
    found = [held[key].reshape(-1) for key in _LABELS if key in held]
    if found and len(found[0]) != len(first):
        raise ValueError(f"it has {len(found[0])} labels for {len(first)} points")
    return Cloud(first.coordinates, features, found[0].astype(np.int64) if found else None)


_READERS: dict[str, Callable[[Path], Cloud]] = {
    ".off": _read_off,
    ".ply": _read_ply,
    ".bin": _read_bin,
    ".npz": _read_npz,
    **dict.fromkeys((".txt", ".xyz", ".pts", ".csv"), _read_text),
}
#: File names of clouds end so.
SUFFIXES = tuple(_READERS)


def write_ply(
    path: str | Path, coordinates: Floats, colours: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64] | None = None
) -> None:
    """Write points (N, 3) with colours (N, 3) from 0 to 255, and labels (N,), as a binary PLY file."""
    fields = [(axis, "<f4") for axis in ("x", "y", "z")] + [(name, "u1") for name in ("red", "green", "blue")]
    names = {"<f4": "float", "u1": "uchar", "<i4": "int"}
    fields += [("label", "<i4")] if labels is not None else []
    table = np.empty(len(coordinates), np.dtype(fields))
    for index, axis in enumerate(("x", "y", "z")):
        table[axis] = coordinates[:, index]
    for index, name in enumerate(("red", "green", "blue")):
        table[name] = colours[:, index]
    if labels is not None:
        table["label"] = labels
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {len(table)}"]
    lines += [f"property {names[kind]} {label}" for label, kind in fields]
    with atomic_path(Path(path)) as part:
        part.write_bytes(("\n".join([*lines, "end_header"]) + "\n").encode("ascii") + table.tobytes())
