"""Long and short exposures of scenes, with the colour of their light where it is known.

A scene is a folder with ``long`` and ``short`` (PNG, TIFF, ``.npy`` or ``.npz``) and, where there is more to tell,
``meta.json``: ``illuminant`` [r, g, b], ``exposure_times`` [long, short] or ``exposure_ratio``, ``black``, ``white``,
``charts`` (boxes [x, y, width, height] of colour charts, which are left out); a picture ``mask`` is not black where the
image is left out. Single linear frames with known light serve as well: both exposures are then simulated from a frame.
"""

from __future__ import annotations

import csv
import json
import math
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from convatlas.data.image_files import Unreadable, decode, subfolders
from convatlas.data.images import Skipped
from convatlas.data.linear_images import LINEAR_SUFFIXES, Levels, LinearImage, read_linear_image
from convatlas.data.pictures import Picture, write_picture
from convatlas.data.png16 import write_png16
from convatlas.data.simulators.exposures import Camera, expose, illuminant_exposures
from convatlas.errors import DataError
from convatlas.files import write_bytes, write_text

__all__ = [
    "ExposureEntry",
    "ExposurePair",
    "ExposureSet",
    "exposure_files",
    "read_exposure_pairs",
    "scene",
    "write_scene",
]

Array = npt.NDArray[Any]

_ROLES = ("long", "short")
_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
#: Names of the light's colour in the files of published sets.
_ILLUMINANT = ("illuminant", "illuminant_color_raw", "gt_ill")
#: Scenes of the built-in simulation, and their size.
_SIMULATED, _SIZE = 400, (48, 64)
_TABLE = "illuminants.csv"


@dataclass(frozen=True, eq=False)
class ExposurePair:
    """Two exposures of a scene.

    Attributes:
        name: of the scene.
        long, short: of one size; the short one is None where there is only one frame.
        illuminant: colour of the light, (3,), of unit length, or None.
        ratio: exposure of the long frame over that of the short one, or None.
        mask: (H, W) bool, True where a pixel counts, or None.
    """

    name: str
    long: LinearImage
    short: LinearImage | None = None
    illuminant: Array | None = None
    ratio: float | None = None
    mask: Array | None = None

    def reduced(self, longest: int) -> tuple[Array, Array | None, Array | None]:
        """Both exposures at most so many pixels long, (H, W, 3) float32, and where they count, (H, W) bool."""
        long = self.long.reduced(longest)
        short = None if self.short is None else self.short.reduced(longest)
        if self.mask is None:
            return long, short, None
        counted = LinearImage(np.repeat(self.mask[..., None].astype(np.float32), 3, 2)).reduced(longest)
        return long, short, counted[..., 0] >= 1  # no part of a chart


@dataclass(frozen=True, eq=False)
class ExposureEntry:
    """One scene that is read when asked for; ``read`` raises `Unreadable` where that fails."""

    name: str
    read: Callable[[], ExposurePair]


@dataclass(frozen=True, eq=False)
class ExposureSet:
    """Scenes of one split, and what was left out with the reasons."""

    entries: tuple[ExposureEntry, ...]
    skipped: tuple[Skipped, ...] = ()

    def __len__(self) -> int:
        return len(self.entries)

    def subset(self, rows: Sequence[int]) -> ExposureSet:
        """The entries at some places; ``skipped`` stays that of the whole."""
        return ExposureSet(tuple(self.entries[row] for row in rows), self.skipped)


def read_exposure_pairs(
    source: str | Path, levels: Levels | None = None, camera: Camera | None = None
) -> dict[str, ExposureSet]:
    """Find the scenes of a source, as sets by split: {"all": ...} or e.g. {"train": ..., "test": ...}.

    Sources:
        ``"simulated"``: 400 made-up scenes of 48 x 64 pixels;
        a folder with a folder for each scene, at any depth (see above);
        a folder of single linear frames, each with ``NAME_metadata.json`` or ``NAME.json`` that holds ``illuminant``
        (``illuminant_color_raw``, ``gt_ill``), or with one table ``illuminants.csv`` of columns file, r, g, b;
        a folder with ``train``, ``val`` and ``test`` of these;
        an ``.npz`` file with ``long`` and ``short`` (N, H, W, 3), ``illuminant`` (N, 3) and ``exposure_ratio`` (N), the
        last two if known.

    Args:
        source: what to read.
        levels: black, white and encoding; what a scene's own ``meta.json`` says comes first.
        camera: how exposures are simulated where they are.

    Raises:
        DataError: there is nothing at ``source`` or nothing that can be used.
    """
    levels, camera = levels or Levels(), camera or Camera()
    if str(source) == "simulated":
        entries = [ExposureEntry(f"{seed:03d}", partial(_simulated, seed, camera)) for seed in range(_SIMULATED)]
        return {"all": ExposureSet(tuple(entries))}
    path = Path(source)
    if not path.exists():
        raise DataError(f"{source} does not exist; expected a folder of scenes, an .npz file, or 'simulated'")
    try:
        if path.is_file():
            return {"all": _arrays(path, levels)}
        tops = subfolders(path)
        named = {_SPLITS[folder.name.lower()]: folder for folder in tops if folder.name.lower() in _SPLITS}
        if "train" in named or (named and len(named) == len(tops)):
            return {split: _folder(folder, path, levels, camera) for split, folder in named.items()}
        return {"all": _folder(path, path, levels, camera)}
    except OSError as error:
        raise DataError(f"{error.filename or source} cannot be read: {error.strerror or error}") from None


def exposure_files(inputs: Iterable[str | Path], levels: Levels) -> ExposureSet:
    """A user's scenes: folders of scenes, two files (the long and the short exposure), or single frames.

    Raises:
        DataError: an input does not exist or holds no scene.
    """
    given = [Path(each) for each in inputs]
    files = [path for path in given if not path.is_dir()]
    for path in files:
        if not path.exists():
            raise DataError(f"{path} does not exist; expected a long and a short exposure, or folders of scenes")
    entries: list[ExposureEntry] = []
    skipped: list[Skipped] = []
    if len(files) == 2:
        label = " and ".join(map(str, files))
        entries.append(ExposureEntry(files[0].stem, partial(_two_files, files[0], files[1], label, levels)))
    elif files:
        entries += [ExposureEntry(path.stem, partial(_one_file, path, levels)) for path in files]
    for folder in (path for path in given if path.is_dir()):
        found = _scenes(folder, folder, levels)
        entries += found.entries
        skipped += found.skipped
        if not found.entries:
            frames = [path for path in sorted(folder.iterdir()) if _is_image(path)]
            entries += [ExposureEntry(path.stem, partial(_one_file, path, levels)) for path in frames]
    if not entries:
        raise DataError(f"there is no scene in {', '.join(map(str, given)) or 'nothing'}")
    return ExposureSet(tuple(entries), tuple(skipped))


# -- scenes ------------------------------------------------------------------------------------------------------------


def _folder(folder: Path, root: Path, levels: Levels, camera: Camera) -> ExposureSet:
    found = _scenes(folder, root, levels)
    if found.entries:
        return found
    frames = _frames(folder, root, levels, camera)
    if not frames.entries:
        raise DataError(
            f"{folder} holds no scenes: expected folders with 'long' and 'short', or frames with the colour of "
            "their light"
        )
    return frames


def _scenes(folder: Path, root: Path, levels: Levels) -> ExposureSet:
    """The scenes at any depth below a folder, which may be one itself."""
    entries: list[ExposureEntry] = []
    skipped: list[Skipped] = []
    for place in [folder, *sorted(path for path in folder.rglob("*") if path.is_dir())]:
        roles = {role: [path for path in sorted(place.glob(f"{role}.*")) if _is_image(path)] for role in _ROLES}
        name = place.relative_to(root).as_posix() if place != root else place.name
        if all(roles.values()):
            entries.append(ExposureEntry(name, partial(scene, place, levels, name)))
        elif any(roles.values()):
            missing = next(role for role, paths in roles.items() if not paths)
            skipped.append(Skipped(name, f"it has no {missing} exposure"))
    return ExposureSet(tuple(entries), tuple(skipped))


def scene(folder: str | Path, levels: Levels | None = None, name: str | None = None) -> ExposurePair:
    """Read the folder of one scene.

    Raises:
        Unreadable: a file is missing, damaged or does not fit.
    """
    folder = Path(folder)
    label = folder.name if name is None else name
    meta = _meta(folder / "meta.json", label)
    levels = _levels(meta, levels or Levels(), label)
    paths = {role: [path for path in sorted(folder.glob(f"{role}.*")) if _is_image(path)] for role in _ROLES}
    for role, found in paths.items():
        if not found:
            raise Unreadable(label, f"it has no {role} exposure")
    long, short = (read_linear_image(paths[role][0], levels, name=f"{label}, {role}") for role in _ROLES)
    mask = _mask(folder, meta, long.size, label)
    pair = ExposurePair(label, long, short, _light(meta, label), _ratio(meta, label), mask)
    _check_pair(pair)
    return pair


def _check_pair(pair: ExposurePair) -> None:
    if pair.short is None:
        return
    if pair.long.pixels.shape != pair.short.pixels.shape:
        sizes = f"{pair.long.pixels.shape} and {pair.short.pixels.shape}"
        raise Unreadable(pair.name, f"long and short must have the same size, got {sizes}")
    if float(pair.long.pixels.mean()) < float(pair.short.pixels.mean()):
        raise Unreadable(pair.name, "long exposure is darker than short: they seem to be swapped")


def _two_files(long: Path, short: Path, name: str, levels: Levels) -> ExposurePair:
    images = [read_linear_image(path, levels) for path in (long, short)]
    pair = ExposurePair(name, images[0], images[1])
    _check_pair(pair)
    return pair


def _one_file(path: Path, levels: Levels) -> ExposurePair:
    return ExposurePair(path.name, read_linear_image(path, levels))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in LINEAR_SUFFIXES and not path.name.startswith(".") and path.is_file()


def _meta(path: Path, name: str) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Unreadable(name, f"{path.name} is not valid JSON: {error}") from None
    if not isinstance(meta, dict):
        raise Unreadable(name, f"{path.name} must hold names and values, got a {type(meta).__name__}")
    return meta


def _levels(meta: Mapping[str, Any], levels: Levels, name: str) -> Levels:
    found: dict[str, Any] = {key: meta[key] for key in ("black", "white", "srgb") if meta.get(key) is not None}
    if isinstance(found.get("black"), list):
        found["black"] = tuple(found["black"])
    try:
        return replace(levels, **found)
    except (ValueError, TypeError) as error:
        raise Unreadable(name, str(error)) from None


def _light(meta: Mapping[str, Any], name: str) -> Array | None:
    given = next((meta[key] for key in _ILLUMINANT if meta.get(key) is not None), None)
    return None if given is None else _unit(given, name)


def _unit(given: Any, name: str) -> Array:
    try:
        rgb = np.asarray(given, np.float64).reshape(-1)
    except (ValueError, TypeError):
        rgb = np.empty(0)
    if rgb.shape != (3,) or not (np.isfinite(rgb).all() and (rgb > 0).all()):
        raise Unreadable(name, f"illuminant must be three numbers above 0, got {given}")
    return rgb / np.linalg.norm(rgb)


def _ratio(meta: Mapping[str, Any], name: str) -> float | None:
    try:
        if meta.get("exposure_ratio") is not None:
            ratio = float(meta["exposure_ratio"])
        elif meta.get("exposure_times") is not None:
            long, short = meta["exposure_times"]
            ratio = float(long) / float(short)
        else:
            return None
    except (TypeError, ValueError, ZeroDivisionError):
        raise Unreadable(
            name, f"exposure_times must be two numbers above 0, got {meta.get('exposure_times')}"
        ) from None
    if not 1 < ratio < math.inf:
        raise Unreadable(name, f"the long exposure must be longer than the short one, got a ratio of {ratio:g}")
    return ratio


def _mask(folder: Path, meta: Mapping[str, Any], size: tuple[int, int], name: str) -> Array | None:
    counted = np.ones(size, bool)
    for path in sorted(folder.glob("mask.*")):
        left_out = decode(path, 1, name=f"{name}, mask")[..., 0] > 0
        if left_out.shape != size:
            raise Unreadable(name, f"mask must have the size {size}, got {left_out.shape}")
        counted &= ~left_out
    for box in meta.get("charts") or ():
        try:
            x, y, width, height = (int(value) for value in box)
        except (TypeError, ValueError):
            raise Unreadable(name, f"charts must be boxes [x, y, width, height], got {box}") from None
        counted[max(0, y) : max(0, y + height), max(0, x) : max(0, x + width)] = False
    return None if counted.all() else counted


# -- single frames, simulation, arrays ---------------------------------------------------------------------------------


def _simulated(seed: int, camera: Camera) -> ExposurePair:
    made = illuminant_exposures(seed, _SIZE, camera)
    return ExposurePair(f"{seed:03d}", LinearImage(made.long), LinearImage(made.short), made.illuminant, made.ratio)


def _frames(folder: Path, root: Path, levels: Levels, camera: Camera) -> ExposureSet:
    table = _table(folder / _TABLE)
    entries: list[ExposureEntry] = []
    skipped: list[Skipped] = []
    for path in sorted(path for path in folder.rglob("*") if _is_image(path)):
        name = path.relative_to(root).as_posix()
        notes = [path.with_name(f"{path.stem}_metadata.json"), path.with_suffix(".json")]
        note = next((each for each in notes if each.is_file()), None)
        if note is None and path.name not in table:
            skipped.append(Skipped(name, "the colour of its light is not told"))
            continue
        light = table.get(path.name)
        entries.append(ExposureEntry(name, partial(_split_frame, path, name, note, light, levels, camera)))
    return ExposureSet(tuple(entries), tuple(skipped))


def _split_frame(
    path: Path, name: str, note: Path | None, light: Sequence[str] | None, levels: Levels, camera: Camera
) -> ExposurePair:
    """Both exposures simulated from one frame, in a way that follows from its name."""
    meta = {} if note is None else _meta(note, name)
    image = read_linear_image(path, _levels(meta, levels, name), name=name)
    illuminant = _light(meta, name) if light is None else _unit(light, name)
    if illuminant is None:
        raise Unreadable(name, "the colour of its light is not told")
    random = np.random.default_rng(zlib.crc32(name.encode("utf-8", "surrogateescape")))
    made = expose(image.array(), illuminant, camera, random, clean=False)
    return ExposurePair(name, LinearImage(made.long), LinearImage(made.short), made.illuminant, made.ratio)


def _table(path: Path) -> dict[str, Sequence[str]]:
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if row]
    if rows and any(len(row) != 4 for row in rows):
        raise DataError(f"{path} must have the columns file, r, g, b")
    return {row[0]: row[1:] for row in rows if row[1:] != ["r", "g", "b"]}


def _arrays(path: Path, levels: Levels) -> ExposureSet:
    if path.suffix.lower() != ".npz":
        raise DataError(f"{path} must be a folder or an .npz file with long, short and illuminant")
    try:
        with np.load(path, allow_pickle=False) as held:
            columns = {name: held[name] for name in held.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if not {"long", "short"} <= columns.keys():
        raise DataError(f"{path} must hold long and short, got {', '.join(columns) or 'nothing'}")
    count = len(columns["long"])
    if any(len(column) != count for column in columns.values() if column.ndim):
        raise DataError(f"the arrays of {path} must be equally long, got {[len(each) for each in columns.values()]}")
    names = [f"{path.name}/{row:05d}" for row in range(count)]
    return ExposureSet(tuple(ExposureEntry(n, partial(_row, columns, row, n, levels)) for row, n in enumerate(names)))


def _row(columns: Mapping[str, Array], row: int, name: str, levels: Levels) -> ExposurePair:
    try:
        images = [LinearImage(columns[role][row], levels) for role in _ROLES]
    except ValueError as error:
        raise Unreadable(name, str(error)) from None
    meta = {key: columns[key][row].tolist() for key in ("illuminant", "exposure_ratio") if key in columns}
    pair = ExposurePair(name, images[0], images[1], _light(meta, name), _ratio(meta, name))
    _check_pair(pair)
    return pair


def write_scene(folder: str | Path, pair: ExposurePair) -> None:
    """Write the folder of a scene: 16-bit PNG, ``meta.json`` and, if something is left out, ``mask.png``.

    Raises:
        OSError: it cannot be written.
    """
    folder = Path(folder)
    for role, image in zip(_ROLES, (pair.long, pair.short), strict=True):
        if image is not None:
            write_bytes(folder / f"{role}.png", write_png16((image.array() * 65535 + 0.5).astype(np.uint16)))
    if pair.mask is not None:
        left_out = np.where(pair.mask, 0, 255).astype(np.uint8)
        write_picture(folder / "mask.png", Picture(left_out[..., None]))
    meta: dict[str, Any] = {}
    if pair.illuminant is not None:
        meta["illuminant"] = [float(value) for value in pair.illuminant]
    if pair.ratio is not None:
        meta["exposure_ratio"] = pair.ratio
    write_text(folder / "meta.json", json.dumps(meta, indent=1))
